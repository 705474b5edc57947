"""Several adapters on the same anchors: one more beside those that a model has."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from restnet_hf.anchors.config_entry import present
from restnet_hf.anchors.layouts import layout_from_dict
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.hub.adapter_files import PartCheck, Parts
from restnet_hf.routes.profile import Profile, ProfiledRoute
from restnet_hf.routes.route import ANCHOR_NAME, HeadKey, Route, Segment
from restnet_hf.stitches.branches import stitch_that_fits
from restnet_hf.stitches.tuning import Tuned, TunedConfig, tuned_keys, tuned_on_meta


EVERYWHERE = ("macs", "params")  # costs that are the same on every device


def add_adapter(
    model: Any,
    config: RestNetConfig,
    profile: Profile | None,
    weights: Mapping[str, Tensor],
    name: str,
    where: str,
) -> list[Route]:
    """Put the stitches, heads and profile of an adapter beside those of a model: all of it, or nothing.

    Args:
        model: with the anchors that the adapter is for, whatever it calls them.
        config, profile, weights: of the adapter.
        name: for it.
        where: it comes from, for errors.

    Returns:
        The routes that were added.

    Raises:
        ValueError: the adapter is for other anchors, images or classes, or its weights do not fit its config.
    """
    _check_name(name, model.routes)
    if not config.routes:
        raise ValueError(f"{where} has no stitched routes that could be added")
    anchors = _same_anchors(model, config, where)
    _same_task(model.config, config, where)

    def here(route: Route) -> Route:
        segments = tuple(replace(segment, anchor=anchors[segment.anchor]) for segment in route.segments)
        return replace(route, segments=segments, adapter=f"{name}-{route.adapter}" if route.adapter else name)

    routes = [model.route(here(route)) for route in config.parsed_routes()]
    check = Parts(weights, config.part_names(), where).check
    entries, modules = _stitches(model, config, here, routes, check)
    heads = {}
    for key in config.head_keys():
        head = HeadKey.parse(key)
        check(f"heads.{key}", model.heads[anchors[head.anchor]])
        heads[key] = here(Route.alone(head.anchor, head.adapter)).head
        modules[f"heads.{key}"] = heads[key], copy.deepcopy(model.heads[anchors[head.anchor]])
    tuned = _tuned(config, anchors, here)
    for key, (new, about) in tuned.items():
        check(f"tuned.{key}", tuned_on_meta(model.anchors, about))
        modules[f"tuned.{key}"] = new, Tuned(model.anchors[about.anchor], about)
    for key, (_, module) in modules.items():
        module.load_state_dict({k: weights[f"{key}.{k}"] for k in module.state_dict()})
    for key, (new, module) in modules.items():  # from here on nothing can fail
        place: Any = getattr(model, key.split(".")[0])  # stitches, heads or tuned
        place[new] = module.eval()
    mine = model.config
    mine.stitches = {**mine.stitches, **entries}
    mine.tuned = {**mine.tuned, **{new: asdict(about) for new, about in tuned.values()}}
    mine.routes = [*mine.routes, *map(str, routes)]
    trained = {heads[key] for key in config.trained_heads or () if key in heads}
    mine.trained_heads = sorted(trained.union(mine.trained_heads))
    mine.training = [*mine.training, *({**entry, "adapter": name} for entry in config.training or ())]
    renamed = {key: f"{key.split('.')[0]}.{new}" for key, (new, _) in modules.items()}
    model.profiled = _beside(model.profiled, profile, here, renamed)
    return routes


def _stitches(
    model: Any,
    config: RestNetConfig,
    here: Callable[[Route], Route],
    routes: Iterable[Route],
    check: PartCheck,
) -> tuple[dict[str, Any], dict[str, tuple[str, nn.Module]]]:
    """New stitches like an adapter's: entries by name here; by the adapter's key, the name here and the module."""
    entries: dict[str, Any] = {}
    modules: dict[str, tuple[str, nn.Module]] = {}
    for key, entry in (config.stitches or {}).items():
        point, source, target, options = config.stitch_parts(key)
        ends = Segment(point.source, 0, point.source_cut), Segment(point.target, point.target_cut)
        (point,) = here(Route(ends, point.adapter, (point.via,))).stitch_points
        model.check_layout(point, source, target)
        entries[point.name] = {**entry, "point": asdict(point)}
        made = stitch_that_fits(point, model.anchors, options, partial(check, f"stitches.{key}"))
        modules[f"stitches.{key}"] = point.name, made
    for point in {point for route in routes for point in route.stitch_points if point.via}:
        source, target = (layout_from_dict(entries[point.name][side]) for side in ("source", "target"))
        model.check_layout(point, source, target)
    return entries, modules


def _tuned(
    config: RestNetConfig, anchors: Mapping[str, str], here: Callable[[Route], Route]
) -> dict[str, tuple[str, TunedConfig]]:
    """What an adapter tunes, by its own key: the key here, and of which anchor here."""
    found = {}
    for route in config.parsed_routes():
        pairs = zip(*(map(str, chain.from_iterable(tuned_keys(r))) for r in (route, here(route))), strict=True)
        for key, new in pairs:
            if key in (config.tuned or {}):
                about = config.tuned_config(key)
                found[key] = new, replace(about, anchor=anchors[about.anchor])
    return found


def _check_name(name: str, routes: Iterable[Route]) -> None:
    taken = sorted({route.adapter for route in routes if route.adapter})
    if not ANCHOR_NAME.fullmatch(name) or any(other == name or other.startswith(f"{name}-") for other in taken):
        raise ValueError(f"no adapter can be named {name!r}: take letters, digits, '_' and '-', and none of {taken}")


def _same_anchors(model: Any, config: RestNetConfig, where: str) -> dict[str, str]:
    """What the model calls each of an adapter's anchors."""
    here = [present(*pair) for pair in zip(model.config.anchors, model.anchors.values(), strict=True)]

    def same(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
        return all(mine[key] == theirs[key] for key in ("fingerprint", "granularity"))

    found = {}
    for theirs in config.anchors or []:
        names = [mine["name"] for mine in here if same(mine, theirs)]
        if not names:
            raise ValueError(
                f"{where} is for an anchor '{theirs['name']}' ({theirs['repo_id']}, {theirs['fingerprint']}) that "
                "this model does not have. Load it as a model of its own"
            )
        name = theirs["name"] if theirs["name"] in names else names[0]
        images = next(mine["preprocessing"] for mine in model.config.anchors if mine["name"] == name)
        if Preprocessing.from_dict(theirs["preprocessing"]) != Preprocessing.from_dict(images):
            raise ValueError(
                f"{where} gives '{name}' images prepared by {theirs['preprocessing']}, this model {images}"
            )
        found[theirs["name"]] = name
    return found


def _same_task(mine: RestNetConfig, theirs: RestNetConfig, where: str) -> None:
    """Raise ValueError unless two adapters take the same images and give the same classes."""
    if mine.new_head != theirs.new_head or mine.id2label != theirs.id2label:
        raise ValueError(
            f"{where} has {theirs.num_labels} classes{' and a new head' * theirs.new_head}, this model "
            f"{mine.num_labels}{' and a new head' * mine.new_head}, or they have other names. Load it as a model "
            "of its own"
        )
    taken, given = (Preprocessing.from_dict((c.anchors or [{}])[0]["preprocessing"]) for c in (theirs, mine))
    if taken != given:
        raise ValueError(f"{where} takes images prepared by {taken}, this model by {given}")


def _beside(
    mine: Profile | None, theirs: Profile | None, here: Callable[[Route], Route], renamed: Mapping[str, str]
) -> Profile | None:
    """Both profiles in one, without costs of another device and scores on other images."""
    if mine is None or theirs is None:
        return mine  # half a profile would make set_budget look at half of the routes

    def equal(*keys: str) -> bool:
        return all(mine.metadata.get(key) == theirs.metadata.get(key) for key in keys)

    device, data = equal("device", "machine"), equal("dataset", "images")
    rows = [
        ProfiledRoute(
            here(row.route),
            {cost: value for cost, value in row.costs.items() if device or cost in EVERYWHERE},
            row.scores if data else {},
        )
        for row in theirs.routes
        if len(row.route.segments) > 1 or any(key.startswith("heads.") for key in renamed)
    ]
    hashes = [
        about if isinstance(about, Mapping) else {} for about in (p.metadata.get("weights") for p in (mine, theirs))
    ]
    weights = {**hashes[0], **{new: hashes[1][key] for key, new in renamed.items() if key in hashes[1]}}
    return Profile((*mine.routes, *rows), {**mine.metadata, "weights": weights})
