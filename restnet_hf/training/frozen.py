"""What the frozen parts of routes say of images, computed or read from disk: all that training needs of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.routes.route import Route
from restnet_hf.steps import Step, run_steps


TEACHER = "teacher"  # name of the logits that routes learn from


@dataclass
class _Wanted:
    """Of one anchor: what brings images to it, and the cuts at which its activation is wanted; None for features."""

    before: tuple[Step, ...]
    anchor: Anchor
    fronts: set[int | None] = field(default_factory=set)
    goals: set[int | None] = field(default_factory=set)


class FrozenPart:
    """Everything that routes need of networks that do not train, by name.

    ``front-ANCHOR-CUT`` is the activation that a stitch takes, ``goal-ANCHOR-CUT`` one that it should lead to, with
    ``final`` for CUT what a classifier takes, ``teacher`` the logits to distil from.

    Args:
        walks: routes with their steps.
        before: by anchor, the steps that bring images to it.
        teacher: the route to distil from, with its steps.
        goals: for each route that is to match features, the cuts of anchors at which their own activation is a goal;
            None stands for what the classifier takes.
    """

    def __init__(
        self,
        walks: Mapping[Route, Sequence[Step]],
        before: Mapping[str, tuple[tuple[Step, ...], Anchor]],
        teacher: Sequence[Step] | None = None,
        goals: Mapping[Route, Mapping[str, Iterable[int | None]]] | None = None,
    ) -> None:
        self.walks, self.teacher, self.goals = walks, teacher, goals or {}
        self.wanted = {name: _Wanted(*parts) for name, parts in before.items()}
        for route, steps in walks.items():
            first = route.segments[0]
            if not first_segment(steps).tuned:
                self.wanted[first.anchor].fronts.add(first.stop)
        for name, cuts in (item for each in self.goals.values() for item in each.items()):
            self.wanted[name].goals.update(cuts)

    def names(self, routes: Iterable[Route], matching: bool) -> set[str]:
        """The names of what some routes need, to match features or for their task."""
        fronts = {name for route in routes if (name := self.front(route))}
        if not matching:
            return fronts | ({TEACHER} if self.teacher else set())
        goals = (item for route in routes for item in self.goals.get(route, {}).items())
        return fronts | {goal_name(name, cut) for name, cuts in goals for cut in cuts}

    def front(self, route: Route) -> str | None:
        """The name of what a route's first segment gives; None where that trains."""
        first = route.segments[0]
        if first_segment(self.walks[route]).tuned:
            return None
        return _name("front", first.anchor, first.stop)

    @torch.no_grad()
    def compute(self, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """What is named, for images (N, 3, H, W), each network run once.

        A teacher that is also a front goes on from there; features that are goals are another run of it.
        """
        left = set(names)
        found: dict[str, Tensor] = {}
        taught_by = None if self.teacher is None else first_segment(self.teacher).module
        for name, wanted in self.wanted.items():
            stops = {cut for cut in wanted.fronts if _name("front", name, cut) in left}
            goals = {cut for cut in wanted.goals if goal_name(name, cut) in left}
            teaches = wanted.anchor is taught_by and TEACHER in left
            if not (stops or goals or teaches):
                continue
            x = run_steps(images, wanted.before)
            whole: set[int | None] = {None} if teaches else set()
            if teaches and None in goals:  # one run cannot end in both logits and features
                found |= _named(wanted.anchor.capture(x, {None}, features=True), name, set(), {None})
                goals -= {None}
            got = wanted.anchor.capture(x, stops | goals | whole, features=not teaches)
            if teaches:
                assert self.teacher is not None
                at = self.teacher.index(first_segment(self.teacher))
                found[TEACHER] = run_steps(got[None], self.teacher[at + 1 :])
            found |= _named(got, name, stops, goals)
        return found

    def specs(self, cut_dtype: torch.dtype, classes: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape for one image, and type, of all of it on disk; logits keep float32."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, wanted in self.wanted.items():
            final = (wanted.anchor.found.features or wanted.anchor.found.classes,)
            for kind, cuts in (("front", wanted.fronts), ("goal", wanted.goals)):
                for cut in cuts:
                    shape = final if cut is None else wanted.anchor.layout(cut).shape(1)[1:]
                    found[_name(kind, name, cut)] = (shape, cut_dtype)
        if self.teacher:
            found[TEACHER] = ((classes,), torch.float32)
        return found


def goal_name(anchor: str, cut: int | None) -> str:
    """The name of an activation that routes should lead to."""
    return _name("goal", anchor, cut)


def _name(kind: str, anchor: str, cut: int | None) -> str:
    return f"{kind}-{anchor}-{'final' if cut is None else cut}"


def first_segment(steps: Sequence[Step]) -> Step:
    """The first step that runs part of an anchor."""
    return next(step for step in steps if step.segment is not None)


def _named(
    got: Mapping[int | None, Tensor], anchor: str, fronts: Iterable[int | None], goals: Iterable[int | None]
) -> dict[str, Tensor]:
    each = (("front", fronts), ("goal", goals))
    return {_name(kind, anchor, cut): got[cut] for kind, cuts in each for cut in cuts}
