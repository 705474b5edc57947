"""Data loaders of training: images in a seeded order, or cached outputs of the frozen networks."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from restnet_hf.caching import record_folder
from restnet_hf.data.datasets import Batch, batches, data_fingerprint, pins_memory, to_batch
from restnet_hf.data.shares import OwnBatch, SeededItems, in_order, is_repeatable, own_batches, shared_batches
from restnet_hf.distributed import Own, this_process
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.progress import progress_bar
from restnet_hf.training.args import TrainArgs
from restnet_hf.training.feature_cache import FeatureCache
from restnet_hf.training.frozen import FrozenPart


class FeatureRows(Dataset[dict[str, Tensor]]):
    """Tensors of each image in memory; a batch of indices is one read of each tensor.

    Args:
        tensors: tensors (N, ...) by name.
        indices: rows of the tensors that the data set has; all by default.
    """

    repeatable = True  # see `is_repeatable`

    def __init__(self, tensors: dict[str, Tensor], indices: Tensor | None = None) -> None:
        self.tensors = tensors
        self.indices = torch.arange(len(next(iter(tensors.values())))) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: rows[self.indices[index]] for name, rows in self.tensors.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The rows of several images (len(indices), ...), by name; `collate` returns them unchanged."""
        return {name: rows[self.indices[torch.as_tensor(indices)]] for name, rows in self.tensors.items()}

    def select(self, indices: Sequence[int]) -> "FeatureRows":
        """The same tensors, of some of the images.

        Args:
            indices: indices of the images.
        """
        return FeatureRows(self.tensors, self.indices[torch.as_tensor(indices)])

    @staticmethod
    def collate(rows: Any) -> dict[str, Tensor]:
        """What ``collate_fn`` of a loader must return."""
        return rows


class Batches(list[Batch]):
    """Batches in memory, unlike a list of single images, which is a data set."""


def is_stream(data: Any) -> bool:
    """Whether a data set has no length, so that its epochs cannot be counted."""
    return not isinstance(data.dataset if isinstance(data, DataLoader) else data, Sized)


def check_train_set(train_set: Any, args: TrainArgs) -> None:
    """Check that a data set has images, and that its epochs or steps can be counted.

    Args:
        train_set: a map-style data set, a DataLoader, or a data set without a length.
        args: options of the training.

    Raises:
        ValueError: there are no images, or neither a length nor ``max_steps``.
    """
    if is_stream(train_set):
        if args.max_steps is None or (args.matching_epochs and args.num_train_epochs):
            raise ValueError(
                "train_set has no length, so its epochs cannot be counted: give max_steps, and one of matching_epochs "
                "and num_train_epochs"
            )
    elif not len(train_set):
        raise ValueError("train_set is empty: at least one image is needed")


def make_loader(train_set: Any, args: TrainArgs) -> DataLoader:
    """A loader of a data set in random order; a DataLoader is returned unchanged.

    Args:
        train_set: a map-style data set, a DataLoader, or a data set without a length.
        args: options of the training.
    """
    if isinstance(train_set, DataLoader):
        return train_set
    options: dict[str, Any] = {"batch_size": args.batch_size, "pin_memory": pins_memory()}
    options["num_workers"] = args.dataloader_num_workers
    if is_stream(train_set):
        return DataLoader(train_set, **options)
    rows = train_set
    if isinstance(rows, FeatureRows):
        options |= {"num_workers": 0, "collate_fn": rows.collate}
    elif data_fingerprint(rows) is None and not _cached(rows):
        rows = SeededItems(rows, args.seed)
    return DataLoader(rows, shuffle=True, **options)


def _cached(rows: Any) -> bool:
    return isinstance(rows.dataset if isinstance(rows, Subset) else rows, FeatureCache)


def evaluation_loader(rows: Any, args: TrainArgs) -> Any:
    """Batches of a data set in its own order; batches and DataLoaders are returned unchanged.

    Args:
        rows: a map-style data set, a DataLoader, a stream, or `Batches`.
        args: options of the training.
    """
    if isinstance(rows, Batches | DataLoader):
        return rows
    if is_stream(rows):
        return DataLoader(rows, batch_size=args.batch_size, pin_memory=pins_memory())
    collate = rows.collate if isinstance(rows, FeatureRows) else None
    workers = 0 if collate or _cached(rows) else args.dataloader_num_workers
    if collate is None and data_fingerprint(rows) is None and not _cached(rows):
        rows = SeededItems(rows, args.seed)  # images that are augmented at random are the same each time
    options: dict[str, Any] = {"batch_size": args.batch_size, "pin_memory": pins_memory()}
    return DataLoader(rows, num_workers=workers, collate_fn=collate, **options)


def compute_features(
    model: StitchedModelForImageClassification,
    frozen: FrozenPart,
    images: Iterable[Batch] | Own[OwnBatch],
    autocast: Callable[[], AbstractContextManager],
) -> FeatureRows:
    """Compute the outputs of the frozen networks that routes of heads need, and hold them in memory.

    Several processes share the batches, and all hold the whole result.

    Args:
        model: model of the frozen networks.
        frozen: the frozen part of the routes that train.
        images: batches of images and labels, the same on every process, or its own.
        autocast: context manager of mixed precision.

    Returns:
        The outputs and labels of each image, in the place of the data set.
    """
    names, parts = frozen.names(frozen.walks, matching=False), list[tuple[int, dict[str, Tensor]]]()
    for number, _, batch in progress_bar(own_batches(images), "features"):
        with autocast():
            x = batch["pixel_values"].to(model.device, model.dtype, non_blocking=True)
            outputs = frozen.compute(x, names)
        every = outputs | {"labels": batch["labels"]}
        parts.append((number, {name: value.cpu() for name, value in every.items()}))
    tensors = dict[str, Tensor]()
    for name in sorted(names | {"labels"}):  # one after the other, for less memory
        chunks = in_order([(number, part.pop(name)) for number, part in parts])
        if not chunks:
            raise ValueError("train_set gives no images")
        tensors[name] = torch.cat([rows for _, rows in chunks])
    return FeatureRows(tensors)


def cache_features(
    model: StitchedModelForImageClassification, frozen: FrozenPart, train_set: Any, args: TrainArgs
) -> FeatureCache:
    """Compute the outputs of the frozen networks for a data set, and cache them in ``args.cache_dir``.

    Outputs that are on disk already, from an earlier run or for other routes, are not computed again. Several
    processes on one machine share the work, and a run that finds another one writing waits for it. The size is logged
    before anything is written, from a gigabyte on as a warning. ``restnet-hf cache list`` lists all caches.

    Args:
        model: model of the frozen networks.
        frozen: the frozen part of the routes that train.
        train_set: data set whose images do not change.
        args: options of the training, with a ``cache_dir``.

    Returns:
        The outputs and labels of each image, in the place of the data set.

    Raises:
        ValueError: the images have no fingerprint, because they are augmented for example, so the cache could not tell
            them from others.
        OSError: the disk is too small, which is checked before anything is computed or written.
    """
    images = data_fingerprint(train_set)
    if images is None:
        raise ValueError(
            "cache_dir needs images that are the same each time and can be told from others: a datasets.Dataset "
            "without augmentation, a TensorDataset, or a tensor"
        )
    state, specs = this_process(), frozen.specs(getattr(torch, args.cache_dtype), model.config.num_labels)
    first = next(batches(train_set, 1, "cache"))
    if "labels" in first:
        specs["labels"] = ((), torch.int64)
    identity = {
        **model.identity(),
        "images": images,
        "mixed_precision": args.mixed_precision,
        "dtype": args.cache_dtype,
    }
    cache = FeatureCache(args.cache_dir or "", identity, len(train_set))
    if state.is_main_process:
        record_folder(cache.folder.parent)
    state.wait_for_everyone()
    run: dict[str, Any] = {"main": state.is_main_process, "barrier": state.wait_for_everyone}
    with cache.turn(specs, **run) as missing:
        if missing:
            with cache.write({name: specs[name] for name in missing}, **run) as rows:
                for _, start, batch in shared_batches(train_set, args.batch_size, "cache"):
                    model.preprocessing.check(batch["pixel_values"])
                    x = batch["pixel_values"].to(model.device, model.dtype)
                    outputs = frozen.compute(x, {*missing} - {"labels"})
                    labels = {"labels": batch["labels"]} if "labels" in batch and "labels" in missing else {}
                    rows.put(start, outputs | labels)
    return cache.select(specs)


def first_images(
    train_set: Any, count: int, batch_size: int = 64, num_workers: int = 0, *, spread: bool = False
) -> Iterator[Batch]:
    """Batches of about ``count`` images of a data set, in its own order, by default the first ones.

    Args:
        train_set: a map-style data set, a DataLoader, or a data set without a length.
        count: number of images; the last batch may exceed it.
        batch_size: number of images in a batch, where no DataLoader decides it.
        num_workers: number of worker processes, as in ``DataLoader``.
        spread: whether the images are spread evenly over a data set that has a length, since one that is sorted by
            class has only a few classes among its first images.
    """
    seen = 0
    for item in _first_loader(train_set, count, batch_size, num_workers, spread):
        batch = to_batch(item, "train_set")
        yield batch
        seen += len(batch["pixel_values"])
        if seen >= count:
            return


def own_first_images(
    train_set: Any, count: int, batch_size: int = 64, num_workers: int = 0, *, spread: bool = False
) -> Own[OwnBatch]:
    """The batches of `first_images` that belong to this process.

    Args:
        train_set: a map-style data set, a DataLoader, or a data set without a length.
        count: number of images, as for `first_images`.
        batch_size: number of images in a batch, where no DataLoader decides it.
        num_workers: number of worker processes, as in ``DataLoader``.
        spread: whether the images are spread evenly, as for `first_images`.
    """
    loader = _first_loader(train_set, count, batch_size, num_workers, spread)
    if not is_stream(train_set):
        return shared_batches(loader, batch_size, "train_set")
    size = loader.batch_size or batch_size
    return shared_batches(loader, size, "train_set", limit=max(1, -(-count // size)) * size)


def _first_loader(train_set: Any, count: int, batch_size: int, num_workers: int, spread: bool) -> DataLoader:
    """A loader that begins with the images of `first_images`, which are the same each time if they have a length."""
    rows, options = train_set, dict[str, Any](batch_size=batch_size, num_workers=num_workers)
    if isinstance(train_set, DataLoader):
        rows, options["collate_fn"] = train_set.dataset, train_set.collate_fn
    if is_stream(train_set):
        return train_set if isinstance(train_set, DataLoader) else DataLoader(train_set, **options)
    wanted = min(count, len(rows))
    places = [place * len(rows) // wanted for place in range(wanted)] if spread else range(wanted)
    return DataLoader(Subset(rows if is_repeatable(rows) else SeededItems(rows, 0), places), **options)
