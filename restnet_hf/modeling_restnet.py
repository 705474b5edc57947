"""StitchedModelForImageClassification: frozen anchors, trainable stitches, and routes to switch at run time."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from restnet_hf.anchors.anchor import Anchor, free_name, make_names_unique
from restnet_hf.anchors.attention import change_attention, set_attention
from restnet_hf.anchors.config_entry import add_fingerprint, class_order, describe_model, new_task, rebuild_anchor
from restnet_hf.anchors.layouts import AnyLayout
from restnet_hf.anchors.loading import check_load_options, load_anchor
from restnet_hf.cascading import CascadeOutput
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.data.datasets import check_problem_type
from restnet_hf.data.preprocessing import Preprocessing, Reprocess
from restnet_hf.data.targets import check_targets
from restnet_hf.errors import BudgetError
from restnet_hf.hub.adapter_files import PartCheck, unchecked
from restnet_hf.hub.mixin import AdapterHubMixin
from restnet_hf.hub.paging import WeightFiles, keep_weights
from restnet_hf.hub.peft_names import PeftNamesMixin
from restnet_hf.hub.several_adapters import remaining_training
from restnet_hf.prediction import PredictionMixin
from restnet_hf.profiling.accuracy import score_routes
from restnet_hf.profiling.cascade_rows import profile_cascades
from restnet_hf.profiling.costs import CostTable
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.profiling.mixin import ProfilingMixin
from restnet_hf.profiling.timing import measure_latency
from restnet_hf.routes.cascade import Cascade, is_cascade
from restnet_hf.routes.profile import Budget, BudgetLike, Profile, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import HeadKey, Route, Routes, StitchPoint, TunedKey, each_route
from restnet_hf.selection.mixin import SelectionMixin
from restnet_hf.selection.ranking import RankedRoute, Similarity, spread
from restnet_hf.steps import Reorder, Step, make_steps, run_steps, run_with_states
from restnet_hf.stitches.adding import add_stitches, warn_unfitted
from restnet_hf.stitches.branches import stitch_at, stitch_that_fits
from restnet_hf.stitches.layers import StitchConfig
from restnet_hf.stitches.least_squares import AUTO, fit_routes
from restnet_hf.stitches.precision import accept_type, trained_dtype
from restnet_hf.stitches.tuning import Tuned, TunedConfig, tuned_keys, tuned_on_meta


ORDERS = ("large-to-small", "small-to-large", "given")
# routes and cascades of `using`, by id of the model
ROUTES: ContextVar[Mapping[int, Route | Cascade]] = ContextVar("restnet_hf_routes")


class StitchedModelForImageClassification(
    SelectionMixin, ProfilingMixin, AdapterHubMixin, PredictionMixin, PeftNamesMixin, PreTrainedModel
):
    """One image classifier out of several: the early blocks of one, a stitch, the late blocks of another.

    The anchors are always frozen and in evaluation mode. Stitches train and are saved and, for a new task, new heads.
    Make a model with `from_anchors`, load one with `from_pretrained`.

    Args:
        config: config of the model.
        anchors: anchors, front first; by default they are built from the config, without weights.
        check: function that raises an error if a module does not fit the tensors to be loaded.
    """

    config_class = RestNetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True  # every anchor is checkpointed from cut to cut
    accepts_loss_kwargs = False  # the loss is a mean over the batch
    # set for each anchor that supports it; the others are left alone
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, config: RestNetConfig, anchors: Sequence[Anchor] | None = None, check: PartCheck = unchecked
    ) -> None:
        attention = config._attn_implementation  # before transformers sets its default
        super().__init__(config)
        check_problem_type(config.problem_type)
        anchors = anchors if anchors is not None else [rebuild_anchor(entry) for entry in config.anchors or []]
        taken = [anchor.name for anchor in anchors if free_name(anchor.name) != anchor.name]
        if taken:
            raise ValueError(f"anchors cannot be called {taken}, as attributes of modules are; add a '_' to the name")
        self.anchors = cast("Mapping[str, Anchor]", nn.ModuleDict({anchor.name: anchor for anchor in anchors}))
        self.front = next(iter(self.anchors), "")
        parts = (cast("Any", nn.ModuleDict()) for _ in range(5))
        self.converters, self.orders, self.heads, self.stitches, self.tuned = parts
        for anchor in anchors:
            if anchor.preprocessing != self.preprocessing:
                self.converters[anchor.name] = Reprocess(self.preprocessing, anchor.preprocessing)
            if config.new_head:
                like = next(anchor.parameters())
                dtype = trained_dtype(like.dtype)
                features = anchor.drop_classifier()
                for key in config.head_keys():
                    if HeadKey.parse(key).anchor == anchor.name:
                        check(f"heads.{key}", nn.Linear(features, config.num_labels, device="meta"))
                        self.heads[key] = nn.Linear(features, config.num_labels, device=like.device, dtype=dtype)
                continue
            order = class_order(anchors[0], anchor)
            if len(order) != config.num_labels:
                raise ValueError(
                    f"the anchors have {len(order)} classes, not num_labels={config.num_labels}; for others make "
                    "a model with new heads, from_anchors(..., num_labels=)"
                )
            if order != list(range(len(order))):
                self.orders[anchor.name] = Reorder(order)
        self.check_layouts()
        for name in config.stitches or {}:
            point, *_, options = config.stitch_parts(name)
            self.stitches[name] = stitch_that_fits(point, self.anchors, options, partial(check, f"stitches.{name}"))
        for key in config.tuned or {}:
            check(f"tuned.{key}", tuned_on_meta(self.anchors, config.tuned_config(key)))
            self.add_tuned(key, config.tuned_config(key))
        self.unfitted: set[str] = set()  # stitches with random weights; see `warn_unfitted`
        self.profiled: Profile | None = None
        self.weight_files: WeightFiles | None = None
        self.similarities: list[Similarity] = []
        self.ranking: list[RankedRoute] = []
        self.active_route = Route.parse(config.active_route) if config.active_route else Route.alone(self.front)
        self.active_cascade = Cascade.parse(config.active_cascade) if config.active_cascade else None
        self.staged = {}
        if attention is not None:
            set_attention(self.anchors, dict.fromkeys(self.anchors, str(attention)))
        self.post_init()

    def init_weights(self) -> None:
        """Do nothing: anchors are trained already, and stitches and heads initialise themselves."""

    @classmethod
    def from_anchors(
        cls,
        *sources: str | os.PathLike[str] | nn.Module | Anchor,
        order: str = "large-to-small",
        routes: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        labels_from: Any = None,
        dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        **hub_kwargs: Any,
    ) -> Self:
        """Make a model of two or more classifiers, or of one whose blocks will be skipped, without stitches.

        Args:
            *sources: Hub ids, local folders, modules, or anchors of `load_anchor`, which takes options for each.
            order: order of the anchors: ``large-to-small`` puts the one with the most parameters in front (ReStNet),
                ``small-to-large`` at the end; ``given`` keeps the order.
            routes: kind of a family whose routes to add, such as ``skip``; see `add_family`.
            image_size: image size in pixels for all anchors, in place of their own.
            num_labels: number of classes of a new task, for which every anchor gets a new head.
            id2label: class names of a new task.
            labels_from: folder or data set, as for `prepare_data`, whose classes are the task; anchors that all know
                them by name keep their own heads.
            dtype: dtype of the weights; ``auto`` for the stored one.
            trust_remote_code: whether to run code from the Hub.
            **hub_kwargs: options of huggingface_hub: ``token``, ``cache_dir``, ``local_files_only``, ...

        Raises:
            OSError: an anchor cannot be loaded.
            TypeError: an option is unknown.
            ValueError: no anchors, too few cuts, or label sets that differ without a new head.
        """
        check_load_options(cls.from_anchors, hub_kwargs)
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is not one of {ORDERS}")
        if not sources:
            raise ValueError("from_anchors needs at least one classifier, and two to join them")
        load = {"image_size": image_size, "dtype": dtype, "trust_remote_code": trust_remote_code, **hub_kwargs}
        anchors = [load_anchor(source, **load) for source in sources]
        if order != "given":
            anchors.sort(key=Anchor.num_parameters, reverse=order == "large-to-small")
        make_names_unique(anchors)
        for anchor in anchors:
            anchor.search()
        dtypes = {anchor.name: str(next(anchor.parameters()).dtype) for anchor in anchors}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"the anchors have weights of different types, {dtypes}; pass dtype=")
        num_labels, id2label = new_task(anchors, num_labels, id2label, labels_from)
        model = cls(RestNetConfig(**describe_model(anchors, num_labels, id2label)), anchors).eval()
        if routes is not None:
            model.add_family(routes)
        return model

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of ``pixel_values``, that of the front anchor."""
        return next(iter(self.anchors.values())).preprocessing

    def images_for(self, anchor: str, images: Tensor) -> Tensor:
        """Convert images (N, 3, H, W) from the model's preprocessing to that of an anchor."""
        return self.converters[anchor](images) if anchor in self.converters else images

    def _anchor(self, name: str) -> Anchor:
        if name not in self.anchors:
            raise ValueError(f"no anchor named '{name}'; there are {list(self.anchors)}")
        return self.anchors[name]

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str], **kwargs: Any) -> None:
        """Set how anchors from transformers compute attention; the others, such as CNNs, stay as they are.

        Args:
            attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ... for all anchors, or by anchor name.
            **kwargs: further arguments of transformers.

        Raises:
            ImportError: a package that the implementation needs is not installed.
            ValueError: there is no such implementation or anchor, or none of the anchors can take it.
        """
        change_attention(self.anchors, attn_implementation, **kwargs)
        if isinstance(attn_implementation, str):
            self.config._attn_implementation = attn_implementation

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
        route: Route | str | None = None,
        cascade: Cascade | str | None = None,
    ) -> ImageClassifierOutput:
        """Classify images by a route or a cascade. Threads can share a model: nothing of a call is stored in it.

        Args:
            pixel_values: images (N, 3, H, W) in the model's `preprocessing`.
            labels: class indices (N,) for a loss, which ignores images labelled -100; with a ``problem_type`` of
                ``multi_label_classification`` 0 or 1 for each class (N, classes), in the dtype of the logits.
            output_hidden_states: whether to return the activations at the route's cuts, those of stitches included, in
                the layouts of their anchors; or the positions of some. By default that of the config.
            route: route to run; by default that of `using` in this thread, else the active one.
            cascade: cascade with thresholds to run in place of a route.

        Returns:
            The logits, and where a cascade ran ``answered_by``, the number of the route that answered each image.

        Raises:
            TypeError, ValueError: the images have another type or shape, the labels are not classes, the route or
                cascade is not of this model, or activations of a cascade are asked for.
        """
        self.preprocessing.check(pixel_values)
        if labels is not None:
            check_targets(labels, self.config.num_labels, self.config.problem_type)
        chosen = self._chosen(route, cascade)
        x = cast("Tensor", pixel_values).to(self.dtype)
        training = self.training and torch.is_grad_enabled()
        if self.unfitted and not torch.compiler.is_compiling():
            self.unfitted.difference_update(p.name for p in chosen.stitch_points if training)
            warn_unfitted(self, chosen.routes if isinstance(chosen, Cascade) else [chosen])
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: tuple[Tensor | None, ...] | None = None
        answered_by: Tensor | None = None
        if isinstance(chosen, Cascade):
            if (wanted is not None and wanted is not False) or (training and labels is not None):
                raise ValueError("images of a cascade take different routes: to train or for activations give a route")
            logits, answered_by = self.run_cascade(x, chosen)
        elif wanted is None or wanted is False:
            logits = run_steps(x, self.steps(chosen))
        else:
            logits, states = run_with_states(x, self.steps(chosen), wanted)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if training and loss is not None and not loss.requires_grad:
            raise ValueError(
                f"nothing on '{chosen}' can train: the anchors are frozen, and it has no stitch or new head. Add a "
                "stitch and make its route active: model.set_route(model.add_stitch('a[:1] + b[2:]'))"
            )
        if answered_by is not None:
            return CascadeOutput(loss=loss, logits=logits, answered_by=answered_by)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)

    def _chosen(self, route: Route | str | None, cascade: Cascade | str | None) -> Route | Cascade:
        """The route or cascade of a call."""
        if route is not None and cascade is not None:
            raise ValueError("give a route or a cascade, not both")
        if cascade is not None:
            return self.runnable_cascade(cascade)
        active = self.active_cascade or self.active_route  # read once: another thread may change it
        return ROUTES.get({}).get(id(self), active) if route is None else self.route(route)

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes that were added: those with stitches, and tuned anchors."""
        return self.config.parsed_routes()

    @property
    def all_routes(self) -> tuple[Route, ...]:
        """Every anchor alone, then the routes that were added."""
        alone = [Route.alone(name) for name in self.anchors]
        adapters = sorted({route.adapter for route in self.routes if route.adapter}) if self.heads else []
        return (*alone, *(replace(route, adapter=name) for name in adapters for route in alone), *self.routes)

    def route(self, route: Route | str) -> Route:
        """Parse and check a route of this model.

        Args:
            route: route or its string form, in which cuts may be given by name.

        Raises:
            ValueError: the route does not parse, or does not fit the anchors.
        """
        if isinstance(route, str):
            route = Route.parse(route, lambda anchor, cut: self._anchor(anchor).cut_index(cut))
        alone = len(route.segments) == 1  # an anchor alone needs no search for cuts
        if route.is_anchor and route.adapter and route.head not in self.heads:
            raise ValueError(f"route '{route}': the anchor alone has no head of an adapter '{route.adapter}'")
        return route.check({name: 0 if alone else anchor.depth for name, anchor in self.anchors.items()})

    def _parse_routes(self, routes: Routes) -> list[Route]:
        """Parse and check one route or several."""
        return [self.route(route) for route in each_route(routes)]

    def steps(self, route: Route | str, stitches: Mapping[str, nn.Module] | None = None) -> tuple[Step, ...]:
        """The steps of a route, in order, on which forward, costs, profiles and baking rely.

        Args:
            route: route of this model.
            stitches: stitches by name, in place of the model's own.

        Raises:
            ValueError: the model lacks a stitch or head of the route, or does not have a tuned anchor.
        """
        return make_steps(self, self.route(route) if isinstance(route, str) else route, stitches)

    def finish(self, anchor: str) -> nn.Module:
        """The module from an anchor's output to the model's logits: a new head, an order of labels, or identity."""
        if self.heads:
            return accept_type(self.heads[anchor], self.dtype)
        return self.orders[anchor] if anchor in self.orders else nn.Identity()

    def bake(self, route: Route | str | None = None) -> nn.Sequential:
        """Make a plain module, images to logits, of one route with only its own weights.

        Args:
            route: route to bake; the active one by default.

        Raises:
            ValueError: a cascade is active, and no route is given.
        """
        steps = self.steps(self.only_route() if route is None else route)
        return nn.Sequential(*(step.bake() for step in steps)).eval()

    def add_stitch(self, route: Route | str, config: StitchConfig | None = None) -> Route:
        """Add a route and the stitches it lacks, which are not fitted yet; returns the route.

        A route with an adapter's name in front, ``night: a[:1] + b[2:]``, gets stitches of its own and, if the model
        has new heads, a copy of the head. Stitches with names of their own, ``a[:1] +both b[2:]``, are shared. A tuned
        anchor, ``tuned a[:]``, has no stitch: `train` gives it weights in place of some of the anchor's.

        Args:
            route: route or its string form to add.
            config: options of new stitches; by default those of `StitchConfig`.

        Raises:
            ValueError: the route does not fit the anchors, a stitch cannot be made or shared there, or the route
                exists with other options than ``config``.
        """
        return self.add_stitches([route], config)[0]

    def add_stitches(self, routes: Routes, config: StitchConfig | None = None) -> list[Route]:
        """Add many routes at once, as `add_stitch` does; anchors alone among them need no stitches."""
        return add_stitches(self, self._parse_routes(routes), config)

    def add_tuned(self, key: TunedKey | str, config: TunedConfig) -> Tuned:
        """Replace tensors of an anchor, by equal ones at first, in the routes that use that key.

        Args:
            key: one of the keys that `tuned_keys` returns.
            config: kind, anchor and cuts of the tensors.
        """
        key = str(key)
        self.tuned[key] = Tuned(self._anchor(config.anchor), config)
        self.config.tuned = {**self.config.tuned, key: asdict(config)}
        return self.tuned[key]

    def check_layouts(self) -> None:
        """Raise ValueError if a stitch was made for other activations than its anchors have."""
        parts = {name: self.config.stitch_parts(name)[:3] for name in self.config.stitches or {}}
        shared = (point for route in self.routes for point in route.stitch_points if point.via)
        for point in dict.fromkeys((*(point for point, *_ in parts.values()), *shared)):
            self.check_layout(point, *parts[point.name][1:])

    def check_layout(self, point: StitchPoint, source: AnyLayout, target: AnyLayout) -> None:
        """Raise ValueError if the activations at a stitch have other layouts.

        Args:
            point: cuts that the stitch joins.
            source: expected layout of its input.
            target: expected layout of its output.
        """
        ends = (point.source, point.source_cut, source), (point.target, point.target_cut, target)
        for anchor, cut, wanted in ends:
            layout = self.anchors[anchor].layout(cut)
            if layout != wanted:
                raise ValueError(
                    f"stitch '{point.name}' was made for {wanted} at cut {cut} of '{anchor}', which is {layout}"
                )

    def delete_stitch(self, route: Route | str) -> None:
        """Remove a route, or all routes of a named adapter, and the stitches and heads that no other route needs.

        Args:
            route: route to remove, or the name that `load_stitch` gave an adapter.

        Raises:
            ValueError: there is no such route, or it is active.
        """
        routes = [r for r in self.routes if r.adapter == route] if route else []
        self._delete(routes or [self.route(route)])

    def _delete(self, routes: Iterable[Route]) -> None:
        """Remove routes at once; see `delete_stitch`."""
        deleted, existing = dict.fromkeys(routes), dict.fromkeys(self.routes)
        for route in deleted:
            if route not in existing:
                raise ValueError(f"there is no route '{route}'; the routes are {list(map(str, existing))}")
        left = [other for other in existing if other not in deleted]
        needed = {point.name for other in left for point in other.stitch_points}
        adapters = {"", *(other.adapter for other in left)}
        active = self.active_route
        inactive = deleted.keys().isdisjoint((active,) if self.active_cascade is None else self.active_cascade.routes)
        running = active if self.active_cascade is None else self.active_cascade
        if not inactive or active.adapter not in adapters or {p.name for p in running.stitch_points} - needed:
            kind = "route" if self.active_cascade is None else "cascade"
            raise ValueError(f"'{self.active_cascade or active}' is the active {kind}; set another one first")
        self.config.routes = list(map(str, left))
        for name in set(self.stitches) - needed:
            del self.stitches[name], self.config.stitches[name]
            self.unfitted.discard(name)
        for key in set(self.tuned) - {str(key) for other in left for keys in tuned_keys(other) for key in keys}:
            del self.tuned[key], self.config.tuned[key]
        for name in set(self.heads) - set(self.config.head_keys()):
            del self.heads[name]
        self.config.trained_heads = [name for name in self.config.trained_heads if name in self.heads]
        self.config.training = remaining_training(self.config.training, adapters)
        if self.profiled is not None:
            rows = tuple(r for r in self.profiled if r.route not in deleted and r.route.adapter in adapters)
            kept = {row.route for row in rows}
            cascades = tuple(row for row in self.profiled.cascades if kept.issuperset(row.route.routes))
            self.profiled = replace(self.profiled, routes=rows, cascades=cascades)
        self.staged = {}

    def set_route(self, route: Route | str) -> Route:
        """Make a route active, so that ``forward`` runs it; returns the route.

        Args:
            route: route or its string form.

        Raises:
            ValueError: the route does not parse, or one of its stitches is missing.
        """
        route = self.route(route)
        steps = self.steps(route)
        if self.weight_files is not None:
            self.weight_files.load(self.anchors, steps)
        self.make_active(route, None)
        return route

    @contextmanager
    def using(self, route: Route | Cascade | str) -> Iterator[Route | Cascade]:
        """Run a route or cascade in the block, in this thread or task only, whatever other threads make active.

        Args:
            route: route, cascade with thresholds, or the string form of either.

        Raises:
            ValueError: the route or cascade does not parse, or one of its stitches is missing.
        """
        chosen: Route | Cascade
        if isinstance(route, Cascade) or (isinstance(route, str) and is_cascade(route)):
            chosen = self.runnable_cascade(route)
            self.plan_cascade(chosen)
        else:
            chosen = self.route(route)
            self.steps(chosen)
        token = ROUTES.set({**ROUTES.get({}), id(self): chosen})
        try:
            yield chosen
        finally:
            ROUTES.reset(token)

    def set_budget(
        self,
        budget: BudgetLike | None = None,
        *,
        macs: float | None = None,
        params: float | None = None,
        memory_mb: float | None = None,
        latency_ms: float | None = None,
        energy_j: float | None = None,
        mean_macs: float | None = None,
        mean_latency_ms: float | None = None,
        score: str | None = None,
    ) -> Route | Cascade:
        """Make the best route of the profile within limits active, and return it; or the best cascade.

        Cascades are considered where a mean is limited; the other limits then hold for the most that an image takes.

        Args:
            budget: all limits, as a `Budget` or a dict such as ``{"macs": 1e9}``.
            macs: largest multiply-accumulates for one image.
            params: largest number of parameters.
            memory_mb: largest memory in MB.
            latency_ms: largest latency for one image in milliseconds.
            energy_j: largest energy for one image in joules.
            mean_macs: largest multiply-accumulates as a mean over images.
            mean_latency_ms: largest latency in milliseconds as a mean over images.
            score: name of the score that the best route has most of; by default that of `Profile.find_score`.

        Raises:
            BudgetError: no route fits (the message names the cheapest), the model was not profiled, or has no such
                cost or score.
        """
        limits = {"macs": macs, "params": params, "memory_mb": memory_mb, "mean_macs": mean_macs}
        limits |= {"latency_ms": latency_ms, "energy_j": energy_j, "mean_latency_ms": mean_latency_ms}
        budget = Budget.of(budget, **limits)
        if self.profiled is None:
            raise BudgetError("the costs of the routes are not known yet; call profile() first")
        best = self.profiled.best(budget, score).route
        return self.set_cascade(best) if isinstance(best, Cascade) else self.set_route(best)

    def prune_to(self, routes: Routes) -> None:
        """Delete all but some routes, and free all weights of anchors that these do not use.

        The first route becomes active. After `page_to` all weights stay in their files. The adapter that the model
        saves has these routes only, and loads like any other.

        Args:
            routes: one route or several to keep, the active one first.

        Raises:
            ValueError: there are no routes, or one is not of this model.
        """
        chosen = self._parse_routes(routes)
        if not chosen:
            raise ValueError("prune_to needs at least one route to keep")
        steps = [step for route in chosen for step in self.steps(route)]
        self.set_route(chosen[0])
        self._delete(route for route in self.routes if route not in set(chosen))
        for entry, anchor in zip(self.config.anchors, self.anchors.values(), strict=True):
            add_fingerprint(entry, anchor)  # while all of its weights are in memory
        for anchor in self.anchors.values() if self.weight_files is None else ():
            keep_weights(anchor, steps)

    def fit_stitches(
        self,
        calibration: Any,
        routes: Routes | None = None,
        ridge: float | str = AUTO,
        batch_size: int = 64,
        *,
        on_error: str = "raise",
    ) -> dict[str, float]:
        """Fit stitches by least squares, in one pass over each anchor and without labels.

        Args:
            calibration: images, in any form that `prepare_data` takes.
            routes: one route or several whose stitches to fit; all by default.
            ridge: regularisation relative to the mean variance of the features; ``auto`` for the one of a few that
                predicts held-out images best.
            batch_size: images in a batch, if the images are a tensor or a data set.
            on_error: ``raise``, or ``skip`` to leave out broken pictures; see `prepare_data`.

        Returns:
            R² on held-out images by stitch name; NaN where there is one image, so that none can be held out.

        Raises:
            ValueError: no stitches, no images, or features that are not finite.
        """
        chosen = self._parse_routes(self.routes if routes is None else routes)
        calibration = self.prepare_data(calibration, name="calibration", on_error=on_error, labels=False)
        return fit_routes(self, self._images(calibration, batch_size, "calibration"), chosen, ridge)

    def route_costs(
        self,
        config: StitchConfig | None = None,
        *,
        latency: LatencyTable | None = None,
        memory: bool = False,
        budget: BudgetLike | None = None,
    ) -> Callable[[Route], dict[str, float]]:
        """A function that returns the costs of any route of these anchors, even one that has no stitches yet.

        Args:
            config: options of missing stitches; by default those of `StitchConfig`.
            latency: result of `measure_latency`, for ``latency_ms`` and, if the system counts it, ``energy_j``.
            memory: whether to count ``memory_mb``, which takes longer than ``macs`` and ``params``.
            budget: limits on the costs; ``memory_mb`` is counted where it is among them.
        """
        memory = memory or (budget is not None and Budget.of(budget).memory_mb is not None)
        table, stitches = CostTable(latency, memory), dict(self.stitches.items())

        def costs(route: Route) -> dict[str, float]:
            for point in route.stitch_points:
                if point.name not in stitches:  # only shapes are needed
                    stitches[point.name] = stitch_at(point, self.anchors, config or StitchConfig(), shapes_only=True)
            return table.costs(self.steps(route, stitches))

        return costs

    def profile(
        self,
        data: Any = None,
        routes: Routes | None = None,
        batch_size: int = 64,
        latency: LatencyTable | None = None,
        *,
        cascades: bool = False,
        on_error: str = "raise",
        metadata: Mapping[str, Any] | None = None,
    ) -> Profile:
        """Profile routes: their costs and, with labelled data, their accuracy, which `set_budget` then uses.

        With ``cascades`` the same evaluation calibrates cascades of two and three of the routes. Their scores and mean
        costs are by cross-validation, from images that their thresholds were not chosen on.

        Args:
            data: labelled images, in any form that `prepare_data` takes.
            routes: one route or several to profile; by default all, and the anchors alone.
            batch_size: images in a batch, if the images are a tensor or a data set.
            latency: result of `measure_latency` on this device, for ``latency_ms`` and ``energy_j``.
            cascades: whether to calibrate cascades too.
            on_error: ``raise``, or ``skip`` to leave out broken pictures; see `prepare_data`.
            metadata: metadata of the profile, such as ``{"dataset": "imagenet-1k"}``.

        Raises:
            ValueError: the data has no labels or other classes, or fewer than 100 images for cascades.
        """
        chosen = self._parse_routes(self.all_routes if routes is None else routes)
        walks = [(route, self.steps(route)) for route in chosen]
        table, scores, images = CostTable(latency), dict[Route, float](), {}
        found: tuple[ProfiledCascade, ...] = ()
        if data is not None:
            warn_unfitted(self, chosen)
            data = self.prepare_data(data, on_error=on_error)
            if cascades:
                observed = self._observe(walks, data, batch_size)
                scores, images["images"] = observed.scores(), len(observed)
                found = profile_cascades(observed, walks, table, "accuracy")
            else:
                scores, images["images"] = score_routes(walks, self._checked(data, batch_size), self.device)
        elif cascades:
            raise ValueError("cascades are calibrated on images: give data with labels, or see set_cascade for others")
        rows = [
            ProfiledRoute(route, table.costs(steps), {"accuracy": scores[route]} if route in scores else {})
            for route, steps in walks
        ]
        if cascades:
            rows = [row.with_means() for row in rows]
        return self.record_profile(rows, latency, {**(metadata or {}), **images}, found)

    def measure_latency(
        self,
        routes: Routes | None = None,
        *,
        batch_size: int = 1,
        seconds: float = 40.0,
        checked_routes: int = 6,
    ) -> LatencyTable:
        """Measure the latency of every piece of some routes on this device.

        The anchors, and a few routes spread over the range of MACs, also run from end to end, to check the sums.

        Args:
            routes: one route or several whose pieces are timed; all by default.
            batch_size: number of images in a run.
            seconds: approximate time to spend.
            checked_routes: number of routes that run from end to end.

        Raises:
            ValueError: the batch size is below 1.
            RuntimeError: the times of an anchor's runs vary so much that no latency can be given.
        """
        chosen = self._parse_routes(self.all_routes if routes is None else routes)
        walks = [(route, self.steps(route)) for route in dict.fromkeys((*map(Route.alone, self.anchors), *chosen))]
        table = MacsTable()
        checked = spread({route: table.macs(steps) for route, steps in walks}, checked_routes)
        check = [walk for walk in walks if walk[0] in checked]
        return measure_latency(walks, batch_size, seconds=seconds, check=check)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, as PEFT does."""
        every = sum(parameter.numel() for parameter in self.parameters())
        train = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        print(f"trainable params: {train:,} || all params: {every:,} || trainable%: {100 * train / every:.4f}")  # noqa: T201


AutoModelForImageClassification.register(RestNetConfig, StitchedModelForImageClassification, exist_ok=True)
