"""Plots of accuracy against cost and of routes, in one style: colours that colour-blind people tell apart."""

from __future__ import annotations  # matplotlib takes long to import, and is imported only to draw

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from restnet_hf.files import atomic_file
from restnet_hf.routes.fronts import anchor_ends, front_rows, measured_rows
from restnet_hf.routes.profile import AnyProfiled, Profile, ProfiledCascade, ProfiledRoute


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision tell apart; marks differ in shape besides
STITCHED, ANCHOR, CASCADE, TUNED, PALE = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#999999"
AXES = {  # of costs: label, and the number that values are divided by
    "macs": ("million MACs for one image", 1e6),
    "mean_macs": ("million MACs for one image, mean over images", 1e6),
    "latency_ms": ("latency for one image, ms", 1.0),
    "mean_latency_ms": ("latency for one image, ms, mean over images", 1.0),
    "memory_mb": ("memory, MB", 1.0),
    "params": ("thousand parameters", 1e3),
    "energy_j": ("energy for one image, J", 1.0),
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in the style of all plots, readable at a width of 300 pixels too.

    Args:
        width: width of the figure in inches.
        height: height of the figure in inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_tradeoff(
    profile: Profile,
    path: str | os.PathLike[str] | None = None,
    before: Profile | None = None,
    *,
    cost: str | None = None,
    score: str = "accuracy",
    active: object = None,
) -> Figure:
    """Plot a score against a cost of every route and cascade, with the anchors and the straight line between them.

    What nothing else beats in both is ringed, and stairs show the best score within each budget. The mark of each row
    has the SVG id ``entry-`` and its number in ``profile.rows``.

    Args:
        profile: profile whose routes have the cost and the score.
        path: file of the picture; None for none.
        before: profile of the same routes before training, drawn pale.
        cost: name of the cost; by default MACs, those of cascades as means over images.
        score: name of the score.
        active: route or cascade whose mark has a black ring.

    Raises:
        ValueError: a route has no such cost or score.
    """
    cost = cost or profile.default_cost
    plain = cost.removeprefix("mean_")
    missing = [str(row.route) for row in profile.routes if plain not in row.costs or score not in row.scores]
    if missing:
        raise ValueError(f"'{missing[0]}' has no {plain} or no {score}; profile the model again")
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    label, scale = AXES.get(cost, (cost.replace("_", " "), 1.0))

    def place(row: AnyProfiled) -> tuple[float, float]:
        return row.costs.get(cost, row.costs.get(plain, 0.0)) / scale, 100 * row.scores[score]

    rows = [row for row in profile.rows if isinstance(row, ProfiledRoute) or cost in row.costs]
    compared = [row.with_means() if isinstance(row, ProfiledRoute) else row for row in rows]
    measured = measured_rows(compared, cost, score)
    front = {id(row) for row in front_rows(measured, cost, score)} if len(measured) > 1 else set()
    best = [row for row in compared if id(row) in front]
    best.sort(key=place)
    _lines(axes, [place(row) for row in best], [place(r) for r in anchor_ends(profile.routes, plain, score) or ()])
    if before is not None:
        pale = [place(row) for row in before.routes if len(row.route.segments) > 1]
        axes.plot(*_columns(pale), "o", color=STITCHED, alpha=0.3, label="least squares")
    _marks(axes, profile, [(row, place(row)) for row in rows], active)
    _name_anchors(axes, [(row, place(row)) for row in profile.routes if row.route.is_anchor])
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel(label)
    axes.set_ylabel(f"{score}, %")
    if profile.routes:
        axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    if path is not None:
        save_figure(figure, path)
    return figure


Point = tuple[float, float]


def _columns(points: Iterable[Point]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    x, y = zip(*points, strict=True) if (points := list(points)) else ((), ())
    return x, y


def _lines(axes: Axes, front: list[Point], anchors: list[Point]) -> None:
    """Draw the line between the anchors, and the best score within each budget."""
    if anchors:
        axes.plot(*_columns(anchors), ":", color=ANCHOR, zorder=0, label="between anchors")
    if front:
        axes.plot(*_columns(front), "-", color="0.7", zorder=0, drawstyle="steps-post", label="best within a budget")
        rings: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "0.4"}
        axes.plot(*_columns(front), "o", label="on the front", **rings)


def _marks(axes: Axes, profile: Profile, places: Iterable[tuple[AnyProfiled, Point]], active: object) -> None:
    """Draw a mark for each row, with its number as id; the legend names each kind once."""
    numbers = {id(row): number for number, row in enumerate(profile.rows)}
    named = set[str]()
    for row, (x, y) in places:
        kind, marker, color, size = _look(row)
        (mark,) = axes.plot([x], [y], marker, color=color, markersize=size, label=None if kind in named else kind)
        mark.set_gid(f"entry-{numbers[id(row)]}")
        if active is not None and str(row.route) == str(active):
            axes.plot([x], [y], "o", markersize=17, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
        named.add(kind)


def _look(row: AnyProfiled) -> tuple[str, str, str, float]:
    """Kind, marker, colour and size of the mark of a row."""
    if isinstance(row, ProfiledCascade):
        return "cascade", "s", CASCADE, 6
    if row.route.tuned:
        return "anchor tuned", "^", TUNED, 7
    if row.route.is_anchor:
        return "anchor alone", "*", ANCHOR, 14
    return "stitched", "o", STITCHED, 6


def _name_anchors(axes: Axes, anchors: Iterable[tuple[ProfiledRoute, Point]]) -> None:
    """Write the name of each anchor above its mark."""
    for row, place in anchors:
        name = row.route.segments[0].anchor
        options: dict[str, Any] = {"textcoords": "offset points", "xytext": (0, 12), "ha": "center", "fontsize": 8}
        axes.annotate(name, place, parse_math=False, **options)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file, which is replaced only once it is whole."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
