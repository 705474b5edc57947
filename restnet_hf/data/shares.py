"""shared_batches: batches of images that the processes of a run share, so that each image is read by one of them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar, cast

import torch
from datasets import Dataset
from datasets import IterableDataset as Stream
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)
from torch.utils.data import Dataset as TorchDataset

from restnet_hf.data.ahead import can_read_ahead, read_ahead
from restnet_hf.data.datasets import (
    Batch,
    batch_source,
    empty_error,
    labelled_part,
    no_labels_error,
    read_source,
    to_batch,
)
from restnet_hf.data.pixel_values import StreamSource, prepared_by, source_of
from restnet_hf.distributed import Own, from_main, gather, own_items, this_process
from restnet_hf.progress import progress_bar


class OwnBatch(NamedTuple):
    """A batch of this process, and its place in the data.

    Args:
        number: number of the batch among those of all processes, from 0.
        start: index of its first image in the data; images without a label that are left out count.
        batch: images and labels.
    """

    number: int
    start: int
    batch: Batch


class SeededItems(TorchDataset):
    """A data set whose random augmentation depends on seed, epoch and index alone.

    So it is the same for any number of processes and workers, and for a run that was resumed within an epoch.

    Args:
        rows: map-style data set to augment.
        seed: seed of the augmentation, 0 or above.
    """

    repeatable = True

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(hash((self.seed, self.epoch, index)) % 2**63)
            return self.rows[index]


def is_repeatable(rows: Any) -> bool:
    """Whether the items of a map-style data set are the same whatever was read before; False where it is not known.

    Data sets of ours have an attribute ``repeatable``.

    Args:
        rows: map-style data set of images.
    """
    while type(rows) is Subset:
        rows = rows.dataset
    if isinstance(rows, Dataset):
        prepared = prepared_by(rows)
        return rows.format["type"] != "custom" if prepared is None else prepared.augment is None
    return isinstance(rows, Tensor) or type(rows) is TensorDataset or getattr(rows, "repeatable", False)


def own_batches(batches: Iterable[Any] | Own[OwnBatch]) -> Iterator[OwnBatch]:
    """The batches of this process, with their places: every n-th one of n processes, unless they are its own already.

    Args:
        batches: batches, the same ones on every process, or what `shared_batches` returns.
    """
    if isinstance(batches, Own):
        return iter(batches)
    return _numbered(cast("Iterable[Any]", batches), this_process().process_index)


Chunk = TypeVar("Chunk", bound=tuple[Any, ...])


def in_order(chunks: list[Chunk]) -> list[Chunk]:
    """What all processes computed for their batches, in the order of the batches.

    Args:
        chunks: results of this process, each of which begins with the number of its batch.
    """
    return sorted(chain.from_iterable(gather(chunks)), key=lambda chunk: chunk[0])


def _numbered(batches: Iterable[Any], first: int) -> Iterator[OwnBatch]:
    """Every n-th of all batches, from the first one on."""
    start, step = 0, this_process().num_processes
    for number, batch in enumerate(batches):
        if number % step == first:
            yield OwnBatch(number, start, batch)
        start += len(next(iter(batch.values())))


def shared_batches(
    data: Any, batch_size: int, name: str = "data", *, limit: int | None = None, unlabelled: bool = True
) -> Own[OwnBatch]:
    """The batches of this process; those of all processes together are those of `batches`.

    Where the data has indices, each process reads its own images alone: every n-th batch, n being the number of
    processes. Random augmentation then depends on a number that is drawn at the start, and on the index. Of a stream
    that `with_pixel_values` prepared, each process reads all rows and decodes its own pictures alone, unless pictures
    are augmented at random, broken ones are skipped, or functions of yours run. Other streams, and loaders with an
    order of their own, are read by every process, with the random numbers of the main process, so that the order is
    the same on each.

    Where one process has a broken picture, it alone raises an error. Its launcher then ends the others.

    Args:
        data: images in any form that `batches` takes, the same on every process; or what this function returned.
        batch_size: number of images in a batch, for a tensor or a dataset.
        name: name of the argument, for errors and the progress bar.
        limit: largest number of images, the first ones; None for all.
        unlabelled: whether images whose label is -100 are kept.

    Raises:
        ValueError: there are no images; one process also knows whether none has a label.
        TypeError: a batch has another type.
    """
    if isinstance(data, Own):
        return data
    own = _own_part(data, batch_size, name, limit)
    return own if unlabelled else Own(_labelled(own))


def _labelled(own: Iterable[OwnBatch]) -> Iterator[OwnBatch]:
    """Batches without the images that have no label; where only some process may have others, none is no error."""
    empty = True
    for number, start, batch in own:
        labelled = labelled_part(batch)
        if len(labelled["pixel_values"]):
            empty = False
            yield OwnBatch(number, start, labelled)
    if empty and this_process().num_processes == 1:
        raise no_labels_error()


def _own_part(data: Any, batch_size: int, name: str, limit: int | None) -> Own[OwnBatch]:
    source, count = _indexed(data, batch_size, name, limit)
    if source is not None:
        if not count:
            raise empty_error(name)
        return Own(_read_own(source, name))
    stream = _of_stream(data, batch_size)
    if stream is not None:
        return Own(_read_stream(stream, name, limit))
    return Own(_read_all(data, batch_size, name, limit))


class _OwnLoader(NamedTuple):
    """A loader of this process's batches, and the number of images in a whole one."""

    loader: Iterable[Any]
    size: int


def _indexed(data: Any, batch_size: int, name: str, limit: int | None) -> tuple[_OwnLoader | None, int]:
    """This process's part of data with indices, and the number of all images; None where it has none."""
    if isinstance(data, DataLoader):
        return _of_loader(data, limit)
    if isinstance(data, Tensor):
        data = data[:limit]
        every = data.split(batch_size) if len(data) else ()
        return _OwnLoader(list(_every_nth(every)), batch_size), len(data)
    if isinstance(data, list | tuple | Mapping) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return None, 0
    batch_source(data, batch_size, name)  # raises an error where pictures are not prepared
    rows, count = data, len(data) if limit is None else min(limit, len(data))
    if not is_repeatable(rows):
        rows = SeededItems(rows, from_main(_draw_seed))
    every = (list(range(at, min(at + batch_size, count))) for at in range(0, count, batch_size))
    return _OwnLoader(DataLoader(rows, batch_sampler=list(_every_nth(every))), batch_size), count


def _draw_seed() -> int:
    """A seed from torch's own generator, which ``torch.manual_seed`` makes repeatable."""
    return int(torch.randint(2**62, ()))


def _every_nth(items: Iterable[Any]) -> Iterator[Any]:
    state = this_process()
    return islice(items, state.process_index, None, state.num_processes)


def _of_loader(data: DataLoader, limit: int | None) -> tuple[_OwnLoader | None, int]:
    """This process's part of a loader in the order of its data set; None where the order or images may be others."""
    sampler: Any = data.batch_sampler
    plain = type(sampler) is BatchSampler and type(sampler.sampler) is SequentialSampler
    if not plain or isinstance(data.dataset, IterableDataset) or not is_repeatable(data.dataset) or limit is not None:
        return None, 0
    if this_process().num_processes == 1:
        return _OwnLoader(data, sampler.batch_size), len(data)
    own = list(_every_nth(sampler))
    loader = loader_like(data, data.dataset, batch_size=1, drop_last=False, generator=None, batch_sampler=own)
    return _OwnLoader(loader, sampler.batch_size), len(data)


class _OwnStream(NamedTuple):
    """A prepared stream, what it is made of, and the batches in which it is read."""

    stream: Stream
    source: StreamSource
    size: int
    drop_last: bool = False


def _of_stream(data: Any, batch_size: int) -> _OwnStream | None:
    """A stream, or a loader of one, whose pictures only need to be decoded where they are used; else None."""
    size, drop_last = batch_size, False
    if isinstance(data, DataLoader):
        if data.num_workers or data.collate_fn is not default_collate or not data.batch_size:
            return None
        data, size, drop_last = data.dataset, data.batch_size, data.drop_last
    source = source_of(data) if isinstance(data, Stream) else None
    if source is None or source.prepared.skip or not source.encoded or not can_read_ahead(data):
        return None
    if getattr(data, "_starting_state_dict", None):  # it goes on within an epoch
        return None
    source.rows.set_epoch(data.epoch)
    return _OwnStream(data, source, size, drop_last)


def _read_stream(of: _OwnStream, name: str, limit: int | None) -> Iterator[OwnBatch]:
    """Read all rows of a stream, and decode the pictures of this process's batches, ahead of their use."""
    return iter(progress_bar(read_ahead(_decode_own(of, name, limit)), name))


def _decode_own(of: _OwnStream, name: str, limit: int | None) -> Iterator[OwnBatch]:
    state, start = this_process(), 0
    for number, rows in enumerate(of.source.rows.iter(of.size, drop_last_batch=of.drop_last)):
        left = None if limit is None else limit - start
        rows = {column: values[:left] for column, values in rows.items()}
        end = start + len(next(iter(rows.values())))
        if number % state.num_processes == state.process_index:
            yield OwnBatch(number, start, to_batch(of.source.prepared(rows, range(start, end))))
        start = end
        if start == limit:
            return
    if not start:
        raise empty_error(name)


def own_of_loader(loader: Iterable[Any]) -> Iterator[Any]:
    """The items of this process of a loader, as they are; see `shared_batches`.

    Args:
        loader: loader, or items in memory, the same ones on every process.
    """
    source = _of_loader(loader, None)[0] if isinstance(loader, DataLoader) else None
    if source is not None:
        return iter(source.loader)
    stream = _of_stream(loader, 0) if isinstance(loader, DataLoader) else None
    if stream is not None:
        return (each.batch for each in read_ahead(_decode_own(stream, "data", None)))
    _use_equal_rng(loader)
    return own_items(loader)


def loader_like(loader: DataLoader, rows: Any, **changes: Any) -> DataLoader:
    """A loader of other rows with the options of a given one, but for some.

    Args:
        loader: loader that has the options.
        rows: data set of the new loader.
        changes: options that differ.
    """
    names = ["batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "generator", "timeout"]
    names += ["worker_init_fn", "multiprocessing_context"]
    names += ["persistent_workers", "prefetch_factor"] if loader.num_workers else []
    return DataLoader(rows, **{name: getattr(loader, name) for name in names} | changes)


def _read_own(source: _OwnLoader, name: str) -> Iterator[OwnBatch]:
    state = this_process()
    for turn, item in enumerate(read_source(source.loader, name)):
        batch, number = to_batch(item, name), state.process_index + turn * state.num_processes
        if len(batch["pixel_values"]):
            yield OwnBatch(number, number * source.size, batch)


def _read_all(data: Any, batch_size: int, name: str, limit: int | None) -> Iterator[OwnBatch]:
    """Read all batches, in the same order on every process, and yield those of this one."""
    _use_equal_rng(data)
    most = math.inf if limit is None else limit
    yield from _numbered(_limited(data, batch_size, name, most), this_process().process_index)


def _use_equal_rng(data: Any) -> None:
    """Give all processes the random numbers of the main one, so that a stream or loader has one order."""
    if this_process().num_processes == 1 or isinstance(data, list | tuple | Mapping):
        return
    torch.set_rng_state(from_main(torch.get_rng_state))
    generator = getattr(data, "generator", None) or getattr(getattr(data, "sampler", None), "generator", None)
    if isinstance(generator, torch.Generator):
        generator.set_state(from_main(generator.get_state))


def _limited(data: Any, batch_size: int, name: str, limit: float) -> Iterator[Batch]:
    left, empty = limit, True
    for item in read_source(batch_source(data, batch_size), name):
        batch = to_batch(item, name)
        if left < len(batch["pixel_values"]):
            batch = {key: values[: int(left)] for key, values in batch.items()}
        left -= len(batch["pixel_values"])
        if len(batch["pixel_values"]):
            empty = False
            yield batch
        if left <= 0:
            return
    if empty:
        raise empty_error(name)
