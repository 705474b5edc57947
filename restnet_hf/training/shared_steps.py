"""The batches of an epoch: several processes share the images of each, and a stream goes on where it stopped."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from itertools import islice
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.utils import broadcast
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from restnet_hf.data.ahead import can_read_ahead, has_known_order, read_ahead
from restnet_hf.data.datasets import Batch, to_batch
from restnet_hf.data.pixel_values import layers_of
from restnet_hf.data.shares import SeededItems, loader_like
from restnet_hf.distributed import from_main
from restnet_hf.hashing import weights_sha256


Check = Callable[[Any], Batch]
Pairs = Generator[tuple[Any, Any], None, None]


class OwnPart(NamedTuple):
    """What a process has of the batch of a step.

    Args:
        batch: batch that was checked.
        counts: whether its images belong to this process. Where a step has too few for all processes, one of others
            stands in, so that all do the same; it must not count.
    """

    batch: Batch
    counts: bool


def own_span(count: int, index: int, processes: int) -> slice:
    """The part of so many images that one of several processes has; sizes differ by at most one.

    Args:
        count: number of images.
        index: index of the process.
        processes: number of processes.
    """
    return slice(count * index // processes, count * (index + 1) // processes)


class OwnIndices(BatchSampler):
    """This process's part of each batch of indices; the first index where it has none.

    Accelerate's own part of a last batch would repeat images of the first one, which then count twice.

    Args:
        batches: batch sampler of all processes.
        index: index of this process.
        processes: number of processes.
        asks: whether each batch of indices is that of the main process, as others might draw another one.
    """

    def __init__(self, batches: Any, index: int, processes: int, asks: bool) -> None:
        self.asks = asks
        self.batch_sampler, self.index, self.processes = batches, index, processes
        self.sampler = getattr(batches, "sampler", None)  # type: ignore[assignment]  # Accelerate seeds it
        self.batch_size, self.drop_last = getattr(batches, "batch_size", 1), False
        self.sizes: list[int] = []  # number of own images in each batch of this pass

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes.clear()
        for batch in self._of_main() if self.asks else self.batch_sampler:
            own = batch[own_span(len(batch), self.index, self.processes)]
            self.sizes.append(len(own))
            yield own or batch[:1]

    def _of_main(self) -> Iterator[list[int]]:
        batches = iter(self.batch_sampler)
        while (batch := from_main(lambda: next(batches, None))) is not None:
            yield batch


class IndexedSteps:
    """Batches of data with indices.

    Args:
        loader: loader with the batches of all processes.
        accelerator: Accelerate's state.
        check: function that checks a batch and returns it.

    Raises:
        ValueError: the loader makes no batches.
    """

    def __init__(self, loader: DataLoader, accelerator: Accelerator, check: Check) -> None:
        self.check = check
        if loader.batch_sampler is None:
            raise ValueError(
                "train_set is a DataLoader with batch_size=None, whose data set has to make the batches: give it a "
                "batch_size or a batch_sampler"
            )
        self.dataset: Any = loader.dataset
        self.ahead = can_read_ahead(loader)
        self.own: OwnIndices | None = None
        if accelerator.num_processes > 1:
            sampler = getattr(loader.batch_sampler, "sampler", None)
            asks = not has_known_order(loader) or getattr(sampler, "generator", None) is not None
            self.own = OwnIndices(loader.batch_sampler, accelerator.process_index, accelerator.num_processes, asks)
            loader = loader_like(loader, loader.dataset, batch_size=1, drop_last=False, batch_sampler=self.own)
        options: dict[str, Any] = {"num_processes": 1, "process_index": 0, "put_on_device": True}  # own ones already
        options |= {"use_seedable_sampler": True, "non_blocking": True}
        self.loader = prepare_data_loader(loader, accelerator.device, **options)

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, done: int) -> Iterator[OwnPart]:
        """The remaining items of an epoch.

        Args:
            epoch: number of the epoch, from 0.
            done: number of its batches that are done.
        """
        if isinstance(self.dataset, SeededItems):
            self.dataset.epoch = epoch
        loader = skip_first_batches(self.loader, done) if done else self.loader
        if hasattr(loader, "set_epoch"):  # a loader that skips begins at epoch 0 before accelerate 1.15
            loader.set_epoch(epoch)
        for number, item in enumerate(read_ahead(loader) if self.ahead else loader, done):
            yield OwnPart(self.check(item), self.own is None or self.own.sizes[number] > 0)

    def place(self) -> None:
        """Nothing but the number of batches is needed to go on."""

    def resume(self, place: Any) -> None:
        """Do nothing: `epoch` skips indices.

        Args:
            place: what `place` returned.
        """


class StreamSteps:
    """Batches of a stream, which the main process reads and sends to the others.

    Args:
        loader: loader with the batches of all processes.
        accelerator: Accelerate's state.
        check: function that checks a batch and returns it.
        record: whether `place` is needed.
    """

    def __init__(self, loader: DataLoader, accelerator: Accelerator, check: Check, record: bool = False) -> None:
        self.loader, self.accelerator, self.check = loader, accelerator, check
        self.dataset: Any = loader.dataset
        self.ahead = can_read_ahead(loader)  # then it is a stream of datasets, which draws no random numbers
        self.record = record and self.ahead and type(loader) is DataLoader
        self.last: tuple[Any, Any] | None = None  # state before the last batch, and that batch
        self.resumed: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, done: int) -> Iterator[OwnPart]:
        """The remaining items of an epoch.

        Args:
            epoch: number of the epoch, from 0.
            done: number of its batches that are done.

        Raises:
            ValueError: the images that come are not those that were there before.
        """
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        items: Any = self._read(done)
        self.last = None
        if self.ahead and self.accelerator.is_main_process:
            items = read_ahead(items)
        with closing(items) as source:
            while (own := self._share(source)) is not None:
                yield own

    def place(self) -> dict[str, Any] | None:
        """Where the stream stopped, as JSON can hold it: its state before the last batch, and SHA-256 of that batch.

        None where the stream has to be read again from the beginning of the epoch to go on.
        """
        if self.last is None:
            return None
        state, item = self.last
        try:
            same = json.loads(json.dumps(state)) == state
        except TypeError:
            same = False
        return {"sha256": weights_sha256(item)} | ({"state": state} if same else {})

    def resume(self, place: dict[str, Any] | None) -> None:
        """Begin the next epoch where another run stopped.

        Args:
            place: what `place` returned.

        Raises:
            OSError: the place is damaged.
        """
        if place is not None and not (isinstance(place, Mapping) and isinstance(place.get("sha256"), str)):
            raise OSError(
                "the last checkpoint is damaged: its place in the stream has no SHA-256; delete it to go on from the "
                "one before"
            )
        self.resumed = place if self.record else None

    def _read(self, done: int) -> Pairs:
        """The remaining batches, each with the state of the stream before it."""
        place, self.resumed = self.resumed, None
        items = self._continued(place) if done and place else None
        if items is None:
            items = self._from(None)
            last = next(islice(items, done - 1, None), None) if done else None
            if done and place and (last is None or weights_sha256(last[0]) != place["sha256"]):
                raise ValueError(
                    f"train_set is not the stream that the checkpoint was written with: its batch {done} has other "
                    "images. Give the same images in the same order, or choose another output_dir"
                )
        yield from items

    def _continued(self, place: Mapping[str, Any]) -> Pairs | None:
        """The batches after the place where the stream stopped; None where its state does not lead there.

        The last batch is read again, to compare it. A shuffle buffer is not in the state, so it cannot be restored.
        """
        if "state" not in place or _has_buffer(self.dataset):
            return None
        rng = torch.get_rng_state()
        items = self._from(place["state"])
        with suppress(Exception):  # whatever the state of another stream leads to
            if weights_sha256(next(items)[0]) == place["sha256"]:
                return items
        items.close()
        torch.set_rng_state(rng)  # a loader that begins draws from it
        return None

    def _from(self, state: Any) -> Pairs:
        """The batches from a state of the stream on, or from its beginning, each with the state before it."""
        loaded = state is not None
        if loaded:
            self.dataset.load_state_dict(state)
        try:
            for item in self.loader:
                yield item, state
                state = self.dataset.state_dict() if self.record else None
        finally:
            if loaded:
                self.dataset.load_state_dict({})  # later passes begin at the beginning

    def _share(self, source: Iterator[tuple[Any, Any]]) -> OwnPart | None:
        """This process's part of the next batch, on the device; None after the last one."""
        read: list[tuple[Any, Any]] = []  # by the main process

        def describe() -> dict[str, tuple[torch.Size, torch.dtype]]:
            read.extend(islice(source, 1))
            return {key: (value.shape, value.dtype) for key, value in _batch_of(read).items()}

        specs, device = from_main(describe), self.accelerator.device
        if not specs:
            return None
        batch = {key: value.to(device, non_blocking=True) for key, value in _batch_of(read).items()}
        if self.accelerator.num_processes > 1:
            batch = batch or {key: torch.empty(spec[0], dtype=spec[1], device=device) for key, spec in specs.items()}
            batch = broadcast({key: value.contiguous() for key, value in batch.items()})
        self.last = (read[0][1], read[0][0]) if self.record and read else None
        batch = self.check(batch)  # all of it, so that every process raises the same error
        span = own_span(len(batch["pixel_values"]), self.accelerator.process_index, self.accelerator.num_processes)
        counts = span.start < span.stop
        return OwnPart({key: value[span if counts else slice(1)] for key, value in batch.items()}, counts)


def _has_buffer(stream: datasets.IterableDataset) -> bool:
    """Whether a stream shuffles in a buffer."""
    return any(hasattr(layer, "buffer_size") for layer in layers_of(stream))


def _batch_of(read: list[tuple[Any, Any]]) -> Batch:
    return to_batch(read[0][0], "train_set") if read else {}


def make_steps(
    loader: DataLoader, accelerator: Accelerator, check: Check, record: bool = False
) -> IndexedSteps | StreamSteps:
    """The batches of a loader, which the processes share.

    Args:
        loader: loader with the batches of all processes.
        accelerator: Accelerate's state.
        check: function that checks an item of the loader, or a batch, and returns it as a batch.
        record: whether ``place`` is needed, for checkpoints.
    """
    if isinstance(loader.dataset, IterableDataset):
        return StreamSteps(loader, accelerator, check, record)
    return IndexedSteps(loader, accelerator, check)
