"""Check weights against those that a config asks for."""

from collections.abc import Collection, Mapping
from itertools import islice

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
        reinitialize = ", or pass ignore_mismatched_sizes=True to begin these anew"
        raise WeightsError(message + reinitialize * bool(problems.get("of another shape")))
