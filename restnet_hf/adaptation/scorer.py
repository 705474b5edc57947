"""Scorer: scores routes on the images of a device, and predicts scores from a few images or from similarity."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from restnet_hf.adaptation.search import Predictor, Rejected
from restnet_hf.anchors.anchor import largest_anchor
from restnet_hf.data.collected import RowsInOrder
from restnet_hf.data.datasets import Batch, batches, drop_unlabelled
from restnet_hf.data.shares import OwnBatch, shared_batches
from restnet_hf.distributed import Own, add_up, this_process
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.accuracy import mean_probabilities
from restnet_hf.profiling.cascades import Observations, check_images, observe_routes
from restnet_hf.routes.profile import ProfiledRoute
from restnet_hf.routes.route import Route
from restnet_hf.selection.racing import RaceResult, race_routes
from restnet_hf.selection.selectors import SELECTORS
from restnet_hf.steps import Walk, run_steps


SCORES = {True: "accuracy", False: "agreement"}  # name of the score, by whether the images have labels
FEW_IMAGES = "few_images"
PREDICTORS = (FEW_IMAGES, *SELECTORS)
SHARE = 4  # one evaluation in so many is spent on predictions from a few images


class Scorer:
    """Scores routes on the device's images, and records the routes that were stopped early.

    Args:
        model: model of the routes.
        data: images, with labels or without; without them the predictions of the largest anchor are the labels.
        batch_size: number of images in a batch, which is reduced where memory runs out.
        exact: whether routes are evaluated on all images even where they cannot win any more.
    """

    def __init__(self, model: StitchedModelForImageClassification, data: Any, batch_size: int, exact: bool) -> None:
        self.model, self.data, self.batch_size = model, data, batch_size
        self.error = 0.0 if exact else 0.01
        self.fits: list[Route] = []  # routes that a budget allows
        self.images = 0
        self.stopped: dict[Route, tuple[float, int]] = {}
        first = next(iter(self._batches()))
        self.score = SCORES["labels" in first]
        self.teacher = None if "labels" in first else self._teacher_predictions()

    def _prepared(self, batch: Batch) -> Batch:
        self.model.preprocessing.check(batch["pixel_values"])
        return {**batch, "pixel_values": batch["pixel_values"].to(self.model.dtype)}

    def _batches(self) -> Iterator[Batch]:
        """All batches, on every process."""
        return map(self._prepared, drop_unlabelled(batches(self.data, self.batch_size, "private images")))

    def _own_batches(self) -> Iterator[OwnBatch]:
        """The batches of this process."""
        own = shared_batches(self.data, self.batch_size, "private images", unlabelled=False)
        return (each._replace(batch=self._prepared(each.batch)) for each in own)

    @torch.no_grad()
    def _teacher_predictions(self) -> torch.Tensor:
        """Classes (images,) that the largest anchor predicts; processes share the images."""
        steps = self.model.steps(Route.alone(largest_anchor(self.model.anchors.values()).name))
        rows = RowsInOrder()
        for number, _, batch in self._own_batches():
            rows.put(number, {"classes": run_steps(batch["pixel_values"].to(self.model.device), steps).argmax(-1)})
        return rows.all()["classes"]

    def _with_labels(self, start: int, batch: Batch) -> Batch:
        """A batch with the teacher's classes where there are no labels, so that no image is left out before it."""
        if self.teacher is None:
            return batch
        return {**batch, "labels": self.teacher[start : start + len(batch["pixel_values"])]}

    def _labelled(self) -> Own[OwnBatch]:
        """The batches of this process, with labels."""
        return Own(each._replace(batch=self._with_labels(each.start, each.batch)) for each in self._own_batches())

    def _sample(self, every: int) -> Own[OwnBatch]:
        """One of every so many images, in batches of the usual size; each process reads its own part."""
        return Own(self._own_sample(every))

    def _own_sample(self, every: int) -> Iterator[OwnBatch]:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        read = number = 0
        for number, start, batch in self._labelled():
            chosen = slice(every - 1 - start % every, None, every)
            few = (batch[name][chosen].clone() for name in ("pixel_values", "labels"))  # the others are let go
            kept += zip(*few, strict=True)
            read += len(batch["pixel_values"])
            while len(kept) >= self.batch_size:
                yield OwnBatch(number, start, _stack(kept[: self.batch_size]))
                del kept[: self.batch_size]
        if kept:
            yield OwnBatch(number, 0, _stack(kept))
        self.images = int(add_up(torch.tensor(read)))

    def _walks(self, routes: Iterable[Route]) -> list[Walk]:
        return [(route, self.model.steps(route)) for route in routes]

    def _run_within_memory(self, run: Callable[[], Any]) -> Any:
        """Call a function with a batch size that memory allows; returns its result.

        Several processes share the batches, which must have one size: there a batch that is too large is an error.
        """
        if this_process().num_processes > 1:
            return run()

        def run_with(batch_size: int) -> Any:
            self.batch_size = batch_size
            return run()

        return find_executable_batch_size(run_with, starting_batch_size=self.batch_size)()

    def __call__(self, routes: Sequence[Route]) -> dict[Route, float]:
        """Scores of a batch of routes."""
        walks, rivals = self._walks(routes), [set(routes) & {*self.fits}]
        raced: RaceResult = self._run_within_memory(
            lambda: race_routes(walks, self._labelled(), self.model.device, rivals, self.error)
        )
        self.images = raced.images
        self.stopped |= raced.stopped
        return {**raced.scores, **{route: score for route, (score, _) in raced.stopped.items()}}

    def observe(self, walks: Sequence[Walk]) -> Observations:
        """What routes answer on all images, and how sure they are; see `observe_routes`.

        Args:
            walks: routes with their steps.

        Raises:
            ValueError: there are fewer than 100 images.
        """
        observed: Observations = self._run_within_memory(
            lambda: observe_routes(walks, self._labelled(), self.model.device)
        )
        check_images(len(observed))
        return observed

    def make_predictor(self, kind: str, most: int) -> tuple[Predictor, int]:
        """A function that predicts the scores of the routes that fit.

        ``few_images`` predicts a route's mean probability of the right class on a few of the images, as many as
        `SHARE` allows. A selector compares pairs of cuts, so it has no prediction for routes of two stitches.

        Args:
            kind: name of the predictor, one of `PREDICTORS`.
            most: number of evaluations that the search may spend.

        Returns:
            The predictor, and the number of evaluations that it was worth: 0 for selectors.
        """
        if kind == FEW_IMAGES:
            every = -(-SHARE * len(self.fits) // most)
            walks = self._walks(self.fits)
            means = self._run_within_memory(lambda: mean_probabilities(walks, self._sample(every), self.model.device))
            return means.get, -(-(self.images // every) * len(self.fits) // self.images)
        compared = self.model.compare(self.data, [kind], order="auto", batch_size=self.batch_size)[kind]
        values = {r: value for r in self.fits for each in compared if (value := each.value(r)) is not None}
        return values.get, 0

    def as_measured(self, row: ProfiledRoute) -> ProfiledRoute:
        """A row, without its score where that is from some of the images only.

        Args:
            row: row of a search.
        """
        return replace(row, scores={}) if row.route in self.stopped else row

    def reasons(self, rejected: Iterable[Rejected]) -> list[Rejected]:
        """Rejected routes, with the reason of those that were stopped early.

        Args:
            rejected: rejected routes of a search.
        """
        reasons = []
        for each in rejected:
            if each.why == "not evaluated" and each.route in self.stopped:
                score, images = self.stopped[each.route]
                detail = f"stopped after {images} of {self.images} images with {self.score}={score:g}: it cannot win"
                each = Rejected(each.route, "worse", detail)
            reasons.append(each)
        return reasons


def _stack(rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}
