"""How much of each step several processes share: their processor time together over that of one process.

    python recipes/benchmarks/sharing.py [--quick] [--processes 2] [--images 1500] [--repeats 3] [--out FILE.json]

Selectors, `fit_stitches`, `profile`, cascades, `adapt` and `train` of the demo's two anchors, on its pictures, and
`fit_stitches` on the same pictures as a stream. Each process has one thread. 1.0 is the least: all work is shared, and
what is not shared is done once by each process. The seconds on the clock, over those of one process, are given too;
with as many processors as processes their least is one over the number of processes.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import os


os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, for all processes

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from accelerate.utils import gather_object

from restnet_hf import StitchedModelForImageClassification, TrainArgs, adapt, load_images, train
from restnet_hf.demo import DATA, END, FRONT


METHODS = ("cka", "lstsq", "kl_probe", "fitted_accuracy")
QUICK = 300  # images


def make_steps(model: StitchedModelForImageClassification, images: int) -> dict[str, Callable[[], Any]]:
    """Each step as a function, in the order in which they run."""
    rows = {split: load_images(DATA, split) for split in ("train", "test")}
    some, held = (each.select(range(min(images, len(each)))) for each in rows.values())
    ready, test, stream = map(model.prepare_data, (some, held, some.to_iterable_dataset(num_shards=4)))
    model.select_stitches(ready, "position", max_routes=8)
    args = TrainArgs(num_train_epochs=1, least_squares_images=512, tuning="norm")
    selectors = {
        method: partial(model.compare, ready, [method], kept_images=images, max_images=None) for method in METHODS
    }
    return selectors | {
        "fit_stitches": lambda: model.fit_stitches(ready),
        "fit_stitches of a stream": lambda: model.fit_stitches(stream),
        "profile": lambda: model.profile(test),
        "profile with cascades": lambda: model.profile(test, cascades=True),
        "set_cascade": lambda: model.set_cascade(images=test.remove_columns("labels"), agreement=0.9),
        "adapt": lambda: adapt(model, test, {"macs": 1e12}),
        "train": lambda: train(model, ready, args),
    }


def measure(images: int) -> None:
    """Print the processor time of all processes for each step, and the seconds that it takes on the clock."""
    state, found = PartialState(cpu=True), dict[str, dict[str, float]]()
    model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype=torch.float32)
    for name, act in make_steps(model, images).items():
        state.wait_for_everyone()
        used, began = time.process_time(), time.perf_counter()
        act()
        used = time.process_time() - used  # while a process waits for others, it uses none
        state.wait_for_everyone()
        found[name] = {"clock": time.perf_counter() - began, "used": sum(gather_object([used]))}
    if state.is_main_process:
        print(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(processes: int, images: int) -> dict[str, dict[str, float]]:
    """What `measure` prints with some number of processes, with an empty cache of comparisons."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_ASSETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, *launch, __file__, "--worker", "--images", str(images)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(
    quick: bool = False,
    processes: int = 2,
    images: int = 1500,
    repeats: int = 3,
    out: Path | None = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Measure, print and write ratios.

    Args:
        quick: whether to take few images, once.
        processes: number of processes that are compared with one.
        images: number of images of each split.
        repeats: number of runs with one process and with several, in turn; the least of each step counts.
        out: file for the result.
        worker: whether this is a process that measures.
    """
    if worker:
        measure(images)
        return
    images, repeats = (QUICK, 1) if quick else (images, repeats)
    runs = [(run(1, images), run(processes, images)) for _ in range(repeats)]
    ratios, seconds = dict[str, float](), dict[str, float]()
    for step in runs[0][0]:
        for what, name in (("used", "processor time"), ("clock", "time")):
            one, several = (min(each[which][step][what] for each in runs) for which in (0, 1))
            ratios[f"{step}: {name} of {processes} processes over one"] = several / one
        seconds[step] = min(each[0][step]["used"] for each in runs)
    print(json.dumps({name: round(value, 2) for name, value in ratios.items()}, indent=1))
    if out is not None:
        settings = {"images": images, "repeats": repeats, "processors": os.cpu_count(), "seconds of one": seconds}
        out.write_text(json.dumps({"settings": settings, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
