"""Steps: what a route runs, one after the other. Everything that walks a route walks these."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.routes.route import Route, Segment
from restnet_hf.stitches.layers import Stitch
from restnet_hf.stitches.tuning import Tuned, tuned_tensors


@dataclass(frozen=True)
class Step:
    """One thing to run: a segment of an anchor, or a module between or after segments.

    Args:
        name: equal names are equal work.
        module: the anchor, stitch, conversion of images, order of labels, or head.
        shape: of its input for one image, (1, ...).
        segment: the part of the anchor to run; None for any other module.
        tuned: what takes the place of the anchor's own weights.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    segment: Segment | None = None
    tuned: tuple[Tuned, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        if self.segment is None:
            return self.module(x)
        return self.module(x, self.segment.start, self.segment.stop, self.replaced)

    def replaced(self, start: int, stop: int | None) -> Mapping[str, Tensor]:
        """What takes the place of the anchor's own weights between two cuts, by name."""
        if not self.tuned:
            return {}
        assert isinstance(self.module, Anchor)
        return tuned_tensors(self.tuned, self.module, start, stop)

    def bake(self) -> nn.Module:
        """A plain module of its own that does the same."""
        if self.segment is not None:
            assert isinstance(self.module, Anchor)
            start, stop = self.segment.start, self.segment.stop
            return self.module.bake(start, stop, self.replaced(start, stop))
        return self.module.bake() if isinstance(self.module, Stitch) else copy.deepcopy(self.module)

    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the step uses: those that `bake` keeps."""
        if self.segment is not None:
            assert isinstance(self.module, Anchor)
            return self.module.own_parameters(self.segment.start, self.segment.stop).values()
        return self.module.parameters()


Walk = tuple[Route, Sequence[Step]]


def split_at_shared_cuts(walks: Sequence[Walk]) -> list[Walk]:
    """The same walks with segments in pieces, so that routes that leave an anchor at different cuts share steps."""
    stops: dict[tuple[str, int], set[int]] = {}
    for _, steps in walks:
        for step in steps:
            if step.segment is not None and step.segment.stop is not None:
                stops.setdefault((step.segment.anchor, step.segment.start), set()).add(step.segment.stop)
    return [(route, [piece for step in steps for piece in _pieces(step, stops)]) for route, steps in walks]


def split_at_cuts(steps: Iterable[Step]) -> list[Step]:
    """The same steps with segments in pieces from cut to cut."""
    found = []
    for step in steps:
        if step.segment is None:
            found.append(step)
        else:
            assert isinstance(step.module, Anchor)
            start, end = step.segment.start, step.module.depth + 1
            found += _pieces(step, {(step.segment.anchor, start): set(range(start + 1, end))})
    return found


def _pieces(step: Step, stops: dict[tuple[str, int], set[int]]) -> list[Step]:
    segment = step.segment
    if segment is None:
        return [step]
    assert isinstance(step.module, Anchor)
    inner = stops.get((segment.anchor, segment.start), set())
    marks = [segment.start, *sorted(m for m in inner if segment.stop is None or m < segment.stop), segment.stop]
    pieces = []
    for start, stop in pairwise(marks):
        assert start is not None
        shape = step.shape if start == segment.start else step.module.layout(start).shape(1)
        piece = Segment(segment.anchor, start, stop)
        pieces.append(replace(step, name=step.name.replace(str(segment), str(piece)), shape=shape, segment=piece))
    return pieces


def walk_tree(x: Tensor, walks: Sequence[Walk]) -> Iterator[tuple[Route, Tensor]]:
    """Run many routes on the same images, each shared beginning once, depth first; yields (route, logits).

    Args:
        x: images (N, 3, H, W).
        walks: routes with their steps, from `split_at_shared_cuts`.
    """
    yield from ((route, x) for route, steps in walks if not steps)
    going = sorted((walk for walk in walks if walk[1]), key=lambda walk: walk[1][0].name)
    for _, group in groupby(going, key=lambda walk: walk[1][0].name):
        same = list(group)
        yield from walk_tree(same[0][1][0](x), [(route, steps[1:]) for route, steps in same])


def run_steps(x: Tensor, steps: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """Run one route."""
    for step in steps:
        x = step(x)
    return x


def run_with_states(
    x: Tensor, steps: Iterable[Step], wanted: bool | Sequence[int]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Run one route; returns its logits, and its activations at cuts.

    Args:
        x: images (N, 3, H, W).
        steps: steps of the route.
        wanted: True for all activations, or the positions of some, with None in the place of the others.
    """
    states: list[Tensor | None] = []
    for step in split_at_cuts(steps):
        x = step(x)
        if isinstance(step.module, Stitch) or (step.segment is not None and step.segment.stop is not None):
            states.append(x)
    if not isinstance(wanted, bool):
        kept = {range(len(states))[index] for index in wanted}
        states = [state if index in kept else None for index, state in enumerate(states)]
    return x, tuple(states)


class Reorder(nn.Module):
    """Logits (N, classes) in another order of the classes."""

    order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return logits.index_select(-1, self.order)
