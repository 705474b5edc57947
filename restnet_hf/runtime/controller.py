"""Controller: chooses the route or cascade to run from what is measured and a changing budget. No torch."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from restnet_hf.errors import BudgetError
from restnet_hf.limits import is_number
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import LARGEST, MEANS, AnyProfiled, Budget, BudgetLike, Profile, ProfiledCascade
from restnet_hf.routes.route import Route
from restnet_hf.runtime.drift import BLOCK, ShareWatch


SURE = 4.0  # standard deviations that noise does not reach: once in 16,000 measurements
REMEMBERED = 8  # windows of measurements
FLOOR = 0.01  # least relative error of a measurement
OF_MEDIAN = math.sqrt(math.pi / 2)  # standard deviation of the median of n normal numbers, times sqrt(n)
OF_MIDDLE = 0.6745  # median of the distance of normal numbers from their mean, in standard deviations
UNNOTICED = math.sqrt(2)  # a level may change by this many times its error before noise cannot explain it
LEAST, MOST = 1e-12, 1e12  # milliseconds or megabytes: values outside were not measured, and would not fit a float
MOST_MARGIN, MOST_WINDOW = 1000.0, 10_000  # above these no route has room, or changes are noticed far too late

MAX_EXPONENT = 700.0  # the exponential of more is not a float, and that of 700 is over any limit

# Functions to and from scales on which the device adds the same number to the cost of every route: a busy device is
# slower by a factor, and a process holds a fixed amount of memory besides the route's own.
SCALES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "latency_ms": (math.log, lambda x: math.exp(min(x, MAX_EXPONENT))),
    "memory_mb": (float, float),
}


@dataclass(frozen=True)
class Decision:
    """The route or cascade to run from now on, and why.

    Args:
        route: the route or cascade to run.
        switched: whether the route differs from the one before.
        fits: whether the route is within the budget, as far as measured.
        reason: explanation of the decision for people to read.
        drifted: whether more or fewer images go on in cascades than where they were calibrated.
    """

    route: Route | Cascade
    switched: bool
    fits: bool
    reason: str
    drifted: bool = False


class Estimate(NamedTuple):
    """A measured number and its error."""

    value: float
    error: float

    def above(self, other: "Estimate") -> bool:
        """Whether the value is larger by more than the errors explain."""
        return self.value - other.value > math.hypot(self.error, other.error)


class Level:
    """The present level of noisy numbers: the median of those since the last change.

    A change is when more than half of the latest n numbers agree with one another and differ from those before, all
    in one direction, by more than ``SURE * noise * sqrt(window / n)``. As n is one, two and four windows, a large
    change is noticed soon and a small one later. Outliers do not agree, and too few differ at a time.

    Args:
        window: number of measurements of which fewer than half may have any value without effect.
        noise: standard deviation of one number, used until it is measured.
        floor: lower bound on the measured standard deviation.
    """

    def __init__(self, window: int, noise: float, floor: float) -> None:
        self._window, self._floor = window, floor
        self._numbers = deque([0.0] * window, REMEMBERED * window)  # as if the profile had been confirmed
        self._per_noise = OF_MIDDLE * math.sqrt(1 + OF_MEDIAN**2 / window)
        self._distances = deque([noise * self._per_noise] * window, 2 * REMEMBERED * window)
        self.now = Estimate(0.0, 0.0)

    @property
    def settled(self) -> bool:
        """Whether at least two windows of numbers were added since the last change."""
        return len(self._numbers) >= 2 * self._window

    def add(self, number: float) -> None:
        """Add one number and update the level."""
        numbers = list(self._numbers)
        self._distances.append(abs(number - median(numbers[-self._window :])))  # a change makes few of them large
        noise = max(self._floor, median(self._distances) / self._per_noise)
        self._numbers.append(number)
        numbers = self._since_change([*self._numbers], noise)
        if len(numbers) < len(self._numbers):
            self._numbers = deque(numbers, self._numbers.maxlen)
        self.now = Estimate(median(numbers), SURE * OF_MEDIAN * noise / math.sqrt(len(numbers)))

    def _since_change(self, numbers: list[float], noise: float) -> list[float]:
        for count in (self._window, 2 * self._window, 4 * self._window):
            if len(numbers) < count:
                break
            latest, off = numbers[-count:], SURE * noise * math.sqrt(self._window / count)
            old = median(numbers[:-count]) if len(numbers) >= 2 * count else self.now.value
            new = median(latest)
            if abs(new - old) <= off:
                continue
            agreeing = [x for x in latest if abs(x - new) <= math.sqrt(2) * SURE * noise]
            if sum((x - old) * math.copysign(1, new - old) > off for x in agreeing) > count // 2:
                return agreeing[-(count // 2 + 1) :]
        return numbers


def median(numbers: Sequence[float] | deque[float]) -> float:
    """The median of at least one number."""
    ordered, half = sorted(numbers), len(numbers) // 2
    return ordered[half] if len(numbers) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Controller:
    """Chooses which route of a profile should run.

    A route is kept while conditions are those that it was chosen for, up to noise. When they get worse and it may be
    over a limit, the best route with room to every limit replaces it at once. When they improve and a better route has
    room, that route is chosen once enough was measured and the last switch is ``dwell_s`` ago; if this is soon undone,
    the next step up waits twice as long, since the profile may not describe the better route well. A new budget takes
    effect at once. Where no route has room the cheapest runs, and the decision reports whether it fits.

    Limits on costs that are not measured, such as MACs, are exact and need no room. Since the best route with room is
    chosen, only routes on the Pareto front of the score and the limited costs ever run.

    Where the budget limits a mean, such as ``mean_macs``, cascades are among the routes. How many images go on is
    watched (`ShareWatch`): on a harder day mean costs are those of today, and what no longer fits is replaced. While
    a route runs alone the day is not seen, so after the wait for a step up the calibrated shares are tried again.

    Args:
        profile: routes with costs and scores.
        budget: limits at the start, a `Budget` or a dict such as ``{"latency_ms": 20}``.
        score: score by which routes are compared; by default that of `Profile.find_score`. MACs where no route has
            any score.
        margin: room to every limit, as a share of a route's cost. More is kept where measurements scatter widely.
        dwell_s: seconds from a switch to the next switch to a better route.
        window: number of measurements of which fewer than half may be far off without effect. A large change is
            noticed after more than half as many.

    Raises:
        BudgetError: the profile is empty, or does not hold a cost that the budget limits, or the score.
        ValueError: an option is out of range, or a latency or memory in the profile is not from ``LEAST`` to ``MOST``.
    """

    def __init__(
        self,
        profile: Profile,
        budget: BudgetLike,
        *,
        score: str | None = None,
        margin: float = 0.1,
        dwell_s: float = 2.0,
        window: int = 5,
    ) -> None:
        finite = all(_is_finite(number) for number in (margin, dwell_s)) and isinstance(window, int)
        if not (finite and 0 < margin <= MOST_MARGIN and dwell_s >= 0 and 3 <= window <= MOST_WINDOW):
            raise ValueError(
                f"{margin=} must be above 0 and at most {MOST_MARGIN:g}, {dwell_s=} at least 0 and finite, and "
                f"{window=} a whole number from 3 to {MOST_WINDOW}"
            )
        if not profile.routes:
            raise BudgetError("the profile is empty; profile the model again")
        self.score, self.margin, self.dwell_s, self.window = profile.find_score(score), margin, dwell_s, window
        self._profile, self._rows = profile, list[AnyProfiled](profile.routes)
        self._levels = {cost: self._level(cost) for cost in SCALES if all(cost in r.costs for r in self._rows)}
        self._watch, self._day_changed, self._answered = ShareWatch(profile), False, 0
        self._now = self._switched_at = -math.inf
        self._wait, self._stepped_up, self._measured = dwell_s, False, 0
        self._limit(Budget.of(budget))
        self._row = self._with_room() or self._cheapest()
        self._checked = self._worst = self._estimates()

    def _level(self, cost: str) -> Level:
        for row in self._rows:
            if not LEAST <= row.costs[cost] <= MOST:
                raise ValueError(
                    f"'{row.route}' has {cost}={row.costs[cost]}, not from {LEAST:g} to {MOST:g}; profile the model "
                    "again"
                )
        least = min(self._rows, key=lambda row: row.costs[cost])
        scale, _ = SCALES[cost]
        floor, room = (scale(least.costs[cost] * (1 + x)) - scale(least.costs[cost]) for x in (FLOOR, self.margin))
        return Level(self.window, max(floor, room / 2), floor)

    def _limit(self, budget: Budget) -> None:
        self._profile.check_costs(budget)
        self.budget, self._limits = budget, budget.limits
        self._followed = list(dict.fromkeys(level for cost in budget.limits if (level := self._level_of(cost))))
        rows = self._profile.rows_for(budget)
        self._rows = sorted(rows, key=lambda row: (-self._worth(row), [row.costs[c] for c in budget.limits]))

    def _level_of(self, cost: str) -> str | None:
        """The measured cost by whose level a cost changes; None for a cost that is what it is."""
        measured = MEANS.get(cost, cost)
        return measured if measured in self._levels else None

    @property
    def route(self) -> Route | Cascade:
        """The route or cascade that should run."""
        return self._row.route

    @property
    def load(self) -> float:
        """The present latency of routes relative to the profile's; 1 until a latency is measured."""
        return math.exp(self._levels["latency_ms"].now.value) if "latency_ms" in self._levels else 1.0

    def observe(
        self,
        now: float,
        latency_ms: float | None = None,
        memory_mb: float | None = None,
        answered_by: int | Sequence[int] | None = None,
    ) -> Decision:
        """Add what was measured while `route` ran, and decide which route should run.

        A cost that the profile does not have for all routes is ignored, since there is nothing to compare it with.

        Args:
            now: seconds of a clock that does not go back, such as `time.monotonic`.
            latency_ms: milliseconds for one image; of a batch that a cascade ran, their mean.
            memory_mb: megabytes, measured in the same way as the budget's limit.
            answered_by: where a cascade ran, the number in it of the route that answered the image, or each image of a
                batch, as in ``CascadeOutput.answered_by``.

        Raises:
            ValueError: the clock went back, a measurement is not from ``LEAST`` to ``MOST``, or ``answered_by`` is not
                given for a latency of a cascade, or does not fit it. Nothing is added then.
        """
        costs = {"latency_ms": latency_ms, "memory_mb": memory_mb}
        measured = {cost: value for cost, value in costs.items() if value is not None}
        for cost, value in measured.items():
            if not is_number(value, LEAST, MOST):
                raise ValueError(
                    f"measured {cost}={value!r} must be a number from {LEAST:g} to {MOST:g}; leave out failed "
                    "measurements"
                )
        answers = self._checked_answers(answered_by, latency_ms is not None)
        self._tick(now)
        for cost, value in measured.items():
            if cost in self._levels and (profiled := self._profiled_cost(cost, answers)) is not None:
                scale, _ = SCALES[cost]
                self._levels[cost].add(scale(value) - scale(profiled))
        self._answered += len(answers)
        if isinstance(self._row, ProfiledCascade) and self._watch.add(self._row, answers):
            self._day_changed = True
        self._measured += bool(measured)
        return self._decide(at_once=False)

    def _checked_answers(self, answered_by: int | Sequence[int] | None, timed: bool) -> Sequence[int]:
        """Numbers of the routes that answered; raises ValueError where they do not fit what runs."""
        if not isinstance(self._row, ProfiledCascade):
            if answered_by is not None:
                raise ValueError(f"{answered_by=} is of a cascade, and route '{self.route}' should run alone")
            return ()
        if answered_by is None:
            if timed:
                raise ValueError(f"what '{self.route}' takes depends on the image: give answered_by with latency_ms")
            return ()
        answers = [answered_by] if isinstance(answered_by, int) else [int(each) for each in answered_by]
        if not answers or not all(0 <= each < len(self._row.route.routes) for each in answers):
            raise ValueError(
                f"{answered_by=} must be numbers from 0 to {len(self._row.route.routes) - 1} of routes of "
                f"'{self.route}', at least one"
            )
        return answers

    def _profiled_cost(self, cost: str, answers: Sequence[int]) -> float | None:
        """What the running route costs by the profile, if known; of a cascade, for images that these routes answer."""
        if cost != "latency_ms" or not isinstance(self._row, ProfiledCascade):
            return self._row.costs.get(cost)
        stages = self._watch.stage_costs(self._row, cost)
        mean = sum(sum(stages[: each + 1]) for each in answers) / len(answers)
        return mean if LEAST <= mean <= MOST else None

    def set_budget(self, now: float, budget: BudgetLike) -> Decision:
        """Follow a new budget at once, and decide which route should run.

        Args:
            now: seconds of the clock that `observe` is given.
            budget: limits that replace the present ones, a `Budget` or a dict.

        Raises:
            BudgetError: the profile does not hold a cost that the new budget limits; the present budget stays.
            ValueError: the clock went back.
        """
        wanted = Budget.of(budget)
        self._tick(now)
        self._limit(wanted)
        return self._decide(at_once=True)

    def _tick(self, now: float) -> None:
        if not _is_finite(now) or now < self._now:
            raise ValueError(f"now={now} must be finite and not before {self._now}; take it from time.monotonic()")
        self._now = now

    def _decide(self, at_once: bool) -> Decision:
        before = after = self._row
        now, followed = self._estimates(), self._followed
        self._retry_calibrated()
        worse = at_once or self._day_changed or any(now[cost].above(self._checked[cost]) for cost in followed)
        if worse and not self._fits(before, UNNOTICED):
            after = self._with_room() or self._cheapest()
            why = f"'{before.route}' may be over {self.budget}{self._describe_day()}"
        elif at_once or self._day_changed or any(self._worst[cost].above(now[cost]) for cost in followed):
            better = self._with_room()
            if better is None or self._worth(better) <= self._worth(before):
                why = "no better route has room"
            elif wait := None if at_once else self._reason_to_wait():
                why = f"'{better.route}' has room, but {wait}"
            else:
                after, why = better, f"there is room for more than '{before.route}'"
        else:
            why = "conditions are those it was chosen for, as far as noise shows"
        if after is not before:
            self._switch(after, at_once)
        elif worse:
            self._checked, self._worst = now, {cost: max(self._worst[cost], now[cost]) for cost in now}
        if not (fits := self._fits(after)) and not any(map(self._fits, self._rows)):
            why = f"no route fits {self.budget}, so the cheapest runs"
        costs = ", ".join(f"{cost}={self._expected(after, cost):.4g}" for cost in self._limits)
        runs = "goes on" if after is before else "runs now"
        reason = f"{why}; '{after.route}' {runs} with {costs}"
        return Decision(after.route, after is not before, fits, reason, bool(self._watch.shift))

    def _retry_calibrated(self) -> None:
        """Expect the calibrated shares again, after a while in which a route alone has shown none."""
        alone = not isinstance(self._row, ProfiledCascade)
        if self._watch.shift and alone and self._now >= self._switched_at + self._wait:
            self._watch.reset()
            self._day_changed = True

    def _describe_day(self) -> str:
        """What a message adds where images go on more or less often than calibrated."""
        if not (self._day_changed and isinstance(self._row, ProfiledCascade) and self._row.shares):
            return ""
        now, then = self._watch.shares(self._row)[1], self._row.shares[1]
        return f": {now:.0%} of images go on from its first route, where {then:.0%} did when it was calibrated"

    def _switch(self, after: AnyProfiled, at_once: bool) -> None:
        up = self._worth(after) > self._worth(self._row)
        if not up:
            soon = self._measured <= REMEMBERED * self.window or self._now <= self._switched_at + self._wait
            soon = soon or (self._day_changed and self._answered <= BLOCK)
            self._wait = 2 * self._wait if self._stepped_up and soon else self.dwell_s
        self._watch.begin()
        self._answered, self._day_changed = 0, False
        self._row, self._stepped_up, self._measured, self._switched_at = after, up and not at_once, 0, self._now
        self._checked = self._worst = self._estimates()

    def _estimates(self) -> dict[str, Estimate]:
        return {cost: level.now for cost, level in self._levels.items()}

    def _reason_to_wait(self) -> str | None:
        if not all(self._levels[cost].settled for cost in self._followed):
            return "too little was measured since conditions changed"
        if (left := self._switched_at + self._wait - self._now) > 0:
            return f"the last switch is too recent by {left:.3g} s"
        return None

    def _worth(self, row: AnyProfiled) -> float:
        return row.costs.get("macs", 0.0) if self.score is None else row.scores.get(self.score, -math.inf)

    def _with_room(self) -> AnyProfiled | None:
        """The best route with the margin to every limit and room for changes too small to notice; None if none has."""
        for row in self._rows:
            if self._fits(row, UNNOTICED) and all(
                self._expected(row, cost) * (1 + self.margin) <= limit
                for cost, limit in self._limits.items()
                if self._level_of(cost) or (self._watch.shift and cost in MEANS and isinstance(row, ProfiledCascade))
            ):
                return row
        return None

    def _cheapest(self) -> AnyProfiled:
        """The route whose expected costs are closest to the budget."""
        return min(self._rows, key=lambda row: self.budget.usage({c: self._expected(row, c) for c in self._limits}))

    def _fits(self, row: AnyProfiled, errors: float = 0.0) -> bool:
        return all(self._expected(row, cost, errors) <= limit for cost, limit in self._limits.items())

    def _expected(self, row: AnyProfiled, cost: str, errors: float = 0.0) -> float:
        """The present cost of a route if the level is this many times its error higher than estimated."""
        profiled = row.costs[cost]
        if cost in MEANS and isinstance(row, ProfiledCascade):
            profiled = self._watch.mean_cost(row, cost)
        level = self._level_of(cost)
        if level is None:
            return profiled
        (scale, back), now = SCALES[level], self._levels[level].now
        return back(scale(profiled) + now.value + errors * now.error)


def _is_finite(value: float) -> bool:
    """Whether a value is a number that is finite as a float."""
    return is_number(value, -LARGEST, LARGEST)
