"""Plot of accuracy against cost."""

from __future__ import annotations  # matplotlib takes long to import, and is imported only to draw

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from restnet_hf.files import atomic_file
from restnet_hf.routes.fronts import anchor_ends, measured_rows
from restnet_hf.routes.profile import AnyProfiled, Profile, ProfiledRoute


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_tradeoff(profile: Profile, path: str | os.PathLike[str], before: Profile | None = None) -> None:
    """Plot accuracy against MACs of every route and cascade, with the anchors and the straight line between them.

    What nothing else beats in both is ringed, and stairs show the best accuracy within each budget. The MACs of
    cascades are means over images.

    Args:
        profile: profile whose routes have MACs and accuracy.
        path: file of the picture.
        before: profile of the same routes before training, drawn pale.

    Raises:
        ValueError: a route has no MACs or no accuracy.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()

    cost = profile.default_cost

    def draw(rows: Iterable[AnyProfiled], marker: str, **style: Any) -> None:
        points = [(_macs(row, cost) / 1e6, 100 * row.scores["accuracy"]) for row in rows]
        if points:
            axes.plot(*zip(*points, strict=True), marker, **style)

    anchors = [row for row in profile.routes if row.route.is_anchor]
    tuned = [row for row in profile.routes if row.route.tuned]
    stitched = [row for row in profile.routes if len(row.route.segments) > 1]
    pareto = profile.pareto()  # raises where a route has no MACs or no accuracy
    front = profile.front() or pareto
    draw(
        anchor_ends(profile.routes, "macs", "accuracy") or (), ":", color="tab:red", zorder=0, label="between anchors"
    )
    draw(front, "-", color="0.7", zorder=0, drawstyle="steps-post", label="best within a budget")
    draw(front, "o", markersize=11, markerfacecolor="none", markeredgecolor="0.4", label="on the front")
    if before is not None and stitched:
        draw(
            (r for r in before.routes if len(r.route.segments) > 1),
            "o",
            color="tab:blue",
            alpha=0.3,
            label="least squares",
        )
    draw(measured_rows(profile.cascades, cost, "accuracy"), "s", color="tab:orange", label="cascade")
    if stitched:
        draw(stitched, "o", color="tab:blue", label="stitched")
    draw(tuned, "^", color="tab:green", label="anchor tuned")
    draw(anchors, "*", color="tab:red", markersize=14, label="anchor alone")
    _name_anchors(axes, anchors)
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("million MACs for one image" + (", mean over images" if profile.cascades else ""))
    axes.set_ylabel("accuracy, %")
    if profile.routes:
        axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _name_anchors(axes: Axes, anchors: Iterable[ProfiledRoute]) -> None:
    """Write the name of each anchor above its mark."""
    for row in anchors:
        axes.annotate(
            row.route.segments[0].anchor,
            (row.costs["macs"] / 1e6, 100 * row.scores["accuracy"]),
            textcoords="offset points",
            xytext=(0, 12),
            ha="center",
            fontsize=8,
        )


def _macs(row: AnyProfiled, cost: str) -> float:
    return row.costs[cost] if cost in row.costs else row.costs["macs"]


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, which is replaced only once it is whole."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
