"""CONFIDENCES: how sure a route is of its answer, from its logits. No torch."""

from __future__ import annotations  # numpy is imported when a confidence is first computed

import math
from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from numpy import ndarray


LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.05, 20.0
SEARCH_STEPS = 40  # of the golden-section search, which then knows the temperature to eight digits


def probabilities(logits: ndarray, temperature: float = 1.0) -> ndarray:
    """Probabilities (N, classes) of logits (N, classes) that are divided by a temperature."""
    import numpy as np

    shifted = (logits - logits.max(-1, keepdims=True)) / temperature
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(-1, keepdims=True)


def _probability(p: ndarray, previous: ndarray | None) -> ndarray:
    return p.max(-1)


def _margin(p: ndarray, previous: ndarray | None) -> ndarray:
    import numpy as np

    highest = np.partition(p, -2, axis=-1)[:, -2:]
    return highest[:, 1] - highest[:, 0]


def _entropy(p: ndarray, previous: ndarray | None) -> ndarray:
    import numpy as np

    return 1 + (p * np.log(np.maximum(p, 1e-38))).sum(-1) / math.log(p.shape[-1])


def _agreement(p: ndarray, previous: ndarray | None) -> ndarray:
    import numpy as np

    return p.max(-1) if previous is None else p[np.arange(len(p)), previous]


# Confidence (N,) from 0 to 1, from probabilities (N, classes) and the classes (N,) that the route before gave to the
# same images, None for the first route: the highest probability; its distance from the second highest; 1 less the
# entropy, as a share of the most that it can be; the probability of the class that the route before gave, for the
# first route the highest.
CONFIDENCES: dict[str, Callable[[ndarray, ndarray | None], ndarray]] = {
    "probability": _probability,
    "margin": _margin,
    "entropy": _entropy,
    "agreement": _agreement,
}


def measure_confidence(
    logits: ndarray, confidence: str, temperature: float = 1.0, previous: ndarray | None = None
) -> ndarray:
    """How sure a route is of its class for each image (N,), from 0 to 1; NaN where logits are not finite.

    Args:
        logits: logits (N, classes) of the route.
        confidence: key of `CONFIDENCES`, the way to measure it.
        temperature: number that logits are divided by.
        previous: classes (N,) that the route before gave to the same images.
    """
    return CONFIDENCES[confidence](probabilities(logits, temperature), previous)


def fit_temperature(logits: ndarray, classes: ndarray) -> float:
    """The temperature at which the probabilities of some classes are highest (Guo et al., arXiv 1706.04599).

    Args:
        logits: logits (N, classes) of a route.
        classes: class (N,) of each image.
    """
    import numpy as np

    rows = np.arange(len(classes))

    def loss(log_temperature: float) -> float:
        p = probabilities(logits, math.exp(log_temperature))
        return -float(np.log(np.maximum(p[rows, classes], 1e-38)).mean())

    golden = (math.sqrt(5) - 1) / 2
    low, high = math.log(LEAST_TEMPERATURE), math.log(MOST_TEMPERATURE)
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(SEARCH_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2)
