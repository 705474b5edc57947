"""Profiles and budgets: routes with their costs and scores, and the best route within limits. No torch."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from itertools import chain
from numbers import Real
from typing import Any, overload

from restnet_hf.errors import BudgetError, quote
from restnet_hf.files import atomic_file
from restnet_hf.limits import MAX_BYTES
from restnet_hf.routes.cascade import Cascade, is_cascade
from restnet_hf.routes.fronts import beaten_rows, describe_gap, front_rows, measure_gap, measured_rows
from restnet_hf.routes.route import Route
from restnet_hf.routes.tables import profile_table


RUNTIME_KEYS = ("device", "runtime", "precision", "threads", "input")  # what a latency depends on
DEFAULT_SCORES = ("accuracy", "agreement")  # what routes are compared by, the first that was measured
MEANS = {"mean_macs": "macs", "mean_latency_ms": "latency_ms"}  # over images, with the most that one can take
MAX_NESTING = 32  # levels of metadata; ours has 4, and writing it again must not reach Python's recursion limit
MAX_CAUSE = 300  # characters of what is wrong with a file, which may hold megabytes of anything
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Budget:
    """Upper limits on the costs of a route or cascade; None where a cost is not limited.

    Args:
        macs: multiply-accumulate operations for one image; of a cascade the most that an image can take.
        params: parameters of the route's own segments, stitches and head.
        memory_mb: megabytes of memory (2**20 bytes).
        latency_ms: milliseconds for one image, on the device that the profile names; of a cascade the most.
        energy_j: joules for one image, including all else that the processor does meanwhile.
        mean_macs: multiply-accumulate operations, as a mean over images such as those that calibrated the cascades.
        mean_latency_ms: milliseconds, as a mean over such images.
    """

    macs: float | None = None
    params: float | None = None
    memory_mb: float | None = None
    latency_ms: float | None = None
    energy_j: float | None = None
    mean_macs: float | None = None
    mean_latency_ms: float | None = None

    def __post_init__(self) -> None:
        for cost, limit in self.limits.items():
            if isinstance(limit, bool) or not isinstance(limit, Real) or not limit > 0:
                raise ValueError(f"budget {cost}={limit!r} must be a number above 0")
            if limit > LARGEST and limit != math.inf:  # a whole number that no float can hold
                raise ValueError(f"budget {cost} must be at most {LARGEST:.3g}; leave it out for no limit")
        if not self.limits:
            raise ValueError(f"a budget needs at least one of {[f.name for f in fields(self)]}")

    @classmethod
    def of(cls, value: "BudgetLike | None" = None, **limits: float | None) -> "Budget":
        """The budget that a value stands for: wherever a budget is an argument, all of these are taken.

        Args:
            value: budget, or limits by cost such as ``{"macs": 1e9}``; None where they are given as keywords.
            **limits: limits by cost, in place of a value.

        Raises:
            TypeError: the value is neither a budget nor a mapping, or both a value and limits are given.
            ValueError: there is no such cost, or no limit, or a limit is not a number above 0.
        """
        given = {cost: limit for cost, limit in limits.items() if limit is not None}
        if value is not None and given:
            raise TypeError(f"give the budget {value!r} or limits {given}, not both")
        if isinstance(value, Budget):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"budget {value!r} must be a Budget, or a dict such as {{'macs': 1e9}}")
        wanted, known = limits if value is None else value, [each.name for each in fields(cls)]
        unknown = [cost for cost in wanted if cost not in known]
        if unknown:
            raise ValueError(f"budget limits {quote(unknown)}, which are no costs; the costs are {known}")
        return cls(**wanted)

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

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{cost}={limit:g}' for cost, limit in self.limits.items())})"


BudgetLike = Budget | Mapping[str, float | None]
"""A budget, or limits by cost; `Budget.of` converts it."""


@dataclass(frozen=True)
class ProfiledRoute:
    """One route with its costs and scores."""

    route: Route
    costs: Mapping[str, float]
    scores: Mapping[str, float] = field(default_factory=dict)

    def with_means(self) -> "ProfiledRoute":
        """The row with the costs that cascades have too: of a route, a mean over images is what each of them takes."""
        means = {mean: self.costs[cost] for mean, cost in MEANS.items() if cost in self.costs}
        return replace(self, costs={**self.costs, **means})

    def __repr__(self) -> str:
        numbers = (f", {name}={value:.4g}" for name, value in (*self.costs.items(), *self.scores.items()))
        return f"ProfiledRoute({str(self.route)!r}{''.join(numbers)})"


@dataclass(frozen=True)
class ProfiledCascade:
    """One cascade with its costs and scores, which are by cross-validation.

    Args:
        route: cascade that was measured, under the name that rows of routes have.
        costs: costs by name: ``mean_macs`` over the images, ``macs`` the most that an image can take, and so on.
        scores: scores by name, on images that its thresholds were not chosen on.
        shares: share of the images that reach each of its routes.
        standard_error: standard error of the score.
        stage_costs: what each of its routes adds to the cost of an image that reaches it, by cost: ``macs``, and where
            measured ``latency_ms``.
    """

    route: Cascade
    costs: Mapping[str, float]
    scores: Mapping[str, float]
    shares: tuple[float, ...] = ()
    standard_error: float | None = None
    stage_costs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.route.thresholds:
            raise ValueError(f"cascade '{self.route}' has no thresholds, so it has no costs or scores")
        if self.shares and (len(self.shares) != len(self.route.routes) or not all(0 <= x <= 1 for x in self.shares)):
            raise ValueError(f"{self.shares} are no shares of images that reach the routes of '{self.route}'")
        for cost, values in self.stage_costs.items():
            if len(values) != len(self.route.routes) or not all(value >= 0 for value in values):
                raise ValueError(f"{values} are not what the routes of '{self.route}' add to its {cost}")

    def __repr__(self) -> str:
        numbers = (f", {name}={value:.4g}" for name, value in (*self.costs.items(), *self.scores.items()))
        return f"ProfiledCascade({str(self.route)!r}{''.join(numbers)})"


AnyProfiled = ProfiledRoute | ProfiledCascade


@dataclass(frozen=True)
class Profile:
    """Costs and scores of routes and cascades, with where the numbers come from.

    ``print(profile)`` shows it as a table, in which a star marks what nothing else beats in MACs and score,
    ``profile["vit[:]"]`` is the row of one route or cascade, and a loop has all rows of routes.

    Args:
        routes: profiled routes, in any order.
        metadata: device, data, date and software versions, or any other JSON.
        cascades: profiled cascades of these routes, in any order.
    """

    routes: tuple[ProfiledRoute, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    cascades: tuple[ProfiledCascade, ...] = ()

    def __len__(self) -> int:
        return len(self.routes)

    def __bool__(self) -> bool:
        return True  # a profile without routes is a profile

    def __iter__(self) -> Iterator[ProfiledRoute]:
        return iter(self.routes)

    def __contains__(self, route: object) -> bool:
        return any(route in (row.route, str(row.route), row) for row in self.rows)

    @property
    def rows(self) -> tuple[AnyProfiled, ...]:
        """The rows of routes, then those of cascades."""
        return (*self.routes, *self.cascades)

    @overload
    def __getitem__(self, route: Route) -> ProfiledRoute: ...
    @overload
    def __getitem__(self, route: Cascade) -> ProfiledCascade: ...
    @overload
    def __getitem__(self, route: str) -> Any: ...

    def __getitem__(self, route: Route | Cascade | str) -> AnyProfiled:
        wanted = parse_entry(route) if isinstance(route, str) else route
        for row in self.rows:
            if row.route == wanted:
                return row
        raise KeyError(f"no route '{route}' in the profile; its routes are {quote([str(r.route) for r in self.rows])}")

    def __str__(self) -> str:
        front = self.front()
        gap = describe_gap(self.rows, self.default_cost, str(self._default_score())) if front else ""
        return "\n".join(filter(None, [profile_table(self.rows, front=front), gap]))

    def __repr__(self) -> str:
        costs = list(dict.fromkeys(name for row in self.routes for name in row.costs))
        scores = list(dict.fromkeys(name for row in self.routes for name in row.scores))
        cascades = f"{len(self.cascades)} cascades, " if self.cascades else ""
        return f"Profile({len(self)} routes, {cascades}costs={quote(costs)}, scores={quote(scores)})"

    def to_pandas(self) -> Any:
        """The profile as a DataFrame of pandas: a row for each route and cascade, a column for each cost and score.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas needs pandas, which is not installed; pip install pandas") from error
        rows = [{"route": str(row.route), **row.costs, **row.scores} for row in self.rows]
        return pandas.DataFrame(rows, columns=list(dict.fromkeys(["route", *chain.from_iterable(rows)])))

    def find_score(self, score: str | None = None) -> str | None:
        """The name of the score that routes are compared by; None where no route has any.

        Args:
            score: wanted score; by default ``accuracy`` where it was measured, else ``agreement``, else the only one.

        Raises:
            BudgetError: there are scores, but not the wanted one, or several, none of which is the default.
        """
        names = list(dict.fromkeys(name for row in self.routes for name in row.scores))
        wanted = DEFAULT_SCORES if score is None else (score,)
        found = [name for name in wanted if name in names] or (names if score is None and len(names) == 1 else [])
        if names and not found:
            asked = "choose one of them, score=" if score is None else f"score={score!r} is not one of them"
            raise BudgetError(f"the profile has the scores {quote(names)}; {asked}")
        return found[0] if found else None

    def best(self, budget: BudgetLike, score: str | None = None) -> AnyProfiled:
        """The route or cascade with the highest score within a budget; of equals, the one with fewer MACs.

        A cascade is considered only where the budget limits a mean, which is what a cascade saves; the other limits
        then hold for the most that an image can take.

        Where no route within the budget was scored, the one with the most MACs.

        Args:
            budget: limits on the costs.
            score: name of the score; see `find_score`.

        Raises:
            BudgetError: no route fits (the message names the cheapest), a cost was not measured, or there are scores
                but no such one.
        """
        budget, score = Budget.of(budget), self.find_score(score)
        self.check_costs(budget)
        rows = self.rows_for(budget)
        fitting = [row for row in rows if budget.allows(row.costs)]
        if not fitting:
            cheapest = describe_cheapest(rows, budget) if rows else "the profile is empty"
            raise BudgetError(f"no route fits {budget}; {cheapest}")
        scored = [row for row in fitting if score in row.scores]
        if scored and score is not None:
            return max(scored, key=lambda row: (row.scores[score], -row.costs.get("macs", 0)))
        return max(fitting, key=lambda row: row.costs.get("macs", 0))

    def best_route(self, budget: BudgetLike, score: str | None = None) -> ProfiledRoute:
        """The route that `best` would give if there were no cascades; arguments and errors are the same."""
        best = replace(self, cascades=()).best(budget, score)
        assert isinstance(best, ProfiledRoute)
        return best

    def rows_for(self, budget: BudgetLike) -> tuple[AnyProfiled, ...]:
        """The rows that are considered for a budget: where it limits a mean cascades too, and routes with means."""
        if not any(cost in MEANS for cost in Budget.of(budget).limits):
            return self.routes
        return (*(row.with_means() for row in self.routes), *self.cascades)

    def check_costs(self, budget: BudgetLike) -> None:
        """Raise BudgetError unless all routes have the costs that a budget limits."""
        rows = self.rows_for(budget)
        for cost in Budget.of(budget).limits:
            if not all(cost in row.costs for row in rows):
                common = sorted(set.intersection(*(set(row.costs) for row in rows)))
                raise BudgetError(f"the profile has no {cost} for its routes, only {common}; profile the model again")

    @property
    def default_cost(self) -> str:
        """The cost by which rows are compared: mean MACs where there are cascades, else MACs."""
        return "mean_macs" if self.cascades else "macs"

    def _default_score(self) -> str | None:
        """The score of `find_score`; None too where there are several, none of which is the default."""
        try:
            return self.find_score()
        except BudgetError:
            return None

    def front(self) -> tuple[AnyProfiled, ...]:
        """The rows that tables, cards and plots mark: those that no other beats in `default_cost` and default score.

        Empty where fewer than two rows have both, since there is nothing to compare.
        """
        score, cost = self._default_score(), self.default_cost
        measured = measured_rows(self.rows, cost, score)
        return tuple(front_rows(measured, cost, str(score))) if len(measured) > 1 else ()

    def pareto(self, cost: str = "macs", score: str = "accuracy") -> tuple[ProfiledRoute, ...]:
        """The routes that no other route beats on both ``cost`` and ``score``, cheapest first.

        Raises:
            ValueError: a route has no such cost or score.
        """
        missing = [str(row.route) for row in self.routes if cost not in row.costs or score not in row.scores]
        if missing:
            raise ValueError(f"'{missing[0]}' has no {cost} or no {score}; profile the model again")
        return tuple(front_rows(self.routes, cost, score))

    def dominated(self, cost: str = "macs", score: str | None = None) -> tuple[ProfiledRoute, ...]:
        """The routes that another one beats: it costs as much or less and scores as high or higher.

        Of routes that are equal in both, one is not dominated: an anchor alone, or the first. Routes without the cost
        or the score are left out.

        Args:
            cost: name of the cost.
            score: name of the score; see `find_score`.

        Raises:
            BudgetError: no route has such a cost, or there are scores but no such one.
        """
        score = self._comparable(cost, score)
        return () if score is None else tuple(row for row, _ in beaten_rows(self.routes, cost, score))

    def gap_closed(
        self, cost: str | None = None, score: str | None = None, *, stitched_only: bool = False
    ) -> float | None:
        """The share of the gap between the anchors that routes and cascades close, by which we judge a model.

        With ``small`` and ``large`` the scores of the cheapest and the most expensive anchor alone, it is the mean
        over budgets from the first one's cost to the second one's of (best score within the budget - small) / (large -
        small). It is 0 where only the anchors are worth choosing, 0.5 where many routes lie on the straight line
        between them, and 1 where one has the large anchor's score at the small one's cost. It is exact, and can exceed
        1. The anchors alone can always be chosen.

        Args:
            cost: name of the cost; by default `default_cost`. Cascades count where it is a mean.
            score: name of the score; see `find_score`.
            stitched_only: whether only stitched routes and the anchors alone can be chosen, not tuned anchors or
                cascades.

        Returns:
            The share; None where it is not defined: there are no scores, fewer than two anchors alone, or the most
            expensive one is no better than the cheapest, so that there is no gap to close.

        Raises:
            BudgetError: no route has such a cost, or there are scores but no such one.
        """
        cost = self.default_cost if cost is None else cost
        score = self._comparable(cost, score)
        rows = self.rows if cost in MEANS else self.routes
        return None if score is None else measure_gap(rows, cost, score, stitched_only)[0]

    def _comparable(self, cost: str, score: str | None) -> str | None:
        """The score to compare by; raises BudgetError where no route has the cost, or such a score."""
        costs = list(dict.fromkeys(name for row in self.routes for name in row.costs))
        if self.routes and cost not in costs:
            raise BudgetError(f"no route of the profile has {cost!r}; its costs are {quote(costs)}")
        return self.find_score(score)

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
        return replace(self, metadata={**self.metadata, "runtimes": [*others, {**entry, "routes": routes}]})

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values."""
        data: dict[str, Any] = {"metadata": dict(self.metadata), "routes": list(map(_row_dict, self.routes))}
        if self.cascades:
            data["cascades"] = [
                {
                    **_row_dict(row),
                    "shares": list(row.shares),
                    "standard_error": row.standard_error,
                    "stage_costs": {cost: list(values) for cost, values in row.stage_costs.items()},
                }
                for row in self.cascades
            ]
        return data

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
            cascades = tuple(map(_read_cascade, data.get("cascades", ())))
            lacking = {route for row in cascades for route in row.route.routes} - {row.route for row in rows}
            if lacking:
                raise ValueError(f"its cascades run {quote(sorted(map(str, lacking)))}, which it does not have")
            return cls(rows, metadata, cascades)
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


def parse_entry(text: str) -> Route | Cascade:
    """A route or a cascade from its string form; raises ValueError where it is neither."""
    return Cascade.parse(text) if is_cascade(text) else Route.parse(text)


def _row_dict(row: AnyProfiled) -> dict[str, Any]:
    return {"route": str(row.route), "costs": dict(row.costs), "scores": dict(row.scores)}


def _read_cascade(data: Mapping[str, Any]) -> ProfiledCascade:
    """A row of a cascade from its dict; raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    shares = _number_list(data["shares"])
    stages = {str(cost): _number_list(values) for cost, values in data.get("stage_costs", {}).items()}
    error = data["standard_error"]
    if error is not None:
        _numbers({"standard_error": error})
    cascade = Cascade.parse(data["route"])
    return ProfiledCascade(cascade, _numbers(data["costs"]), _numbers(data["scores"]), shares, error, stages)


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


def _number_list(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(_numbers({str(at): value for at, value in enumerate(values)}).values())


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
