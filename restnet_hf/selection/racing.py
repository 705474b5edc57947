"""Race of routes: those that cannot be the best do not run on all images."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from restnet_hf.data.collected import RowsInOrder
from restnet_hf.data.datasets import Batch, no_labels_error
from restnet_hf.data.shares import OwnBatch, in_order, own_batches
from restnet_hf.distributed import Own
from restnet_hf.routes.route import Route
from restnet_hf.steps import Walk, split_at_shared_cuts, walk_tree


MOST_COINS = 1000  # of a sign test that is computed exactly
LOG_FACTORIALS = np.log(np.arange(MOST_COINS + 1).clip(1)).cumsum()  # of 0, 1, ...


@dataclass(frozen=True)
class RaceResult:
    """Result of `race_routes`.

    Args:
        scores: accuracy of each route that ran on all images.
        stopped: accuracy and number of images of each route that was stopped before.
        images: number of all images.
        right: whether each route that ran on all images is right on each of them (N,), where that is asked for.
    """

    scores: dict[Route, float]
    stopped: dict[Route, tuple[float, int]]
    images: int
    right: dict[Route, np.ndarray] = field(default_factory=dict, compare=False)


@torch.no_grad()
def race_routes(
    walks: Sequence[Walk],
    batches: Iterable[Batch] | Own[OwnBatch],
    device: torch.device,
    rivals: Iterable[Collection[Route]] | None = None,
    error: float = 0.01,
    *,
    known: Mapping[Route, np.ndarray] | None = None,
    beaten_by: Mapping[Route, Collection[Route]] | None = None,
    keep: bool = False,
) -> RaceResult:
    """Measure the accuracy of routes on the same images, and stop those that cannot be the best.

    A route is stopped once each group of rivals that it belongs to has a significantly better one. After each batch a
    sign test is made on the images on which just one of the two is right; its level is divided among routes and
    batches, so that the best of a group is stopped with a probability of at most ``error``. The accuracy of the other
    routes is exactly that of `score_routes`. Several processes share the batches, and all return the same.

    Args:
        walks: routes with their steps.
        batches: batches of labelled images in the model's preprocessing, the same on every process, or its own.
        device: device to run on.
        rivals: groups of routes of which the best is wanted, such as all within a budget; one group by default.
        error: largest probability of stopping the best of a group, from 0 (no route is stopped) to below 1.
        known: whether further routes, which need not run, are right on each of the images (N,), by route.
        beaten_by: for each route those of which a significantly better one stops it, in place of ``rivals``; such as
            all that cost no more.
        keep: whether the result has ``right``, which takes a byte for each route and image.

    Raises:
        ValueError: a batch has no labels, ``error`` is out of range, or both kinds of rivals are given.
    """
    if not 0 <= error < 1:
        raise ValueError(f"error={error} must be at least 0 and below 1")
    routes = [route for route, _ in walks]
    race = _Race(routes, _groups_of(routes, rivals, beaten_by), known or {}, keep)
    alive, shared = list(walks), split_at_shared_cuts(walks)
    own, number = _HitsOfAll(own_batches(batches), device), 0
    while turn := own.next_turn(shared):
        for count, hits in turn:  # a route that a batch stops ran on the later ones of its turn in vain
            number += 1
            race.add([route for route, _ in alive], hits, count)
            level = error / (len(walks) * number * (number + 1))
            behind = race.behind([route for route, _ in alive], level) if level else ()
            alive = [walk for walk in alive if walk[0] not in behind]
        shared = split_at_shared_cuts(alive) if len(alive) < len(shared) else shared
    return race.result([route for route, _ in alive])


class _Race:
    """What is known of routes so far: how many images each is right on, and on how many each is alone against another.

    Args:
        routes: routes that run.
        groups: groups of rivals of each.
        known: whether further routes are right on each of the images (N,), by route.
        keep: whether to keep which images each route is right on.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        groups: Mapping[Route, Sequence[Collection[Route]]],
        known: Mapping[Route, np.ndarray],
        keep: bool,
    ) -> None:
        self.at = {route: number for number, route in enumerate([*routes, *known])}
        self.known, self.images = np.array([*known.values()]), 0
        self.groups = {
            route: [np.array(sorted(self.at[each] for each in group if each in self.at), int) for group in every]
            for route, every in groups.items()
        }
        self.right = np.zeros(len(self.at), np.int64)
        self.alone = np.zeros((len(self.at), len(self.at)), np.int64)
        self.seen = np.zeros(len(self.at), np.int64)  # number of images that each ran on
        self.kept = RowsInOrder() if keep else None

    def add(self, routes: Sequence[Route], hits: Mapping[Route, np.ndarray], count: int) -> None:
        """Count the images of the next batch.

        Args:
            routes: routes that ran.
            hits: whether each is right on each image (count,).
            count: number of images.
        """
        rows = np.zeros((len(self.at), count), bool)
        if len(self.known):
            rows[-len(self.known) :] = self.known[:, self.images : self.images + count]
        for route in routes:
            rows[self.at[route]] = hits[route]
            self.seen[self.at[route]] += count
        self.right += rows.sum(1)
        self.alone += (rows.astype(np.float32) @ (~rows).T.astype(np.float32)).astype(np.int64)
        self.images += count
        if self.kept is not None:
            self.kept.put(len(self.kept.places), {"right": torch.from_numpy(rows.T)})

    def behind(self, routes: Sequence[Route], level: float) -> set[Route]:
        """The routes that a significantly better one beats in every group of theirs.

        Args:
            routes: routes that still run.
            level: level of each test.
        """
        right = np.full(len(self.at), -1)
        running = [self.at[route] for route in routes] + [*range(len(self.at) - len(self.known), len(self.at))]
        right[running] = self.right[running]
        return {route for route in routes if all(self._beats(route, g, right, level) for g in self.groups[route])}

    def _beats(self, route: Route, group: np.ndarray, right: np.ndarray, level: float) -> bool:
        """Whether the best of a group is significantly better than a route."""
        if not len(group):
            return False
        own, best = self.at[route], group[right[group].argmax()]
        return right[best] >= 0 and _sign_test(int(self.alone[best, own]), int(self.alone[own, best])) <= level

    def result(self, routes: Sequence[Route]) -> RaceResult:
        """The result, with routes that ran on all images.

        Args:
            routes: routes that were not stopped.
        """
        if not self.images:
            raise no_labels_error()
        shares = {route: (self.right[at] / n, int(n)) for route, at in self.at.items() if (n := self.seen[at])}
        scores = {route: float(shares[route][0]) for route in routes}
        stopped = {route: (float(share), n) for route, (share, n) in shares.items() if route not in scores}
        kept = {} if self.kept is None else self.kept.own()
        right = {route: kept["right"][:, self.at[route]].numpy() for route in scores if kept}
        return RaceResult(scores, stopped, self.images, right)


class _HitsOfAll:
    """Which images routes are right on, batch by batch; each process runs one batch of a turn.

    Args:
        batches: batches of this process.
        device: device to run on.
    """

    def __init__(self, batches: Iterator[OwnBatch], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def next_turn(self, walks: Sequence[Walk]) -> list[tuple[int, dict[Route, np.ndarray]]]:
        """Sizes of the next batches, one of each process that has one left, and on which images each route is right.

        Args:
            walks: routes with their steps, from `split_at_shared_cuts`.

        Raises:
            ValueError: a batch has no labels.
        """
        own = next(self.batches, None)
        chunks = [] if own is None else [(own.number, len(own.batch["pixel_values"]), self._hits(own.batch, walks))]
        return [(count, hits) for _, count, hits in in_order(chunks)]

    def _hits(self, batch: Batch, walks: Sequence[Walk]) -> dict[Route, np.ndarray]:
        if "labels" not in batch:
            raise ValueError("accuracy needs labels: batches must hold 'labels' beside 'pixel_values'")
        labels = batch["labels"].cpu()
        logits = walk_tree(batch["pixel_values"].to(self.device), walks)
        return {route: (each.argmax(-1).cpu() == labels).numpy() for route, each in logits}


def _groups_of(
    routes: Sequence[Route],
    rivals: Iterable[Collection[Route]] | None,
    beaten_by: Mapping[Route, Collection[Route]] | None,
) -> dict[Route, list[set[Route]]]:
    """The groups of rivals of each route, in each of which a better one must be to stop it."""
    if beaten_by is None:
        groups = [set(group) for group in (rivals if rivals is not None else [routes])]
        return {route: [group for group in groups if route in group] for route in routes}
    if rivals is not None:
        raise ValueError("give rivals or beaten_by, not both")
    return {route: [set(beaten_by.get(route, ()))] for route in routes}


def _sign_test(more: int, less: int) -> float:
    """Probability that of ``more + less`` fair coins at least ``more`` show heads; of many, by the normal law."""
    count = more + less
    if count > MOST_COINS:
        return 0.5 * math.erfc((2 * more - 1 - count) / math.sqrt(2 * count))
    heads = np.arange(more, count + 1)
    logs = LOG_FACTORIALS[count] - LOG_FACTORIALS[heads] - LOG_FACTORIALS[count - heads] - count * math.log(2)
    return float(np.exp(logs).sum())
