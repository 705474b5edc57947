"""Samplers draw by the probabilities they promise, the same in every process and in a run that goes on."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from restnet_hf.routes.route import Route
from restnet_hf.training.samplers import SAMPLERS, Sampler


MACS = {  # of eight parts, each 10 wide, three have routes: from 10 to below 20, to below 30, and from 80 to 90
    Route.parse("a[:]"): 90,
    Route.parse("b[:]"): 10,
    Route.parse("a[:1] + b[3:]"): 12,
    Route.parse("a[:2] + b[2:]"): 19,
    Route.parse("a[:2] + b[3:]"): 20,
    Route.parse("night: a[:3] + b[3:]"): 80,
}
ROUTES = list(MACS)
SALIENCY = dict(zip(ROUTES, [0.0, 1.0, 2.0, 3.0, 4.0, 0.0], strict=True))
CRITICAL = {2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}  # chi-square at 0.1%, by degrees of freedom, from a table
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
random_sampler = pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"all"}))


def make(name, routes=ROUTES, **options):
    return SAMPLERS[name](routes, MACS, **options)


def as_text(draws):
    return [[str(route) for route in draw] for draw in draws]


def train(sampler, steps):
    """Draws of a run in which saliency depends on route and step."""
    draws = []
    for step in steps:
        draws.append(sampler.draw(step))
        sampler.update({route: np.float32(MACS[route] * (1 + step % 3)) for route in draws[-1]})
    return draws


def check_frequencies(drawn, probabilities):
    """Pearson's chi-square test: counts of independent draws against probabilities worked out by hand."""
    counts = Counter(drawn)
    assert set(counts) <= set(probabilities) and sum(probabilities.values()) == pytest.approx(1)
    expected = {key: p * len(drawn) for key, p in probabilities.items()}
    assert min(expected.values()) >= 5, "too few draws for the test"
    statistic = sum((counts[key] - n) ** 2 / n for key, n in expected.items())
    assert statistic < CRITICAL[len(expected) - 1], counts


@every_sampler
@pytest.mark.parametrize("scored", [False, True])
def test_draws_are_routes_and_depend_on_seed_and_step_alone(name, scored):
    one, other = make(name, seed=3), make(name, seed=3)
    if scored:
        one.update(SALIENCY)
        other.update(SALIENCY)
    forth = [one.draw(step) for step in range(40)]
    assert all(draw and set(draw) <= set(ROUTES) and len(set(draw)) == len(draw) for draw in forth)
    back = [other.draw(step) for step in reversed(range(40))]
    assert back[::-1] == forth


@random_sampler
def test_seeds_and_steps_differ(name):
    draws = [[make(name, seed=seed).draw(step) for step in range(40)] for seed in (0, 1)]
    assert draws[0] != draws[1] and all(len(set(map(tuple, run))) > 3 for run in draws)


@every_sampler
def test_global_generators_are_neither_read_nor_moved(name):
    draws = []
    for seed in (1, 2):
        np.random.seed(seed)
        random.seed(seed)
        before = np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()
        draws.append(train(make(name), range(20)))
        assert (np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()) == before
    assert draws[0] == draws[1]


def test_other_processes_draw_the_same_and_need_no_torch():
    code = (
        "import json, sys\n"
        "sys.modules['torch'] = None\n"
        "from restnet_hf.routes.route import Route\n"
        "from restnet_hf.training.samplers import SAMPLERS\n"
        "macs = {Route.parse(text): value for text, value in json.loads(sys.argv[1]).items()}\n"
        "made = {name: kind(list(macs), macs, seed=7) for name, kind in SAMPLERS.items()}\n"
        "made['importance'].update({route: value for route, value in macs.items()})\n"
        "print(json.dumps({name: [[str(r) for r in s.draw(t)] for t in range(30)] for name, s in made.items()}))\n"
    )
    macs = json.dumps({str(route): value for route, value in MACS.items()})
    ours = {name: make(name, seed=7) for name in SAMPLERS}
    ours["importance"].update(MACS)
    expected = {name: as_text(sampler.draw(step) for step in range(30)) for name, sampler in ours.items()}
    for hash_seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", code, macs],
            check=True,
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        assert json.loads(done.stdout) == expected


@every_sampler
@pytest.mark.parametrize("stop", [0, 3, 25])
def test_a_resumed_run_draws_what_one_that_went_on_does(name, stop):
    whole, first, second = (make(name, seed=5) for _ in range(3))
    draws = train(whole, range(50))
    assert train(first, range(stop)) == draws[:stop]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.scores == first.scores
    assert train(second, range(stop, 50)) == draws[stop:]
    assert second.scores == whole.scores and second.state_dict() == whole.state_dict()


@every_sampler
def test_a_route_that_is_given_twice_counts_once(name):
    one, twice = make(name, ROUTES), make(name, ROUTES + ROUTES[:3])
    assert train(one, range(30)) == train(twice, range(30))


@every_sampler
def test_one_route(name):
    assert train(make(name, ROUTES[2:3]), range(3)) == [ROUTES[2:3]] * 3


def test_all():
    sampler = make("all")
    assert [sampler.draw(step) for step in range(3)] == [ROUTES] * 3 and not sampler.in_place


def test_uniform():
    sampler = make("uniform")
    drawn = [route for step in range(3000) for route in sampler.draw(step)]
    assert len(drawn) == 3000 and not sampler.in_place
    check_frequencies(drawn, dict.fromkeys(ROUTES, 1 / 6))


def test_sandwich():
    """Of the four between the ends, each of the six pairs is as probable, in either order."""
    sampler = make("sandwich")
    draws = [sampler.draw(step) for step in range(3000)]
    assert sampler.in_place and {tuple(draw[:2]) for draw in draws} == {(ROUTES[0], ROUTES[1])}
    check_frequencies(
        [frozenset(draw[2:]) for draw in draws], {frozenset(p): 1 / 6 for p in combinations(ROUTES[2:], 2)}
    )
    check_frequencies([draw[2] for draw in draws], dict.fromkeys(ROUTES[2:], 1 / 4))


@pytest.mark.parametrize(
    ("routes", "extra", "length"),
    [(ROUTES, 0, 2), (ROUTES, 1, 3), (ROUTES, 9, 6), (ROUTES[:2], 2, 2), (ROUTES[:3], 2, 3), (ROUTES[:1], 2, 1)],
)
def test_sandwich_of_few(routes, extra, length):
    drawn = make("sandwich", routes, extra=extra).draw(0)
    assert len(set(drawn)) == len(drawn) == length and drawn[:2] == routes[:2]


def test_sandwich_of_equal_costs_has_two_ends():
    drawn = SAMPLERS["sandwich"](ROUTES, dict.fromkeys(ROUTES, 5.0), extra=0).draw(0)
    assert len(set(drawn)) == 2


@pytest.mark.parametrize(
    ("buckets", "probabilities"),
    [
        (8, [1 / 6, 1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6]),  # parts of three, one and two routes
        (2, [1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 4]),  # below 50 and above
        (1, [1 / 6] * 6),
        (10**6, [1 / 6] * 6),  # each for itself
    ],
)
def test_buckets(buckets, probabilities):
    sampler = make("buckets", buckets=buckets)
    expected = dict(zip(ROUTES, probabilities, strict=True))
    assert sampler.probabilities() == pytest.approx(probabilities)
    check_frequencies([route for step in range(3000) for route in sampler.draw(step)], expected)


def test_buckets_of_equal_costs():
    sampler = SAMPLERS["buckets"](ROUTES[:4], dict.fromkeys(ROUTES, 2e9))
    check_frequencies([sampler.draw(step)[0] for step in range(3000)], dict.fromkeys(ROUTES[:4], 1 / 4))


@pytest.mark.parametrize(
    ("saliency", "options", "probabilities"),
    [
        # 0.9 * (0, 1, 2, 3, 4, 0) / 10 and 0.1 / 6 for each
        (list(SALIENCY.values()), {}, [1 / 60, 32 / 300, 59 / 300, 86 / 300, 113 / 300, 1 / 60]),
        (list(SALIENCY.values()), {"floor": 0.5}, [5 / 60, 8 / 60, 11 / 60, 14 / 60, 17 / 60, 5 / 60]),
        (list(SALIENCY.values()), {"floor": 1}, [1 / 6] * 6),
        ([0.0] * 6, {}, [1 / 6] * 6),
        ([1e308] * 6, {}, [1 / 6] * 6),
        ([5e-324] * 6, {}, [1 / 6] * 6),
    ],
)
def test_importance(saliency, options, probabilities):
    sampler = make("importance", **options)
    sampler.update(dict(zip(ROUTES, saliency, strict=True)))
    assert sampler.probabilities() == pytest.approx(probabilities)
    drawn = [route for step in range(3000) for route in sampler.draw(step)]
    assert len(drawn) == 3000
    check_frequencies(drawn, dict(zip(ROUTES, probabilities, strict=True)))


def test_a_score_of_zero_is_not_forgotten():
    sampler, resumed = make("importance"), make("importance")
    sampler.update({ROUTES[0]: 0.0})
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.scores == {ROUTES[0]: 0.0}


def test_importance_without_a_floor():
    sampler = make("importance", floor=0)
    sampler.update(SALIENCY)
    drawn = [sampler.draw(step)[0] for step in range(3000)]
    check_frequencies(drawn, {route: value / 10 for route, value in SALIENCY.items() if value})


def test_importance_is_a_moving_average():
    sampler = make("importance")
    sampler.update({ROUTES[0]: 2.0, ROUTES[1]: 7.0})
    assert sampler.scores == pytest.approx({ROUTES[0]: 2.0, ROUTES[1]: 7.0})
    sampler.update({ROUTES[0]: 4.0})
    sampler.update({ROUTES[0]: 0.0})
    assert sampler.scores == pytest.approx({ROUTES[0]: 0.9 * (0.9 * 2 + 0.1 * 4), ROUTES[1]: 7.0})
    quick = make("importance", decay=0.5)
    for value in (2.0, 4.0, 0.0):
        quick.update({ROUTES[0]: value})
    assert quick.scores == pytest.approx({ROUTES[0]: 1.5})


def test_routes_without_a_score_come_first():
    firsts = []
    for seed in range(3000):
        sampler = make("importance", seed=seed)
        sampler.update(dict.fromkeys(ROUTES[:3], 1e6))
        firsts.append(sampler.draw(0)[0])
    check_frequencies(firsts, dict.fromkeys(ROUTES[3:], 1 / 3))
    sampler = make("importance")
    assert sampler.scores == {}
    assert {route for draw in train(sampler, range(6)) for route in draw} == set(sampler.scores) == set(ROUTES)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"importance"}))
def test_others_learn_nothing(name):
    sampler = make(name)
    sampler.update(SALIENCY)
    assert sampler.scores == {} and sampler.state_dict() == {}
    with pytest.raises(ValueError, match=r"this sampler has no state, but got \['averages'\]"):
        sampler.load_state_dict(make("importance").state_dict())


@every_sampler
def test_routes_and_costs_are_checked(name):
    with pytest.raises(ValueError, match="there are no routes to draw from"):
        make(name, [])
    for macs in ({ROUTES[0]: 1.0}, {ROUTES[0]: 1.0, ROUTES[2]: np.nan}):
        with pytest.raises(ValueError, match=r"macs has no finite number for \['a\[:1\] \+ b\[3:\]'\]"):
            SAMPLERS[name]([ROUTES[0], ROUTES[2]], macs)
    with pytest.raises(ValueError, match=r"saliency of \['c\[:\]'\], which are not among the routes \['a\[:\]', "):
        make(name).update({Route.parse("c[:]"): 1.0})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sandwich", "extra", -1),
        ("buckets", "buckets", 0),
        ("importance", "decay", -0.1),
        ("importance", "decay", 1),
        ("importance", "floor", -0.1),
        ("importance", "floor", 1.1),
        ("importance", "floor", np.nan),
    ],
)
def test_options_are_checked(name, option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        make(name, **{option: value})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-9])
def test_saliency_is_checked_before_any_is_taken(value):
    sampler = make("importance")
    sampler.update({ROUTES[0]: 1.0})
    with pytest.raises(ValueError, match=r"saliency must be finite and at least 0, not \{'b\[:\]': "):
        sampler.update({ROUTES[0]: 3.0, ROUTES[1]: value})
    assert sampler.scores == {ROUTES[0]: 1.0}


@pytest.mark.parametrize("routes", [ROUTES[:5], ROUTES + [Route.parse("c[:]")], []])
def test_state_of_other_routes(routes):
    sampler = make("importance")
    sampler.update(SALIENCY)
    with pytest.raises(ValueError, match="the state belongs to .* but routes are .*; give the same ones"):
        sampler.load_state_dict({"averages": {str(route): 1.0 for route in routes}})
    with pytest.raises(ValueError, match="the state belongs to"):
        sampler.load_state_dict({})
    with pytest.raises(ValueError, match="saliency must be finite"):
        sampler.load_state_dict({"averages": {str(route): np.nan for route in ROUTES}})
    assert sampler.scores == SALIENCY


def test_a_sampler_of_your_own_needs_only_draw():
    class Last(Sampler):
        def draw(self, step):
            return [self.routes[-1]]

    assert train(Last(ROUTES, MACS), range(3)) == [ROUTES[-1:]] * 3
