# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Keep to a latency budget while the device gets busy: the controller changes the route of a loaded adapter.

    restnet-hf demo --out demo && python recipes/follow_load.py demo/adapter [--budget-ms 12] [--seconds 20]

Images go through one by one, eagerly and on one thread. A third of the time the device is left alone, a third every
core moves large arrays about in other processes, and a third it is left alone again. Each line says what the
controller decided. It is told the median of every twentieth of a second: schedulers stop a process for longer than
small networks take, and what is over by the next measurement is nothing to follow. Without --budget-ms the budget is
one and a half times what the slowest route takes at first.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import typer

from restnet_hf import Budget, Profile, StitchedModelForImageClassification
from restnet_hf.runtime.controller import Controller


BUSY = "import numpy as np; x = np.ones(2**23)\nwhile True: x = x[::-1] + 1"  # 64 MB, which no cache holds
REPEATS = 30
READING_S = 0.05


def timed(model: StitchedModelForImageClassification, image: torch.Tensor) -> float:
    """Milliseconds for one image."""
    start = time.perf_counter()
    model(image)
    return 1e3 * (time.perf_counter() - start)


def with_latency(model: StitchedModelForImageClassification, image: torch.Tensor, profile: Profile) -> Profile:
    """The profile with a latency for every route: its own, or else the median of `REPEATS` rounds over all routes."""
    if all("latency_ms" in row.costs for row in profile.routes):
        return profile
    times: dict[int, list[float]] = {index: [] for index, _ in enumerate(profile.routes)}
    for round_, (index, row) in itertools.product(range(REPEATS + 1), enumerate(profile.routes)):
        model.set_route(row.route)
        ms = timed(model, image)
        if round_ > 0:  # the first warms up
            times[index].append(ms)
    rows = [
        replace(row, costs={**row.costs, "latency_ms": statistics.median(times[index])})
        for index, row in enumerate(profile.routes)
    ]
    return replace(profile, routes=tuple(rows))


@contextmanager
def busy(on: bool) -> Iterator[None]:
    """Other processes that keep every core and the memory busy, while inside and if ``on``."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1) if on]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@torch.inference_mode()
def follow(
    model: StitchedModelForImageClassification, controller: Controller, image: torch.Tensor, seconds: float
) -> None:
    """Run images for so long, follow the controller's decisions, and print them."""
    print(f"{'s':>6} {'measured ms':>11} {'load':>5} {'route':<40} reason")
    model.set_route(controller.route)
    begin = time.monotonic()
    limit = controller.budget.latency_ms or 0.0
    for part, name in enumerate(("alone", "busy", "alone again"), 1):
        kept = []
        with busy(name == "busy"):
            while (now := time.monotonic() - begin) < part * seconds / 3:
                reading: list[float] = []
                while not reading or time.monotonic() - begin < now + READING_S:
                    reading.append(timed(model, image))
                decision = controller.observe(now, latency_ms=statistics.median(reading))
                model.set_route(decision.route)
                if decision.switched or not kept:
                    ms, (reason, *_) = statistics.median(reading), decision.reason.split(";")
                    print(f"{now:6.2f} {ms:11.2f} {controller.load:5.2f} {decision.route!s:<40} {reason}")
                kept += reading
        within = sum(ms <= limit for ms in kept) / len(kept)
        print(
            f"       {name}: {len(kept)} images, {statistics.median(kept):.2f} ms, {within:.0%} within {limit:.2f} ms"
        )


def main(adapter: Path, budget_ms: float | None = None, seconds: float = 20.0, dwell_s: float = 1.0) -> None:
    """Load an adapter, measure its routes, and follow the load."""
    torch.set_num_threads(1)
    model = StitchedModelForImageClassification.from_pretrained(adapter)
    if model.profiled is None:
        raise typer.BadParameter(f"{adapter} has no profile, so it is not known how accurate its routes are")
    image = torch.randn(1, 3, *model.preprocessing.image_size)
    with torch.inference_mode():
        profile = with_latency(model, image, model.profiled)
    for row in profile.pareto("latency_ms"):
        print(f"{row.costs['latency_ms']:6.2f} ms, accuracy {row.scores['accuracy']:.3f}: {row.route}")
    budget = Budget(latency_ms=budget_ms or 1.5 * max(row.costs["latency_ms"] for row in profile.routes))
    print(f"budget: {budget}")
    follow(model, Controller(profile, budget, dwell_s=dwell_s), image, seconds)


if __name__ == "__main__":
    typer.run(main)
