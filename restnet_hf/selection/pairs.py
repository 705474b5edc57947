"""Which anchors are compared, and on which images."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Subset


PAIRS = ("any", "adjacent", "ends")
ORDERS = ("given", "auto")


def choose_pairs(anchors: Sequence[str], pairs: str = "any", order: str = "given") -> list[tuple[str, str]]:
    """Names of the front and the end of each pair to compare.

    Args:
        anchors: names of the anchors, in the order of the model.
        pairs: ``any`` for each two anchors, ``adjacent`` for neighbours in the order, ``ends`` for the first and the
            last.
        order: ``given`` puts the earlier anchor in front of the later one; ``auto`` takes both directions, the given
            one first.

    Raises:
        ValueError: an option is not one of these values, or there are fewer than two anchors.
    """
    for name, value, allowed in (("order", order, ORDERS), ("pairs", pairs, PAIRS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {allowed}")
    if len(anchors) < 2:
        raise ValueError("there is one anchor, and similarity joins two; add_family('skip') makes routes within one")
    chosen = {"any": combinations(anchors, 2), "adjacent": pairwise(anchors), "ends": [(anchors[0], anchors[-1])]}
    directed = [(pair, pair[::-1]) if order == "auto" else (pair,) for pair in chosen[pairs]]
    return [pair for both in directed for pair in both]


def draw_images(data: Any, kept: int, most: int | None) -> Any:
    """Images in random order, always the same, and no more than are wanted.

    Folders are often sorted by class, so the first images alone would say little. Data of at most ``kept`` images stay
    as they are, and so do batches and streams, of which the first images are taken.

    Args:
        data: images that `prepare_data` returned.
        kept: number of images that all of are used.
        most: largest number of images; None for all.
    """
    indexable = isinstance(data, Tensor | Dataset) or (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, DataLoader | list | tuple | dict)
    )
    if not indexable or len(data) <= kept:
        return data
    indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:most]
    if isinstance(data, Tensor):
        return data[indices]
    return data.select(indices.tolist()) if isinstance(data, Dataset) else Subset(data, indices.tolist())
