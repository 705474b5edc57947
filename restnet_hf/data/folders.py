"""Folders of pictures as data sets: a subfolder for each class, or pictures alone."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageColumn
from PIL import Image
from transformers.utils import logging


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as the imagefolder of datasets reads them
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
logger = logging.get_logger(__name__)


@cache
def _endings() -> frozenset[str]:
    """The endings of files that Pillow can read."""
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, sorted, without hidden files."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _endings())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def class_folders(folder: Path) -> list[Path]:
    """The subfolders that stand for classes, sorted: those with pictures, or with nothing at all."""
    places = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path for path in places if picture_files(path) or not any(path.iterdir())]


def files_dataset(files: Sequence[Path], labels: Iterable[int] | None = None, names: Sequence[str] = ()) -> Dataset:
    """A data set of picture files, which are read when an item is; its fingerprint changes with a file.

    Args:
        files: files of the pictures.
        labels: class of each picture; None for pictures without.
        names: names of the classes.
    """
    columns: dict[str, list[object]] = {"image": [str(path.resolve()) for path in files]}
    features = Features({"image": ImageColumn()})
    if labels is not None:
        columns["label"], features["label"] = list(labels), ClassLabel(names=list(names))
    rows = Dataset.from_dict(columns, features=features)
    states = [(path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None for path in files]
    identity = json.dumps([columns, list(names), states])
    return Dataset(rows.data, info=rows.info, fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16])


def folder_dataset(folder: Path) -> Dataset:
    """The pictures of a folder, with the names of its subfolders as classes if it has any.

    Args:
        folder: folder with a subfolder for each class, or with pictures alone; the latter may have a metadata file,
            as the imagefolder of `datasets` reads it.

    Raises:
        ValueError: there are no pictures; the subfolders are splits and not classes; there are pictures both in the
            folder itself and in subfolders; or the metadata file lists only some of the pictures.
    """
    places, own = class_folders(folder), [path for path in picture_files(folder) if path.parent == folder]
    splits = [place.name for place in places if place.name.lower() in SPLITS]
    if places and len(splits) == len(places):
        first = next((split for split in splits if split.lower().startswith("train")), splits[0])
        raise ValueError(f"{folder} has the splits {splits}; give one of them, such as {folder / first}")
    if places and own:
        raise ValueError(
            f"{folder} has pictures both in itself, such as {own[0].name}, and in subfolders, such as "
            f"{places[0].name}; give a folder with a subfolder for each class, or one with pictures alone"
        )
    if places:
        _warn_of_metadata(folder)
        classed = [(path, label) for label, place in enumerate(places) for path in picture_files(place)]
        files, labels = [path for path, _ in classed], [label for _, label in classed]
        if files:
            return files_dataset(files, labels, [place.name for place in places])
    if not own:
        raise ValueError(f"{folder} has no pictures; give a folder with a subfolder for each class, or with pictures")
    if _metadata(folder):
        return _listed(load_dataset("imagefolder", data_dir=str(folder), split="train"), folder)
    return files_dataset(own)


def load_split(folder: Path, split: str) -> Dataset:
    """A split of an imagefolder, read by `datasets`, but by us where class folders and a metadata file contradict.

    Args:
        folder: folder with a subfolder for each split.
        split: name of the split.

    Raises:
        ValueError: the metadata file lists only some of the pictures.
    """
    place = folder / split
    if not place.is_dir() or not _metadata(place):
        return load_dataset("imagefolder", data_dir=str(folder), split=split)
    if class_folders(place):
        return folder_dataset(place)
    return _listed(load_dataset("imagefolder", data_dir=str(folder), split=split), place)


def _metadata(folder: Path) -> list[Path]:
    return sorted(path for name in METADATA for path in folder.rglob(name))


def _warn_of_metadata(folder: Path) -> None:
    for path in _metadata(folder):
        logger.warning(
            f"{path} is not read, as the subfolders of {folder} name the classes; for its columns load it with "
            "datasets.load_dataset('imagefolder', data_dir=...)"
        )


def _listed(rows: Dataset, folder: Path) -> Dataset:
    """The rows of a metadata file; ValueError where it lists only some of the pictures."""
    count = len(picture_files(folder))
    if len(rows) < count:
        raise ValueError(
            f"{_metadata(folder)[0]} lists {len(rows)} of the {count} pictures of {folder}, and datasets leaves out "
            "the others; list all of them there, or remove the file"
        )
    return rows
