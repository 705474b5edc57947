"""Searches keep to budgets, ask for no route twice, come near the best from few evaluations, and go on later."""

import csv
import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restnet_hf.adaptation.neighbours import Neighbours
from restnet_hf.adaptation.search import SEARCHES
from restnet_hf.adaptation.surrogate import improvement, predict, route_features, standard_scores
from restnet_hf.errors import BudgetError
from restnet_hf.routes.blocks import Blocks
from restnet_hf.routes.families import family
from restnet_hf.routes.profile import Budget, Profile, ProfiledRoute
from restnet_hf.routes.route import Route, Segment, one_cut_routes
from restnet_hf.selection.ranking import Similarity


PERCENT = range(90, 45, -5)
# Top-1 of DeiT3 S and L stitched both ways, published with the code of SN-Netv2 (arXiv 2307.00154)
PUBLISHED = """
82.91 86.98 86.58 86.65 86.5 86.26 85.79 85.08 83.69 81.71 79.51 80.64 82.25 82.14 82.23 82.63 82.85 82.99 82.98 82.96
84.33 85.86 86.03 82.55 82.82 83.04 83.07 83.02 83.22 84.55 85.92 86.19 82.49 82.79 82.93 82.83 82.88 84.25 85.76
86.01 82.32 82.37 82.34 82.58 83.95 85.55 85.77 81.86 81.82 81.99 83.43 85.15 85.35 81.17 80.94 82.5 84.36 84.52 79.97
81.11 83.04 83.02 79.16 80.58 80.97 77.88 77.85 78.12 82.66 82.95 83.09 83.25 83.45 83.56 83.43 83.59 84.87 86.23
86.43 86.39 86.23 85.92 85.57 84.9 83.54 81.43 79.16 80.37 81.91 86.45 86.06 85.78 85.11 83.77 81.7 79.46 80.71 82.23
86.22 85.84 85.2 83.93 82 79.7 80.89 82.46 85.92 85.44 84.2 82.29 79.98 81.04 82.62 85.53 84.41 82.49 80.29 81.2 82.8
84.65 82.58 80.36 81.38 82.97 83.16 80.68 81.55 82.86 81.61 81.45 83.02 83.91 84.31 85.91
"""


class Landscape:
    """Routes with their latencies and accuracies in percent; notes which accuracies were asked for."""

    def __init__(self, latencies, accuracies):
        self.ms, self.accuracies, self.asked = latencies, accuracies, []
        self.routes = list(latencies)

    def costs(self, route):
        return {"latency_ms": self.ms[route]}

    def scores(self, routes):
        self.asked += routes
        return {route: self.accuracies[route] for route in routes}

    def budgets(self, percents=PERCENT):
        return [Budget(latency_ms=percent / 100 * max(self.ms.values())) for percent in percents]

    def best(self, budget):
        return max(self.accuracies[route] for route in self.routes if self.ms[route] <= budget.latency_ms)

    def search(self, name, budgets, **options):
        if name == "ranked":
            options = {"predictor": self.accuracies.get} | options
        return SEARCHES[name](self.routes, self.costs, self.scores, budgets, **options)

    def gaps(self, percents, share, seed, name="evolution", **options):
        """How far a search stays below the best of each budget, in points, with that share of all evaluations."""
        most = int(share * len(self.routes))
        result = self.search(name, self.budgets(percents), max_evaluations=most, seed=seed, **options).run()
        assert len(result.evaluated) <= most
        return [self.best(budget) - row.scores["accuracy"] for budget, row in result.best.items()]


def blocks(route, depths):
    """Of each anchor, which of its blocks run."""
    runs = {anchor: np.zeros(depth) for anchor, depth in depths.items()}
    for segment in route.segments:
        runs[segment.anchor][segment.start : segment.stop] = 1
    return runs


def published():
    routes = [*family([Blocks.from_depths("S", 12), Blocks.from_depths("L", 24)], "two_way", directions="both")]
    found = dict(zip(routes, map(float, PUBLISHED.split()), strict=True))
    cost = {"S": 4.61 / 12, "L": 61.6 / 24}  # of a block
    runs = {route: blocks(route, {"S": 12, "L": 24}) for route in routes}
    return Landscape({route: sum(cost[a] * run.sum() for a, run in runs[route].items()) for route in routes}, found)


def landscape(routes, depths, ms, value, rng):
    """Latencies of blocks and stitches add up; accuracies are those on the same 500 images for all routes.

    An image is right where the route's ability exceeds its difficulty. A third of the variance of difficulties is of
    each block's own, so that routes agree the more, the more blocks they share.
    """
    runs = np.array([np.concatenate([*blocks(route, depths).values()]) for route in routes])
    latencies = runs @ np.concatenate([*ms.values()]) + [0.3 * ms["a"].mean() * len(r.stitch_points) for r in routes]
    accuracies = np.array([value(route) for route in routes]) + 0.3 * rng.standard_normal(len(routes))
    able = np.array([NormalDist().inv_cdf(accuracy / 100) for accuracy in accuracies])
    own = (runs / np.linalg.norm(runs, axis=1, keepdims=True)) @ rng.standard_normal((runs.shape[1], 500))
    difficult = math.sqrt(2 / 3) * rng.standard_normal(500) + math.sqrt(1 / 3) * own
    right = (difficult < able[:, None]).mean(axis=1) * 100
    return Landscape(*(dict(zip(routes, map(float, found), strict=True)) for found in (latencies, right)))


def pair(seed, cuts_a, cuts_b, both_ways=False):
    """A cheap and a dear anchor, stitched at any two cuts: better the more of the dear one runs, worse the farther the
    cuts are from the same depth, above all where blocks are left out, and with a dip somewhere."""
    rng, depths = np.random.default_rng(seed), {"a": cuts_a + 1, "b": cuts_b + 1}
    routes = [Route.alone("a"), Route.alone("b"), *one_cut_routes("a", cuts_a, "b", cuts_b)]
    routes += one_cut_routes("b", cuts_b, "a", cuts_a) if both_ways else []
    ms = {a: rng.uniform(*more) * rng.uniform(0.7, 1.3, depths[a]) for a, more in {"a": (1, 1), "b": (2.5, 4)}.items()}
    low, high, bend = rng.uniform(70, 76), rng.uniform(79, 83), rng.uniform(0.5, 1.5)
    apart, left_out, dip, where = rng.uniform([5, 3, 0, 0.2], [20, 18, 4, 0.8])

    def value(route):
        share = {anchor: run.mean() for anchor, run in blocks(route, depths).items()}
        found = low + (high - low) * (share["b"] / sum(share.values())) ** bend
        for point in route.stitch_points:
            i, j = point.source_cut / depths[point.source], point.target_cut / depths[point.target]
            found -= apart * (i - j) ** 2 + left_out * max(0, j - i) ** 1.5 + 1.5 * (point.source == "b")
            found -= dip * math.exp(-(((i - where) / 0.2) ** 2))
        return found

    return landscape(routes, depths, ms, value, rng)


def skips(seed, depth=16):
    """One anchor, two or three neighbours of its blocks merged in any places; that hurts more than additively."""
    rng = np.random.default_rng(seed)
    routes = [*family([Blocks.from_depths("a", depth, entry=1)], "skip")]
    matters, hurts = rng.gamma(2, 0.6, depth + 1), rng.uniform(0.1, 0.25, (depth + 2, depth + 2))

    def value(route):
        gaps = [(point.source_cut, point.target_cut) for point in route.stitch_points]
        drop = sum(hurts[i, j] * matters[i:j].sum() for i, j in gaps)
        return 80 - drop - 0.05 * drop**2

    return landscape(routes, {"a": depth + 1}, {"a": rng.uniform(0.6, 1.4, depth + 1)}, value, rng)


def within(gaps):
    """The share that is at most half a point below the best."""
    return np.mean(np.array(gaps) <= 0.5 + 1e-9)


# How near few evaluations come


@pytest.mark.parametrize("cuts", [(12, 12), (12, 24), (24, 12), (24, 24)])
def test_a_tenth_of_the_evaluations_for_each_budget(cuts):
    gaps = [pair(seed, *cuts).gaps([percent], 0.1, seed) for seed in range(2) for percent in PERCENT]
    assert within(gaps) >= 0.94 and np.mean(gaps) <= 0.1


@pytest.mark.parametrize(("cuts", "both_ways"), [((16, 20), False), ((24, 24), False), ((16, 18), True)])
def test_a_tenth_for_all_budgets_at_once(cuts, both_ways):
    lands = [pair(seed, *cuts, both_ways) for seed in range(5)]
    gaps = [land.gaps(PERCENT, 0.1, seed) for seed, land in enumerate(lands)]
    assert within(gaps) >= 0.93 and np.mean(gaps) <= 0.1
    chance = {"name": "ranked", "predictor": lambda route: crc32(str(route).encode())}
    assert within([land.gaps(PERCENT, 0.1, seed, **chance) for seed, land in enumerate(lands)]) < 0.6, "not so easy"


@pytest.mark.parametrize(
    ("depth", "routes", "seeds"), [(14, 3136, 2), pytest.param(16, 10609, 1, marks=pytest.mark.slow)]
)
def test_a_tenth_of_routes_with_skips(depth, routes, seeds):
    lands = [skips(seed, depth) for seed in range(seeds)]
    assert {len(land.routes) for land in lands} == {routes}
    gaps = [land.gaps(PERCENT, 0.1, seed) for seed, land in enumerate(lands)]
    assert within(gaps) >= 0.93 and np.mean(gaps) <= 0.15


def test_a_tenth_of_published_routes():
    gaps = [LAND.gaps([percent], 0.1, seed) for seed in range(4) for percent in PERCENT]
    assert len(LAND.routes) == 134 and within(gaps) >= 0.95


def real():
    """602 routes of one and two stitches between the embedded anchors, with their MACs, their accuracies on 500 images
    and the scores that 12 of these predict, others for each of five seeds; written by recipes/benchmarks/search.py
    with --routes."""
    with open(Path(__file__).with_name("real_routes.csv"), newline="") as file:
        rows = {Route.parse(row.pop("route")): row for row in csv.DictReader(file)}

    def column(name, times=1):
        return {route: times * float(row[name]) for route, row in rows.items()}

    return Landscape(column("macs"), column("accuracy", 100)), [column(f"predicted {seed}") for seed in range(5)]


def test_a_tenth_of_the_work_on_real_routes():
    """Twelve images of 500 for each route that fits, and full evaluations for the rest of a tenth of that work."""
    land, predictions = real()
    budgets, tenth = land.budgets(), len(land.routes) // 10
    spent = math.ceil(12 / 500 * sum(ms <= budgets[0].latency_ms for ms in land.ms.values()))
    left = (tenth - spent) / len(land.routes) + 1e-9
    gaps = [land.gaps(PERCENT, left, seed, predictor=values.get) for seed, values in enumerate(predictions)]
    assert (tenth, spent) == (60, 14) and within(gaps) == 1
    alone = [land.gaps(PERCENT, 0.1, seed) for seed in range(5)]
    assert within(alone) < 0.9, "not so easy"


def test_a_predictor_that_knows_nothing_does_little_harm():
    lands = [pair(seed, 24, 24) for seed in range(5)]
    chance = {"predictor": lambda route: crc32(str(route).encode())}
    assert within([land.gaps(PERCENT, 0.1, seed, **chance) for seed, land in enumerate(lands)]) >= 0.9


# What holds for every search


every_search = pytest.mark.parametrize("name", SEARCHES)
LAND = published()


@every_search
def test_without_a_limit_it_finds_the_best(name):
    land = published()
    budgets = land.budgets()
    result = land.search(name, budgets, seed=3).run()
    fitting = {route for route in land.routes if land.ms[route] <= budgets[0].latency_ms}
    assert set(land.asked) == fitting and len(land.asked) == len(fitting) and result.finished
    assert [row.scores["accuracy"] for row in result.best.values()] == [*map(land.best, budgets)]
    assert [row.route for row in result.evaluated] == land.asked
    assert {row.route: row.costs for row in result.rows} == {route: land.costs(route) for route in land.routes}
    assert result.pareto("latency_ms") == Profile(result.evaluated).pareto("latency_ms")


@st.composite
def problems(draw):
    """A few routes of any shape with two costs, budgets that something fits, and a limit."""
    cuts = st.integers(1, 5)
    shapes = st.lists(st.tuples(st.sampled_from("ab"), cuts, cuts, st.sampled_from(["", "x", "y"])), max_size=2)
    routes = set()
    for shape in draw(st.lists(shapes, min_size=1, max_size=25)):
        segments, start = [], 0
        for anchor, length, entry, _ in shape:
            segments.append(Segment(anchor, start, start + length))
            start = entry
        via = tuple(name for *_, name in shape)
        routes.add(Route((*segments, Segment("b", start)), draw(st.sampled_from(["", "night"])), via))
    routes = sorted(routes, key=str)
    numbers = st.floats(0.1, 10) | st.integers(1, 4)
    costs = {route: {"macs": draw(numbers), "latency_ms": draw(numbers)} for route in routes}
    bounds = st.sampled_from(routes).map(costs.get)
    budgets = [Budget(**draw(bounds)), *(Budget(macs=each["macs"]) for each in draw(st.lists(bounds, max_size=2)))]
    return costs, {route: draw(st.floats(-5, 5)) for route in routes}, budgets, draw(st.integers(1, 30))


@every_search
@settings(max_examples=30, deadline=None)
@given(problem=problems(), seed=st.integers(0, 3))
def test_budgets_and_limits_always_hold(name, problem, seed):
    costs, values, budgets, limit = problem
    asked = []

    def scores(batch):
        asked.extend(batch)
        return {route: values[route] for route in batch}

    def fits(route, budget):
        return all(costs[route][cost] <= most for cost, most in budget.limits.items())

    options = {"predictor": values.get} if name == "ranked" else {"children": 4} if name == "evolution" else {}
    options |= {"max_evaluations": limit, "seed": seed, "batch_size": 3}
    result = SEARCHES[name](costs, costs.get, scores, budgets, **options).run()
    fitting = [route for route in costs if any(fits(route, budget) for budget in budgets)]
    assert len(asked) == len(set(asked)) == min(limit, len(fitting)) and set(asked) <= set(fitting)
    for budget, row in result.best.items():
        known = [values[route] for route in asked if fits(route, budget)]
        assert fits(row.route, budget) and row.scores == ({"accuracy": max(known)} if known else {})
        why = {each.route: each.why for each in result.rejected(budget)}
        assert {*why, row.route} == {*costs} and row.route not in why
        for route, reason in why.items():
            evaluated = "worse" if route in asked else "not evaluated"
            assert reason == (evaluated if fits(route, budget) else "over budget")


def some(land, name):
    """A search that draws at random to its end, where it draws at all."""
    options = {"children": 8} if name == "evolution" else {}
    return land.search(name, land.budgets(), max_evaluations=40, seed=5, batch_size=3, **options)


@every_search
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_resumed_search_goes_on_as_one_that_was_not_stopped(name, stop):
    whole, first, second = (published() for _ in range(3))
    expected = some(whole, name).run()
    search = some(first, name)
    batches = [rows for _, rows in zip(range(stop), search, strict=False)]
    assert [row.route for rows in batches for row in rows] == first.asked
    state = json.loads(json.dumps(search.state_dict(), allow_nan=False))
    resumed = some(second, name)
    resumed.load_state_dict(state)
    assert resumed.run() == expected
    assert first.asked + second.asked == whole.asked


@every_search
@pytest.mark.parametrize("where", ["scores", "callback", "proposal"])
def test_an_interrupt_gives_the_best_so_far_and_can_be_gone_on_with(name, where):
    """Nothing is asked for twice, and all in the order of a search that was not interrupted."""
    whole, land = published(), published()
    expected = some(whole, name).run()
    calls = []

    def interrupted_at_the_third(kind, what=lambda *args: None):
        def call(*args):
            found = what(*args)
            if kind == where and calls.append(kind) is None and len(calls) == 3:
                raise KeyboardInterrupt
            return found

        return call

    search = some(land, name)
    search.scores = lambda routes: interrupted_at_the_third("scores")() or land.scores(routes)
    search._propose = interrupted_at_the_third("proposal", search._propose)
    result = search.run(interrupted_at_the_third("callback"))
    assert not result.finished and 0 < len(result.evaluated) < len(expected.evaluated)
    for budget, row in result.best.items():
        known = [land.accuracies[route] for route in land.asked if land.ms[route] <= budget.latency_ms]
        assert row.scores == ({"accuracy": max(known)} if known else {})
    assert search.run() == expected and land.asked == whole.asked


@every_search
def test_what_is_known_serves_another_budget(name):
    land = published()
    first = land.search(name, land.budgets([80]), max_evaluations=20)
    first.run()
    state, known = first.state_dict(), set(land.asked)
    state["pending"] = [str(max(land.ms, key=land.ms.get))]  # fits the first budget only
    second = land.search(name, land.budgets([60, 30]))
    second.load_state_dict(state)
    result = second.run()
    assert len(land.asked) == len(set(land.asked)) > len(known)
    assert all(land.ms[route] <= 0.6 * max(land.ms.values()) for route in set(land.asked) - known)
    assert [row.scores["accuracy"] for row in result.best.values()] == [*map(land.best, land.budgets([60, 30]))]


# What each search does


def test_exhaustive_keeps_beginnings_together():
    search = LAND.search("exhaustive", [Budget(latency_ms=100)], batch_size=60)
    batches = [*search]
    order = [row.route.segments[0] for rows in batches for row in rows]
    assert sum(left != right for left, right in pairwise(order)) == len(set(order)) - 1
    assert [len(rows) for rows in batches] == [60, 60, 14]


def test_ranked_takes_a_similarity():
    """A route without a value comes last, as does one whose value is not a number; budgets take turns."""
    routes = [Route.alone("b"), *one_cut_routes("a", 2, "b", 2)]
    values = np.ma.masked_array([[0.1, 0.9], [0.5, 0.3]], [[0, 0], [0, 1]])
    predictions = {route: Similarity("a", "b", values, {}).value(route) for route in routes[1:]}
    predictions[routes[0]] = math.nan
    options = {"predictor": predictions.get}
    search = SEARCHES["ranked"](routes, lambda r: {"macs": 1}, predictions.fromkeys, Budget(macs=1), **options)
    search.scores = lambda batch: dict.fromkeys(batch, 0.5)
    expected = ["a[:1] + b[2:]", "a[:2] + b[1:]", "a[:1] + b[1:]", "b[:]", "a[:2] + b[2:]"]
    assert [str(row.route) for row in search.run().evaluated] == expected
    budgets = LAND.budgets([90, 70, 50])
    turns = LAND.search("ranked", budgets, max_evaluations=3).run().evaluated
    assert [row.scores["accuracy"] for row in turns] == [*map(LAND.best, budgets)]


def changed(routes, text):
    routes = [*routes]
    return {str(routes[number]) for number in Neighbours(routes).of(routes.index(Route.parse(text)))}


def test_skips_come_go_move_and_change_their_length():
    found = changed(family([Blocks.from_depths("a", 12, entry=1)], "skip"), "a[:3] + a[5:8] + a[10:]")
    assert {"a[:3] + a[5:]", "a[:8] + a[10:]"} <= found, "one fewer"
    assert {"a[:1] + a[3:3] + a[5:8] + a[10:]", "a[:3] + a[5:8] + a[10:10] + a[13:]"} <= found, "one more"
    assert {"a[:2] + a[4:8] + a[10:]", "a[:3] + a[5:6] + a[8:]"} <= found, "moved"
    assert {"a[:3] + a[6:8] + a[10:]", "a[:3] + a[5:8] + a[11:]"} <= found, "longer"


def test_names_and_anchors_change():
    routes = [*family([Blocks.from_depths("a", 4, entry=1)], "skip", prune=(0.25, 0.5))]
    found = changed(routes, "a[:2] +prune25_2 a[3:]")
    assert {"a[:2] +prune50_2 a[3:]", "a[:2] + a[4:]", "a[:]"} <= found and "a[:2] +prune25_2 a[3:]" not in found
    found = changed(LAND.routes, "S[:4] + L[8:]")
    assert {"S[:3] + L[6:]", "S[:4] + L[8:16] + S[8:]", "S[:]", "L[:]"} <= found, "also where stitches hang together"
    assert "L[:8] + S[4:]" not in found


def children(routes, parent, cost, **options):
    """Within a budget that the parent just fits."""
    search = SEARCHES["evolution"](routes, lambda r: {"macs": cost(r)}, None, Budget(macs=cost(parent)), **options)
    drawn = (search.child([routes.index(parent)], 0) for _ in range(3000))
    return {str(routes[child]) for child in drawn if child is not None}


def test_what_makes_a_route_dearer_is_compensated():
    """Each block costs 1: more of the front goes with less of the end, and a skip that goes with one that comes."""
    routes = [*one_cut_routes("a", 9, "b", 9)]
    found = children(routes, Route.parse("a[:4] + b[5:]"), lambda r: r.segments[0].stop + 10 - r.segments[1].start)
    assert {"a[:5] + b[6:]", "a[:6] + b[7:]", "a[:5] + b[7:]"} <= found, "compensated"
    assert all(route.stop - 4 <= end.start - 5 for route, end in (Route.parse(text).segments for text in found))
    routes = [*family([Blocks.from_depths("a", 12, entry=1)], "skip")]
    cost = {route: blocks(route, {"a": 13})["a"].sum() for route in routes}
    found = children(routes, Route.parse("a[:3] + a[5:]"), cost.get)
    assert {"a[:8] + a[10:]", "a[:11] + a[13:]"} <= found, "nowhere near, so one came for the other"
    assert all(cost[Route.parse(text)] <= 11 for text in found)


def test_the_surrogate_is_a_gaussian_process():
    """Against the textbook's formulas with an inverse, and expected improvement against an integral."""
    rng = np.random.default_rng(0)
    seen, points, values = rng.standard_normal((20, 4)), rng.standard_normal((50, 4)), rng.uniform(70, 80, 20)

    def kernel(x, y):
        return np.exp(-((x[:, None, :3] - y[:, :3]) ** 2).sum(-1) / (2 * 1.25**2)) + x[:, None, 3] * y[:, 3]

    inverse, off = np.linalg.inv(kernel(seen, seen) + 0.1 * np.eye(20)), values - values.mean()
    left = kernel(points, points) - kernel(points, seen) @ inverse @ kernel(seen, points)
    variance = off @ inverse @ off / 20 * np.diag(left)
    means, deviations = predict(seen, values, points)
    np.testing.assert_allclose(means, values.mean() + kernel(points, seen) @ inverse @ off, rtol=1e-9)
    np.testing.assert_allclose(deviations, np.sqrt(variance), rtol=1e-6)
    z = np.linspace(-6, 6, 2001)
    normal = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    exact = [np.maximum(m + d * z - 78, 0) @ normal for m, d in zip(means, deviations, strict=True)]
    assert np.abs(improvement(means, deviations, 78) - exact).max() <= 0.02 * deviations.max()


def test_what_a_predictor_says_is_standardized():
    """Values that are not finite become 0, and so do values that are all equal."""
    found = standard_scores(np.array([3.0, math.nan, 5.0, math.inf, 10.0]))
    np.testing.assert_allclose(found, [-3 / math.sqrt(26 / 3), 0, -1 / math.sqrt(26 / 3), 0, 4 / math.sqrt(26 / 3)])
    for same in ([0.1] * 7, [math.nan] * 3, []):
        assert not standard_scores(np.array(same)).any()


def test_features_tell_all_routes_apart():
    routes = [
        *family([Blocks.from_depths("a", 5, entry=1)], "skip", prune=(0.25, 0.5)),
        *one_cut_routes("a", 5, "b", 5),
    ]
    routes += [Route(route.segments, "night", route.via) for route in routes if route.via]
    features = route_features(routes, np.ones((len(routes), 1)))
    assert len(np.unique(features.round(9), axis=0)) == len(routes) == len(features)


# Results and errors


ROUTES = [Route.parse(text) for text in ("a[:]", "b[:]", "a[:1] + b[1:]", "b[:1] + a[1:]")]
COSTS = {r: {"macs": m, "latency_ms": t} for r, m, t in zip(ROUTES, (4, 1, 2, 3), (40, 10, 20, 35), strict=True)}
VALUES = dict(zip(ROUTES, (0.9, 0.5, 0.7, 0.6), strict=True))
BUDGET = Budget(macs=3, latency_ms=30)


def small(name="exhaustive", routes=ROUTES, budgets=BUDGET, scores=None, costs=COSTS, **options):
    options |= {"predictor": VALUES.get} if name == "ranked" else {}
    scores = scores or (lambda batch: {route: VALUES[route] for route in batch})
    return SEARCHES[name](routes, costs.get, scores, budgets, **options)


def test_what_was_rejected_and_why():
    result = small(score="agreement").run()
    assert result.best == {BUDGET: ProfiledRoute(ROUTES[2], COSTS[ROUTES[2]], {"agreement": 0.7})}
    assert {str(each.route): (each.why, each.detail) for each in result.rejected(BUDGET)} == {
        "a[:]": ("over budget", "macs=4 is over 3, latency_ms=40 is over 30"),
        "b[:1] + a[1:]": ("over budget", "latency_ms=35 is over 30"),
        "b[:]": ("worse", "agreement=0.5, 'a[:1] + b[1:]' has 0.7"),
    }
    stopped = small(max_evaluations=1).run()
    assert ("not evaluated", "the search stopped before its accuracy was known") in [
        (each.why, each.detail) for each in stopped.rejected(BUDGET)
    ]


@every_search
def test_wrong_options(name):
    with pytest.raises(BudgetError, match=r"no route fits macs<=0.5; the cheapest is 'b\[:\]' with macs=1"):
        small(name, budgets=[Budget(macs=3), Budget(macs=0.5)])
    with pytest.raises(BudgetError, match="no memory_mb for its routes, only"):
        small(name, budgets=Budget(memory_mb=3))
    with pytest.raises(ValueError, match="got 0 candidates and 1 budgets"):
        small(name, routes=[])
    with pytest.raises(ValueError, match="got 4 candidates and 0 budgets"):
        small(name, budgets=[])
    with pytest.raises(ValueError, match="max_evaluations=0 must be at least 1"):
        small(name, max_evaluations=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        small(name, batch_size=0)
    with pytest.raises(ValueError, match=r"costs gave no finite number for \['a\[:\]'\]"):
        small(name, costs=COSTS | {ROUTES[0]: {"macs": math.nan}})
    with pytest.raises(ValueError, match="children=0 must be at least 1"):
        small("evolution", children=0)


@every_search
@pytest.mark.parametrize("found", [{ROUTES[1]: 0.5}, *(dict.fromkeys(ROUTES, bad) for bad in (math.nan, math.inf))])
def test_scores_that_are_none(name, found):
    """The search can go on once that is put right."""
    search = small(name, scores=lambda batch: found)
    with pytest.raises(ValueError, match=r"no finite number for .*'a\[:1\] \+ b\[1:\]'.* must score every route"):
        search.run()
    search.scores = lambda batch: {route: VALUES[route] for route in batch}
    assert len(search.run().evaluated) == 2


GOOD = small("evolution").state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": "Ranked"}, "it belongs to Ranked, not to Evolution"),
        ({"found": {"c[:]": 0.5}}, r"it holds \['c\[:\]'\], which are not among the candidates"),
        ({"pending": ["c[:]"]}, "which are not among the candidates"),
        ({"found": {"b[:]": math.nan}}, "not finite"),
        ({"found": {"b[:]": "high"}}, "use the one it came from"),
        ({"random": {"bit_generator": "MT19937"}}, "use the one it came from"),
        ({"random": GOOD["random"] | {"state": {"state": 10**60, "inc": 1}}}, "use the one it came from"),
    ],
)
def test_states_that_are_none(change, message):
    search = small("evolution")
    with pytest.raises(ValueError, match=message):
        search.load_state_dict(GOOD | change)
    assert search.state_dict() == GOOD, "nothing of it was taken over"
