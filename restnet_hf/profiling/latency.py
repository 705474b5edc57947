"""How long routes take on a device: a table of the times of their pieces, from which that of any route adds up."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from restnet_hf.files import written_whole
from restnet_hf.profiling.device import device_name
from restnet_hf.routes.route import Segment
from restnet_hf.steps import Step


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range of the times of a piece, in milliseconds."""

    ms: float
    spread_ms: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Of at least two times."""
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, high - low)


@dataclass(frozen=True)
class LatencyCheck:
    """What the table says a route takes beside what it took from end to end, in milliseconds a batch."""

    predicted_ms: float
    measured: Timing
    joules: float | None = None  # a batch, where the system counts them

    @property
    def error(self) -> float:
        """Of the prediction, relative to the median measured."""
        return self.predicted_ms / self.measured.ms - 1


def entering(anchor: str, start: int, order: str = "") -> str:
    """From the begin of a run that enters at a cut to the next cut; after the last cut, to the end of the run."""
    return f"enter {anchor}[{start}:]" + _given(order)


def passing(anchor: str, start: int, depth: int, order: str = "") -> str:
    """From a cut to the next in a run that goes through both; after the last cut, to the end of the run."""
    return f"through {Segment(anchor, start, None if start == depth else start + 1)}" + _given(order)


def leaving(anchor: str, stop: int) -> str:
    """From a cut to the end of a run that stops there."""
    return f"leave {anchor}[:{stop}]"


def making(step: Step) -> str:
    """To make the tensors that take the place of the anchor's own."""
    return f"weights of {step.name}"


def _given(order: str) -> str:
    return f" given axes {order}" if order else ""


@dataclass(frozen=True)
class LatencyTable:
    """Times of the pieces of routes on one device and runtime; what a route takes is the sum over its pieces.

    Args:
        device: name of the processor, and how many threads.
        runtime: what runs the routes, in which precision and batch size.
        batch_size: images in a run.
        depths: number of cuts of each anchor, 0 where it only ran alone.
        entries: by name of the piece.
        orders: of stitches whose activations lie in memory in another order of axes than the anchor's own, that order;
            a network may take longer or shorter for it, up to its end.
        checks: of routes that were run from end to end in the same rounds.
        facts: clock rate, date, versions, ``watts`` (see there) and more, as JSON holds it.
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
            steps: of a route over the anchors and stitches that were measured, in any order and number.

        Raises:
            ValueError: a piece of it was not measured.
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
        tuned = [making(step)] if step.tuned else []
        if step.segment == Segment(anchor):
            return [*tuned, str(step.segment)]
        depth = self.depths.get(anchor, 0)
        inner = range(start + 1, depth + 1 if stop is None else stop)
        end = [] if stop is None else [leaving(anchor, stop)]
        return [*tuned, entering(anchor, start, order), *(passing(anchor, k, depth, order) for k in inner), *end]

    def metadata(self) -> dict[str, Any]:
        """What a profile records of the device and runtime that latencies are of."""
        return {"device": self.device, "runtime": self.runtime, **self.facts}

    @property
    def watts(self) -> float | None:
        """What the processor uses while routes run, in the median of the checks; None where it is not counted."""
        found = self.facts.get("watts")
        return None if found is None else _number(found)

    @property
    def spread(self) -> float:
        """The widest of the anchors: interquartile range of the times of whole runs over their median."""
        wholes = [self.entries[str(Segment(anchor))] for anchor in self.depths]
        return max(timing.spread_ms / timing.ms if timing.ms else 0.0 for timing in wholes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, beside those of other devices and runtimes that the file has.

        Raises:
            ValueError: there is a file that is not of latency tables.
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
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(tables) + "\n")

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str | None = None, runtime: str | None = None
    ) -> "LatencyTable":
        """Read a table that `save` wrote.

        Args:
            path: of the file.
            device: as `device_name` gives it; that of the processor here by default.
            runtime: of the table; may be left out where the device has one table.

        Raises:
            ValueError: the file is not of latency tables, or has none of that device and runtime.
        """
        tables = _read(path)
        device = device or device_name(torch.device("cpu"))
        there = tables.get(device, {})
        runtime = runtime or (next(iter(there)) if len(there) == 1 else "")
        if runtime not in there:
            known = [f"{name}; {each}" for name, of in tables.items() for each in of]
            raise ValueError(f"{os.fspath(path)} has no table of '{device}; {runtime}', only of {known}; measure one")
        found = there[runtime]
        try:
            return cls(
                device,
                runtime,
                int(_number(found["batch_size"])),
                {name: int(_number(depth)) for name, depth in found["depths"].items()},
                {name: Timing(*map(_number, pair)) for name, pair in found["entries"].items()},
                {str(name): str(order) for name, order in found["orders"].items()},
                {name: LatencyCheck(_number(p), Timing(_number(m), _number(s)))
                 for name, (p, m, s) in found["checks"].items()},
                dict(found["facts"]),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: not a latency table: {error!r}") from error


def _read(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    try:
        tables = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    if not isinstance(tables, dict) or not all(isinstance(of, dict) for of in tables.values()):
        raise ValueError(f"{os.fspath(path)} is not a file of latency tables; give the name of another one")
    return tables


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{value!r} is not a number of at least 0")
    return value
