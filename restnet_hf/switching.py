"""The routes of a model: stitches added and removed, one route active, and the steps that each route runs."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from restnet_hf.anchors import Anchor
from restnet_hf.preprocessing import Preprocessing
from restnet_hf.profiles import Budget, BudgetError, Profile
from restnet_hf.routes import Route, Segment, StitchPoint
from restnet_hf.steps import Step
from restnet_hf.stitches import Stitch, StitchConfig, make_stitch


class RouteMixin:
    """What a stitched model does with routes. The model has the attributes named here."""

    config: Any
    anchors: Mapping[str, Anchor]
    converters: MutableMapping[str, nn.Module]
    stitches: MutableMapping[str, Stitch]
    heads: MutableMapping[str, nn.Linear]
    orders: MutableMapping[str, nn.Module]
    active_route: Route
    profiled: Profile | None

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
        return (*(Route((Segment(name),)) for name in self.anchors), *self.routes)

    def route(self, route: Route | str) -> Route:
        """A route of this model from its string form, where cuts may be given by name.

        Raises:
            ValueError: it does not parse, or does not fit the anchors.
        """
        if isinstance(route, str):
            route = Route.parse(route, lambda anchor, cut: self._anchor(anchor).cut_index(cut))
        alone = len(route.segments) == 1  # an anchor alone needs no search for cuts
        return route.check({name: 0 if alone else anchor.depth for name, anchor in self.anchors.items()})

    def _anchor(self, name: str) -> Anchor:
        if name not in self.anchors:
            raise ValueError(f"no anchor named '{name}'; there are {list(self.anchors)}")
        return self.anchors[name]

    def add_stitch(self, route: Route | str, config: StitchConfig | None = None) -> Route:
        """Add a route and, made as ``config`` says, the stitches it still lacks, not fitted yet; returns the route."""
        route = self.route(route)
        for point in route.stitch_points:
            if point.name not in self.stitches:
                source = self.anchors[point.source].layout(point.source_cut)
                target = self.anchors[point.target].layout(point.target_cut)
                self._make_stitch(point, source, target, config or StitchConfig())
        if len(route.segments) > 1 and route not in self.routes:
            self.config.routes = [*self.config.routes, str(route)]
        return route

    def _make_stitch(self, point: StitchPoint, source: Any, target: Any, config: StitchConfig) -> None:
        like = next(self.anchors[point.target].parameters())
        stitch = make_stitch(source, target, config).to(like.device, like.dtype)
        self.stitches[point.name] = stitch
        if point.name not in (self.config.stitches or {}):
            self.config.set_stitch(point, source, target, config)

    def check_layouts(self) -> None:
        """Raise ValueError where a stitch was made for other activations than its anchors have."""
        for name in self.config.stitches or {}:
            point, source, target, _ = self.config.stitch_parts(name)
            for anchor, cut, layout in (
                (point.source, point.source_cut, source),
                (point.target, point.target_cut, target),
            ):
                found = self.anchors[anchor].layout(cut)
                if found != layout:
                    raise ValueError(
                        f"stitch '{name}' was made for {layout} at cut {cut} of '{anchor}', which is {found}"
                    )

    def delete_stitch(self, route: Route | str) -> None:
        """Remove a route and the stitches that no other route needs. The active route cannot be removed."""
        route = self.route(route)
        if route == self.active_route:
            raise ValueError(f"'{route}' is the active route; set another one first")
        if route not in self.routes:
            raise ValueError(f"there is no route '{route}'; the routes are {list(map(str, self.routes))}")
        self.config.routes = [str(other) for other in self.routes if other != route]
        needed = {point.name for other in self.routes for point in other.stitch_points}
        for name in set(self.stitches) - needed:
            del self.stitches[name], self.config.stitches[name]
        if self.profiled is not None:
            kept = tuple(row for row in self.profiled.routes if row.route != route)
            self.profiled = Profile(kept, self.profiled.metadata)

    def set_route(self, route: Route | str) -> Route:
        """Make ``forward`` run that route.

        Raises:
            ValueError: it does not parse, or a stitch of it is missing.
        """
        route = self.route(route)
        self.steps(route)
        self.active_route = route
        self.config.active_route = str(route)
        return route

    def set_budget(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        memory_mb: float | None = None,
        latency_ms: float | None = None,
        score: str = "accuracy",
    ) -> Route:
        """Make ``forward`` run the best route of the profile within limits, and return it.

        Raises:
            BudgetError: nothing fits (the message names the cheapest route), or the model was not profiled.
        """
        budget = Budget(macs=macs, params=params, memory_mb=memory_mb, latency_ms=latency_ms)
        if self.profiled is None:
            raise BudgetError("the costs of the routes are not known yet; call profile() first")
        return self.set_route(self.profiled.best(budget, score).route)

    def steps(self, route: Route | str) -> tuple[Step, ...]:
        """What a route runs, one after the other. Forward, costs, profiles and baking all walk this."""
        route = self.route(route) if isinstance(route, str) else route
        steps: list[Step] = []
        first, last = route.segments[0].anchor, route.segments[-1].anchor
        if first in self.converters:
            image = (1, 3, *self.preprocessing.image_size)
            steps.append(Step(f"images for {first}", self.converters[first], image))
        points = iter(route.stitch_points)
        for segment in route.segments:
            anchor = self.anchors[segment.anchor]
            shape: tuple[int, ...] = (1, 3, *anchor.preprocessing.image_size)
            if segment.start:
                point = next(points)
                if point.name not in self.stitches:
                    raise ValueError(f"route '{route}' has no stitch yet; call add_stitch('{route}') and fit_stitches")
                shape = self.anchors[point.source].layout(point.source_cut).shape(1)
                steps.append(Step(point.name, self.stitches[point.name], shape))
                shape = anchor.layout(segment.start).shape(1)
            steps.append(Step(str(segment), anchor, shape, segment))
        if last in self.heads:
            steps.append(Step(f"head of {last}", self.heads[last], (1, self.heads[last].in_features)))
        elif last in self.orders:
            steps.append(Step(f"labels of {last}", self.orders[last], (1, self.config.num_labels)))
        return tuple(steps)

    def bake(self, route: Route | str | None = None) -> nn.Sequential:
        """The active route (or another) as a plain module with only its own weights: images to logits."""
        steps = self.steps(self.active_route if route is None else route)
        return nn.Sequential(*(step.bake() for step in steps)).eval()
