"""How accurate an elastic network is at shares of its own latency, before and after each stage of training.

    python recipes/benchmarks/skip.py RECIPE [--quick] [--out FILE.json] [--seconds 300] [--candidates 24] [--cpu-time]
        [--front DIR --dataset DIR]

RECIPE names the anchor, its images and its routes that skip blocks. Branches train on all of these, one route a step
drawn at random, for so many seconds in each of two stages: features first, then the task. Latency is of one image in
eager mode: every piece is timed, so that the latency of every route is known, and of the routes that run in at most a
share of the anchor's own time, and in no less than 8 % below, some are evaluated on one half of the evaluation images.
The best one is measured end to end, side by side with the anchor, and its accuracy is that on the other half. With
--cpu-time what the main thread runs counts as time, which other work on the machine disturbs less.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it may have the name of a module of Python's

import dataclasses
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate.utils import set_seed
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from restnet_hf import Route, StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.distributed import this_process
from restnet_hf.files import atomic_file
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.profiling.timing import check_latency, measure_latency
from restnet_hf.recipe import Recipe, hold_out, load_recipe, prepare


SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
BELOW = 0.08
TRIAL = (3, 23)  # steps of two short runs, from which the time of a step is known
STAGES: dict[str, dict[str, Any]] = {
    "features": {"match": "stitch", "num_train_epochs": 0, "matching_epochs": 1000, "learning_rate": 4e-4},
    "task": {"num_train_epochs": 1000, "learning_rate": 1e-4},  # four times as much undoes what features taught
}


def candidates(
    model: StitchedModelForImageClassification, count: int, clock: Callable[[], float]
) -> tuple[LatencyTable, dict[float, list[Route]]]:
    """What each piece takes, and by share of the anchor's latency some routes that run in that time."""
    base = Route.alone(model.front)
    single = [route for route in model.routes if len(route.stitch_points) == 1]  # together they have every piece
    table = measure_latency([(route, model.steps(route)) for route in (base, *single)], clock=clock)
    known = {route: table.latency_ms(model.steps(route)) for route in (base, *model.routes)}
    found = {}
    for share in SHARES:
        near = [route for route in model.routes if share - BELOW <= known[route] / known[base] <= share]
        found[share] = sorted(random.Random(0).sample(near, min(count, len(near))))
    return table, found


def learn(
    model: StitchedModelForImageClassification, stage: str, rows: Dataset, seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """A stage of training that takes so many seconds."""
    known = {name: value.clone() for name, value in model.stitches.state_dict().items()}

    def run(steps: int) -> float:
        model.stitches.load_state_dict(known)
        began = clock()
        args = TrainArgs(train_head=False, sampler="uniform", max_steps=steps, **STAGES[stage])
        train(model, rows, args)
        return clock() - began

    first, second = (run(steps) for steps in TRIAL)
    step = (second - first) / (TRIAL[1] - TRIAL[0])
    steps = max(1, int((seconds - first + TRIAL[0] * step) / step))
    return {"steps": steps, "seconds": run(steps)}


def best(
    model: StitchedModelForImageClassification,
    table: LatencyTable,
    found: Mapping[float, Sequence[Route]],
    halves: Sequence[Dataset],
    clock: Callable[[], float],
) -> dict[float, dict[str, Any]]:
    """Of each share the best route on one half of the images, with its accuracy on the other and its latency."""
    base = Route.alone(model.front)
    search = model.profile(halves[0], [route for routes in found.values() for route in routes])
    scores = {row.route: row.scores["accuracy"] for row in search.routes}
    chosen = {share: max(routes, key=scores.__getitem__) for share, routes in found.items() if routes}
    finalists = list(dict.fromkeys((base, *chosen.values())))
    test = {row.route: row for row in model.profile(halves[1], finalists).routes}
    checks = check_latency(table, [(route, model.steps(route)) for route in finalists], clock=clock)
    rows = {1.0: base, **chosen}
    return {
        share: {
            "route": str(route),
            "accuracy": test[route].scores["accuracy"],
            "macs": test[route].costs["macs"],
            "latency_ms": checks[route].measured.ms,
            "predicted_ms": checks[route].predicted_ms,
            "share": checks[route].measured.ms / checks[base].measured.ms,
        }
        for share, route in rows.items()
    }


def prepared(job: Recipe) -> tuple[StitchedModelForImageClassification, Dataset, list[Dataset]]:
    """The elastic model with its head trained, images to train on, and two halves to evaluate on."""
    set_seed(job.seed)
    model, train_set, eval_set = prepare(job)
    model.to(this_process().device)
    calibration, others = hold_out(train_set, job.calibration_images, model.config.new_head)
    if model.config.new_head:
        train(model, others, dataclasses.replace(job.heads, train_head=True), [Route.alone(model.front)])
    options = {key: value for key, value in (job.family or {}).items() if key != "max_routes"}
    model.add_family(config=job.stitch_config(), **options)
    model.fit_stitches(calibration)
    half = len(eval_set) // 2
    return model, others, [eval_set.select(range(half)), eval_set.select(range(half, len(eval_set)))]


def main(
    recipe: Path,
    quick: bool = False,
    out: Path | None = None,
    seconds: float = 300.0,
    candidates_per_share: int = 24,
    cpu_time: bool = False,
    front: str | None = None,
    dataset: str | None = None,
) -> None:
    """Print the table, and write it to OUT."""
    job = load_recipe(recipe, front=front, dataset=dataset)
    if quick:
        job = dataclasses.replace(job, train_images=128, eval_images=64, calibration_images=64)
        seconds, candidates_per_share = 1.0, 2
    logging.disable_progress_bar()
    torch.manual_seed(0)
    clock = time.thread_time if cpu_time else time.perf_counter
    model, rows, halves = prepared(job)
    pieces, found = candidates(model, candidates_per_share, clock)
    print(f"{len(model.routes)} routes, {len(model.stitches)} branches; of each share {[*map(len, found.values())]}")
    stages: dict[str, dict[float, dict[str, Any]]] = {"before": best(model, pieces, found, halves, clock)}
    result: dict[str, Any] = {"stages": stages, "training": {}}
    for stage in STAGES:
        result["training"][stage] = learn(model, stage, rows, seconds, clock)
        stages[f"after {stage}"] = best(model, pieces, found, halves, clock)
        print(stage, result["training"][stage], flush=True)
    table = Table("share", title="accuracy, % (share of the anchor's latency, measured)")
    for stage in stages:
        table.add_column(stage, justify="right")
    for share in (1.0, *SHARES):
        cells = (each.get(share) for each in stages.values())
        table.add_row(f"{share:.0%}", *(f"{100 * c['accuracy']:.1f} ({c['share']:.0%})" if c else "" for c in cells))
    Console(width=100).print(table)
    if out is not None:
        ratios = {f"{s}, {share:.0%}": row["accuracy"] for s, each in stages.items() for share, row in each.items()}
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps({"ratios": ratios, **result}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
