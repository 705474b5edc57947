"""What it takes to know the routes of a pair: evaluating all of them, and predicting how long each takes.

    python recipes/benchmarks/search.py [--quick] [--out FILE.json]

Networks of timm at 224 px with random weights, one thread. Evaluation: every route of one stitch from DeiT-S to
DeiT-Ti, every second cut of the front with --quick, each route run whole (naive), as the package does it (tree), and
at the limit: the front's own blocks once, and every stitch and end called by hand. All must give the same logits.
Latency: what the table of pieces says of a route over the median of the route run from end to end, batch 1; all run in
turn, round by round, and are timed by the processor time of the process, which other programs do not add to. Ratios
are of minima and, in brackets, medians of the ratios of each repeat.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import typer
from torch import Tensor

from restnet_hf import Anchor, Preprocessing, Route, StitchedModelForImageClassification
from restnet_hf.measuring import measure_latency
from restnet_hf.memory import MemoryTable, measure_memory
from restnet_hf.routes import one_cut_routes
from restnet_hf.steps import run_steps, split_at_shared_cuts, walk_tree


FAMILY = ("deit_small_patch16_224", "deit_tiny_patch16_224")
PAIRS = [("resnet50", "mobilenetv2_100"), FAMILY, ("resnet18", "deit_tiny_patch16_224")]
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


def main(quick: bool = False, out: Path | None = None) -> None:
    """Print the ratios, and write them to OUT."""
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    for batch, repeats in ((1, 1),) if quick else ((1, 3), (8, 1)):
        ratios |= bench_evaluation(batch, repeats, every=2 if quick else 1)
    for names in PAIRS:
        ratios |= bench_latency(*names, 6 if quick else 20)
    for name, ratio in ratios.items():
        if not name.endswith("(median)"):
            median = ratios.get(f"{name} (median)")
            print(f"{name}: {ratio:.3f}" + (f" ({median:.3f})" if median else ""))
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
