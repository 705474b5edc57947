"""with_pixel_values: the images and labels of a data set, prepared for a model as they are read."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset, IterableDataset
from datasets import Image as ImageColumn
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers.utils import logging

from restnet_hf.data.augment import Augment, augment_images, make_augmentation
from restnet_hf.data.columns import class_names_in, columns_of, find_image_column, find_label_column, replace_column
from restnet_hf.data.pictures import open_picture, picture_path
from restnet_hf.data.preprocessing import Preprocessing, prepare_images
from restnet_hf.errors import PictureError


Batch = dict[str, Tensor]

ROWS = 32  # of a stream, prepared at a time
MOST_THREADS = 16  # that decode pictures
ON_ERROR = ("raise", "skip")
logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class PixelValues:
    """The transform of `with_pixel_values`; a data set holds it, so that its images and labels can be identified.

    Args:
        processor: image processor of transformers.
        order: the model's class for each class of the data set; None where they are the same.
        augment: function from one PIL image to another; None to leave images as they are.
        names: names of the data set's classes; None where it has none.
        image_column: column of the pictures.
        label_column: column of the labels.
        skip: whether broken pictures are left out, with a warning, and not an error.
        rows: the data set without this transform, in which a broken picture without a path is looked up. It is no
            part of the transform's identity, and is not pickled.
    """

    processor: Any
    order: Sequence[int] | None = None
    augment: Augment | None = None
    names: tuple[str, ...] | None = None
    image_column: str = "pixel_values"
    label_column: str | None = "labels"
    skip: bool = False
    rows: Dataset | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __call__(self, rows: Mapping[str, list[Any]], indices: Sequence[int] | None = None) -> Batch:
        """``pixel_values`` (N, 3, H, W) and, where there are any, ``labels`` (N,); labels below 0 stay as they are.

        Args:
            rows: pictures and labels by the names of their columns.
            indices: positions of the pictures in the data; None where they are not known.
        """
        prepared, kept = Batch(), [*range(len(next(iter(rows.values()))))]
        if self.image_column in rows:
            pictures = self._open(rows[self.image_column], indices)
            kept = [position for position, picture in enumerate(pictures) if picture is not None]
            images = [picture for picture in pictures if picture is not None]
            if images and self.augment is not None:
                prepared["pixel_values"] = prepare_images(self.processor, augment_images(self.augment, images))
            elif images:  # which are RGB images already
                prepared["pixel_values"] = self.processor(images, return_tensors="pt")["pixel_values"]
            else:
                prepared["pixel_values"] = torch.empty(0, 3, *Preprocessing.of(self.processor).image_size)
        if self.label_column is not None and self.label_column in rows:
            prepared["labels"] = self._labels([rows[self.label_column][position] for position in kept])
        return prepared

    def _open(self, pictures: Sequence[Any], indices: Sequence[int] | None) -> list[Image.Image | None]:
        """The pictures as RGB images; None for those that are skipped."""
        images: list[Image.Image | None] = []
        names = [f"picture {index}" for index in indices] if indices else ["a picture"] * len(pictures)
        for picture, decode in zip(pictures, _decoders(pictures, names), strict=True):
            try:
                images.append(decode())
            except PictureError as error:
                if not self.skip:
                    if indices is None and picture_path(picture) is None:
                        open_picture(picture, self._find(picture))
                    raise
                logger.warning(f"skipped a picture: {error}")
                images.append(None)
        return images

    def _find(self, picture: Any) -> str:
        """The name of a picture that has no path, by its position in the data set."""
        for index, row in enumerate(() if self.rows is None else self.rows):
            if row[self.image_column] == picture:
                return f"picture {index}"
        return "a picture of the data set"

    def _labels(self, labels: Sequence[Any]) -> Tensor:
        if any(isinstance(label, str) for label in labels):
            raise TypeError(
                f"labels are text, such as {labels[0]!r}; make them classes first, with "
                "data.class_encode_column(name of their column)"
            )
        order = self.order
        if order is None:
            return torch.as_tensor(labels)
        return torch.tensor([label if label < 0 else order[label] for label in labels])


class StreamSource(NamedTuple):
    """What a prepared stream is made of, so that a reader can leave pictures that it does not need undecoded.

    Args:
        rows: the stream of pictures and labels, before they are prepared; nobody else has it.
        prepared: how its rows are prepared, several at once.
        encoded: whether its pictures are files, and not decoded yet.
    """

    rows: IterableDataset
    prepared: PixelValues
    encoded: bool


_SOURCES: "WeakKeyDictionary[IterableDataset, StreamSource]" = WeakKeyDictionary()


def source_of(stream: IterableDataset) -> StreamSource | None:
    """What `with_pixel_values` made a stream of; None for others, such as one that was shuffled or cut afterwards.

    Args:
        stream: stream of images.
    """
    return _SOURCES.get(stream)


def _decoders(pictures: Sequence[Any], names: Sequence[str]) -> Iterator[Callable[[], Image.Image]]:
    """For each picture a function that returns its RGB image; encoded ones are decoded in threads, all at once.

    Workers of a loader decode without threads, since there are several of them already.
    """
    encoded = len(pictures) > 1 and not any(isinstance(picture, Image.Image) for picture in pictures)
    threads = min(MOST_THREADS, len(pictures), _processors())
    if not encoded or threads < 2 or get_worker_info() is not None:
        yield from (partial(open_picture, *each) for each in zip(pictures, names, strict=True))
        return
    with ThreadPoolExecutor(threads) as pool:  # for these pictures only: threads of a pool do not outlive a fork
        yield from [pool.submit(open_picture, *each).result for each in zip(pictures, names, strict=True)]


def _processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def with_pixel_values(
    dataset: Dataset | IterableDataset,
    processor: Any,
    order: Sequence[int] | None = None,
    augment: str | Augment | None = None,
    *,
    label_column: str | None = None,
    on_error: str = "raise",
) -> Dataset | IterableDataset:
    """Prepare the images of a data set as they are read: its items hold ``pixel_values`` and ``labels``.

    The columns of a `Dataset` are renamed so too, and still hold the pictures: whoever drops other columns, as
    transformers' Trainer does, keeps them.

    Args:
        dataset: data set or stream with one column of images, of any name, and optionally one of labels; a stream
            returns a stream.
        processor: image processor of transformers.
        order: the model's class for each class of the data set; None where they are the same.
        augment: random augmentation of each RGB image before ``processor``: a key of `AUGMENTATIONS`, or a function
            from one PIL image to another. It draws from torch's global generator, so that ``torch.manual_seed``
            makes it repeatable.
        label_column: column of labels, where there are several.
        on_error: ``raise`` to raise an error for a broken picture when it is read, or ``skip`` to leave out broken
            pictures: those of a stream as they come, those of a data set now, for which all are decoded once.

    Raises:
        ValueError: there is no such augmentation or column, or several columns could be meant.
    """
    check_on_error(on_error)
    columns, features = columns_of(dataset), dataset.features
    image_column = find_image_column(columns, features)
    if image_column is None:
        raise ValueError(f"the data set has columns {columns}; one must be called 'image', or be of type Image")
    label_column = find_label_column(columns, features, label_column)
    names = class_names_in(dataset, label_column)
    skip = on_error == "skip"
    prepared = PixelValues(processor, order, make_augmentation(augment), names, image_column, label_column, skip)
    image = (features or {}).get(image_column)
    encoded = isinstance(image, ImageColumn) and (image.mode is None or not image.decode)
    if encoded:  # the pictures are decoded here, where errors name them
        dataset = dataset.cast_column(image_column, ImageColumn(decode=False))
    if isinstance(dataset, IterableDataset):
        options: dict[str, Any] = {"batched": True, "batch_size": ROWS, "with_indices": True}
        stream = dataset.map(prepared, remove_columns=columns, **options)
        _SOURCES[stream] = StreamSource(dataset, prepared, encoded)
        return stream
    dataset = replace_column(replace_column(dataset, image_column, "pixel_values"), label_column, "labels")
    dataset = dataset.with_format(None)
    if skip:
        dataset = dataset.select(readable_positions(dataset["pixel_values"]))
    return dataset.with_transform(
        replace(
            prepared, image_column="pixel_values", label_column=label_column and "labels", skip=False, rows=dataset
        )
    )


def check_on_error(on_error: str) -> None:
    """Raise ValueError where ``on_error`` is not one of `ON_ERROR`."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r} is not one of {ON_ERROR}")


def readable_positions(pictures: Iterable[Any]) -> list[int]:
    """Positions of the pictures that can be decoded, with a warning that counts the others; several threads decode.

    Raises:
        ValueError: none can be decoded.
    """
    kept, errors = [], []
    every = iter(enumerate(pictures))
    for some in iter(lambda: [*islice(every, ROWS)], []):
        names = [f"picture {position}" for position, _ in some]
        for (position, _), decode in zip(some, _decoders([each for _, each in some], names), strict=True):
            try:
                decode()
                kept.append(position)
            except PictureError as error:
                errors.append(str(error).partition(". Repair")[0])
    if errors:
        more = f", and {len(errors) - 3} more" if len(errors) > 3 else ""
        text = f"skipped {len(errors)} of {len(errors) + len(kept)} pictures: {'; '.join(errors[:3])}{more}"
        if not kept:
            raise ValueError(f"{text}. No picture is left")
        logger.warning(text)
    return kept


def prepared_by(data: Dataset | IterableDataset) -> PixelValues | None:
    """The transform of `with_pixel_values`, also after images were selected or shuffled; None where there is none.

    Args:
        data: data set or stream.
    """
    if isinstance(data, Dataset):
        transform = data.format["format_kwargs"].get("transform")
        return transform if isinstance(transform, PixelValues) else None
    functions = (getattr(layer, "function", None) for layer in layers_of(data))
    return next((each for each in functions if isinstance(each, PixelValues)), None)


def layers_of(stream: IterableDataset) -> Iterator[Any]:
    """What a stream of datasets is made of, from the last step to the first; the library has no public way to tell.

    Args:
        stream: stream of images.
    """
    layer: Any = stream._ex_iterable
    while layer is not None:
        yield layer
        layer = getattr(layer, "ex_iterable", None)
