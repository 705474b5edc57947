"""Latency of routes on a device: a table with the times of their pieces, whose sum predicts that of any route."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from restnet_hf.files import atomic_file
from restnet_hf.profiling.device import device_name
from restnet_hf.routes.route import Segment
from restnet_hf.runtime.sustained import SustainedLatency
from restnet_hf.steps import Step


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of the times of a piece, in milliseconds.

    Args:
        ms: median of the times in milliseconds.
        spread_ms: interquartile range of the times in milliseconds.
    """

    ms: float
    spread_ms: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarise times in milliseconds.

        Args:
            samples: at least two times.
        """
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, high - low)


@dataclass(frozen=True)
class LatencyCheck:
    """Predicted and measured latency of a route for one batch.

    Args:
        predicted_ms: sum over the pieces of the route, in milliseconds.
        measured: time of runs from end to end.
        joules: energy of a batch, None if the system does not count it.
    """

    predicted_ms: float
    measured: Timing
    joules: float | None = None

    @property
    def error(self) -> float:
        """Error of the prediction, relative to the measured median."""
        return self.predicted_ms / self.measured.ms - 1


def entry_piece(anchor: str, start: int, order: str = "") -> str:
    """Name of the piece from the start of a run that enters at a cut to the next cut, or to the end after the last.

    Args:
        anchor: name of the anchor.
        start: cut at which the run enters.
        order: order of the axes in memory of the activation, if it is not the anchor's own.
    """
    return f"enter {anchor}[{start}:]" + _order_suffix(order)


def inner_piece(anchor: str, start: int, depth: int, order: str = "") -> str:
    """Name of the piece from a cut to the next in a run through both, or to the end after the last.

    Args:
        anchor: name of the anchor.
        start: cut at which the piece starts.
        depth: number of cuts of the anchor.
        order: order of the axes in memory of the run's first activation, if it is not the anchor's own.
    """
    return f"through {Segment(anchor, start, None if start == depth else start + 1)}" + _order_suffix(order)


def exit_piece(anchor: str, stop: int) -> str:
    """Name of the piece from a cut to the end of a run that stops there."""
    return f"leave {anchor}[:{stop}]"


def weights_piece(step: Step) -> str:
    """Name of the piece that computes the tensors which replace the anchor's own."""
    return f"weights of {step.name}"


def _order_suffix(order: str) -> str:
    return f" given axes {order}" if order else ""


@dataclass(frozen=True)
class LatencyTable:
    """Times of the pieces of routes on one device and runtime; the latency of a route is the sum over its pieces.

    Args:
        device: name of the processor, with the number of threads.
        runtime: name of the runtime, with precision and batch size.
        batch_size: number of images in a run.
        depths: number of cuts of each anchor, 0 if it only ran alone.
        entries: times by name of the piece.
        orders: order of the axes in memory by stitch, for stitches whose output has another order than the anchor's
            own activation; it can change the latency of the network up to its end.
        checks: comparison with runs from end to end in the same rounds, by route.
        facts: clock rate, date, versions, ``watts`` and other facts that JSON can hold.
    """

    device: str
    runtime: str
    batch_size: int
    depths: Mapping[str, int]
    entries: Mapping[str, Timing]
    orders: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, LatencyCheck] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def latency_ms(self, steps: Sequence[Step]) -> float:
        """Milliseconds that a route takes for one batch.

        Args:
            steps: steps of a route over measured anchors and stitches, in any order and number.

        Raises:
            ValueError: a piece of the route was not measured.
        """
        before = (None, *steps[:-1])
        return sum(
            self._ms(name)
            for last, step in zip(before, steps, strict=True)
            for name in self._pieces(step, "" if last is None else self.orders.get(last.name, ""))
        )

    def _ms(self, name: str) -> float:
        if name not in self.entries:
            raise ValueError(
                f"the latency table of {self.device}, {self.runtime}, has no time of '{name}'; measure it again with "
                "a route that uses it"
            )
        return self.entries[name].ms

    def _pieces(self, step: Step, order: str) -> list[str]:
        if step.segment is None:
            return [step.name]
        anchor, start, stop = step.segment.anchor, step.segment.start, step.segment.stop
        tuned = [weights_piece(step)] if step.tuned else []
        if step.segment == Segment(anchor):
            return [*tuned, str(step.segment)]
        depth = self.depths.get(anchor, 0)
        inner = range(start + 1, depth + 1 if stop is None else stop)
        end = [] if stop is None else [exit_piece(anchor, stop)]
        return [
            *tuned,
            entry_piece(anchor, start, order),
            *(inner_piece(anchor, k, depth, order) for k in inner),
            *end,
        ]

    @property
    def sustained(self) -> "LatencyTable":
        """The table of a device that has got warm: its times as slow as the last minute of ``facts["sustained"]``.

        Raises:
            ValueError: nothing was measured for minutes; see ``model.measure_sustained``.
        """
        if "sustained" not in self.facts:
            raise ValueError(f"the table of {self.device} has no sustained latency; measure it with minutes")
        slowdown = SustainedLatency.from_dict(self.facts["sustained"]).slowdown
        entries = {name: Timing(each.ms * slowdown, each.spread_ms * slowdown) for name, each in self.entries.items()}
        facts = {key: value for key, value in self.facts.items() if key != "sustained"}
        return replace(self, entries=entries, facts={**facts, "slowdown": slowdown})

    def metadata(self) -> dict[str, Any]:
        """Device, runtime and facts, for the metadata of a profile."""
        return {"device": self.device, "runtime": self.runtime, **self.facts}

    @property
    def watts(self) -> float | None:
        """Power of the processor while routes run, the median of the checks; None if it is not counted."""
        watts = self.facts.get("watts")
        return None if watts is None else _number(watts)

    @property
    def spread(self) -> float:
        """Interquartile range of the times of an anchor's whole runs over their median, the largest of all anchors."""
        wholes = [self.entries[str(Segment(anchor))] for anchor in self.depths]
        return max(timing.spread_ms / timing.ms if timing.ms else 0.0 for timing in wholes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, and keep the tables of other devices and runtimes in the file.

        Args:
            path: file to write or extend.

        Raises:
            ValueError: the file exists and does not hold latency tables.
        """
        tables = _read(path) if os.path.exists(path) else {}
        tables.setdefault(self.device, {})[self.runtime] = {
            "batch_size": self.batch_size,
            "depths": dict(self.depths),
            "orders": dict(self.orders),
            "facts": dict(self.facts),
            "checks": {name: [each.predicted_ms, *astuple(each.measured)] for name, each in self.checks.items()},
            "entries": {name: astuple(timing) for name, timing in self.entries.items()},
        }
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(tables) + "\n")

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str | None = None, runtime: str | None = None
    ) -> "LatencyTable":
        """Read a table that `save` wrote.

        Args:
            path: file that `save` wrote.
            device: name of the device as `device_name` returns it; this machine's processor by default.
            runtime: name of the table's runtime; may be left out if the device has one table.

        Raises:
            ValueError: the file does not hold latency tables, or has none of that device and runtime.
        """
        tables = _read(path)
        device = device or device_name(torch.device("cpu"))
        runtimes = tables.get(device, {})
        runtime = runtime or (next(iter(runtimes)) if len(runtimes) == 1 else "")
        if runtime not in runtimes:
            names = [f"{name}; {each}" for name, entries in tables.items() for each in entries]
            raise ValueError(f"{os.fspath(path)} has no table of '{device}; {runtime}', only of {names}; measure one")
        data = runtimes[runtime]
        try:
            return cls(
                device,
                runtime,
                int(_number(data["batch_size"])),
                {name: int(_number(depth)) for name, depth in data["depths"].items()},
                {name: Timing(*map(_number, pair)) for name, pair in data["entries"].items()},
                {str(name): str(order) for name, order in data["orders"].items()},
                {name: LatencyCheck(_number(p), Timing(_number(m), _number(s)))
                 for name, (p, m, s) in data["checks"].items()},
                dict(data["facts"]),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: not a latency table: {error!r}") from error


def _read(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    try:
        tables = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    if not isinstance(tables, dict) or not all(isinstance(entries, dict) for entries in tables.values()):
        raise ValueError(f"{os.fspath(path)} is not a file of latency tables; give the path of another file")
    return tables


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{value!r} is not a number of at least 0")
    return value
