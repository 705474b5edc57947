"""Recipes: a whole job as data, from two classifiers to a saved adapter and a report."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from datasets import Dataset
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from restnet_hf.anchors.config_entry import know_classes
from restnet_hf.anchors.loading import load_anchor
from restnet_hf.data.datasets import load_images, subset, with_pixel_values
from restnet_hf.data.labels import class_names_of, label_order
from restnet_hf.data.pixel_values import prepared_by
from restnet_hf.distributed import this_process
from restnet_hf.files import atomic_file
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.cascades import LEAST_IMAGES
from restnet_hf.profiling.plots import plot_tradeoff
from restnet_hf.recipe_checks import CHECKPOINTS, CHECKS, check_entry, check_stitches, within
from restnet_hf.reports import report_cascades, report_rows, report_to_resume
from restnet_hf.routes.profile import Profile
from restnet_hf.routes.route import Route
from restnet_hf.selection.dropping import beaten_routes
from restnet_hf.selection.plots import plot_similarity
from restnet_hf.sources import check_paths
from restnet_hf.stitches.layers import BRANCH, StitchConfig
from restnet_hf.training.args import TrainArgs
from restnet_hf.training.loop import train
from restnet_hf.training.teachers import load_teacher


@dataclass(frozen=True, config=ConfigDict(extra="forbid", validate_default=True))
class Recipe:
    """One job.

    Args:
        front: anchor whose early blocks run: a Hub id or a local folder.
        dataset: labelled images: a Hub id or a local folder; see `load_images`.
        end: anchor whose late blocks run: a Hub id or a local folder; None for a family of one anchor.
        between: more anchors of a family, in order: Hub ids or local folders.
        train_split: split of the data set that stitches and heads train on.
        eval_split: split of the data set that routes are evaluated on.
        train_images: number of training images, chosen at random; all by default.
        eval_images: number of evaluation images, chosen at random; all by default.
        calibration_images: number of training images for similarity and least squares; new heads do not train on them.
        image_size: height and width of images in pixels; None for the anchors' own.
        new_head: whether the anchors get new heads; by default where the data set has other classes than they.
        method: key of `SELECTORS`, which chooses routes.
        max_routes: number of parts into which the range of MACs is divided.
        per_part: number of routes that are chosen of each part.
        routes: routes to stitch; ``method`` then chooses none.
        family: routes of a published method instead: its ``kind``, and options of ``add_family``.
        tuned_anchors: whether each anchor also trains as a route of its own, ``tuned a[:]``, on the same images in the
            same way, so that routes are compared with what anchors gain by that.
        stitch_kind: kind of the stitches, see `StitchConfig`; by default ``branch`` for routes within an anchor, else
            ``linear``.
        class_token: treatment of class tokens, see `StitchConfig`.
        augment: key of `AUGMENTATIONS`, for the images that heads and stitches train on; similarity, least squares
            and evaluation use images that are not augmented.
        label_free: whether the labels of the training images are ignored, or missing. Heads cannot be trained then, so
            the anchors must know the classes; accuracy is measured by the labels of the evaluation images.
        cache: whether the outputs of frozen networks for each image are cached in ``OUT/training`` while heads and
            stitches train; not done where images are augmented or the front trains.
        cascades: whether cascades of the routes are calibrated on the evaluation images, where these are 100 or more.
        drop_dominated: whether the adapter leaves out the stitched routes that another one beats in MACs and accuracy
            and no cascade runs; the report lists them.
        seed: seed of the first weights of new heads; the images and their order have fixed seeds.
        heads: options of training for new heads on the frozen anchors.
        stitches: options of training for stitches.
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
    tuned_anchors: bool = False
    stitch_kind: str | None = None
    class_token: str = "pool"
    augment: str | None = None
    label_free: bool = False
    cache: bool = True
    cascades: bool = True
    drop_dominated: bool = True
    seed: int = 0
    heads: TrainArgs = TrainArgs(distillation=0.0, train_head=True)
    stitches: TrainArgs = TrainArgs()

    @field_validator("heads", "stitches", mode="before")
    @classmethod
    def _with_folder(cls, entry: Any) -> Any:
        wanted = isinstance(entry, Mapping) and "save_steps" in entry
        return {"output_dir": CHECKPOINTS, **entry} if wanted else entry

    @field_validator(*CHECKS)
    @classmethod
    def _is_possible(cls, value: Any, info: ValidationInfo) -> Any:
        check_entry(str(info.field_name), value, info.data)
        return value

    @property
    def within(self) -> bool:
        """Whether routes stay within an anchor."""
        return within(self.family)

    @property
    def anchors(self) -> tuple[str, ...]:
        """Hub ids or folders of all anchors, the front first."""
        return (self.front, *self.between, *([] if self.end is None else [self.end]))

    def stitch_config(self) -> StitchConfig:
        """The kind and options of the stitches."""
        kind = self.stitch_kind or (BRANCH if self.within else "linear")
        return StitchConfig(kind, self.class_token)


def load_recipe(path: str | os.PathLike[str], **overrides: Any) -> Recipe:
    """Read a YAML recipe.

    Args:
        path: file of the recipe.
        **overrides: values that replace entries of the recipe, unless they are None.

    Raises:
        ValueError: the file is missing or is not a recipe (the message lists all that is wrong).
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
        wrong = [
            ": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, "))))
            for each in error.errors()
        ]
        raise ValueError("\n- ".join([f"recipe {os.fspath(path)} is not valid:", *wrong])) from error


def run_recipe(recipe: Recipe, out: str | os.PathLike[str], resume: bool = False) -> dict[str, Any]:
    """Run a recipe and write ``adapter/``, ``report.json`` and ``tradeoff.png`` to a folder.

    Where stitches were chosen by similarity, ``similarity.png`` is written too.

    Args:
        recipe: the job to run.
        out: folder for the adapter, the report and the pictures.
        resume: whether to resume from the checkpoints of an earlier run in ``out``; one that has finished returns its
            report at once.

    Returns:
        The report: a row for each route, and the seconds that each part took.

    Raises:
        ValueError: the anchors, the data set or an option does not fit; or a finished run is of another recipe.
        OSError: an anchor or the data set cannot be loaded.
    """
    folder, clock = Path(out), _Clock()
    if resume and (report := report_to_resume(dataclasses.asdict(recipe), folder)) is not None:
        return report
    set_seed(recipe.seed)
    model, train_set, eval_set = prepare(recipe)
    heads, stitches = (load_teacher(model, _train_args(recipe, s, folder, resume)) for s in ("heads", "stitches"))
    calibration, others = hold_out(train_set, recipe.calibration_images, model.config.new_head)
    clock.lap("load")
    if model.config.new_head:
        train(model, augment_training_set(model, others, recipe), heads, [Route.alone(name) for name in model.anchors])
        clock.lap("heads")
    set_seed(recipe.seed)  # new stitches are the same whether heads were trained or read from a checkpoint
    _add_stitches(model, calibration, recipe)
    clock.lap("similarity")
    r2 = model.fit_stitches(calibration)
    clock.lap("least squares")
    fitted = model.profile(eval_set, metadata={"dataset": _name(recipe.dataset)})
    clock.lap("first profile")
    before = _anchor_logits(model, calibration)
    train(model, augment_training_set(model, train_set, recipe), stitches)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, _anchor_logits(model, calibration), strict=True))
    clock.lap("training")
    profile, offered = _offer(model, eval_set, recipe)
    clock.lap("second profile")
    state = this_process()
    model.save_pretrained(folder / "adapter", is_main_process=state.is_main_process)
    state.wait_for_everyone()
    same = _reloads_equal(model, folder / "adapter", calibration)
    clock.lap("save and reload")
    report = {
        "recipe": dataclasses.asdict(recipe),
        "routes": report_rows(model, fitted, profile, r2),
        "cascades": report_cascades(profile),
        **offered,
        "checks": {"anchors_unchanged": unchanged, "reloaded_logits_equal": same},
        "similarity": None if model.similarity is None else dict(model.similarity.settings),
        "seconds": clock.laps,
        "metadata": dict(profile.metadata),
    }
    if state.is_main_process:
        _write_report(model, fitted, profile, report, folder)
    return report


def _offer(
    model: StitchedModelForImageClassification, eval_set: Dataset, recipe: Recipe
) -> tuple[Profile, dict[str, Any]]:
    """Profile routes and cascades, make the best route active, and drop those that another beats.

    Returns the profile, and entries of the report.
    """
    cascades = recipe.cascades and len(eval_set) >= LEAST_IMAGES and len(model.all_routes) > 1
    profile = model.profile(eval_set, cascades=cascades, metadata={"dataset": _name(recipe.dataset)})
    model.set_route(max(profile.routes, key=lambda row: (not row.route.is_anchor, row.scores["accuracy"])).route)
    gaps = {"gap_closed": profile.gap_closed(), "gap_closed_stitched": profile.gap_closed(stitched_only=True)}
    dropped = model.drop_dominated() if recipe.drop_dominated else []
    beaten = beaten_routes(profile)
    return profile, {"dropped": {str(route): str(beaten[route]) for route in dropped}, **gaps}


def _write_report(
    model: StitchedModelForImageClassification, fitted: Profile, profile: Profile, report: Any, folder: Path
) -> None:
    shutil.rmtree(folder / "training", ignore_errors=True)  # the checkpoints are not needed any more
    plot_tradeoff(profile, folder / "tradeoff.png", fitted)
    if model.similarities:
        plot_similarity(model.similarities, model.routes, folder / "similarity.png")
    with atomic_file(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


class _Clock:
    """Seconds of each part of a job, in ``laps``."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._began = round(now - self._began, 2), now


def prepare(recipe: Recipe) -> tuple[StitchedModelForImageClassification, Dataset, Dataset]:
    """The model without stitches, and the images to train and to evaluate on, prepared for it and not augmented.

    Args:
        recipe: the job to prepare.

    Raises:
        ValueError: the anchors, the data set or an option does not fit.
        OSError: an anchor or the data set cannot be loaded.
    """
    train_rows, eval_rows, *anchors = _load(recipe)
    names = class_names_of(eval_rows if recipe.label_free else train_rows)
    if recipe.label_free and "label" in train_rows.column_names:
        train_rows = train_rows.remove_columns("label")
    new_head = recipe.new_head if recipe.new_head is not None else not know_classes(anchors, names)
    if recipe.label_free and new_head:
        raise ValueError(
            f"the data set's {len(names)} classes are not those that all anchors know, and new heads cannot be "
            "trained without labels; set label_free: false, or choose anchors of these classes"
        )
    model = StitchedModelForImageClassification.from_anchors(
        *anchors, order="given", id2label=dict(enumerate(names)) if new_head else None
    )
    plain = ([name.replace("_", " ") for name in each] for each in (names, model.config.id2label.values()))
    order = label_order(*plain)  # where each class of the data is in the model
    if order is None:
        raise ValueError(
            f"the data set's {len(names)} classes are not the anchors' {model.config.num_labels}; set new_head: true"
        )
    calibration = min(recipe.calibration_images, len(train_rows), recipe.train_images or len(train_rows))
    check_stitches(
        model, recipe.stitch_config(), routes=recipe.routes, rule=recipe.family, method=recipe.method,
        images=calibration,
    )  # fmt: skip

    def ready(rows: Dataset, size: int | None) -> Dataset:
        return with_pixel_values(subset(rows, size), model.image_processor, order)

    return model, ready(train_rows, recipe.train_images), ready(eval_rows, recipe.eval_images)


def _load(recipe: Recipe) -> list[Any]:
    """Training and evaluation images, then the anchors; of all that cannot be loaded one error tells.

    Raises:
        ValueError: images cannot be loaded, or several things.
        OSError: an anchor cannot be loaded.
    """
    check_paths([*recipe.anchors, recipe.dataset])
    jobs = [partial(load_images, recipe.dataset, split) for split in (recipe.train_split, recipe.eval_split)]
    jobs += [partial(load_anchor, s, image_size=recipe.image_size, dtype=torch.float32) for s in recipe.anchors]
    loaded, failed = [], list[Exception]()
    for job in jobs:
        try:
            loaded.append(job())
        except (ValueError, OSError) as error:
            failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise ValueError("\n- ".join(["the recipe cannot be run:", *dict.fromkeys(map(str, failed))])) from failed[0]
    return loaded


def hold_out(train_set: Dataset, images: int, new_head: bool) -> tuple[Dataset, Dataset]:
    """Images to compare and fit on, and the other images.

    On images that a head was trained on, fitted stitches look better than they are, so the two do not overlap, and new
    heads get at least half of the images.

    Args:
        train_set: images to train on.
        images: number of images to compare and fit on.
        new_head: whether new heads train on the others.
    """
    count = min(images, max(1, len(train_set) // 2) if new_head else len(train_set))
    others = [*range(count, len(train_set))]  # a range may not be empty
    return train_set.select(range(count)), train_set.select(others)


def augment_training_set(model: StitchedModelForImageClassification, rows: Dataset, recipe: Recipe) -> Dataset:
    """Training images, augmented if the recipe asks for it.

    Args:
        model: model with an image processor.
        rows: images that `prepare` returned.
        recipe: the job, whose ``augment`` is used.
    """
    if recipe.augment is None:
        return rows
    prepared = prepared_by(rows)
    order = None if prepared is None else prepared.order
    return with_pixel_values(rows, model.image_processor, order, recipe.augment)


def _add_stitches(model: StitchedModelForImageClassification, calibration: Dataset, recipe: Recipe) -> None:
    """Add the stitches that the recipe names, of its family, or that its selector chooses, and tuned anchors."""
    config = recipe.stitch_config()
    if recipe.family is not None:
        model.add_family(config=config, **recipe.family)
    elif recipe.routes is None:
        model.select_stitches(calibration, recipe.method, recipe.max_routes, config, per_part=recipe.per_part)
    for route in recipe.routes or ():
        model.add_stitch(route, config)
    if recipe.tuned_anchors:
        model.add_stitches([Route.alone(name, tuned=True) for name in model.anchors])


def _name(dataset: str) -> str:
    return Path(dataset).name if Path(dataset).is_dir() else dataset  # profiles are shared, local paths are private


def _train_args(recipe: Recipe, stage: str, folder: Path, resume: bool) -> TrainArgs:
    """Options of training for ``heads`` or ``stitches``, with checkpoints in a folder of their own."""
    args: TrainArgs = getattr(recipe, stage)
    train_head = True if stage == "heads" else bool(args.train_head)
    changes: dict[str, Any] = {"output_dir": str(folder / "training" / stage), "resume_from_checkpoint": resume}
    if recipe.cache and recipe.augment is None and args.tuning in ("stitch", "norm"):
        changes["cache_dir"] = args.cache_dir or str(folder / "training" / "cache")
    return dataclasses.replace(args, train_head=train_head, **changes)


@torch.no_grad()
def _anchor_logits(model: StitchedModelForImageClassification, rows: Dataset) -> list[torch.Tensor]:
    """Logits of each anchor, with its own head, on a few images."""
    images = rows[: min(8, len(rows))]["pixel_values"].to(model.device, model.dtype)
    return [anchor.logits(model.images_for(name, images)) for name, anchor in model.anchors.items()]


@torch.no_grad()
def _reloads_equal(model: StitchedModelForImageClassification, folder: Path, rows: Dataset) -> bool:
    """Whether the saved adapter gives the same logits, on a few images."""
    images = rows[: min(8, len(rows))]["pixel_values"]
    loaded = StitchedModelForImageClassification.from_pretrained(folder).to(model.device)
    images = images.to(model.device)
    return torch.equal(model(images).logits, loaded(images).logits)
