"""Latency and memory of exported routes on this device, without torch."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import Profile, ProfiledCascade
from restnet_hf.runtime.controller import median
from restnet_hf.runtime.exported_cascades import IMAGES, ExportedStage
from restnet_hf.runtime.pixels import PixelRun
from restnet_hf.runtime.runners import Run


WARM_UP = 2  # rounds that are not counted
LEAST_ROUNDS, MOST_ROUNDS = 5, 200  # rounds that are counted
MEMORY_SECONDS = 300  # after which a process that measures memory is ended
Stages = Mapping[Cascade, Sequence[ExportedStage]]


def part_inputs(
    runs: Mapping[str, Run], routes: Iterable[str], stages: Stages, images: np.ndarray
) -> dict[str, np.ndarray]:
    """What each route and part is measured on.

    Args:
        runs: functions that run routes and parts, by name.
        routes: names of the routes.
        stages: stages of each cascade.
        images: images (N, 3, H, W) for the routes.
    """
    inputs = dict.fromkeys(routes, images)
    for each in stages.values():
        outputs = {IMAGES: images}
        for stage in each:
            x = outputs[stage.start]
            for part in stage.parts:
                inputs[part] = x
                x = outputs[part] = runs[part](x)
    return inputs


def time_parts(
    runs: Mapping[str, Run],
    inputs: Mapping[str, np.ndarray],
    seconds: float = 40.0,
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds for one image, by part. All run in turn, so that a device that slows down does so for all.

    Args:
        runs: functions that run routes and parts, by name.
        inputs: input (N, ...) of each.
        seconds: time after which no further round begins, except for the first 5.
        repeats: number of rounds, from 5 to 200.
        clock: function that returns the time in seconds.

    Raises:
        ValueError: ``repeats`` is out of range.
    """
    if not LEAST_ROUNDS <= repeats <= MOST_ROUNDS:
        raise ValueError(f"repeats={repeats} must be from {LEAST_ROUNDS} to {MOST_ROUNDS}")
    samples: dict[str, list[float]] = {name: [] for name in inputs}
    timed = {name: _timed(runs[name], x) for name, x in inputs.items()}
    began, number = clock(), 0
    while number < WARM_UP + repeats and (number < WARM_UP + LEAST_ROUNDS or clock() - began < seconds):
        for name, (run, x) in timed.items():
            started = clock()
            run(x)
            samples[name].append((clock() - started) * 1e3 / len(x))
        number += 1
    return {name: median(each[WARM_UP:]) for name, each in samples.items()}


def _timed(run: Run, x: np.ndarray) -> tuple[Run, np.ndarray]:
    """What is timed of a function, and its input: of a file that takes pixels, the file alone."""
    return run.timed(x) if isinstance(run, PixelRun) else (run, x)


def with_latencies(profile: Profile, latencies: Mapping[str, float], stages: Stages) -> Profile:
    """A profile with other latencies, those of cascades included.

    Args:
        profile: profile of exported routes.
        latencies: milliseconds for one image, by route and part.
        stages: stages of each cascade.
    """
    rows = (replace(row, costs={**row.costs, "latency_ms": latencies[str(row.route)]}) for row in profile.routes)
    cascades = (_with_latency(row, latencies, stages[row.route]) for row in profile.cascades)
    return replace(profile, routes=tuple(rows), cascades=tuple(cascades))


def _with_latency(
    row: ProfiledCascade, latencies: Mapping[str, float], stages: Sequence[ExportedStage]
) -> ProfiledCascade:
    added = tuple(sum(latencies[part] for part in stage.parts) for stage in stages)
    costs = {**row.costs, "latency_ms": sum(added)}
    if row.shares:
        costs["mean_latency_ms"] = sum(share * ms for share, ms in zip(row.shares, added, strict=True))
    return replace(row, costs=costs, stage_costs={**row.stage_costs, "latency_ms": added})


def measure_memory(folder: Path, route: str, threads: int | None = None) -> dict[str, float]:
    """Peak resident memory of a process that loads a route of a folder and runs it, in megabytes (2**20 bytes).

    Args:
        folder: folder of exported routes.
        route: string form of the route.
        threads: number of processor threads; the runtime's own default if None.

    Returns:
        ``resident_mb``, the peak; and ``loaded_mb``, by how much it is above the peak of a process that has imported
        Python, numpy and the runtime, but loaded no route.

    Raises:
        OSError: the system does not count the memory of processes, as Windows.
        RuntimeError: the process ended without a result.
    """
    if importlib.util.find_spec("resource") is None:
        raise OSError("this system does not report the peak memory of a process")
    command = [sys.executable, "-m", "restnet_hf.runtime.resident", str(folder), route, json.dumps(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MEMORY_SECONDS)
    try:
        before, after = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise RuntimeError(f"the memory of '{route}' cannot be measured: {last[:500]}") from error
    return {"resident_mb": after, "loaded_mb": after - before}
