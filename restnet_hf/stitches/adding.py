"""Add stitches to a model, and remember which of them were neither fitted nor trained yet."""

import copy
from collections.abc import Container, Iterable
from typing import Any

from transformers.utils import logging

from restnet_hf.routes.route import HeadKey, Route, StitchPoint
from restnet_hf.stitches.branches import stitch_at
from restnet_hf.stitches.layers import Stitch, StitchConfig


logger = logging.get_logger(__name__)


def add_stitches(
    model: Any, routes: Iterable[Route], config: StitchConfig | None, default: StitchConfig | None = None
) -> list[Route]:
    """Add routes to a model, with the stitches and copies of heads that they lack.

    Args:
        model: stitched model; it does not change where an error is raised.
        routes: routes of the model's anchors.
        config: options of new stitches; None for ``default``, and for any that existing stitches have.
        default: options of new stitches where none are given; those of `StitchConfig` by default.

    Returns:
        The routes, each once.

    Raises:
        ValueError: a stitch cannot be made or shared there, or a route's stitches all exist, with other options.
    """
    added, options = dict.fromkeys(routes), config or default or StitchConfig()
    new: dict[str, tuple[StitchPoint, Stitch]] = {}
    for point in dict.fromkeys(point for route in added for point in route.stitch_points):
        if point.name in model.stitches:
            model.check_layout(point, *model.config.stitch_parts(point.name)[1:3])
        elif point.name in new:
            first = new[point.name][0]
            source, target = model.anchors[first.source], model.anchors[first.target]
            model.check_layout(point, source.layout(first.source_cut), target.layout(first.target_cut))
        else:
            new[point.name] = point, stitch_at(point, model.anchors, options)
    if config is not None:
        _check_options(model, added, config, new)
    for name, (point, stitch) in new.items():  # from here on nothing can fail
        model.stitches[name] = stitch
        source, target = model.anchors[point.source], model.anchors[point.target]
        layouts = source.layout(point.source_cut), target.layout(point.target_cut)
        model.config.set_stitch(point, *layouts, options)
        if stitch.problems():  # a copy of a block needs no fit
            model.unfitted.add(name)
    listed = dict.fromkeys((*model.routes, *(route for route in added if not route.is_anchor)))
    model.config.routes = list(map(str, listed))
    for route in added if model.heads else ():
        _copy_heads(model, route)
    return list(added)


def _check_options(model: Any, routes: Iterable[Route], config: StitchConfig, new: Container[str]) -> None:
    """Raise ValueError if a route needs no new stitch, so that its options would be ignored, and has other ones."""
    for route in routes:
        names = [point.name for point in route.stitch_points]
        existing = {} if any(name in new for name in names) else {n: model.config.stitch_parts(n)[3] for n in names}
        others = {name: options for name, options in existing.items() if options != config}
        if others:
            raise ValueError(
                f"the stitches of '{route}' exist with {others}, not {config}; delete_stitch removes the route and "
                "its stitches, and a name makes another one beside it, as in 'a[:1] +second b[2:]'"
            )


def _copy_heads(model: Any, route: Route) -> None:
    """Give a route's adapter copies of all new heads, and a tuned anchor one of its own, unless they have them."""
    wanted = {str(HeadKey(name, route.adapter)): name for name in model.anchors}
    if route.tuned:
        wanted[route.head] = str(HeadKey(route.segments[0].anchor, route.adapter))
    for key, name in wanted.items():
        if key not in model.heads:
            model.heads[key] = copy.deepcopy(model.heads[name])
            if name in model.config.trained_heads:
                model.config.trained_heads = sorted({*model.config.trained_heads, key})


def warn_unfitted(model: Any, routes: Iterable[Route]) -> None:
    """Warn once of each stitch of some routes whose weights are random still.

    A stitch counts as fitted after `fit_stitches`, `train`, a forward pass with gradients in training mode, or
    ``load_state_dict`` of the model.

    Args:
        model: stitched model with the names of such stitches in ``unfitted``.
        routes: routes that run, are profiled or saved.
    """
    names = sorted({point.name for route in routes for point in route.stitch_points} & model.unfitted)
    if names:
        model.unfitted.difference_update(names)
        logger.warning(
            f"stitches {names} were neither fitted nor trained, so that their weights are random and their routes "
            "guess; call fit_stitches(images), which needs no labels, or train"
        )
