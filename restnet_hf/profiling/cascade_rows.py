"""Rows of a profile for cascades: which routes are combined, and what the cascades cost."""

from collections.abc import Sequence

from restnet_hf.profiling.cascades import (
    MOST_ROUTES,
    Calibrated,
    Observations,
    StageCosts,
    as_cascade,
    calibrate_cascades,
)
from restnet_hf.profiling.costs import CostTable
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import ProfiledCascade
from restnet_hf.routes.route import Route
from restnet_hf.steps import Walk


PERCENTILE = 0.99  # share of the images that take at most ``latency_p99_ms``


def profile_cascades(
    observed: Observations, walks: Sequence[Walk], table: CostTable, score: str
) -> tuple[ProfiledCascade, ...]:
    """Calibrate the cascades of some routes, of each adapter by itself, and compute what they cost.

    Args:
        observed: what each route answers on held-out images.
        walks: the routes with their steps.
        table: table that the routes' costs are from.
        score: name of the score.

    Returns:
        The rows, the cheapest first of each adapter.

    Raises:
        ValueError: there are too few images.
    """
    rows: list[ProfiledCascade] = []
    for adapter in dict.fromkeys(route.adapter for route, _ in walks):
        own = [at for at, (route, _) in enumerate(walks) if fits_adapter(route, adapter)]
        chosen = _most_promising(observed, own, [table.macs(walks[at][1]) for at in own])
        few, kept = observed.select_routes(chosen), [walks[at] for at in chosen]
        macs = StageCosts.of(kept, table.macs)
        times = None if table.latency is None else StageCosts.of(kept, table.latency_ms)
        rows += [_row(each, few, kept, macs, times, table, score) for each in calibrate_cascades(few, macs)]
    return tuple({row.route: row for row in rows}.values())  # those of anchors alone come with every adapter


def fits_adapter(route: Route, adapter: str) -> bool:
    """Whether a route can be in a cascade of an adapter's routes: it is one of them, or an anchor alone."""
    return route.adapter == adapter or (route.is_anchor and not route.adapter)


def _most_promising(observed: Observations, routes: Sequence[int], macs: Sequence[float]) -> list[int]:
    """The routes, by number, that cascades are searched among: of many those that others beat least."""
    scores = [observed.right[at].mean() for at in routes]

    def loss(at: int) -> float:
        return max(scores[other] - scores[at] for other in range(len(macs)) if macs[other] <= macs[at])

    order = sorted(sorted(range(len(macs)), key=loss)[:MOST_ROUTES], key=lambda at: macs[at])
    return [routes[at] for at in order]


def _row(
    found: Calibrated,
    observed: Observations,
    walks: Sequence[Walk],
    macs: StageCosts,
    times: StageCosts | None,
    table: CostTable,
    score: str,
) -> ProfiledCascade:
    cascade, routes = as_cascade(observed, found.chain), found.chain.routes
    assert isinstance(cascade, Cascade)
    costs = {"macs": sum(macs.added_costs(routes)), "mean_macs": found.mean_cost}
    costs |= table.joint_costs([walks[at] for at in routes])
    stage_costs = {"macs": tuple(macs.added_costs(routes))}
    if times is not None:
        stages = times.added_costs(routes)
        stage_costs["latency_ms"] = tuple(stages)
        costs["latency_ms"] = sum(stages)
        costs["mean_latency_ms"] = sum(share * stage for share, stage in zip(found.shares, stages, strict=True))
        reached = max(at for at, share in enumerate(found.shares) if share > 1 - PERCENTILE)
        costs["latency_p99_ms"] = sum(stages[: reached + 1])
        if table.latency is not None and table.latency.watts is not None:
            costs["energy_j"] = table.latency.watts * costs["latency_ms"] / 1e3
    return ProfiledCascade(cascade, costs, {score: found.score}, found.shares, found.standard_error, stage_costs)
