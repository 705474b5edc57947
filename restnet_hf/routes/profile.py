"""Profiles and budgets: routes with their costs and scores, and the best one within limits. No torch."""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any

from restnet_hf.errors import BudgetError
from restnet_hf.files import written_whole
from restnet_hf.limits import MAX_BYTES
from restnet_hf.routes.route import Route


RUNTIME_KEYS = ("device", "runtime", "precision", "threads")  # what a latency depends on
MOST_NESTED = 32  # levels of metadata; ours has 4, and writing it again must not reach Python's recursion limit
LONGEST_ERROR = 300  # characters of what is wrong with a file, which may hold megabytes of anything
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Budget:
    """Upper limits on what a route may cost, None where there is none.

    Args:
        macs: multiply-accumulate operations for one image.
        params: parameters of the route's own segments, stitches and head.
        memory_mb: megabytes (2**20 bytes).
        latency_ms: milliseconds for one image, on the device the profile names.
        energy_j: joules for one image, of all that the processor uses meanwhile.
    """

    macs: float | None = None
    params: float | None = None
    memory_mb: float | None = None
    latency_ms: float | None = None
    energy_j: float | None = None

    def __post_init__(self) -> None:
        for cost, limit in self.limits.items():
            if isinstance(limit, bool) or not isinstance(limit, Real) or not limit > 0:
                raise ValueError(f"budget {cost}={limit!r} must be a number above 0")
            if limit > LARGEST and limit != math.inf:  # a whole number that no float can hold
                raise ValueError(f"budget {cost} must be at most {LARGEST:.3g}; leave it out where there is no limit")
        if not self.limits:
            raise ValueError(f"a budget needs at least one of {[f.name for f in fields(self)]}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by cost."""
        return {cost: limit for cost, limit in asdict(self).items() if limit is not None}

    def allows(self, costs: Mapping[str, float]) -> bool:
        """Whether costs are within all limits; one that is limited and not known is not."""
        return all(costs.get(cost, math.inf) <= limit for cost, limit in self.limits.items())

    def __str__(self) -> str:
        return ", ".join(f"{cost}<={limit:g}" for cost, limit in self.limits.items())


@dataclass(frozen=True)
class ProfiledRoute:
    """One route with what it costs and what it gives."""

    route: Route
    costs: Mapping[str, float]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Routes x costs x scores, with where the numbers come from.

    Args:
        routes: the profiled routes.
        metadata: device, data, date and software versions; anything JSON holds.
    """

    routes: tuple[ProfiledRoute, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def best(self, budget: Budget, score: str = "accuracy") -> ProfiledRoute:
        """The route of the highest score within ``budget``; of equals, the one of fewer MACs.

        Where no route has that score, the one of the most MACs within the budget.

        Raises:
            BudgetError: nothing fits (the message names the cheapest route), or a cost was not measured.
        """
        limits = budget.limits
        for cost in limits:
            if not all(cost in row.costs for row in self.routes):
                known = sorted(set.intersection(*(set(row.costs) for row in self.routes)) if self.routes else ())
                raise BudgetError(f"the profile holds no {cost} for its routes, only {known}; profile the model again")
        fitting = [row for row in self.routes if budget.allows(row.costs)]
        if not fitting:
            raise BudgetError(f"no route fits {budget}; {self._cheapest(budget)}")
        scored = [row for row in fitting if score in row.scores]
        if scored:
            return max(scored, key=lambda row: (row.scores[score], -row.costs.get("macs", 0)))
        return max(fitting, key=lambda row: row.costs.get("macs", 0))

    def _cheapest(self, budget: Budget) -> str:
        if not self.routes:
            return "the profile is empty"
        limits = budget.limits
        row = min(self.routes, key=lambda row: max(row.costs[c] / limit for c, limit in limits.items()))
        return f"the cheapest is '{row.route}' with " + ", ".join(f"{c}={row.costs[c]:g}" for c in limits)

    def pareto(self, cost: str = "macs", score: str = "accuracy") -> tuple[ProfiledRoute, ...]:
        """The routes that no other beats on both ``cost`` and ``score``, cheapest first.

        Raises:
            ValueError: a route has no such cost or score.
        """
        missing = [str(row.route) for row in self.routes if cost not in row.costs or score not in row.scores]
        if missing:
            raise ValueError(f"'{missing[0]}' has no {cost} or no {score}; profile the model again")
        front: list[ProfiledRoute] = []
        for row in sorted(self.routes, key=lambda row: (row.costs[cost], -row.scores[score])):
            if not front or row.scores[score] > front[-1].scores[score]:
                front.append(row)
        return tuple(front)

    def with_runtime(self, exported: "Profile") -> "Profile":
        """With what the profile of an exported folder says, in ``metadata["runtimes"]``.

        Each entry there is of one device, runtime, precision and number of threads, with ``latency_ms`` and scores by
        route. What is known of other routes in the same stays.

        Raises:
            ValueError: the exported profile does not hold the device, runtime, precision, threads or latencies.
        """
        entry = {key: exported.metadata.get(key) for key in (*RUNTIME_KEYS, "date", "versions", "images", "size_mb")}
        routes = {str(r.route): {"latency_ms": r.costs.get("latency_ms"), **r.scores} for r in exported.routes}
        _check_runtime({**entry, "routes": routes})
        others = []
        for other in self.metadata.get("runtimes", ()):
            if all(other.get(key) == entry[key] for key in RUNTIME_KEYS):
                routes = {**other.get("routes", {}), **routes}
            else:
                others.append(other)
        return Profile(self.routes, {**self.metadata, "runtimes": [*others, {**entry, "routes": routes}]})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [{"route": str(r.route), "costs": dict(r.costs), "scores": dict(r.scores)} for r in self.routes]
        return {"metadata": dict(self.metadata), "routes": rows}

    @classmethod
    def from_dict(cls, data: Any) -> "Profile":
        """The inverse of `to_dict`; raises ValueError where ``data`` is not a profile, whatever else it is."""
        try:
            rows = tuple(
                ProfiledRoute(Route.parse(row["route"]), _numbers(row["costs"]), _numbers(row["scores"]))
                for row in data["routes"]
            )
            metadata = dict(data["metadata"])
            _check_nesting(metadata)
            for entry in metadata.get("runtimes", ()):
                _check_runtime(entry)
            return cls(rows, metadata)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a profile: {_shortened(error)}") from None  # the cause may be as long as the file

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON."""
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read what `save` wrote.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it is not a profile, or larger than ``MAX_BYTES``.
        """
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{os.fspath(path)}: more than {MAX_BYTES:,} bytes, the most that a profile may have")
        try:
            return cls.from_dict(json.loads(data.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(key, str) or not isinstance(value, int | float):
            raise ValueError(f"{key!r} is {value!r}, not a number")
        if not abs(value) <= LARGEST:  # as is said of NaN, and of whole numbers that no float can hold
            raise ValueError(f"{key!r} is not finite, or above {LARGEST:.3g}")
    return dict(values)


def _check_runtime(entry: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError unless an entry of ``runtimes`` is valid."""
    for numbers in ({"threads": entry["threads"]}, *entry["routes"].values()):
        _numbers(numbers)
    if not all("latency_ms" in numbers for numbers in entry["routes"].values()):
        raise ValueError("a route of a runtime has no latency_ms")
    if not all(isinstance(entry[key], str) for key in RUNTIME_KEYS[:3]):
        raise ValueError(f"{RUNTIME_KEYS[:3]} of a runtime must be text")


def _check_nesting(metadata: Any) -> None:
    """Raise ValueError where there are more than ``MOST_NESTED`` levels."""
    level = [metadata]
    for _ in range(MOST_NESTED):
        inside = (item for value in level for item in _items(value))
        level = list({id(item): item for item in inside}.values())  # what YAML repeats by reference counts once
        if not level:
            return
    raise ValueError(f"metadata is nested deeper than {MOST_NESTED} levels")


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()


def _shortened(error: Exception) -> str:
    try:
        text = repr(error)
    except (ValueError, RecursionError):  # it holds a number of too many digits, or is nested too deep
        text = type(error).__name__
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}..."
