"""Cascades on a device: calibrated on its own images, among the routes that its budget allows an image to take."""

import math
from collections.abc import Sequence

from restnet_hf.adaptation.scorer import Scorer
from restnet_hf.profiling.cascade_rows import profile_cascades
from restnet_hf.profiling.cascades import MOST_ROUTES
from restnet_hf.profiling.costs import CostTable
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.routes.profile import MEANS, AnyProfiled, Budget, Profile, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import Route


def limit_routes(budget: Budget) -> Budget:
    """The budget of a route alone, whose mean over images is what each of them takes.

    Args:
        budget: limits on the costs of routes and cascades.
    """
    limits = budget.limits
    for mean, cost in MEANS.items():
        if mean in limits:
            limits[cost] = min(limits.pop(mean), limits.get(cost, math.inf))
    return Budget(**limits)


def calibrate(
    scorer: Scorer, rows: Sequence[ProfiledRoute], budget: Budget, latency: LatencyTable | None
) -> tuple[ProfiledCascade, ...]:
    """Cascades of the routes that an image may take, calibrated on the device's images.

    Args:
        scorer: scorer with the model of the routes and the images.
        rows: candidates with their costs, and the scores of those that were evaluated.
        budget: limits on the costs; those on a mean do not limit what one image may take.
        latency: latency table of this device; None where no latency is limited.

    Raises:
        ValueError: there are fewer than 100 images, or the labels of an image are several.
    """
    scorer.model.check_one_label()
    walks = [(route, scorer.model.steps(route)) for route in _combined(rows, budget, scorer.score)]
    return profile_cascades(scorer.observe(walks), walks, CostTable(latency), scorer.score)


def _combined(rows: Sequence[ProfiledRoute], budget: Budget, score: str) -> list[Route]:
    """The routes that cascades are made of: of many the anchors, and those that were evaluated as the best."""
    peaks = {cost: limit for cost, limit in budget.limits.items() if cost not in MEANS}
    allowed = [row for row in rows if not peaks or Budget(**peaks).allows(row.costs)]
    anchors = [row.route for row in allowed if row.route.is_anchor]
    ranked = sorted(allowed, key=lambda row: -row.scores.get(score, -math.inf))
    return list(dict.fromkeys([*anchors, *(row.route for row in ranked)]))[:MOST_ROUTES]


def routes_of(row: AnyProfiled) -> tuple[Route, ...]:
    """The routes that a row of a profile runs: one, or those of a cascade."""
    return row.route.routes if isinstance(row, ProfiledCascade) else (row.route,)


def as_profile(rows: Sequence[AnyProfiled]) -> Profile:
    """A profile of rows of routes and cascades, in any order."""
    routes = tuple(row for row in rows if isinstance(row, ProfiledRoute))
    return Profile(routes, cascades=tuple(row for row in rows if isinstance(row, ProfiledCascade)))
