"""Ranking of routes: similarities of pairs of cuts, ranked within a budget and spread over the range of costs."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from restnet_hf.routes.profile import Budget, describe_cheapest
from restnet_hf.routes.route import Route, Segment


@dataclass(frozen=True)
class Similarity:
    """Values of a selector for every cut of ``front`` (rows, from cut 1) and every cut of ``end`` (columns).

    Args:
        front: name of the anchor whose activation a stitch would take.
        end: name of the anchor whose activation a stitch would replace.
        values: matrix of values, the higher the better; masked where undefined, as for a constant feature.
        settings: method, options and number of images of the values.
    """

    front: str
    end: str
    values: np.ma.MaskedArray
    settings: Mapping[str, Any]

    def value(self, route: Route) -> float | None:
        """The value of a route with one stitch between these anchors; None for other routes, or if it is undefined."""
        points = [p for p in route.stitch_points if (p.source, p.target) == (self.front, self.end)]
        if len(points) != 1 or len(route.segments) != 2:
            return None
        value = self.values[points[0].source_cut - 1, points[0].target_cut - 1]
        return None if value is np.ma.masked else float(value)


@dataclass(frozen=True)
class RankedRoute:
    """A route with its score and costs.

    Args:
        route: route with one stitch.
        score: value of the selector, the higher the better.
        costs: costs of the route by name.
        dominated: whether a cheaper route, or where the selector predicts accuracy an anchor alone, has a score as
            high.
        gain: predicted accuracy above that of the straight line between the anchors at these MACs; None for a
            selector that predicts no accuracy.
    """

    route: Route
    score: float
    costs: Mapping[str, float] = field(default_factory=dict)
    dominated: bool = False
    gain: float | None = None


Points = Sequence[tuple[float, float]]
"""MACs and accuracy of anchors alone."""


def anchor_points(similarities: Iterable[Similarity], macs: Callable[[Route], float]) -> list[tuple[float, float]]:
    """MACs and accuracy of the anchors alone, the cheapest first; none where the values are no accuracies.

    Args:
        similarities: similarities by one selector, whose settings have ``anchors`` where the values are accuracies.
        macs: function that returns the MACs of a route.
    """
    scores = {name: score for each in similarities for name, score in each.settings.get("anchors", {}).items()}
    return sorted((macs(Route.alone(name)), score) for name, score in scores.items())


def line_between(points: Points) -> Callable[[float], float]:
    """The accuracy at any MACs on the straight lines between the anchors that no other anchor beats.

    Args:
        points: MACs and accuracy of each anchor, at least one.
    """
    front = [(macs, score) for macs, score in sorted(points) if not any(m <= macs and s > score for m, s in points)]
    costs, scores = [macs for macs, _ in front], [score for _, score in front]
    return lambda macs: float(np.interp(macs, costs, scores))


def rank_routes(
    similarities: Iterable[Similarity],
    costs: Callable[[Route], Mapping[str, float]] | None = None,
    budget: Budget | None = None,
    anchors: Points = (),
) -> list[RankedRoute]:
    """Rank every route with one stitch, the best score first; of equal scores, the cheaper in MACs.

    Args:
        similarities: similarities by one selector, one for each direction to consider.
        costs: function that returns the costs of a route.
        budget: limits on the costs; routes over them are left out.
        anchors: MACs and accuracy of the anchors alone, where the values are accuracies; see `anchor_points`.

    Raises:
        BudgetError: a cost that is limited is not among the costs.
        ValueError: no score is defined, or no route fits the budget.
    """
    rows = []
    for similarity in similarities:
        for (i, j), value in np.ndenumerate(similarity.values.filled(np.nan)):
            if np.isfinite(value):
                route = Route((Segment(similarity.front, 0, i + 1), Segment(similarity.end, j + 1)))
                rows.append(RankedRoute(route, float(value), costs(route) if costs is not None else {}))
    if not rows:
        raise ValueError("no pair of cuts has a defined score")
    if budget is not None:
        budget.check_costs(rows[0].costs)
        fitting = [row for row in rows if budget.allows(row.costs)]
        if not fitting:
            raise ValueError(f"no stitched route fits {budget}; {describe_cheapest(rows, budget)}")
        rows = fitting
    if anchors:
        line = line_between(anchors)
        rows = [replace(row, gain=row.score - line(row.costs["macs"])) for row in rows]
    return sorted(_mark_dominated(rows, anchors), key=lambda row: (-row.score, row.costs.get("macs", 0.0)))


def _mark_dominated(rows: Sequence[RankedRoute], anchors: Points) -> list[RankedRoute]:
    best, marked = -np.inf, []
    for row in sorted(rows, key=lambda row: (row.costs.get("macs", 0.0), -row.score)):
        beaten = bool(row.costs) and (row.score <= best or _beaten(row, anchors))
        marked.append(replace(row, dominated=beaten))
        best = max(best, row.score)
    return marked


def _beaten(row: RankedRoute, anchors: Points) -> bool:
    """Whether an anchor alone costs as little and scores as high."""
    return any(macs <= row.costs["macs"] and score >= row.score for macs, score in anchors)


def choose_routes(
    ranked: Sequence[RankedRoute], max_routes: int, cost: str = "macs", per_part: int = 1, anchors: Points = ()
) -> list[RankedRoute]:
    """Choose the best routes of each part of the range of costs, the cheapest first (KLAS, arXiv 2605.29259, buckets).

    Where the accuracies of the anchors are known, the best of a part is the one that is furthest above the straight
    line between them (see `RankedRoute`), and routes that an anchor alone beats come last. They stay candidates, since
    training gains what no prediction has.

    Args:
        ranked: routes from `rank_routes` that have the cost.
        max_routes: number of parts of equal width that the range is divided into; parts without a route are left out.
        cost: name of the cost.
        per_part: number of routes to take from each part; with more than one, training and a profile decide.
        anchors: MACs and accuracy of the anchors alone, where the scores are accuracies; see `anchor_points`.

    Raises:
        ValueError: ``max_routes`` or ``per_part`` is below 1.
    """
    return [row for rows in divide_routes(ranked, max_routes, cost, per_part, anchors) for row in rows]


def divide_routes(
    ranked: Sequence[RankedRoute], max_routes: int, cost: str = "macs", per_part: int = 1, anchors: Points = ()
) -> list[list[RankedRoute]]:
    """The best routes of each part of the range of costs, by part; see `choose_routes` for the arguments.

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
    for rows in best.values() if anchors else ():
        rows.sort(key=lambda row: (_beaten(row, anchors), -(row.gain if row.gain is not None else row.score)))
    return [best[part][:per_part] for part in sorted(best)]


def spread(macs: Mapping[Route, float], count: int) -> list[Route]:
    """Choose routes in turn from parts of equal width of the range of MACs; the cheapest is returned first.

    Each is the route of its part whose stitches the chosen ones use least; of equals, the one with fewest stitches.

    Args:
        macs: MACs of the routes to choose from.
        count: number of parts, and largest number of routes.

    Raises:
        ValueError: ``count`` is below 1.
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
