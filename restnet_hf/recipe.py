"""Recipes: the whole job as data, from two classifiers to a saved adapter and a report."""

import csv
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.utils import set_seed
from datasets import ClassLabel, Dataset
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from restnet_hf.anchors import Anchor
from restnet_hf.data import load_images, subset, this_process, with_pixel_values
from restnet_hf.files import written_whole
from restnet_hf.labels import label_order
from restnet_hf.loading import load_anchor
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.parents import class_order
from restnet_hf.plots import plot_similarity, plot_tradeoff
from restnet_hf.profiles import Budget, Profile
from restnet_hf.ranking import RankedRoute, choose_routes, rank_routes
from restnet_hf.routes import Route, Segment
from restnet_hf.similarity_cache import write_similarity
from restnet_hf.stitches import StitchConfig
from restnet_hf.training import TrainArgs, train


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """One job.

    Args:
        front: anchor whose early blocks run: a Hub id or a local folder.
        end: anchor whose late blocks run.
        dataset: labelled images: a Hub id or a local folder; see `load_images`.
        train_split, eval_split: of the data set.
        train_images, eval_images: how many, chosen at random; all by default.
        calibration_images: of the training images, for similarity and least squares; new heads do not train on them.
        image_size: in pixels, instead of the anchors' own.
        new_head: give the anchors new heads; by default when the data set's classes are not theirs.
        method: key of `SELECTORS`.
        max_routes: how many stitches to make.
        class_token: see `StitchConfig`.
        seed: of the first weights of new heads; the images and their order have fixed seeds of their own.
        heads: how new heads are trained on the frozen anchors.
        stitches: how stitches are trained.
    """

    front: str
    end: str
    dataset: str
    train_split: str = "train"
    eval_split: str = "test"
    train_images: int | None = Field(default=None, gt=0)
    eval_images: int | None = Field(default=None, gt=0)
    calibration_images: int = Field(default=512, gt=0)
    image_size: int | None = Field(default=None, gt=0)
    new_head: bool | None = None
    method: str = "cka"
    max_routes: int = Field(default=8, gt=0)
    class_token: str = "pool"
    seed: int = 0
    heads: TrainArgs = TrainArgs(distillation=0.0, train_head=True)
    stitches: TrainArgs = TrainArgs()


def load_recipe(path: str | os.PathLike[str], **overrides: Any) -> Recipe:
    """Read a YAML recipe; ``overrides`` that are not None replace its entries.

    Raises:
        ValueError: the file is missing or is not a recipe (the message lists every entry that is wrong).
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {os.fspath(path)} cannot be read: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"recipe {os.fspath(path)} is not a mapping of options to values")
    try:
        return Recipe(**{**data, **{key: value for key, value in overrides.items() if value is not None}})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"recipe {os.fspath(path)} is not valid. {wrong}") from error


def run_recipe(recipe: Recipe, out: str | os.PathLike[str], resume: bool = False) -> dict[str, Any]:
    """Do the job and write ``adapter/``, ``report.json``, ``similarity.png`` and ``tradeoff.png`` to ``out``.

    Args:
        recipe: the job.
        out: folder.
        resume: go on from the checkpoints of an earlier run in ``out``.

    Returns:
        The report: a row for each route, and the seconds that each part took.
    """
    folder = Path(out)
    clock = _Clock()
    set_seed(recipe.seed)
    model, train_set, eval_set = prepare(recipe)
    calibration, others = hold_out(train_set, recipe.calibration_images, model.config.new_head)
    clock.lap("load")
    if model.config.new_head:
        alone = [Route((Segment(name),)) for name in model.anchors]
        options = _options(recipe.heads, folder / "training" / "heads", resume, train_head=True)
        train(model, others, options, alone)
        clock.lap("heads")
    model.select_stitches(calibration, recipe.method, recipe.max_routes, StitchConfig(class_token=recipe.class_token))
    clock.lap("similarity")
    r2 = model.fit_stitches(calibration)
    clock.lap("least squares")
    fitted = model.profile(eval_set, dataset=_name(recipe.dataset))
    clock.lap("first profile")
    before = _anchor_logits(model, calibration)
    options = _options(
        recipe.stitches, folder / "training" / "stitches", resume, train_head=bool(recipe.stitches.train_head)
    )
    train(model, train_set, options)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, _anchor_logits(model, calibration), strict=True))
    clock.lap("training")
    profile = model.profile(eval_set, dataset=_name(recipe.dataset))
    clock.lap("second profile")
    best = max(profile.routes, key=lambda row: (len(row.route.segments) > 1, row.scores["accuracy"]))
    model.set_route(best.route)
    state = this_process()
    model.save_pretrained(folder / "adapter", is_main_process=state.is_main_process)
    state.wait_for_everyone()
    same = _reloads(model, folder / "adapter", calibration)
    clock.lap("save and reload")
    assert model.similarity is not None
    report = {
        "recipe": dataclasses.asdict(recipe),
        "routes": _rows(model, fitted, profile, r2),
        "checks": {"anchors_unchanged": unchanged, "reloaded_logits_equal": same},
        "similarity": dict(model.similarity.settings),
        "seconds": clock.laps,
        "metadata": dict(profile.metadata),
    }
    if state.is_main_process:
        shutil.rmtree(folder / "training", ignore_errors=True)  # the checkpoints have served
        plot_similarity(model.similarity, model.routes, folder / "similarity.png")
        plot_tradeoff(profile, folder / "tradeoff.png", fitted)
        with written_whole(folder / "report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report


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
    budget: Mapping[str, float] | None = None,
    order: str = "given",
) -> dict[str, list[RankedRoute]]:
    """Compare two anchors by selectors and write, for each, ``NAME.npz``, ``NAME.csv`` and ``NAME.png`` to ``out``.

    Args:
        front, end: Hub ids or local folders.
        dataset: images; labels are used where they are the anchors' classes.
        out: folder.
        methods: keys of `SELECTORS`.
        split, images, image_size: as of `Recipe`.
        max_routes, budget, order: as of ``select_stitches``.

    Returns:
        The routes that each selector chooses.

    Raises:
        ValueError, OSError: something cannot be loaded, or does not fit.
    """
    rows = subset(load_images(dataset, split), images)
    anchors = [load_anchor(source, image_size=image_size, dtype=torch.float32) for source in (front, end)]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given", **_own_classes(anchors))
    if model.image_processor is None:
        raise ValueError(f"anchor '{model.front}' has no image processor, so images cannot be prepared for it")
    names = _class_names(rows) if "label" in rows.column_names else None
    order_of = None if names is None else label_order(names, list(model.config.id2label.values()))
    if order_of is None and "label" in rows.column_names:
        rows = rows.remove_columns("label")
    found = model.compare(with_pixel_values(rows, model.image_processor, order_of), methods, order)
    costs, limits = model.route_costs(), None if budget is None else Budget(**budget)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {}
    for name, similarities in found.items():
        chosen[name] = choose_routes(rank_routes(similarities, costs, limits), max_routes)
        for similarity in similarities:
            suffix = "" if similarity is similarities[0] else "_back"
            write_similarity(similarity, folder / f"{name}{suffix}.npz")
            routes = [row.route for row in chosen[name] if row.route.segments[0].anchor == similarity.front]
            plot_similarity(similarity, routes, folder / f"{name}{suffix}.png")
            with written_whole(folder / f"{name}{suffix}.csv") as temporary, temporary.open("w", newline="") as file:
                table = csv.writer(file)
                table.writerow([similarity.front, *(cut.name for cut in model.anchors[similarity.end].cuts)])
                for cut, row in zip(model.anchors[similarity.front].cuts, similarity.values, strict=True):
                    table.writerow([cut.name, *row.filled(np.nan)])
    return chosen


def _own_classes(anchors: list[Anchor]) -> dict[str, Any]:
    """Options for anchors whose classes differ: heads do not matter where activations are compared."""
    try:
        class_order(*anchors)
    except ValueError:
        return {"num_labels": 2}
    return {}


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._began = round(now - self._began, 2), now


def prepare(recipe: Recipe) -> tuple[StitchedModelForImageClassification, Dataset, Dataset]:
    """The model without stitches, and the images to train and to evaluate on, prepared for it."""
    train_rows, eval_rows = (load_images(recipe.dataset, split) for split in (recipe.train_split, recipe.eval_split))
    anchors = [load_anchor(s, image_size=recipe.image_size, dtype=torch.float32) for s in (recipe.front, recipe.end)]
    names = _class_names(train_rows)
    new_head = recipe.new_head if recipe.new_head is not None else not _knows(anchors, names)
    model = StitchedModelForImageClassification.from_anchors(
        *anchors, order="given", id2label=dict(enumerate(names)) if new_head else None
    )
    if model.image_processor is None:
        raise ValueError(f"anchor '{model.front}' has no image processor, so images cannot be prepared for it")
    order = label_order(names, list(model.config.id2label.values()))  # where each class of the data is in the model
    if order is None:
        raise ValueError(
            f"the data set's {len(names)} classes are not the anchors' {model.config.num_labels}; set new_head: true"
        )

    def ready(rows: Dataset, size: int | None) -> Dataset:
        return with_pixel_values(subset(rows, size), model.image_processor, order)

    return model, ready(train_rows, recipe.train_images), ready(eval_rows, recipe.eval_images)


def hold_out(train_set: Dataset, images: int, new_head: bool) -> tuple[Dataset, Dataset]:
    """Images to compare and fit on, and the others.

    On images that a head was trained on, fitted stitches look better than they are, so the two do not overlap, and new
    heads get at least half of the images.
    """
    count = min(images, max(1, len(train_set) // 2) if new_head else len(train_set))
    return train_set.select(range(count)), train_set.select(range(count, len(train_set)))


def _name(dataset: str) -> str:
    return Path(dataset).name if Path(dataset).is_dir() else dataset  # a profile is shared, local paths are not


def _class_names(rows: Dataset) -> list[str]:
    feature = rows.features.get("label")
    if not isinstance(feature, ClassLabel):
        raise ValueError("the data set needs a 'label' column of type ClassLabel, which names the classes")
    return list(feature.names)


def _knows(anchors: list[Anchor], names: list[str]) -> bool:
    return all(anchor.label_names is not None and label_order(names, anchor.label_names) for anchor in anchors)


def _options(args: TrainArgs, folder: Path, resume: bool, **changes: Any) -> TrainArgs:
    return dataclasses.replace(args, output_dir=str(folder), resume_from_checkpoint=resume, **changes)


@torch.no_grad()
def _anchor_logits(model: StitchedModelForImageClassification, rows: Dataset) -> list[torch.Tensor]:
    """Logits of each anchor itself, before any new head, on a few images."""
    images = rows[: min(8, len(rows))]["pixel_values"].to(model.device, model.dtype)
    return [anchor.logits(model.images_for(name, images)) for name, anchor in model.anchors.items()]


@torch.no_grad()
def _reloads(model: StitchedModelForImageClassification, folder: Path, rows: Dataset) -> bool:
    images = rows[: min(8, len(rows))]["pixel_values"]
    again = StitchedModelForImageClassification.from_pretrained(folder).to(model.device)
    images = images.to(model.device)
    return torch.equal(model(images).logits, again(images).logits)


def _rows(
    model: StitchedModelForImageClassification, fitted: Profile, profile: Profile, r2: Mapping[str, float]
) -> list[dict[str, Any]]:
    rows = []
    for before, after in zip(fitted.routes, profile.routes, strict=True):
        row: dict[str, Any] = {"route": str(after.route), **after.costs}
        for point in after.route.stitch_points:
            assert model.similarity is not None
            row["similarity"] = model.similarity.value(after.route)
            row["r2"] = r2[point.name]
            row["accuracy_least_squares"] = before.scores["accuracy"]
        rows.append({**row, "accuracy": after.scores["accuracy"]})
    return sorted(rows, key=lambda row: row["macs"])
