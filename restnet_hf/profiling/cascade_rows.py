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
from restnet_hf.steps import Walk


PERCENTILE = 0.99  # share of the images that take at most ``latency_p99_ms``


def profile_cascades(
    observed: Observations, walks: Sequence[Walk], table: CostTable, score: str
) -> tuple[ProfiledCascade, ...]:
    """Calibrate the cascades of some routes, and compute what they cost.

    Args:
        observed: what each route answers on held-out images.
        walks: the routes with their steps.
        table: table that the routes' costs are from.
        score: name of the score.

    Raises:
        ValueError: there are too few images.
    """
    chosen = _most_promising(observed, [table.macs(steps) for _, steps in walks])
    few, walks = observed.only(chosen), [walks[at] for at in chosen]
    macs = StageCosts.of(walks, table.macs)
    times = None if table.latency is None else StageCosts.of(walks, table.latency_ms)
    return tuple(_row(each, few, walks, macs, times, table, score) for each in calibrate_cascades(few, macs))


def _most_promising(observed: Observations, macs: Sequence[float]) -> list[int]:
    """Numbers of the routes that cascades are searched among: where there are many, those that others beat least."""
    scores = observed.right.mean(1)

    def loss(at: int) -> float:
        return max(scores[other] - scores[at] for other in range(len(macs)) if macs[other] <= macs[at])

    return sorted(sorted(range(len(macs)), key=loss)[:MOST_ROUTES], key=lambda at: macs[at])


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
    costs = {"macs": sum(macs.stages(routes)), "mean_macs": found.mean_cost}
    costs |= table.held([walks[at] for at in routes])
    if times is not None:
        stages = times.stages(routes)
        costs["latency_ms"] = sum(stages)
        costs["mean_latency_ms"] = sum(share * stage for share, stage in zip(found.shares, stages, strict=True))
        reached = max(at for at, share in enumerate(found.shares) if share > 1 - PERCENTILE)
        costs["latency_p99_ms"] = sum(stages[: reached + 1])
    return ProfiledCascade(cascade, costs, {score: found.score}, found.shares, found.standard_error)
