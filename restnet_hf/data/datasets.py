"""Images as batches: from tensors, loaders, datasets, folders, parquet files and the Hub."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers.utils import logging

from restnet_hf.data.augment import Augment, augmentation, augmented
from restnet_hf.data.labels import label_names, label_order
from restnet_hf.data.preprocessing import prepare
from restnet_hf.distributed import this_process
from restnet_hf.hashing import weights_sha256


Batch = dict[str, Tensor]

IGNORED = -100  # the label of images that losses of torch and transformers ignore
MULTI_LABEL = "multi_label_classification"  # a problem_type of transformers
PARQUET = ("{}*.parquet", "{}/*.parquet", "data/{}-*.parquet")  # where a folder may have the files of a split
SHARDS = 64  # of a streamed imagefolder: no fewer than anyone has workers
MIXED_FILES = 10  # of a stream, whose images a subset takes in turn
ROWS = 32  # of a stream, prepared at a time


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
    """What tells these images from all others.

    None for loaders, streams and datasets of your own, which have nothing such, and for images that are augmented by
    `with_pixel_values`: they are others every time.
    """
    if isinstance(data, Dataset):
        prepared = _prepared(data)
        if prepared is not None and prepared.augment is not None:
            return None
        return f"dataset:{data._fingerprint}"
    if isinstance(data, Tensor):
        return f"tensor:{weights_sha256({'images': data})}"
    if type(data) is TensorDataset:
        return f"tensors:{weights_sha256({str(i): tensor for i, tensor in enumerate(data.tensors)})}"
    return None


def check_problem(problem_type: str | None) -> None:
    """Raise ValueError where a ``problem_type`` of transformers is not of classification."""
    if problem_type == "regression":
        raise ValueError(
            "problem_type='regression', which is what num_labels=1 means to transformers, too: the model classifies; "
            f"leave problem_type out for one class of two or more for each image, or set {MULTI_LABEL!r}"
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless ``labels`` (N,) are indices of that many classes, or -100 for images without one."""
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels must be class indices (N,), one for each image, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}; several classes for an image are learned with the Trainer of transformers and "
            f"problem_type={MULTI_LABEL!r} alone"
        )
    labels = labels[labels != IGNORED]
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes; build "
            "it with num_labels= or id2label= for a new task"
        )


def labelled(data: Iterable[Batch]) -> Iterator[Batch]:
    """Batches without the images whose label is -100; images of batches without labels stay.

    Raises:
        ValueError: no image is left.
    """
    empty = True
    for batch in data:
        labels = batch.get("labels")
        if labels is not None and labels.dim() == 1:
            batch = {key: value[(labels != IGNORED).to(value.device)] for key, value in batch.items()}
        if len(batch["pixel_values"]):
            empty = False
            yield batch
    if empty:
        raise ValueError(f"every image has the label {IGNORED}, which stands for no label")


def check_classes(data: Any, id2label: Mapping[int, str]) -> None:
    """Check that the classes that ``data`` names are the model's, one by one, before labels are taken for them.

    Names are compared as in `label_order`, and ``_`` is a space; where either side only numbers its
    classes, their count is compared. Labels that `with_pixel_values` puts in the model's order pass, and so does data
    that names no classes, such as a dataset of your own.

    Args:
        data: a data set of labelled images, or a loader of one.
        id2label: the model's classes.

    Raises:
        ValueError: they are not as many, not called the same, or in another order.
    """
    while not isinstance(data, Dataset | IterableDataset) and hasattr(data, "dataset"):
        data = data.dataset
    if not isinstance(data, Dataset | IterableDataset):
        return
    prepared = _prepared(data)
    if prepared is not None and prepared.order is not None:
        return
    names = _class_names(data) if prepared is None else prepared.names
    if names is None:
        return
    model, both = [str(id2label[index]) for index in sorted(id2label)], [label_names(id2label), names]
    told = f"the data set has {len(names)} classes ({_some(names)}), the model {len(model)} ({_some(model)})"
    ways = (
        f"build the model with id2label= or num_labels={len(names)} to train new heads for the data set's classes, or "
        "pass with_pixel_values(..., order), which gives the model's class for each class of the data set"
    )
    if len(names) != len(model):
        raise ValueError(f"{told}; {ways}")
    if any(each is None or list(each) == [str(index) for index in range(len(each))] for each in both):
        return
    order = label_order(*([name.replace("_", " ") for name in each] for each in (names, model)))
    if order is None:
        raise ValueError(f"{told}, and they are not called the same; {ways}")
    if order != list(range(len(order))):
        raise ValueError(
            f"{told}, the same in another order; pass with_pixel_values(..., order), with the order that "
            "restnet_hf.data.labels.label_order(names of the data set, names of the model) gives"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _class_names(data: Dataset | IterableDataset) -> tuple[str, ...] | None:
    """Names of the classes in a column ``label`` or ``labels``; None where there are none."""
    found = [(data.features or {}).get(column) for column in ("label", "labels")]
    return next((tuple(feature.names) for feature in found if isinstance(feature, ClassLabel)), None)


def load_images(source: str | Path, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """A split of a labelled image data set, columns ``image`` and ``label``.

    Args:
        source: a folder with ``SPLIT*.parquet``, ``SPLIT/*.parquet`` or ``data/SPLIT-*.parquet`` files, an imagefolder
            (``SPLIT/CLASS/*.png``), or an id on the Hub.
        split: such as ``train``.
        streaming: read images one after another, with nothing downloaded or converted first. The images of an
            imagefolder, which lie there class by class, then come in a random order that is always the same.

    Returns:
        A Dataset, or for ``streaming`` an IterableDataset.

    Raises:
        ValueError: it cannot be loaded, or has no such columns.
    """
    try:
        dataset = _load(source, split, streaming)
        columns = _columns(dataset)
    except Exception as error:  # datasets raises a dozen kinds
        raise ValueError(
            f"data set {str(source)!r} cannot be loaded: it must be a folder with {split}.parquet or "
            f"{split}/<class>/<image> in it, or an id on the Hub. {error}"
        ) from error
    if "image" not in columns:
        found = next((name for name in ("img", "pixel_values") if name in columns), None)
        if found is None:
            raise ValueError(f"data set {str(source)!r} has columns {columns}; one must be called 'image'")
        dataset = dataset.rename_column(found, "image")
    return dataset


def _load(source: str | Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    folder = Path(source)
    if not folder.is_dir():
        return load_dataset(str(source), split=split, streaming=streaming)
    for pattern in PARQUET:
        if files := sorted(map(str, folder.glob(pattern.format(split)))):
            return load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    dataset = load_dataset("imagefolder", data_dir=str(folder), split=split)  # reads paths, and no images yet
    if not streaming:
        return dataset
    mixed = dataset.shuffle(seed=0, keep_in_memory=True)
    return mixed.to_iterable_dataset(num_shards=min(SHARDS, len(mixed)))


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; those of the first row where a stream says none."""
    return dataset.column_names or list(next(iter(dataset), {}))


def subset(dataset: Dataset | IterableDataset, size: int | None, seed: int = 0) -> Dataset | IterableDataset:
    """``size`` random images, always the same for a seed; all of them for None or where there are fewer.

    Of a stream, whose length nobody knows, it is another draw: its files, or other shards, come in random order, ten
    of them at a time, and the first images are taken from each in turn. They too are the same in every epoch; out of
    a buffer that is shuffled they would not be.
    """
    if size is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        files = min(MIXED_FILES, dataset.num_shards)
        return dataset.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=files).take(size)
    if size >= len(dataset):
        return dataset
    return dataset.select(torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:size].tolist())


@dataclass(frozen=True, eq=False)
class PixelValues:
    """What `with_pixel_values` does to rows: a data set that holds it tells what became of its images and labels.

    Args:
        processor: of transformers.
        order: the model's class for each class of the data set; None where they are the same.
        augment: from one PIL image to another; None for images as they are.
        names: of the data set's classes; None where it has none.
    """

    processor: Any
    order: Sequence[int] | None = None
    augment: Augment | None = None
    names: tuple[str, ...] | None = None

    def __call__(self, rows: Mapping[str, list[Any]]) -> Batch:
        """``pixel_values`` (N, 3, H, W) and, where there are any, ``labels`` (N,); labels below 0 stay as they are."""
        images = rows["image"] if self.augment is None else augmented(self.augment, rows["image"])
        prepared = {"pixel_values": prepare(self.processor, images)}
        if "label" in rows:
            order = self.order
            labels = [label if order is None or label < 0 else order[label] for label in rows["label"]]
            prepared["labels"] = torch.tensor(labels)
        return prepared


def with_pixel_values(
    dataset: Dataset | IterableDataset,
    processor: Any,
    order: Sequence[int] | None = None,
    augment: str | Augment | None = None,
) -> Dataset | IterableDataset:
    """The data set with images prepared by ``processor`` as they are read: items hold ``pixel_values`` and ``labels``.

    Args:
        dataset: with a column ``image`` and perhaps ``label``; or a stream of such rows, which gives a stream.
        processor: of transformers.
        order: the model's class for each class of the data set, where the two are not the same.
        augment: what to do to each RGB image before ``processor``, at random: a key of
            `AUGMENTATIONS`, or a function from one PIL image to another. The draws are those of
            torch's global generator, so after ``torch.manual_seed`` they are the same again.

    Raises:
        ValueError: there is no such augmentation.
    """
    prepared = PixelValues(processor, order, augmentation(augment), _class_names(dataset))
    if isinstance(dataset, IterableDataset):
        return dataset.map(prepared, batched=True, batch_size=ROWS, remove_columns=_columns(dataset))
    return dataset.with_transform(prepared)


def _prepared(data: Dataset | IterableDataset) -> PixelValues | None:
    """What `with_pixel_values` made of it, also where images were chosen or shuffled since; None if it did not."""
    if isinstance(data, Dataset):
        found = data.format["format_kwargs"].get("transform")
        return found if isinstance(found, PixelValues) else None
    layer = data._ex_iterable
    while layer is not None:
        if isinstance(found := getattr(layer, "function", None), PixelValues):
            return found
        layer = getattr(layer, "ex_iterable", None)
    return None
