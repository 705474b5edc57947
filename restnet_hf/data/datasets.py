"""Images as batches: from tensors, loaders, datasets, folders, parquet files and the Hub."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from datasets import Image as ImageColumn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from restnet_hf.data.ahead import can_read_ahead, read_ahead
from restnet_hf.data.columns import (
    LABEL_COLUMNS,
    Rows,
    class_names_in,
    columns_of,
    find_image_column,
    find_label_column,
    replace_column,
)
from restnet_hf.data.folders import load_split
from restnet_hf.data.labels import compare_classes, match_classes
from restnet_hf.data.pixel_values import Batch, prepared_by
from restnet_hf.data.pixel_values import with_pixel_values as with_pixel_values  # where 0.1 had it
from restnet_hf.distributed import this_process
from restnet_hf.hashing import weights_sha256
from restnet_hf.progress import library_bars, progress_bar


IGNORED = -100  # label of images that losses of torch and transformers ignore
MULTI_LABEL = "multi_label_classification"  # a problem_type of transformers
PARQUET = ("{}*.parquet", "{}/*.parquet", "data/{}-*.parquet")  # patterns of the files of a split in a folder
SHARDS = 64  # of a streamed imagefolder, at least as many as loaders have workers
MIXED_FILES = 10  # of a stream, from which a subset takes images in turn


def batches(data: Any, batch_size: int, name: str = "data", *, progress: bool = True) -> Iterator[Batch]:
    """Batches with ``pixel_values`` (N, 3, H, W) and, where there are any, ``labels`` (N,).

    Pictures of a data set or stream are decoded by a thread, while the caller works on the batch before.

    Args:
        data: tensor of images; map-style dataset whose items are dicts with ``pixel_values`` and ``labels``, pairs or
            image tensors; or iterable of such batches, such as a DataLoader.
        batch_size: number of images in a batch, for a tensor or a dataset.
        name: name of the argument, for errors and the progress bar.
        progress: whether to show a progress bar.

    Raises:
        ValueError: there are no images.
        TypeError: a batch has another type.
    """
    empty = True
    for item in read_source(batch_source(data, batch_size, name), name, progress=progress):
        batch = to_batch(item, name)
        if len(batch["pixel_values"]):
            empty = False
            yield batch
    if empty:
        raise empty_error(name)


def batch_source(data: Any, batch_size: int, name: str = "data") -> Iterable[Any]:
    """What yields the batches of `batches`, before they are checked.

    Args:
        data: images in any form that `batches` takes.
        batch_size: number of images in a batch, for a tensor or a dataset.
        name: name of the argument, for errors.

    Raises:
        TypeError: the pictures of a data set are not prepared yet.
    """
    if isinstance(data, Mapping) and "pixel_values" in data:
        return [data]
    if isinstance(data, Tensor):
        return data.split(batch_size) if len(data) else ()
    if isinstance(data, Dataset) and prepared_by(data) is None and _holds_pictures(data):
        raise TypeError(f"{name} is a data set of raw pictures; prepare them first, with model.prepare_data({name})")
    if isinstance(data, DataLoader | list | tuple) or not hasattr(data, "__getitem__"):
        return data
    return DataLoader(data, batch_size=batch_size, pin_memory=pins_memory())


def read_source(source: Iterable[Any], name: str, *, progress: bool = True) -> Iterable[Any]:
    """The items of a source of batches under a progress bar; pictures are decoded by a thread that is ahead.

    Args:
        source: what `batch_source` returned, or another loader.
        name: name on the progress bar.
        progress: whether to show the progress bar.
    """
    total = None
    with suppress(TypeError):  # a stream has no length
        total = len(cast(Any, source))
    items = read_ahead(source) if can_read_ahead(source) else source
    return cast("Iterable[Any]", progress_bar(items, name, total=total, shown=progress))


def empty_error(name: str) -> ValueError:
    """The error of data without images.

    Args:
        name: name of the argument.
    """
    return ValueError(f"{name} is empty: at least one image is needed")


def pins_memory() -> bool:
    """Whether loaders put batches in pinned memory, which a CUDA device reads while it computes."""
    return this_process().device.type == "cuda"


def _holds_pictures(data: Dataset) -> bool:
    raw = data.format["type"] != "custom"
    return raw and any(isinstance(feature, ImageColumn) for feature in data.features.values())


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
        "a dict with a tensor of pixel_values. For pictures see model.prepare_data and "
        "restnet_hf.data.with_pixel_values"
    )


def data_fingerprint(data: Any) -> str | None:
    """A string that identifies the images of a data set.

    None for loaders, streams and datasets of your own, which cannot be identified, and for images that
    `with_pixel_values` augments, since they differ each time.
    """
    if isinstance(data, Dataset):
        prepared = prepared_by(data)
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
    labels = labels.cpu()  # once, where each comparison would wait for an accelerator
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
        batch = labelled_part(batch)
        if len(batch["pixel_values"]):
            empty = False
            yield batch
    if empty:
        raise no_labels_error()


def labelled_part(batch: Batch) -> Batch:
    """A batch without the images whose label is -100, of which none may be left; as it is where it has no labels."""
    labels = batch.get("labels")
    if labels is None or labels.dim() != 1:
        return batch
    return {key: value[(labels != IGNORED).to(value.device)] for key, value in batch.items()}


def no_labels_error() -> ValueError:
    """The error of data in which no image has a label."""
    return ValueError(f"every image has the label {IGNORED}, which means no label")


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
    names, aligned = class_names_and_order(data)
    if names is not None and not aligned and match_classes(names, id2label) is not None:
        raise ValueError(
            f"{compare_classes(names, id2label)}, the same in another order; pass with_pixel_values(..., order), with "
            "the order that restnet_hf.data.labels.label_order(names of the data set, names of the model) returns, or "
            "the data set of pictures as it is, whose labels the model puts in its own order"
        )


def class_names_and_order(data: Any) -> tuple[Sequence[str] | None, bool]:
    """Names of the classes of a data set or a loader of one, and whether its labels have an order of their own.

    The names are None where there are none: data sets of your own name them by ``classes``, as torchvision's do.

    Args:
        data: data set of labelled images, or a loader of one.
    """
    while not isinstance(data, Rows) and hasattr(data, "dataset"):
        data = data.dataset
    if not isinstance(data, Rows):
        classes = getattr(data, "classes", None)
        named = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
        return (classes if named else None), getattr(data, "aligned", False)
    prepared = prepared_by(data)
    if prepared is not None:
        return prepared.names, prepared.order is not None
    columns = columns_of(data) if data.features is None else list(data.features)
    return class_names_in(data, find_label_column(columns, data.features)), False


def load_images(
    source: str | Path, split: str, streaming: bool = False, *, label_column: str | None = None
) -> Dataset | IterableDataset:
    """Load a split of a labelled image data set, with columns ``image`` and ``label``.

    Args:
        source: folder with ``SPLIT*.parquet``, ``SPLIT/*.parquet`` or ``data/SPLIT-*.parquet`` files, imagefolder
            (``SPLIT/CLASS/*.png``), or id on the Hub.
        split: name of the split, such as ``train``.
        streaming: whether to read images one after another, without downloading or converting all first. The images
            of an imagefolder, which are sorted by class, then come in a random order that is always the same.
        label_column: column of labels, where there are several; it is renamed ``label``, as a single one is.

    Returns:
        A Dataset, or for ``streaming`` an IterableDataset.

    Raises:
        ValueError: the data set cannot be loaded, or has no column of images; or the metadata file of an imagefolder
            lists only some of its pictures.
    """
    try:
        dataset = _load(source, split, streaming)
        columns = columns_of(dataset)
    except Exception as error:  # datasets raises a dozen kinds
        raise ValueError(
            f"data set {str(source)!r} cannot be loaded: it must be a folder with {split}.parquet or "
            f"{split}/<class>/<image> in it, or an id on the Hub. {error}"
        ) from error
    if "image" not in columns:
        images = find_image_column(columns, dataset.features)
        if images is None:
            raise ValueError(f"data set {str(source)!r} has columns {columns}; one must be called 'image'")
        dataset = dataset.rename_column(images, "image")
    named = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, ClassLabel)]
    if label_column is not None or (len(named) == 1 and not {*LABEL_COLUMNS[:2]} & {*columns}):
        labels = find_label_column(columns, dataset.features, label_column or named[0])
        dataset = replace_column(dataset, labels, "label")
    return dataset


@library_bars()
def _load(source: str | Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    folder = Path(source)
    if not folder.is_dir():
        return load_dataset(str(source), split=split, streaming=streaming)
    for pattern in PARQUET:
        if files := sorted(map(str, folder.glob(pattern.format(split)))):
            return load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    dataset = load_split(folder, split)  # reads paths, but no images yet
    if not streaming:
        return dataset
    mixed = dataset.shuffle(seed=0, keep_in_memory=True)
    return mixed.to_iterable_dataset(num_shards=min(SHARDS, len(mixed)))


def subset(dataset: Dataset | IterableDataset, size: int | None, seed: int = 0) -> Dataset | IterableDataset:
    """Select ``size`` random images, always the same for a seed; all of them for None or where there are fewer.

    A stream of unknown length is sampled differently: its files, or other shards, are shuffled, and the first images
    are taken from ten of them in turn. These too are the same in every epoch, unlike those of a shuffled buffer.

    Args:
        dataset: data set or stream to select from.
        size: number of images; None for all.
        seed: seed of the random selection.

    Raises:
        ImportError: part of a stream is asked for, and datasets is older than 5.0, which cannot mix its files.
    """
    if size is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        if "max_buffer_input_shards" not in signature(dataset.shuffle).parameters:
            raise ImportError(
                f"{size} images of a stream need datasets>=5.0, which takes them from many files; this is datasets "
                f"{datasets.__version__}. Upgrade it, read the whole stream, or load the data set without streaming"
            )
        files = min(MIXED_FILES, dataset.num_shards)
        return dataset.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=files).take(size)
    if size >= len(dataset):
        return dataset
    return dataset.select(torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:size].tolist())
