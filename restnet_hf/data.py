"""Images as batches: from tensors, loaders, datasets, folders, parquet files and the Hub."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, load_dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

from restnet_hf.fingerprints import weights_sha256
from restnet_hf.preprocessing import prepare


Batch = dict[str, Tensor]


def this_process() -> PartialState:
    """Which of the run's processes this is. On CPUs Accelerate's own state sees one alone unless it is told."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def batches(data: Any, batch_size: int, name: str = "data") -> Iterator[Batch]:
    """Batches with ``pixel_values`` (N, 3, H, W) and, where there are any, ``labels`` (N,).

    Args:
        data: a tensor of images; a map-style dataset (its items are dicts with ``pixel_values`` and ``labels``,
            pairs, or image tensors); or an iterable of such batches, a DataLoader for one.
        batch_size: for a tensor or a dataset.
        name: of the argument, for errors and the progress bar.

    Raises:
        ValueError: there is not a single image.
        TypeError: batches are something else.
    """
    if isinstance(data, Mapping) and "pixel_values" in data:
        data = [data]
    if isinstance(data, Tensor):
        source: Iterable[Any] = data.split(batch_size) if len(data) else ()
    elif isinstance(data, DataLoader | list | tuple) or not hasattr(data, "__getitem__"):
        source = data
    else:
        source = DataLoader(data, batch_size=batch_size)
    empty = True
    for item in logging.tqdm(source, desc=name, disable=not this_process().is_local_main_process):
        batch = as_batch(item, name)
        if len(batch["pixel_values"]):
            empty = False
            yield batch
    if empty:
        raise ValueError(f"{name} is empty: at least one image is needed")


def as_batch(item: Any, name: str = "data") -> Batch:
    """One batch of a loader as a dict with ``pixel_values`` and perhaps ``labels``; TypeError for anything else."""
    if isinstance(item, Tensor):
        return {"pixel_values": item}
    if isinstance(item, Mapping) and isinstance(item.get("pixel_values"), Tensor):
        labels = item.get("labels", item.get("label"))
        return {"pixel_values": item["pixel_values"]} | ({} if labels is None else {"labels": labels})
    if isinstance(item, list | tuple) and item and all(isinstance(part, Tensor) for part in item):
        return dict(zip(("pixel_values", "labels"), item, strict=False))
    raise TypeError(
        f"{name} gives {type(item).__name__}; each batch must be a tensor of images, a pair of images and labels, or "
        "a dict with a tensor of pixel_values. For a data set of images see restnet_hf.data.with_pixel_values"
    )


def data_fingerprint(data: Any) -> str | None:
    """What tells these images from all others; None for loaders and datasets of your own, which have nothing such."""
    if isinstance(data, Dataset):
        return f"dataset:{data._fingerprint}"
    if isinstance(data, Tensor):
        return f"tensor:{weights_sha256({'images': data})}"
    return None


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless ``labels`` are indices of that many classes."""
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes; build "
            "it with num_labels= or id2label= for a new task"
        )


def load_images(source: str | Path, split: str) -> Dataset:
    """A split of a labelled image data set, columns ``image`` and ``label``.

    Args:
        source: a folder with ``SPLIT*.parquet`` files, an imagefolder (``SPLIT/CLASS/*.png``), or an id on the Hub.
        split: such as ``train``.

    Raises:
        ValueError: it cannot be loaded, or has no such columns.
    """
    folder = Path(source)
    try:
        if folder.is_dir() and any(folder.glob(f"{split}*.parquet")):
            files = sorted(map(str, folder.glob(f"{split}*.parquet")))
            dataset = load_dataset("parquet", data_files={split: files}, split=split)
        elif folder.is_dir():
            dataset = load_dataset("imagefolder", data_dir=str(folder), split=split)
        else:
            dataset = load_dataset(str(source), split=split)
    except Exception as error:  # datasets raises a dozen kinds
        raise ValueError(
            f"data set {str(source)!r} cannot be loaded: it must be a folder with {split}.parquet or "
            f"{split}/<class>/<image> in it, or an id on the Hub. {error}"
        ) from error
    columns = dataset.column_names
    if "image" not in columns:
        found = next((name for name in ("img", "pixel_values") if name in columns), None)
        if found is None:
            raise ValueError(f"data set {str(source)!r} has columns {columns}; one must be called 'image'")
        dataset = dataset.rename_column(found, "image")
    return dataset


def subset(dataset: Dataset, size: int | None, seed: int = 0) -> Dataset:
    """``size`` random images, always the same for a seed; all of them for None or where there are fewer."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:size].tolist())


def with_pixel_values(dataset: Dataset, processor: Any, order: Sequence[int] | None = None) -> Dataset:
    """The data set with images prepared by ``processor`` as they are read: items hold ``pixel_values`` and ``labels``.

    Args:
        dataset: with a column ``image`` and perhaps ``label``.
        processor: of transformers.
        order: the model's class for each class of the data set, where the two are not the same.
    """

    def transform(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        prepared: dict[str, Any] = {"pixel_values": prepare(processor, rows["image"])}
        if "label" in rows:
            labels = rows["label"] if order is None else [order[label] for label in rows["label"]]
            prepared["labels"] = torch.tensor(labels)
        return prepared

    return dataset.with_transform(transform)
