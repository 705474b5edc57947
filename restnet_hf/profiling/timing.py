"""Measure the pieces of routes on this device for the latency table, and whole routes to check it."""

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.profiling.device import device_facts, device_name, joules
from restnet_hf.profiling.latency import (
    LatencyCheck,
    LatencyTable,
    Timing,
    entry_piece,
    exit_piece,
    inner_piece,
    weights_piece,
)
from restnet_hf.progress import progress_bar
from restnet_hf.routes.route import Route, Segment
from restnet_hf.steps import Step, Walk, run_steps


WARM_UP = 2  # rounds that are not counted
MIN_ROUNDS = 5  # rounds that are counted, however long they take
# Interquartile range of an anchor's whole runs over their median: from here on a warning, and an error.
WARN_SPREAD, MAX_SPREAD = 0.2, 1.0
logger = logging.getLogger(__name__)


class _Watch:
    """Takes times on the device itself: an accelerator runs behind the processor that sends it work."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock

    def mark(self) -> Any:
        """The time now: seconds on a processor, an event on an accelerator."""
        if self.device.type == "cpu":
            return self.clock()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def idle(self) -> None:
        """Wait until the device has done all its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def ms(self, marks: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        """Milliseconds between pairs of marks."""
        self.idle()
        if self.device.type == "cpu":
            return {name: (last - first) * 1e3 for name, (first, last) in marks.items()}
        return {name: first.elapsed_time(last) for name, (first, last) in marks.items()}

    def time(self, name: str, run: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of one run, by its name."""
        self.idle()
        began = self.mark()
        run()
        return self.ms({name: (began, self.mark())})

    @contextmanager
    def at_cuts(self, anchor: Anchor) -> Iterator[dict[int, Any]]:
        """Record when the network last passed each of its cuts."""
        marks: dict[int, Any] = {}

        def record(index: int, *_: Any) -> None:
            marks[index] = self.mark()

        self.idle()
        with ExitStack() as stack:
            for index, cut in enumerate(anchor.cuts, 1):
                for path in cut.paths:
                    hook = anchor.model.get_submodule(path).register_forward_hook(partial(record, index))
                    stack.callback(hook.remove)
            yield marks


class _AnchorRuns:
    """The runs of one anchor that are timed: one whole, and one from each cut to the next.

    The whole run gives the time of each block within a segment, the short ones that of entering and leaving.
    """

    def __init__(self, anchor: Anchor, watch: _Watch, inputs: Mapping[int, Tensor], order: str = "") -> None:
        self.anchor, self.watch, self.inputs, self.order = anchor, watch, inputs, order
        self.name, self.first = anchor.name, min(inputs)
        self.cut = len(inputs) > 1 or self.first > 0

    def runs(self) -> list[Callable[[], dict[str, float]]]:
        """Functions that run and return the times of some pieces."""
        if not self.cut:
            return [partial(self.watch.time, str(Segment(self.name)), partial(self.anchor, self.inputs[0]))]
        return [self._whole, *(partial(self._short, start) for start in self.inputs)]

    def _whole(self) -> dict[str, float]:
        depth = self.anchor.depth
        with self.watch.at_cuts(self.anchor) as at:
            began = self.watch.mark()
            self.anchor(self.inputs[self.first], self.first)
            ended = self.watch.mark()
        marks = [at[index] for index in range(self.first + 1, depth + 1)] + [ended]
        spans = {
            inner_piece(self.name, k, depth, self.order): pair
            for k, pair in enumerate(pairwise(marks), self.first + 1)
        }
        return self.watch.ms(spans if self.first else {str(Segment(self.name)): (began, ended), **spans})

    def _short(self, start: int) -> dict[str, float]:
        stop = None if start == self.anchor.depth else start + 1
        with self.watch.at_cuts(self.anchor) as at:
            began = self.watch.mark()
            self.anchor(self.inputs[start], start, stop)
            ended = self.watch.mark()
        reached = ended if stop is None else at[stop]
        spans = {entry_piece(self.name, start, self.order): (began, reached)}
        if stop is not None and not self.order:
            spans[exit_piece(self.name, stop)] = (reached, ended)
        return self.watch.ms(spans)


def _weight(module: nn.Module) -> Tensor:
    return next(p for p in module.parameters() if p.is_floating_point())


def _noise(shape: Sequence[int], like: nn.Module) -> Tensor:
    weight = _weight(like)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)


def _order(x: Tensor) -> str:
    """The axes of a tensor, from the one of the longest stride to that of the shortest."""
    strides = x.stride()
    return "".join(map(str, sorted((d for d in range(x.dim()) if x.shape[d] > 1), key=lambda d: -strides[d])))


def _reordered(x: Tensor, order: str) -> Tensor:
    """The same values with the axes in another order in memory."""
    axes = [d for d in range(x.dim()) if str(d) not in order] + [int(d) for d in order]
    back = sorted(range(x.dim()), key=axes.__getitem__)
    return x.permute(axes).contiguous().permute(back)


class _Pieces:
    """The pieces of some walks that are to be timed."""

    def __init__(self, walks: Sequence[Walk], batch_size: int, watch: _Watch) -> None:
        segments = {s.segment: s.module for _, walk in walks for s in walk if s.segment}
        cut = {segment.anchor for segment in segments if segment != Segment(segment.anchor)}
        self.batch_size, self.watch = batch_size, watch
        self.anchors = {segment.anchor: m for segment, m in segments.items() if isinstance(m, Anchor)}
        self.inputs: dict[str, dict[int, Tensor]] = {}
        for name, anchor in self.anchors.items():
            image = _noise((batch_size, 3, *anchor.preprocessing.image_size), anchor)
            self.inputs[name] = {0: image}
            if name in cut:
                activations = anchor.capture(image, range(1, anchor.depth + 1))
                self.inputs[name] |= {cut: x for cut, x in activations.items() if cut is not None}
        self.depths = {name: len(inputs) - 1 for name, inputs in self.inputs.items()}
        self.orders: dict[str, str] = {}
        self.modules: dict[str, Callable[[], object]] = {}
        self.entered: dict[tuple[str, str], int] = {}  # first cut by anchor and order of axes in memory
        for _, walk in walks:
            for last, step, following in zip((None, *walk[:-1]), walk, (*walk[1:], None), strict=True):
                if step.segment is None:
                    self._add_module(last, step, following.segment if following else None)
                elif step.tuned:
                    compute = partial(step.replaced, step.segment.start, step.segment.stop)
                    self.modules[weights_piece(step)] = compute

    def _add_module(self, last: Step | None, step: Step, target: Segment | None) -> None:
        if step.name not in self.modules:
            x = self._input(last, step)
            self.modules[step.name] = partial(step, x)
            order = _order(step(x)) if target and target.start else ""
            if target and order and order != _order(self.inputs[target.anchor][target.start]):
                self.orders[step.name] = order
        if target and step.name in self.orders:
            key = target.anchor, self.orders[step.name]
            self.entered[key] = min(self.entered.get(key, target.start), target.start)

    def _input(self, last: Step | None, step: Step) -> Tensor:
        """The input of a step in a route: an anchor's own activation for a stitch, else noise."""
        if last is not None and last.segment is not None and last.segment.stop is not None:
            return self.inputs[last.segment.anchor][last.segment.stop]
        return _noise((self.batch_size, *step.shape[1:]), next(iter(self.anchors.values())))

    def runs(self) -> list[Callable[[], dict[str, float]]]:
        """Functions that return the times of pieces, for each network, then each other module."""
        runs = [_AnchorRuns(anchor, self.watch, self.inputs[name]) for name, anchor in self.anchors.items()]
        for (name, order), first in self.entered.items():
            inputs = {k: _reordered(x, order) for k, x in self.inputs[name].items() if k >= first}
            runs.append(_AnchorRuns(self.anchors[name], self.watch, inputs, order))
        modules = (partial(self.watch.time, name, run) for name, run in self.modules.items())
        return [*(run for each in runs for run in each.runs()), *modules]


def _whole_routes(walks: Iterable[Walk], batch_size: int, watch: _Watch) -> list[Callable[[], dict[str, float]]]:
    """Functions that run routes from end to end and return their times."""
    runs: list[Callable[[], dict[str, float]]] = []
    for route, steps in walks:
        x = _noise((batch_size, *steps[0].shape[1:]), _first_anchor(steps))
        runs.append(partial(watch.time, f"route {route}", partial(run_steps, x, steps)))
    return runs


def _first_anchor(steps: Iterable[Step]) -> Anchor:
    return next(step.module for step in steps if isinstance(step.module, Anchor))


def _rounds(
    jobs: Sequence[Callable[[], dict[str, float]]], repeats: int, seconds: float
) -> tuple[dict[str, Timing], int]:
    """Run jobs in turn; returns the times that they report by name, and the number of rounds."""
    samples: dict[str, list[float]] = {}
    began = time.monotonic()
    number = 0
    with progress_bar(desc="latency", total=WARM_UP + repeats) as bar:
        while number < WARM_UP + repeats and (number < WARM_UP + MIN_ROUNDS or time.monotonic() - began < seconds):
            for job in jobs:
                for name, ms in job().items():
                    samples.setdefault(name, []).append(ms)
            number += 1
            bar.update()
    return {name: Timing.of(each[WARM_UP:]) for name, each in samples.items()}, number - WARM_UP


@torch.no_grad()
def measure_latency(
    walks: Sequence[Walk],
    batch_size: int = 1,
    repeats: int = 20,
    seconds: float = 40.0,
    check: Iterable[Walk] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyTable:
    """Time every piece of the routes on the model's device.

    Every piece runs in turn, round by round, so that a device that slows down does so for all. In each round a network
    runs twice, once whole and once from cut to cut, and each stitch, conversion and head once; the first rounds warm
    up. Modules that take no anchor's activation get noise.

    Args:
        walks: routes with their steps, as ``[(route, model.steps(route)), ...]``.
        batch_size: number of images in a run.
        repeats: number of rounds, at least 5.
        seconds: time after which no further round begins, except for the first 5.
        check: routes that also run from end to end in each round, for the table's ``checks``.
        clock: function that returns the time in seconds; not used on an accelerator.

    Raises:
        ValueError: ``repeats`` or ``batch_size`` is out of range, or there are no routes.
        RuntimeError: the times of an anchor's runs vary so much that no latency can be given.
    """
    if repeats < MIN_ROUNDS or batch_size < 1 or not walks:
        raise ValueError(
            f"repeats={repeats}, batch_size={batch_size} and {len(walks)} routes must be at least "
            f"{MIN_ROUNDS}, 1 and 1"
        )
    weight = _weight(_first_anchor(walks[0][1]))
    watch, checked = _Watch(weight.device, clock), list(dict(check).items())
    pieces = _Pieces(walks, batch_size, watch)
    timings, rounds = _rounds([*pieces.runs(), *_whole_routes(checked, batch_size, watch)], repeats, seconds)
    whole = {str(route): timings.pop(f"route {route}") for route, _ in checked}
    kind = str(weight.dtype).removeprefix("torch.")
    runtime = f"torch {torch.__version__} eager, {kind}, batch {batch_size}"
    facts = device_facts() | {"rounds": rounds, "watts": _watts(checked, batch_size, whole)}
    table = LatencyTable(device_name(weight.device), runtime, batch_size, pieces.depths, timings, pieces.orders)
    checks = {str(route): LatencyCheck(table.latency_ms(steps), whole[str(route)]) for route, steps in checked}
    table = replace(table, checks=checks, facts=facts)
    _check_spread(table)
    return table


def _watts(checked: Iterable[Walk], batch_size: int, whole: Mapping[str, Timing]) -> float | None:
    """Median over routes of the processor's power while they run; None if it is not counted."""
    energies = {str(route): joules_per_image(steps, batch_size) for route, steps in checked}
    watts = [energy * batch_size / whole[name].ms * 1e3 for name, energy in energies.items() if energy is not None]
    return statistics.median(watts) if watts else None


def _check_spread(table: LatencyTable) -> None:
    """Warn, or raise RuntimeError, if the times of an anchor's runs vary too much."""
    message = (
        f"half of the runs of a network differ by {table.spread:.0%} on {table.device}: close other programs, fix the "
        "clock rate, use fewer threads than there are cores (torch.set_num_threads), or raise repeats and seconds"
    )
    if table.spread > MAX_SPREAD:
        raise RuntimeError(f"no latency can be given: {message}")
    if table.spread > WARN_SPREAD:
        logger.warning("latencies are uncertain: %s", message)


@torch.no_grad()
def check_latency(
    table: LatencyTable, walks: Sequence[Walk], repeats: int = 20, clock: Callable[[], float] = time.perf_counter
) -> dict[Route, LatencyCheck]:
    """Run routes from end to end, in turn, and compare their latency now with that of a table.

    The error includes any change of the device since, such as other load; for the error of the sum alone see ``check``
    of `measure_latency`.

    Args:
        table: latencies on this device.
        walks: routes with their steps.
        repeats: number of rounds, at least 5.
        clock: function that returns the time in seconds; not used on an accelerator.

    Raises:
        ValueError: ``repeats`` is out of range, or a piece of a route was not measured.
    """
    if repeats < MIN_ROUNDS:
        raise ValueError(f"repeats={repeats} must be at least {MIN_ROUNDS}")
    predicted = {route: table.latency_ms(steps) for route, steps in walks}
    watch = _Watch(_weight(_first_anchor(walks[0][1])).device, clock)
    timings, _ = _rounds(_whole_routes(walks, table.batch_size, watch), repeats, float("inf"))
    energies = {route: joules_per_image(steps, table.batch_size) for route, steps in walks}
    return {
        route: LatencyCheck(predicted[route], timings[f"route {route}"], energy and energy * table.batch_size)
        for route, energy in energies.items()
    }


@torch.no_grad()
def joules_per_image(steps: Sequence[Step], batch_size: int = 1, seconds: float = 1.0) -> float | None:
    """Energy of a route in joules for one image; None if the system does not count it, as on an accelerator.

    Other work of the processor at the same time is included.

    Args:
        steps: steps of the route.
        batch_size: number of images in a run.
        seconds: least time to repeat the run for.
    """
    x = _noise((batch_size, *steps[0].shape[1:]), _first_anchor(steps))
    if x.device.type != "cpu":
        return None
    energy = joules(partial(run_steps, x, steps), seconds)
    return None if energy is None else energy / batch_size
