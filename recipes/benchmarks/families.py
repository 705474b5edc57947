"""How good the routes of a family are after equal time of training, joined and trained in the manner of each method.

    python recipes/benchmarks/families.py RECIPE [--quick] [--out FILE.json] [--seconds 120] [--seeds 2] [--cpu-time]
        [--front DIR --between DIR --end DIR --dataset DIR]

RECIPE names the anchors, images and new heads, which are trained once and then kept as they are; each mode prints its
routes, stitches and what trains. Least squares on the calibration images comes first, then each mode has so many
seconds, and the schedule of its learning rate ends in time. The area is the mean, over budgets from the MACs of the
cheapest anchor to those of the most costly, of the accuracy of the best network that fits, anchors alone among them;
of stitched routes alone, from the cheapest of them on. Spread is the standard deviation over seeds. With --cpu-time
what the main thread runs counts, which other work on the machine does not disturb.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it may have the name of a module of Python's

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from restnet_hf import Profile, Route, StitchConfig, StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.distributed import this_process
from restnet_hf.files import atomic_file
from restnet_hf.profiling.plots import plot_tradeoff
from restnet_hf.recipe import hold_out, load_recipe, prepare


TRIAL = 30  # steps of the first run
OFF, TRIES = 0.1, 6  # share of the time by which a run may miss it before it is made again, so often in all


@dataclasses.dataclass(frozen=True)
class Mode:
    """A family and how it trains: options of ``add_family``, the kind of its stitches, and options of `TrainArgs`."""

    family: Mapping[str, Any]
    kind: str = "linear"
    training: Mapping[str, Any] | None = None


UP, BOTH = {"kind": "nearest"}, {"kind": "two_way", "directions": "both", "max_routes": 54}
MODES = {
    "least squares alone": Mode(UP),
    "stitch-only": Mode(UP, training={"sampler": "uniform"}),
    "SN-Net": Mode(UP, training={"sampler": "uniform", "tuning": "full"}),
    "SN-Netv2": Mode(BOTH, "lora", {"sampler": "buckets", "tuning": "full"}),
}


def clear(model: StitchedModelForImageClassification) -> None:
    """Take all stitches out."""
    model.set_route(Route.alone(model.front))
    for route in model.routes:
        model.delete_stitch(route)


def begin(model: StitchedModelForImageClassification, mode: Mode, seed: int) -> None:
    """New stitches, the same for the same seed."""
    clear(model)
    set_seed(seed)
    model.add_family(config=StitchConfig(mode.kind), **mode.family)


def trained(
    model: StitchedModelForImageClassification,
    mode: Mode,
    sets: Mapping[str, Any],
    seed: int,
    seconds: float,
    clock: Any,
) -> dict[str, Any]:
    """The family after so many seconds."""

    def learn(steps: int) -> float:
        began = clock()
        train(
            model,
            sets["train"],
            TrainArgs(train_head=False, seed=seed, num_train_epochs=steps, max_steps=steps, **(mode.training or {})),
        )
        return clock() - began

    steps, used = TRIAL, 0.0
    for _ in range(TRIES if mode.training is not None else 1):
        begin(model, mode, seed)
        model.fit_stitches(sets["calibration"])
        if mode.training is None:
            steps = 0
            break
        used = learn(steps)
        if abs(used / seconds - 1) <= OFF:
            break
        steps = max(1, int(steps * min(16.0, seconds / used)))
    profile = model.profile(sets["eval"])
    points = {str(row.route): [row.costs["macs"], row.scores["accuracy"]] for row in profile.routes}
    return {"points": points, "seconds": used, "steps": steps, "stitches": len(model.stitches), "profile": profile}


def area(points: Sequence[Sequence[float]], least: float, most: float) -> float:
    """Mean over budgets in MACs, ``least`` to ``most``, of the best accuracy of points (MACs, accuracy) that fit."""
    costs = sorted({macs for macs, _ in points})
    edges = [max(least, costs[0]), *(macs for macs in costs if max(least, costs[0]) < macs < most), most]
    best = [(b - a) * max(accuracy for macs, accuracy in points if macs <= a) for a, b in pairwise(edges)]
    return sum(best) / (edges[-1] - edges[0])


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over seeds, and the standard deviation of the area."""
    rows = []
    for run in runs:
        points = run["points"]
        alone = [point for name, point in points.items() if "+" not in name]
        least, most = min(macs for macs, _ in alone), max(macs for macs, _ in alone)
        stitched = [point for name, point in points.items() if "+" in name]
        rows.append((area([*points.values()], least, most), area(stitched, 0, most), run["seconds"], run["steps"]))
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    off = statistics.stdev(row[0] for row in rows) if len(rows) > 1 else 0.0
    routes = len(runs[0]["points"])
    names = ("area", "area stitched", "seconds", "steps")
    return {**dict(zip(names, means, strict=True)), "spread": off, "routes": routes, "stitches": runs[0]["stitches"]}


def show(rows: Mapping[str, Mapping[str, float]]) -> None:
    """A table of the modes."""
    table = Table("mode", title="area under the front, %")
    for name in ("routes", "stitches", "area", "stitched alone", "seconds", "steps"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['routes']:.0f}",
            f"{row['stitches']:.0f}",
            f"{100 * row['area']:.2f} ± {100 * row['spread']:.2f}",
            f"{100 * row['area stitched']:.2f}",
            f"{row['seconds']:.0f}",
            f"{row['steps']:.0f}",
        )
    Console(width=110).print(table)


def main(
    recipe: Path,
    quick: bool = False,
    out: Path | None = None,
    seconds: float = 120.0,
    seeds: int = 2,
    cpu_time: bool = False,
    front: str | None = None,
    between: list[str] | None = None,
    end: str | None = None,
    dataset: str | None = None,
) -> None:
    """Print the table, and write it to OUT with a picture of each mode's first seed beside it."""
    job = load_recipe(recipe, front=front, between=between or None, end=end, dataset=dataset)
    if quick:
        job = dataclasses.replace(job, train_images=128, eval_images=64, calibration_images=64)
        seconds, seeds = 1.0, 1
    logging.disable_progress_bar()
    clock = time.thread_time if cpu_time else time.perf_counter
    set_seed(job.seed)
    model, train_set, eval_set = prepare(job)
    model.to(this_process().device)
    calibration, others = hold_out(train_set, job.calibration_images, model.config.new_head)
    if model.config.new_head:
        heads = dataclasses.replace(job.heads, train_head=True)
        train(model, others, heads, [Route.alone(name) for name in model.anchors])
    sets = {"train": others, "calibration": calibration, "eval": eval_set}
    result: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for name, mode in MODES.items():
            if seed and mode.training is None:
                continue
            run = trained(model, mode, sets, seed, seconds, clock)
            profile: Profile = run.pop("profile")
            if out is not None and not seed:
                plot_tradeoff(profile, out.with_name(f"{out.stem}-{name.replace(' ', '-').replace(',', '')}.png"))
            result.setdefault(name, []).append(run)
            print(f"seed {seed}, {name}: {run['steps']} steps in {run['seconds']:.0f} s", flush=True)
            rows = {key: summary(runs) for key, runs in result.items()}
            if out is not None:
                ratios = {f"{key}: area": row["area"] for key, row in rows.items()}
                with atomic_file(out) as temporary:
                    temporary.write_text(json.dumps({"ratios": ratios, "summary": rows, "runs": result}, indent=1))
    show(rows)


if __name__ == "__main__":
    typer.run(main)
