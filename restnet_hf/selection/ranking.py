"""Which routes are worth it: matrices over pairs of cuts, ranked under a budget and spread over the range of costs."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from restnet_hf.routes.profile import Budget
from restnet_hf.routes.route import Route, Segment


@dataclass(frozen=True)
class Similarity:
    """What a selector says of every cut of ``front`` (rows, cut 1 first) and every cut of ``end`` (columns).

    Args:
        front: name of the anchor whose activation comes in.
        end: name of the anchor whose activation at that cut a stitch would replace.
        values: the higher the better; masked where a value is not defined (a constant feature, say).
        settings: how they were computed, and from how many images.
    """

    front: str
    end: str
    values: np.ma.MaskedArray
    settings: Mapping[str, Any]

    def value(self, route: Route) -> float | None:
        """The value of a route of one stitch between these anchors; None for any other, or where it is not defined."""
        points = [p for p in route.stitch_points if (p.source, p.target) == (self.front, self.end)]
        if len(points) != 1 or len(route.segments) != 2:
            return None
        found = self.values[points[0].source_cut - 1, points[0].target_cut - 1]
        return None if found is np.ma.masked else float(found)


@dataclass(frozen=True)
class RankedRoute:
    """A route with its score, its costs, and whether a cheaper route has a score as high."""

    route: Route
    score: float
    costs: Mapping[str, float] = field(default_factory=dict)
    dominated: bool = False


def rank_routes(
    similarities: Iterable[Similarity],
    costs: Callable[[Route], Mapping[str, float]] | None = None,
    budget: Budget | None = None,
) -> list[RankedRoute]:
    """Every route of one stitch, the best score first; of equals, the cheaper in MACs.

    Args:
        similarities: by one selector, one for each direction that is considered.
        costs: of a route.
        budget: routes over it are left out.

    Raises:
        ValueError: no score is defined, or no route fits the budget.
    """
    found = []
    for similarity in similarities:
        for (i, j), value in np.ndenumerate(similarity.values.filled(np.nan)):
            if np.isfinite(value):
                route = Route((Segment(similarity.front, 0, i + 1), Segment(similarity.end, j + 1)))
                found.append(RankedRoute(route, float(value), costs(route) if costs is not None else {}))
    if not found:
        raise ValueError("no pair of cuts has a defined score")
    if budget is not None:
        least = min(found, key=lambda row: max(row.costs[cost] / limit for cost, limit in budget.limits.items()))
        found = [row for row in found if all(row.costs[cost] <= limit for cost, limit in budget.limits.items())]
        if not found:
            costs_then = ", ".join(f"{cost}={least.costs[cost]:g}" for cost in budget.limits)
            raise ValueError(f"no stitched route fits {budget}; the cheapest is '{least.route}' with {costs_then}")
    return sorted(_marked(found), key=lambda row: (-row.score, row.costs.get("macs", 0.0)))


def _marked(rows: Sequence[RankedRoute]) -> list[RankedRoute]:
    best, marked = -np.inf, []
    for row in sorted(rows, key=lambda row: (row.costs.get("macs", 0.0), -row.score)):
        marked.append(replace(row, dominated=bool(row.costs) and row.score <= best))
        best = max(best, row.score)
    return marked


def choose_routes(
    ranked: Sequence[RankedRoute], max_routes: int, cost: str = "macs", per_part: int = 1
) -> list[RankedRoute]:
    """The best route of each part of the range of costs, the cheapest first (KLAS, arXiv 2605.29259, buckets).

    Args:
        ranked: from `rank_routes`, with that cost.
        max_routes: into how many parts of equal width the range is divided; parts without a route are left out.
        cost: a key of the costs.
        per_part: how many routes of each part are taken; with more than one, training and a profile decide.

    Raises:
        ValueError: ``max_routes`` or ``per_part`` is below 1.
    """
    if max_routes < 1 or per_part < 1:
        raise ValueError(f"max_routes={max_routes} and per_part={per_part} must be at least 1")
    least, most = (pick(row.costs[cost] for row in ranked) for pick in (min, max))
    best: dict[int, list[RankedRoute]] = {}
    for row in ranked:
        part = int((row.costs[cost] - least) / max(most - least, 1e-9) * max_routes)
        best.setdefault(min(part, max_routes - 1), []).append(row)
    return [row for part in sorted(best) for row in best[part][:per_part]]


def spread(macs: Mapping[Route, float], count: int) -> list[Route]:
    """So many routes, taken in turn from parts of equal width of the range of MACs, the cheapest first.

    Each is the one of its part whose stitches are the least used by those before; of equals, that of fewest stitches.

    Args:
        macs: of the routes to choose from.
        count: of parts, and of routes at most.

    Raises:
        ValueError: it is below 1.
    """
    if count < 1:
        raise ValueError(f"max_routes={count} must be at least 1")
    low, high = min(macs.values(), default=0.0), max(macs.values(), default=0.0)
    parts: dict[int, list[Route]] = {}
    for route in sorted(macs, key=macs.__getitem__):
        share = (macs[route] - low) / (high - low) if high > low else 0.0
        parts.setdefault(min(int(share * count), count - 1), []).append(route)
    names = {route: [point.name for point in route.stitch_points] for route in macs}
    uses: Counter[str] = Counter()
    chosen: list[Route] = []
    while len(chosen) < min(count, len(macs)):
        for left in filter(None, parts.values()):
            if len(chosen) < count:
                new = min(left, key=lambda route: (fmean([uses[n] for n in names[route]] or [0]), len(names[route])))
                left.remove(new)
                chosen.append(new)
                uses.update(names[new])
    return sorted(chosen, key=macs.__getitem__)
