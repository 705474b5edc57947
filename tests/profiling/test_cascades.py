"""The search finds what trying everything finds; scores hold on new images; promises hold as often as they say."""

from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from restnet_hf.profiling.cascades import (
    BUDGETS,
    Chain,
    Observations,
    StageCosts,
    binomial_at_most,
    calibrate_cascades,
    certify_cascade,
    images_for_promise,
    join_observations,
    observe_logits,
    run_chain,
    search_cascades,
)
from restnet_hf.routes.route import Route


def observations(images, routes=3, seed=0, accuracy=(0.6, 0.95)):
    """Routes that are right on the easy images, more of them the dearer they are, and surer of these."""
    rng = np.random.default_rng(seed)
    easy = rng.random(images)
    right, sure = [], []
    for share in np.linspace(*accuracy, routes):
        right.append(easy + 0.15 * rng.standard_normal(images) < share)
        sure.append(1 / (1 + np.exp(-6 * (share - easy) + 0.7 * rng.standard_normal(images))))
    names = tuple(Route.alone(f"a{index}") for index in range(routes))
    right = np.stack(right)
    return Observations(names, "probability", (1.0,) * routes, right.astype(int), right, np.stack(sure))


def costs(routes=3, share=0.0):
    alone = np.geomspace(1, 10, routes)
    return StageCosts(alone, share * np.minimum(alone[:, None], alone))


def every_chain(observed):
    """All chains of one, two and three routes with all thresholds that differ."""
    for count in (1, 2, 3):
        for routes in combinations(range(len(observed.routes)), count):
            between = []
            for route in routes[:-1]:
                ordered = np.sort(observed.sure[route])
                between.append((ordered[1:] + ordered[:-1]) / 2)
            grid = np.meshgrid(*between, indexing="ij")
            for values in zip(*map(np.ravel, grid), strict=True) if between else [()]:
                yield Chain(routes, tuple(map(float, values)))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_search_finds_what_trying_everything_finds(share):
    observed, table = observations(40), costs(share=share)
    budgets = np.linspace(1, 10, BUDGETS)
    best = np.full(BUDGETS, -1.0)
    for chain in every_chain(observed):
        outcome = run_chain(observed, chain)
        best[outcome.mean_cost(table.added_costs(chain.routes)) <= budgets * (1 + 1e-9)] = np.maximum(
            best[outcome.mean_cost(table.added_costs(chain.routes)) <= budgets * (1 + 1e-9)], outcome.right.mean()
        )
    found = search_cascades(observed, table, budgets)
    np.testing.assert_allclose(found.scores, best)
    for budget, score, chain in zip(budgets, found.scores, found.chains, strict=True):
        outcome = run_chain(observed, chain)  # what the vectorised search counted is what the chain does
        assert outcome.right.mean() == pytest.approx(score)
        assert outcome.mean_cost(table.added_costs(chain.routes)) <= budget * (1 + 1e-9)


def test_ties_are_not_split():
    """Images of the same confidence go the same way."""
    observed = observations(60)
    rounded = replace(observed, sure=observed.sure.round(1))
    found = search_cascades(rounded, costs(), np.linspace(1, 10, BUDGETS))
    for score, chain in zip(found.scores, found.chains, strict=True):
        assert run_chain(rounded, chain).right.mean() == pytest.approx(score)


def test_scores_hold_on_new_images():
    """Cross-validated scores and costs are those on a hundred times as many images, within their errors."""
    few, many = observations(400, seed=1), observations(40_000, seed=2)
    table = costs()
    found = calibrate_cascades(few, table)
    assert 2 <= len(found) <= 8
    z = []
    for each in found:
        outcome = run_chain(many, each.chain)
        z.append((each.score - outcome.right.mean()) / each.standard_error)
        assert each.mean_cost == pytest.approx(outcome.mean_cost(table.added_costs(each.chain.routes)), rel=0.15)
    assert max(map(abs, z)) < 3
    pairs = [(each.mean_cost, each.score) for each in found]
    assert pairs == sorted(pairs)  # a front
    assert sorted(score for _, score in pairs) == [score for _, score in pairs]


def test_cascades_beat_the_line_between_routes():
    """Where confidence tells easy images, the best cascade at the middle budget beats every route within it."""
    found, alone = calibrate_cascades(observations(2000), costs()), observations(2000).right.mean(1)
    middle = [each for each in found if each.mean_cost < 5]
    assert max(each.score for each in middle) > alone[1] + 0.05


def test_the_best_of_budgets_that_are_asked_for_are_kept():
    """For each there is the cascade that a search finds for it alone; those of the whole range stay."""
    observed, table, budgets = observations(2000, routes=2), costs(2), (3.33, 4.71, 0.5, 99.0)
    plain, more = calibrate_cascades(observed, table), calibrate_cascades(observed, table, budgets=budgets)
    alone = search_cascades(observed, table, np.array(budgets[:2])).chains
    chains = [each.chain for each in more]
    assert len(alone) == 2 and {*alone} <= {*chains} and not {*alone} & {each.chain for each in plain}
    for chain, budget in zip(alone, budgets, strict=False):
        assert more[chains.index(chain)].mean_cost == pytest.approx(budget, rel=0.03)
    pairs = [(each.mean_cost, each.score) for each in more]
    assert pairs == sorted(pairs) and len(more) <= 8 + 2


@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy"])
def test_observations_of_single_routes_can_be_joined(confidence):
    rng, routes = np.random.default_rng(0), [Route.alone(name) for name in ("a", "b")]
    logits, labels = rng.standard_normal((2, 50, 4)), rng.integers(0, 4, 50)
    whole = observe_logits(routes, logits, labels, confidence)
    each = [observe_logits([r], logits[at : at + 1], labels, confidence) for at, r in enumerate(routes)]
    joined = join_observations(each)
    assert (joined.routes, joined.temperatures, joined.confidence) == (tuple(routes), whole.temperatures, confidence)
    for name in ("classes", "right", "sure"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name))
    given = observe_logits(routes, logits, labels, temperatures=(2.0, 0.5))
    p = np.exp(logits / np.array([2.0, 0.5])[:, None, None])
    assert given.temperatures == (2.0, 0.5)
    assert given.sure == pytest.approx((p / p.sum(-1, keepdims=True)).max(-1), rel=1e-5)


def test_too_few_images():
    with pytest.raises(ValueError, match="99 images are too few"):
        calibrate_cascades(observations(99), costs())


@pytest.mark.parametrize(("successes", "trials", "chance"), [(0, 10, 0.1), (3, 40, 0.05), (9, 200, 0.02), (5, 5, 0.5)])
def test_binomial_is_exact(successes, trials, chance):
    p = Fraction(chance)
    exact = sum(comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(successes + 1))
    assert binomial_at_most(successes, trials, chance) == pytest.approx(float(exact), rel=1e-9)


def test_images_for_a_promise():
    """With so many and not one that differs it can be promised; with one fewer it cannot."""
    half = images_for_promise(0.99, 0.95) // 2
    assert half == 299
    assert binomial_at_most(0, half, 0.01) <= 0.05 < binomial_at_most(0, half - 1, 0.01)


def test_promises_hold():
    """Over calibration sets from a large population, the agreement is below the promise in at most 5 %."""
    population, rng, table = observations(50_000, seed=5), np.random.default_rng(0), costs()
    agreeing = replace(population, right=population.right == population.right[2])
    broken = saved = 0
    for _ in range(60):
        sample = agreeing.select_images(rng.choice(len(agreeing), 600))
        chain, _ = certify_cascade(sample, table, 2, 0.97, 0.95)
        outcome = run_chain(agreeing, chain)
        broken += outcome.right.mean() < 0.97
        saved += outcome.mean_cost(table.added_costs(chain.routes)) < 9.99
    assert broken <= 8  # at most 5 % would be 3 of 60; more than 8 has a chance of one in 200
    assert saved > 30  # and the promise is not kept by running the reference alone


def test_the_reference_is_left_where_nothing_cheaper_passes():
    """A route that agrees on all images that choose, and on too few of those that test."""
    rng = np.random.default_rng(0)
    chosen_on = rng.permutation(600) % 2 == 0
    right = np.ones((2, 600), bool)
    right[0, np.flatnonzero(~chosen_on)[:8]] = False
    names = (Route.alone("a0"), Route.alone("a1"))
    observed = Observations(names, "probability", (1.0, 1.0), right.astype(int), right, rng.random((2, 600)))
    assert certify_cascade(observed, StageCosts([1.0, 2.0], np.zeros((2, 2))), 1, 0.99, 0.95) == (Chain((1,)), 1.0)


@pytest.mark.parametrize(
    ("images", "agreement", "message"),
    [
        (500, 0.99, "500 images cannot show agreement=0.99 with certainty=0.95; give at least 598"),
        (90, 0.5, "90 images cannot show .* give at least 100"),
        (500, 1.0, "below 1"),
    ],
)
def test_no_promise(images, agreement, message):
    with pytest.raises(ValueError, match=message):
        certify_cascade(observations(images), costs(), 2, agreement, 0.95)
