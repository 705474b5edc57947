"""Judge: what routes score on the images of a device, and what a few of the images, or similarity, foretell of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from restnet_hf.adaptation.search import Predictor, Rejected
from restnet_hf.data.datasets import Batch, batches, labelled
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.accuracy import mean_probabilities
from restnet_hf.routes.profile import ProfiledRoute
from restnet_hf.routes.route import Route
from restnet_hf.selection.racing import RaceResult, race_routes
from restnet_hf.selection.selectors import SELECTORS
from restnet_hf.steps import Walk, run_steps


LABELS = {True: "accuracy", False: "agreement"}  # the score, by whether the images have labels
FEW = "few_images"
PREDICTORS = (FEW, *SELECTORS)
SHARE = 4  # one evaluation in so many is spent on what a few images foretell


class Judge:
    """Scores routes on the device's images, and remembers which it did not see through to the end.

    Args:
        model: whose routes they are.
        data: images, with labels or without; then right is what the largest anchor says.
        batch_size: to begin with; smaller where memory runs out.
        exact: evaluate routes on all images even where they cannot win any more.
    """

    def __init__(self, model: StitchedModelForImageClassification, data: Any, batch_size: int, exact: bool) -> None:
        self.model, self.data, self.batch_size = model, data, batch_size
        self.error = 0.0 if exact else 0.01
        self.fits: list[Route] = []  # those that a budget allows
        self.images = 0
        self.stopped: dict[Route, tuple[float, int]] = {}
        first = next(iter(self._batches()))
        self.score = LABELS["labels" in first]
        self.teacher = None if "labels" in first else torch.cat(list(self._taught()))

    def _batches(self) -> Iterator[Batch]:
        for batch in labelled(batches(self.data, self.batch_size, "private images")):
            self.model.preprocessing.check(batch["pixel_values"])
            yield {**batch, "pixel_values": batch["pixel_values"].to(self.model.dtype)}

    @torch.no_grad()
    def _taught(self) -> Iterator[torch.Tensor]:
        """What the largest anchor says, batch by batch."""
        anchors = self.model.anchors
        largest = max(anchors, key=lambda name: anchors[name].num_parameters())
        steps = self.model.steps(Route.alone(largest))
        for batch in self._batches():
            yield run_steps(batch["pixel_values"].to(self.model.device), steps).argmax(-1).cpu()

    def _labelled(self) -> Iterator[Batch]:
        start = 0
        for batch in self._batches():
            stop = start + len(batch["pixel_values"])
            yield batch if self.teacher is None else {**batch, "labels": self.teacher[start:stop]}
            start = stop

    def _few(self, every: int) -> Iterator[Batch]:
        """Every so many-th image, in batches as large as the others."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.images = 0
        for batch in self._labelled():
            chosen = slice(every - 1 - self.images % every, None, every)
            kept += zip(batch["pixel_values"][chosen], batch["labels"][chosen], strict=True)
            self.images += len(batch["pixel_values"])
            while len(kept) >= self.batch_size:
                yield _together(kept[: self.batch_size])
                del kept[: self.batch_size]
        if kept:
            yield _together(kept)

    def _walks(self, routes: Iterable[Route]) -> list[Walk]:
        return [(route, self.model.steps(route)) for route in routes]

    def _with_memory(self, run: Callable[[], Any]) -> Any:
        """What a run gives, with batches as large as memory allows."""

        def at(batch_size: int) -> Any:
            self.batch_size = batch_size
            return run()

        return find_executable_batch_size(at, starting_batch_size=self.batch_size)()

    def __call__(self, routes: Sequence[Route]) -> dict[Route, float]:
        walks, rivals = self._walks(routes), [set(routes) & {*self.fits}]
        found: RaceResult = self._with_memory(
            lambda: race_routes(walks, self._labelled(), self.model.device, rivals, self.error)
        )
        self.images = found.images
        self.stopped |= found.stopped
        return {**found.scores, **{route: score for route, (score, _) in found.stopped.items()}}

    def predictor(self, kind: str, most: int) -> tuple[Predictor, int]:
        """What foretells the scores of the routes that fit, and how many evaluations it took.

        ``few_images`` takes as many as `SHARE` allows: each route's mean probability of what is right, on every so
        many-th image. A selector takes none: it looks at pairs of cuts, and says nothing of routes of two stitches.

        Args:
            kind: one of `PREDICTORS`.
            most: evaluations that there are.
        """
        if kind == FEW:
            every = -(-SHARE * len(self.fits) // most)
            walks = self._walks(self.fits)
            held = self._with_memory(lambda: mean_probabilities(walks, self._few(every), self.model.device))
            return held.get, -(-(self.images // every) * len(self.fits) // self.images)
        found = self.model.compare(self.data, [kind], order="auto", batch_size=self.batch_size)[kind]
        said = {r: value for r in self.fits for each in found if (value := each.value(r)) is not None}
        return said.get, 0

    def as_measured(self, row: ProfiledRoute) -> ProfiledRoute:
        """A row without a score that is of some images only."""
        return replace(row, scores={}) if row.route in self.stopped else row

    def reasons(self, rejected: Iterable[Rejected]) -> list[Rejected]:
        """The reasons, with those that were stopped early named."""
        found = []
        for each in rejected:
            if each.why == "not evaluated" and each.route in self.stopped:
                score, images = self.stopped[each.route]
                detail = f"stopped after {images} of {self.images} images with {self.score}={score:g}: it cannot win"
                each = Rejected(each.route, "worse", detail)
            found.append(each)
        return found


def _together(rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}
