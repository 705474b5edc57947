"""Verification: what exported routes are compared with, and which losses are accepted."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from restnet_hf.data.datasets import IGNORED, batches
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.bounds import drop_bound
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.route import Route
from restnet_hf.runtime.pixels import normalise, to_logits, to_pixels
from restnet_hf.runtime.runners import Run
from restnet_hf.steps import split_at_shared_cuts, walk_tree


BATCH_SIZE = 16  # images in a run while logits are compared
MIN_AGREEMENT = 0.98  # where nothing else is asked for
MAX_OFF_PIXELS = 0.02  # levels of 255 by which images may differ from pixels
MAX_LOGIT_ERROR = 0.02  # largest error of logits in fp32, in standard deviations of the logits


class DisagreementError(ValueError):
    """An exported route predicts other classes than the route itself, or in fp32 other logits."""


@dataclass(frozen=True)
class Comparison:
    """An exported route beside the route itself, on the same images.

    Args:
        scores: ``agreement`` of the predicted classes, and ``accuracy`` where there are labels.
        logit_error: largest error of a logit, in standard deviations of the route's logits.
        images: number of images.
        labelled: number of images with a label.
        lost: number of images that only the route itself classifies correctly.
        won: number of images that only the export classifies correctly.
    """

    scores: Mapping[str, float]
    logit_error: float
    images: int
    labelled: int = 0
    lost: int = 0
    won: int = 0

    @property
    def accuracy_drop(self) -> float:
        """Accuracy that the export loses, in percentage points; NaN where no image has a label."""
        return 100 * (self.lost - self.won) / self.labelled if self.labelled else math.nan

    @property
    def max_drop(self) -> float:
        """The bound of the accuracy that is lost, see `drop_bound`; 100 where no image has a label."""
        return drop_bound(self.lost, self.won, self.labelled) if self.labelled else 100.0


@dataclass(frozen=True)
class Acceptance:
    """What an exported route must keep.

    Args:
        min_agreement: lowest share of images, from 0 to 1, on which it must predict the route's class; None for any.
        max_accuracy_drop: accuracy in percentage points that it may lose at most, which `drop_bound` must confirm;
            None for any.

    Raises:
        ValueError: a limit is out of range.
    """

    min_agreement: float | None = None
    max_accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement={self.min_agreement} must be from 0 to 1")
        if self.max_accuracy_drop is not None and not 0 < self.max_accuracy_drop <= 100:
            raise ValueError(
                f"max_accuracy_drop={self.max_accuracy_drop} must be above 0 and at most 100 percentage points"
            )

    @classmethod
    def of(cls, min_agreement: float | None, max_accuracy_drop: float | None) -> "Acceptance":
        """The given limits, or `MIN_AGREEMENT` where none is given."""
        if min_agreement is None and max_accuracy_drop is None:
            min_agreement = MIN_AGREEMENT
        return cls(min_agreement, max_accuracy_drop)

    def accepts(self, result: Comparison) -> bool:
        """Whether all limits hold.

        Args:
            result: comparison of the export with the original.
        """
        agrees = self.min_agreement is None or result.scores["agreement"] >= self.min_agreement
        return agrees and (self.max_accuracy_drop is None or result.max_drop <= self.max_accuracy_drop)

    def explain(self, result: Comparison) -> str:
        """What a comparison gave and what is asked for, as the end of a sentence on the export."""
        parts = [f"agrees with the original on {result.scores['agreement']:.1%} of {result.images} images"]
        if self.min_agreement is not None:
            parts.append(f"{self.min_agreement:.1%} are asked for (min_agreement)")
        if self.max_accuracy_drop is not None:
            parts.append(
                f"it loses {result.accuracy_drop:.2f} points of accuracy, at most {result.max_drop:.2f} "
                f"with 95 % confidence, and {self.max_accuracy_drop:g} are allowed (max_accuracy_drop)"
            )
            if result.accuracy_drop <= self.max_accuracy_drop:
                parts.append("more images would make the bound tighter")
        return "; ".join(parts)


Way = TypeVar("Way")


def choose_way(
    ways: Iterable[Way], compare: Callable[[Way], Comparison], accept: Acceptance
) -> tuple[Way | None, Comparison]:
    """Choose one of several ways to export, of which each later one is slower and safer.

    Where agreement decides, it is the first that is accepted. Where a bound of the accuracy does, trying one after the
    other until a bound is low enough would find one by chance. So the first way is tried with half of the doubt; if it
    is not accepted, the others are tried from the safest on until one is not accepted, and the last accepted one is
    taken. Such a fixed sequence needs no further share of the doubt (Angelopoulos et al. 2021, arXiv 2110.01052,
    section 2.3): all together are wrong in at most 5 %.

    Args:
        ways: ways to export, the best one first.
        compare: function that exports in one way and compares.
        accept: what must be kept.

    Returns:
        The way, None where none is accepted; and its comparison, or the one that agreed the most.
    """
    remaining = iter(ways)
    chosen, best = None, None
    for number, way in enumerate(_in_order(remaining, accept)):
        result = compare(way)
        if accept.accepts(result):
            chosen, best = way, result
            if number == 0 or accept.max_accuracy_drop is None:
                break
        elif chosen is None and (best is None or result.scores["agreement"] > best.scores["agreement"]):
            best = result
        if number and accept.max_accuracy_drop is not None and not accept.accepts(result):
            break
    assert best is not None
    return chosen, best


def _in_order(ways: Iterator[Way], accept: Acceptance) -> Iterator[Way]:
    """The ways in the order in which they are tried; see `choose_way`."""
    yield next(ways)
    yield from ways if accept.max_accuracy_drop is None else reversed([*ways])


@dataclass(frozen=True)
class Reference:
    """Logits of routes on the images that their exports are compared on.

    Args:
        images: function that returns an iterator over batches of the images, (N, 3, H, W) in float32.
        logits: logits of each route and cascade, (images, classes).
        labels: labels of the images, (images,); None where there are none.
        answered_by: for each cascade, the number of the route that answered each image, (images,).
    """

    images: Callable[[], Iterator[np.ndarray]]
    logits: Mapping[Route | Cascade, np.ndarray]
    labels: np.ndarray | None
    answered_by: Mapping[Cascade, np.ndarray]

    def of_probabilities(self) -> "Reference":
        """The reference of exports that return probabilities: logarithms of the softmax in place of logits."""

        def softmax(logits: np.ndarray) -> np.ndarray:
            exponentials = np.exp(logits - logits.max(1, keepdims=True))
            return exponentials / exponentials.sum(1, keepdims=True)

        return replace(self, logits={route: to_logits(softmax(each)) for route, each in self.logits.items()})

    def compare(self, route: Route | Cascade, run: Run) -> Comparison:
        """Compare an exported route or cascade with the original.

        Args:
            route: route or cascade that was exported.
            run: function from images to logits that runs the export.
        """
        logits, expected = np.concatenate([run(batch) for batch in self.images()]), self.logits[route]
        predicted, original = logits.argmax(1), expected.argmax(1)
        scores, counts = {"agreement": float((predicted == original).mean())}, (0, 0, 0)
        labelled = None if self.labels is None else self.labels != IGNORED
        if self.labels is not None and labelled is not None and labelled.any():
            right, before = (each[labelled] == self.labels[labelled] for each in (predicted, original))
            scores["accuracy"] = float(right.mean())
            counts = len(right), int((before & ~right).sum()), int((right & ~before).sum())
        error = float(np.abs(logits - expected).max() / expected.std())
        return Comparison(scores, error, len(expected), *counts)


@torch.no_grad()
def compute_reference(
    model: StitchedModelForImageClassification, routes: list[Route], cascades: list[Cascade], source: Any, skip: int
) -> Reference:
    """Run routes and cascades on images.

    Args:
        model: model of the routes.
        routes: routes to run on the images.
        cascades: cascades to run on the images.
        source: prepared images, labelled or not.
        skip: number of first images that are left out, as they calibrate.

    Raises:
        ValueError: no images are left.
    """

    def remaining() -> Iterator[dict[str, torch.Tensor]]:
        seen = 0
        for batch in batches(source, BATCH_SIZE, "verify"):
            model.preprocessing.check(batch["pixel_values"])
            first, seen = max(0, skip - seen), seen + len(batch["pixel_values"])
            if first < len(batch["pixel_values"]):
                yield {key: value[first:] for key, value in batch.items()}

    walks = split_at_shared_cuts([(route, model.steps(route)) for route in routes])
    every: list[Route | Cascade] = [*routes, *cascades]
    logits: dict[Route | Cascade, list[np.ndarray]] = {each: [] for each in every}
    answered: dict[Cascade, list[np.ndarray]] = {cascade: [] for cascade in cascades}
    labels: list[np.ndarray] = []
    for batch in remaining():
        x = batch["pixel_values"].to(model.device, model.dtype)
        for route, output in walk_tree(x, walks):
            logits[route].append(output.float().cpu().numpy())
        for cascade in cascades:
            output, numbers = model.run_cascade(x, cascade)
            logits[cascade].append(output.float().cpu().numpy())
            answered[cascade].append(numbers.cpu().numpy())
        labels += [batch["labels"].numpy()] if "labels" in batch else []
    if not logits[routes[0]]:
        raise ValueError(
            f"the first {skip} images calibrate, and there are no others to verify with; give more images, or a "
            "smaller calibration_images"
        )
    return Reference(
        lambda: (batch["pixel_values"].float().numpy() for batch in remaining()),
        _joined(logits),
        np.concatenate(labels) if labels else None,
        _joined(answered),
    )


def check_pixels(images: Callable[[], Iterator[np.ndarray]], how: Mapping[str, Any]) -> None:
    """Raise ValueError where images are not pixels that were normalised, as a file that takes pixels rounds them.

    Args:
        images: function that returns an iterator over batches of images (N, 3, H, W).
        how: ``mean`` and ``std`` of values from 0 to 1.
    """
    for batch in images():
        off = np.abs(normalise(to_pixels(batch, how), how) - batch).transpose(0, 2, 3, 1) * np.float32(how["std"])
        if 255 * float(off.max()) > MAX_OFF_PIXELS:
            raise ValueError(
                f"with_preprocessing needs images whose values are pixels from 0 to 255, normalised by {dict(how)!r}; "
                f"these are up to {255 * float(off.max()):.2g} levels off. Give pictures, which the model prepares"
            )


def _joined(parts: Mapping[Any, list[np.ndarray]]) -> dict[Any, np.ndarray]:
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}
