"""Heat map of a similarity."""

from __future__ import annotations  # matplotlib takes long to import, and is imported only to draw

import os
from collections.abc import Iterable

import numpy as np

from restnet_hf.profiling.plots import save_figure
from restnet_hf.routes.route import Route
from restnet_hf.selection.ranking import Similarity


def plot_similarity(similarity: Similarity, routes: Iterable[Route], path: str | os.PathLike[str]) -> None:
    """Plot the similarity of two anchors as a heat map, with the cuts that the routes join.

    Args:
        similarity: values for every pair of cuts.
        routes: routes whose stitches are circled.
        path: file of the picture.
    """
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
    save_figure(figure, path)


def _least(similarity: Similarity) -> float:
    """Lower end of the colours: 0, or the 10th percentile if it is below, so that a few outliers hide nothing."""
    values = similarity.values.compressed()
    return min(0.0, float(np.percentile(values, 10))) if len(values) else 0.0
