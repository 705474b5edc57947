"""Many threads share one model: how many answers are wrong, and how many more images a second than one thread.

    python recipes/benchmarks/threads.py [--quick] [--calls 500] [--out FILE.json]

ResNet-50 joined to DeiT-Tiny, of timm with random weights, at 224 px. Each of eight threads has an image of its own,
and changes routes where the way allows it; every answer is compared with that of one thread alone. A ratio is the
throughput of as many threads as there are cores over one thread's, where torch uses one thread for each call; the
peer is the front anchor itself, called in the same way. The live routes include one with norms of its own.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
import typer
from rich.console import Console
from torch import Tensor

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification
from restnet_hf.export import export_routes
from restnet_hf.stitches.tuning import TunedConfig, tuned_keys


NAMES = ("resnet50", "deit_tiny_patch16_224")
ROUTES = [f"{NAMES[0]}[:7] + {NAMES[1]}[6:]", f"{NAMES[0]}[:3] + {NAMES[1]}[3:]", f"{NAMES[0]}[:]", f"{NAMES[1]}[:]"]
THREADS = 8

Call = Callable[[Tensor, str], Tensor]


def make_model() -> StitchedModelForImageClassification:
    """The pair, with norms of its own for the first route."""
    torch.manual_seed(0)
    anchors = [Anchor(timm.create_model(name).eval(), name, Preprocessing((224, 224))) for name in NAMES]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    for route in ROUTES[:2]:
        model.add_stitch(route)
    (key,) = (key for key in tuned_keys(model.route(ROUTES[0]))[-1] if key.kind == "norm")
    with torch.no_grad():
        for tensor in model.add_tuned(key, TunedConfig("norm", NAMES[1], start=6)).parameters():
            tensor.mul_(1.5)
    return model.eval()


def ways(
    model: StitchedModelForImageClassification, folder: Path, image: Tensor, exporting: list[str]
) -> dict[str, tuple[Call, list[str]]]:
    """How to call the model, with the routes that each way runs."""
    baked = model.bake(ROUTES[0])
    compiled = torch.compile(baked)
    program = torch.export.export(baked, (image,)).module()
    exported = export_routes(model, folder / "onnx", exporting, runtime="onnx", threads=1)
    exported.keep = len(exporting)
    return {
        "live": (lambda x, route: model(x, route=route).logits, ROUTES),
        "baked": (lambda x, route: baked(x), ROUTES[:1]),
        "compiled": (lambda x, route: compiled(x), ROUTES[:1]),
        "torch.export": (lambda x, route: program(x), ROUTES[:1]),
        "ONNX Runtime": (lambda x, route: torch.from_numpy(exported(x.numpy(), route=route)), exporting),
    }


def count_wrong(call: Call, routes: list[str], images: Tensor, calls: int) -> int:
    """The answers of eight threads that differ from those of one thread alone, errors included."""
    expected = [{route: call(image, route) for route in routes} for image in images]
    begin = threading.Barrier(THREADS)

    def work(thread: int) -> int:
        begin.wait()
        wrong = 0
        with torch.inference_mode():
            for turn in range(calls):
                route = routes[(thread + turn) % len(routes)]
                try:
                    answer = call(images[thread], route)
                    wrong += not torch.allclose(answer, expected[thread][route], atol=1e-4)
                except Exception:  # whatever it is, the request has no answer
                    wrong += 1
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


def images_per_second(call: Call, route: str, images: Tensor, threads: int, calls: int) -> float:
    """Throughput of some threads that call one route all the time."""
    begin = threading.Barrier(threads + 1)

    def work(thread: int) -> None:
        with torch.inference_mode():
            call(images[thread], route)
            begin.wait()
            for _ in range(calls):
                call(images[thread], route)

    with ThreadPoolExecutor(threads) as pool:
        done = [pool.submit(work, thread) for thread in range(threads)]
        begin.wait()
        began = time.perf_counter()
        for each in done:
            each.result()
    return threads * calls / (time.perf_counter() - began)


def main(quick: bool = False, calls: int = 500, out: Path | None = None) -> None:
    """Print the number of wrong answers and the ratios of throughput, and write the ratios."""
    torch.set_num_threads(1)
    cores, calls, repeats = len(os.sched_getaffinity(0)), 3 if quick else calls, 2 if quick else 7
    images = torch.randn(THREADS, 1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    console, ratios = Console(soft_wrap=True), {}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        model = make_model()
        front = model.anchors[NAMES[0]].model
        calling = {
            **ways(model, Path(folder), images[0], ROUTES[:1] if quick else ROUTES),
            "front anchor": (lambda x, route: front(x), ROUTES[2:3]),
        }
        for name, (call, routes) in calling.items():
            wrong = count_wrong(call, routes, images, calls)
            each = 3 if quick else 20
            pairs = [
                [images_per_second(call, routes[0], images, threads, each) for threads in (1, cores)]
                for _ in range(repeats)
            ]
            one, many = (max(speeds) for speeds in zip(*pairs, strict=True))
            ratios[f"{name}: throughput of {cores} threads over one"] = many / one
            ratios[f"{name}: wrong of {THREADS * calls}"] = wrong
            console.print(f"{name}: {wrong} of {THREADS * calls} wrong, {cores} threads {many / one:.2f} times one")
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
