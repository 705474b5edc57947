"""Check weights against those that a config asks for."""

import re
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from restnet_hf.errors import MAX_QUOTE, shorten
from restnet_hf.hashing import FLOATS


SHOWN = 8  # names of tensors in an error


class WeightsError(ValueError, RuntimeError):
    """Weights do not fit a config; also a RuntimeError, which transformers raises."""


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError unless the weights are exactly the expected tensors, in shape and kind of type.

    Args:
        weights: tensors to check, by name.
        expected: expected tensors by name, possibly on the meta device.
        where: file or argument that holds the weights, for errors.
    """
    both = sorted(expected.keys() & weights.keys())
    floats = {*FLOATS.values()}  # may be cast to one another
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "not expected": sorted(weights.keys() - expected.keys()),
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in both
            if weights[key].shape != expected[key].shape
        ],
        "of another type": [
            f"{key} {weights[key].dtype} instead of {expected[key].dtype}"
            for key in both
            if weights[key].dtype != expected[key].dtype and {weights[key].dtype, expected[key].dtype} - floats
        ],
    }
    raise_problems(problems, where)


def present_names(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Present names of tensors by the names they were saved under, where a library has renamed the layers they are in.

    Two names are of one tensor where they have the same numbers and the same last two parts, as
    ``vit/encoder/layer/2/layernorm_after/bias`` and ``vit/layers/2/layernorm_after/bias`` have.

    Args:
        weights: saved tensors by name.
        expected: expected tensors by name, possibly on the meta device.

    Returns:
        The present name of each saved tensor; empty where no name has changed, or not all can be told apart.
    """
    if weights.keys() == expected.keys():
        return {}
    then, now = ({_place(name, tensor): name for name, tensor in each.items()} for each in (weights, expected))
    if then.keys() != now.keys() or not len(then) == len(now) == len(weights) == len(expected):
        return {}
    return {name: now[place] for place, name in then.items()}


def _place(name: str, tensor: Tensor) -> tuple[Any, ...]:
    parts = re.split(r"[./]", name)
    return tuple(filter(str.isdigit, parts)), *parts[-2:], tuple(tensor.shape)


def raise_problems(problems: Mapping[str, Collection[str]], where: str) -> None:
    """Raise WeightsError if there are problems, with the first names of each.

    Args:
        problems: names of tensors by problem.
        where: file or argument that holds the weights, for errors.
    """
    summary = "; ".join(
        f"{problem}: {', '.join(shorten(key, MAX_QUOTE) for key in islice(keys, SHOWN))}"
        + f" and {len(keys) - SHOWN} more" * (len(keys) > SHOWN)
        for problem, keys in problems.items()
        if keys
    )
    if summary:
        message = f"the weights in {where} do not fit its config.json. {summary}. Save the adapter again"
        if problems.get("missing") and problems.get("not expected"):
            message += ", or install the transformers and timm that profile.json names, where layers have new names"
        reinitialize = ", or pass ignore_mismatched_sizes=True to begin these anew"
        raise WeightsError(message + reinitialize * bool(problems.get("of another shape")))
