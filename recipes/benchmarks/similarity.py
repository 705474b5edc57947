"""What CKA between all cuts of two networks costs beside one bare forward of each, ours and the peers'.

    python recipes/benchmarks/similarity.py [--quick] [--out FILE.json]

Networks of timm at 224 px with random weights, one thread, batches of 32. The limit is one bare forward of each
network. torch-cka and ckatorch (pip install --no-deps torch-cka ckatorch seaborn) are given the same layers and the
same images; the naive way keeps every activation of a batch and forms a Gram matrix of each. These three compare
flattened activations, so ours is measured on those too; pooled over positions is our default. Times are taken in turn,
repeat by repeat; a ratio is the median of the ratios of each repeat (and of the minima). Memory is the highest that a
process holds beyond what it held before, each task in processes of its own: the median of three.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import importlib.util
import json
import multiprocessing
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path

import psutil
import timm
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from restnet_hf import Anchor, Preprocessing
from restnet_hf.selection.samples import Pair, SelectionBatch
from restnet_hf.selection.selectors import compare


PAIRS = [("resnet50", "resnet18"), ("deit_small_patch16_224", "deit_tiny_patch16_224")]
BATCH = 32
PEERS = ("naive", "torch_cka", "ckatorch")
OURS = ("ours", "ours, flattened")


def networks(pair: tuple[str, str]) -> list[Anchor]:
    """The two anchors, their cuts found."""
    torch.manual_seed(0)
    anchors = [Anchor(timm.create_model(name).eval(), name, Preprocessing((224, 224))) for name in pair]
    for anchor in anchors:
        anchor.search()
    return anchors


def ours(anchors: list[Anchor], images: list[Tensor], features: str) -> None:
    """Our own."""
    by_name, same = {anchor.name: anchor for anchor in anchors}, {anchor.name: nn.Identity() for anchor in anchors}
    seen = (SelectionBatch(i * BATCH, dict.fromkeys(by_name, batch), by_name, same) for i, batch in enumerate(images))
    compare([Pair(*anchors, nn.Identity())], lambda: seen, {"cka": {"features": features}})


@torch.no_grad()
def bare(anchors: list[Anchor], images: list[Tensor]) -> None:
    """The limit."""
    for batch in images:
        for anchor in anchors:
            anchor.model(batch)


@torch.no_grad()
def naive(anchors: list[Anchor], images: list[Tensor]) -> None:
    """Every activation kept, a Gram matrix of each, the criterion of every pair in turn."""
    for batch in images:
        kept = [anchor.capture(batch, range(1, anchor.depth + 1)) for anchor in anchors]
        grams = [[f.flatten(1) @ f.flatten(1).T for f in features.values()] for features in kept]
        centre = torch.eye(len(batch)) - 1 / len(batch)
        for a in grams[0]:
            for b in grams[1]:
                torch.trace(centre @ a @ centre @ b)


def torch_cka(anchors: list[Anchor], images: list[Tensor]) -> None:
    """The package of that name."""
    from torch_cka import CKA

    loader, names = _peer(anchors, images)
    with suppress(AssertionError):  # its last line: the result holds NaN, which it does on these networks
        CKA(*(a.model for a in anchors), *(a.name for a in anchors), *names).compare(loader, loader)


def ckatorch(anchors: list[Anchor], images: list[Tensor]) -> None:
    """The package of that name."""
    from ckatorch import CKA

    loader, names = _peer(anchors, images)
    CKA(*(a.model for a in anchors), *names)(loader, epochs=1)


def _peer(anchors: list[Anchor], images: list[Tensor]) -> tuple[DataLoader, list[list[str]]]:
    loader = DataLoader(TensorDataset(torch.cat(images)), batch_size=BATCH)
    return loader, [[cut.name for cut in anchor.cuts] for anchor in anchors]


def job(name: str, anchors: list[Anchor], images: list[Tensor]) -> Callable[[], None]:
    """What is timed under a name."""
    if name in OURS:
        return partial(ours, anchors, images, "flattened" if "flattened" in name else "pooled")
    return partial({"bare": bare, "naive": naive, "torch_cka": torch_cka, "ckatorch": ckatorch}[name], anchors, images)


def quietly(run: Callable[[], None], anchors: list[Anchor]) -> None:
    """Run without the peers' bars and warnings, and take their hooks off."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        run()
    for anchor in anchors:
        for module in anchor.model.modules():
            module._forward_hooks.clear()


def peak(pair: tuple[str, str], name: str) -> float:
    """Megabytes that a job holds at most, beyond what was held before it; in a process of its own."""
    torch.set_num_threads(1)
    anchors, images = networks(pair), [torch.randn(BATCH, 3, 224, 224)]
    quietly(partial(bare, anchors, [image[:2] for image in images]), anchors)
    process, done, highest = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    quietly(job(name, anchors, images), anchors)
    done.set()
    thread.join()
    return (highest - before) / 2**20


def bench(pair: tuple[str, str], names: list[str], repeats: int) -> dict[str, float]:
    """Ratios of time and of peak memory to the bare forwards."""
    anchors, images = networks(pair), [torch.randn(BATCH, 3, 224, 224)]
    for name in [name for name in names if name in PEERS]:
        try:
            quietly(job(name, anchors, [image[:8] for image in images]), anchors)
        except RuntimeError as error:
            print(f"{name} cannot compare {pair[0]} with {pair[1]}: {error}")
            names = [other for other in names if other != name]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name in names:
            began = time.perf_counter()
            quietly(job(name, anchors, images), anchors)
            seconds[name].append(time.perf_counter() - began)
    found = {}
    label = " to ".join(pair)
    for name in names[1:]:
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds["bare"][1:], strict=True)]  # the first is warm-up
        found[f"{label}, {name}: time"] = statistics.median(ratios)
        found[f"{label}, {name}: time (of minima)"] = min(seconds[name][1:]) / min(seconds["bare"][1:])
    context = multiprocessing.get_context("spawn")
    held = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            held[name] = statistics.median(pool.map(partial(peak, pair), [name] * (1 if repeats == 1 else 3)))
    print(label, {name: f"{megabytes:.0f} MB" for name, megabytes in held.items()})
    return found | {f"{label}, {name}: memory": held[name] / held["bare"] for name in names[1:]}


def main(quick: bool = False, out: Path | None = None) -> None:
    """Print the ratios, and write them to OUT."""
    torch.set_num_threads(1)
    there = [name for name in PEERS if name == "naive" or importlib.util.find_spec(name)]
    ratios: dict[str, float] = {}
    for pair in PAIRS[1:] if quick else PAIRS:
        ratios |= bench(pair, ["bare", *OURS, *(there[:1] if quick else there)], 1 if quick else 5)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
