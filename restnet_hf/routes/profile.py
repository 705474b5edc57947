"""Profiles and budgets: routes with their costs and scores, and the best route within limits. No torch."""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any

from restnet_hf.errors import BudgetError, quote
from restnet_hf.files import atomic_file
from restnet_hf.limits import MAX_BYTES
from restnet_hf.routes.route import Route


RUNTIME_KEYS = ("device", "runtime", "precision", "threads")  # what a latency depends on
MAX_NESTING = 32  # levels of metadata; ours has 4, and writing it again must not reach Python's recursion limit
MAX_CAUSE = 300  # characters of what is wrong with a file, which may hold megabytes of anything
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Budget:
    """Upper limits on the costs of a route; None where a cost is not limited.

    Args:
        macs: multiply-accumulate operations for one image.
        params: parameters of the route's own segments, stitches and head.
        memory_mb: megabytes of memory (2**20 bytes).
        latency_ms: milliseconds for one image, on the device that the profile names.
        energy_j: joules for one image, including all else that the processor does meanwhile.
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
                raise ValueError(f"budget {cost} must be at most {LARGEST:.3g}; leave it out for no limit")
        if not self.limits:
            raise ValueError(f"a budget needs at least one of {[f.name for f in fields(self)]}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by cost."""
        return {cost: limit for cost, limit in asdict(self).items() if limit is not None}

    def allows(self, costs: Mapping[str, float]) -> bool:
        """Whether costs are within all limits; a limited cost that is missing is not."""
        return all(costs.get(cost, math.inf) <= limit for cost, limit in self.limits.items())

    def check_costs(self, costs: Mapping[str, float]) -> None:
        """Raise BudgetError where a cost that is limited is not among some costs."""
        missing = sorted(self.limits.keys() - costs.keys())
        if missing:
            raise BudgetError(
                f"the budget limits {missing}, and only {sorted(costs)} are known here; limit one of these"
            )

    def usage(self, costs: Mapping[str, float]) -> float:
        """The largest share of a limit that costs take: at most 1 where the budget allows them."""
        return max(costs[cost] / limit for cost, limit in self.limits.items())

    def __str__(self) -> str:
        return ", ".join(f"{cost}<={limit:g}" for cost, limit in self.limits.items())


@dataclass(frozen=True)
class ProfiledRoute:
    """One route with its costs and scores."""

    route: Route
    costs: Mapping[str, float]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Costs and scores of routes, with where the numbers come from.

    Args:
        routes: profiled routes, in any order.
        metadata: device, data, date and software versions, or any other JSON.
    """

    routes: tuple[ProfiledRoute, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def best(self, budget: Budget, score: str = "accuracy") -> ProfiledRoute:
        """The route with the highest score within ``budget``; of equals, the one with fewer MACs.

        Where no route has that score, the one with the most MACs within the budget.

        Raises:
            BudgetError: no route fits (the message names the cheapest), or a cost was not measured.
        """
        self.check_costs(budget)
        fitting = [row for row in self.routes if budget.allows(row.costs)]
        if not fitting:
            cheapest = describe_cheapest(self.routes, budget) if self.routes else "the profile is empty"
            raise BudgetError(f"no route fits {budget}; {cheapest}")
        scored = [row for row in fitting if score in row.scores]
        if scored:
            return max(scored, key=lambda row: (row.scores[score], -row.costs.get("macs", 0)))
        return max(fitting, key=lambda row: row.costs.get("macs", 0))

    def check_costs(self, budget: Budget) -> None:
        """Raise BudgetError unless all routes have the costs that a budget limits."""
        for cost in budget.limits:
            if not all(cost in row.costs for row in self.routes):
                common = sorted(set.intersection(*(set(row.costs) for row in self.routes)))
                raise BudgetError(f"the profile has no {cost} for its routes, only {common}; profile the model again")

    def pareto(self, cost: str = "macs", score: str = "accuracy") -> tuple[ProfiledRoute, ...]:
        """The routes that no other route beats on both ``cost`` and ``score``, cheapest first.

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
        """A copy with the measurements of an exported folder's profile added to ``metadata["runtimes"]``.

        Each entry there is for one device, runtime, precision and number of threads, with ``latency_ms`` and scores by
        route. An existing entry keeps its measurements of other routes.

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
        """The profile as plain JSON values."""
        rows = [{"route": str(r.route), "costs": dict(r.costs), "scores": dict(r.scores)} for r in self.routes]
        return {"metadata": dict(self.metadata), "routes": rows}

    @classmethod
    def from_dict(cls, data: Any) -> "Profile":
        """The inverse of `to_dict`; raises ValueError for any ``data`` that is not a profile."""
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
            raise ValueError(f"not a profile: {quote(error, MAX_CAUSE)}") from None  # it may be as long as the file

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read what `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not a profile, or is larger than ``MAX_BYTES``.
        """
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{os.fspath(path)}: more than {MAX_BYTES:,} bytes, the most that a profile may have")
        try:
            return cls.from_dict(json.loads(data.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def describe_cheapest(rows: Iterable[Any], budget: Budget) -> str:
    """The part of an error message that names the route closest to a budget that allows none.

    Args:
        rows: rows with a ``route`` and ``costs``, at least one.
        budget: limits on those costs.
    """
    row = min(rows, key=lambda row: budget.usage(row.costs))
    return f"the cheapest is '{row.route}' with " + ", ".join(f"{cost}={row.costs[cost]:g}" for cost in budget.limits)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(key, str) or not isinstance(value, int | float):
            raise ValueError(f"{key!r} is {value!r}, not a number")
        if not abs(value) <= LARGEST:  # true for NaN, and for whole numbers that no float can hold
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
    """Raise ValueError where metadata has more than ``MAX_NESTING`` levels."""
    level = [metadata]
    for _ in range(MAX_NESTING):
        inside = (item for value in level for item in _items(value))
        level = list({id(item): item for item in inside}.values())  # what YAML repeats by reference counts once
        if not level:
            return
    raise ValueError(f"metadata is nested deeper than {MAX_NESTING} levels")


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
