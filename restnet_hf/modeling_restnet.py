"""StitchedModelForImageClassification: frozen anchors, trainable stitches, routes to switch at run time."""

import copy
import datetime
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from restnet_hf.anchors.anchor import Anchor, free_name, unique_names
from restnet_hf.anchors.config_entry import class_order, describe, identify, rebuild
from restnet_hf.anchors.layouts import AnyLayout
from restnet_hf.anchors.loading import load_anchor
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.data.datasets import MULTI_LABEL, batches, check_labels, check_problem, labelled
from restnet_hf.data.labels import class_names
from restnet_hf.data.preprocessing import Preprocessing, Reprocess
from restnet_hf.errors import BudgetError
from restnet_hf.hashing import package_versions
from restnet_hf.hub.adapter_files import PartCheck, unchecked
from restnet_hf.hub.mixin import AdapterHubMixin
from restnet_hf.hub.paging import WeightFiles, keep_weights
from restnet_hf.profiling.accuracy import score_routes
from restnet_hf.profiling.costs import CostTable
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.profiling.timing import measure_latency
from restnet_hf.routes.profile import Budget, Profile, ProfiledRoute
from restnet_hf.routes.route import HeadKey, Route, StitchPoint, TunedKey
from restnet_hf.selection.mixin import SelectionMixin
from restnet_hf.selection.ranking import RankedRoute, Similarity, spread
from restnet_hf.steps import Reorder, Step, run_steps, run_with_states
from restnet_hf.stitches import least_squares as fitting
from restnet_hf.stitches.branches import stitch_at, stitch_that_fits
from restnet_hf.stitches.layers import Stitch, StitchConfig
from restnet_hf.stitches.least_squares import RIDGE
from restnet_hf.stitches.tuning import Tuned, TunedConfig, tuned_keys, tuned_on_meta


logger = logging.get_logger(__name__)
ORDERS = ("large-to-small", "small-to-large", "given")


class StitchedModelForImageClassification(SelectionMixin, AdapterHubMixin, PreTrainedModel):
    """One image classifier out of several: the early blocks of one, a stitch, the late blocks of another.

    The anchors are frozen and in evaluation mode always; what trains, is saved and is shared are the stitches and,
    for a new task, the heads. Make one with `from_anchors`, load one with `from_pretrained`.
    """

    config_class = RestNetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True  # every anchor is checkpointed from cut to cut
    accepts_loss_kwargs = False  # the loss is a mean over the batch
    # of attention: each anchor is asked for itself, and those without are left alone
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, config: RestNetConfig, anchors: Sequence[Anchor] | None = None, check: PartCheck = unchecked
    ) -> None:
        asked = config._attn_implementation  # before it stands for what is the default here
        super().__init__(config)
        check_problem(config.problem_type)
        entries = config.anchors or []
        anchors = anchors if anchors is not None else [rebuild(entry) for entry in entries]
        taken = [anchor.name for anchor in anchors if free_name(anchor.name) != anchor.name]
        if taken:
            raise ValueError(f"anchors cannot be called {taken}, as attributes of modules are; add a '_' to the name")
        self.anchors = cast("Mapping[str, Anchor]", nn.ModuleDict({anchor.name: anchor for anchor in anchors}))
        self.front = next(iter(self.anchors), "")
        self.converters, self.orders, self.heads = (cast("Any", nn.ModuleDict()) for _ in range(3))
        self.stitches, self.tuned = (cast("Any", nn.ModuleDict()) for _ in range(2))
        for anchor in anchors:
            if anchor.preprocessing != self.preprocessing:
                self.converters[anchor.name] = Reprocess(self.preprocessing, anchor.preprocessing)
            like = next(anchor.parameters())
            if config.new_head:
                features = anchor.drop_classifier()
                for key in config.head_keys():
                    if HeadKey.parse(key).anchor == anchor.name:
                        check(f"heads.{key}", nn.Linear(features, config.num_labels, device="meta"))
                        self.heads[key] = nn.Linear(features, config.num_labels, device=like.device, dtype=like.dtype)
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
        self.profiled: Profile | None = None
        self.weight_files: WeightFiles | None = None
        self.similarity: Similarity | None = None
        self.ranking: list[RankedRoute] = []
        self.active_route = Route.parse(config.active_route) if config.active_route else Route.alone(self.front)
        if asked is not None:
            self._attend(dict.fromkeys(self.anchors, str(asked)))
        self.post_init()

    def init_weights(self) -> None:
        """Nothing is left to initialise: anchors come trained, and stitches and heads initialise themselves."""

    @classmethod
    def from_anchors(
        cls,
        *sources: str | os.PathLike[str] | nn.Module | Anchor,
        order: str = "large-to-small",
        routes: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        **hub_kwargs: Any,
    ) -> Self:
        """A model out of two or more classifiers, or of one whose blocks will be skipped, with no stitches yet.

        Args:
            *sources: Hub ids, local folders, modules, or what `load_anchor` returns (which takes options for each).
            order: ``large-to-small`` puts the anchor of the most parameters in front (ReStNet), ``small-to-large``
                last; ``given`` keeps the order.
            routes: kind of a family whose routes to add at once, such as ``skip``; see `add_family`.
            image_size: in pixels, for all anchors, instead of their own.
            num_labels: classes of a new task: every anchor gets a new head.
            id2label: class names of a new task.
            dtype: of the weights; ``auto`` takes what is stored.
            trust_remote_code: run code from the Hub.
            **hub_kwargs: ``token``, ``cache_dir``, ``local_files_only``, ... as in ``from_pretrained``.

        Raises:
            OSError: an anchor cannot be loaded.
            ValueError: no anchors, too few cuts, or label sets that differ without a new head.
        """
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is not one of {ORDERS}")
        if not sources:
            raise ValueError("from_anchors needs at least one classifier, and two to join them")
        load = {"image_size": image_size, "dtype": dtype, "trust_remote_code": trust_remote_code, **hub_kwargs}
        anchors = [load_anchor(source, **load) for source in sources]
        if order != "given":
            anchors.sort(key=Anchor.num_parameters, reverse=order == "large-to-small")
        unique_names(anchors)
        for anchor in anchors:
            anchor.search()
        dtypes = {anchor.name: str(next(anchor.parameters()).dtype) for anchor in anchors}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"the anchors have weights of different types, {dtypes}; pass dtype=")
        names = class_names(num_labels, id2label) or dict(enumerate(anchors[0].label_names or ()))
        names = names or {index: f"LABEL_{index}" for index in range(anchors[0].found.classes)}
        config = RestNetConfig(
            anchors=[describe(anchor) for anchor in anchors],
            new_head=num_labels is not None or id2label is not None,
            id2label=names,
            label2id={name: index for index, name in names.items()},
            dtype=next(anchors[0].parameters()).dtype,
        )
        model = cls(config, anchors).eval()
        if routes is not None:
            model.add_family(routes)
        return model

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

    def _anchor(self, name: str) -> Anchor:
        if name not in self.anchors:
            raise ValueError(f"no anchor named '{name}'; there are {list(self.anchors)}")
        return self.anchors[name]

    def set_attn_implementation(self, attn_implementation: str | Mapping[str, str], **kwargs: Any) -> None:
        """Set how anchors from transformers compute attention; the others, such as CNNs, stay as they are.

        Args:
            attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ... for all anchors, or by anchor name.
            **kwargs: as in transformers.

        Raises:
            ImportError: what it needs is not installed.
            ValueError: there is no such implementation, none of these anchors can take it, or there is no such anchor.
        """
        if isinstance(attn_implementation, str):
            wanted = dict.fromkeys(self.anchors, attn_implementation)
        else:
            wanted = {self._anchor(name).name: how for name, how in attn_implementation.items()}
        errors = self._attend(wanted, **kwargs)
        if errors and len(errors) == len(wanted):
            raise next(iter(errors.values()))
        if isinstance(attn_implementation, str):
            self.config._attn_implementation = attn_implementation
        if errors:
            logger.warning(f"anchors {list(errors)} keep the attention they have: {next(iter(errors.values()))}")

    def _attend(self, wanted: Mapping[str, str], **kwargs: Any) -> dict[str, ValueError]:
        """Set how anchors compute attention; returns, by name, why some could not."""
        errors: dict[str, ValueError] = {}
        for name, how in wanted.items():
            model = self.anchors[name].model
            if not isinstance(model, PreTrainedModel):
                errors[name] = ValueError(f"anchor '{name}' is not a model of transformers")
                continue
            try:
                model.set_attn_implementation(how, **kwargs)
            except ValueError as error:
                errors[name] = error
        return errors

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
    ) -> ImageClassifierOutput:
        """Classify images by the active route.

        Args:
            pixel_values: images (N, 3, H, W) prepared as `preprocessing` says.
            labels: class indices (N,), for a loss; images labelled -100 have no part in it. For a ``problem_type`` of
                ``multi_label_classification`` 0 or 1 for each class (N, classes), of the logits' type.
            output_hidden_states: return the activations at the route's cuts, the one that each stitch makes included,
                in the layouts of their anchors; or only some, by position. As the config says by default.

        Raises:
            TypeError, ValueError: the images have another type or shape, or the labels are not of classes.
        """
        self.preprocessing.check(pixel_values)
        if labels is not None:
            self._check_task(labels)
        x, steps = pixel_values.to(self.dtype), self.steps(self.active_route)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: tuple[Tensor | None, ...] | None = None
        if wanted is None or wanted is False:
            logits = run_steps(x, steps)
        else:
            logits, states = run_with_states(x, steps, wanted)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)

    def _check_task(self, labels: Tensor) -> None:
        """Raise ValueError where labels are not of classes, one or several for an image."""
        classes, kind = self.config.num_labels, self.config.problem_type
        check_problem(kind if kind or classes > 1 else "regression")  # what one class alone means to transformers
        if labels.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if kind != MULTI_LABEL and not (kind is None and labels.is_floating_point() and labels.dim() == 2):
            check_labels(labels.reshape(-1), classes)
        elif labels.shape[1:] != (classes,):
            raise ValueError(f"labels of several classes must have shape (N, {classes}), not {tuple(labels.shape)}")

    @property
    def routes(self) -> tuple[Route, ...]:
        """The stitched routes."""
        return self.config.parsed_routes()

    @property
    def all_routes(self) -> tuple[Route, ...]:
        """Every anchor alone, then the stitched routes."""
        alone = [Route.alone(name) for name in self.anchors]
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
            tuned = {str(key): self.tuned[str(key)] for key in keys if str(key) in self.tuned}
            name = f"{segment} with {', '.join(tuned)}" if tuned else str(segment)
            shape: tuple[int, ...] = (1, 3, *anchor.preprocessing.image_size)
            if segment.start:
                point = next(points)
                if point.name not in stitches:
                    raise ValueError(f"route '{route}' has no stitch yet; call add_stitch('{route}') and fit_stitches")
                shape = self.anchors[point.source].layout(point.source_cut).shape(1)
                steps.append(Step(point.name, stitches[point.name], shape))
                shape = anchor.layout(segment.start).shape(1)
            if segment.start != segment.stop:  # between stitches that follow one another nothing runs
                steps.append(Step(name, anchor, shape, segment, tuple(tuned.values())))
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
                key = str(HeadKey(name, route.adapter))
                if key not in self.heads:
                    self.heads[key] = copy.deepcopy(self.heads[name])
        return list(added)

    def add_tuned(self, key: TunedKey | str, config: TunedConfig) -> Tuned:
        """Replace tensors of an anchor, by equal ones at first, in the routes that use that key.

        Args:
            key: one of `tuned_keys`.
            config: kind, anchor and cuts of the tensors.
        """
        key = str(key)
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
        for key in set(self.tuned) - {str(key) for other in left for keys in tuned_keys(other) for key in keys}:
            del self.tuned[key], self.config.tuned[key]
        for name in set(self.heads) - {str(HeadKey(name, adapter)) for adapter in adapters for name in self.anchors}:
            del self.heads[name]
        self.config.trained_heads = [name for name in self.config.trained_heads if name in self.heads]
        self.config.training = [
            e for e in self.config.training if "adapter" not in e or _is_left(e["adapter"], adapters)
        ]
        if self.profiled is not None:
            rows = self.profiled.routes
            kept = tuple(row for row in rows if row.route not in gone and row.route.adapter in adapters)
            self.profiled = Profile(kept, self.profiled.metadata)

    def set_route(self, route: Route | str) -> Route:
        """Make ``forward`` run that route.

        Raises:
            ValueError: it does not parse, or a stitch of it is missing.
        """
        route = self.route(route)
        steps = self.steps(route)
        if self.weight_files is not None:
            self.weight_files.load(self.anchors, steps)
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
            keep_weights(anchor, steps)

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
        self.weight_files.load(self.anchors, self.steps(self.active_route))

    def fit_stitches(
        self,
        calibration: Any,
        routes: Iterable[Route | str] | None = None,
        ridge: float = RIDGE,
        batch_size: int = 64,
    ) -> dict[str, float]:
        """Set stitches by least squares, in one pass over each anchor and without labels.

        Args:
            calibration: images; see `restnet_hf.data.batches`.
            routes: whose stitches to fit; all by default.
            ridge: relative to the mean variance of the features.
            batch_size: for a tensor or a data set.

        Returns:
            R² by stitch name.

        Raises:
            ValueError: no stitches, no images, or features that are not finite.
        """
        chosen = [self.route(route) for route in (self.routes if routes is None else routes)]
        points = {point: self.stitches[point.name] for route in chosen for point in route.stitch_points}
        if not points:
            raise ValueError("there are no stitches to fit; call select_stitches or add_stitch first")
        count, images = 0, self._images(calibration, batch_size, "calibration")

        def counted() -> Iterator[dict[str, Tensor]]:
            nonlocal count
            for batch in images:
                count += len(batch[self.front])
                yield batch

        r2 = fitting.fit_stitches(points, self.anchors, counted(), ridge)
        for name, explained in r2.items():
            self.config.stitches[name]["r2"] = explained
        done = {"stage": "least squares", "images": count, "routes": len(chosen), "ridge": ridge}
        self.config.training = [*self.config.training, done]
        self.profiled = None  # it was of other stitches
        return r2

    def route_costs(
        self, config: StitchConfig | None = None, *, latency: LatencyTable | None = None, memory: bool = False
    ) -> Callable[[Route], dict[str, float]]:
        """A function that gives the costs of any route of these anchors, also of one that has no stitches yet.

        Args:
            config: how missing stitches would be made.
            latency: from `measure_latency`, for ``latency_ms`` and, where the system counts it, ``energy_j``.
            memory: whether to count ``memory_mb``, which takes longer than ``macs`` and ``params``.
        """
        table, ghosts = CostTable(latency, memory), dict(self.stitches.items())

        def costs(route: Route) -> dict[str, float]:
            for point in route.stitch_points:
                if point.name not in ghosts:  # its shapes are all that is needed
                    ghosts[point.name] = stitch_at(point, self.anchors, config or StitchConfig(), shapes_only=True)
            return table.costs(self.steps(route, ghosts))

        return costs

    def profile(
        self,
        data: Any = None,
        routes: Iterable[Route | str] | None = None,
        batch_size: int = 64,
        latency: LatencyTable | None = None,
        **metadata: Any,
    ) -> Profile:
        """What every route costs and, with labelled data, its accuracy; kept for `set_budget`.

        Args:
            data: labelled images; see `restnet_hf.data.batches`.
            routes: all and the anchors alone by default.
            batch_size: for a tensor or a data set.
            latency: what `measure_latency` found on this device, for ``latency_ms`` and ``energy_j``.
            **metadata: written into the profile, the data's name for one.
        """
        chosen = [self.route(route) for route in (self.all_routes if routes is None else routes)]
        walks = [(route, self.steps(route)) for route in chosen]
        costs, scores = self.route_costs(latency=latency, memory=True), dict[Route, float]()
        if data is not None:
            scores, metadata["images"] = score_routes(walks, self._checked(data, batch_size), self.device)
        rows = [
            ProfiledRoute(route, costs(route), {"accuracy": scores[route]} if route in scores else {})
            for route, _ in walks
        ]
        if latency is not None:
            metadata["latency"] = latency.metadata()
        return self.record_profile(rows, **metadata)

    def measure_latency(
        self,
        routes: Iterable[Route | str] | None = None,
        *,
        batch_size: int = 1,
        seconds: float = 40.0,
        checked_routes: int = 6,
    ) -> LatencyTable:
        """Measure what every piece of some routes takes on this device.

        The anchors, and a few routes spread over the range of MACs, also run from end to end, to check the sums.

        Args:
            routes: routes whose pieces are timed; all by default.
            batch_size: images in a run.
            seconds: time to spend, about.
            checked_routes: number of routes that run from end to end.

        Raises:
            ValueError: see `restnet_hf.profiling.timing.measure_latency`.
        """
        chosen = [self.route(route) for route in (self.all_routes if routes is None else routes)]
        walks = [(route, self.steps(route)) for route in dict.fromkeys((*map(Route.alone, self.anchors), *chosen))]
        table = MacsTable()
        checked = spread({route: table.macs(steps) for route, steps in walks}, checked_routes)
        return measure_latency(
            walks, batch_size, seconds=seconds, check=[walk for walk in walks if walk[0] in checked]
        )

    def record_profile(self, rows: Iterable[ProfiledRoute], **metadata: Any) -> Profile:
        """Make a profile of rows, with what it must say of device, weights and versions, and keep it."""
        where = {"device": str(self.device), "machine": platform.machine(), "date": datetime.date.today().isoformat()}
        of = {"weights": self.weights_sha256(), "versions": package_versions()}
        known = {} if self.profiled is None else self.profiled.metadata
        kept = {key: known[key] for key in ("runtimes",) if key in known}
        self.profiled = Profile(tuple(rows), {**metadata, **where, **of, **kept})
        return self.profiled

    def record_runtime(self, exported: Profile) -> Profile:
        """Add what an exported folder's profile says to the model's own; see `Profile.with_runtime`."""
        self.profiled = (self.profile() if self.profiled is None else self.profiled).with_runtime(exported)
        return self.profiled

    def _images(self, data: Any, batch_size: int, name: str) -> Iterator[dict[str, Tensor]]:
        """Batches of images as every anchor wants them, by anchor."""
        for batch in batches(data, batch_size, name):
            self.preprocessing.check(batch["pixel_values"])
            images = batch["pixel_values"].to(self.device, self.dtype)
            yield {name: self.images_for(name, images) for name in self.anchors}

    def _checked(self, data: Any, batch_size: int, name: str = "data") -> Iterator[dict[str, Tensor]]:
        for batch in labelled(batches(data, batch_size, name)):
            self.preprocessing.check(batch["pixel_values"])
            if "labels" in batch:
                check_labels(batch["labels"], self.config.num_labels)
            yield {**batch, "pixel_values": batch["pixel_values"].to(self.dtype)}

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        every = sum(parameter.numel() for parameter in self.parameters())
        train = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        print(f"trainable params: {train:,} || all params: {every:,} || trainable%: {100 * train / every:.4f}")  # noqa: T201


def _is_left(name: Any, adapters: Iterable[str]) -> bool:
    """Whether an adapter, or one that came with it under a longer name, is among those."""
    return any(adapter == name or adapter.startswith(f"{name}-") for adapter in adapters)


AutoModelForImageClassification.register(RestNetConfig, StitchedModelForImageClassification, exist_ok=True)
