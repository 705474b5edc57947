"""Recipes: the whole job as data, from two classifiers to a saved adapter and a report."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from datasets import Dataset
from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.loading import load_anchor
from restnet_hf.data.augment import augmentation
from restnet_hf.data.datasets import load_images, subset, with_pixel_values
from restnet_hf.data.labels import class_names_of, label_order
from restnet_hf.distributed import this_process
from restnet_hf.files import written_whole
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.plots import plot_tradeoff
from restnet_hf.routes.families import WITHIN
from restnet_hf.routes.profile import Profile
from restnet_hf.routes.route import Route
from restnet_hf.selection.plots import plot_similarity
from restnet_hf.stitches.layers import BRANCH, StitchConfig
from restnet_hf.training.args import TrainArgs
from restnet_hf.training.loop import train


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
        max_routes, per_part: into how many parts the range of MACs is divided, and how many routes of each are made.
        routes: these, and none that ``method`` would choose.
        family: the routes of a published method instead: its ``kind``, and options of ``add_family``.
        stitch_kind: see `StitchConfig`; by default ``branch`` for routes within an anchor, else ``linear``.
        class_token: see `StitchConfig`.
        augment: key of `AUGMENTATIONS`, for the images that heads and stitches train on; similarity, least squares
            and evaluation see images as they are.
        label_free: take no labels of the training images, or have none. Heads cannot be trained then, so the anchors
            must know the classes; accuracy is measured by the labels of the evaluation images.
        cache: while heads and stitches train, keep what frozen networks say of each image on disk, in
            ``OUT/training``; not where images are augmented or the front trains.
        seed: of the first weights of new heads; the images and their order have fixed seeds of their own.
        heads: how new heads are trained on the frozen anchors.
        stitches: how stitches are trained.
    """

    front: str
    dataset: str
    end: str | None = None
    between: list[str] = Field(default_factory=list)
    train_split: str = "train"
    eval_split: str = "test"
    train_images: int | None = Field(default=None, gt=0)
    eval_images: int | None = Field(default=None, gt=0)
    calibration_images: int = Field(default=512, gt=0)
    image_size: int | None = Field(default=None, gt=0)
    new_head: bool | None = None
    method: str = "cka"
    max_routes: int = Field(default=8, gt=0)
    per_part: int = Field(default=1, gt=0)
    routes: list[str] | None = Field(default=None, min_length=1)
    family: dict[str, Any] | None = None
    stitch_kind: str | None = None
    class_token: str = "pool"
    augment: str | None = None
    label_free: bool = False
    cache: bool = True
    seed: int = 0
    heads: TrainArgs = TrainArgs(distillation=0.0, train_head=True)
    stitches: TrainArgs = TrainArgs()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        self.stitch_config()
        augmentation(self.augment)
        if self.augment is not None and (self.heads.cache_dir or self.stitches.cache_dir):
            raise ValueError(
                "augment makes other images each time, so cache_dir cannot keep them; leave one of them out"
            )
        if self.end is None and (self.between or not self.within):
            raise ValueError(f"one anchor needs a family of {sorted(WITHIN)}; give end, or family: {{kind: skip}}")
        if self.family is not None and (self.routes or "kind" not in self.family):
            raise ValueError("family needs a kind, and takes the place of routes; give one of the two")
        if self.label_free and self.new_head:
            raise ValueError("new heads are trained with labels; leave new_head or label_free out")
        if self.label_free and self.stitches.num_train_epochs and self.stitches.distillation < 1:
            raise ValueError(
                "label_free leaves stitches only the anchors to learn from; set stitches.distillation to 1, or "
                "stitches.num_train_epochs to 0 and stitches.matching_epochs to 1 or more"
            )
        return self

    @property
    def within(self) -> bool:
        """Whether routes stay within an anchor."""
        return (self.family or {}).get("kind") in WITHIN

    @property
    def anchors(self) -> tuple[str, ...]:
        """All of them, the front first."""
        return (self.front, *self.between, *([] if self.end is None else [self.end]))

    def stitch_config(self) -> StitchConfig:
        """How stitches are made."""
        kind = self.stitch_kind or (BRANCH if self.within else "linear")
        return StitchConfig(kind, self.class_token)


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
        wrong = "; ".join(": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in error.errors())
        raise ValueError(f"recipe {os.fspath(path)} is not valid. {wrong}") from error


def run_recipe(recipe: Recipe, out: str | os.PathLike[str], resume: bool = False) -> dict[str, Any]:
    """Do the job and write ``adapter/``, ``report.json`` and ``tradeoff.png`` to ``out``.

    Where stitches were chosen by similarity, ``similarity.png`` too.

    Args:
        recipe: the job.
        out: folder.
        resume: go on from the checkpoints of an earlier run in ``out``.

    Returns:
        The report: a row for each route, and the seconds that each part took.
    """
    folder, clock = Path(out), _Clock()
    heads, stitches = (_options(recipe, stage, folder, resume) for stage in ("heads", "stitches"))
    set_seed(recipe.seed)
    model, train_set, eval_set = prepare(recipe)
    calibration, others = hold_out(train_set, recipe.calibration_images, model.config.new_head)
    clock.lap("load")
    if model.config.new_head:
        train(model, to_train_on(model, others, recipe), heads, [Route.alone(name) for name in model.anchors])
        clock.lap("heads")
    set_seed(recipe.seed)  # new stitches are the same whether heads were trained or read from a checkpoint
    _add_stitches(model, calibration, recipe)
    clock.lap("similarity")
    r2 = model.fit_stitches(calibration)
    clock.lap("least squares")
    fitted = model.profile(eval_set, dataset=_name(recipe.dataset))
    clock.lap("first profile")
    before = _anchor_logits(model, calibration)
    train(model, to_train_on(model, train_set, recipe), stitches)
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
    report = {
        "recipe": dataclasses.asdict(recipe),
        "routes": _rows(model, fitted, profile, r2),
        "checks": {"anchors_unchanged": unchanged, "reloaded_logits_equal": same},
        "similarity": None if model.similarity is None else dict(model.similarity.settings),
        "seconds": clock.laps,
        "metadata": dict(profile.metadata),
    }
    if state.is_main_process:
        shutil.rmtree(folder / "training", ignore_errors=True)  # the checkpoints have served
        plot_tradeoff(profile, folder / "tradeoff.png", fitted)
        if model.similarity is not None:
            plot_similarity(model.similarity, model.routes, folder / "similarity.png")
        with written_whole(folder / "report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._began = round(now - self._began, 2), now


def prepare(recipe: Recipe) -> tuple[StitchedModelForImageClassification, Dataset, Dataset]:
    """The model without stitches, and the images to train and to evaluate on, prepared for it and not augmented.

    Raises:
        ValueError, OSError: something cannot be loaded, or does not fit.
    """
    train_rows, eval_rows = (load_images(recipe.dataset, split) for split in (recipe.train_split, recipe.eval_split))
    anchors = [load_anchor(s, image_size=recipe.image_size, dtype=torch.float32) for s in recipe.anchors]
    names = class_names_of(eval_rows if recipe.label_free else train_rows)
    if recipe.label_free and "label" in train_rows.column_names:
        train_rows = train_rows.remove_columns("label")
    new_head = recipe.new_head if recipe.new_head is not None else not _knows(anchors, names)
    if recipe.label_free and new_head:
        raise ValueError(
            f"the data set's {len(names)} classes are not those that all anchors know, and new heads cannot be "
            "trained without labels; set label_free: false, or choose anchors of these classes"
        )
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
    for route in recipe.routes or ():
        model.route(route)  # a mistake shows before heads are trained
    if recipe.family is not None:
        rule = {key: value for key, value in recipe.family.items() if key not in ("budget", "max_routes")}
        next((route for route in model.family(**rule) if route.stitch_points), None)

    def ready(rows: Dataset, size: int | None) -> Dataset:
        return with_pixel_values(subset(rows, size), model.image_processor, order)

    return model, ready(train_rows, recipe.train_images), ready(eval_rows, recipe.eval_images)


def hold_out(train_set: Dataset, images: int, new_head: bool) -> tuple[Dataset, Dataset]:
    """Images to compare and fit on, and the others.

    On images that a head was trained on, fitted stitches look better than they are, so the two do not overlap, and new
    heads get at least half of the images.
    """
    count = min(images, max(1, len(train_set) // 2) if new_head else len(train_set))
    others = [*range(count, len(train_set))]  # a range may not be empty
    return train_set.select(range(count)), train_set.select(others)


def to_train_on(model: StitchedModelForImageClassification, rows: Dataset, recipe: Recipe) -> Dataset:
    """Images that `prepare` gave, augmented where the recipe says so."""
    if recipe.augment is None:
        return rows
    order = None
    if "label" in rows.column_names:
        order = label_order(class_names_of(rows), list(model.config.id2label.values()))
    return with_pixel_values(rows, model.image_processor, order, recipe.augment)


def _add_stitches(model: StitchedModelForImageClassification, calibration: Dataset, recipe: Recipe) -> None:
    """Those that the recipe names, those of its family, or those that its selector chooses."""
    config = recipe.stitch_config()
    if recipe.family is not None:
        model.add_family(config=config, **recipe.family)
    elif recipe.routes is None:
        model.select_stitches(calibration, recipe.method, recipe.max_routes, config, per_part=recipe.per_part)
    for route in recipe.routes or ():
        model.add_stitch(route, config)


def _name(dataset: str) -> str:
    return Path(dataset).name if Path(dataset).is_dir() else dataset  # a profile is shared, local paths are not


def _knows(anchors: list[Anchor], names: list[str]) -> bool:
    return all(anchor.label_names is not None and label_order(names, anchor.label_names) for anchor in anchors)


def _options(recipe: Recipe, stage: str, folder: Path, resume: bool) -> TrainArgs:
    """How ``heads`` or ``stitches`` train, with checkpoints in a folder of their own."""
    args: TrainArgs = getattr(recipe, stage)
    train_head = True if stage == "heads" else bool(args.train_head)
    changes: dict[str, Any] = {"output_dir": str(folder / "training" / stage), "resume_from_checkpoint": resume}
    if recipe.cache and recipe.augment is None and args.tuning in ("stitch", "norm"):
        changes["cache_dir"] = args.cache_dir or str(folder / "training" / "cache")
    return dataclasses.replace(args, train_head=train_head, **changes)


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
            if model.similarity is not None:
                row["similarity"] = model.similarity.value(after.route)
            row["r2"] = r2.get(point.name)
            row["accuracy_least_squares"] = before.scores["accuracy"]
        rows.append({**row, "accuracy": after.scores["accuracy"]})
    return sorted(rows, key=lambda row: row["macs"])
