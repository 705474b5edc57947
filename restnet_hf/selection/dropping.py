"""Stitched routes that another route of the profile beats, and their removal from a model."""

from collections.abc import Mapping
from typing import Any

from restnet_hf.errors import BudgetError
from restnet_hf.routes.fronts import beaten_rows
from restnet_hf.routes.profile import Budget, Profile
from restnet_hf.routes.route import Route


def beaten_routes(profile: Profile, cost: str = "macs", score: str | None = None) -> dict[Route, Route]:
    """Each stitched route that another beats, with the best route that costs no more.

    Rivals are the routes of the same adapter, the anchors alone and the tuned ones among them. A named adapter whose
    profile has no anchors with its own heads is compared with the anchors as they are.

    Args:
        profile: profile whose routes have scores.
        cost: cost to compare, one that a `Budget` can limit.
        score: score to compare; see `Profile.find_score`.

    Raises:
        BudgetError: a route has no such cost, or no route has a score.
        ValueError: budgets have no such cost.
    """
    profile.check_costs({cost: 1.0})
    score = profile.find_score(score)
    if score is None:
        raise BudgetError("the routes have no scores to compare; call profile(data) with labelled images first")
    beaten: dict[Route, Route] = {}
    for adapter in dict.fromkeys(row.route.adapter for row in profile):
        own = [row for row in profile if row.route.adapter == adapter]
        if not any(row.route.is_anchor for row in own):
            own = [*(row for row in profile if row.route == Route.alone(row.route.segments[0].anchor)), *own]
        pairs = beaten_rows(own, cost, score)
        beaten |= {row.route: rival.route for row, rival in pairs if row.route.stitch_points}
    return beaten


def drop_beaten(model: Any, cost: str = "macs", score: str | None = None) -> list[Route]:
    """Remove stitched routes from a model that no cascade of its profile runs; see `SelectionMixin.drop_dominated`.

    Args:
        model: model with a profile.
        cost: name of the cost to compare.
        score: name of the score to compare.
    """
    if model.profiled is None:
        raise BudgetError("the routes are not measured yet; call profile(data) with labelled images first")
    beaten: Mapping[Route, Route] = beaten_routes(model.profiled, cost, score)
    cascades = [row.route for row in model.profiled.cascades]
    cascades += [] if model.active_cascade is None else [model.active_cascade]
    used = {route for cascade in cascades for route in cascade.routes}
    dropped = [route for route in model.routes if route in beaten and route not in used]
    if model.active_route in dropped:
        limit = model.profiled[model.active_route].costs[cost]
        kept = tuple(row for row in model.profiled if row.route not in dropped)
        model.set_route(Profile(kept).best(Budget(**{cost: limit}), score).route)
    model._delete(dropped)
    return dropped
