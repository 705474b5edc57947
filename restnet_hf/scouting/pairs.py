"""PairJudge: what a pair of anchors can give, predicted from their samples: anchors, stitched routes, cascades."""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from restnet_hf.hashing import software_sha256
from restnet_hf.profiling.cascade_rows import profile_cascades
from restnet_hf.profiling.cascades import LEAST_IMAGES, Observations, join_observations, observe_logits
from restnet_hf.profiling.costs import CostTable
from restnet_hf.progress import progress_bar
from restnet_hf.routes.profile import Profile, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import Route, Segment
from restnet_hf.scouting.passes import BATCH_SIZE, AnchorPasses
from restnet_hf.selection.cache import read_similarity, write_similarity
from restnet_hf.selection.racing import race_routes
from restnet_hf.selection.ranking import Similarity
from restnet_hf.selection.selectors import RIDGE
from restnet_hf.steps import Walk


CODE = ("scouting", "profiling", "selection")  # that a race depends on besides samples
NEAR_BUDGET = (0.97, 0.98, 0.99, 1.0)  # shares of it for which cascades are searched: a mean over images varies
ERROR = 0.01  # largest probability that the race of a pair stops a route that is the best at its cost


class PairJudge:
    """Predicts accuracies of the routes and cascades of pairs of anchors, from samples and logits on disk.

    Stitched routes are predicted as by the selector ``fitted_accuracy``: by the accuracy, on the held-out images that
    samples were taken of, of the route with the stitch that least squares fits. Those of a pair run as a race, in
    which a route is stopped where another one that costs no more, an anchor alone among them, is significantly better.
    Anchors are scored, and cascades of two of them calibrated, on their logits of all held-out images but the last
    ones, which take no part in choosing.

    Args:
        passes: samples of all anchors, each of which was run.
        folder: folder in which the results of races are kept, for a run that goes on later.
        costs: costs in which another route may not be worse to stop one, such as ``macs``.
        error: largest probability that a race stops a route that is the best at its cost; with 0 all routes run on
            all images.
        checking: number of held-out images, the last ones, that take no part in choosing.
        mean_macs: budget for which the best cascade of each pair is wanted, beside those of the whole range.
    """

    def __init__(
        self,
        passes: AnchorPasses,
        folder: str | os.PathLike[str],
        costs: Collection[str] = ("macs",),
        error: float = ERROR,
        checking: int = 0,
        mean_macs: float | None = None,
    ) -> None:
        self.passes, self.model, self.folder, self.error = passes, passes.model, Path(folder), error
        self.compared = sorted({"macs", *costs})
        self.budgets = [] if mean_macs is None else [share * mean_macs for share in NEAR_BUDGET]
        self.table = CostTable(memory="memory_mb" in self.compared)
        self.alone = {name: self.table.costs(self.model.steps(Route.alone(name))) for name in self.model.anchors}
        self.software = software_sha256((), CODE)
        held = passes.held_numbers
        self.chosen_on, self.checked_on = held[: len(held) - checking], held[len(held) - checking :]
        self.raced_on = held[: passes.images // 2]
        self.observed = self._observe(self.chosen_on)
        self.right = dict(zip(self.model.anchors, self.observed.right, strict=True))

    def _observe(self, numbers: Sequence[int], temperatures: Sequence[float] | None = None) -> Observations:
        """What all anchors answer on some images; temperatures are fitted unless they are given."""
        labels = self.passes.labels[numbers].numpy()
        parts = []
        for at, name in enumerate(self.model.anchors):
            logits = self.passes.logits(name)[numbers].numpy()[None]
            fitted = None if temperatures is None else temperatures[at : at + 1]
            parts.append(observe_logits([Route.alone(name)], logits, labels, temperatures=fitted))
        return join_observations(parts)

    @cached_property
    def checked(self) -> Observations:
        """What all anchors answer on the images that take no part in choosing, with the temperatures of the others."""
        return self._observe(self.checked_on, self.observed.temperatures)

    def effort(self, front: str, end: str) -> float:
        """About the cost of a race, in any unit: what all routes from one anchor into another would take.

        Args:
            front: name of the front.
            end: name of the end.
        """
        cuts = self.model.anchors[front].depth * self.model.anchors[end].depth
        return cuts * (self.alone[front]["macs"] + self.alone[end]["macs"])

    def race(self, front: str, end: str) -> Similarity:
        """Predicted accuracy of the routes from one anchor into another, masked where the race stopped a route.

        Routes that cost as many MACs as both anchors alone do not run.

        Args:
            front: name of the front.
            end: name of the end.
        """
        file = self._file(front, end)
        if (known := read_similarity(file, front, end)) is not None:
            return known
        most = max(self.alone[name]["macs"] for name in (front, end))
        walks = [walk for walk in self._walks(front, end) if self.table.macs(walk[1]) < most]
        costs = {route: self.table.costs(steps) for route, steps in walks}
        right = self._run(walks, self._rivals(costs, (front, end)))
        values = np.full((self.model.anchors[front].depth, self.model.anchors[end].depth), np.nan)
        for route, each in right.items():
            (point,) = route.stitch_points
            values[point.source_cut - 1, point.target_cut - 1] = each.mean()
        held_out = len(self.raced_on)
        settings = {"method": "fitted_accuracy", "held_out": held_out, "ran": len(walks), "error": self.error}
        settings["costs"] = {str(route): costs[route] for route in right}
        settings["right"] = {str(route): np.packbits(each).tobytes().hex() for route, each in right.items()}
        similarity = Similarity(front, end, np.ma.masked_invalid(values), settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_similarity(similarity, file)
        return similarity

    def _walks(self, front: str, end: str) -> Iterator[Walk]:
        """Every route with a stitch between two anchors that least squares fits to the samples."""
        for cuts, stitch in self.passes.pairs[front, end].stitches(RIDGE).items():
            route = _route(front, end, *cuts)
            yield route, self.model.steps(route, {route.stitch_points[0].name: stitch})

    def _run(self, walks: Sequence[Walk], rivals: Mapping[Route, Collection[Route]]) -> dict[Route, np.ndarray]:
        """On which images the routes that the race did not stop are right."""
        if not walks:
            return {}
        images = self.passes.batches(self.raced_on)
        known = {Route.alone(name): right[: len(self.raced_on)] for name, right in self.right.items()}
        return race_routes(
            walks, images, self.model.device, error=self.error, known=known, beaten_by=rivals, keep=True
        ).right

    def raced(self, route: Route) -> np.ndarray:
        """Whether a stitched route that its race did not stop is right on each image of the race (N,).

        Args:
            route: route of one stitch.
        """
        (point,) = route.stitch_points
        hits = bytes.fromhex(self.race(point.source, point.target).settings["right"][str(route)])
        return np.unpackbits(np.frombuffer(hits, np.uint8), count=len(self.raced_on)).astype(bool)

    def fit(self, routes: Collection[Route]) -> list[Walk]:
        """Routes of one stitch each, and their steps with the stitches that least squares fits.

        Args:
            routes: routes from one anchor into another, in directions that were compared.
        """
        walks = list[Walk]()
        for (front, end, cut), some in _by_front_cut(routes).items():
            stitches = self.passes.pairs[front, end].stitches(RIDGE, [cut])
            for route in some:
                (point,) = route.stitch_points
                stitch = stitches[point.source_cut, point.target_cut]
                walks.append((route, self.model.steps(route, {point.name: stitch})))
        return walks

    def run(self, routes: Collection[Route], numbers: Sequence[int]) -> dict[Route, np.ndarray]:
        """Whether stitched routes, with stitches that least squares fits, are right on each of some images (N,).

        Args:
            routes: routes of one stitch each.
            numbers: numbers of the images.
        """
        if not routes:
            return {}
        images = progress_bar(self.passes.batches(numbers), "check", math.ceil(len(numbers) / BATCH_SIZE))
        return race_routes(self.fit(routes), images, self.model.device, error=0, keep=True).right

    def profile(self, front: str, end: str) -> Profile:
        """Costs and predicted accuracy of what a pair offers, in both directions where both were compared.

        Args:
            front: name of the front.
            end: name of the end.
        """
        names = sorted((front, end), key=lambda name: self.alone[name]["macs"])
        rows = [_row(Route.alone(name), self.alone[name], self.right[name].mean().item()) for name in names]
        for pair in ((front, end), (end, front)):
            if pair in self.passes.pairs:
                found = self.race(*pair)
                for (i, j), value in np.ndenumerate(found.values.filled(np.nan)):
                    if np.isfinite(value):
                        route = _route(*pair, i + 1, j + 1)
                        rows.append(_row(route, found.settings["costs"][str(route)], float(value)))
        metadata = {"images": len(self.chosen_on), "images_of_stitched": len(self.raced_on), "predicted": True}
        return Profile(tuple(rows), metadata, self._cascades(names))

    def _cascades(self, names: list[str]) -> tuple[ProfiledCascade, ...]:
        """The cascades of two anchors, the cheaper first; none where the held-out images are too few."""
        if len(self.observed) < LEAST_IMAGES:
            return ()
        walks = [(route, self.model.steps(route)) for route in map(Route.alone, names)]
        observed = self.observed.select_routes([self.observed.routes.index(route) for route, _ in walks])
        return profile_cascades(observed, walks, self.table, "accuracy", self.budgets)

    def _rivals(self, costs: Mapping[Route, Mapping[str, float]], anchors: Iterable[str]) -> dict[Route, list[Route]]:
        """For each route all others, and the anchors alone, that cost no more."""
        every = {**costs, **{Route.alone(name): self.alone[name] for name in anchors}}

        def no_more(other: Route, route: Route) -> bool:
            return all(every[other][name] <= every[route][name] for name in self.compared)

        return {route: [other for other in every if other != route and no_more(other, route)] for route in costs}

    def _file(self, front: str, end: str) -> Path:
        """File of a race, whose name depends on all that its result does."""
        caches = [self.passes.cache(name).folder.name for name in (front, end)]
        about: dict[str, Any] = {"caches": caches, "costs": self.compared, "error": self.error}
        about["software"] = self.software
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        return self.folder / f"{front}+{end}-{key}.npz"


def _by_front_cut(routes: Collection[Route]) -> dict[tuple[str, str, int], list[Route]]:
    """Routes of one stitch by front, end and the cut of the front, whose stitches are fitted together."""
    found: dict[tuple[str, str, int], list[Route]] = {}
    for route in routes:
        (point,) = route.stitch_points
        found.setdefault((point.source, point.target, point.source_cut), []).append(route)
    return found


def _route(front: str, end: str, i: int, j: int) -> Route:
    return Route((Segment(front, 0, i), Segment(end, j)))


def _row(route: Route, costs: Mapping[str, float], accuracy: float) -> ProfiledRoute:
    return ProfiledRoute(route, costs, {"accuracy": accuracy}).with_means()
