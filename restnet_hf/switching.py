"""The routes of a model: stitches added and removed, one route active, and the steps that each route runs."""

import copy
import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from restnet_hf.anchors import Anchor
from restnet_hf.branches import stitch_at
from restnet_hf.features import AnyLayout
from restnet_hf.fingerprints import weights_sha256
from restnet_hf.paging import WeightFiles, hold
from restnet_hf.parents import identify, present
from restnet_hf.preprocessing import Preprocessing
from restnet_hf.profiles import Budget, BudgetError, Profile
from restnet_hf.routes import Route, Segment, StitchPoint, of_adapter
from restnet_hf.steps import Step
from restnet_hf.stitches import Stitch, StitchConfig
from restnet_hf.tuning import Tuned, TunedConfig, tuned_keys


class RouteMixin:
    """What a stitched model does with routes. The model has the attributes named here."""

    config: Any
    anchors: Mapping[str, Anchor]
    converters: MutableMapping[str, nn.Module]
    stitches: MutableMapping[str, Stitch]
    heads: MutableMapping[str, nn.Linear]
    tuned: MutableMapping[str, Tuned]
    orders: MutableMapping[str, nn.Module]
    active_route: Route
    profiled: Profile | None
    weight_files: WeightFiles | None

    @property
    def preprocessing(self) -> Preprocessing:
        """How ``pixel_values`` must be prepared: as the front anchor wants them."""
        return next(iter(self.anchors.values())).preprocessing

    @property
    def image_processor(self) -> Any:
        """The front anchor's image processor, None where it has none."""
        return next(iter(self.anchors.values())).processor

    def images_for(self, anchor: str, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in the model's preprocessing as one of its anchors wants them."""
        return self.converters[anchor](images) if anchor in self.converters else images

    @property
    def routes(self) -> tuple[Route, ...]:
        """The stitched routes."""
        return self.config.parsed_routes()

    @property
    def all_routes(self) -> tuple[Route, ...]:
        """Every anchor alone, then the stitched routes."""
        alone = [Route((Segment(name),)) for name in self.anchors]
        adapters = sorted({route.adapter for route in self.routes if route.adapter}) if self.heads else []
        return (*alone, *(replace(route, adapter=name) for name in adapters for route in alone), *self.routes)

    def route(self, route: Route | str) -> Route:
        """A route of this model from its string form, where cuts may be given by name.

        Raises:
            ValueError: it does not parse, or does not fit the anchors.
        """
        if isinstance(route, str):
            route = Route.parse(route, lambda anchor, cut: self._anchor(anchor).cut_index(cut))
        alone = len(route.segments) == 1  # an anchor alone needs no search for cuts
        if alone and route.adapter and route.head not in self.heads:
            raise ValueError(f"route '{route}': the anchor alone has no head of an adapter '{route.adapter}'")
        return route.check({name: 0 if alone else anchor.depth for name, anchor in self.anchors.items()})

    def _anchor(self, name: str) -> Anchor:
        if name not in self.anchors:
            raise ValueError(f"no anchor named '{name}'; there are {list(self.anchors)}")
        return self.anchors[name]

    def add_stitch(self, route: Route | str, config: StitchConfig | None = None) -> Route:
        """Add a route and, made as ``config`` says, the stitches it still lacks, not fitted yet; returns the route.

        A route with an adapter's name in front, ``night: a[:1] + b[2:]``, gets stitches of its own and, where the
        model has new heads, a copy of the head. Stitches with names of their own, ``a[:1] +both b[2:]``, are shared.

        Raises:
            ValueError: the route does not fit the anchors, or a stitch cannot be made or shared there.
        """
        return self.add_stitches([route], config)[0]

    def add_stitches(self, routes: Iterable[Route | str], config: StitchConfig | None = None) -> list[Route]:
        """Add many routes at once; see `add_stitch`. Anchors alone among them need nothing."""
        added = dict.fromkeys(map(self.route, routes))
        made: dict[str, tuple[StitchPoint, Stitch]] = {}
        for point in dict.fromkeys(point for route in added for point in route.stitch_points):
            if point.name in self.stitches:
                self.check_layout(point, *self.config.stitch_parts(point.name)[1:3])
            elif point.name in made:
                first = made[point.name][0]
                source, target = self.anchors[first.source], self.anchors[first.target]
                self.check_layout(point, source.layout(first.source_cut), target.layout(first.target_cut))
            else:
                made[point.name] = point, stitch_at(point, self.anchors, config or StitchConfig())
        for name, (point, stitch) in made.items():  # from here on nothing can fail
            self.stitches[name] = stitch
            source, target = self.anchors[point.source], self.anchors[point.target]
            layouts = source.layout(point.source_cut), target.layout(point.target_cut)
            self.config.set_stitch(point, *layouts, config or StitchConfig())
        listed = dict.fromkeys(self.routes)
        listed |= dict.fromkeys(route for route in added if len(route.segments) > 1)
        self.config.routes = list(map(str, listed))
        for route in added if self.heads else ():
            for name in self.anchors:
                if of_adapter(route.adapter, name) not in self.heads:
                    self.heads[of_adapter(route.adapter, name)] = copy.deepcopy(self.heads[name])
        return list(added)

    def add_tuned(self, key: str, config: TunedConfig) -> Tuned:
        """Put tensors in the place of an anchor's own, equal to them at first, for the routes that use that key.

        Args:
            key: from `tuned_keys`.
            config: what is tuned.
        """
        self.tuned[key] = Tuned(self._anchor(config.anchor), config)
        self.config.tuned = {**self.config.tuned, key: asdict(config)}
        return self.tuned[key]

    def check_layouts(self) -> None:
        """Raise ValueError where a stitch was made for other activations than its anchors have."""
        parts = {name: self.config.stitch_parts(name)[:3] for name in self.config.stitches or {}}
        places = {(point.name, point): None for point, *_ in parts.values()}
        places |= {(point.name, point): None for route in self.routes for point in route.stitch_points if point.via}
        for name, point in places:
            self.check_layout(point, *parts[name][1:])

    def check_layout(self, point: StitchPoint, source: AnyLayout, target: AnyLayout) -> None:
        """Raise ValueError where the activations at a stitch are not of those layouts."""
        for anchor, cut, layout in (
            (point.source, point.source_cut, source),
            (point.target, point.target_cut, target),
        ):
            found = self.anchors[anchor].layout(cut)
            if found != layout:
                raise ValueError(
                    f"stitch '{point.name}' was made for {layout} at cut {cut} of '{anchor}', which is {found}"
                )

    def delete_stitch(self, route: Route | str) -> None:
        """Remove a route, or all routes of a named adapter, and the stitches and heads that no other route needs.

        Args:
            route: a route, or the name that `load_stitch` gave an adapter.

        Raises:
            ValueError: there is no such route, or it is active.
        """
        routes = self.routes
        gone = [r for r in routes if r.adapter == route] if route else []
        self._delete(gone or [self.route(route)])

    def _delete(self, routes: Iterable[Route]) -> None:
        """Remove routes at once; see `delete_stitch`."""
        gone, known = dict.fromkeys(routes), dict.fromkeys(self.routes)
        for each in gone:
            if each not in known:
                raise ValueError(f"there is no route '{each}'; the routes are {list(map(str, known))}")
        left = [other for other in known if other not in gone]
        needed = {point.name for other in left for point in other.stitch_points}
        adapters = {"", *(other.adapter for other in left)}
        active = self.active_route
        if active in gone or active.adapter not in adapters or {p.name for p in active.stitch_points} - needed:
            raise ValueError(f"'{active}' is the active route; set another one first")
        self.config.routes = list(map(str, left))
        for name in set(self.stitches) - needed:
            del self.stitches[name], self.config.stitches[name]
        for key in set(self.tuned) - {key for other in left for keys in tuned_keys(other) for key in keys}:
            del self.tuned[key], self.config.tuned[key]
        for name in set(self.heads) - {of_adapter(adapter, anchor) for adapter in adapters for anchor in self.anchors}:
            del self.heads[name]
        self.config.trained_heads = [name for name in self.config.trained_heads if name in self.heads]
        self.config.training = [
            e for e in self.config.training if "adapter" not in e or _is_left(e["adapter"], adapters)
        ]
        if self.profiled is not None:
            rows = self.profiled.routes
            kept = tuple(row for row in rows if row.route not in gone and row.route.adapter in adapters)
            self.profiled = Profile(kept, self.profiled.metadata)

    def weights_sha256(self, entries: Sequence[Mapping[str, Any]] | None = None) -> dict[str, str]:
        """SHA-256 of the weights of each stitch and new head, of all that is tuned, and of anchors that changed.

        Args:
            entries: what config.json is to say of the anchors, where that is known.
        """
        parts: dict[str, nn.Module] = {f"stitches.{name}": stitch for name, stitch in self.stitches.items()}
        parts |= {f"heads.{name}": head for name, head in self.heads.items()}
        parts |= {f"tuned.{name}": tuned for name, tuned in self.tuned.items()}
        hashes = {key: weights_sha256(part.state_dict()) for key, part in parts.items()}
        if entries is None:
            pairs = zip(self.config.anchors, self.anchors.values(), strict=True)
            entries = [present(*pair) for pair in pairs if pair[0]["fingerprint"] is not None or pair[1].changed()]
        hashes |= {f"anchors.{entry['name']}": entry["fingerprint"] for entry in entries if entry.get("changed")}
        return hashes

    def sound_profile(self, entries: Sequence[Mapping[str, Any]] | None = None) -> Profile | None:
        """The profile without the scores of routes whose stitches, heads or anchors have changed since.

        Args:
            entries: as of `weights_sha256`.
        """
        if self.profiled is None:
            return None
        then, now = self.profiled.metadata.get("weights"), self.weights_sha256(entries)
        if not isinstance(then, Mapping):
            return self.profiled
        changed = {key for key in {*now, *then} if then.get(key) != now.get(key)}

        def uses(route: Route) -> set[str]:
            tuned = {f"tuned.{key}" for keys in tuned_keys(route) for key in keys}
            anchors = {f"anchors.{segment.anchor}" for segment in route.segments}
            stitches = {f"stitches.{point.name}" for point in route.stitch_points}
            return {f"heads.{route.head}"} | anchors | stitches | tuned

        rows = [replace(row, scores={}) if uses(row.route) & changed else row for row in self.profiled.routes]
        about = {**self.profiled.metadata, "weights": now}
        if changed and "runtimes" in about:  # what was exported was of other weights
            del about["runtimes"]
        return Profile(tuple(rows), about)

    def set_route(self, route: Route | str) -> Route:
        """Make ``forward`` run that route.

        Raises:
            ValueError: it does not parse, or a stitch of it is missing.
        """
        route = self.route(route)
        steps = self.steps(route)
        if self.weight_files is not None:
            self.weight_files.bring(self.anchors, steps)
        self.active_route = route
        self.config.active_route = str(route)
        return route

    def prune_to(self, routes: Iterable[Route | str]) -> None:
        """Keep only some routes, and of the anchors only the weights that these use. The first becomes active.

        Where weights lie in files, after `page_to`, only those of the active route are in memory anyway. The adapter
        that the model saves then has these routes alone, and loads as any other.

        Raises:
            ValueError: there are no routes, or one is not of this model.
        """
        kept = [self.route(route) for route in routes]
        if not kept:
            raise ValueError("prune_to needs at least one route to keep")
        steps = [step for route in kept for step in self.steps(route)]
        self.set_route(kept[0])
        self._delete(route for route in self.routes if route not in set(kept))
        for entry, anchor in zip(self.config.anchors, self.anchors.values(), strict=True):
            identify(entry, anchor)  # while all of it is there
        for anchor in self.anchors.values() if self.weight_files is None else ():
            hold(anchor, steps)

    def page_to(self, folder: str | os.PathLike[str]) -> None:
        """Keep the anchors' weights in files, and in memory only those that the active route uses.

        From now on `set_route` and `set_budget` read what the new route needs and the one before did not, mapped into
        memory, and let go of the rest. Other routes cannot run meanwhile: `profile` first.

        Args:
            folder: for a file of each anchor.

        Raises:
            OSError: a file cannot be written.
            ValueError: weights are not in memory, after `prune_to` say.
        """
        for entry, anchor in zip(self.config.anchors, self.anchors.values(), strict=True):
            identify(entry, anchor)
        self.weight_files = WeightFiles(folder, self.anchors)
        self.weight_files.bring(self.anchors, self.steps(self.active_route))

    def set_budget(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        memory_mb: float | None = None,
        latency_ms: float | None = None,
        energy_j: float | None = None,
        score: str = "accuracy",
    ) -> Route:
        """Make ``forward`` run the best route of the profile within limits, and return it.

        Raises:
            BudgetError: nothing fits (the message names the cheapest route), or the model was not profiled.
        """
        budget = Budget(macs=macs, params=params, memory_mb=memory_mb, latency_ms=latency_ms, energy_j=energy_j)
        if self.profiled is None:
            raise BudgetError("the costs of the routes are not known yet; call profile() first")
        return self.set_route(self.profiled.best(budget, score).route)

    def steps(self, route: Route | str, stitches: Mapping[str, nn.Module] | None = None) -> tuple[Step, ...]:
        """What a route runs, one after the other. Forward, costs, profiles and baking all walk this.

        Args:
            route: of this model.
            stitches: instead of the model's own, by name.
        """
        route = self.route(route) if isinstance(route, str) else route
        stitches = self.stitches if stitches is None else stitches
        steps: list[Step] = []
        first, last = route.segments[0].anchor, route.segments[-1].anchor
        if first in self.converters:
            image = (1, 3, *self.preprocessing.image_size)
            steps.append(Step(f"images for {first}", self.converters[first], image))
        points = iter(route.stitch_points)
        for segment, keys in zip(route.segments, tuned_keys(route), strict=True):
            anchor = self.anchors[segment.anchor]
            keys = [key for key in keys if key in self.tuned]
            name = f"{segment} with {', '.join(keys)}" if keys else str(segment)
            shape: tuple[int, ...] = (1, 3, *anchor.preprocessing.image_size)
            if segment.start:
                point = next(points)
                if point.name not in stitches:
                    raise ValueError(f"route '{route}' has no stitch yet; call add_stitch('{route}') and fit_stitches")
                shape = self.anchors[point.source].layout(point.source_cut).shape(1)
                steps.append(Step(point.name, stitches[point.name], shape))
                shape = anchor.layout(segment.start).shape(1)
            if segment.start != segment.stop:  # between stitches that follow one another nothing runs
                steps.append(Step(name, anchor, shape, segment, tuple(self.tuned[key] for key in keys)))
        if self.heads:
            if route.head not in self.heads:
                raise ValueError(f"route '{route}' has no head yet; call add_stitch with a route of that adapter")
            head = self.heads[route.head]
            steps.append(Step(f"head of {route.head}", head, (1, head.in_features)))
        elif last in self.orders:
            steps.append(Step(f"labels of {last}", self.orders[last], (1, self.config.num_labels)))
        return tuple(steps)

    def finish(self, anchor: str) -> nn.Module:
        """What turns an anchor's own output into this model's logits: its new head, an order of labels, or nothing."""
        if self.heads:
            return self.heads[anchor]
        return self.orders[anchor] if anchor in self.orders else nn.Identity()

    def bake(self, route: Route | str | None = None) -> nn.Sequential:
        """The active route (or another) as a plain module with only its own weights: images to logits."""
        steps = self.steps(self.active_route if route is None else route)
        return nn.Sequential(*(step.bake() for step in steps)).eval()


def _is_left(name: Any, adapters: Iterable[str]) -> bool:
    """Whether an adapter, or one that came with it under a longer name, is among those."""
    return any(adapter == name or adapter.startswith(f"{name}-") for adapter in adapters)
