"""How accurate the routes of a pair are after equal wall time of training by different means, at budgets of MACs.

    python recipes/benchmarks/accuracy.py [--quick] [--out FILE.json] [--seconds 60] [--seeds 3] [--routes 4]
        [--cpu-time] [--recipe YAML --front DIR --end DIR --dataset DIR]

All methods share images, routes and new heads (trained once, where the task needs them), and begin with new stitches.
Each has so many seconds for all routes together: least squares, what comes before the first step, the filling of a
cache and the steps count; reading images (they are decoded once and kept), trials of how long a step takes, and
evaluation do not. The number of steps is set from such trials, so that the schedule of the learning rate ends in time;
a run that took a fifth more or less is made again, twice at most, and the closest one counts. Where other work makes
wall time mean little, --cpu-time counts what the main thread runs. Of two stages each takes half of the time and has a
schedule of its own. All else is as `TrainArgs` has it by default.

Peers are the smaller anchor itself, all of its weights trained further on the same images in the same time, with and
without the larger one to learn from. Areas are mean accuracies of the best network that fits a budget: with both
anchors, over budgets from the smaller's MACs to the larger's, and of a method's own networks alone, over budgets from
the cheapest of them to the larger anchor. Spread is the standard deviation over seeds.

FILE.json is written after every run; the same command goes on where it was stopped, also with more seeds or new
methods. New heads are kept beside it. Without --recipe the pair is the embedded demo's.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate.utils import set_seed
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from restnet_hf import Route, StitchConfig, StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.data import batches
from restnet_hf.demo.paths import DATA, END, FRONT, RECIPE
from restnet_hf.distributed import this_process
from restnet_hf.files import atomic_file
from restnet_hf.profiling.accuracy import score_routes
from restnet_hf.recipe import Recipe, hold_out, load_recipe, prepare
from restnet_hf.steps import Step
from restnet_hf.training.losses import task_loss


@dataclasses.dataclass(frozen=True)
class Method:
    """How the stitches of all routes come to be.

    Args:
        stages: what is learned, one after the other: ``final`` or ``later``, features to match, or ``task``.
        options: of `TrainArgs`, in every stage.
        fit: by least squares before that.
        kind: of the stitches.
        cached: whether the outputs of frozen networks are cached.
    """

    stages: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fit: bool = True
    kind: str = "linear"
    cached: bool = False


METHODS = {
    "least squares": Method(),
    "least squares, matching (final)": Method(("final",)),
    "least squares, matching (later)": Method(("later",)),
    "least squares, task": Method(("task",)),
    "least squares, matching, task": Method(("final", "task")),
    "random stitch, task": Method(("task",), fit=False),
    "norm": Method(("task",), {"tuning": "norm"}),
    "lora": Method(("task",), {"tuning": "lora"}),
    "full (SN-Net)": Method(("task",), {"tuning": "full", "sampler": "uniform"}),
    "full, sandwich": Method(("task",), {"tuning": "full", "sampler": "sandwich"}),
    "stitch kind lora, task": Method(("task",), kind="lora"),
    "stitch kind mlp, task": Method(("task",), kind="mlp"),
    "least squares, task, cached": Method(("task",), cached=True),
}
DEFAULT = TrainArgs()
PEERS = {"small anchor trained further": 0.0, "large distilled into small": DEFAULT.distillation}
TRIED = 2  # steps of the first trial
TRIAL = 0.1  # share of the time that the steps of a trial take at least
OFF, TRIES = 0.2, 3  # share of the time by which a run may miss it before it is made again, so often in all


@dataclasses.dataclass
class Pair:
    """What all methods share; of the anchors alone, the one of fewer MACs first."""

    model: StitchedModelForImageClassification
    train_set: Dataset
    eval_set: Dataset
    calibration: Dataset
    config: StitchConfig
    routes: list[Route] = dataclasses.field(default_factory=list)
    anchors: list[Route] = dataclasses.field(default_factory=list)
    clock: Callable[[], float] = time.perf_counter

    def timed(self, task: Callable[[], object]) -> float:
        """Seconds that a task takes."""
        began = self.clock()
        task()
        return self.clock() - began


def set_up(job: Recipe, heads: Path | None, known: bool) -> Pair:
    """A pair without routes; new heads are trained, or read where they are known."""
    set_seed(job.seed)
    model, train_rows, eval_rows = prepare(job)
    model.to(this_process().device)
    train_set, eval_set = in_memory(train_rows), in_memory(eval_rows)
    calibration, others = hold_out(train_set, job.calibration_images, model.config.new_head)
    if model.config.new_head and known and heads is not None:
        model.heads.load_state_dict(load_file(heads))
        model.config.trained_heads = sorted(model.heads)
    elif model.config.new_head:
        alone = [Route.alone(name) for name in model.anchors]
        train(model, others, dataclasses.replace(job.heads, train_head=True), alone)
        if heads is not None:
            with atomic_file(heads) as temporary:
                save_file(model.heads.state_dict(), temporary)
    return Pair(model, train_set, eval_set, calibration, StitchConfig(class_token=job.class_token))


def in_memory(rows: Dataset) -> Dataset:
    """The same images, decoded and prepared once."""
    found = list(DataLoader(rows, batch_size=64))
    images, labels = (torch.cat([batch[name] for batch in found]) for name in ("pixel_values", "labels"))

    def look_up(batch: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
        return {"pixel_values": images[batch["row"]], "labels": labels[batch["row"]]}

    return Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(look_up)


def choose(pair: Pair, count: int, selector: str) -> dict[str, Any]:
    """Choose the routes; returns what is known before any of them learns."""
    routes = pair.model.select_stitches(pair.calibration, selector, count, pair.config)
    profile = pair.model.profile(pair.eval_set, [Route.alone(name) for name in pair.model.anchors])
    alone, costs = sorted(profile.routes, key=lambda row: row.costs["macs"]), pair.model.route_costs()
    return {
        "pair": " to ".join(pair.model.anchors),
        "anchors": {str(row.route): [row.costs["macs"], row.scores["accuracy"]] for row in alone},
        "routes": {str(route): costs(route)["macs"] for route in routes},
        "images": [len(pair.train_set), len(pair.calibration), len(pair.eval_set)],
        "runs": {},
    }


def renew(pair: Pair, kind: str, seed: int) -> None:
    """New stitches in the place of all, and nothing tuned."""
    model = pair.model
    model.set_route(Route.alone(model.front))
    for route in model.routes:
        model.delete_stitch(route)
    set_seed(seed)
    for route in pair.routes:
        model.add_stitch(route, dataclasses.replace(pair.config, kind=kind))


def pace(run: Callable[[int], float], enough: float, cold: bool = False) -> tuple[float, float]:
    """Seconds before the first step, and of a step.

    Args:
        run: makes so many steps from the beginning and returns the seconds that it took.
        enough: trials go on until their steps take so many seconds.
        cold: what only the first of all runs does, such as filling a cache, counts.
    """
    first, again, steps = run(1), run(1), TRIED
    while (spent := run(1 + steps) - again) < enough:
        steps = math.ceil(steps * min(16, max(2, 1.5 * enough / max(spent, 1e-9))))
    return max(0.0, (first if cold else again) - spent / steps), spent / steps


def in_time(make: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The run that took closest to its time, of a few if it must be."""
    made = [make()]
    while made[-1]["steps"] and abs(made[-1]["seconds"] / seconds - 1) > OFF and len(made) < TRIES:
        made.append(make())
    return min(made, key=lambda run: abs(run["seconds"] / seconds - 1))


def run_method(pair: Pair, method: Method, seed: int, seconds: float) -> dict[str, Any]:
    """New stitches made by one method in so many seconds: what each route then costs and gives."""

    def learn(stage: str, steps: int, folder: str) -> float:
        how: dict[str, Any] = {"num_train_epochs": 0, "matching_epochs": steps, "match": stage}
        how = {"num_train_epochs": steps} if stage == "task" else how
        how |= {"max_steps": steps, "cache_dir": folder if method.cached else None}
        args = TrainArgs(train_head=False, seed=seed, **how, **method.options)
        return pair.timed(lambda: train(pair.model, pair.train_set, args, pair.routes))

    def trial(stage: str, steps: int, folder: str) -> float:
        renew(pair, method.kind, seed)
        return learn(stage, steps, folder)

    paces = []
    share = seconds / max(1, len(method.stages))
    for stage in method.stages:
        with tempfile.TemporaryDirectory() as folder:
            paces.append(pace(lambda n, s=stage, f=folder: trial(s, n, f), TRIAL * share, method.cached))
    renew(pair, method.kind, seed)
    used = pair.timed(lambda: pair.model.fit_stitches(pair.calibration, pair.routes)) if method.fit else 0.0
    steps: list[int] = []
    for number, (stage, (before, step)) in enumerate(zip(method.stages, paces, strict=True), 1):
        steps.append(max(1, int((number * share - used - before) / step)))
        with tempfile.TemporaryDirectory() as folder:
            used += learn(stage, steps[-1], folder)
    profile = pair.model.profile(pair.eval_set, pair.routes)
    points = {str(row.route): [row.costs["macs"], row.scores["accuracy"]] for row in profile.routes}
    return {"points": points, "seconds": used, "steps": steps, "paces": paces}


def run_peer(pair: Pair, distillation: float, seed: int, seconds: float) -> dict[str, Any]:
    """The smaller anchor trained further in so many seconds."""
    small = pair.anchors[0]
    before, step = pace(lambda n: pair.timed(lambda: further(pair, distillation, n, seed)), TRIAL * seconds)
    steps = max(1, int((seconds - before) / step))
    began = pair.clock()
    network = further(pair, distillation, steps, seed)
    used = pair.clock() - began
    walk = (Step("trained further", network, (1, 3, *pair.model.preprocessing.image_size)),)
    scores, _ = score_routes([(small, walk)], batches(pair.eval_set, DEFAULT.batch_size), pair.model.device)
    points = {str(small): [pair.model.route_costs()(small)["macs"], scores[small]]}
    return {"points": points, "seconds": used, "steps": [steps], "paces": [(before, step)]}


def further(pair: Pair, distillation: float, steps: int, seed: int) -> nn.Module:
    """A copy of the smaller anchor after so many steps on all of its weights, with dropout and batch statistics."""
    small, large = pair.anchors
    network, teacher = pair.model.bake(small).train().requires_grad_(True), pair.model.bake(large)
    rate, new = DEFAULT.learning_rate, network[-1] if pair.model.heads else nn.Identity()
    others = [p for p in network.parameters() if all(p is not own for own in new.parameters())]
    groups = [{"params": list(new.parameters()), "lr": rate}, {"params": others, "lr": 0.1 * rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=DEFAULT.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(DEFAULT.warmup_ratio * steps), steps)
    set_seed(seed)
    several = len(pair.train_set) > DEFAULT.batch_size  # batch statistics of one image alone are none
    loader = DataLoader(pair.train_set, batch_size=DEFAULT.batch_size, shuffle=True, drop_last=several)
    for batch in islice(chain.from_iterable(repeat(loader)), steps):
        images, labels = (batch[name].to(pair.model.device) for name in ("pixel_values", "labels"))
        with torch.no_grad():
            taught = teacher(images) if distillation else None
        loss = task_loss(network(images), labels, taught, distillation, DEFAULT.temperature)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss of {small} is {loss.item()}")
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), DEFAULT.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return network.eval()


def area(points: Sequence[Sequence[float]], least: float, most: float) -> float:
    """Mean over budgets in MACs of the best accuracy that fits; budgets that nothing fits are left out.

    Args:
        points: MACs and accuracy of each network.
        least, most: budgets.
    """
    costs = sorted({macs for macs, _ in points})
    least = max(least, costs[0])
    if least >= most:
        return max(accuracy for macs, accuracy in points if macs <= least)
    edges = [least, *(macs for macs in costs if least < macs < most), most]
    steps = [(b - a) * max(accuracy for macs, accuracy in points if macs <= a) for a, b in pairwise(edges)]
    return sum(steps) / (most - least)


def spread(values: Sequence[float]) -> list[float | None]:
    """Mean and standard deviation of seeds; None for that of one."""
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]


def summary(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each method means and standard deviations over seeds of accuracies, areas and seconds."""
    anchors = list(result["anchors"].values())
    (least, _), (most, _) = anchors
    rows = {}
    for name, runs in result["runs"].items():
        points = [list(run["points"].values()) for run in runs.values()]
        routes = next(iter(runs.values()))["points"]
        rows[name] = {
            "accuracy": {route: spread([run["points"][route][1] for run in runs.values()]) for route in routes},
            "area": spread([area([*each, *anchors], least, most) for each in points]),
            "area alone": spread([area(each, 0, most) for each in points]),
            "seconds": spread([run["seconds"] for run in runs.values()]),
            "steps": spread([sum(run["steps"]) for run in runs.values()]),
        }
    return rows


def show(result: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of one pair."""
    (small, small_at), (large, large_at) = result["anchors"].items()
    columns = {small: small_at[0], **result["routes"], large: large_at[0]}
    columns = dict(sorted(columns.items(), key=lambda item: item[1]))
    frozen = {small: small_at[1:], large: large_at[1:]}
    table = Table("method", title=f"{result['pair']}, {result['settings']['seconds']:g} s: accuracy, %, by MACs, M")
    for name in (*(f"{macs / 1e6:.1f}" for macs in columns.values()), "area", "area alone", "seconds", "steps"):
        table.add_column(name, justify="right")

    def cell(value: Sequence[float | None], scale: float = 100, digits: int = 1) -> str:
        return " ± ".join(f"{scale * each:.{digits}f}" for each in value if each is not None)

    table.add_row("anchors, frozen", *(cell(frozen.get(route, ())) for route in columns))
    for name, row in rows.items():
        accuracies = [cell(row["accuracy"].get(route, ())) for route in columns]
        areas = [cell(row[key], digits=2) for key in ("area", "area alone")]
        table.add_row(name, *accuracies, *areas, cell(row["seconds"], 1), cell(row["steps"], 1, 0))
    Console(width=85 + 13 * len(columns)).print(table)


def read_known(out: Path | None, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a file, None where there is none; raises ValueError if it is of other settings."""
    if out is None or not out.exists():
        return None
    result = json.loads(out.read_text())
    others = sorted(key for key in settings if result["settings"].get(key) != settings[key])
    if others:
        raise ValueError(f"{out} holds a result with other {', '.join(others)}; give another --out, or remove it")
    return result


def write(result: Mapping[str, Any], out: Path | None) -> None:
    """Write all that is known so far."""
    if out is None:
        return
    rows = summary(result)
    label = f"{result['pair']}, {result['settings']['seconds']:g} s"
    ratios = {f"{label}, {name}: {key}": row[key][0] for name, row in rows.items() for key in ("area", "area alone")}
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps({**result, "ratios": ratios, "summary": rows}, indent=1) + "\n")


def main(
    quick: bool = False,
    out: Path | None = None,
    recipe: Path | None = None,
    front: str | None = None,
    end: str | None = None,
    dataset: str | None = None,
    seconds: float = 60.0,
    seeds: int = 3,
    routes: int = 4,
    cpu_time: bool = False,
) -> None:
    """Print the table of one pair, and write it to OUT."""
    demo = {"front": str(FRONT), "end": str(END), "dataset": str(DATA)}
    job = load_recipe(recipe or RECIPE, **({"front": front, "end": end, "dataset": dataset} if recipe else demo))
    selector = "position" if quick or recipe is not None else job.method
    if quick:
        job = dataclasses.replace(job, train_images=256, eval_images=200, calibration_images=128)
        seconds, seeds = 2.0, 1
    settings = {"seconds": seconds, "routes": routes, "selector": selector, "recipe": dataclasses.asdict(job)}
    settings |= {"threads": torch.get_num_threads(), "device": str(this_process().device), "cpu_time": cpu_time}
    known = read_known(out, json.loads(json.dumps(settings)))
    runs = known["runs"] if known else {}
    todo = [(s, name) for s in range(seeds) for name in (*METHODS, *PEERS) if str(s) not in runs.get(name, {})]
    minutes = len(todo) * seconds / 60
    print(f"{len(todo)} runs of {seconds:g} s: {minutes:.1f} minutes of training, perhaps twice that with trials and")
    print("evaluation, after the training of new heads, if any, and the choice of routes", flush=True)
    logging.disable_progress_bar()
    pair = set_up(job, None if out is None else out.with_suffix(".heads.safetensors"), known is not None)
    result = known or {"settings": settings, **choose(pair, routes, selector)}
    pair.routes = [pair.model.route(text) for text in result["routes"]]
    pair.anchors = [pair.model.route(text) for text in result["anchors"]]
    pair.clock = time.thread_time if cpu_time else time.perf_counter
    write(result, out)
    for seed, name in todo:
        make = partial(run_method, pair, METHODS[name]) if name in METHODS else partial(run_peer, pair, PEERS[name])
        run = in_time(partial(make, seed, seconds), seconds)
        result["runs"].setdefault(name, {})[str(seed)] = run
        print(f"seed {seed}, {name}: {run['seconds']:.1f} s", flush=True)
        write(result, out)
    show(result, summary(result))


if __name__ == "__main__":
    typer.run(main)
