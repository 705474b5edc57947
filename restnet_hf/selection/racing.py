"""Race of routes: those that cannot be the best do not run on all images."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from restnet_hf.data.datasets import Batch
from restnet_hf.data.shares import OwnBatch, in_order, own_batches
from restnet_hf.distributed import Own
from restnet_hf.routes.route import Route
from restnet_hf.steps import Walk, split_at_shared_cuts, walk_tree


@dataclass(frozen=True)
class RaceResult:
    """Result of `race_routes`.

    Args:
        scores: accuracy of each route that ran on all images.
        stopped: accuracy and number of images of each route that was stopped before.
        images: number of all images.
        right: whether each route that ran on all images is right on each of them (N,).
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

    Raises:
        ValueError: a batch has no labels, ``error`` is out of range, or both kinds of rivals are given.
    """
    if not 0 <= error < 1:
        raise ValueError(f"error={error} must be at least 0 and below 1")
    groups = _groups_of([route for route, _ in walks], rivals, beaten_by)
    right: dict[Route, list[np.ndarray]] = {route: [] for route, _ in walks}
    alive, images = list(walks), 0
    shared = split_at_shared_cuts(alive)
    own, number = _HitsOfAll(own_batches(batches), device), 0
    while turn := own.next_turn(shared):
        for count, hits_of_batch in turn:  # a route that a batch stops ran on the later ones of its turn in vain
            number += 1
            for route, _ in alive:
                right[route].append(hits_of_batch[route])
            images += count
            hits = {route: np.concatenate(right[route]) for route, _ in alive}
            hits |= {route: each[:images] for route, each in (known or {}).items()}
            level = error / (len(walks) * number * (number + 1))
            behind = {route for route, _ in alive if level and _cannot_win(route, hits, groups[route], level)}
            alive = [walk for walk in alive if walk[0] not in behind]
        shared = split_at_shared_cuts(alive) if len(alive) < len(shared) else shared
    every = {route: np.concatenate(hits) for route, hits in right.items() if hits}
    scores = {route: float(every[route].mean()) for route, _ in alive}
    stopped = {route: (float(hits.mean()), len(hits)) for route, hits in every.items() if route not in scores}
    return RaceResult(scores, stopped, images, {route: every[route] for route in scores})


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


def _cannot_win(
    route: Route, hits: Mapping[Route, np.ndarray], groups: Sequence[Collection[Route]], level: float
) -> bool:
    """Whether every group of a route has a significantly better one."""
    for group in groups:
        best = max((rival for rival in hits if rival in group), key=lambda rival: hits[rival].sum(), default=route)
        more, less = (int((a & ~b).sum()) for a, b in ((hits[best], hits[route]), (hits[route], hits[best])))
        if _sign_test(more, less) > level:
            return False
    return True


def _sign_test(more: int, less: int) -> float:
    """Probability that of ``more + less`` fair coins at least ``more`` show heads."""
    count = more + less
    return sum(math.comb(count, heads) for heads in range(more, count + 1)) / 2**count
