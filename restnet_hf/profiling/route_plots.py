"""Plots of routes: the blocks of the anchors as boxes as wide as their MACs, those that run filled, and stitches."""

from __future__ import annotations  # matplotlib takes long to import, and is imported only to draw

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.profiling.plots import ANCHOR, CASCADE, PALE, STITCHED, new_figure, save_figure
from restnet_hf.routes.route import Segment
from restnet_hf.steps import Step
from restnet_hf.stitches.layers import Stitch


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_WIDTH, GAP = 0.012, 0.01  # of a box and between stages, as shares of the route's MACs
LANE, BOX = 1.0, 0.55  # heights of a lane and of a box
COLORS = (STITCHED, ANCHOR, CASCADE)  # of the first, second and third anchor, and again from the first on


@dataclass(frozen=True)
class _Box:
    """A block of an anchor: where it is drawn, and whether it runs."""

    x: float
    width: float
    runs: bool


def _resolution(anchor: Anchor, block: int) -> tuple[int, ...]:
    """What tells stages apart: the shape of the activation that a block returns, without the number of channels."""
    if block >= anchor.depth:
        return ()
    shape = anchor.cuts[block].layout.shape(1)
    return shape[2:] if len(shape) == 4 else shape[1:2]


def _boxes(anchor: Anchor, macs: Sequence[int], segment: Segment, at: float, unit: float) -> tuple[list[_Box], float]:
    """The blocks of an anchor, placed so that its segment begins at a position; and where the segment ends."""
    stop = len(macs) if segment.stop is None else segment.stop
    places, x = list[tuple[float, float]](), 0.0
    for block, cost in enumerate(macs):
        if block and _resolution(anchor, block) != _resolution(anchor, block - 1):
            x += GAP * unit
        width = max(cost, LEAST_WIDTH * unit)
        places.append((x, width))
        x += width
    shift = at - places[segment.start][0]
    boxes = [_Box(x + shift, width, segment.start <= number < stop) for number, (x, width) in enumerate(places)]
    return boxes, boxes[stop - 1].x + boxes[stop - 1].width


def draw_route(axes: Axes, steps: Sequence[Step], title: str, colors: Mapping[str, str], table: MacsTable) -> None:
    """Draw a route.

    Args:
        axes: axes to draw in.
        steps: steps of the route.
        title: line of text above the route.
        colors: colour of the boxes of each anchor.
        table: table of MACs, which counts each block once.
    """
    from matplotlib.patches import Rectangle

    total = table.macs(steps)
    segments = [step for step in steps if step.segment is not None]
    at, lane, before = 0.0, 0, None
    for step in steps:
        if step.segment is None:
            if isinstance(step.module, Stitch):
                before = at
            continue
        assert isinstance(step.module, Anchor)
        y = -lane * LANE
        start = at if before is None else before + 4 * GAP * total
        boxes, end = _boxes(step.module, table.blocks(step.module), step.segment, start, total)
        if before is not None:
            axes.plot([before, start], [y + LANE, y], color="black", linewidth=1.5, zorder=3)
            axes.plot([(before + start) / 2], [y + LANE / 2], "D", color="black", markersize=6, zorder=4)
        color = colors[step.segment.anchor]
        for box in boxes:
            look: dict[str, Any] = {"facecolor": color if box.runs else "none", "alpha": 1.0 if box.runs else 0.6}
            edge = "white" if box.runs else PALE
            axes.add_patch(Rectangle((box.x, y - BOX / 2), box.width, BOX, edgecolor=edge, linewidth=0.7, **look))
        name: dict[str, Any] = {"fontsize": 8, "va": "bottom", "ha": "left", "parse_math": False}
        axes.text(boxes[0].x, y + BOX / 2 + 0.04, step.segment.anchor, **name)
        at, before, lane = end, None, lane + 1
    axes.autoscale_view()
    axes.set_ylim(-(len(segments) - 1) * LANE - 0.45, 0.62)
    axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    axes.set_axis_off()


def plot_route(
    walks: Sequence[tuple[str, Sequence[Step]]],
    path: str | os.PathLike[str] | None = None,
    table: MacsTable | None = None,
) -> Figure:
    """Plot routes, one below the other. Boxes are blocks, as wide as their MACs, and gaps divide stages.

    Args:
        walks: title and steps of each route.
        path: file of the picture; None for none.
        table: table of MACs, where blocks were counted before.

    Raises:
        ValueError: there are no routes.
    """
    if not walks:
        raise ValueError("there is no route to plot")
    table = MacsTable() if table is None else table
    lanes = [max(1, sum(step.segment is not None for step in steps)) for _, steps in walks]
    figure = new_figure(6.4, sum(0.35 + 0.55 * each for each in lanes))
    heights = [0.35 + 0.55 * each for each in lanes]
    places = figure.subplots(len(walks), 1, squeeze=False, sharex=True, height_ratios=heights)
    names = dict.fromkeys(step.segment.anchor for _, steps in walks for step in steps if step.segment is not None)
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    for (title, steps), (axes,) in zip(walks, places, strict=True):
        draw_route(axes, steps, title, colors, table)
    if path is not None:
        save_figure(figure, path)
    return figure
