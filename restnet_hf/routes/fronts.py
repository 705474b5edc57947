"""Which rows of a profile no other beats, and how much of the gap between the anchors they close. No torch."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.route import Route
from restnet_hf.routes.tables import Row


class RouteRow(Row, Protocol):
    """A row of a profile, with its route or cascade."""

    @property
    def route(self) -> Route | Cascade:
        """The route or cascade."""


AnyRow = TypeVar("AnyRow", bound=RouteRow)


def measured_rows(rows: Iterable[AnyRow], cost: str, score: str | None) -> list[AnyRow]:
    """The rows that have a cost and a score.

    Args:
        rows: rows of a profile.
        cost: name of the cost.
        score: name of the score; None for none, which no row has.
    """
    return [row for row in rows if cost in row.costs and score in row.scores]


def front_rows(rows: Iterable[AnyRow], cost: str, score: str) -> list[AnyRow]:
    """The rows that no other beats in cost and score, the cheapest first.

    Of rows that are equal in both an anchor alone is taken, or the first.

    Args:
        rows: rows that have both.
        cost: name of the cost.
        score: name of the score.
    """
    front: list[AnyRow] = []
    for row in sorted(rows, key=lambda row: (row.costs[cost], -row.scores[score], not row.route.is_anchor)):
        if not front or row.scores[score] > front[-1].scores[score]:
            front.append(row)
    return front


def beaten_rows(rows: Sequence[AnyRow], cost: str, score: str) -> list[tuple[AnyRow, AnyRow]]:
    """The rows that another beats, each with the best one that costs no more; in the order of the rows.

    Args:
        rows: rows of a profile; those without the cost or the score are neither beaten nor rivals.
        cost: name of the cost.
        score: name of the score.
    """
    measured = measured_rows(rows, cost, score)
    front = front_rows(measured, cost, score)
    beaten = (row for row in measured if not any(row is each for each in front))
    return [(row, [rival for rival in front if rival.costs[cost] <= row.costs[cost]][-1]) for row in beaten]


def anchor_ends(rows: Iterable[AnyRow], cost: str, score: str) -> tuple[AnyRow, AnyRow] | None:
    """The cheapest and the most expensive anchor alone; None where fewer than two were measured.

    Args:
        rows: rows of a profile.
        cost: name of the cost.
        score: name of the score, the higher of which counts where anchors cost the same.
    """
    anchors = [row for row in measured_rows(rows, cost, score) if row.route.is_anchor]
    if len(anchors) < 2:
        return None
    cheapest = min(anchors, key=lambda row: (row.costs[cost], -row.scores[score]))
    others = (row for row in anchors if row is not cheapest)
    return cheapest, max(others, key=lambda row: (row.costs[cost], row.scores[score]))


def measure_gap(
    rows: Sequence[AnyRow], cost: str, score: str, stitched_only: bool = False
) -> tuple[float | None, str]:
    """The share of the gap between the anchors that is closed, and why where there is none; see `Profile.gap_closed`.

    Args:
        rows: rows of a profile.
        cost: name of the cost.
        score: name of the score.
        stitched_only: whether only stitched routes and the anchors alone can be chosen.

    Returns:
        The share, or None; and the reason for None, empty where there is a share.
    """
    ends = anchor_ends(rows, cost, score)
    if ends is None:
        return None, f"fewer than two anchors alone have {cost} and {score}"
    (least, low), (most, high) = ((row.costs[cost], row.scores[score]) for row in ends)
    names = [f"'{row.route}' ({100 * row.scores[score]:.1f} % {score})" for row in ends]
    if not high > low:
        return None, f"the most expensive anchor {names[1]} is no better than the cheapest, {names[0]}"
    if not most > least:
        return None, f"the anchors {names[0]} and {names[1]} have the same {cost}"
    best, budgets = low, [(least, low)]
    chosen = (row for row in rows if not stitched_only or _is_stitched(row.route) or row.route.is_anchor)
    for row in front_rows(measured_rows(chosen, cost, score), cost, score):
        best = max(best, row.scores[score])
        budgets.append((min(max(row.costs[cost], least), most), best))
    steps = pairwise([*budgets, (most, best)])
    share = sum((after - before) / (most - least) * (at - low) / (high - low) for (before, at), (after, _) in steps)
    return (share, "") if math.isfinite(share) else (None, f"{cost} or {score} are out of range")


def _is_stitched(route: Route | Cascade) -> bool:
    return isinstance(route, Route) and bool(route.stitch_points)


def describe_gap(rows: Sequence[AnyRow], cost: str, score: str) -> str:
    """A line on the gap closed, for tables and cards; empty where there are fewer than two anchors.

    Args:
        rows: rows of a profile.
        cost: name of the cost.
        score: name of the score.
    """
    if anchor_ends(rows, cost, score) is None:
        return ""
    (share, reason), (stitched, _) = (measure_gap(rows, cost, score, only) for only in (False, True))
    if share is None or stitched is None:
        return f"gap closed: not defined, since {reason}"
    alone = f" ({stitched:.2f} by stitched routes alone)" if f"{stitched:.2f}" != f"{share:.2f}" else ""
    mean = " over mean MACs" if cost == "mean_macs" else ""
    return f"gap closed{mean}: {share:.2f}{alone}"
