"""Class names of classifiers, and how the classes of one match those of another."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from datasets import Dataset

from restnet_hf.data.columns import class_names_in, find_label_column


GENERIC = re.compile(r"LABEL_\d+")
WORDNET = re.compile(r"n\d{8}")


def label_names(id2label: Mapping[int, str]) -> tuple[str, ...] | None:
    """Class names in the order of the logits; None where they are only numbered (``LABEL_0``, ...)."""
    names = tuple(str(id2label[index]) for index in sorted(id2label))
    return None if all(GENERIC.fullmatch(name) for name in names) else names


def label_order(reference: Sequence[str], other: Sequence[str]) -> list[int] | None:
    """Positions in ``other`` of the names in ``reference``; None where the two do not name the same classes.

    Names are compared without regard to case. WordNet ids are replaced by timm's descriptions. Where whole names
    differ, the first of comma-separated synonyms is compared, if it is unique or equal at every position.
    """
    if len(reference) != len(other):
        return None
    for normalize in (_whole, _first):
        wanted, names = [normalize(name) for name in reference], [normalize(name) for name in other]
        if wanted == names:
            return list(range(len(wanted)))
        positions = {name: index for index, name in enumerate(names)}
        if len(positions) == len(names) and set(wanted) == set(positions):
            return [positions[name] for name in wanted]
    return None


def find_classes(wanted: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Position of each class among the classes of another classifier, which may have more.

    Names are compared as by `label_order`, with ``_`` for a space: whole names first, then, where some are not found,
    the first synonym of all.

    Args:
        wanted: names of the classes to find.
        names: names of the other classifier's classes.

    Returns:
        The position of each name in ``wanted``; None for one that is missing, or that several classes have.
    """
    plain, others = ([name.replace("_", " ") for name in each] for each in (wanted, names))
    order = label_order(plain, others)
    if order is not None:
        return [*order]
    places: list[int | None] = []
    for normalize in (_whole, _first):
        present, asked = ([normalize(name) for name in each] for each in (others, plain))
        counts, repeated = Counter(present), Counter(asked)
        positions = {name: index for index, name in enumerate(present) if counts[name] == 1}
        places = [positions.get(name) if repeated[name] == 1 else None for name in asked]
        if None not in places:
            break
    return places


def _whole(name: str) -> str:
    if WORDNET.fullmatch(name):
        name = _wordnet().get(name, name)
    return name.strip().casefold()


@cache
def _wordnet() -> dict[str, str]:
    from timm.data import ImageNetInfo

    infos = [ImageNetInfo(subset) for subset in ("imagenet-22k", "imagenet-1k")]
    return {name: info.label_name_to_description(name) for info in infos for name in info.label_names()}


def _first(name: str) -> str:
    return _whole(name).split(",")[0].strip()


def class_names(num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[int, str]:
    """Names of a new task's classes; empty where there is no new task.

    Raises:
        ValueError: the classes are not numbered from 0 on, or their count is not ``num_labels``.
    """
    if id2label is None:
        if num_labels is not None and num_labels < 1:
            raise ValueError(f"num_labels={num_labels} must be at least 1")
        return {index: f"LABEL_{index}" for index in range(num_labels or 0)}
    names = {int(index): str(name) for index, name in dict(id2label).items()}
    if not names or sorted(names) != list(range(len(names))) or num_labels not in (None, len(names)):
        raise ValueError(
            f"id2label must name the classes 0, 1, 2, ... (num_labels of them, if that is given too); it names "
            f"{sorted(names)} and num_labels={num_labels}"
        )
    return names


def match_classes(names: Sequence[str], id2label: Mapping[int, str]) -> list[int] | None:
    """The model's class for each class of a data set; None where they are the same, or are only numbered.

    Names are compared as by `label_order`, with ``_`` for a space.

    Args:
        names: names of the data set's classes.
        id2label: names of the model's classes.

    Raises:
        ValueError: the classes differ in number or names.
    """
    model, named = [str(id2label[index]) for index in sorted(id2label)], [label_names(id2label), names]
    advice = (
        f"build the model with from_anchors(..., labels_from=the data set), id2label= or num_labels={len(names)} to "
        "train new heads for the data set's classes, or pass with_pixel_values(..., order), which gives the model's "
        "class for each class of the data set"
    )
    if len(names) != len(model):
        raise ValueError(f"{compare_classes(names, id2label)}; {advice}")
    if any(each is None or list(each) == [str(index) for index in range(len(each))] for each in named):
        return None
    order = label_order(*([name.replace("_", " ") for name in each] for each in (names, model)))
    if order is None:
        raise ValueError(f"{compare_classes(names, id2label)}, and their names differ; {advice}")
    return None if order == list(range(len(order))) else order


def compare_classes(names: Sequence[str], id2label: Mapping[int, str]) -> str:
    """A sentence on the classes of a data set and those of a model, for errors."""
    model = [str(id2label[index]) for index in sorted(id2label)]
    return f"the data set has {len(names)} classes ({list_some(names)}), the model {len(model)} ({list_some(model)})"


def list_some(names: Sequence[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def class_names_of(rows: Dataset) -> list[str]:
    """Names of the classes in the column of labels of a data set.

    Raises:
        ValueError: there is no such column, or it does not name the classes.
    """
    names = class_names_in(rows, find_label_column(rows.column_names, rows.features))
    if names is None:
        raise ValueError("the data set needs a 'label' column of type ClassLabel, which names the classes")
    return list(names)
