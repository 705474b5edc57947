"""scout: which two of many classifiers to stitch for a budget, from one pass of each over the same images."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file

from restnet_hf.anchors.anchor import Anchor, make_names_unique
from restnet_hf.anchors.config_entry import know_classes
from restnet_hf.anchors.loading import load_anchor
from restnet_hf.data.datasets import load_images, with_pixel_values
from restnet_hf.data.labels import class_names_of, label_order
from restnet_hf.distributed import alone, divide_jobs, from_main, gather, this_process
from restnet_hf.errors import BudgetError
from restnet_hf.files import atomic_file
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.progress import progress_bar
from restnet_hf.routes.profile import MEANS, Budget, BudgetLike
from restnet_hf.routes.tables import short_number
from restnet_hf.scouting.checks import review
from restnet_hf.scouting.pairs import PairJudge
from restnet_hf.scouting.passes import AnchorPasses, cache_pictures
from restnet_hf.scouting.results import RESULT, ScoutedPair, ScoutResult, plain_costs
from restnet_hf.selection.pairs import ORDERS
from restnet_hf.training.feature_cache import FeatureCache
from restnet_hf.training.heads import HEAD_ARGS, record_trained
from restnet_hf.training.loop import train_heads


COSTS = ("macs", "mean_macs", "params", "memory_mb")  # that are known without a measurement
LEAST_IMAGES = 8  # half to fit stitches on, half to test them
CHECKING = 3  # one in so many held-out images checks the winner
LEAST_CHECKING = 100  # images that do; with fewer none, and all choose
SEED = 0  # of new heads
EVAL_IMAGES = 10_000  # default, which runs of earlier versions count as
WORK = ".scout"  # folder in ``out`` of what a run needs to go on after an interruption


def scout(
    candidates: Sequence[str | os.PathLike[str]],
    dataset: str | os.PathLike[str],
    budget: BudgetLike,
    out: str | os.PathLike[str],
    *,
    split: str = "train",
    eval_split: str = "test",
    images: int = 2000,
    eval_images: int = EVAL_IMAGES,
    head_images: int = 2000,
    image_size: int | None = None,
    order: str = "given",
    new_head: bool | None = None,
    resume: bool = False,
) -> ScoutResult:
    """Find the two of many classifiers that are best stitched for a budget, and write a recipe that does it.

    Images are read once, and each candidate runs over them once. For each pair a race predicts the accuracy of every
    stitched route that costs less than the larger anchor, as the selector ``fitted_accuracy`` does, and cascades of
    the two are calibrated on logits (`PairJudge`). The best within the budget decides (`ScoutResult.ranked`). A third
    of ``eval_images``, drawn with a fixed seed, takes no part: the winner is scored again on these, since the best of
    many predictions is too high (`ScoutResult.check`); of fewer than 300 all choose. Pairs not significantly worse are
    marked (`review`). Nothing is trained but new heads. ``out`` gets ``scout.json``, ``pairs.csv``, ``tradeoff.png``
    and ``recipe.yaml``, a recipe for the best pair.

    Args:
        candidates: classifiers to choose from: Hub ids or local folders, at least two.
        dataset: labelled images: a Hub id or a local folder; see `load_images`.
        budget: limits on ``macs``, ``mean_macs``, ``params`` or ``memory_mb``, such as ``{"mean_macs": 1e9}``.
        out: folder for the files.
        split: split that stitches are fitted on and new heads train on.
        eval_split: split that accuracies are predicted on, of images that no candidate was trained on.
        images: number of images that stitched routes are fitted and tested on, chosen at random, half from each split.
            Where a split has too few, fewer of both are taken (`ScoutResult.images`).
        eval_images: largest number of images of ``eval_split``. Half of ``images`` are among them, beside those that
            check. Of all others only logits are taken, for anchors and cascades.
        head_images: largest number of further images of ``split`` that new heads train on.
        image_size: height and width of images in pixels; None for the anchors' own.
        order: ``given`` joins the candidate with more parameters to the other one, ``auto`` both ways.
        new_head: whether all get new heads; by default where one has other classes. With False that one is left out.
        resume: whether to go on with an earlier run in ``out``, of which no pass is repeated; one that has finished
            is read, and ranked anew where only the budget differs.

    Raises:
        BudgetError: nothing fits the budget, or it limits a cost that would have to be measured.
        ValueError: fewer than two candidates can be anchors (each reason is given), or an option or the data set does
            not fit.
        OSError: the data set cannot be loaded, or the disk is too small.
    """
    options = {
        "split": split, "eval_split": eval_split, "images": images, "eval_images": eval_images,
        "head_images": head_images, "image_size": image_size, "order": order, "new_head": new_head,
    }  # fmt: skip
    folder = Path(out)
    if resume and (folder / RESULT).exists():
        return _finished(folder, *_plan(candidates, dataset, budget, **options))
    result, _ = judge_pairs(candidates, dataset, budget, folder / WORK, **options)
    _finish(result, folder)
    return result


def judge_pairs(
    candidates: Sequence[str | os.PathLike[str]],
    dataset: str | os.PathLike[str],
    budget: BudgetLike,
    work: Path,
    **options: Any,
) -> tuple[ScoutResult, PairJudge]:
    """The result of `scout`, of which no file is written, and the judge, which can try further routes.

    Args:
        candidates: classifiers to choose from.
        dataset: labelled images.
        budget: limits on costs.
        work: folder of what the run needs to go on after an interruption.
        options: all other options of `scout` but ``out`` and ``resume``.
    """
    return _Scouting(*_plan(candidates, dataset, budget, **options), work).run()


def _plan(
    candidates: Sequence[str | os.PathLike[str]],
    dataset: str | os.PathLike[str],
    budget: BudgetLike,
    **options: Any,
) -> tuple[dict[str, Any], Budget]:
    """Arguments of a run as they are written, and the budget, after a check of the options."""
    checked = ("images", "eval_images", "head_images", "order", "split", "eval_split")
    limits = _check(candidates, budget, **{name: options[name] for name in checked})
    names = [os.fspath(each) for each in candidates]
    return {"candidates": names, "dataset": os.fspath(dataset), **options, "costs": plain_costs(limits)}, limits


def _finish(result: ScoutResult, folder: Path) -> None:
    """Write the result, and remove what the run needed to go on."""
    state = this_process()
    if state.is_main_process:
        result.save(folder)
        shutil.rmtree(folder / WORK, ignore_errors=True)
    state.wait_for_everyone()


def _check(
    candidates: Sequence[Any],
    budget: BudgetLike,
    images: int,
    eval_images: int,
    head_images: int,
    order: str,
    split: str,
    eval_split: str,
) -> Budget:
    """The budget, after a check of the options."""
    limits, names = Budget.of(budget), [os.fspath(each) for each in candidates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or twice:
        raise ValueError(f"scout chooses two of at least two different candidates; {twice or names} came")
    unknown = sorted(limits.limits.keys() - {*COSTS})
    if unknown:
        raise BudgetError(
            f"the budget limits {unknown}, which would have to be measured for every pair; limit one of {COSTS}, and "
            "measure the pair that wins"
        )
    if split == eval_split:
        raise ValueError(f"split and eval_split are both {split!r}; stitches need images of their own to be fitted on")
    if images < LEAST_IMAGES or head_images < 1:
        raise ValueError(f"images={images} must be at least {LEAST_IMAGES}, and head_images={head_images} at least 1")
    if eval_images - _checking(eval_images) < images // 2:
        enough = next(n for n in count(eval_images) if n - _checking(n) >= images // 2)
        raise ValueError(
            f"eval_images={eval_images} must be at least {enough}: half of images={images} of them test stitched "
            f"routes, beside {_checking(enough)} that check the winner"
        )
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {ORDERS}")
    return limits


def _checking(evaluated: int) -> int:
    """How many of some held-out images check the winner."""
    return evaluated // CHECKING if evaluated // CHECKING >= LEAST_CHECKING else 0


def _finished(folder: Path, job: dict[str, Any], limits: Budget) -> ScoutResult:
    """The result of a finished run, ranked for the budget; ValueError where the run was another one."""
    result = ScoutResult.load(folder)
    theirs = {"eval_images": EVAL_IMAGES, **result.job}
    known = set(theirs.pop("costs", ())) >= set(job["costs"])
    changed = sorted(name for name in theirs if theirs[name] != job.get(name)) + ([] if known else ["budget"])
    if changed:
        raise ValueError(
            f"{folder} holds a finished run with another {', '.join(changed)}; there is nothing to resume, so choose "
            "another folder"
        )
    if result.budget != limits:
        result = result.ranked(limits)
        if this_process().is_main_process:
            result.save(folder)
    return result


class _Scouting:
    """One run of `scout`, which leaves its folder as it is.

    Args:
        job: arguments of the run.
        limits: the budget.
        work: folder of what the run needs to go on after an interruption.
    """

    def __init__(self, job: dict[str, Any], limits: Budget, work: Path) -> None:
        self.job, self.limits, self.work = job, limits, work
        self.left_out: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def run(self) -> tuple[ScoutResult, PairJudge]:
        """Load, train heads where needed, run each anchor once, and judge every pair; returns the judge too."""
        fitted, held = (_labelled(self.job["dataset"], self.job[key]) for key in ("split", "eval_split"))
        names = class_names_of(held)
        if class_names_of(fitted) != names:
            raise ValueError(f"the splits {self.job['split']!r} and {self.job['eval_split']!r} name other classes")
        anchors, new_head = self._load(names)
        with torch.random.fork_rng(devices=()):  # new heads begin the same on every process and in every run
            torch.default_generator.manual_seed(SEED)
            model = StitchedModelForImageClassification.from_anchors(
                *anchors.values(), order="given", id2label=dict(enumerate(names)) if new_head else None
            )
        model.to(this_process().device)
        _check_cheapest(model, self.limits)
        self._lap("load")
        data, others, sampled, checking = self._draw(fitted, held, new_head)
        plain = ([name.replace("_", " ") for name in each] for each in (names, model.config.id2label.values()))
        label_map = label_order(*plain)  # where each class of the data is in the model
        ready = [with_pixel_values(rows, model.image_processor, label_map) for rows in (data, others)]
        if new_head:
            self._train_heads(model, cache_pictures(model, ready[1], self.work / "images"))
            self._lap("heads")
        passes = self._pass(model, cache_pictures(model, ready[0], self.work / "images"), sampled)
        costs, limit = self.job["costs"], self.limits.mean_macs
        judge = PairJudge(passes, self.work / "pairs", costs, checking=checking, mean_macs=limit)
        pairs = self._judge(judge)
        sources, eval_images = dict(zip(model.anchors, anchors, strict=True)), len(data) - sampled // 2
        result = ScoutResult(
            pairs, self.limits, sources, self.left_out, self.job, self.seconds, len(sources), sampled, new_head,
            eval_images,
        )  # fmt: skip
        result = from_main(lambda: self._review(result.ranked(self.limits), judge))
        self._lap("check")
        return replace(result, seconds=self.seconds), judge

    def _lap(self, name: str) -> None:
        """Record the seconds since the last part ended."""
        now = time.perf_counter()
        self.seconds[name], self._began = round(now - self._began, 2), now

    def _load(self, names: Sequence[str]) -> tuple[dict[str, Anchor], bool]:
        """The candidates that can be anchors, by source, and whether they get new heads.

        Those with the largest images come first: a model prepares images as its first anchor does, and no other anchor
        then has to enlarge them.
        """
        anchors: dict[str, Anchor] = {}
        for source in progress_bar(self.job["candidates"], "candidates"):
            try:
                anchor = load_anchor(source, image_size=self.job["image_size"], dtype=torch.float32)
                anchor.search()
                anchors[source] = anchor
            except (ValueError, OSError) as error:
                self.left_out[source] = str(error)
        known = {source: know_classes([anchor], names) for source, anchor in anchors.items()}
        new_head = self.job["new_head"]
        if new_head is None:
            new_head = not all(known.values())
        for source in list(anchors):
            if not new_head and not known[source]:
                self.left_out[source] = (
                    f"it does not know the data set's {len(names)} classes; new_head=True gives all new heads"
                )
            elif new_head and anchors[source].search_result.classifier is None:
                self.left_out[source] = "it cannot take a new head: its logits do not come from one linear layer"
        usable = {source: anchor for source, anchor in anchors.items() if source not in self.left_out}
        if len(usable) < 2:
            reasons = (f"{source}: {reason}" for source, reason in self.left_out.items())
            raise ValueError("\n- ".join([f"{len(usable)} of the candidates can be an anchor, not two:", *reasons]))
        make_names_unique(usable.values())
        area = {source: anchor.preprocessing.image_size for source, anchor in usable.items()}
        first = sorted(usable, key=lambda source: -area[source][0] * area[source][1])
        return {source: usable[source] for source in first}, new_head

    def _draw(self, fitted: Dataset, held: Dataset, new_head: bool) -> tuple[Dataset, Dataset, int, int]:
        """Images of a run, and other ones for new heads.

        Returns:
            Images: those to fit and to test stitches on in turn, and behind them further held-out ones; images for
            heads; the number of those in turn; and the number of the last ones, which check the winner.
        """
        fitted, held = (_shuffled(rows) for rows in (fitted, held))
        free = max(1, len(fitted) // 2) if new_head else len(fitted)
        evaluated = min(self.job["eval_images"], len(held))
        checking = _checking(evaluated)
        half = min(self.job["images"] // 2, evaluated - checking, free)
        if 2 * half < LEAST_IMAGES:
            raise ValueError(
                f"{len(fitted)} images of {self.job['split']!r} and {len(held)} of {self.job['eval_split']!r} are too "
                f"few: {LEAST_IMAGES // 2} of each are needed, better some hundreds"
            )
        in_turn = [number // 2 + number % 2 * half for number in range(2 * half)]
        both = concatenate_datasets([fitted.select(range(half)), held.select(range(evaluated))])
        both = both.select([*in_turn, *range(2 * half, half + evaluated)])
        rest = range(half, min(len(fitted), half + self.job["head_images"]))
        return both, fitted.select([*rest]), 2 * half, checking

    def _train_heads(self, model: StitchedModelForImageClassification, pictures: FeatureCache) -> None:
        """Train the new head of each anchor, or read the one that an earlier run trained."""
        state, identity = this_process(), model.identity()
        entries = {entry["name"]: entry for entry in identity["anchors"]}
        rest = {key: value for key, value in identity.items() if key not in ("anchors", "heads")}
        for name in progress_bar(model.anchors, "heads"):
            about = {"anchor": entries[name], "images": pictures.identity, "args": asdict(HEAD_ARGS), **rest}
            key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]
            file = self.work / "heads" / f"{name}-{key}.safetensors"
            if not file.exists():
                train_heads(model, pictures, anchors=[name])
                if state.is_main_process:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_file(file) as temporary:
                        save_file(model.heads[name].state_dict(), temporary)
            state.wait_for_everyone()
            model.heads[name].load_state_dict(load_file(file))  # those of processes differ by rounding
            record_trained(model, {f"heads.{name}": model.heads[name]})

    def _pass(self, model: StitchedModelForImageClassification, pictures: FeatureCache, sampled: int) -> AnchorPasses:
        """Run each anchor over the images, once; each process runs some of them."""
        state = this_process()
        passes = AnchorPasses(model, pictures, self.work / "anchors", self.job["order"], sampled)
        table = MacsTable()
        own = _own_jobs([*model.anchors], [sum(table.blocks(anchor)) for anchor in model.anchors.values()])
        for name in progress_bar(own, "anchors"):
            with alone():
                passes.run(name)
        state.wait_for_everyone()
        self._lap("passes")
        return passes

    def _judge(self, judge: PairJudge) -> tuple[ScoutedPair, ...]:
        """The profile of each pair, the larger anchor in front; each process judges some of the pairs."""
        pairs = [*judge.passes.pairs]
        for pair in progress_bar(_own_jobs(pairs, [judge.effort(*pair) for pair in pairs]), "pairs"):
            with alone():
                judge.race(*pair)
        this_process().wait_for_everyone()
        once = list({frozenset(pair): pair for pair in reversed(pairs)}.values())
        own = {}
        for pair in progress_bar(_own_jobs(once, [1.0] * len(once)), "cascades"):
            with alone():
                own[pair] = judge.profile(*pair)
        profiles = {pair: profile for each in gather(own) for pair, profile in each.items()}
        self._lap("pairs")
        return tuple(ScoutedPair(*pair, profiles[pair]) for pair in once)

    @staticmethod
    def _review(result: ScoutResult, judge: PairJudge) -> ScoutResult:
        with alone():
            return review(result, judge)


Job = TypeVar("Job")


def _own_jobs(jobs: Sequence[Job], costs: Sequence[float]) -> list[Job]:
    """The jobs of this process, of some that differ in cost."""
    mine = this_process().process_index
    return [job for job, owner in zip(jobs, divide_jobs(costs), strict=True) if owner == mine]


def _labelled(dataset: str, split: str) -> Dataset:
    """Pictures and labels of a split, without other columns."""
    rows = load_images(dataset, split)
    assert isinstance(rows, Dataset)
    class_names_of(rows)
    return rows.select_columns(["image", "label"])


def _shuffled(rows: Dataset) -> Dataset:
    """A data set in a random order that is always the same: many are sorted by class."""
    return rows.select(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist())


def _check_cheapest(model: StitchedModelForImageClassification, limits: Budget) -> None:
    """Raise BudgetError, before anything runs, where not even the first and last blocks of two anchors fit."""
    table = MacsTable()
    blocks = {name: table.blocks(anchor) for name, anchor in model.anchors.items()}
    least = min(
        min(blocks[a][0] + blocks[b][-1] for a in blocks for b in blocks if a != b), *map(sum, blocks.values())
    )
    for cost, limit in limits.limits.items():
        if MEANS.get(cost, cost) == "macs" and least > limit:
            name = min(blocks, key=lambda each: sum(blocks[each]))
            raise BudgetError(
                f"nothing fits {limits}: the cheapest candidate is '{name}' with {short_number(sum(blocks[name]))} "
                f"MACs, and the first and last blocks of any two take {short_number(least)}"
            )
