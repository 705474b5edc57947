"""What training is fed with: images in a seeded order, or what frozen networks said of them, read from disk."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from restnet_hf.data.datasets import Batch, as_batch, batches, data_fingerprint
from restnet_hf.distributed import this_process
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.training.args import TrainArgs
from restnet_hf.training.feature_cache import FeatureCache
from restnet_hf.training.frozen import FrozenPart


class SeededItems(Dataset):
    """A data set whose random augmentation depends on seed, epoch and index alone.

    So it is the same on any number of processes and workers, and for a run that was resumed in the middle of an epoch.

    Args:
        rows: map-style.
        seed: 0 or above.
    """

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(hash((self.seed, self.epoch, index)) % 2**63)
            return self.rows[index]


def streams(data: Any) -> bool:
    """Whether a data set has no length, so that its epochs cannot be counted."""
    return not isinstance(data.dataset if isinstance(data, DataLoader) else data, Sized)


def feed(train_set: Any, args: TrainArgs) -> DataLoader:
    """Batches of a data set in random order; a loader is taken as it is.

    Raises:
        ValueError: there is no image, or no end.
    """
    if streams(train_set):
        if args.max_steps is None or (args.matching_epochs and args.num_train_epochs):
            raise ValueError(
                "train_set has no length, so its epochs cannot be counted: give max_steps, and one of matching_epochs "
                "and num_train_epochs"
            )
    elif not len(train_set):
        raise ValueError("train_set is empty: at least one image is needed")
    if isinstance(train_set, DataLoader):
        return train_set
    options: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": args.dataloader_num_workers}
    if streams(train_set):
        return DataLoader(train_set, **options)
    rows = train_set
    if data_fingerprint(rows) is None and not isinstance(rows, FeatureCache):
        rows = SeededItems(rows, args.seed)
    return DataLoader(rows, shuffle=True, **options)


def keep(
    model: StitchedModelForImageClassification, frozen: FrozenPart, train_set: Any, args: TrainArgs
) -> FeatureCache:
    """The data set with what frozen networks say of its images, kept in ``args.cache_dir``, in the place of images.

    Whatever is on disk already, from an earlier run or for other routes, is not computed again. Several processes on
    one machine share the work.

    Raises:
        ValueError: the images have no fingerprint (they are augmented, say), so that others could be taken for them.
        OSError: the disk is too small.
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
    about = {**model.identity(), "images": images, "mixed_precision": args.mixed_precision, "dtype": args.cache_dtype}
    cache = FeatureCache(args.cache_dir or "", about, len(train_set))
    state.wait_for_everyone()
    run: dict[str, Any] = {"main": state.is_main_process, "barrier": state.wait_for_everyone}
    with cache.turn(specs, **run) as missing:
        if missing:
            with cache.write({name: specs[name] for name in missing}, **run) as rows:
                for start, x, labels in _share(model, train_set, args.batch_size):
                    known = frozen.compute(x, {*missing} - {"labels"})
                    rows.put(start, known | ({} if labels is None or "labels" not in missing else {"labels": labels}))
    return cache.select(specs)


def _share(
    model: StitchedModelForImageClassification, train_set: Any, batch_size: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The batches of this process: the place of the first image, the images, and their labels where there are any."""
    state, start = this_process(), 0
    for index, batch in enumerate(batches(train_set, batch_size, "cache")):
        if index % state.num_processes == state.process_index:
            model.preprocessing.check(batch["pixel_values"])
            yield start, batch["pixel_values"].to(model.device, model.dtype), batch.get("labels")
        start += len(batch["pixel_values"])


def first_images(train_set: Any, count: int, batch_size: int = 64) -> Iterator[Batch]:
    """Batches of about the first ``count`` images of a data set, in its own order."""
    rows, options = train_set, dict[str, Any](batch_size=batch_size)
    if isinstance(train_set, DataLoader):
        rows, options["collate_fn"] = train_set.dataset, train_set.collate_fn
    loader: Any = train_set
    if not streams(train_set):
        loader = DataLoader(Subset(rows, range(min(count, len(rows)))), **options)
    elif not isinstance(train_set, DataLoader):
        loader = DataLoader(train_set, batch_size=batch_size)
    seen = 0
    for item in loader:
        batch = as_batch(item, "train_set")
        yield batch
        seen += len(batch["pixel_values"])
        if seen >= count:
            return
