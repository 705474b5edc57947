"""The routes that learn: what of them trains, and their losses on a batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.route import Route, TunedKey
from restnet_hf.steps import Step, run_steps
from restnet_hf.stitches.norms import recalibrate
from restnet_hf.stitches.tuning import SHARED_KINDS, Tuned, TunedConfig, tunable, tuned_keys
from restnet_hf.training.args import TrainArgs
from restnet_hf.training.frozen import TEACHER, FrozenPart, first_segment, goal_name
from restnet_hf.training.losses import goal_scales, matching_loss, task_loss


# Of `TUNINGS`, by the name of the tuning.
KINDS: dict[str, tuple[str, ...]] = {"stitch": (), "norm": ("norm",), "lora": ("lora", "bias"), "full": ("full",)}


class Learner:
    """Routes that learn together.

    Args:
        model: whose routes they are.
        routes: with stitches, or anchors alone that have a new head to train.
        args: options of training.

    Raises:
        ValueError: nothing would train, or there is nothing to learn from.
    """

    def __init__(
        self, model: StitchedModelForImageClassification, routes: Iterable[Route | str], args: TrainArgs
    ) -> None:
        self.model, self.args = model, args
        self.routes = [model.route(route) for route in routes]
        self._something_trains()
        self.teacher = self._teacher()
        self.scales: dict[str, float] = {}

    def begin(self) -> list[Tuned]:
        """Make what is to be tuned, and get ready for batches; returns what is new and equal to the anchors' own."""
        fresh = self._tune()
        self.walks = {route: self.model.steps(route) for route in self.routes}
        self.modules = self._trainable()
        self.frozen = self._frozen_part()
        self.rest = {route: self._rest(steps) for route, steps in self.walks.items()}
        named = {f"{key}.{n}": p for key, m in self.modules.items() for n, p in m.named_parameters()}
        names = sorted((name for name in named if named[name].requires_grad), key=lambda name: name[:6] == "tuned.")
        self.parameters = {name: named[name] for name in names}
        self.buffers = {f"{key}.{n}": b for key, m in self.modules.items() for n, b in m.named_buffers()}
        return fresh

    def _something_trains(self) -> None:
        stitched = any(route.stitch_points for route in self.routes)
        heads = self.model.heads and self.args.train_head is not False
        if not stitched and not heads:
            raise ValueError(
                "there is nothing to train: give routes with stitches (select_stitches or add_stitch makes them), or "
                "ask for train_head=True on a model built with num_labels= or id2label="
            )
        if self.args.matching_epochs and not all(route.stitch_points for route in self.routes):
            raise ValueError("anchors alone have nothing to match; set matching_epochs=0, or give stitched routes")

    def _teacher(self) -> Route | None:
        if not (self.args.distillation and self.args.num_train_epochs):
            return None
        anchors = self.model.anchors
        largest = max(anchors, key=lambda name: anchors[name].num_parameters())
        if self.model.config.new_head and largest not in self.model.config.trained_heads:
            raise ValueError(
                f"the new head of '{largest}' is not trained yet, so there is nothing to distil from it. Train heads "
                f"first, train(..., TrainArgs(distillation=0), routes=['{largest}[:]', ...]), or set distillation=0"
            )
        return Route.alone(largest)

    def _tune(self) -> list[Tuned]:
        """Make what is to be tuned besides stitches, where it is not there yet; returns what is new."""
        args, model, new = self.args, self.model, []
        kinds = KINDS[args.tuning]
        for route in self.routes:
            for segment, keys in zip(route.segments, tuned_keys(route), strict=True):
                for key in keys:
                    if key.kind not in kinds or str(key) in model.tuned:
                        continue
                    span = (0, None) if key.kind in SHARED_KINDS else (segment.start, None)
                    if key.kind == "bias" and not tunable(model.anchors[segment.anchor], key.kind, *span):
                        continue
                    config = TunedConfig(key.kind, segment.anchor, *span, r=args.r, lora_alpha=args.lora_alpha)
                    new.append(model.add_tuned(key, config))
        tuned = [*map(TunedKey.parse, model.tuned)]
        low_rank, full = ({key.owner for key in tuned if key.kind == kind} for kind in ("lora", "full"))
        both = sorted(low_rank & full)
        if both:
            raise ValueError(f"{both} were tuned in full or by low-rank updates before; the two cannot be combined")
        return new

    def _trainable(self) -> dict[str, nn.Module]:
        model = self.model
        names = {point.name for route in self.routes for point in route.stitch_points}
        modules: dict[str, nn.Module] = {f"stitches.{name}": model.stitches[name] for name in sorted(names)}
        if self.args.train_head is not False:
            ends = {route.head for route in self.routes}
            modules |= {f"heads.{name}": head for name, head in model.heads.items() if name in ends}
        if self.args.tuning != "stitch":
            used = {str(key) for route in self.routes for keys in tuned_keys(route) for key in keys}
            modules |= {f"tuned.{key}": tuned for key, tuned in model.tuned.items() if key in used}
        return modules

    def _frozen_part(self) -> FrozenPart:
        model = self.model
        goals = {route: self._goals(route) for route in self.routes} if self.args.matching_epochs else {}
        alone = {name: model.steps(Route.alone(name)) for name in model.anchors}
        before = {
            name: (steps[: steps.index(first_segment(steps))], model.anchors[name]) for name, steps in alone.items()
        }
        teacher = None if self.teacher is None else model.steps(self.teacher)
        return FrozenPart(self.walks, before, teacher, goals)

    def _goals(self, route: Route) -> dict[str, set[int | None]]:
        """The cuts, by anchor, at which a route's features are to match the anchor's own."""
        last = route.segments[-1]
        if self.args.match == "stitch":
            goals: dict[str, set[int | None]] = {}
            for point in route.stitch_points:
                goals.setdefault(point.target, set()).add(point.target_cut)
            return goals
        later = range(last.start + 1, self.model.anchors[last.anchor].depth + 1)
        return {last.anchor: {None, *(later if self.args.match == "later" else ())}}

    def look(self, images: Callable[[], Iterator[Tensor]], fresh: Sequence[Tuned]) -> None:
        """Take the scales of features that are to be matched, and BatchNorm statistics anew.

        Args:
            images: gives a few batches, the same ones each time.
            fresh: what `begin` gave.
        """
        goals = self.frozen.names(self.routes, matching=True) - self.frozen.names(self.routes, matching=False)
        if goals:
            self.scales = goal_scales(self.frozen.compute(next(images()), goals))
        for steps in self.walks.values():
            *front, last = steps[: _last(steps) + 1]
            for tuned in last.tuned:
                if any(tuned is each for each in fresh):
                    assert isinstance(last.module, Anchor)
                    start = tuned.config.start
                    own: list[Callable[[Tensor], Tensor]] = [
                        *self.frozen.wanted[last.module.name].before,
                        partial(last.module, stop=start),
                    ]
                    pairs = ((partial(run_steps, x, own), partial(run_steps, x, front)) for x in images())
                    recalibrate(tuned.tensors(last.module, start), last.module, start, pairs)

    def _rest(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """What is left of a route after what is known of frozen networks, its end compiled if that was asked for."""
        first = steps.index(first_segment(steps))
        rest = list(steps if steps[first].tuned else steps[first + 1 :])
        if self.args.torch_compile and _last(steps) > first:
            at = _last(rest)
            end = rest[at].bake()
            end.compile(backend=self.args.torch_compile_backend)
            rest[at] = Step(rest[at].name, end, rest[at].shape)
        return tuple(rest)

    def losses(
        self,
        batch: Mapping[str, Tensor],
        drawn: Sequence[Route],
        matching: bool,
        in_place: bool,
        autocast: Callable[[], AbstractContextManager],
    ) -> Iterator[Tensor]:
        """The loss of each route in turn; what the routes share is computed once, without gradients.

        Args:
            batch: ``pixel_values``, or what `FrozenPart.compute` gives of them; perhaps ``labels``.
            drawn: the routes.
            matching: match features; else learn the task.
            in_place: the first route teaches the others.
            autocast: for mixed precision.
        """
        known = batch
        if "pixel_values" in batch:
            images = batch["pixel_values"].to(self.model.dtype)
            with autocast():
                known = self.frozen.compute(images, self.frozen.names(drawn, matching))
        taught = known.get(TEACHER)
        for index, route in enumerate(drawn):
            name = self.frozen.front(route)
            start = images if name is None else known[name].to(self.model.dtype)
            with autocast():
                if matching:
                    loss = self._match(route, start, known)
                else:
                    logits = run_steps(start, self.rest[route]).float()
                    loss = task_loss(
                        logits, batch.get("labels"), taught, self.args.distillation, self.args.temperature
                    )
                    if index == 0 and in_place and self.args.distillation:
                        taught = logits.detach()
            yield loss

    def _match(self, route: Route, start: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """How far a route's features are from those of the anchors themselves."""
        steps = self.walks[route]
        first, at = steps.index(first_segment(steps)), _last(steps)
        before = steps[: at + 1] if steps[first].tuned else steps[first + 1 : at + 1]
        if self.args.match == "stitch":
            x, found, points = start, dict[str, Tensor](), list(route.stitch_points)
            for step in before[:-1]:
                x = step(x)
                if points and step.name == points[0].name:
                    point = points.pop(0)
                    found[goal_name(point.target, point.target_cut)] = x
            return matching_loss(found, known, self.scales)
        x, last, segment = run_steps(start, before[:-1]), steps[at], route.segments[-1]
        stops = self._goals(route)[segment.anchor]
        assert isinstance(last.module, Anchor)
        tensors = last.replaced(segment.start, None)
        got = last.module.capture(x, stops, segment.start, tensors=tensors, features=True)
        return matching_loss({goal_name(segment.anchor, cut): got[cut] for cut in stops}, known, self.scales)

    def saliency(self, route: Route) -> float:
        """Mean |gradient x weight| over what a route alone trains (ESTA, arXiv 2311.17352)."""
        own = {f"stitches.{point.name}" for point in route.stitch_points}
        own |= {f"tuned.{key}" for key in tuned_keys(route)[-1] if key.kind not in SHARED_KINDS}
        products = [
            (p.grad * p).detach().abs().flatten()
            for key in own & self.modules.keys()
            for p in self.modules[key].parameters()
            if p.grad is not None
        ]
        return torch.cat(products).mean().item() if products else 0.0


def _last(steps: Sequence[Step]) -> int:
    """Where the last step stands that runs part of an anchor."""
    return max(index for index, step in enumerate(steps) if step.segment is not None)
