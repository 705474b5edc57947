"""What a stitched route costs beside its parts run by hand: eager, baked, search, switching, loading and memory.

    python recipes/benchmarks/inference.py [--quick] [--out FILE.json]

Networks of timm at 224 px with random weights, one thread. The limit is the sum of the parts: the front's own blocks,
the stitch and the end's own blocks called one after the other by hand. All are timed in turn, repeat by repeat; a
ratio is of minima and, in brackets, the median of the ratios of each repeat. Memory is of data, not of code, each task
in a process of its own; weights that are mapped from a file count once they are read.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import ctypes
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import timm
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification
from restnet_hf.anchors.discovery import find_cuts


PAIRS = [  # front, its cut, end, its cut
    ("resnet50", 7, "resnet18", 4),
    ("deit_small_patch16_224", 6, "deit_tiny_patch16_224", 6),
    ("resnet50", 7, "deit_tiny_patch16_224", 6),
]


def parts_by_hand(model: nn.Module, cut: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A timm ResNet or ViT up to a block and from it on, without this package."""
    if hasattr(model, "layer1"):
        stages = [model.layer1, model.layer2, model.layer3, model.layer4]

        def early(x: Tensor) -> Tensor:
            x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
            left = cut
            for stage in stages:
                x = stage[:left](x) if left > 0 else x
                left -= len(stage)
            return x

        def late(x: Tensor) -> Tensor:
            left = cut
            for stage in stages:
                x = stage[max(left, 0) :](x) if left < len(stage) else x
                left -= len(stage)
            return model.fc(model.global_pool(x))

        return early, late

    def begin(x: Tensor) -> Tensor:
        return model.blocks[:cut](model.norm_pre(model._pos_embed(model.patch_embed(x))))

    return begin, lambda x: model.forward_head(model.norm(model.blocks[cut:](x)))


def keep_freed_memory() -> None:
    """Make glibc reuse large blocks.

    Otherwise a batch of 16 faults in a gigabyte of pages a call, and their number, which depends on the order of
    earlier calls, changes times by several percent.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: none goes back


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of several functions, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if repeat >= 2:  # the first two warm up
                taken[name].append(time.perf_counter() - began)
    return taken


@torch.no_grad()
def bench_pair(front: str, i: int, end: str, j: int, batch: int, repeats: int) -> dict[str, float]:
    """Ratios of one pair."""
    models = {name: timm.create_model(name).eval() for name in (front, end)}
    anchors = [Anchor(model, name, Preprocessing((224, 224))) for name, model in models.items()]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    route = model.set_route(model.add_stitch(f"{front}[:{i}] + {end}[{j}:]"))
    stitch, images = model.stitches[route.stitch_points[0].name], torch.randn(batch, 3, 224, 224)
    begin, finish = parts_by_hand(models[front], i)[0], parts_by_hand(models[end], j)[1]
    baked = model.bake()
    assert torch.allclose(finish(stitch(begin(images))), model(images).logits, atol=1e-4)
    assert torch.equal(baked(images), model(images).logits)
    hidden = begin(images)
    carried = stitch(hidden)
    taken = seconds(
        {
            "front part": lambda: begin(images),
            "stitch": lambda: stitch(hidden),
            "end part": lambda: finish(carried),
            "eager": lambda: model(images),
            "baked": lambda: baked(images),
            "front": lambda: models[front](images),
            "end": lambda: models[end](images),
        },
        repeats,
    )
    parts = [sum(times) for times in zip(taken["front part"], taken["stitch"], taken["end part"], strict=True)]
    ratios = {}
    for name in ("eager", "baked", "front", "end"):
        label = f"{front} -> {end}, batch {batch}: {name} over sum of parts"
        ratios[label] = min(taken[name]) / min(parts)
        ratios[f"{label} (median)"] = statistics.median(a / b for a, b in zip(taken[name], parts, strict=True))
    return ratios


@torch.no_grad()
def bench_search(repeats: int) -> dict[str, float]:
    """Time to find the cuts of a network, over one forward of one image."""
    ratios = {}
    for name in ("resnet50", "deit_small_patch16_224", "swin_tiny_patch4_window7_224"):
        model, image = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
        runs = {"forward": partial(model, image), "search": partial(find_cuts, model, (224, 224))}
        taken = seconds(runs, repeats)
        label = f"{name}: search for cuts over one forward"
        ratios[label] = min(taken["search"]) / min(taken["forward"])
        pairs = zip(taken["search"], taken["forward"], strict=True)
        ratios[f"{label} (median)"] = statistics.median(a / b for a, b in pairs)
    return ratios


def bench_switching(repeats: int) -> dict[str, float]:
    """Microseconds to switch routes, and what a model with every route of a pair holds beside anchors and stitches."""
    names = ("resnet50", "resnet18")
    anchors = [Anchor(timm.create_model(name).eval(), name, Preprocessing((224, 224))) for name in names]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    depths = [anchor.depth for anchor in anchors]
    pairs = [(i, j) for i in range(1, depths[0] + 1) for j in range(1, depths[1] + 1)]
    routes = [model.add_stitch(f"resnet50[:{i}] + resnet18[{j}:]") for i, j in pairs]
    taken = seconds({"switch": lambda: [model.set_route(route) for route in routes]}, repeats)["switch"]
    held = sum(p.numel() for p in model.parameters())
    apart = sum(p.numel() for part in (*anchors, *model.stitches.values()) for p in part.parameters())
    separate = sum(row.costs["params"] for row in model.profile(routes=routes).routes)
    return {
        "switching a route, microseconds": min(taken) / len(routes) * 1e6,
        f"parameters of {len(routes)} routes in one model over anchors and stitches": held / apart,
        f"parameters of {len(routes)} separate models over one model": separate / held,
    }


ROUTES = ["front[:3] + end[9:]", "front[:7] + end[6:]", "front[:10] + end[6:]", "front[:13] + end[3:]"]


def write_adapter(folder: Path) -> None:
    """A ResNet-50 in front of a ViT-S with random weights, on disk; also puts their cuts into the cache."""
    small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    ResNetForImageClassification(ResNetConfig(num_labels=1000)).save_pretrained(folder / "front")
    ViTForImageClassification(ViTConfig(num_labels=1000, **small)).save_pretrained(folder / "end")
    for name in ("front", "end"):
        ViTImageProcessor().save_pretrained(folder / name)
    model = StitchedModelForImageClassification.from_anchors(folder / "front", folder / "end", order="given")
    for route in ROUTES:
        model.add_stitch(route)
    model.set_route(ROUTES[1])
    model.save_pretrained(folder / "adapter")


def load_route(folder: Path) -> list[object]:
    """The adapter, and one image through its active route."""
    model = StitchedModelForImageClassification.from_pretrained(folder / "adapter")
    return [model, model(IMAGE)]


def load_anchors(folder: Path) -> list[object]:
    """Both anchors, and one image through each."""
    models = [AutoModelForImageClassification.from_pretrained(folder / name) for name in ("front", "end")]
    return [*models, *(model(IMAGE) for model in models)]


def load_every_route(folder: Path) -> list[object]:
    """The adapter, and one image through every route, the anchors alone too."""
    model = StitchedModelForImageClassification.from_pretrained(folder / "adapter")
    for route in model.all_routes:
        model.set_route(route)
        model(IMAGE)
    return [model]


def load_anchors_and_stitches(folder: Path) -> list[object]:
    """What one model of every route cannot do without."""
    return [*load_anchors(folder), *load_file(folder / "adapter" / "model.safetensors").values()]


def load_separate_models(folder: Path) -> list[object]:
    """A plain module for every route, and one image through each."""
    model = StitchedModelForImageClassification.from_pretrained(folder / "adapter")
    baked = [model.bake(route) for route in model.all_routes]
    for one in baked:
        one(IMAGE)
    return baked


IMAGE = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def resident_mb() -> tuple[float, float]:
    """Megabytes of data that the process holds, and of weight files that it has read; code is not counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back
    maps = psutil.Process().memory_maps()
    read = sum(m.rss for m in maps if m.path.endswith(".safetensors")) / 1e6
    return sum(m.anonymous for m in maps) / 1e6 + read, read


@torch.no_grad()
def held(task: Callable[[Path], list[object]], folder: Path) -> tuple[float, float, float]:
    """In a process of its own: megabytes that a task's result holds, megabytes read of weight files, seconds."""
    torch.set_num_threads(1)
    nn.Conv2d(3, 8, 3)(IMAGE)  # what the libraries set up once is not counted
    nn.functional.scaled_dot_product_attention(*[torch.randn(1, 2, 9, 8)] * 3)
    before, began = resident_mb()[0], time.perf_counter()
    kept = task(folder)
    seconds = time.perf_counter() - began
    after, read = resident_mb()
    del kept
    return after - before, read, seconds


def bench_loading(repeats: int) -> dict[str, float]:
    """Memory and time of a loaded adapter beside its anchors, and of one model beside a model for each route."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder)
        on_disk = sum((folder / part / "model.safetensors").stat().st_size for part in ("front", "end")) / 1e6
        tasks = (load_route, load_anchors, load_every_route, load_anchors_and_stitches, load_separate_models)
        results: dict[str, list[tuple[float, float, float]]] = {task.__name__: [] for task in tasks}
        for _ in range(repeats):
            for task in tasks:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    results[task.__name__].append(pool.submit(held, task, folder).result())
    grown, mapped, seconds = ({name: min(r[i] for r in rows) for name, rows in results.items()} for i in range(3))
    anchors = "load_anchors"
    return {
        "loading a route, megabytes of anchors read over megabytes of both files": mapped["load_route"] / on_disk,
        "loading both anchors, megabytes read over megabytes of both files": mapped[anchors] / on_disk,
        "loading a route and one image, memory over both anchors": grown["load_route"] / grown[anchors],
        "loading a route and one image, time over both anchors": seconds["load_route"] / seconds[anchors],
        "one model of every route, memory over anchors and stitches": (
            grown["load_every_route"] / grown["load_anchors_and_stitches"]
        ),
        "a model for each route, memory over one model": grown["load_separate_models"] / grown["load_every_route"],
    }


def main(quick: bool = False, out: Path | None = None) -> None:
    """Print the ratios, and write them to OUT."""
    torch.set_num_threads(1)
    keep_freed_memory()
    ratios: dict[str, float] = {}
    for pair in PAIRS:
        for batch in (1,) if quick else (1, 16):
            ratios |= bench_pair(*pair, batch, 5 if quick else 60 if batch == 1 else 9)
    ratios |= bench_search(3 if quick else 9)
    ratios |= bench_switching(3 if quick else 20)
    ratios |= bench_loading(1 if quick else 3)
    for name, ratio in ratios.items():
        if not name.endswith("(median)"):
            median = ratios.get(f"{name} (median)")
            print(f"{name}: {ratio:.3f}" + (f" ({median:.3f})" if median else ""))
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
