"""FrozenPart: the activations and logits of frozen networks that training needs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.routes.route import Route
from restnet_hf.steps import Step, first_segment, run_steps
from restnet_hf.training.teachers import Teacher


IMAGES = "images"  # name of the images themselves, from which routes start whose first segment trains


@dataclass
class _AnchorCuts:
    """The cuts of one anchor at which activations are needed; None stands for the input of its classifier.

    Args:
        before: steps that prepare images for the anchor.
        anchor: the anchor that is cut.
        fronts: cuts at which a stitch takes the activation.
        goals: cuts at which the activation is a goal of feature matching.
    """

    before: tuple[Step, ...]
    anchor: Anchor
    fronts: set[int | None] = field(default_factory=set)
    goals: set[int | None] = field(default_factory=set)


class FrozenPart:
    """The outputs of networks that do not train, by name.

    ``front-ANCHOR-CUT`` is the activation that a stitch takes, ``goal-ANCHOR-CUT`` an activation that a route should
    match, where ``final`` for CUT is the input of the classifier, ``images`` the images themselves for routes whose
    first segment is tuned, and ``teacher-NAME`` the logits that are distilled.

    Args:
        walks: routes with their steps.
        before: for each anchor, the steps that prepare images for it, and the anchor.
        teacher: classifier that is distilled; None for no distillation.
        goals: for each route that matches features, the cuts by anchor at which the anchor's own activation is the
            goal; None stands for the input of the classifier.
    """

    def __init__(
        self,
        walks: Mapping[Route, Sequence[Step]],
        before: Mapping[str, tuple[tuple[Step, ...], Anchor]],
        teacher: Teacher | None = None,
        goals: Mapping[Route, Mapping[str, Iterable[int | None]]] | None = None,
    ) -> None:
        self.walks, self.teacher, self.goals = walks, teacher, goals or {}
        self.cuts = {name: _AnchorCuts(*parts) for name, parts in before.items()}
        for first in map(first_segment, walks.values()):
            if not first.tuned and first.segment:
                self.cuts[first.segment.anchor].fronts.add(first.segment.stop)
        for name, goal_cuts in (item for each in self.goals.values() for item in each.items()):
            self.cuts[name].goals.update(goal_cuts)

    def names(self, routes: Iterable[Route], matching: bool) -> set[str]:
        """Names of the outputs that some routes need.

        Args:
            routes: routes that train at a step.
            matching: whether the routes match features, or learn the task.
        """
        fronts = {self.front(route) for route in routes}
        if not matching:
            return fronts | ({self.teacher.output} if self.teacher else set())
        goals = (item for route in routes for item in self.goals.get(route, {}).items())
        return fronts | {goal_name(name, cut) for name, cuts in goals for cut in cuts}

    def front(self, route: Route) -> str:
        """Name of what the trained steps of a route start from: the output of its first segment, or the images."""
        first = first_segment(self.walks[route])
        if first.tuned or first.segment is None:
            return IMAGES
        return _name("front", first.segment.anchor, first.segment.stop)

    @torch.no_grad()
    def compute(self, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Compute outputs, running each network once.

        An anchor that teaches and is front runs once for both; its final features as a goal take a second run.

        Args:
            images: images (N, 3, H, W).
            names: names of the outputs to compute.
        """
        needed = set(names)
        outputs: dict[str, Tensor] = {IMAGES: images} if IMAGES in needed else {}
        taught: dict[str, Tensor] = {}  # logits of the anchors that teach
        teacher = self.teacher if self.teacher and self.teacher.output in needed else None
        for name, cuts in self.cuts.items():
            fronts = {cut for cut in cuts.fronts if _name("front", name, cut) in needed}
            goals = {cut for cut in cuts.goals if goal_name(name, cut) in needed}
            teaches = teacher is not None and name in teacher.anchors
            if not (fronts or goals or teaches):
                continue
            x = run_steps(images, cuts.before)
            whole: set[int | None] = {None} if teaches else set()
            if teaches and None in goals:  # one run cannot end in both logits and features
                outputs |= _named(cuts.anchor.capture(x, {None}, features=True), name, set(), {None})
                goals -= {None}
            captured = cuts.anchor.capture(x, fronts | goals | whole, features=not teaches)
            if teacher is not None and teaches:
                taught[name] = teacher.finish(name, captured[None])
            outputs |= _named(captured, name, fronts, goals)
        if teacher is not None:
            outputs[teacher.output] = teacher.combine(images, taught)
        return outputs

    def specs(self, cut_dtype: torch.dtype, classes: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape for one image and type of each output, as it is cached.

        Args:
            cut_dtype: type of activations; logits are cached in float32, images in float16.
            classes: number of classes of the logits.
        """
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, anchor_cuts in self.cuts.items():
            anchor = anchor_cuts.anchor
            final = (anchor.search_result.features or anchor.search_result.classes,)
            for kind, cuts in (("front", anchor_cuts.fronts), ("goal", anchor_cuts.goals)):
                for cut in cuts:
                    shape = final if cut is None else anchor.layout(cut).shape(1)[1:]
                    specs[_name(kind, name, cut)] = (shape, cut_dtype)
        tuned = [steps for steps in self.walks.values() if first_segment(steps).tuned]
        if tuned:
            specs[IMAGES] = (tuned[0][0].shape[1:], torch.float16)
        if self.teacher:
            specs[self.teacher.output] = ((classes,), torch.float32)
        return specs


def goal_name(anchor: str, cut: int | None) -> str:
    """Name of an activation that routes should match."""
    return _name("goal", anchor, cut)


def _name(kind: str, anchor: str, cut: int | None) -> str:
    return f"{kind}-{anchor}-{'final' if cut is None else cut}"


def _named(
    captured: Mapping[int | None, Tensor], anchor: str, fronts: Iterable[int | None], goals: Iterable[int | None]
) -> dict[str, Tensor]:
    """Captured activations of an anchor under their names."""
    kinds = (("front", fronts), ("goal", goals))
    return {_name(kind, anchor, cut): captured[cut] for kind, cuts in kinds for cut in cuts}
