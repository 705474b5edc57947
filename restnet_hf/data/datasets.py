"""Images as batches: from tensors, loaders, datasets, folders, parquet files and the Hub."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from restnet_hf.data.augment import Augment, augment_images, make_augmentation
from restnet_hf.data.labels import label_names, label_order
from restnet_hf.data.preprocessing import prepare_images
from restnet_hf.hashing import weights_sha256
from restnet_hf.progress import progress_bar


Batch = dict[str, Tensor]

IGNORED = -100  # label of images that losses of torch and transformers ignore
MULTI_LABEL = "multi_label_classification"  # a problem_type of transformers
PARQUET = ("{}*.parquet", "{}/*.parquet", "data/{}-*.parquet")  # patterns of the files of a split in a folder
SHARDS = 64  # of a streamed imagefolder, at least as many as loaders have workers
MIXED_FILES = 10  # of a stream, from which a subset takes images in turn
ROWS = 32  # of a stream, prepared at a time


def batches(data: Any, batch_size: int, name: str = "data") -> Iterator[Batch]:
    """Batches with ``pixel_values`` (N, 3, H, W) and, where there are any, ``labels`` (N,).

    Args:
        data: tensor of images; map-style dataset whose items are dicts with ``pixel_values`` and ``labels``, pairs or
            image tensors; or iterable of such batches, such as a DataLoader.
        batch_size: number of images in a batch, for a tensor or a dataset.
        name: name of the argument, for errors and the progress bar.

    Raises:
        ValueError: there are no images.
        TypeError: a batch has another type.
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
    for item in progress_bar(source, name):
        batch = to_batch(item, name)
        if len(batch["pixel_values"]):
            empty = False
            yield batch
    if empty:
        raise ValueError(f"{name} is empty: at least one image is needed")


def to_batch(item: Any, name: str = "data") -> Batch:
    """Convert a batch of a loader to a dict with ``pixel_values`` and optionally ``labels``.

    Raises:
        TypeError: the batch has another type.
    """
    if isinstance(item, Tensor):
        return {"pixel_values": item}
    if isinstance(item, Mapping) and isinstance(item.get("pixel_values"), Tensor):
        labels = item.get("labels", item.get("label"))
        return {"pixel_values": item["pixel_values"]} | ({} if labels is None else {"labels": labels})
    if isinstance(item, list | tuple) and item and all(isinstance(part, Tensor) for part in item):
        return dict(zip(("pixel_values", "labels"), item, strict=False))
    raise TypeError(
        f"{name} yields {type(item).__name__}; each batch must be a tensor of images, a pair of images and labels, or "
        "a dict with a tensor of pixel_values. For a data set of images see restnet_hf.data.with_pixel_values"
    )


def data_fingerprint(data: Any) -> str | None:
    """A string that identifies the images of a data set.

    None for loaders, streams and datasets of your own, which cannot be identified, and for images that
    `with_pixel_values` augments, since they differ each time.
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


def check_problem_type(problem_type: str | None) -> None:
    """Raise ValueError where a ``problem_type`` of transformers is not a classification."""
    if problem_type == "regression":
        raise ValueError(
            "problem_type='regression', which is what num_labels=1 means to transformers: the model only classifies; "
            f"leave problem_type out for one class of two or more for each image, or set {MULTI_LABEL!r}"
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless ``labels`` (N,) are indices of that many classes, or -100 for images without one."""
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels must be class indices (N,), one for each image, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}; several classes for an image need transformers' Trainer and "
            f"problem_type={MULTI_LABEL!r}"
        )
    labels = labels[labels != IGNORED]
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes; build "
            "it with num_labels= or id2label= for a new task"
        )


def drop_unlabelled(data: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches without the images whose label is -100; batches without any labels stay as they are.

    Raises:
        ValueError: no image remains.
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
        raise ValueError(f"every image has the label {IGNORED}, which means no label")


def check_classes(data: Any, id2label: Mapping[int, str]) -> None:
    """Check that the class names of ``data`` are the model's, in the same order, before its labels are used.

    Names are compared as by `label_order`, with ``_`` for a space; where the classes of either are only numbered,
    their counts are compared. Labels that `with_pixel_values` puts into the model's order pass, and so does data
    without class names, such as a dataset of your own.

    Args:
        data: data set of labelled images, or a loader of one.
        id2label: names of the model's classes.

    Raises:
        ValueError: the classes differ in number, names or order.
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
    model, named = [str(id2label[index]) for index in sorted(id2label)], [label_names(id2label), names]
    both_sets = f"the data set has {len(names)} classes ({_first(names)}), the model {len(model)} ({_first(model)})"
    advice = (
        f"build the model with id2label= or num_labels={len(names)} to train new heads for the data set's classes, or "
        "pass with_pixel_values(..., order), which gives the model's class for each class of the data set"
    )
    if len(names) != len(model):
        raise ValueError(f"{both_sets}; {advice}")
    if any(each is None or list(each) == [str(index) for index in range(len(each))] for each in named):
        return
    order = label_order(*([name.replace("_", " ") for name in each] for each in (names, model)))
    if order is None:
        raise ValueError(f"{both_sets}, and their names differ; {advice}")
    if order != list(range(len(order))):
        raise ValueError(
            f"{both_sets}, the same in another order; pass with_pixel_values(..., order), with the order that "
            "restnet_hf.data.labels.label_order(names of the data set, names of the model) returns"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _class_names(data: Dataset | IterableDataset) -> tuple[str, ...] | None:
    """Names of the classes in a column ``label`` or ``labels``; None where there are none."""
    features = [(data.features or {}).get(column) for column in ("label", "labels")]
    return next((tuple(feature.names) for feature in features if isinstance(feature, ClassLabel)), None)


def load_images(source: str | Path, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Load a split of a labelled image data set, with columns ``image`` and ``label``.

    Args:
        source: folder with ``SPLIT*.parquet``, ``SPLIT/*.parquet`` or ``data/SPLIT-*.parquet`` files, imagefolder
            (``SPLIT/CLASS/*.png``), or id on the Hub.
        split: name of the split, such as ``train``.
        streaming: whether to read images one after another, without downloading or converting all first. The images
            of an imagefolder, which are sorted by class, then come in a random order that is always the same.

    Returns:
        A Dataset, or for ``streaming`` an IterableDataset.

    Raises:
        ValueError: the data set cannot be loaded, or has no column of images.
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
        images = next((name for name in ("img", "pixel_values") if name in columns), None)
        if images is None:
            raise ValueError(f"data set {str(source)!r} has columns {columns}; one must be called 'image'")
        dataset = dataset.rename_column(images, "image")
    return dataset


def _load(source: str | Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    folder = Path(source)
    if not folder.is_dir():
        return load_dataset(str(source), split=split, streaming=streaming)
    for pattern in PARQUET:
        if files := sorted(map(str, folder.glob(pattern.format(split)))):
            return load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    dataset = load_dataset("imagefolder", data_dir=str(folder), split=split)  # reads paths, but no images yet
    if not streaming:
        return dataset
    mixed = dataset.shuffle(seed=0, keep_in_memory=True)
    return mixed.to_iterable_dataset(num_shards=min(SHARDS, len(mixed)))


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; those of the first row where a stream does not name them."""
    return dataset.column_names or list(next(iter(dataset), {}))


def subset(dataset: Dataset | IterableDataset, size: int | None, seed: int = 0) -> Dataset | IterableDataset:
    """Select ``size`` random images, always the same for a seed; all of them for None or where there are fewer.

    A stream of unknown length is sampled differently: its files, or other shards, are shuffled, and the first images
    are taken from ten of them in turn. These too are the same in every epoch, unlike those of a shuffled buffer.

    Args:
        dataset: data set or stream to select from.
        size: number of images; None for all.
        seed: seed of the random selection.
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
    """The transform of `with_pixel_values`; a data set holds it, so that its images and labels can be identified.

    Args:
        processor: image processor of transformers.
        order: the model's class for each class of the data set; None where they are the same.
        augment: function from one PIL image to another; None to leave images as they are.
        names: names of the data set's classes; None where it has none.
    """

    processor: Any
    order: Sequence[int] | None = None
    augment: Augment | None = None
    names: tuple[str, ...] | None = None

    def __call__(self, rows: Mapping[str, list[Any]]) -> Batch:
        """``pixel_values`` (N, 3, H, W) and, where there are any, ``labels`` (N,); labels below 0 stay as they are."""
        images = rows["image"] if self.augment is None else augment_images(self.augment, rows["image"])
        prepared = {"pixel_values": prepare_images(self.processor, images)}
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
    """Prepare the images of a data set as they are read: its items hold ``pixel_values`` and ``labels``.

    Args:
        dataset: data set or stream with a column ``image`` and optionally ``label``; a stream returns a stream.
        processor: image processor of transformers.
        order: the model's class for each class of the data set; None where they are the same.
        augment: random augmentation of each RGB image before ``processor``: a key of `AUGMENTATIONS`, or a function
            from one PIL image to another. It draws from torch's global generator, so that ``torch.manual_seed``
            makes it repeatable.

    Raises:
        ValueError: there is no such augmentation.
    """
    prepared = PixelValues(processor, order, make_augmentation(augment), _class_names(dataset))
    if isinstance(dataset, IterableDataset):
        return dataset.map(prepared, batched=True, batch_size=ROWS, remove_columns=_columns(dataset))
    return dataset.with_transform(prepared)


def _prepared(data: Dataset | IterableDataset) -> PixelValues | None:
    """The transform of `with_pixel_values`, also after images were selected or shuffled; None where there is none."""
    if isinstance(data, Dataset):
        transform = data.format["format_kwargs"].get("transform")
        return transform if isinstance(transform, PixelValues) else None
    layer = data._ex_iterable
    while layer is not None:
        if isinstance(transform := getattr(layer, "function", None), PixelValues):
            return transform
        layer = getattr(layer, "ex_iterable", None)
    return None
