"""The controller follows real changes as fast as noise allows, once each, and nothing else; shown on 1,000 traces."""

import math
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restnet_hf.errors import BudgetError
from restnet_hf.routes.profile import Budget, Profile, ProfiledRoute
from restnet_hf.routes.route import Route
from restnet_hf.runtime.controller import Controller


TRACES, WINDOW, MARGIN, DWELL_S = 1000, 5, 0.1, 2.0
CLEAR = WINDOW // 2 + 1  # with fewer measurements, a change could be the outliers that a window may hold
NORMAL, MB_NOISE, OUTLIERS = NormalDist(), 2.0, 0.06
# How many standard deviations apart two normal distributions must be for one measurement to tell them, with less than
# one false alarm in all measurements of all traces and less than one of all changes missed (Neyman and Pearson) ...
APART = -NORMAL.inv_cdf(1 / (400 * TRACES)) - NORMAL.inv_cdf(1 / (6 * TRACES))
# ... and how many times larger the noise looks for the outliers among it: the bias of the median absolute deviation,
# which no other estimate can have smaller (Huber 1981, section 5.7).
BLUR = NORMAL.inv_cdf(0.5 + 0.25 / (1 - OUTLIERS)) / NORMAL.inv_cdf(0.75)


def unavoidable(deviations):
    """How many measurements tell a change by so many standard deviations from noise and outliers, at best.

    The mean of n measurements has n times the information. `CLEAR` are needed for each one that would do if there were
    no outliers.
    """
    return max(CLEAR, math.ceil(CLEAR * (BLUR * APART / deviations) ** 2))


@dataclass(frozen=True)
class World:
    """What is true from measurement ``start`` on, and how many measurements tell it from what was true before."""

    start: int = 0
    load: float = 1.0
    extra_mb: float = 0.0
    limit_ms: float = 50.0
    limit_mb: float = 500.0
    unseen: int = 0

    @property
    def budget(self):
        return Budget(latency_ms=self.limit_ms, memory_mb=self.limit_mb)

    def allows(self, row, times=1.0, noise=0.0):
        """Whether a route is truly within the limits, were it so many times as costly and the world so noisy."""
        ms = row.costs["latency_ms"] * self.load * math.exp(8 * noise)
        mb = row.costs["memory_mb"] + self.extra_mb + (8 * MB_NOISE if noise else 0)
        return ms * times <= self.limit_ms and mb * times <= self.limit_mb


class Trace:
    """A device under changing load, memory pressure and budgets, with noise and bursts of outliers; from a seed."""

    def __init__(self, seed):
        self.draw = draw = random.Random(seed)
        self.noise = draw.uniform(0.01, 0.05)
        self.seconds = draw.choice([0.03, 0.1, 0.3])  # from one measurement to the next
        self.rows, ms, mb = [], 10.0, 60.0
        for cut in range(1, draw.randint(4, 10)):
            scores = {"accuracy": 0.5 + 0.05 * cut - draw.choice([0.0, 0.0, 0.12])}  # a cheaper one may be better
            route = Route.parse(f"a[:{cut}] + b[1:]")
            self.rows.append(ProfiledRoute(route, {"latency_ms": ms, "memory_mb": mb}, scores))
            ms, mb = ms * draw.uniform(1.15, 1.6), mb + draw.uniform(10, 60)
        self.profile = Profile(tuple(draw.sample(self.rows, len(self.rows))))
        self.worlds = [World(), self._change(World(40))]  # so long it takes to know the noise
        for _ in range(draw.randint(1, 4)):
            length = draw.choice([draw.randint(4, 25), draw.randint(60, 100)])
            last = self.worlds[-1]  # it is seen before the next one comes, or changes would add up
            self.worlds.append(self._change(replace(last, start=last.start + max(length, 2 * last.unseen))))
        self.length = self.worlds[-1].start + draw.randint(20, 100)
        self.outliers, burst = set(), draw.randint(0, 40)
        while burst < self.length:  # fewer than half of any window, `OUTLIERS` of all
            self.outliers.update(range(burst, burst + draw.randint(1, CLEAR - 1)))
            burst += WINDOW + draw.randint(0, 40)

    def _change(self, old):
        draw, kind = self.draw, self.draw.choice(["load", "load", "load", "memory", "budget"])
        if kind == "budget":
            return replace(old, limit_ms=draw.uniform(12, 150), limit_mb=draw.uniform(100, 500), unseen=0)
        if kind == "memory":
            new = replace(old, extra_mb=draw.uniform(0, 300))
            shift = abs(new.extra_mb - old.extra_mb) / MB_NOISE
        else:
            new = replace(old, load=math.exp(draw.uniform(0, 1.8)))
            shift = abs(math.log(new.load / old.load)) / self.noise
        return self._change(old) if shift < 3 else replace(new, unseen=unavoidable(shift))

    def measure(self, row, world, step):
        """What a route costs now, in milliseconds and megabytes, as measured."""
        factor = math.exp(self.draw.gauss(0, self.noise))
        if step in self.outliers:
            factor *= self.draw.choice([0.2, 1.5, 3, 10])
        mb = row.costs["memory_mb"] + world.extra_mb + self.draw.gauss(0, MB_NOISE)
        return {"latency_ms": row.costs["latency_ms"] * world.load * factor, "memory_mb": mb}


@dataclass
class Seen:
    """What happened while one world lasted; ``over`` counts measurements that are no outliers."""

    world: World
    row: ProfiledRoute
    measured: int = 0
    over: int = 0
    switches: int = 0
    hasty: int = 0


def follow(trace):
    """Run a controller on a trace: what happened in each of its worlds."""
    rows = {row.route: row for row in trace.rows}
    controller = Controller(trace.profile, trace.worlds[0].budget, margin=MARGIN, dwell_s=DWELL_S, window=WINDOW)
    row, switched_at, budget, found = rows[controller.route], -math.inf, trace.worlds[0].budget, []
    for world, end in zip(trace.worlds, [*(world.start for world in trace.worlds[1:]), trace.length], strict=True):
        found.append(seen := Seen(world, row))
        for step in range(world.start, end):
            now = step * trace.seconds
            if by_budget := step == world.start and world.budget != budget:
                budget = world.budget
                decision = controller.set_budget(now, budget)
            else:
                clean = step not in trace.outliers
                seen.measured += clean
                seen.over += clean and not (world.allows(row) or row is trace.rows[0])  # that is the cheapest
                decision = controller.observe(now, **trace.measure(row, world, step))
            before, row = row, rows[decision.route]
            assert decision.switched == (row is not before)
            if decision.switched:
                better = row.scores["accuracy"] > before.scores["accuracy"]
                seen.hasty += better and not by_budget and now - switched_at < DWELL_S
                seen.switches += 1
                switched_at = now
        seen.row = row
    return found


@pytest.fixture(scope="module")
def traces():
    return [(trace, follow(trace)) for trace in map(Trace, range(TRACES))]


@pytest.mark.slow
def test_over_budget_no_longer_than_unavoidable(traces):
    """Unless only the cheapest route is left, which runs then. A new budget is followed without any measurement."""
    found = [(trace.noise, seen) for trace, worlds in traces for seen in worlds]
    assert [(noise, seen) for noise, seen in found if seen.over > seen.world.unseen] == []
    assert sum(seen.over > 0 for _, seen in found) > TRACES / 2, "nothing was put to the test"


@pytest.mark.slow
def test_one_switch_for_each_change(traces):
    """A step up may come late, when the next change has come: then it is counted as the answer to the one before."""
    for trace, worlds in traces:
        unanswered = 0
        for seen in worlds:
            unanswered = min(unanswered, 1) + (seen.world.start > 0) - seen.switches
            assert unanswered >= 0, (trace.worlds, seen)
    assert sum(seen.switches for _, worlds in traces for seen in worlds) > TRACES, "nothing was put to the test"


@pytest.mark.slow
def test_budget_is_used(traces):
    """In the end no route is better that has the margin to the limits and eight standard deviations of noise."""
    for trace, worlds in traces:
        for seen in worlds:
            if seen.measured > 50 and seen.measured * trace.seconds > 4 * DWELL_S:
                fair = [
                    row.scores["accuracy"] for row in trace.rows if seen.world.allows(row, 1 + MARGIN, trace.noise)
                ]
                assert seen.row.scores["accuracy"] >= max(fair, default=0), (trace.worlds, seen)


@pytest.mark.slow
def test_dwell(traces):
    assert not any(seen.hasty for _, worlds in traces for seen in worlds)


def profile(*rows):
    """Routes of cut 1, 2, ... with these costs, each more accurate than the one before."""
    routes = [Route.parse(f"a[:{cut}] + b[1:]") for cut, _ in enumerate(rows, 1)]
    named = enumerate(zip(routes, rows, strict=True), 1)
    return Profile(tuple(ProfiledRoute(route, row, {"accuracy": cut / 10}) for cut, (route, row) in named))


THREE = profile(
    {"latency_ms": 10.0, "macs": 1.0}, {"latency_ms": 20.0, "macs": 2.0}, {"latency_ms": 40.0, "macs": 4.0}
)
CUTS = {str(row.route): cut for cut, row in enumerate(THREE.routes, 1)}


def run(controller, factors, start=0.0, seconds=0.1):
    """The cut that runs after each of these loads; costs are the profile's times the load."""
    cuts = []
    for step, factor in enumerate(factors):
        ms = next(row.costs["latency_ms"] for row in THREE.routes if row.route == controller.route)
        decision = controller.observe(start + step * seconds, latency_ms=ms * factor)
        cuts.append(CUTS[str(decision.route)])
    return cuts


def test_step_down_and_up():
    """Three measurements down to what fits at twice the load; up again two windows later, or when it has dwelt."""
    controller = Controller(THREE, Budget(latency_ms=50), dwell_s=0.0)
    assert run(controller, [1] * 20 + [2] * 20) == [3] * 22 + [2] * 18
    assert run(controller, [1] * 20, start=10) == [2] * 9 + [3] * 11
    controller = Controller(THREE, Budget(latency_ms=50), dwell_s=5.0)
    cuts = run(controller, [1] * 20 + [2] * 20 + [1] * 60)
    assert cuts == [3] * 22 + [2] * 50 + [3] * 28, "5 seconds after the step down"


def test_nothing_fits():
    controller = Controller(THREE, Budget(latency_ms=50), dwell_s=0.0)
    assert run(controller, [1] * 20 + [9] * 20)[-18:] == [1] * 18
    decision = controller.observe(9, latency_ms=90)
    assert not decision.fits and not decision.switched
    assert decision.reason == (
        "no route fits latency_ms<=50, so the cheapest runs; 'a[:1] + b[1:]' goes on with latency_ms=90"
    )
    assert run(controller, [1] * 20, start=10)[-1] == 3 and controller.observe(20, latency_ms=40).fits
    assert run(Controller(THREE, Budget(latency_ms=5)), [1]) == [1], "from the beginning"


def test_new_budget_acts_at_once():
    """And the profile's costs count as long as nothing is measured; ten percent of room is needed."""
    controller = Controller(THREE, Budget(latency_ms=100))
    for limit, cut, fits in [
        (43, 3, True),
        (39, 2, True),
        (43, 2, True),
        (44.1, 3, True),
        (9, 1, False),
        (21, 1, True),
    ]:
        decision = controller.set_budget(0, Budget(latency_ms=limit))
        assert (CUTS[str(decision.route)], decision.fits) == (cut, fits)
    run(controller, [3] * 40)
    assert controller.load == pytest.approx(3)
    assert CUTS[str(controller.set_budget(5, Budget(latency_ms=67)).route)] == 2, "20 ms at three times the load"


BOTH = profile(*({"latency_ms": 10.0 * cut, "memory_mb": 40.0 * cut} for cut in (1, 2, 3)))


def run_both(controller, load, extra_mb, start, count=20):
    """The cut that runs after so many measurements of `BOTH` at this load and memory pressure, one a second."""
    for step in range(count):
        cut = controller.route.segments[0].stop
        controller.observe(start + step, latency_ms=10 * cut * load, memory_mb=40 * cut + extra_mb)
    return controller.route.segments[0].stop


def test_a_rise_counts_from_the_last_budget():
    """Memory was short under another budget, came back, and is short again for the new one."""
    controller = Controller(BOTH, Budget(memory_mb=230), dwell_s=1000)
    assert [run_both(controller, 1, extra, at) for extra, at in ((120, 0), (20, 20))] == [2, 2]
    assert controller.set_budget(40, Budget(memory_mb=150)).route == controller.route
    assert run_both(controller, 1, 80, 41, CLEAR) == 1


def test_a_fall_is_not_forgotten():
    """The load falls, and before the step up memory rises, which does no harm."""
    controller = Controller(BOTH, Budget(latency_ms=40, memory_mb=300))
    assert run_both(controller, 2, 0, 0) == 1
    assert run_both(controller, 1, 0, 20, 6) == 1
    assert run_both(controller, 1, 50, 26) == 3


def test_counted_costs_are_exact():
    controller = Controller(THREE, Budget(macs=2))
    assert CUTS[str(controller.route)] == 2
    assert run(controller, [5] * 30) == [2] * 30, "a latency without a limit"
    assert CUTS[str(controller.set_budget(9, Budget(macs=4)).route)] == 3


def test_without_scores_the_most_macs():
    bare = Profile(tuple(replace(row, scores={}) for row in THREE.routes))
    assert CUTS[str(Controller(bare, Budget(macs=3)).route)] == 2


@pytest.mark.parametrize("load", [0.5, 1.5, 3.0])
def test_other_device_than_profiled(load):
    """What fits is known after a window, whatever the profile's device was."""
    cuts = run(Controller(THREE, Budget(latency_ms=50)), [load] * 60)
    assert cuts[4:] == [{0.5: 3, 1.5: 2, 3.0: 1}[load]] * 56 and len(set(cuts)) <= 2


def test_profile_that_is_wrong_about_a_route():
    """The third route really takes twice as long: it is tried again, but ever more rarely."""
    controller, switches = Controller(THREE, Budget(latency_ms=50), dwell_s=1.0), 0
    controller.set_budget(0, Budget(latency_ms=30))
    run(controller, [2] * 20 + [1] * 20)
    controller.set_budget(5, Budget(latency_ms=50))
    for step in range(20_000):
        true = {1: 10.0, 2: 20.0, 3: 80.0}[CUTS[str(controller.route)]]
        switches += controller.observe(10 + step * 0.1, latency_ms=true).switched
    assert 2 < switches < 2 * math.log2(2000) + 2


def test_load_that_comes_and_goes():
    """Three times the load for half a second in every 1.7, or 50 measurements in 170: it is not followed for long."""
    factors = [3 if step % 170 < 50 else 1 for step in range(17_000)]
    cuts = run(Controller(THREE, Budget(latency_ms=50), dwell_s=1.0), factors, seconds=0.01)
    assert sum(a != b for a, b in pairwise(cuts)) < 2 * math.log2(170) + 2


@pytest.mark.parametrize(("memory", "share"), [(0.0, 0.05), (0.3, 0.05), (0.9, 0.02)])
def test_noise_alone(memory, share):
    """At loads all around those where another route would fit; each value may remember the one before."""
    for seed in range(40):
        draw, noise, factors = random.Random(seed), 0.0, []
        for _ in range(500):
            noise = memory * noise + math.sqrt(1 - memory**2) * draw.gauss(0, share)
            factors.append((1 + seed / 20) * math.exp(noise))
        cuts = run(Controller(THREE, Budget(latency_ms=50), dwell_s=0.5), factors)
        switches = sum(a != b for a, b in pairwise([3, *cuts]))
        assert switches <= 1, (seed, switches)


@pytest.mark.parametrize("seed", range(10))
def test_slow_drift(seed):
    """Up to three times the load and back over 600 measurements: once for each route, and hardly over the budget."""
    draw = random.Random(seed)
    truth = [3 ** math.sin(math.pi * step / 600) for step in range(600)]
    factors = [load * math.exp(draw.gauss(0, 0.02)) for load in truth]
    cuts = run(Controller(THREE, Budget(latency_ms=50), dwell_s=0.5), factors)
    assert sum(a != b for a, b in pairwise(cuts)) == 4 and cuts[-1] == 3
    over = [load * 5 * 2**cut / 50 for load, cut in zip(truth[1:], cuts[:-1], strict=True)]
    assert max(over) < 1.05


@pytest.mark.parametrize(
    "measured",
    [
        {"latency_ms": 0.0},
        {"latency_ms": math.nan},
        {"memory_mb": math.inf},
        {"memory_mb": True},
        {"latency_ms": 1e308},
        {"latency_ms": 5e-324},
        {"latency_ms": "3"},
        {"memory_mb": 10**400},
    ],
    ids=str,
)
def test_wrong_measurement(measured):
    controller = Controller(THREE, Budget(latency_ms=50))
    with pytest.raises(ValueError, match=r"must be a number from 1e-12 to 1e\+12; leave out failed measurements"):
        controller.observe(0, **measured)


def test_clock():
    controller = Controller(THREE, Budget(latency_ms=50))
    controller.observe(5, latency_ms=10)
    for call in (
        lambda: controller.observe(4, latency_ms=10),
        lambda: controller.set_budget(math.nan, Budget(macs=2)),
        lambda: controller.observe(10**400),
        lambda: controller.observe("6"),
        lambda: controller.observe(None),
    ):
        with pytest.raises(ValueError, match=r"must be finite and not before 5; take it from time.monotonic\(\)"):
            call()


def test_unknown_costs():
    with pytest.raises(BudgetError, match="the profile is empty"):
        Controller(Profile(()), Budget(macs=1))
    with pytest.raises(BudgetError, match=r"no params for its routes, only \['latency_ms', 'macs'\]"):
        Controller(THREE, Budget(params=1))
    controller = Controller(THREE, Budget(latency_ms=50))
    with pytest.raises(BudgetError, match="no memory_mb"):
        controller.set_budget(0, Budget(memory_mb=1))
    assert controller.budget == Budget(latency_ms=50)
    assert controller.observe(0, memory_mb=7).fits, "nothing to compare it with"


@pytest.mark.parametrize(
    "options",
    [{"margin": 0}, {"dwell_s": -1}, {"window": 2}, {"margin": math.nan}, {"margin": 1e308}, {"dwell_s": math.inf}]
    + [{"window": 3.5}, {"window": 10**9}, {"margin": "1"}, {"dwell_s": None}, {"margin": 10**400}],
    ids=str,
)
def test_wrong_options(options):
    with pytest.raises(ValueError, match="must be above 0"):
        Controller(THREE, Budget(latency_ms=50), **options)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e308, 5e-324])
@pytest.mark.parametrize("cost", ["latency_ms", "memory_mb"])
def test_profile_that_nobody_measured(cost, value):
    with pytest.raises(ValueError, match=rf"'a\[:2\] \+ b\[1:\]' has {cost}=.*, not from 1e-12 to 1e\+12"):
        Controller(profile({cost: 3.0}, {cost: value}), Budget(**{cost: 50}))


SANE = st.sampled_from([1e-12, 1e-3, 1.0, 20.0, 1e12]) | st.floats(1e-12, 1e12)
ODD = st.sampled_from([1e308, 5e-324, 0.0, -1.0, math.inf, math.nan, 10**400, "3", True])
NUMBERS = st.one_of(*[SANE] * 9, ODD)
COSTS = st.fixed_dictionaries({"latency_ms": NUMBERS, "macs": NUMBERS}, optional={"memory_mb": NUMBERS})
LIMITS = st.fixed_dictionaries({"latency_ms": NUMBERS}, optional={"memory_mb": NUMBERS, "macs": NUMBERS})
MEASURED = st.lists(st.tuples(st.none() | NUMBERS, st.none() | NUMBERS), min_size=12, max_size=30)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.lists(COSTS, min_size=1, max_size=3), LIMITS, LIMITS, MEASURED, st.sampled_from([1e-12, 0.1, 1e3]), NUMBERS)
def test_any_numbers(rows, limits, others, measured, margin, dwell_s):
    """Whatever a profile holds, a budget asks and a clock measures: a decision for a route, or a ValueError."""
    try:
        known = Profile.from_dict(profile(*rows).to_dict())
        controller = Controller(known, Budget(**limits), window=3, margin=margin, dwell_s=dwell_s)
    except ValueError:
        return
    for step, (latency_ms, memory_mb) in enumerate(measured):
        try:
            decision = controller.observe(step, latency_ms, memory_mb)
            if step == 9:
                decision = controller.set_budget(step, Budget(**others))
        except ValueError:
            continue
        assert decision.route in {row.route for row in known.routes} and "nan" not in decision.reason
        assert 0 < controller.load < math.inf


@pytest.mark.parametrize("latency_ms", [1e-12, 1e12])
def test_the_widest_range(latency_ms):
    """From one end of what is allowed to the other and back: over the limit, then well within it."""
    controller = Controller(THREE, Budget(latency_ms=50), window=3, dwell_s=0)
    for step in range(60):
        decision = controller.observe(step, latency_ms=latency_ms if step < 20 else 1e12 if step < 40 else 1e-12)
    assert decision.route == THREE.routes[2].route and decision.fits


def test_profile_without_a_time():
    with pytest.raises(ValueError, match=r"'a\[:1\] \+ b\[1:\]' has latency_ms=0.0, not from 1e-12"):
        Controller(profile({"latency_ms": 0.0}), Budget(latency_ms=50))
