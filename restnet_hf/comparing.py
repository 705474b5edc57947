"""Comparison of two classifiers without a recipe: where they are best joined, as tables and pictures."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.config_entry import class_order
from restnet_hf.anchors.loading import load_anchor
from restnet_hf.data.datasets import load_images, subset, with_pixel_values
from restnet_hf.data.labels import class_names_of, label_order
from restnet_hf.files import atomic_file
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.profile import Budget, BudgetLike
from restnet_hf.selection.cache import write_similarity
from restnet_hf.selection.plots import plot_similarity
from restnet_hf.selection.ranking import RankedRoute, Similarity, anchor_points, choose_routes, rank_routes


def compare_anchors(
    front: str,
    end: str,
    dataset: str,
    out: str | os.PathLike[str],
    methods: Sequence[str],
    *,
    split: str = "train",
    images: int = 512,
    image_size: int | None = None,
    max_routes: int = 8,
    budget: BudgetLike | None = None,
    order: str = "given",
) -> dict[str, list[RankedRoute]]:
    """Compare two anchors by selectors and write, for each, ``NAME.npz``, ``NAME.csv`` and ``NAME.png`` to ``out``.

    Args:
        front: anchor whose early blocks run: a Hub id or a local folder.
        end: anchor whose late blocks run: a Hub id or a local folder.
        dataset: images: a Hub id or a local folder; labels are used where they are of the anchors' classes.
        out: folder for the tables and pictures.
        methods: selectors to compare with, keys of `SELECTORS`.
        split: split of the data set.
        images: number of images, chosen at random.
        image_size: height and width of images in pixels; None for the anchors' own.
        max_routes: largest number of routes that each selector chooses.
        budget: limits on costs of the chosen routes; None for no limits.
        order: ``given``, or ``auto`` to compare in both directions.

    Returns:
        The routes that each selector chooses.

    Raises:
        ValueError: the anchors, the data set or an option does not fit.
        OSError: an anchor or the data set cannot be loaded.
    """
    rows = subset(load_images(dataset, split), images)
    anchors = [load_anchor(source, image_size=image_size, dtype=torch.float32) for source in (front, end)]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given", **_own_classes(anchors))
    names = class_names_of(rows) if "label" in rows.column_names else None
    label_map = None if names is None else label_order(names, list(model.config.id2label.values()))
    if label_map is None and "label" in rows.column_names:
        rows = rows.remove_columns("label")
    compared = model.compare(with_pixel_values(rows, model.image_processor, label_map), methods, order)
    costs, limits = model.route_costs(budget=budget), None if budget is None else Budget.of(budget)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {}
    for name, similarities in compared.items():
        points = anchor_points(similarities, lambda route: costs(route)["macs"])
        chosen[name] = choose_routes(rank_routes(similarities, costs, limits, points), max_routes, anchors=points)
        for similarity in similarities:
            suffix = "" if similarity is similarities[0] else "_back"
            _write_files(model, similarity, chosen[name], folder / f"{name}{suffix}")
    return chosen


def _write_files(
    model: StitchedModelForImageClassification, similarity: Similarity, chosen: Sequence[RankedRoute], stem: Path
) -> None:
    """Write one direction of a comparison as npz, csv and png, the routes chosen there marked."""
    write_similarity(similarity, Path(f"{stem}.npz"))
    routes = [row.route for row in chosen if row.route.segments[0].anchor == similarity.front]
    plot_similarity(similarity, routes, f"{stem}.png")
    _write_table(model, similarity, Path(f"{stem}.csv"))


def _write_table(model: StitchedModelForImageClassification, similarity: Similarity, path: Path) -> None:
    """Write the values of a comparison, with the names of cuts as header and first column."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([similarity.front, *(cut.name for cut in model.anchors[similarity.end].cuts)])
        for cut, row in zip(model.anchors[similarity.front].cuts, similarity.values, strict=True):
            table.writerow([cut.name, *row.filled(np.nan)])


def _own_classes(anchors: list[Anchor]) -> dict[str, Any]:
    """Options for anchors of different classes: heads have no part in a comparison of activations."""
    try:
        class_order(*anchors)
    except ValueError:
        return {"num_labels": 2}
    return {}
