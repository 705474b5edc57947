"""Parts: what the files of an exported cascade compute, so that what its routes share is one file that runs once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from restnet_hf.cascading import Place, Stage, plan_stages
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.route import Route
from restnet_hf.runtime.exported_cascades import IMAGES, ExportedStage
from restnet_hf.steps import Step


@dataclass(frozen=True)
class Part:
    """A part of a route's run, under the name that its entry has.

    Args:
        name: the route, and which of its steps are in the part.
    """

    name: str

    def __str__(self) -> str:
        return self.name


RouteOrPart = Route | Part


def plan_parts(
    model: StitchedModelForImageClassification, cascades: Sequence[Cascade], shared: bool
) -> tuple[Mapping[Part, Sequence[Step]], Mapping[Cascade, tuple[ExportedStage, ...]]]:
    """The parts that cascades run besides whole routes, and their stages.

    Args:
        model: model of the routes.
        cascades: cascades of the model's routes.
        shared: whether what routes share is a part of its own; else all stages run whole routes.

    Returns:
        The steps of each part, and the stages of each cascade.
    """
    parts, stages = dict[Part, Sequence[Step]](), dict[Cascade, tuple[ExportedStage, ...]]()
    names = dict[tuple[Place, Place], str]()
    for cascade in cascades:
        if not shared:
            stages[cascade] = tuple(ExportedStage(IMAGES, (str(route),)) for route in cascade.routes)
            continue
        planned = plan_stages([(route, model.steps(route)) for route in cascade.routes])
        ends: dict[Place, str] = {(): IMAGES}
        stages[cascade] = tuple(_split(stage, names, ends, parts) for stage in planned)
    return parts, stages


def _split(
    stage: Stage,
    names: dict[tuple[Place, Place], str],
    ends: dict[Place, str],
    parts: dict[Part, Sequence[Step]],
) -> ExportedStage:
    """Split a stage where later ones begin; names, ends and parts are those so far, to which its own are added."""
    if not stage.start and not stage.saved:
        return ExportedStage(IMAGES, (str(stage.route),))
    stops, own = [*sorted(stage.saved), len(stage.steps)], list[str]()
    begin, place = 0, stage.start
    for stop in stops:
        steps = stage.steps[begin:stop]
        after = (*place, *(step.name for step in steps))
        if (place, after) not in names:
            name = names[place, after] = f"{stage.route} steps {len(place)}:{len(after)}"
            parts[Part(name)] = steps
        own.append(names[place, after])
        ends[after] = own[-1]
        begin, place = stop, after
    return ExportedStage(ends[stage.start], tuple(own))


def cascade_routes(cascades: Sequence[Cascade]) -> list[Route]:
    """The routes of some cascades, each once."""
    return list(dict.fromkeys(route for cascade in cascades for route in cascade.routes))
