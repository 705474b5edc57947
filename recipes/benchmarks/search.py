"""What it takes to know the routes of a pair: evaluating all of them, and predicting how long each takes.

    python recipes/benchmarks/search.py [--quick] [--out FILE.json]

Networks of timm at 224 px with random weights, one thread. Evaluation: every route of one stitch from DeiT-S to
DeiT-Ti, every second cut of the front with --quick, each route run whole (naive), as the package does it (tree), and
at the limit: the front's own blocks once, and every stitch and end called by hand. All must give the same logits.
Latency: what the table of pieces says of a route over the median of the route run from end to end, batch 1; all run in
turn, round by round, and are timed by the processor time of the process, which other programs do not add to. Ratios
are of minima and, in brackets, medians of the ratios of each repeat.

Switching: set_route with all weights in memory, and paged from a warm cache of the disk. Search: the embedded anchors
with fitted stitches, routes of one and two stitches in both directions, all evaluated on real images; then a tenth of
them by evolution, for budgets of 90 to 50 % of the dearest route's MACs together, and as many at random.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import typer
from torch import Tensor

from restnet_hf import Anchor, Budget, Preprocessing, Profile, Route, Segment, StitchedModelForImageClassification
from restnet_hf.data import load_images, with_pixel_values
from restnet_hf.embedded import DATA, END, FRONT
from restnet_hf.measuring import measure_latency
from restnet_hf.memory import MemoryTable, measure_memory
from restnet_hf.routes import one_cut_routes
from restnet_hf.search import SEARCHES
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


def bench_search(count: int, images: int, seeds: int) -> dict[str, float]:
    """How far the best of a tenth is from the best of all, at each budget."""
    model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype=torch.float32)
    a, b = model.anchors.values()
    routes = [*one_cut_routes(a.name, a.depth, b.name, b.depth), *one_cut_routes(b.name, b.depth, a.name, a.depth)]
    dice = random.Random(0)
    while len(routes) < count:
        first, second = dice.choice(((a, b), (b, a)))
        i, j = dice.randint(1, first.depth), dice.randint(1, second.depth - 1)
        k, entered = dice.randint(j + 1, second.depth), dice.randint(1, first.depth)
        route = Route((Segment(first.name, 0, i), Segment(second.name, j, k), Segment(first.name, entered)))
        routes += [] if route in routes else [route]
    model.add_stitches(routes)
    rows = [with_pixel_values(load_images(DATA, split), model.image_processor) for split in ("train", "test")]
    model.fit_stitches(rows[0].select(range(512)))
    began = time.process_time()
    profile = model.profile(rows[1].select(range(images)))
    taken = time.process_time() - began
    known = {row.route: row.scores["accuracy"] for row in profile.routes}
    costs = {row.route: row.costs for row in profile.routes}
    most = max(found["macs"] for found in costs.values())
    budgets = [Budget(macs=share * most) for share in SHARES]
    best = {budget: profile.best(budget).scores["accuracy"] for budget in budgets}
    gaps: dict[str, list[float]] = {"evolution": [], "random": []}
    for seed in range(seeds):
        asked: list[Route] = []

        def scores(batch: Sequence[Route], asked: list[Route] = asked) -> dict[Route, float]:
            asked.extend(batch)
            return {route: known[route] for route in batch}

        tenth = len(known) // 10
        search = SEARCHES["evolution"]([*known], costs.__getitem__, scores, budgets, max_evaluations=tenth, seed=seed)
        found = search.run().best
        assert len(set(asked)) <= tenth
        gaps["evolution"] += [best[budget] - found[budget].scores["accuracy"] for budget in budgets]
        drawn = Profile(tuple(row for row in random.Random(seed).sample(profile.routes, tenth)))
        gaps["random"] += [best[budget] - drawn.best(budget).scores["accuracy"] for budget in budgets]
    label = f"a tenth of {len(known)} routes, {images} images"
    ratios = {f"{label}, {name}: mean points lost": 100 * statistics.fmean(each) for name, each in gaps.items()}
    ratios |= {f"{label}, {name}: most points lost": 100 * max(each) for name, each in gaps.items()}
    return ratios | {f"{label}: seconds to evaluate all": taken}


def main(quick: bool = False, out: Path | None = None) -> None:
    """Print the ratios, and write them to OUT."""
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    for batch, repeats in ((1, 1),) if quick else ((1, 3), (8, 1)):
        ratios |= bench_evaluation(batch, repeats, every=2 if quick else 1)
    for names in PAIRS:
        ratios |= bench_latency(*names, 6 if quick else 20)
    ratios |= bench_switching(*PAIRS[0], 3 if quick else 20)
    ratios |= bench_search(*((60, 50, 1) if quick else (400, 500, 10)))
    for name, ratio in ratios.items():
        if not name.endswith("(median)"):
            median = ratios.get(f"{name} (median)")
            print(f"{name}: {ratio:.3f}" + (f" ({median:.3f})" if median else ""))
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
