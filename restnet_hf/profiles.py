"""Profiles and budgets: routes with their costs and scores, and the best one within limits. No torch."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

from restnet_hf.files import written_whole
from restnet_hf.routes import Route


RUNTIME_KEYS = ("device", "runtime", "precision", "threads")  # what a latency depends on


class BudgetError(ValueError):
    """No route fits a budget, or the profile does not hold what the budget asks for."""


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
        """The routes that no other beats on both ``cost`` and ``score``, cheapest first."""
        front: list[ProfiledRoute] = []
        for row in sorted(self.routes, key=lambda row: (row.costs[cost], -row.scores[score])):
            if not front or row.scores[score] > front[-1].scores[score]:
                front.append(row)
        return tuple(front)

    def with_runtime(self, exported: "Profile") -> "Profile":
        """With what the profile of an exported folder says, in ``metadata["runtimes"]``.

        Each entry there is of one device, runtime, precision and number of threads, with ``latency_ms`` and scores by
        route. What is known of other routes in the same stays.
        """
        entry = {key: exported.metadata.get(key) for key in (*RUNTIME_KEYS, "date", "versions", "images", "size_mb")}
        routes = {str(row.route): {"latency_ms": row.costs["latency_ms"], **row.scores} for row in exported.routes}
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
        """The inverse of `to_dict`; raises ValueError where ``data`` is not a profile."""
        try:
            rows = tuple(
                ProfiledRoute(Route.parse(row["route"]), _numbers(row["costs"]), _numbers(row["scores"]))
                for row in data["routes"]
            )
            metadata = dict(data["metadata"])
            for entry in metadata.get("runtimes", ()):
                for numbers in ({"threads": entry["threads"]}, *entry["routes"].values()):
                    _numbers(numbers)
                if not all(isinstance(entry[key], str) for key in RUNTIME_KEYS[:3]):
                    raise ValueError(f"{RUNTIME_KEYS[:3]} of a runtime must be text")
            return cls(rows, metadata)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a profile: {error!r}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON."""
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read what `save` wrote; raises ValueError where the file is not a profile."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} is {value!r}, not a number")
    return dict(values)
