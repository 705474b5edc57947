"""Learner: the parts of routes that train, and their losses on a batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers.utils import logging

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.datasets import IGNORED, MULTI_LABEL
from restnet_hf.distributed import own_rows
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.route import Route, Routes, TunedKey, each_route
from restnet_hf.steps import Step, first_segment, run_steps, split_step
from restnet_hf.stitches.layers import Stitch
from restnet_hf.stitches.norms import recalibrate
from restnet_hf.stitches.precision import make_trainable
from restnet_hf.stitches.rates import OTHERS, learning_rates
from restnet_hf.stitches.tuning import HEAD, SHARED_KINDS, Tuned, TunedConfig, tunable, tuned_keys
from restnet_hf.training.args import AUTO, TrainArgs
from restnet_hf.training.frozen import FrozenPart, goal_name
from restnet_hf.training.losses import goal_scales, matching_loss, task_loss
from restnet_hf.training.teachers import Teacher, needs_teacher


# Kinds of `TUNINGS` that each value of `TrainArgs.tuning` trains; the head only of tuned anchors.
KINDS: dict[str, tuple[str, ...]] = {
    "stitch": (HEAD,),
    "norm": ("norm", HEAD),
    "lora": ("lora", "bias", HEAD),
    "full": ("full",),
}
logger = logging.get_logger(__name__)
Images = Callable[[], Iterator[Tensor]]
"""A function that returns an iterator over a few batches of images, the same ones at each call."""


def check_routes(model: StitchedModelForImageClassification, routes: Routes, args: TrainArgs) -> list[Route]:
    """Check that routes have something to train and something to learn from.

    Args:
        model: model of the routes.
        routes: routes that are to train.
        args: options of the training.

    Returns:
        The routes, parsed.

    Raises:
        ValueError: nothing would train, or anchors alone should match.
    """
    parsed = [model.route(route) for route in each_route(routes)]
    heads = model.heads and args.train_head is not False
    if all(route.is_anchor for route in parsed) and not heads:
        raise ValueError(
            "there is nothing to train: give routes with stitches (select_stitches or add_stitch makes them) or tuned "
            "anchors ('tuned a[:]'), or ask for train_head=True on a model built with num_labels= or id2label="
        )
    alone = [route for route in parsed if not route.stitch_points]
    if args.matching_epochs and alone:
        if not (args.num_train_epochs and len(alone) < len(parsed) and all(route.tuned for route in alone)):
            raise ValueError("anchors alone have nothing to match; set matching_epochs=0, or give stitched routes")
        logger.warning(f"{list(map(str, alone))} have no features to match: they learn the task in all epochs")
    return parsed


def _report_untuned(without: Sequence[Route], routes: Sequence[Route], kind: str) -> None:
    """Warn of the routes that have nothing to tune; raise ValueError where none has."""
    if len(without) == sum(not route.is_anchor for route in routes):
        raise ValueError(f"no route has anything of kind {kind!r} behind its last stitch; leave tuning={kind!r} out")
    stitched = [str(route) for route in without if not route.tuned]
    if stitched:
        logger.warning(f"{stitched} have nothing of kind {kind!r} behind their last stitch: only their stitches train")
    tuned = [str(route) for route in without if route.tuned]
    if tuned:
        logger.warning(f"{tuned} have nothing of kind {kind!r}: only their heads train")


class Learner:
    """Routes that train together: their trainable parts, and their losses on a batch.

    Args:
        model: model of the routes; parts that are tuned and missing are added to it.
        routes: routes with stitches, tuned anchors, or anchors alone with a new head to train.
        args: options of the training.
        images: images for the scales of features that are matched; None where these are read from a checkpoint, or
            nothing is matched.
        teacher: classifier that is distilled, from `make_teacher`; None without distillation.

    Raises:
        ValueError: there is nothing to distil from, or weights were tuned in another way before.
    """

    def __init__(
        self,
        model: StitchedModelForImageClassification,
        routes: Iterable[Route | str],
        args: TrainArgs,
        images: Images | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.model, self.args, self.teacher = model, args, teacher
        self.routes = [model.route(route) for route in routes]
        if teacher is None and needs_teacher(args):
            raise ValueError(f"distillation={args.distillation} needs a teacher: make one with make_teacher, or set 0")
        self.new_tuned = self._add_tuned()
        self.modules = self._trainable_modules()
        cast = [name for name, module in self.modules.items() if make_trainable(module)]
        if cast:
            logger.warning(f"{cast} were cast to half precision; they train and stay in float32 from here on")
        self.walks = {route: self._steps(route) for route in self.routes}
        self.frozen = self._frozen_part()
        self.rest = {route: self._trainable_steps(route) for route in self.walks}
        named = {f"{key}.{n}": p for key, m in self.modules.items() for n, p in m.named_parameters()}
        names = sorted((name for name in named if named[name].requires_grad), key=lambda name: name[:6] == "tuned.")
        self.parameters = {name: named[name] for name in names}
        self.buffers = {f"{key}.{n}": b for key, m in self.modules.items() for n, b in m.named_buffers()}
        self.scales: dict[str, float] = {}
        if images is not None:
            self._set_scales(images)

    def _add_tuned(self) -> list[Tuned]:
        """Add to the model the tuned parts that it lacks, equal to the anchors' own weights; returns those added."""
        args, model, new = self.args, self.model, list[Tuned]()
        kinds, without = KINDS[args.tuning], list[Route]()
        for route in self.routes:
            for segment, keys in zip(route.segments, tuned_keys(route), strict=True):
                for key in keys:
                    if key.kind not in kinds or str(key) in model.tuned:
                        continue
                    if key.kind == HEAD and any(k.kind == "full" and str(k) in model.tuned for k in keys):
                        continue  # tuned in full, the head is among those weights, which a copy would replace
                    span = (0, None) if key.kind in SHARED_KINDS else (segment.start, None)
                    if key.kind not in SHARED_KINDS and not tunable(model.anchors[segment.anchor], key.kind, *span):
                        without += [route] if key.kind == args.tuning else []
                        continue
                    config = TunedConfig(key.kind, segment.anchor, *span, r=args.r, lora_alpha=args.lora_alpha)
                    new.append(model.add_tuned(key, config))
        if without:
            _report_untuned(without, self.routes, args.tuning)
        tuned = [*map(TunedKey.parse, model.tuned)]
        low_rank, full = ({key.owner for key in tuned if key.kind == kind} for kind in ("lora", "full"))
        both = sorted(low_rank & full)
        if both:
            raise ValueError(f"{both} were tuned in full or by low-rank updates before; the two cannot be combined")
        return new

    def _trainable_modules(self) -> dict[str, nn.Module]:
        """Stitches, heads and tuned parts of the routes, by name."""
        model = self.model
        names = {point.name for route in self.routes for point in route.stitch_points}
        modules: dict[str, nn.Module] = {f"stitches.{name}": model.stitches[name] for name in sorted(names)}
        ends = {route.head for route in self.routes if route.tuned or self.args.train_head is not False}
        modules |= {f"heads.{name}": head for name, head in model.heads.items() if name in ends}
        used = {key for route in self.routes for keys in tuned_keys(route) for key in keys}
        if self.args.tuning == "stitch":
            used = {key for key in used if key.kind == HEAD}
        modules |= {f"tuned.{key}": tuned for key, tuned in model.tuned.items() if TunedKey.parse(key) in used}
        return modules

    def _steps(self, route: Route) -> tuple[Step, ...]:
        """The steps of a route; where only the head of a tuned anchor is tuned, the part before it is one of its own.

        Raises:
            ValueError: the anchor has nothing to tune.
        """
        steps = self.model.steps(route)
        if not route.tuned:
            return steps
        at = steps.index(first_segment(steps))
        if not steps[at].tuned and not self.model.heads:
            raise ValueError(f"'{route}' has nothing to tune: no linear layer, norm or convolution gives its logits")
        if not steps[at].tuned or any(tuned.config.kind != HEAD for tuned in steps[at].tuned):
            return steps
        front, head = split_step(steps[at], self.model.anchors[route.segments[0].anchor].depth)
        return *steps[:at], replace(front, tuned=()), head, *steps[at + 1 :]

    def _frozen_part(self) -> FrozenPart:
        model = self.model
        goals = {route: self._goals(route) for route in self.routes} if self.args.matching_epochs else {}
        alone = {name: model.steps(Route.alone(name)) for name in model.anchors}
        before = {
            name: (steps[: steps.index(first_segment(steps))], model.anchors[name]) for name, steps in alone.items()
        }
        return FrozenPart(self.walks, before, self.teacher, goals)

    def _goals(self, route: Route) -> dict[str, set[int | None]]:
        """The cuts, by anchor, at which a route's features should match the anchor's own."""
        last = route.segments[-1]
        if self.args.match == "stitch":
            goals: dict[str, set[int | None]] = {}
            for point in route.stitch_points:
                goals.setdefault(point.target, set()).add(point.target_cut)
            return goals
        later = range(last.start + 1, self.model.anchors[last.anchor].depth + 1)
        return {last.anchor: {None, *(later if self.args.match == "later" else ())}}

    def _set_scales(self, images: Images) -> None:
        """Compute the variance of each feature that is matched, on the first batch."""
        goals = self.frozen.names(self.routes, matching=True) - self.frozen.names(self.routes, matching=False)
        if goals:
            self.scales = goal_scales(self.frozen.compute(next(images()), goals))

    def recalibrate(self, images: Images) -> bool:
        """Compute the BatchNorm statistics of tuned parts that are new; what comes into a tuned anchor is as it was.

        Args:
            images: images to compute them on.

        Returns:
            Whether there are any.
        """
        for steps in (walk for route, walk in self.walks.items() if route.stitch_points):
            *front, last = steps[: _last_segment(steps) + 1]
            for tuned in last.tuned:
                if any(tuned is each for each in self.new_tuned):
                    assert isinstance(last.module, Anchor)
                    start = tuned.config.start
                    own: list[Callable[[Tensor], Tensor]] = [
                        *self.frozen.cuts[last.module.name].before,
                        partial(last.module, stop=start),
                    ]
                    parts = map(own_rows, images())
                    pairs = ((partial(run_steps, x, own), partial(run_steps, x, front), counts) for x, counts in parts)
                    tensors = tuned.tensors(last.module, start)
                    recalibrate(tensors, last.module, start, pairs)
                    tuned.assign(tensors)
        return bool(self.new_tuned)

    def _trainable_steps(self, route: Route) -> tuple[Step, ...]:
        """The steps of a route after its frozen beginning, with the end compiled if the options ask for it."""
        steps = self.walks[route]
        first = steps.index(first_segment(steps))
        rest = list(steps if steps[first].tuned else steps[first + 1 :])
        if self.args.torch_compile and _last_segment(steps) > first and not route.tuned:
            at = _last_segment(rest)
            end = rest[at].bake()
            end.compile(backend=self.args.torch_compile_backend)
            rest[at] = Step(rest[at].name, end, rest[at].shape)
        return tuple(rest)

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """The learning rate of each parameter that trains, from the options and the size of the weights."""
        args, own = self.args, dict[nn.Parameter, float]()
        common = OTHERS if isinstance(args.learning_rate, str) else args.learning_rate
        if args.learning_rate == AUTO:
            for module in self.modules.values():
                own |= learning_rates(module) if isinstance(module, Stitch) else {}
        inside = args.anchor_learning_rate or common * (0.1 if args.tuning == "full" else 1)
        return {
            parameter: inside if name.startswith("tuned.") else own.get(parameter, common)
            for name, parameter in self.parameters.items()
        }

    def losses(
        self,
        batch: Mapping[str, Tensor],
        drawn: Sequence[Route],
        matching: bool,
        in_place: bool,
        autocast: Callable[[], AbstractContextManager],
        labelled: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The loss of each route in turn; the outputs of frozen networks are computed once, without gradients.

        Args:
            batch: ``pixel_values``, or the outputs that `FrozenPart.compute` returns for them; and ``labels``, if any.
            drawn: routes that the sampler drew.
            matching: whether the routes match features, or learn the task.
            in_place: whether the first route teaches the others.
            autocast: context manager of mixed precision.
            labelled: number of labels that the cross-entropy is divided by; see `task_loss`.
        """
        outputs = batch
        if "pixel_values" in batch:
            images = batch["pixel_values"].to(self.model.dtype)
            with autocast():
                outputs = self.frozen.compute(images, self._needed(drawn, matching))
        teacher_logits = None if self.teacher is None else outputs.get(self.teacher.output)
        for index, route in enumerate(drawn):
            start = outputs[self.frozen.front(route)].to(self.model.dtype)
            with autocast():
                if matching and route.stitch_points:
                    loss = self._matching_loss(route, start, outputs)
                else:
                    logits = run_steps(start, self.rest[route]).float()
                    weight, temperature = self.args.distillation, self.args.temperature
                    loss = task_loss(logits, batch.get("labels"), teacher_logits, weight, temperature, labelled)
                    if index == 0 and in_place and self.args.distillation:
                        teacher_logits = logits.detach()
            yield loss

    def _needed(self, drawn: Sequence[Route], matching: bool) -> set[str]:
        """Names of the outputs of frozen networks that routes need; those without stitches always learn the task."""
        match = [route for route in drawn if matching and route.stitch_points]
        tasks = [route for route in drawn if route not in match]
        needed = self.frozen.names(tasks, matching=False) if tasks else set()
        return needed | self.frozen.names(match, matching=True)

    def _matching_loss(self, route: Route, start: Tensor, goals: Mapping[str, Tensor]) -> Tensor:
        """The matching loss of a route, whose frozen beginning has the output ``start``."""
        steps = self.walks[route]
        first, at = steps.index(first_segment(steps)), _last_segment(steps)
        before = steps[: at + 1] if steps[first].tuned else steps[first + 1 : at + 1]
        if self.args.match == "stitch":
            x, features, points = start, dict[str, Tensor](), list(route.stitch_points)
            for step in before[:-1]:
                x = step(x)
                if points and step.name == points[0].name:
                    point = points.pop(0)
                    features[goal_name(point.target, point.target_cut)] = x
            return matching_loss(features, goals, self.scales)
        x, last, segment = run_steps(start, before[:-1]), steps[at], route.segments[-1]
        stops = self._goals(route)[segment.anchor]
        assert isinstance(last.module, Anchor)
        tensors = last.replaced(segment.start, None)
        captured = last.module.capture(x, stops, segment.start, tensors=tensors, features=True)
        return matching_loss({goal_name(segment.anchor, cut): captured[cut] for cut in stops}, goals, self.scales)

    def parts(self, route: Route) -> dict[str, nn.Module]:
        """The modules that train on a route, by name.

        Args:
            route: one of the routes.
        """
        names = {f"stitches.{point.name}" for point in route.stitch_points} | {f"heads.{route.head}"}
        names |= {f"tuned.{key}" for keys in tuned_keys(route) for key in keys}
        return {name: module for name, module in self.modules.items() if name in names}

    def evaluate(
        self,
        batch: Mapping[str, Tensor],
        routes: Sequence[Route],
        matching: bool,
        autocast: Callable[[], AbstractContextManager],
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Score routes on a batch: by labels, where there are none by the teacher, else by the loss.

        Args:
            batch: ``pixel_values``, or the outputs that `FrozenPart.compute` returns for them; and ``labels``, if any.
            routes: routes to score on a batch.
            matching: whether the training at hand matches features, or learns the task.
            autocast: context manager of mixed precision.

        Returns:
            For each route the metric, whether it is right on each image, and the loss of each image, (images,).
        """
        metrics = [self.metric(route, batch.get("labels")) for route in routes]
        plain = [route for route, metric in zip(routes, metrics, strict=True) if metric != "loss"]
        outputs, images = batch, batch.get("pixel_values")
        if images is not None:
            images = images.to(self.model.device, self.model.dtype, non_blocking=True)
            names = {self.frozen.front(route) for route in plain}
            names |= {self.teacher.output} if self.teacher is not None and "agreement" in metrics else set()
            names |= self._needed([route for route in routes if route not in plain], matching)
            with autocast():
                outputs = {**batch, **self.frozen.compute(images, names)}
        for route, metric in zip(routes, metrics, strict=True):
            start = outputs[self.frozen.front(route)].to(self.model.device, self.model.dtype)
            with autocast():
                right, losses = self._score(route, metric, start, outputs, matching)
            yield metric, right, losses

    def metric(self, route: Route, labels: Tensor | None) -> str:
        """How a route is scored: ``accuracy``, ``agreement`` with the teacher, or ``loss``.

        Args:
            route: one of the routes.
            labels: labels of the images; None where there are none.
        """
        config = self.model.config
        learns_head = f"heads.{route.head}" in self.modules and self.args.num_train_epochs
        if config.new_head and route.head not in config.trained_heads and not learns_head:
            return "loss"  # a random head is right by chance
        if labels is not None and labels.dim() == 1 and config.problem_type != MULTI_LABEL:
            return "accuracy"
        return "loss" if self.teacher is None or labels is not None else "agreement"

    def _score(
        self, route: Route, metric: str, start: Tensor, outputs: Mapping[str, Tensor], matching: bool
    ) -> tuple[Tensor, Tensor]:
        """Whether a route, whose frozen beginning has the output ``start``, is right on each image; and its losses."""
        labels = outputs["labels"].to(start.device) if "labels" in outputs else None
        if metric == "loss" and matching and route.stitch_points:
            loss = self._matching_loss(route, start, outputs).float()
            return torch.zeros(len(start), device=loss.device), loss.expand(len(start))
        logits = run_steps(start, self.rest[route]).float()
        if metric == "accuracy":
            assert labels is not None
            known = outputs["labels"] != IGNORED
            if not known.all():  # labels of a loader are not on an accelerator, and nothing waits for it
                logits, labels = (each[known.to(each.device)] for each in (logits, labels))
            return logits.argmax(-1) == labels, cross_entropy(logits, labels, reduction="none")
        teacher = None if self.teacher is None else outputs.get(self.teacher.output)
        teacher = None if teacher is None else teacher.to(logits.device).float()
        if metric == "agreement":
            assert teacher is not None
            losses = kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            return logits.argmax(-1) == teacher.argmax(-1), losses
        loss = task_loss(logits, labels, teacher, self.args.distillation, self.args.temperature)
        return torch.zeros(len(logits), device=logits.device), loss.expand(len(logits))

    def saliency(self, route: Route) -> float:
        """Mean abs(gradient * weight) over the weights that only this route trains (ESTA, arXiv 2311.17352)."""
        own = {f"stitches.{point.name}" for point in route.stitch_points}
        own |= {f"tuned.{key}" for key in tuned_keys(route)[-1] if key.kind not in SHARED_KINDS}
        own |= {f"heads.{route.head}"} if route.tuned else set()
        products = [
            (p.grad * p).detach().abs().flatten()
            for key in own & self.modules.keys()
            for p in self.modules[key].parameters()
            if p.grad is not None
        ]
        return torch.cat(products).mean().item() if products else 0.0


def _last_segment(steps: Sequence[Step]) -> int:
    """Index of the last step that runs part of an anchor."""
    return max(index for index, step in enumerate(steps) if step.segment is not None)
