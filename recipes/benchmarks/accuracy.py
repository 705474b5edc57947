"""What a network of a given cost can do: stitched routes and everything else that the same data and time can buy.

    python recipes/benchmarks/accuracy.py [--quick] [--out FILE.json] [--seconds 60] [--seeds 3] [--routes 4]
        [--front DIR --end DIR --dataset DIR --images 10000 --point DIR ...] [--method NAME ...]
        [--teacher DIR] [--route ROUTE ...] [--part a|b]

A pair is two anchors that know the task; without --front it is the demo. Routes are those given, or are chosen once,
by fitted accuracy in both directions on 512 training images, on which stitches are fitted too. Each method then has so
many seconds for all of its routes together, on the threads that OMP_NUM_THREADS says, and new stitches; seeds differ
in the first weights, the order of the images and the images that are held out. Outputs of frozen networks are computed
once for the pair and kept in a folder beside FILE.json: methods that read them have the seconds for steps alone, and
those that cannot, since their first blocks train or run on images, have the seconds of that computation besides.

Rivals train the same way on the same images: each anchor's own norms and head, all weights of the small one, alone and
distilled from the large one. Points are other classifiers at hand, as they are. The cascade of the two anchors sends
an image on where the small one's highest probability is below a threshold; its cost is the mean over images.

Gap closed: with both anchors, the mean over budgets from the small one's MACs to the large one's of the best accuracy
within the budget, as a share of the way from the small one's accuracy to the large one's. Accuracy is measured on the
first half of the test images, with --part b on the second: choices made on one half are checked on the other. Spread
is the standard deviation over seeds. Areas are mean accuracies of the best network that fits a budget: with both
anchors, over budgets from the small one's MACs to the large one's, and of a method's own networks alone, over budgets
from the cheapest of them to the large anchor.

FILE.json is written after every run; the same command goes on where it was stopped, also with more seeds or methods.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate.utils import set_seed
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from restnet_hf import Profile, Route, StitchConfig, StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.data import batches
from restnet_hf.data.datasets import load_images
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.files import atomic_file
from restnet_hf.profiling.accuracy import predict_routes
from restnet_hf.routes.fronts import measure_gap
from restnet_hf.routes.profile import ProfiledRoute
from restnet_hf.steps import run_steps
from restnet_hf.training.frozen import IMAGES
from restnet_hf.training.learner import Learner
from restnet_hf.training.loaders import cache_features, evaluation_loader


@dataclasses.dataclass(frozen=True)
class Method:
    """How routes come to be.

    Args:
        options: options of `TrainArgs`; None for least squares alone.
        routes: ``stitched``, or ``small`` or ``large`` for that anchor, tuned.
        kind: kind of the stitches, as in `StitchConfig`.
        teacher: ``small`` or ``large`` for that anchor, ``outside`` for that of --teacher; None for the default.
    """

    options: Mapping[str, Any] | None
    routes: str = "stitched"
    kind: str = "linear"
    teacher: str | None = None


LONG = 10**6  # epochs, which the time cuts short
TASK, MATCH = {"num_train_epochs": LONG}, {"num_train_epochs": 0, "matching_epochs": LONG, "distillation": 0.0}
BOTH = {"num_train_epochs": LONG, "matching_epochs": LONG}
METHODS = {
    "least squares": Method(None),
    "stitch": Method(TASK),
    "norm": Method({**TASK, "tuning": "norm"}),
    "all weights (SN-Net)": Method({**TASK, "tuning": "full", "sampler": "uniform"}),
    "small anchor, norms and head": Method({**TASK, "tuning": "norm"}, "small"),
    "large anchor, norms and head": Method({**TASK, "tuning": "norm"}, "large"),
    "small anchor, all weights": Method({**TASK, "tuning": "full", "distillation": 0.0}, "small"),
    "large distilled into small": Method({**TASK, "tuning": "full"}, "small", teacher="large"),
    "stitch, last state, rate 0.001, large teacher": Method(
        {**TASK, "keep": "last", "learning_rate": 1e-3}, teacher="large"
    ),
    "matching": Method(MATCH),
    "matching, task": Method(BOTH),
    "matching, norm": Method({**BOTH, "tuning": "norm"}),
    "mlp": Method(TASK, kind="mlp"),
    "stitch, teacher from outside": Method(TASK, teacher="outside"),
    "rate 0.01": Method({**TASK, "learning_rate": 1e-2}),
    "rate 0.001": Method({**TASK, "learning_rate": 1e-3}),
    "rate 0.0001": Method({**TASK, "learning_rate": 1e-4}),
    "rate 0.00001": Method({**TASK, "learning_rate": 1e-5}),
    "labels alone": Method({**TASK, "distillation": 0.0}),
}
OFFERED = ("least squares", "stitch", "norm", "all weights (SN-Net)")
RIVALS = tuple(name for name, method in METHODS.items() if method.routes != "stitched")
DEFAULT = (*OFFERED, *RIVALS)


@dataclasses.dataclass
class Pair:
    """What all methods share."""

    model: StitchedModelForImageClassification
    train_set: Dataset
    eval_set: Dataset
    features: Path
    anchors: list[Route]
    routes: list[Route]
    filled: float = 0.0
    outside: str | None = None

    def named(self, which: str) -> str:
        """Name of the small or the large anchor, or the folder of another classifier."""
        if which == "outside":
            if self.outside is None:
                raise ValueError("a method with a teacher from outside needs --teacher, the folder of a classifier")
            return self.outside
        return self.anchors[which == "large"].segments[0].anchor


def load(front: str, end: str, dataset: str, images: int | None, part: str, evaluated: int | None) -> Any:
    """The model, and the images to train on and to evaluate on."""
    model = StitchedModelForImageClassification.from_anchors(front, end, order="given", dtype="float32")
    train_rows, eval_rows = (load_images(dataset, split).shuffle(seed=1) for split in ("train", "test"))
    half = len(eval_rows) // 2
    eval_rows = eval_rows.select(range(half) if part == "a" else range(half, len(eval_rows)))
    train_rows = train_rows.select(range(min(images or len(train_rows), len(train_rows))))
    eval_rows = eval_rows.select(range(min(evaluated or half, half)))
    return model, *(model.prepare_data(rows) for rows in (train_rows, eval_rows))


def choose(model: StitchedModelForImageClassification, calibration: Dataset, count: int) -> list[Route]:
    """Routes of both directions by fitted accuracy."""
    return model.select_stitches(calibration, "fitted_accuracy", count, order="auto")


def renew(pair: Pair, kind: str, seed: int) -> None:
    """New stitches in the place of all, fitted by least squares; nothing is tuned."""
    model = pair.model
    model.set_route(Route.alone(model.front))
    for route in model.routes:
        model.delete_stitch(route)
    set_seed(seed)
    model.add_stitches(pair.routes, StitchConfig(kind))
    model.fit_stitches(pair.train_set.select(range(512)), pair.routes)


def run_method(pair: Pair, method: Method, seed: int, seconds: float) -> dict[str, Any]:
    """The cost and the accuracy of each route after one method."""
    renew(pair, method.kind, seed)
    routes = pair.routes
    if method.routes != "stitched":
        routes = pair.model.add_stitches([Route.alone(pair.named(method.routes), tuned=True)])
    result: dict[str, Any] = {"seconds": 0.0}
    if method.options is not None:
        cached = method.routes == "stitched" and method.options.get("tuning") != "full"
        options: dict[str, Any] = {"train_head": False, "seed": seed, **method.options}
        options |= {"cache_dir": str(pair.features / "train")} if cached else {}
        options |= {} if method.teacher is None else {"teacher": pair.named(method.teacher)}
        if cached:  # fills what is missing
            began = time.perf_counter()
            args = TrainArgs(**{**options, "keep": "last", "max_steps": 1})
            train(pair.model, pair.train_set, args, routes)
            pair.filled = max(pair.filled, time.perf_counter() - began)
            renew(pair, method.kind, seed)
        minutes = (seconds + (0.0 if cached else pair.filled)) / 60
        outcome = train(pair.model, pair.train_set, TrainArgs(**options, max_minutes=minutes), routes)
        held_out = {route: dataclasses.asdict(scores) for route, scores in outcome.scores.items()}
        result = {"seconds": outcome.seconds, "steps": outcome.steps, "held_out": held_out}
    scores, costs = accuracy(pair, routes), pair.model.route_costs()
    return result | {"points": {str(route): [costs(route)["macs"], scores[route]] for route in routes}}


@torch.no_grad()
def accuracy(pair: Pair, routes: Sequence[Route]) -> dict[Route, float]:
    """Accuracy of routes; what is frozen in them was computed once."""
    learner = Learner(pair.model, routes, TrainArgs(distillation=0.0, train_head=False))
    if any(learner.frozen.front(route) == IMAGES for route in routes):
        walks = [(route, pair.model.steps(route)) for route in routes]
        predictions, labels = predict_routes(walks, batches(pair.eval_set, 64), pair.model.device)
        return {route: float((each == labels).float().mean()) for route, each in predictions.items()}
    args = TrainArgs(cache_dir=str(pair.features / "eval"))
    right = dict.fromkeys(routes, 0)
    for batch in evaluation_loader(cache_features(pair.model, learner.frozen, pair.eval_set, args), args):
        for route in routes:
            logits = run_steps(batch[learner.frozen.front(route)].float(), learner.rest[route])
            right[route] += int((logits.argmax(-1) == batch["labels"]).sum())
    return {route: count / len(pair.eval_set) for route, count in right.items()}


@torch.no_grad()
def probabilities(pair: Pair, rows: Dataset) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For both anchors the highest probability of each image, and whether its class is right."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"small": [], "large": []}
    for batch in batches(rows, 64):
        for name, route in zip(found, pair.anchors, strict=True):
            highest, classes = pair.model(batch["pixel_values"], route=route).logits.softmax(-1).max(-1)
            found[name].append((highest, classes == batch["labels"]))
    return {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}


def cascade(pair: Pair) -> list[list[float]]:
    """Mean MACs and accuracy of the cascade of the two anchors, at twenty shares of images that go on.

    Thresholds are quantiles over training images that are not evaluated.
    """
    confidence, _ = probabilities(pair, pair.train_set.select(range(min(1000, len(pair.train_set)))))["small"]
    found = probabilities(pair, pair.eval_set)
    macs = [pair.model.route_costs()(route)["macs"] for route in pair.anchors]
    (sure, small), (_, large) = found["small"], found["large"]
    points = []
    for share in torch.arange(1, 20) / 20:
        on = sure < confidence.quantile(share)
        points.append(
            [macs[0] + on.float().mean().item() * macs[1], torch.where(on, large, small).float().mean().item()]
        )
    return points


def area(points: Sequence[Sequence[float]], least: float, most: float) -> float:
    """Mean over budgets in MACs of the best accuracy that fits; budgets that nothing fits are left out.

    Args:
        points: MACs and accuracy of each network.
        least, most: smallest and largest budget, in MACs.
    """
    costs = sorted({macs for macs, _ in points})
    least = max(least, costs[0])
    if least >= most:
        return max(accuracy for macs, accuracy in points if macs <= least)
    edges = [least, *(macs for macs in costs if least < macs < most), most]
    steps = [(b - a) * max(accuracy for macs, accuracy in points if macs <= a) for a, b in pairwise(edges)]
    return sum(steps) / (most - least)


def gap(anchors: Mapping[str, Sequence[float]], points: Sequence[Sequence[float]]) -> float | None:
    """Gap closed by networks of some costs, beside the anchors."""
    rows = [ProfiledRoute(Route.parse(text), {"macs": macs}, {"accuracy": at}) for text, (macs, at) in anchors.items()]
    end = rows[0].route.segments[0].anchor
    others = [Route.parse(f"{end}[:1] + {end}[{index + 2}:]") for index in range(len(points))]  # any stitched routes
    rows += [
        ProfiledRoute(route, {"macs": macs}, {"accuracy": at})
        for route, (macs, at) in zip(others, points, strict=True)
    ]
    return measure_gap(rows, "macs", "accuracy")[0]


def dominated(anchors: Mapping[str, Sequence[float]], points: Sequence[Sequence[float]]) -> float:
    """Share of networks that an anchor beats, at no more cost and no less accuracy."""
    beaten = [any(a <= macs and b >= at for a, b in anchors.values()) for macs, at in points]
    return sum(beaten) / len(beaten)


def spread(values: Sequence[float]) -> list[float | None]:
    """Mean and standard deviation over seeds; None for that of one."""
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]


def summary(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each method means and standard deviations over seeds."""
    rows, anchors = {}, result["anchors"]
    least, most = (pick(macs for macs, _ in anchors.values()) for pick in (min, max))
    for name, runs in result["runs"].items():
        points = [list(run["points"].values()) for run in runs.values()]
        gaps = [gap(anchors, each) for each in points]
        rows[name] = {
            "accuracy": {
                route: [macs, *spread([run["points"][route][1] for run in runs.values()])]
                for route, (macs, _) in next(iter(runs.values()))["points"].items()
            },
            "area": spread([area([*each, *anchors.values()], least, most) for each in points]),
            "area alone": spread([area(each, 0, most) for each in points]),
            "gap closed": None if None in gaps else spread([each for each in gaps if each is not None]),
            "beaten by an anchor": spread([dominated(anchors, each) for each in points]),
            "seconds": spread([run["seconds"] for run in runs.values()]),
        }
    return rows


def show(result: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of one pair."""
    table = Table("method", "MACs, M: accuracy, %", title=result["pair"])
    for name in ("gap closed", "beaten", "seconds"):
        table.add_column(name, justify="right")

    def cell(value: Sequence[float | None] | None, scale: float = 1.0, digits: int = 2) -> str:
        return " ± ".join(f"{scale * each:.{digits}f}" for each in value or () if each is not None)

    known = {"anchors": result["anchors"], "other classifiers": result["points"]}
    for name, points in known.items():
        table.add_row(name, ", ".join(f"{macs / 1e6:.1f}: {100 * at:.1f}" for macs, at in points.values()))
    curve = result["cascade"]
    best = ", ".join(f"{macs / 1e6:.1f}: {100 * at:.1f}" for macs, at in curve[3::4])
    table.add_row("cascade of the anchors", best, f"{gap(result['anchors'], curve) or 0:.2f}")
    for name, row in rows.items():
        points = sorted(row["accuracy"].values())
        text = ", ".join(f"{macs / 1e6:.1f}: {cell(at, 100, 1)}" for macs, *at in points)
        table.add_row(
            name, text, cell(row["gap closed"]), cell(row["beaten by an anchor"]), cell(row["seconds"], digits=0)
        )
    Console(width=150).print(table)


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
    ratios = {
        f"{label}, {name}: {key}": row[key][0]
        for name, row in rows.items()
        for key in ("area", "area alone", "gap closed", "beaten by an anchor")
        if row[key] is not None
    }
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps({**result, "ratios": ratios, "summary": rows}, indent=1) + "\n")


def measure(pair: Pair, points: Sequence[str], dataset: str, part: str, evaluated: int | None) -> dict[str, Any]:
    """What is known before any method runs."""
    found: dict[str, Any] = {}
    for folder in points:
        model, _, rows = load(folder, folder, dataset, 64, part, evaluated)
        (row, *_) = model.profile(rows, [Route.alone(model.front)])
        found[Path(folder).name] = [row.costs["macs"], row.scores["accuracy"]]
    profile: Profile = pair.model.profile(pair.eval_set, pair.anchors)
    anchors = {str(row.route): [row.costs["macs"], row.scores["accuracy"]] for row in profile}
    images = [len(pair.train_set), len(pair.eval_set)]
    return {
        "pair": " to ".join(pair.model.anchors), "images": images, "anchors": anchors, "points": found,
        "cascade": cascade(pair), "routes": [str(route) for route in pair.routes], "runs": {},
    }  # fmt: skip


def main(
    quick: bool = False,
    out: Path | None = None,
    front: str = str(FRONT),
    end: str = str(END),
    dataset: str = str(DATA),
    images: int | None = None,
    eval_images: int | None = None,
    point: Annotated[list[str] | None, typer.Option()] = None,
    method: Annotated[list[str] | None, typer.Option()] = None,
    teacher: str | None = None,
    route: Annotated[list[str] | None, typer.Option()] = None,
    part: str = "a",
    seconds: float = 60.0,
    seeds: int = 3,
    routes: int = 4,
) -> None:
    """Print the table of one pair, and write it to OUT."""
    methods, points = method or DEFAULT, point or []
    unknown = [name for name in methods if name not in METHODS]
    if unknown or part not in ("a", "b"):
        raise ValueError(f"there is no method {unknown} or part {part!r}; the methods are {list(METHODS)}")
    if quick:
        images, eval_images, seconds, seeds, routes = 400, 200, 1.0, 1, 2
        methods = method or ("least squares", "stitch", "norm", "small anchor, norms and head")
    settings = {
        "seconds": seconds, "routes": routes, "images": images, "eval_images": eval_images, "part": part,
        "front": front, "end": end, "dataset": dataset, "threads": torch.get_num_threads(),
    }  # fmt: skip
    result = read_known(out, settings)
    logging.disable_progress_bar()
    disable_progress_bars()
    model, train_set, eval_set = load(front, end, dataset, images, part, eval_images)
    costs = model.route_costs()
    anchors = sorted((Route.alone(name) for name in model.anchors), key=lambda route: costs(route)["macs"])
    with tempfile.TemporaryDirectory() as temporary:
        features = Path(temporary) if out is None else out.with_suffix(".features")
        pair = Pair(model, train_set, eval_set, features, anchors, [], outside=teacher)
        if result is None:
            calibration = train_set.select(range(min(512, len(train_set))))
            pair.routes = list(map(model.route, route or ())) or choose(model, calibration, routes)
            result = {"settings": settings, **measure(pair, points, dataset, part, eval_images)}
        pair.routes, pair.filled = [model.route(text) for text in result["routes"]], result.get("filled", 0.0)
        for seed in range(seeds):
            for name in methods:
                if str(seed) not in result["runs"].get(name, {}):
                    run = run_method(pair, METHODS[name], seed, seconds)
                    result["runs"].setdefault(name, {})[str(seed)] = run
                    result["filled"] = pair.filled
                    print(f"seed {seed}, {name}: {run['points']}", flush=True)
                    write(result, out)
    show(result, summary(result))


if __name__ == "__main__":
    typer.run(main)
