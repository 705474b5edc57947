"""Rows of a profile for cascades: which routes are combined, and what the cascades cost."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from restnet_hf.profiling.cascades import (
    MOST_ROUTES,
    Calibrated,
    Observations,
    StageCosts,
    as_cascade,
    calibrate_cascades,
)
from restnet_hf.profiling.costs import CostTable
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.device_table import latency_costs, without_times
from restnet_hf.routes.profile import Profile, ProfiledCascade
from restnet_hf.routes.route import Route
from restnet_hf.steps import Step, Walk


def profile_cascades(
    observed: Observations, walks: Sequence[Walk], table: CostTable, score: str, budgets: Sequence[float] = ()
) -> tuple[ProfiledCascade, ...]:
    """Calibrate the cascades of some routes, of each adapter by itself, and compute what they cost.

    Args:
        observed: what each route answers on held-out images.
        walks: the routes with their steps.
        table: table that the routes' costs are from.
        score: name of the score.
        budgets: mean MACs for which the best cascades are wanted beside those of the whole range.

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
        rows += [
            _row(each, few, kept, macs, times, table, score) for each in calibrate_cascades(few, macs, budgets=budgets)
        ]
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
        stage_costs["latency_ms"] = tuple(times.added_costs(routes))
        watts = None if table.latency is None else table.latency.watts
        costs |= latency_costs(stage_costs["latency_ms"], found.shares, watts)
    return ProfiledCascade(cascade, costs, {score: found.score}, found.shares, found.standard_error, stage_costs)


def add_latency(profile: Profile, steps: Callable[[Route], Sequence[Step]], latency: LatencyTable) -> Profile:
    """A profile with the latencies of another device in place of its own, the scores unchanged.

    Args:
        profile: profile of a model.
        steps: function that returns the steps of a route.
        latency: table that ``model.measure_latency`` returned.

    Raises:
        ValueError: a piece of a route was not measured.
    """
    table = CostTable(latency, memory=False)
    rows = [replace(row, costs=without_times(row) | table.costs(steps(row.route))) for row in profile.routes]
    cascades = []
    for row in profile.cascades:
        walks = [(route, steps(route)) for route in row.route.routes]
        stages = tuple(StageCosts.of(walks, table.latency_ms).added_costs(range(len(walks))))
        times = latency_costs(stages, row.shares, latency.watts)
        stage_costs = {**row.stage_costs, "latency_ms": stages}
        cascades.append(replace(row, costs=without_times(row) | times, stage_costs=stage_costs))
    if cascades:
        rows = [row.with_means() for row in rows]
    metadata = {**profile.metadata, "latency": latency.metadata()}
    return Profile(tuple(rows), metadata, tuple(cascades))
