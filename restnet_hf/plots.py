"""Figures: arrays in, files out."""

from __future__ import annotations  # matplotlib takes long to import, and is imported when something is drawn

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from restnet_hf.files import written_whole
from restnet_hf.profiles import Profile, ProfiledRoute
from restnet_hf.ranking import Similarity
from restnet_hf.routes import Route


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_similarity(similarity: Similarity, routes: Iterable[Route], path: str | os.PathLike[str]) -> None:
    """Heat map of the similarity of two anchors, with the cuts that the routes join."""
    from matplotlib.figure import Figure

    rows, columns = similarity.values.shape
    figure = Figure(figsize=(2.5 + 0.35 * columns, 1.8 + 0.35 * rows), layout="constrained")
    axes = figure.add_subplot()
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    image = axes.imshow(
        similarity.values, cmap="viridis", extent=extent, aspect="auto", vmin=_least(similarity), vmax=1.0
    )
    points = [point for route in routes for point in route.stitch_points]
    axes.scatter(
        [p.target_cut for p in points], [p.source_cut for p in points], s=90, c="none", edgecolors="red", linewidths=2
    )
    axes.set_xticks(range(1, columns + 1))
    axes.set_yticks(range(1, rows + 1))
    axes.set_xlabel(f"cut of {similarity.end} (replaced)")
    axes.set_ylabel(f"cut of {similarity.front} (comes in)")
    settings = similarity.settings
    images = f", {settings['images']} images" if "images" in settings else ""
    axes.set_title(f"{settings['method']}{images}\ncircles: stitches", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.9)
    _write(figure, path)


def _least(similarity: Similarity) -> float:
    """0, or where values are below it, their 10th percentile: a few bad pairs hide nothing."""
    values = similarity.values.compressed()
    return min(0.0, float(np.percentile(values, 10))) if len(values) else 0.0


def plot_tradeoff(profile: Profile, path: str | os.PathLike[str], before: Profile | None = None) -> None:
    """Accuracy against MACs of every route, anchors marked, with the Pareto front.

    Args:
        profile: with MACs and accuracies.
        path: of the picture.
        before: the same routes before training, drawn pale.

    Raises:
        ValueError: a route has no MACs or no accuracy.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()

    def draw(rows: Iterable[ProfiledRoute], marker: str, **style: Any) -> None:
        points = [(row.costs["macs"] / 1e6, 100 * row.scores["accuracy"]) for row in rows]
        if points:
            axes.plot(*zip(*points, strict=True), marker, **style)

    anchors = [row for row in profile.routes if len(row.route.segments) == 1]
    stitched = [row for row in profile.routes if len(row.route.segments) > 1]
    draw(profile.pareto(), "-", color="0.7", zorder=0, label="best for its cost")
    if before is not None and stitched:
        draw(
            (r for r in before.routes if len(r.route.segments) > 1),
            "o",
            color="tab:blue",
            alpha=0.3,
            label="least squares",
        )
    if stitched:
        draw(stitched, "o", color="tab:blue", label="stitched")
    draw(anchors, "*", color="tab:red", markersize=14, label="anchor alone")
    for row in anchors:
        axes.annotate(
            row.route.segments[0].anchor,
            (row.costs["macs"] / 1e6, 100 * row.scores["accuracy"]),
            textcoords="offset points",
            xytext=(0, 12),
            ha="center",
            fontsize=8,
        )
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("million MACs for one image")
    axes.set_ylabel("accuracy, %")
    if profile.routes:
        axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    _write(figure, path)


def _write(figure: Figure, path: str | os.PathLike[str]) -> None:
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120)
