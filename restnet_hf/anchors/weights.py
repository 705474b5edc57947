"""Weights compared with those that a config asks for."""

from collections.abc import Collection, Mapping
from itertools import islice

from torch import Tensor

from restnet_hf.errors import MAX_QUOTE, shorten
from restnet_hf.hashing import FLOATS


FIRST = 8  # so many names of tensors stand in an error


class WeightsError(ValueError, RuntimeError):
    """Weights that do not fit a config; a RuntimeError too, as transformers raises."""


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError unless there is exactly every tensor that is expected, in its shape and of its kind."""
    both = sorted(expected.keys() & found.keys())
    kinds = tuple(FLOATS.values())  # one may be cast to another
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "not expected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in both
            if found[key].shape != expected[key].shape
        ],
        "of another type": [
            f"{key} {found[key].dtype} instead of {expected[key].dtype}"
            for key in both
            if found[key].dtype != expected[key].dtype and {found[key].dtype, expected[key].dtype} - {*kinds}
        ],
    }
    refuse(problems, where)


def refuse(problems: Mapping[str, Collection[str]], where: str) -> None:
    """Raise WeightsError that names the first of each problem, where there is any."""
    said = "; ".join(
        f"{problem}: {', '.join(shorten(key, MAX_QUOTE) for key in islice(keys, FIRST))}"
        + f" and {len(keys) - FIRST} more" * (len(keys) > FIRST)
        for problem, keys in problems.items()
        if keys
    )
    if said:
        message = f"the weights in {where} do not fit its config.json. {said}. Save the adapter again"
        begin_anew = ", or pass ignore_mismatched_sizes=True to begin these anew"
        raise WeightsError(message + begin_anew * bool(problems.get("of another shape")))
