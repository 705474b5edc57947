"""Heat maps of similarities."""

from __future__ import annotations  # matplotlib takes long to import, and is imported only to draw

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from restnet_hf.profiling.plots import ANCHOR, new_figure, save_figure
from restnet_hf.routes.route import Route
from restnet_hf.selection.ranking import Similarity


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_similarity(
    similarity: Similarity | Sequence[Similarity],
    routes: Iterable[Route] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    cells: bool = False,
) -> Figure:
    """Plot similarities of anchors as heat maps side by side, with the cuts that the routes join.

    Args:
        similarity: values for every pair of cuts, of one pair of anchors or of several.
        routes: routes whose stitches are circled.
        path: file of the picture; None for none.
        cells: whether each cell gets a mark of its own, with the SVG id ``cell-``, the number of the heat map, of the
            row and of the column.
    """
    every = [similarity] if isinstance(similarity, Similarity) else [*similarity]
    shapes = [each.values.shape for each in every]
    widths = [2.5 + 0.35 * columns for _, columns in shapes]
    figure = new_figure(sum(widths), 1.8 + 0.35 * max(rows for rows, _ in shapes))
    places = figure.subplots(1, len(every), squeeze=False, width_ratios=widths)[0]
    points = [point for route in routes for point in route.stitch_points]
    for number, (each, axes) in enumerate(zip(every, places, strict=True)):
        joined = [p for p in points if (p.source, p.target) == (each.front, each.end)]
        _draw(figure, axes, each, [(p.target_cut, p.source_cut) for p in joined])
        if cells:
            _add_cells(axes, each.values, number)
    if path is not None:
        save_figure(figure, path)
    return figure


def _add_cells(axes: Any, values: Any, number: int) -> None:
    """Put a clear mark with an id on each cell that has a value."""
    from matplotlib.patches import Rectangle

    for row, column in zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True):
        mark = Rectangle((column + 0.5, row + 0.5), 1, 1, facecolor="white", edgecolor="none", alpha=0.01)
        mark.set_gid(f"cell-{number}-{row}-{column}")
        axes.add_patch(mark)


def _draw(figure: Figure, axes: Any, similarity: Similarity, circles: Sequence[tuple[int, int]]) -> None:
    """Draw one pair of anchors."""
    rows, columns = similarity.values.shape
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    image = axes.imshow(
        similarity.values, cmap="viridis", extent=extent, aspect="auto", vmin=_least(similarity), vmax=1.0
    )
    axes.scatter(
        *(zip(*circles, strict=True) if circles else ((), ())), s=90, c="none", edgecolors=ANCHOR, linewidths=2
    )
    axes.set_xticks(range(1, columns + 1))
    axes.set_yticks(range(1, rows + 1))
    axes.set_xlabel(f"cut of {similarity.end} (replaced)", parse_math=False)
    axes.set_ylabel(f"cut of {similarity.front} (comes in)", parse_math=False)
    settings = similarity.settings
    images = f", {settings['images']} images" if "images" in settings else ""
    axes.set_title(f"{settings['method']}{images}\ncircles: stitches", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.9)


def _least(similarity: Similarity) -> float:
    """Lower end of the colours: 0, or the 10th percentile if it is below, so that a few outliers hide nothing."""
    values = similarity.values.compressed()
    return min(0.0, float(np.percentile(values, 10))) if len(values) else 0.0
