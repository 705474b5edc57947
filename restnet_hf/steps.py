"""Steps: the modules that a route runs in turn. Everything that runs or measures a route uses them."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.routes.route import HeadKey, Route, Segment
from restnet_hf.stitches.layers import Stitch
from restnet_hf.stitches.precision import InOwnType, run_in_own_type, weight_dtype
from restnet_hf.stitches.tuning import Tuned, tuned_keys, tuned_tensors


@dataclass(frozen=True)
class Step:
    """One module to run: a segment of an anchor, or a module before, between or after segments.

    Args:
        name: name of the step; steps of equal names do the same work.
        module: the anchor, stitch, conversion of images, order of labels, or head.
        shape: shape of the input for one image, (1, ...).
        segment: the part of the anchor to run; None for any other module.
        tuned: tuned tensors that replace the anchor's own.
        cast: whether the weights of a stitch or head have another type than activations, which are then cast to it and
            back.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    segment: Segment | None = None
    tuned: tuple[Tuned, ...] = ()
    cast: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Run the step on images or an activation (N, ...)."""
        if self.segment is None:
            return run_in_own_type(self.module, x) if self.cast else self.module(x)
        return self.module(x, self.segment.start, self.segment.stop, self.replaced)

    def replaced(self, start: int, stop: int | None) -> Mapping[str, Tensor]:
        """The tensors that replace the anchor's own between two cuts, by name.

        Args:
            start: cut at which the part begins.
            stop: cut at which the part ends; None for the logits.
        """
        if not self.tuned:
            return {}
        assert isinstance(self.module, Anchor)
        return tuned_tensors(self.tuned, self.module, start, stop)

    def bake(self) -> nn.Module:
        """A plain module that computes the same, with copies of the weights."""
        if self.segment is not None:
            assert isinstance(self.module, Anchor)
            start, stop = self.segment.start, self.segment.stop
            return self.module.bake(start, stop, self.replaced(start, stop))
        baked = self.module.bake() if isinstance(self.module, Stitch) else copy.deepcopy(self.module)
        return InOwnType(baked) if self.cast else baked

    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the step uses, which are those of `bake`."""
        if self.segment is not None:
            assert isinstance(self.module, Anchor)
            return self.module.own_parameters(self.segment.start, self.segment.stop).values()
        return self.module.parameters()


Walk = tuple[Route, Sequence[Step]]


def make_steps(model: Any, route: Route, stitches: Mapping[str, nn.Module] | None = None) -> tuple[Step, ...]:
    """The steps of a route of a model, in order.

    Args:
        model: stitched model with the anchors of the route.
        route: route of the model.
        stitches: stitches by name, in place of the model's own, for a route that the model may not have.

    Raises:
        ValueError: the model lacks a stitch or head of the route, or does not have a tuned anchor.
    """
    if route.tuned and stitches is None and route not in model.routes:
        raise ValueError(
            f"there is no route '{route}' yet; add_stitch('{route}') adds it, and train tunes its weights"
        )
    own = model.stitches if stitches is None else stitches
    steps: list[Step] = []
    first, last = route.segments[0].anchor, route.segments[-1].anchor
    dtypes = None, next(model.anchors[first].parameters()).dtype
    if first in model.converters:
        image = (1, 3, *model.preprocessing.image_size)
        steps.append(Step(f"images for {first}", model.converters[first], image))
    points = iter(route.stitch_points)
    for segment, keys in zip(route.segments, tuned_keys(route), strict=True):
        anchor = model.anchors[segment.anchor]
        tuned = {str(key): model.tuned[str(key)] for key in keys if str(key) in model.tuned}
        name = f"{segment} with {', '.join(tuned)}" if tuned else str(segment)
        shape: tuple[int, ...] = (1, 3, *anchor.preprocessing.image_size)
        if segment.start:
            point = next(points)
            if point.name not in own:
                raise ValueError(f"route '{route}' has no stitch yet; call add_stitch('{route}') and fit_stitches")
            shape = model.anchors[point.source].layout(point.source_cut).shape(1)
            cast = weight_dtype(own[point.name]) not in dtypes
            steps.append(Step(point.name, own[point.name], shape, cast=cast))
            shape = anchor.layout(segment.start).shape(1)
        if segment.start != segment.stop:  # nothing runs between two stitches in a row
            steps.append(Step(name, anchor, shape, segment, tuple(tuned.values())))
    if model.heads:
        key = route.head
        if route.tuned and key not in model.heads and stitches is not None:
            key = str(HeadKey(last, route.adapter))  # of which the new route's head would be a copy
        if key not in model.heads:
            raise ValueError(f"route '{route}' has no head yet; call add_stitch with a route of that adapter")
        cast = weight_dtype(model.heads[key]) not in dtypes
        steps.append(Step(f"head of {key}", model.heads[key], (1, model.heads[key].in_features), cast=cast))
    elif last in model.orders:
        steps.append(Step(f"labels of {last}", model.orders[last], (1, model.config.num_labels)))
    return tuple(steps)


def split_step(step: Step, cut: int) -> list[Step]:
    """Split a step that runs part of an anchor at a cut.

    Args:
        step: step with a segment.
        cut: cut between the segment's start and stop.
    """
    assert step.segment is not None
    return _pieces(step, {(step.segment.anchor, step.segment.start): {cut}})


def split_at_shared_cuts(walks: Sequence[Walk]) -> list[Walk]:
    """Split segments into pieces, so that routes that leave an anchor at different cuts share steps.

    Args:
        walks: routes with their steps.
    """
    stops: dict[tuple[str, int], set[int]] = {}
    for _, steps in walks:
        for step in steps:
            if step.segment is not None and step.segment.stop is not None:
                stops.setdefault((step.segment.anchor, step.segment.start), set()).add(step.segment.stop)
    return [(route, [piece for step in steps for piece in _pieces(step, stops)]) for route, steps in walks]


def split_at_cuts(steps: Iterable[Step]) -> list[Step]:
    """Split segments into pieces from cut to cut."""
    pieces: list[Step] = []
    for step in steps:
        if step.segment is None:
            pieces.append(step)
        else:
            assert isinstance(step.module, Anchor)
            start, end = step.segment.start, step.module.depth + 1
            pieces += _pieces(step, {(step.segment.anchor, start): set(range(start + 1, end))})
    return pieces


def _pieces(step: Step, stops: dict[tuple[str, int], set[int]]) -> list[Step]:
    """Split a segment at cuts, given by anchor and start of the segment."""
    segment = step.segment
    if segment is None:
        return [step]
    assert isinstance(step.module, Anchor)
    inner = stops.get((segment.anchor, segment.start), set())
    cuts = [segment.start, *sorted(c for c in inner if segment.stop is None or c < segment.stop), segment.stop]
    pieces = []
    for start, stop in pairwise(cuts):
        assert start is not None
        shape = step.shape if start == segment.start else step.module.layout(start).shape(1)
        piece = Segment(segment.anchor, start, stop)
        pieces.append(replace(step, name=step.name.replace(str(segment), str(piece)), shape=shape, segment=piece))
    return pieces


def walk_tree(x: Tensor, walks: Sequence[Walk]) -> Iterator[tuple[Route, Tensor]]:
    """Run many routes on the same images, steps that they share once; yields (route, logits).

    Args:
        x: images (N, 3, H, W).
        walks: routes with their steps, from `split_at_shared_cuts`.
    """
    yield from ((route, x) for route, steps in walks if not steps)
    running = sorted((walk for walk in walks if walk[1]), key=lambda walk: walk[1][0].name)
    for _, group in groupby(running, key=lambda walk: walk[1][0].name):
        same = list(group)
        yield from walk_tree(same[0][1][0](x), [(route, steps[1:]) for route, steps in same])


def run_steps(x: Tensor, steps: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """Run one route; returns its logits (N, classes).

    Args:
        x: images (N, 3, H, W).
        steps: steps of the route.
    """
    for step in steps:
        x = step(x)
    return x


def first_segment(steps: Sequence[Step]) -> Step:
    """The first step that runs part of an anchor."""
    return next(step for step in steps if step.segment is not None)


def run_with_states(
    x: Tensor, steps: Iterable[Step], wanted: bool | Sequence[int]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Run one route; returns its logits, and its activations at cuts.

    Args:
        x: images (N, 3, H, W).
        steps: steps of the route.
        wanted: True for all activations, or the positions of some; the others are None.
    """
    states: list[Tensor | None] = []
    for step in split_at_cuts(steps):
        x = step(x)
        if isinstance(step.module, Stitch) or (step.segment is not None and step.segment.stop is not None):
            states.append(x)
    if not isinstance(wanted, bool):
        positions = {range(len(states))[index] for index in wanted}
        states = [state if index in positions else None for index, state in enumerate(states)]
    return x, tuple(states)


class Reorder(nn.Module):
    """A module that puts logits (N, classes) in another order of classes.

    Args:
        order: index in the input of each class of the output.
    """

    order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Reorder logits (N, classes)."""
        return logits.index_select(-1, self.order)
