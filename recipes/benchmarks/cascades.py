"""What cascades give at a mean cost, beside routes alone, and what running one takes beside the parts that ran.

    python recipes/benchmarks/cascades.py [--quick] [--out FILE.json] [--adapter DIR --dataset DIR] [--images N]
        [--split test] [--budget MACS] [--resamplings 1000 --calibration-images 600]

Without --adapter it is the demo's anchors with stitches fitted by least squares. All figures are on test images that
chose nothing: thresholds are chosen on four fifths of them and judged on the last, five times.

Gap closed, over mean MACs: by routes alone; by cascades of the two anchors; by cascades of all routes; and by these if
nothing that two routes share were run once. --budget gives the best accuracy within so many mean MACs, with the
standard deviation over the five folds.

--resamplings draws so many calibration sets from the images and promises on each an agreement of 0.97 with the large
anchor, with certainty 0.95: the share of promises that are broken on all images, and the mean cost of what was chosen
over that of the cheapest cascade that does agree so often on all images. 1 would be the tightest.

Overhead: a cascade's time for an image or 32 of them over the time of the parts that ran, measured in turn; the least
time that is possible is 1. Images are those that go to the last route, and those that the first answers.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table

from restnet_hf import Route, StitchedModelForImageClassification
from restnet_hf.cascading import Stage, plan_stages
from restnet_hf.data import batches
from restnet_hf.data.datasets import load_images
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.files import atomic_file
from restnet_hf.profiling.cascades import (
    FOLDS,
    Observations,
    StageCosts,
    as_cascade,
    calibrate_cascades,
    certify_cascade,
    observe_routes,
    run_chain,
    search_cascades,
)
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.fronts import measure_gap
from restnet_hf.routes.profile import ProfiledCascade, ProfiledRoute
from restnet_hf.steps import run_steps


AGREEMENT, CERTAINTY = 0.97, 0.95  # what is promised


def load(
    adapter: Path | None, dataset: str, split: str, images: int | None
) -> tuple[StitchedModelForImageClassification, Dataset]:
    """The model, and images prepared for it."""
    if adapter is not None:
        model = StitchedModelForImageClassification.from_pretrained(adapter)
    else:
        model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32")
        calibration = load_images(dataset, "train").shuffle(seed=1).select(range(1000))
        model.select_stitches(calibration, "fitted_accuracy", 4)
        model.fit_stitches(calibration)
    rows = load_images(dataset, split).shuffle(seed=1)
    return model, model.prepare_data(rows.select(range(min(images or len(rows), len(rows)))))


def gap(observed: Observations, costs: StageCosts, anchors: Sequence[int], with_cascades: bool) -> float | None:
    """Gap closed between the anchors by the routes that were observed, or by their cascades too."""
    scores = observed.scores()
    rows: list[Any] = [
        ProfiledRoute(route, {"mean_macs": cost}, {"accuracy": scores[route]})
        for at, (route, cost) in enumerate(zip(observed.routes, costs.alone, strict=True))
        if at in anchors or route.stitch_points or route.tuned
    ]
    for each in calibrate_cascades(observed, costs) if with_cascades else ():
        cascade = as_cascade(observed, each.chain)
        assert isinstance(cascade, Cascade)
        rows.append(ProfiledCascade(cascade, {"mean_macs": each.mean_cost}, {"accuracy": each.score}))
    return measure_gap(rows, "mean_macs", "accuracy")[0]


def within(observed: Observations, costs: StageCosts, budget: float) -> tuple[list[float], list[float]]:
    """Accuracy and mean cost in each fold of the best chain within a mean cost on the others."""
    fold_of, found, spent = np.random.default_rng(0).permutation(len(observed)) % FOLDS, [], []
    for fold in range(FOLDS):
        budgets = np.array([budget])
        (chain,) = search_cascades(observed.select_images(fold_of != fold), costs, budgets).chains
        assert chain is not None
        outcome = run_chain(observed.select_images(fold_of == fold), chain)
        found.append(float(outcome.right.mean()))
        spent.append(outcome.mean_cost(costs.added_costs(chain.routes)))
    return found, spent


def promises(observed: Observations, costs: StageCosts, reference: int, size: int, times: int) -> dict[str, float]:
    """What becomes of promises that are made on so many images, drawn so many times, over all images."""
    agreeing = dataclasses.replace(observed, right=observed.classes == observed.classes[reference])
    budgets = np.linspace(costs.alone.min(), costs.alone[reference], 512)
    whole = search_cascades(agreeing, costs, budgets)
    least = float(budgets[np.argmax(whole.scores >= AGREEMENT)])
    kept, spent, rng = [], [], np.random.default_rng(0)
    for _ in range(times):
        drawn = agreeing.select_images(rng.choice(len(agreeing), size, replace=False))
        chain, _ = certify_cascade(drawn, costs, reference, AGREEMENT, CERTAINTY)
        outcome = run_chain(agreeing, chain)
        kept.append(float(outcome.right.mean()))
        spent.append(outcome.mean_cost(costs.added_costs(chain.routes)))
    broken = sum(share < AGREEMENT for share in kept) / times
    return {
        "promises broken": broken,
        "agreement, mean": statistics.fmean(kept),
        "cost over the least that agrees": statistics.fmean(spent) / least,
        "least cost that agrees over the large anchor": least / float(costs.alone[reference]),
    }


def median_ms(runs: Sequence[Callable[[], object]], times: int) -> list[float]:
    """Median milliseconds of some functions, run in turn."""
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(times):
        for at, run in enumerate(runs):
            began = time.perf_counter()
            run()
            spent[at].append(1e3 * (time.perf_counter() - began))
    return [statistics.median(each) for each in spent]


@torch.no_grad()
def overhead(model: StitchedModelForImageClassification, x: torch.Tensor, cascade: Cascade, times: int) -> float:
    """Time of a cascade on images that all take the same way, over that of the stages that run."""
    stages = plan_stages([(route, model.steps(route)) for route in cascade.routes])
    answers = model(x, cascade=cascade).answered_by
    assert answers is not None
    ran: list[Stage] = stages[: int(answers.max()) + 1]

    def parts() -> None:
        saved: dict[tuple[str, ...], torch.Tensor] = {(): x}
        for stage in ran:
            y = saved[stage.start]
            for done, step in enumerate(stage.steps, 1):
                y = run_steps(y, [step])
                if done in stage.saved:
                    saved[stage.saved[done]] = y

    whole, alone = median_ms([lambda: model(x, cascade=cascade), parts], times)
    return whole / alone


def ways(model: StitchedModelForImageClassification, rows: Dataset, cascade: Cascade) -> dict[str, torch.Tensor]:
    """Images that the first route answers, and images that go on to the last, 32 of each at most."""
    found: dict[str, list[torch.Tensor]] = {"first route": [], "last route": []}
    with torch.no_grad():
        for batch in batches(rows, 64):
            answers = model(batch["pixel_values"], cascade=cascade).answered_by
            found["first route"].append(batch["pixel_values"][answers == 0])
            found["last route"].append(batch["pixel_values"][answers == len(cascade.routes) - 1])
            if all(sum(map(len, each)) >= 32 for each in found.values()):
                break
    joined = {name: torch.cat(each)[:32] for name, each in found.items()}
    return {name: x for name, x in joined.items() if len(x)}


def main(
    quick: bool = False,
    out: Path | None = None,
    adapter: Path | None = None,
    dataset: str = str(DATA),
    images: int | None = None,
    split: str = "test",
    budget: float | None = None,
    resamplings: int = 0,
    calibration_images: int = 600,
) -> None:
    """Print the table, and write its ratios to OUT."""
    disable_progress_bars()
    images, times = (400, 20) if quick else (images, 200)
    model, rows = load(adapter, dataset, split, images)
    walks = [(route, model.steps(route)) for route in model.all_routes]
    observed = observe_routes(walks, batches(rows, 64), model.device)
    costs = StageCosts.of(walks, MacsTable().macs)
    by_cost = sorted(
        (Route.alone(name) for name in model.anchors), key=lambda r: costs.alone[observed.routes.index(r)]
    )
    ends = [observed.routes.index(route) for route in (by_cost[0], by_cost[-1])]
    pair = observed.select_routes(ends), costs.select_routes(ends)
    apart = StageCosts(costs.alone, np.zeros_like(costs.shared))
    began = time.perf_counter()
    offered = calibrate_cascades(observed, costs)
    seconds = time.perf_counter() - began
    name = " to ".join(model.anchors)
    ratios = {
        f"{name}: gap closed, routes alone": gap(observed, costs, ends, with_cascades=False),
        f"{name}: gap closed, cascades of the anchors": gap(*pair, [0, 1], with_cascades=True),
        f"{name}: gap closed, cascades": gap(observed, costs, ends, with_cascades=True),
        f"{name}: gap closed, cascades, nothing shared": gap(observed, apart, ends, with_cascades=True),
    }
    if offered:
        cascade = as_cascade(observed, offered[len(offered) // 2].chain)
        assert isinstance(cascade, Cascade)
        for way, x in ways(model, rows, cascade).items():
            for size in (1, len(x)):
                ratios[f"{name}: overhead, {way}, batch {size}"] = overhead(model, x[:size], cascade, times)
    if resamplings:
        kept = promises(observed, costs, ends[1], calibration_images, resamplings)
        ratios |= {f"{name}: {key}": value for key, value in kept.items()}
    table = Table("figure", "value", title=f"{name}, {len(observed)} images, calibrated in {seconds:.1f} s")
    for key, value in ratios.items():
        table.add_row(key, "not defined" if value is None else f"{value:.3f}")
    result: dict[str, Any] = {"ratios": {k: v for k, v in ratios.items() if v is not None}, "seconds": seconds}
    if budget is not None:
        scores, spent = within(observed, costs, budget)
        text = f"{100 * statistics.fmean(scores):.2f} ± {100 * statistics.stdev(scores):.2f}"
        table.add_row(
            f"accuracy within {budget / 1e6:g} M mean MACs, % (spent {statistics.fmean(spent) / 1e6:.1f} M)", text
        )
        result["within"] = {"budget": budget, "scores": scores, "mean_macs": spent}
    Console(width=150).print(table)
    if out is not None:
        with atomic_file(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
