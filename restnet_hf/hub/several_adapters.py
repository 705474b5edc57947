"""Several adapters on the same anchors: add one more to a model."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from restnet_hf.anchors.config_entry import current_entry
from restnet_hf.anchors.layouts import layout_from_dict
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.hub.adapter_files import PartCheck, Parts
from restnet_hf.routes.profile import RUNTIME_KEYS, Profile, ProfiledRoute
from restnet_hf.routes.route import ANCHOR_NAME, HeadKey, Route, Segment
from restnet_hf.stitches.branches import stitch_that_fits
from restnet_hf.stitches.precision import match_stored_types
from restnet_hf.stitches.tuning import Tuned, TunedConfig, tuned_keys, tuned_on_meta


COSTS_OF_ANY_DEVICE = ("macs", "params")


def add_adapter(
    model: Any,
    config: RestNetConfig,
    profile: Profile | None,
    weights: Mapping[str, Tensor],
    name: str,
    where: str,
) -> list[Route]:
    """Add the stitches, heads and profile of an adapter to a model: all of it, or nothing.

    Args:
        model: model with the anchors that the adapter is for, under any names.
        config: config of the adapter.
        profile: profile of the adapter; None if it has none.
        weights: tensors of the adapter by name.
        name: name to give the adapter in the model.
        where: folder or Hub id of the adapter, for errors.

    Returns:
        The routes that were added.

    Raises:
        ValueError: the adapter is for other anchors, images or classes, or its weights do not fit its config.
    """
    _check_name(name, model.routes)
    if not config.routes:
        raise ValueError(f"{where} has no stitched routes that could be added")
    anchors = _match_anchors(model, config, where)
    _check_task(model.config, config, where)

    def rename(route: Route) -> Route:
        segments = tuple(replace(segment, anchor=anchors[segment.anchor]) for segment in route.segments)
        return replace(route, segments=segments, adapter=f"{name}-{route.adapter}" if route.adapter else name)

    routes = [model.route(rename(route)) for route in config.parsed_routes()]
    saved = Parts(weights, config.part_names(), where)
    entries, modules = _make_stitches(model, config, rename, routes, saved.check)
    heads = _make_heads(model, config, anchors, rename, saved.check)
    modules |= {f"heads.{key}": head for key, head in heads.items()}
    tuned = _tuned_configs(config, anchors, rename)
    for key, (new, options) in tuned.items():
        saved.check(f"tuned.{key}", tuned_on_meta(model.anchors, options))
        modules[f"tuned.{key}"] = new, Tuned(model.anchors[options.anchor], options)
    match_stored_types({key: module for key, (_, module) in modules.items()}, saved.weights, model.dtype)
    for key, (_, module) in modules.items():
        module.load_state_dict({k: saved.weights[f"{key}.{k}"] for k in module.state_dict()})
    for key, (new, module) in modules.items():  # from here on nothing can fail
        parts: Any = getattr(model, key.split(".")[0])  # stitches, heads or tuned
        parts[new] = module.eval()
    model.config.stitches = {**model.config.stitches, **entries}
    model.config.tuned = {**model.config.tuned, **{new: asdict(options) for new, options in tuned.values()}}
    model.config.routes = [*model.config.routes, *map(str, routes)]
    trained = {heads[key][0] for key in config.trained_heads or () if key in heads}
    _record_training(model.config, config, trained, name)
    renamed = {key: f"{key.split('.')[0]}.{new}" for key, (new, _) in modules.items()}
    model.profiled = _merge_profiles(model.profiled, profile, rename, renamed)
    return routes


def _record_training(target: RestNetConfig, source: RestNetConfig, trained_heads: set[str], name: str) -> None:
    """Add to a model's config which heads of a named adapter were trained, and how."""
    target.trained_heads = sorted(trained_heads.union(target.trained_heads or ()))
    target.training = [*(target.training or ()), *({**entry, "adapter": name} for entry in source.training or ())]


def _make_heads(
    model: Any,
    config: RestNetConfig,
    anchors: Mapping[str, str],
    rename: Callable[[Route], Route],
    check: PartCheck,
) -> dict[str, tuple[str, nn.Module]]:
    """Make the new heads of an adapter; by its own key the key in the model and the module."""
    heads = {}
    for text in config.head_keys():
        key = HeadKey.parse(text)
        module = model.heads[anchors[key.anchor]]
        check(f"heads.{text}", module)
        heads[text] = rename(Route.alone(key.anchor, key.adapter, key.tuned)).head, copy.deepcopy(module)
    return heads


def _make_stitches(
    model: Any,
    config: RestNetConfig,
    rename: Callable[[Route], Route],
    routes: Iterable[Route],
    check: PartCheck,
) -> tuple[dict[str, Any], dict[str, tuple[str, nn.Module]]]:
    """Make the stitches of an adapter; returns config entries by new name, and by old key new name and module."""
    entries: dict[str, Any] = {}
    modules: dict[str, tuple[str, nn.Module]] = {}
    for key, entry in (config.stitches or {}).items():
        point, source, target, options = config.stitch_parts(key)
        ends = Segment(point.source, 0, point.source_cut), Segment(point.target, point.target_cut)
        (point,) = rename(Route(ends, point.adapter, (point.via,))).stitch_points
        model.check_layout(point, source, target)
        entries[point.name] = {**entry, "point": asdict(point)}
        stitch = stitch_that_fits(point, model.anchors, options, partial(check, f"stitches.{key}"))
        modules[f"stitches.{key}"] = point.name, stitch
    for point in {point for route in routes for point in route.stitch_points if point.via}:
        source, target = (layout_from_dict(entries[point.name][side]) for side in ("source", "target"))
        model.check_layout(point, source, target)
    return entries, modules


def _tuned_configs(
    config: RestNetConfig, anchors: Mapping[str, str], rename: Callable[[Route], Route]
) -> dict[str, tuple[str, TunedConfig]]:
    """The tuned tensors of an adapter; by its own key the key in the model and the config with the new anchor name."""
    tuned = {}
    for route in config.parsed_routes():
        keys, new_keys = (map(str, chain.from_iterable(tuned_keys(r))) for r in (route, rename(route)))
        for key, new in zip(keys, new_keys, strict=True):
            if key in (config.tuned or {}):
                options = config.tuned_config(key)
                tuned[key] = new, replace(options, anchor=anchors[options.anchor])
    return tuned


def remaining_training(stages: Iterable[Mapping[str, Any]], adapters: Iterable[str]) -> list[Mapping[str, Any]]:
    """The entries of config.json on training, without those of adapters that are not there any more.

    Args:
        stages: entries on how stitches and heads were fitted and trained.
        adapters: names of the remaining adapters; ``night-b`` was loaded with ``night``.
    """
    prefixes = [f"{adapter}-" for adapter in adapters]
    return [
        stage
        for stage in stages
        if "adapter" not in stage or any(prefix.startswith(f"{stage['adapter']}-") for prefix in prefixes)
    ]


def _check_name(name: str, routes: Iterable[Route]) -> None:
    """Raise ValueError unless a name is free and valid for an adapter."""
    taken = sorted({route.adapter for route in routes if route.adapter})
    if not ANCHOR_NAME.fullmatch(name) or any(other == name or other.startswith(f"{name}-") for other in taken):
        raise ValueError(f"no adapter can be named {name!r}: take letters, digits, '_' and '-', and none of {taken}")


def _match_anchors(model: Any, config: RestNetConfig, where: str) -> dict[str, str]:
    """The name in the model of each of an adapter's anchors; raises ValueError if one is not there."""
    own = [current_entry(*pair) for pair in zip(model.config.anchors, model.anchors.values(), strict=True)]
    names = {}
    for entry in config.anchors or []:
        keys = ("fingerprint", "granularity")
        equal = [each["name"] for each in own if all(each[key] == entry[key] for key in keys)]
        if not equal:
            raise ValueError(
                f"{where} is for an anchor '{entry['name']}' ({entry['repo_id']}, {entry['fingerprint']}) that "
                "this model does not have. Load it as a model of its own"
            )
        name = entry["name"] if entry["name"] in equal else equal[0]
        images = next(each["preprocessing"] for each in model.config.anchors if each["name"] == name)
        if Preprocessing.from_dict(entry["preprocessing"]) != Preprocessing.from_dict(images):
            raise ValueError(
                f"{where} gives '{name}' images prepared by {entry['preprocessing']}, this model {images}"
            )
        names[entry["name"]] = name
    return names


def _check_task(own: RestNetConfig, other: RestNetConfig, where: str) -> None:
    """Raise ValueError unless two adapters take the same images and give the same classes."""
    if own.new_head != other.new_head or own.id2label != other.id2label:
        raise ValueError(
            f"{where} has {other.num_labels} classes{' and a new head' * other.new_head}, this model "
            f"{own.num_labels}{' and a new head' * own.new_head}, or they have other names. Load it as a model "
            "of its own"
        )
    taken, wanted = (Preprocessing.from_dict((c.anchors or [{}])[0]["preprocessing"]) for c in (other, own))
    if taken != wanted:
        raise ValueError(f"{where} takes images prepared by {taken}, this model by {wanted}")


def _latency_place(profile: Profile) -> list[Any]:
    """What the latencies of a profile were measured on."""
    latency = profile.metadata.get("latency")
    return [latency.get(key) for key in RUNTIME_KEYS] if isinstance(latency, Mapping) else []


def _merge_profiles(
    own: Profile | None, other: Profile | None, rename: Callable[[Route], Route], renamed: Mapping[str, str]
) -> Profile | None:
    """One profile of both adapters' routes, without costs on another device and scores on other images.

    Cascades of the other adapter are left out: its anchors alone, which most of them begin with, may be the model's.
    """
    if own is None or other is None:
        return own  # with half a profile set_budget would consider half of the routes

    def equal(*keys: str) -> bool:
        return all(own.metadata.get(key) == other.metadata.get(key) for key in keys)

    device = equal("device", "machine") and _latency_place(own) == _latency_place(other)
    data = equal("dataset", "images")
    rows = [
        ProfiledRoute(
            rename(row.route),
            {cost: value for cost, value in row.costs.items() if device or cost in COSTS_OF_ANY_DEVICE},
            row.scores if data else {},
        )
        for row in other.routes
        if not row.route.is_anchor or any(key.startswith("heads.") for key in renamed)
    ]
    hashes = [
        weights if isinstance(weights, Mapping) else {}
        for weights in (p.metadata.get("weights") for p in (own, other))
    ]
    weights = {**hashes[0], **{new: hashes[1][key] for key, new in renamed.items() if key in hashes[1]}}
    rows = [row.with_means() for row in rows] if own.cascades else rows
    return replace(own, routes=(*own.routes, *rows), metadata={**own.metadata, "weights": weights})
