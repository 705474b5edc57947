"""What it takes to know the routes of a pair: evaluating all of them, and predicting how long each takes.

    python recipes/benchmarks/search.py [--quick] [--out FILE.json]

Networks of timm at 224 px with random weights, one thread. Evaluation: every route of one stitch from DeiT-S to
DeiT-Ti, every second cut of the front with --quick, each route run whole (naive), as the package does it (tree), and
at the limit: the front's own blocks once, and every stitch and end called by hand. All must give the same logits.
Latency: what the table of pieces predicts for a route over the median of the route run from end to end, batch 1; all
run in turn, round by round, and are timed by the processor time of the process, which other programs do not add to.
Ratios are of minima and, in brackets, medians of the ratios of each repeat.

Switching: set_route with all weights in memory, and paged from a warm cache of the disk. Search: the embedded anchors
with fitted stitches, routes of one and two stitches in both directions, all evaluated on real images; then a tenth of
that work, for budgets of 90 to 50 % of the most costly route's MACs together, by evolution with predictions from a few
images (a quarter of the tenth, other images for each seed), by evolution alone, and at random. Each draw takes other
routes, and other images to fit and to evaluate on. With --routes FOLDER all that was evaluated is written there.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import csv
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import typer
from torch import Tensor

from restnet_hf import Anchor, Budget, Preprocessing, Profile, Route, Segment, StitchedModelForImageClassification
from restnet_hf.adaptation.scorer import SHARE
from restnet_hf.adaptation.search import SEARCHES
from restnet_hf.data import batches, load_images, with_pixel_values
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.profiling.accuracy import mean_probabilities
from restnet_hf.profiling.memory import MemoryTable, measure_memory
from restnet_hf.profiling.timing import measure_latency
from restnet_hf.routes.profile import ProfiledRoute
from restnet_hf.routes.route import one_cut_routes
from restnet_hf.steps import run_steps, split_at_shared_cuts, walk_tree


FAMILY = ("deit_small_patch16_224", "deit_tiny_patch16_224")
PAIRS = [("resnet50", "mobilenetv2_100"), FAMILY, ("resnet18", "deit_tiny_patch16_224")]
SHARES = [0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5]
SEEN = 10  # routes of a pair that are run from end to end


def pair(front: str, end: str) -> StitchedModelForImageClassification:
    """Two networks with random weights."""
    torch.manual_seed(0)
    anchors = [
        Anchor(timm.create_model(name).eval(), name.split("_patch")[0], Preprocessing((224, 224)))
        for name in (front, end)
    ]
    return StitchedModelForImageClassification.from_anchors(*anchors, order="given")


def stitched(model: StitchedModelForImageClassification) -> list[Route]:
    """Every route of one stitch from the first network to the second."""
    front, end = model.anchors.values()
    return [model.add_stitch(route) for route in one_cut_routes(front.name, front.depth, end.name, end.depth)]


def by_hand(model: StitchedModelForImageClassification, routes: list[Route], images: Tensor) -> dict[Route, Tensor]:
    """The logits of routes between two ViTs of timm with nothing of this package but the stitches themselves."""
    front, end = (anchor.model for anchor in model.anchors.values())
    x, found = front.norm_pre(front._pos_embed(front.patch_embed(images))), {}
    for cut, block in enumerate(front.blocks, 1):
        x = block(x)
        for route in routes:
            [point] = route.stitch_points
            if point.source_cut == cut:
                y = model.stitches[point.name](x)
                for late in end.blocks[point.target_cut :]:
                    y = late(y)
                found[route] = end.forward_head(end.norm(y))
    return found


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of several functions, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            taken[name].append(time.process_time() - began)
    return taken


def ratios_of(label: str, over: list[float], under: list[float]) -> dict[str, float]:
    """Of minima, and the median of those of each repeat."""
    median = statistics.median(a / b for a, b in zip(over, under, strict=True))
    return {label: min(over) / min(under), f"{label} (median)": median}


@torch.no_grad()
def bench_evaluation(batch: int, repeats: int, every: int) -> dict[str, float]:
    """All routes of the family, naively, as a tree and at the limit."""
    model = pair(*FAMILY)
    routes = [route for route in stitched(model) if (route.segments[0].stop or 0) % every == 0]
    walks, images = [(route, model.steps(route)) for route in routes], torch.randn(batch, 3, 224, 224)
    runs: dict[str, Callable[[], dict[Route, Tensor]]] = {
        "tree": lambda: dict(walk_tree(images, split_at_shared_cuts(walks))),
        "limit": lambda: by_hand(model, routes, images),
        "naive": lambda: {route: run_steps(images, steps) for route, steps in walks},
    }
    found = {name: run() for name, run in runs.items()}  # warms up, too
    for route in routes:
        assert torch.equal(found["tree"][route], found["naive"][route])
        assert torch.equal(found["limit"][route], found["naive"][route])
    few = seconds({name: runs[name] for name in ("tree", "limit")}, 2 * repeats)
    taken = seconds(runs, repeats)
    label = f"evaluating {len(routes)} routes, batch {batch}"
    near = [[*few[name], *taken[name]] for name in ("tree", "limit")]
    return ratios_of(f"{label}: tree over limit", *near) | ratios_of(
        f"{label}: naive over tree", taken["naive"], taken["tree"]
    )


def bench_latency(front: str, end: str, repeats: int) -> dict[str, float]:
    """Errors of predicted latency over routes of one and two stitches, and what the table takes to measure."""
    model = pair(front, end)
    routes = stitched(model)
    (a, i), (b, j) = [(anchor.name, anchor.depth) for anchor in model.anchors.values()]
    seen = [model.route(f"{name}[:]") for name in (a, b)]
    more = (f"{a}[:{i // 3}] + {b}[{j // 3}:{j // 2}] + {a}[{2 * i // 3}:]", f"{a}[:2] + {a}[{i - 2}:]")
    seen += [*map(model.add_stitch, more), *random.Random(0).sample(routes, SEEN - 4)]
    walks = [(route, model.steps(route)) for route in model.all_routes]
    checked = [(route, model.steps(route)) for route in seen]
    began = time.perf_counter()
    table = measure_latency(walks, repeats=repeats, check=checked, clock=time.process_time)
    taken = time.perf_counter() - began
    errors = sorted(abs(check.error) for check in table.checks.values())
    memory = MemoryTable()
    apart = max(abs(memory.memory_mb(steps) / measure_memory(steps) - 1) for _, steps in checked)
    label = f"{a} to {b}"
    return {
        f"{label}: predicted over measured latency, largest error of {len(errors)} routes": errors[-1],
        f"{label}: predicted over measured latency, median error": statistics.median(errors),
        f"{label}: seconds for the table of {len(walks)} routes and {SEEN} whole ones": taken,
        f"{label}: predicted over measured memory, largest error": apart,
    }


def bench_switching(front: str, end: str, repeats: int) -> dict[str, float]:
    """What set_route takes between routes that leave the front at different cuts."""
    model = pair(front, end)
    a, b = model.anchors.values()
    routes = [model.add_stitch(f"{a.name}[:{i}] + {b.name}[{j}:]") for i, j in ((4, 6), (8, 10), (13, 14))]
    model.set_route(routes[0])
    turns = [route for _ in range(repeats) for route in (*routes[1:], routes[0])]

    def switch() -> list[float]:
        taken = []
        for route in turns:
            began = time.perf_counter()
            model.set_route(route)
            taken.append(1000 * (time.perf_counter() - began))
        return taken

    label = f"switching {a.name} to {b.name}, ms"
    found = {label: statistics.median(switch())}
    whole = sum(p.nbytes for p in model.anchors.parameters())  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        model.page_to(folder)
        found[f"{label}, paged"] = statistics.median(switch())
        held = sum(p.nbytes for p in model.anchors.parameters())  # type: ignore[attr-defined]
    return found | {f"{label}: paged weights in memory over all": held / whole}


def two_stitches(model: StitchedModelForImageClassification, count: int, rng: random.Random) -> list[Route]:
    """All routes of one stitch in both directions, and so many in all with some of two."""
    a, b = model.anchors.values()
    routes = [*one_cut_routes(a.name, a.depth, b.name, b.depth), *one_cut_routes(b.name, b.depth, a.name, a.depth)]
    while len(routes) < count:
        first, second = rng.choice(((a, b), (b, a)))
        i, j = rng.randint(1, first.depth), rng.randint(1, second.depth - 1)
        k, entered = rng.randint(j + 1, second.depth), rng.randint(1, first.depth)
        route = Route((Segment(first.name, 0, i), Segment(second.name, j, k), Segment(first.name, entered)))
        routes += [] if route in routes else [route]
    return routes


Table = dict[str, dict[Route, float]]


def evaluated(count: int, images: int, seeds: int, draw: int) -> tuple[Table, float]:
    """MACs and accuracy of routes, predictions from a few images for each seed, and seconds that accuracies took."""
    model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype=torch.float32)
    model.add_stitches(two_stitches(model, count, random.Random(draw)))
    rows = [with_pixel_values(load_images(DATA, split), model.image_processor) for split in ("train", "test")]
    model.fit_stitches(rows[0].select(range(512 * draw, 512 * (draw + 1))))
    seen = rows[1].select(range(images * draw, images * (draw + 1)))
    began = time.process_time()
    profile = model.profile(seen)
    taken = time.process_time() - began
    found: Table = {
        "macs": {row.route: row.costs["macs"] for row in profile.routes},
        "accuracy": {row.route: row.scores["accuracy"] for row in profile.routes},
    }
    every = every_image(found["macs"])
    walks = [(route, model.steps(route)) for route in found["macs"]]
    for seed in range(seeds):
        few = batches(seen.select(range(seed % every, images, every)[: images // every]), 64)
        found[f"predicted {seed}"] = mean_probabilities(walks, few, model.device)
    return found, taken


def every_image(macs: dict[Route, float]) -> int:
    """Of so many images one, that a quarter of a tenth of the evaluations is spent on all routes within a budget."""
    fitting = sum(cost <= SHARES[0] * max(macs.values()) for cost in macs.values())
    return -(-SHARE * fitting // (len(macs) // 10))


def points_lost(found: Table, images: int, seeds: int) -> dict[str, list[float]]:
    """How far the best of a tenth is from the best of all, at each budget and for each seed."""
    macs, known = found["macs"], found["accuracy"]
    rows = [ProfiledRoute(route, {"macs": macs[route]}, {"accuracy": known[route]}) for route in macs]
    budgets = [Budget(macs=share * max(macs.values())) for share in SHARES]
    best = {budget: Profile(tuple(rows)).best(budget).scores["accuracy"] for budget in budgets}
    fitting, tenth = sum(budgets[0].allows(row.costs) for row in rows), len(macs) // 10
    spent = -(-(images // every_image(macs)) * fitting // images)
    gaps: dict[str, list[float]] = {"evolution with few images": [], "evolution alone": [], "random": []}
    for seed in range(seeds):
        for name, options, most in (
            ("evolution with few images", {"predictor": found[f"predicted {seed}"].get}, tenth - spent),
            ("evolution alone", {}, tenth),
        ):
            search = SEARCHES["evolution"](
                [*macs],
                lambda route: {"macs": macs[route]},
                lambda batch: {route: known[route] for route in batch},
                budgets,
                max_evaluations=most,
                seed=seed,
                **options,
            )
            result = search.run()
            assert len(result.evaluated) <= most
            gaps[name] += [best[budget] - result.best[budget].scores["accuracy"] for budget in budgets]
        drawn = Profile(tuple(random.Random(seed).sample(rows, tenth)))
        gaps["random"] += [best[budget] - drawn.best(budget).scores["accuracy"] for budget in budgets]
    return gaps


def bench_search(count: int, images: int, seeds: int, draw: int, folder: Path | None) -> dict[str, float]:
    """What a tenth of the work finds of what is there."""
    found, taken = evaluated(count, images, seeds, draw)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"draw{draw}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["route", *found])
            writer.writerows([route, *(f"{each[route]:.6g}" for each in found.values())] for route in found["macs"])
    label = f"draw {draw}: a tenth of {len(found['macs'])} routes, {images} images"
    ratios = {f"{label}: seconds to evaluate all": taken}
    for name, gaps in points_lost(found, images, seeds).items():
        within = statistics.fmean(gap <= 0.005 + 1e-9 for gap in gaps)
        ratios |= {f"{label}, {name}: share within half a point": within}
        ratios |= {f"{label}, {name}: mean points lost": 100 * statistics.fmean(gaps)}
        ratios |= {f"{label}, {name}: most points lost": 100 * max(gaps)}
    return ratios


def main(quick: bool = False, out: Path | None = None, routes: Path | None = None) -> None:
    """Print the ratios, and write them to OUT."""
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    for batch, repeats in ((1, 1),) if quick else ((1, 3), (8, 1)):
        ratios |= bench_evaluation(batch, repeats, every=2 if quick else 1)
    for names in PAIRS:
        ratios |= bench_latency(*names, 6 if quick else 20)
    ratios |= bench_switching(*PAIRS[0], 3 if quick else 20)
    for draw in range(1 if quick else 3):
        ratios |= bench_search(*((100, 50, 1) if quick else (600, 500, 5)), draw, routes)
    for name, ratio in ratios.items():
        if not name.endswith("(median)"):
            median = ratios.get(f"{name} (median)")
            print(f"{name}: {ratio:.3f}" + (f" ({median:.3f})" if median else ""))
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
