"""How well each selector finds the routes that turn out best, on real networks and images.

    python recipes/benchmarks/selectors.py [--quick] [--out FILE.json]
        [--recipe YAML --front DIR --end DIR --dataset DIR] [--grid 6] [--epochs 1] [--seed 0]

Every route of a grid of cuts is fitted, trained briefly and measured; those accuracies are the truth. Selectors see
unlabelled or labelled calibration images only.
Reported are Spearman's correlation of a selector's values with the
truth, the share of the buckets of MACs in which its choice, or the better of its first two, is within half a point of
the bucket's best, and the mean accuracy of the best network that fits a budget, over budgets from the smaller anchor's
MACs to the larger's (the area under the front), each beside the same for random choices and for the oracle, and for
the truth measured again on as many other images (binomial draws): what no selector can be expected to exceed. Without
--recipe the pair is the embedded demo's.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import typer
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table

from restnet_hf import Route, train
from restnet_hf.demo.paths import DATA, END, FRONT, RECIPE
from restnet_hf.recipe import hold_out, load_recipe, prepare
from restnet_hf.selection.ranking import RankedRoute, choose_routes


METHODS: dict[str, tuple[str, dict[str, Any], bool]] = {  # what is tried: selector, options, with labels
    "position": ("position", {}, False),
    "cka": ("cka", {}, False),
    "cka, biased": ("cka", {"estimator": "biased"}, False),
    "cka, flattened": ("cka", {"features": "flattened"}, False),
    "cka, tokens": ("cka", {"features": "tokens"}, False),
    "cka, rbf": ("cka", {"kernel": "rbf"}, False),
    "lstsq": ("lstsq", {}, False),
    "kl_probe": ("kl_probe", {}, True),
    "kl_probe, no labels": ("kl_probe", {}, False),
    "fitted_accuracy": ("fitted_accuracy", {}, True),
    "fitted_accuracy, no labels": ("fitted_accuracy", {}, False),
}
TOLERANCE = 0.005
DRAWS = 2000  # of random choices


def measure(recipe: Any, grid: int, epochs: int, seed: int) -> dict[str, Any]:
    """The truth of one pair, and the predictions of every selector.

    Args:
        recipe: recipe of the pair.
        grid: number of cuts of each anchor.
        epochs: epochs of training of each route.
        seed: seed of the training.
    """
    set_seed(seed)
    model, train_set, eval_set = prepare(recipe)
    calibration, others = hold_out(train_set, recipe.calibration_images, model.config.new_head)
    if model.config.new_head:
        alone = [Route.alone(name) for name in model.anchors]
        train(model, others, dataclasses.replace(recipe.heads, train_head=True, seed=seed), alone)
    values, seconds = {}, {}
    for name, (method, options, labels) in METHODS.items():
        began = time.perf_counter()
        data = calibration if labels else Unlabelled(calibration)
        (found,) = model.compare(data, {method: options}, kept_images=len(calibration), max_images=None)[method]
        seconds[name] = time.perf_counter() - began
        values[name] = found
    front, end = (model.anchors[name] for name in (values["cka"].front, values["cka"].end))
    cuts = [sorted({round(c) for c in np.linspace(1, anchor.depth, grid)}) for anchor in (front, end)]
    routes = [model.add_stitch(f"{front.name}[:{i}] + {end.name}[{j}:]") for i in cuts[0] for j in cuts[1]]
    for part in (routes[k : k + 12] for k in range(0, len(routes), 12)):
        model.fit_stitches(calibration, part)
    fitted = model.profile(eval_set, routes)
    args = dataclasses.replace(recipe.stitches, num_train_epochs=epochs, train_head=False, seed=seed)
    train(model, train_set, args, routes)
    profile = model.profile(eval_set)
    return {
        "anchors": {str(row.route): [row.costs["macs"], row.scores["accuracy"]] for row in profile.routes[:2]},
        "routes": {str(row.route): [row.costs["macs"], row.scores["accuracy"]] for row in profile.routes[2:]},
        "least_squares": {str(row.route): row.scores["accuracy"] for row in fitted.routes},
        "values": {name: {str(route): found.value(route) for route in routes} for name, found in values.items()},
        "seconds": seconds,
        "front": front.name,
        "end": end.name,
        "seed": seed,
        "epochs": epochs,
        "images": len(eval_set),
    }


class Unlabelled(torch.utils.data.Dataset):
    """A data set without its labels."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]["pixel_values"]


def judge(result: Mapping[str, Any], buckets: int) -> dict[str, dict[str, float]]:
    """Correlation, recovery and area of every selector, of random choices and of the oracle."""
    truth = {name: accuracy for name, (_, accuracy) in result["routes"].items()}
    costs = {name: macs for name, (macs, _) in result["routes"].items()}

    def chosen(scores: Mapping[str, float], most: int = 1) -> list[list[str]]:
        order = sorted(scores, key=lambda name: (-scores[name], costs[name]))
        rows = [RankedRoute(Route.parse(name), scores[name], {"macs": costs[name]}) for name in order]
        picked = [str(row.route) for row in choose_routes(rows, buckets, per_part=most)]
        parts: dict[int, list[str]] = {}
        for name in picked:
            parts.setdefault(bucket[name], []).append(name)
        return list(parts.values())

    least, largest = min(costs.values()), max(costs.values())
    bucket = {n: min(int((c - least) / max(largest - least, 1e-9) * buckets), buckets - 1) for n, c in costs.items()}
    best = chosen(truth)

    def verdict(scores: Mapping[str, float]) -> dict[str, float]:
        picked, two = chosen(scores), chosen(scores, 2)

        def found_by(groups: list[list[str]]) -> float:
            pairs = zip(groups, best, strict=True)
            hits = [max(truth[name] for name in mine) >= truth[oracle] - TOLERANCE for mine, [oracle] in pairs]
            return float(np.mean(hits))

        names = list(truth)
        ranks = [pd.Series([of[name] for name in names]).rank() for of in (scores, truth)]
        return {
            "spearman": float(ranks[0].corr(ranks[1])),
            "recovered": found_by(picked),
            "recovered by two": found_by(two),
            "area": area([(costs[name], truth[name]) for [name] in picked], list(result["anchors"].values())),
        }

    rng = np.random.default_rng(0)
    draws = [verdict({name: rng.random() for name in truth}) for _ in range(DRAWS)]
    found = {"random": {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}}
    for name, values in result["values"].items():
        found[name] = verdict({route: -1e9 if value is None else value for route, value in values.items()})
        found[name]["seconds"] = result["seconds"][name]
    found["least squares, all images"] = verdict(result["least_squares"])
    images = result["images"]
    again = [verdict({n: rng.binomial(images, p) / images for n, p in truth.items()}) for _ in range(DRAWS // 10)]
    found["truth, on other images"] = {key: float(np.mean([draw[key] for draw in again])) for key in again[0]}
    found["oracle"] = verdict(truth)
    found["oracle"]["area"] = area([(costs[name], truth[name]) for name in truth], list(result["anchors"].values()))
    return found


def area(points: list[tuple[float, float]], anchors: list[list[float]]) -> float:
    """Mean over budgets in MACs, from the cheaper anchor's to the dearer's, of the best accuracy that fits."""
    (least, _), (most, _) = sorted(map(tuple, anchors))
    steps = sorted([*points, *map(tuple, anchors)])
    budgets = np.linspace(least, most, 1001)
    return float(np.mean([max(accuracy for macs, accuracy in steps if macs <= budget + 1) for budget in budgets]))


def show(result: Mapping[str, Any], verdicts: Mapping[str, Mapping[str, float]], buckets: int) -> None:
    """A table of one pair."""
    about = f"{len(result['routes'])} routes, {buckets} buckets, seed {result['seed']}"
    table = Table(title=f"{result['front']} to {result['end']}: {about}")
    for column in ("selector", "Spearman", "recovered, %", "by two, %", "area, %", "seconds"):
        table.add_column(column, justify="left" if column == "selector" else "right")
    for name, row in verdicts.items():
        took = f"{row['seconds']:.1f}" if "seconds" in row else ""
        table.add_row(
            name,
            f"{row['spearman']:.2f}",
            f"{100 * row['recovered']:.0f}",
            f"{100 * row['recovered by two']:.0f}",
            f"{100 * row['area']:.2f}",
            took,
        )
    Console(width=100).print(table)


def main(
    quick: bool = False,
    out: Path | None = None,
    recipe: Path | None = None,
    front: str | None = None,
    end: str | None = None,
    dataset: str | None = None,
    grid: int = 6,
    epochs: int = 1,
    buckets: int = 8,
    seed: int = 0,
) -> None:
    """Print the table of one pair, and write it to OUT."""
    if recipe is None:
        job = load_recipe(RECIPE, front=str(FRONT), end=str(END), dataset=str(DATA))
        grid = 3 if quick else 8  # of 8 and 6 cuts
    else:
        job = load_recipe(recipe, front=front, end=end, dataset=dataset)
    if quick:
        job = dataclasses.replace(job, train_images=256, eval_images=200, calibration_images=128)
    result = measure(job, grid, epochs, seed)
    verdicts = judge(result, buckets)
    show(result, verdicts, buckets)
    if out is not None:
        pair = f"{result['front']} to {result['end']}"
        ratios = {f"{pair}, {n}: recovered": row["recovered"] for n, row in verdicts.items()}
        out.write_text(json.dumps({"ratios": ratios, "verdicts": verdicts, "result": result}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
