"""Sustained latency: the same run again and again for minutes, with the clock rate and temperature meanwhile."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from restnet_hf.limits import is_number
from restnet_hf.runtime.controller import LEAST, MOST, median
from restnet_hf.runtime.processor import clock_mhz, temperature_c


PERIOD_S = 5.0  # whose runs become one row
WINDOW_S = 60.0  # at the beginning and end, which are compared
MOST_MINUTES = 24 * 60


@dataclass(frozen=True)
class Period:
    """A few seconds of runs.

    Args:
        at_s: seconds from the beginning to the end of the period.
        latency_ms: median of its runs in milliseconds.
        clock_mhz: clock rate at its end, in MHz; None where the system does not report it.
        temperature_c: temperature at its end, in degrees Celsius; None where the system does not report it.
    """

    at_s: float
    latency_ms: float
    clock_mhz: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class SustainedLatency:
    """Latency of one route over minutes.

    Args:
        route: string form of the route.
        periods: periods in order of time, at least one.
    """

    route: str
    periods: tuple[Period, ...]

    def __post_init__(self) -> None:
        if not self.periods:
            raise ValueError("no run was measured")

    @property
    def window_s(self) -> float:
        """Seconds at the beginning and end that are compared: a minute, or a third of a shorter measurement."""
        return min(WINDOW_S, self.periods[-1].at_s / 3)

    @property
    def first_ms(self) -> float:
        """Median latency of the first minute, in milliseconds."""
        within = [each.latency_ms for each in self.periods if each.at_s <= self.window_s]
        return median(within or [self.periods[0].latency_ms])

    @property
    def last_ms(self) -> float:
        """Median latency of the last minute, in milliseconds."""
        end = self.periods[-1].at_s - self.window_s
        return median([each.latency_ms for each in self.periods if each.at_s > end])

    @property
    def slowdown(self) -> float:
        """Latency of the last minute over that of the first; above 1 where a device throttles."""
        return self.last_ms / self.first_ms

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain JSON values."""
        summary = {"first_ms": self.first_ms, "last_ms": self.last_ms, "slowdown": self.slowdown}
        return {"route": self.route, **summary, "periods": [asdict(each) for each in self.periods]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SustainedLatency":
        """Read what `to_dict` returned.

        Raises:
            ValueError: it is something else.
        """
        try:
            periods = tuple(Period(**each) for each in data["periods"])
            valid = all(is_number(each, LEAST, MOST) for p in periods for each in (p.at_s, p.latency_ms))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a sustained latency: {error!r}") from error
        if not valid:
            raise ValueError(f"times of a sustained latency must be from {LEAST:g} to {MOST:g}")
        return cls(str(data["route"]), periods)


def measure_sustained(
    run: Callable[[], object],
    route: str,
    minutes: float = 10.0,
    *,
    period_s: float = PERIOD_S,
    report: Callable[[Period], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sensors: Callable[[], tuple[float | None, float | None]] = lambda: (clock_mhz(), temperature_c()),
) -> SustainedLatency:
    """Run a route again and again without a pause. Ctrl-C ends the measurement with what there is.

    Args:
        run: function that runs the route once, and returns when it is done.
        route: string form of the route.
        minutes: minutes to run for.
        period_s: seconds of the runs that become one row.
        report: function that is called with each period, when it ends; an exception that it raises ends all.
        clock: function that returns the time in seconds.
        sensors: function that returns the clock rate in MHz and the temperature in degrees Celsius.

    Raises:
        ValueError: ``minutes`` or ``period_s`` is out of range.
    """
    if not (is_number(minutes, LEAST, MOST_MINUTES) and is_number(period_s, LEAST, MOST)):
        raise ValueError(f"{minutes=} must be above 0 and at most {MOST_MINUTES}, and {period_s=} above 0")
    run()  # loads what is loaded late
    periods: list[Period] = []
    began = last = clock()
    times: list[float] = []
    try:
        while not periods or last - began < 60 * minutes:
            started = clock()
            run()
            now = clock()
            times.append((now - started) * 1e3)
            if now - last >= period_s or now - began >= 60 * minutes:
                periods.append(Period(now - began, median(times), *sensors()))
                last, times = now, []
                if report is not None:
                    report(periods[-1])
    except KeyboardInterrupt:
        if not periods:
            raise
    return SustainedLatency(route, tuple(periods))
