"""Columns of a data set that hold its images and labels, by their types and their usual names."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, Image, IterableDataset


IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")  # the last one in webdatasets
Rows: TypeAlias = Dataset | IterableDataset


def columns_of(dataset: Rows) -> list[str]:
    """Names of the columns; those of the first row where a stream does not name them."""
    return dataset.column_names or list(next(iter(dataset), {}))


def find_image_column(columns: Iterable[str], features: Mapping[str, Any] | None = None) -> str | None:
    """The column of images: the only one of type `Image`, else the one with a usual name; None where there is none.

    Args:
        columns: names of all columns.
        features: types of the columns; None where they are not known.

    Raises:
        ValueError: there are several.
    """
    names, types = list(columns), features or {}
    typed = [name for name in names if isinstance(types.get(name), Image)]
    images = typed or [name for name in IMAGE_COLUMNS if name in names]
    if len(images) > 1:
        raise ValueError(
            f"the data set has several columns of images, {images}; leave one of them, as with "
            f"data.remove_columns({images[1:]})"
        )
    return images[0] if images else None


def label_columns(columns: Iterable[str], features: Mapping[str, Any] | None = None) -> list[str]:
    """The columns that may hold labels: of type `ClassLabel`, or with a usual name.

    Args:
        columns: names of all columns.
        features: types of the columns; None where they are not known.
    """
    types = features or {}
    return [name for name in columns if isinstance(types.get(name), ClassLabel) or name in LABEL_COLUMNS]


def find_label_column(
    columns: Iterable[str], features: Mapping[str, Any] | None = None, label_column: str | None = None
) -> str | None:
    """The column of labels: of type `ClassLabel`, or with a usual name; None where there is none.

    Args:
        columns: names of all columns.
        features: types of the columns; None where they are not known.
        label_column: name of the column, where the caller chooses it.

    Raises:
        ValueError: there are several, or there is no column of the chosen name.
    """
    names = list(columns)
    if label_column is not None:
        if label_column not in names:
            raise ValueError(f"label_column={label_column!r} is not a column of the data set, which has {names}")
        return label_column
    labels = label_columns(names, features)
    if len(labels) > 1:
        raise ValueError(
            f"the data set has several columns of labels, {labels}; choose one, as with "
            f"model.prepare_data(data, label_column={labels[0]!r})"
        )
    return labels[0] if labels else None


def class_names_in(dataset: Rows, label_column: str | None) -> tuple[str, ...] | None:
    """Names of the classes in a column; None where it does not name them."""
    feature = (dataset.features or {}).get(label_column) if label_column else None
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def replace_column(dataset: Rows, column: str | None, name: str) -> Rows:
    """Give a column another name, in place of the column that has it.

    Args:
        dataset: data set or stream.
        column: present name of the column; None for no change.
        name: name that it gets.
    """
    if column in (None, name):
        return dataset
    if name in columns_of(dataset):
        dataset = dataset.remove_columns(name)
    return dataset.rename_column(column, name)
