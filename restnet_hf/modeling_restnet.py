"""StitchedModelForImageClassification: frozen anchors, trainable stitches, routes to switch at run time."""

import datetime
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from restnet_hf import least_squares as fitting
from restnet_hf.adapter_files import PartCheck, unchecked
from restnet_hf.anchors import Anchor, free_name, unique_names
from restnet_hf.branches import stitch_that_fits
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.costs import MacsTable, ParamsTable
from restnet_hf.data import MULTI_LABEL, check_labels, check_problem
from restnet_hf.evaluation import score_routes
from restnet_hf.labels import class_names
from restnet_hf.latency import LatencyTable
from restnet_hf.least_squares import RIDGE
from restnet_hf.loading import load_anchor
from restnet_hf.memory import MemoryTable
from restnet_hf.parents import class_order, describe, rebuild
from restnet_hf.preprocessing import Reprocess
from restnet_hf.profiles import Profile, ProfiledRoute
from restnet_hf.ranking import RankedRoute, Similarity
from restnet_hf.routes import Route, Segment
from restnet_hf.selecting import SelectingModel
from restnet_hf.steps import Reorder, Step, run_steps, split_at_cuts
from restnet_hf.stitches import Stitch
from restnet_hf.tuning import ghost_tuned


logger = logging.get_logger(__name__)
ORDERS = ("large-to-small", "small-to-large", "given")
PACKAGES = ("restnet-hf", "torch", "transformers", "timm")


class StitchedModelForImageClassification(SelectingModel):
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
                    if key.rpartition(":")[2] == anchor.name:
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
            check(f"tuned.{key}", ghost_tuned(self.anchors, config.tuned_config(key)))
            self.add_tuned(key, config.tuned_config(key))
        self.profiled: Profile | None = None
        self.weight_files = None
        self.similarity: Similarity | None = None
        self.ranking: list[RankedRoute] = []
        self.active_route = Route.parse(config.active_route) if config.active_route else Route((Segment(self.front),))
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
            logits, states = self._with_states(x, steps, wanted)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)

    def _with_states(
        self, x: Tensor, steps: Iterable[Step], wanted: bool | Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The logits, and what the route computes at its cuts: all of it, or at some positions and None elsewhere."""
        states: list[Tensor | None] = []
        for step in split_at_cuts(steps):
            x = step(x)
            if isinstance(step.module, Stitch) or (step.segment is not None and step.segment.stop is not None):
                states.append(x)
        if not isinstance(wanted, bool):
            kept = {range(len(states))[index] for index in wanted}
            states = [state if index in kept else None for index, state in enumerate(states)]
        return x, tuple(states)

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

    def costs_here(self, latency: LatencyTable | None = None) -> Callable[[Route], dict[str, float]]:
        """A function that gives MACs, parameters and memory of a route of this model, its latency and its energy.

        Energy is latency times what the processor used while routes ran, where the system counts it.

        Args:
            latency: what `measure_latency` found on this device; without it latency and energy are left out.
        """
        macs, params = MacsTable(), ParamsTable()
        memory = MemoryTable(1 if latency is None else latency.batch_size)

        def costs(route: Route) -> dict[str, float]:
            steps = self.steps(route)
            found = {"macs": macs.macs(steps), "params": params.params(steps), "memory_mb": memory.memory_mb(steps)}
            if latency is not None:
                found["latency_ms"] = latency.latency_ms(steps) / latency.batch_size
                if latency.watts is not None:
                    found["energy_j"] = latency.watts * found["latency_ms"] / 1e3
            return found

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
        costs, scores = self.costs_here(latency), dict[Route, float]()
        if data is not None:
            scores, metadata["images"] = score_routes(walks, self._checked(data, batch_size), self.device)
        rows = [
            ProfiledRoute(route, costs(route), {"accuracy": scores[route]} if route in scores else {})
            for route, _ in walks
        ]
        if latency is not None:
            metadata["latency"] = {"device": latency.device, "runtime": latency.runtime, **latency.facts}
        return self.keep_profile(rows, **metadata)

    def keep_profile(self, rows: Iterable[ProfiledRoute], **metadata: Any) -> Profile:
        """Make a profile of rows, with what it must say of device, weights and versions, and keep it."""
        where = {"device": str(self.device), "machine": platform.machine(), "date": datetime.date.today().isoformat()}
        versions = {package: version(package) for package in PACKAGES}
        of = {"weights": self.weights_sha256(), "versions": versions}
        known = {} if self.profiled is None else self.profiled.metadata
        kept = {key: known[key] for key in ("runtimes",) if key in known}
        self.profiled = Profile(tuple(rows), {**metadata, **where, **of, **kept})
        return self.profiled

    def keep_runtime(self, exported: Profile) -> Profile:
        """Add what an exported folder's profile says to the model's own; see `Profile.with_runtime`."""
        self.profiled = (self.profile() if self.profiled is None else self.profiled).with_runtime(exported)
        return self.profiled

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        every = sum(parameter.numel() for parameter in self.parameters())
        train = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        print(f"trainable params: {train:,} || all params: {every:,} || trainable%: {100 * train / every:.4f}")  # noqa: T201


AutoModelForImageClassification.register(RestNetConfig, StitchedModelForImageClassification, exist_ok=True)
