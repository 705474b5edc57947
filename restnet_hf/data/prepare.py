"""prepare_data: whatever a user has, as images and labels that a model takes; class_names of the same."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets import Image as ImageColumn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torch.utils.data import Dataset as TorchDataset

from restnet_hf.data.columns import (
    IMAGE_COLUMNS,
    Rows,
    class_names_in,
    columns_of,
    find_image_column,
    find_label_column,
    label_columns,
)
from restnet_hf.data.datasets import check_classes, class_names_and_order
from restnet_hf.data.folders import files_dataset, folder_dataset
from restnet_hf.data.labels import match_classes
from restnet_hf.data.pictures import is_picture, split_pictures
from restnet_hf.data.pixel_values import (
    PixelValues,
    check_on_error,
    prepared_by,
    readable_positions,
    with_pixel_values,
)
from restnet_hf.progress import library_bars


class Pictures(TorchDataset):
    """A list or map-style data set of pictures, or of pictures and labels, prepared as they are read.

    Args:
        items: pictures, pairs of a picture and its label, or dicts with a picture and a label.
        prepared: how to prepare them.
        label_key: key of the label in dicts; None where it has one of the usual names.
        labels: whether labels are read.
        positions: positions of the items to read; None for all.
    """

    def __init__(
        self,
        items: Any,
        prepared: PixelValues,
        label_key: str | None = None,
        labels: bool = True,
        positions: Sequence[int] | None = None,
    ) -> None:
        self.items, self.prepared, self.label_key, self.labels = items, prepared, label_key, labels
        self.positions = range(len(items)) if positions is None else positions

    @property
    def repeatable(self) -> bool:
        """Whether a picture is known to be the same each time: items of a list, but not of another data set.

        See `restnet_hf.data.shares.is_repeatable`.
        """
        return isinstance(self.items, list | tuple)

    @property
    def aligned(self) -> bool:
        """Whether labels are put into the model's order."""
        return self.prepared.order is not None

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the classes, in the order of the items' own labels; None where there are none."""
        return self.prepared.names and list(self.prepared.names)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several items, prepared at once."""
        positions = [self.positions[index] for index in indices]
        pairs = [split_item(self.items[position], self.label_key) for position in positions]
        rows: dict[str, list[Any]] = {"pixel_values": [picture for picture, _ in pairs]}
        if self.labels and pairs and pairs[0][1] is not None:
            rows["labels"] = [label if isinstance(label, list | float) else int(label) for _, label in pairs]
        batch = self.prepared(rows, positions)
        return [{key: values[row] for key, values in batch.items()} for row in range(len(pairs))]


def split_item(item: Any, label_key: str | None = None) -> tuple[Any, Any]:
    """The picture and the label of an item; the label is None where there is none.

    Args:
        item: picture, pair of a picture and its label, or dict with both.
        label_key: key of the label in a dict.
    """
    if is_picture(item):
        return item, None
    if isinstance(item, Mapping):
        label_key = find_label_column(item, None, label_key)
        return item[find_image_column(item) or ""], None if label_key is None else item[label_key]
    return item[0], item[1] if len(item) > 1 else None


def _is_raw_item(item: Any) -> bool:
    """Whether an item of a list or data set holds a picture that is not prepared yet."""
    if isinstance(item, Mapping) and not is_picture(item):
        return any(name in item and is_picture(item[name]) for name in IMAGE_COLUMNS)
    pair = isinstance(item, list | tuple) and len(item) in (1, 2)
    return is_picture(item) or (pair and is_picture(item[0]))


def prepare_data(
    data: Any,
    processor: Any,
    id2label: Mapping[int, str],
    *,
    name: str = "data",
    label_column: str | None = None,
    on_error: str = "raise",
    labels: bool = True,
) -> Any:
    """Prepare images in any form for a model; see `PredictionMixin.prepare_data`.

    Args:
        data: images in any form.
        processor: image processor of the model.
        id2label: names of the model's classes.
        name: name of the argument, for errors.
        label_column: column of labels, where there are several.
        on_error: ``raise``, or ``skip`` to leave out broken pictures.
        labels: whether labels are used; if not they are left out of pictures, and not checked.

    Raises:
        OSError: there is no such file or folder.
        TypeError: ``data`` is of no form that is known.
        ValueError: the classes are not the model's, a column is ambiguous, or there are no pictures.
    """
    check_on_error(on_error)
    how = _How(processor, id2label, label_column, on_error, labels)
    data = _load(data, name)
    if isinstance(data, Rows):
        return how.rows(data)
    if isinstance(data, list | tuple):
        data = _from_list(data)
        if isinstance(data, Rows):
            return how.rows(data)
    if isinstance(data, DataLoader) and _is_raw(data.dataset) and data.collate_fn is default_collate:
        return how.loader(data)
    if isinstance(data, Pictures | _List) or (not isinstance(data, _BATCHES) and _is_raw(data)):
        return how.pictures(data)
    if labels:
        check_classes(data, id2label)
    return data


class _List(list[Any]):
    """A list of pictures, in contrast to one of batches."""


_BATCHES = (Tensor, Mapping, list, tuple, DataLoader)


@dataclass(frozen=True)
class _How:
    """The options of `prepare_data`."""

    processor: Any
    id2label: Mapping[int, str]
    label_column: str | None
    on_error: str
    labels: bool

    def rows(self, data: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """A data set or stream of `datasets` with ``pixel_values`` and ``labels``."""
        if not _is_raw(data):
            if self.labels:
                check_classes(data, self.id2label)
            return self._readable(data)
        columns, features = columns_of(data), data.features
        column = find_label_column(columns, features, self.label_column) if self.labels else None
        if not self.labels:
            data = data.remove_columns(label_columns(columns, features))
        names = class_names_in(data, column)
        order = None if names is None else match_classes(names, self.id2label)
        return with_pixel_values(data, self.processor, order, label_column=column, on_error=self.on_error)

    def _readable(self, data: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Prepared data without broken pictures, where these are to be skipped."""
        prepared = prepared_by(data)
        if prepared is None or prepared.skip or self.on_error != "skip":
            return data
        if isinstance(data, IterableDataset):
            raise ValueError(
                "this stream was prepared to raise an error for a broken picture; pass on_error='skip' to "
                "with_pixel_values, or pass the stream of pictures as it is"
            )
        return data.select(readable_positions(data.with_format(None)["pixel_values"]))

    def pictures(self, data: Any) -> Pictures:
        """A list or map-style data set of pictures with ``pixel_values`` and ``labels``."""
        if isinstance(data, Pictures):
            prepared, items, key, positions = data.prepared, data.items, data.label_key, data.positions
            if self.labels:
                check_classes(data, self.id2label)
        else:
            names, _ = class_names_and_order(data)
            order = match_classes(names, self.id2label) if self.labels and names else None
            prepared = PixelValues(self.processor, order, names=None if names is None else tuple(names))
            items, key, positions = data, self.label_column, range(len(data))
        if self.on_error == "skip":
            every = (split_item(items[position], key)[0] for position in positions)
            positions = [positions[index] for index in readable_positions(every)]
        return Pictures(items, prepared, key, self.labels, positions)

    def loader(self, data: DataLoader) -> DataLoader:
        """A loader of the same batches, prepared."""
        if self.on_error == "skip":
            raise ValueError("a DataLoader fixes which pictures come; for on_error='skip' pass its data set instead")
        rows = prepare_data(data.dataset, **vars(self), name="the loader's data set")
        options: dict[str, Any] = {"num_workers": data.num_workers, "pin_memory": data.pin_memory}
        if data.batch_sampler is None or isinstance(rows, IterableDataset):
            return DataLoader(rows, batch_size=data.batch_size, drop_last=data.drop_last, **options)
        return DataLoader(rows, batch_sampler=data.batch_sampler, **options)


def is_one_image(data: Any) -> bool:
    """Whether data are one image: a picture, the path of one, or prepared ``pixel_values`` (3, H, W)."""
    if isinstance(data, str | os.PathLike):
        return not Path(data).is_dir()
    if isinstance(data, np.ndarray | Tensor) and data.ndim == 3 and not is_picture(data):
        return isinstance(split_pictures(data), Tensor)
    return is_picture(data)


@library_bars()
def _load(data: Any, name: str) -> Any:
    """Files, arrays and single pictures as a data set, a tensor or a list; anything else unchanged."""
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if path.is_dir():
            return _load_folder(path)
        if path.is_file():
            return [path]
        raise FileNotFoundError(
            f"{name}: there is no file or folder {os.fspath(data)!r}; for a data set on the Hub pass "
            "load_images(its id, split)"
        )
    if isinstance(data, np.ndarray | Tensor):
        return split_pictures(data)
    if is_picture(data):
        return [data]
    if isinstance(data, Mapping) and data and all(isinstance(split, Rows) for split in data.values()):
        raise ValueError(f"{name} has the splits {list(data)}; pass one of them, such as data[{next(iter(data))!r}]")
    return data


def _load_folder(folder: Path) -> Dataset:
    """A folder of pictures, or of the parquet files of one split."""
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    splits = list(dict.fromkeys(file.stem.partition("-")[0] for file in files))
    if len(splits) > 1 and not all(split.isdigit() for split in splits):
        raise ValueError(
            f"{folder} has the splits {splits}; pass load_images({str(folder)!r}, {splits[0]!r}), or another of them"
        )
    if files:
        return load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    return folder_dataset(folder)


def _from_list(items: Sequence[Any]) -> Any:
    """A list as a data set of files, a list of pictures, or tensors; a list of batches unchanged."""
    first = items[0] if len(items) else None
    if len(items) and all(isinstance(item, str | os.PathLike) for item in items):
        return files_dataset([Path(item) for item in items])
    if _is_raw_item(first):
        return _List(items)
    if isinstance(first, np.ndarray):
        items = [torch.from_numpy(item) for item in items]
        first = items[0]
    if isinstance(first, Tensor) and first.dim() == 3:
        return torch.stack([torch.as_tensor(item) for item in items])
    if isinstance(first, list | tuple) and len(first) == 2 and isinstance(first[0], Tensor) and first[0].dim() == 3:
        images, labels = zip(*items, strict=True)
        return TensorDataset(torch.stack(images), torch.as_tensor(labels))
    return items


def _is_raw(data: Any) -> bool:
    """Whether a data set holds pictures that are not prepared yet."""
    if isinstance(data, Rows):
        custom = isinstance(data, Dataset) and data.format["type"] == "custom"  # a transform of the caller's own
        if custom or prepared_by(data) is not None:
            return False
        features = data.features
        if features is None:
            return _is_raw_item(next(iter(data), None))
        return any(isinstance(kind, ImageColumn) for kind in features.values()) or (
            "pixel_values" not in features and find_image_column(features) is not None
        )
    if isinstance(data, Tensor | Mapping) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return False
    return len(data) > 0 and _is_raw_item(data[0])


def task_classes(data: Any) -> list[str]:
    """Names of the classes of labelled images, for a new task; numbers where the labels are only numbered.

    Args:
        data: folder with a subfolder for each class; data set of `datasets`, or a dict of its splits; data set of
            torchvision's kind, with ``classes``; or a loader of one.

    Raises:
        ValueError: neither the names nor the number of the classes are known.
    """
    if isinstance(data, Mapping) and data:
        data = next(iter(data.values()))
    data = _load(data, "labels_from")
    names, _ = class_names_and_order(data)
    if names is None:
        count = _count_classes(data)
        names = [f"LABEL_{index}" for index in range(count)]
    return [str(name) for name in names]


def _count_classes(data: Any) -> int:
    """Number of classes of numbered labels; ValueError where it is not known."""
    while isinstance(data, DataLoader):
        data = data.dataset
    labels: Any = ()
    if isinstance(data, Dataset):
        column = find_label_column(data.column_names, data.features)
        labels = [] if column is None else data.with_format(None).unique(column)
    elif isinstance(data, TensorDataset) and len(data.tensors) > 1:
        labels = data.tensors[1].tolist()
    elif isinstance(data, list | tuple) and data and _is_raw_item(data[0]):
        labels = [split_item(item)[1] for item in data]
    if len(labels) and all(isinstance(label, int) for label in labels):
        return max(labels) + 1
    raise ValueError(
        "labels_from names no classes: it must be a folder with a subfolder for each class, or a data set with a "
        "column of type ClassLabel (data.class_encode_column makes one of texts) or with classes, as torchvision's; "
        "else pass num_labels= or id2label="
    )
