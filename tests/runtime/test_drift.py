"""A controller that runs cascades notices a harder day, stays within the mean, and comes back."""

import math
import random
import statistics
from dataclasses import replace
from itertools import pairwise, takewhile

import pytest

from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import Profile, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import Route
from restnet_hf.runtime.controller import Controller
from restnet_hf.runtime.drift import ALARM, BLOCK, ShareWatch


SMALL, MIDDLE, LARGE = (Route.parse(text) for text in ("a[:]", "b[:3] + a[2:]", "b[:]"))
MACS = {SMALL: 10.0, MIDDLE: 40.0, LARGE: 100.0}
SCORES = {SMALL: 0.8, MIDDLE: 0.81, LARGE: 0.9}


def row(routes, shares, score):
    """A cascade whose stages add what its routes cost."""
    stages = tuple(MACS[route] for route in routes)
    mean = sum(map(math.prod, zip(shares, stages, strict=True)))
    times = tuple(each / 10 for each in stages)
    costs = {"macs": sum(stages), "mean_macs": mean, "latency_ms": sum(times), "mean_latency_ms": mean / 10}
    cascade = Cascade(tuple(routes), (0.5,) * (len(routes) - 1), "probability")
    return ProfiledCascade(cascade, costs, {"accuracy": score}, shares, 0.01, {"macs": stages, "latency_ms": times})


WIDE = row((SMALL, LARGE), (1.0, 0.3), 0.88)  # 40
NARROW = row((SMALL, MIDDLE, LARGE), (1.0, 0.25, 0.1), 0.87)  # 30
TIGHT = row((SMALL, MIDDLE), (1.0, 0.1), 0.82)  # 14


def profile(images=1000, cascades=(WIDE, NARROW, TIGHT)):
    routes = [
        ProfiledRoute(route, {"macs": macs, "latency_ms": macs / 10}, {"accuracy": SCORES[route]})
        for route, macs in MACS.items()
    ]
    return Profile(tuple(routes), {"images": images}, tuple(cascades))


def shifted(share, shift):
    return 1 / (1 + math.exp(math.log(1 / share - 1) - shift))


def answer(cascade, shift, rng):
    """The route that answers an image on a day that shifts the log-odds of going on."""
    for at, (before, after) in enumerate(zip(cascade.shares, cascade.shares[1:], strict=False)):
        if rng.random() >= shifted(after / before, shift):
            return at
    return len(cascade.shares) - 1


def live(controller, known, shift, rng, images, start=0.0, every=0.01, times=False):
    """Run images; returns what each cost, the entries that ran, and the decisions."""
    spent, ran, decisions = [], [], []
    for index in range(images):
        entry = known[controller.route]
        number = answer(entry, shift, rng) if isinstance(entry, ProfiledCascade) else None
        cost = entry.costs["macs"] if number is None else sum(entry.stage_costs["macs"][: number + 1])
        spent.append(cost)
        ran.append(controller.route)
        options = {} if number is None else {"answered_by": number}
        if times:
            options["latency_ms"] = cost / 10 * math.exp(rng.gauss(0, 0.02))
        decisions.append(controller.observe(start + index * every, **options))
    return spent, ran, decisions


def known_rows(of):
    return {each.route: each for each in of.rows}


@pytest.mark.parametrize("images", [200, 1000, 50_000])
def test_a_calm_day_raises_no_alarm(images):
    """In each block at most with the promised probability; the calibration itself has errors."""
    rng, blocks, alarms = random.Random(images), 0, 0
    for _ in range(40):
        true = shifted(0.3, 0.0)
        measured = sum(rng.random() < true for _ in range(images)) / images  # what the calibration saw
        calibrated = row((SMALL, LARGE), (1.0, measured), 0.88)
        watch = ShareWatch(profile(images, [calibrated]))
        for _ in range(2 * BLOCK):
            alarms += watch.add(calibrated, [int(rng.random() < true)])
        blocks += 2
    assert alarms <= 1 and blocks * ALARM < 0.1  # two have a probability of 1 in 300


@pytest.mark.parametrize("shift, within", [(0.7, 1000), (1.5, 90), (-1.0, 450), (-3.0, 75)])
def test_another_day_is_noticed(shift, within):
    """Within a number of images that falls with the shift, which is then estimated; half of the days beforehand."""
    estimates, delays = [], []
    for seed in range(15):
        rng, watch = random.Random(seed), ShareWatch(profile())
        watch.add(WIDE, [answer(WIDE, 0.0, rng) for _ in range(200)])
        days = (watch.add(WIDE, [answer(WIDE, shift, rng)]) for _ in range(4 * BLOCK))
        delays.append(1 + [*takewhile(lambda noticed: not noticed, days)].count(False))
        watch.add(WIDE, [answer(WIDE, shift, rng) for _ in range(BLOCK)])
        estimates.append(watch.shift)
    assert statistics.median(delays) <= within
    assert statistics.median(estimates) == pytest.approx(shift, abs=0.35 * abs(shift))


def test_a_harder_day_stays_within_the_mean():
    """The wide cascade gives way to one that fits on such a day, and comes back when the day is over."""
    whole = profile()
    known, rng = known_rows(whole), random.Random(0)
    controller = Controller(whole, {"mean_macs": 42.0}, dwell_s=1.0)
    assert controller.route == WIDE.route
    spent, ran, decisions = live(controller, known, 0.0, rng, 1500)
    assert {*ran} == {WIDE.route} and not any(each.drifted for each in decisions)
    assert statistics.fmean(spent) == pytest.approx(40.0, rel=0.05)

    spent, ran, decisions = live(controller, known, 1.0, rng, 4000, start=100.0)
    switch = ran.index(TIGHT.route)
    assert switch <= 300 and "of images go on from its first route, where 30% did" in decisions[switch - 1].reason
    assert decisions[switch - 1].switched and decisions[-1].drifted and WIDE.route not in ran[1000:]
    assert statistics.fmean(spent[switch:]) <= 42.0 and {*ran[switch:]} == {TIGHT.route}
    assert all(each.fits for each in decisions[switch:])

    spent, ran, decisions = live(controller, known, 0.0, rng, 3000, start=200.0)
    assert ran[-1] == WIDE.route
    assert statistics.fmean(spent) <= 42.0


def test_a_route_alone_tries_again_more_and_more_rarely():
    """Where no cascade fits on the harder day a route runs, which cannot see when the day is over."""
    whole = profile(cascades=[WIDE])
    known, rng = known_rows(whole), random.Random(1)
    controller = Controller(whole, {"mean_macs": 42.0}, dwell_s=2.0)
    spent, ran, _ = live(controller, known, 2.0, rng, 20_000)
    tries = sum(a != b == WIDE.route for a, b in pairwise(ran))
    assert 1 <= tries <= 7 and ran[-1] == MIDDLE  # after 2, 4, 8, ... seconds of the 200
    assert statistics.fmean(spent) <= 42.0
    _, ran, _ = live(controller, known, 0.0, rng, 30_000, start=200.0)
    assert ran[-1] == WIDE.route


def test_latency_of_stages_is_no_load():
    """An image that goes on takes longer, which is no busy device; a busy one is noticed all the same."""
    whole = profile()
    known, rng = known_rows(whole), random.Random(2)
    controller = Controller(whole, {"mean_latency_ms": 5.0}, dwell_s=1.0)
    assert controller.route == WIDE.route
    _, ran, _ = live(controller, known, 0.0, rng, 1000, times=True)
    assert {*ran} == {WIDE.route} and controller.load == pytest.approx(1.0, abs=0.02)
    for index in range(40):
        entry = known[controller.route]
        number = answer(entry, 0.0, rng) if isinstance(entry, ProfiledCascade) else None
        cost = entry.costs["macs"] if number is None else sum(entry.stage_costs["macs"][: number + 1])
        controller.observe(50.0 + index, 2 * cost / 10, answered_by=number)
    assert controller.load == pytest.approx(2.0, rel=0.05) and controller.route == TIGHT.route


def test_cascades_only_where_a_mean_is_limited():
    assert Controller(profile(), {"macs": 120.0}).route == LARGE
    assert Controller(profile(), {"mean_macs": 31.0, "macs": 60.0}).route == TIGHT.route


def test_profiles_without_stages_and_batches():
    """Of earlier profiles: what a stage adds is taken to be its route's own cost. A batch counts its images."""
    plain = ProfiledCascade(WIDE.route, WIDE.costs, WIDE.scores, WIDE.shares, 0.01)
    whole = Profile.from_dict(profile(cascades=[plain]).to_dict())
    assert whole.cascades[0].stage_costs == {}
    controller = Controller(whole, {"mean_macs": 42.0})
    decision = controller.observe(0.0, latency_ms=(1 + 1 + 11 + 11) / 4, answered_by=[0, 0, 1, 1])
    assert controller.load == pytest.approx(1.0) and not decision.switched
    decision = controller.observe(1.0, answered_by=[1] * 30)
    assert decision.drifted and decision.switched and controller.route == MIDDLE


def test_profiles_of_others():
    """Shares and stages are from files: what they leave out is not watched, and zeros are no reason to fail."""
    bare = replace(WIDE, shares=(), stage_costs={})
    controller = Controller(profile(cascades=[bare, replace(NARROW, shares=(0.0, 0.0, 0.0))]), {"mean_macs": 42.0})
    for second in range(9):
        decision = controller.observe(float(second), latency_ms=3.0, answered_by=[1] * 50)
    assert not decision.drifted
    empty = replace(WIDE, stage_costs={"macs": (0.0, 0.0), "latency_ms": (0.0, 0.0)})
    controller = Controller(profile(cascades=[empty]), {"mean_macs": 42.0})
    assert controller.observe(0.0, latency_ms=3.0, answered_by=[1] * 60).drifted


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latency_ms": 3.0}, "depends on the image: give answered_by with latency_ms"),
        ({"answered_by": 2}, "must be numbers from 0 to 1 of routes of"),
        ({"answered_by": []}, "at least one"),
        ({"answered_by": [0, -1]}, "must be numbers from 0 to 1"),
    ],
)
def test_answers_that_do_not_fit(options, message):
    controller = Controller(profile(), {"mean_macs": 42.0})
    with pytest.raises(ValueError, match=message):
        controller.observe(0.0, **options)
    alone = Controller(profile(), {"macs": 42.0})
    with pytest.raises(ValueError, match="is of a cascade, and route 'b\\[:3\\] \\+ a\\[2:\\]' should run alone"):
        alone.observe(0.0, answered_by=0)


def test_stage_costs_are_saved():
    whole = Profile.from_dict(profile().to_dict())
    assert whole.cascades[0].stage_costs == WIDE.stage_costs
    with pytest.raises(ValueError, match="are not what the routes of"):
        replace(WIDE, stage_costs={"macs": (1.0,)})
