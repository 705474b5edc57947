"""review: what is tried again once pairs are ranked: leading routes, near equals, and the winner on other images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from restnet_hf.profiling.bounds import drop_bound
from restnet_hf.profiling.cascades import Chain, Observations, run_chain
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.fronts import anchor_ends
from restnet_hf.routes.profile import AnyProfiled, ProfiledCascade
from restnet_hf.routes.route import Route
from restnet_hf.scouting.pairs import PairJudge
from restnet_hf.scouting.results import Check, ScoutedPair, ScoutResult


DOUBT = 0.05  # probability that the best pair is reported as worse than the winner
LEADING = 5  # pairs of which stitched routes are tried on all images that choose
DRAWS = 200  # of images with replacement, for the standard error of the gap
DEFINED = 0.95  # share of draws in which the dearer anchor has to be better, for a gap to be reported


def review(result: ScoutResult, judge: PairJudge) -> ScoutResult:
    """Look again at ranked pairs; the order changes where a stitched route leads by chance.

    Stitched routes were raced on part of the images that choose. The best one of each leading pair is run on the
    others too where its prediction is not far from the best entry that was tried on all, and pairs are ranked anew,
    until nothing leads that was only raced. Then pairs are marked that are not significantly worse than the winner,
    and the winner is scored on the images that took no part in choosing.

    Args:
        result: pairs, ranked for the budget.
        judge: judge of the pairs.
    """
    hits: dict[Route, np.ndarray] = {}
    others = judge.chosen_on[len(judge.raced_on) :]
    while others and (leaders := _leaders(result, hits, len(judge.raced_on))):
        rest = judge.run(leaders.values(), others)
        pairs = list(result.pairs)
        for place, route in leaders.items():
            hits[route] = np.concatenate([judge.raced(route), rest[route]])
            pairs[place] = pairs[place].with_accuracy(route, hits[route].mean().item(), len(hits[route]))
        result = replace(result, pairs=tuple(pairs)).ranked(result.budget)
    result = _mark_near(result, judge, hits)
    return replace(result, check=_check(result, judge) if judge.checked_on else None)


def _leaders(result: ScoutResult, hits: Mapping[Route, np.ndarray], raced: int) -> dict[int, Route]:
    """The routes to try next, by the place of their pair among the first `LEADING` ones.

    Of a pair the only raced route with the highest prediction is tried where it leads the best entry that was tried on
    all images. One is tried too where it is at most two standard errors below, since a race can be unlucky.

    Args:
        result: pairs, ranked for the budget.
        hits: routes that were tried on all images that choose.
        raced: number of images of a race.
    """
    limits = result.budget
    fitting = [[row for row in pair.rows if limits.allows(row.costs)] for pair in result.pairs]
    tried = (row for rows in fitting for row in rows if not _is_only_raced(row.route, hits))
    most = max((row.scores["accuracy"] for row in tried), default=0.0)
    leaders: dict[int, Route] = {}
    for place, rows in enumerate(fitting[:LEADING]):
        first = any(row.route in hits for row in rows)
        least = most if first else most - 2 * standard_error(most * raced, raced)
        new = [row for row in rows if _is_only_raced(row.route, hits) and row.scores["accuracy"] >= least]
        if new:
            best = max(new, key=lambda row: (row.scores["accuracy"], -limits.usage(row.costs)))
            assert isinstance(best.route, Route)
            leaders[place] = best.route
    return leaders


def _best(result: ScoutResult, pair: ScoutedPair) -> AnyProfiled:
    best = pair.best(result.budget)
    assert best is not None
    return best


def _is_only_raced(entry: Route | Cascade, hits: Mapping[Route, np.ndarray]) -> bool:
    """Whether an entry is a stitched route that was not run on all images that choose."""
    return isinstance(entry, Route) and bool(entry.stitch_points) and entry not in hits


def score_images(observed: Observations, entry: Route | Cascade) -> tuple[np.ndarray, float]:
    """Whether an anchor alone or a cascade of anchors, its thresholds as they are, is right on each image (N,).

    Args:
        observed: what anchors answer.
        entry: anchor alone, or cascade by the confidence and temperatures of the observations.

    Returns:
        Booleans (N,), and the share of the images that reach the second route, 0 for an anchor alone.
    """
    routes = entry.routes if isinstance(entry, Cascade) else (entry,)
    chain = Chain(tuple(map(observed.routes.index, routes)), entry.thresholds if isinstance(entry, Cascade) else ())
    outcome = run_chain(observed, chain)
    return outcome.right, (outcome.reached[1] / len(observed) if chain.thresholds else 0.0)


def _mark_near(result: ScoutResult, judge: PairJudge, hits: Mapping[Route, np.ndarray]) -> ScoutResult:
    """The result with a mark at each pair that is not significantly worse than the winner on the same images.

    The winner is the best of many on these images, so each pair is compared at the level ``DOUBT`` divided by the
    number of other pairs (union bound): with 95 % probability the best pair, each pair taken with the entry that was
    chosen for it, is among the marked ones.
    """
    doubt = DOUBT / max(1, len(result.pairs) - 1)
    first = _right(_best(result, result.winner).route, judge, hits)
    pairs = []
    for pair in result.pairs:
        best = pair.best(result.budget)
        near = best is not None and _is_near(_right(best.route, judge, hits), first, doubt)
        pairs.append(replace(pair, near_best=near))
    return replace(result, pairs=tuple(pairs))


def _right(entry: Route | Cascade, judge: PairJudge, hits: Mapping[Route, np.ndarray]) -> np.ndarray:
    """Whether an entry is right on each image that chooses; of a route that was only raced, on those of the race."""
    if isinstance(entry, Cascade) or entry.is_anchor:
        return score_images(judge.observed, entry)[0]
    return hits[entry] if entry in hits else judge.raced(entry)


def _is_near(right: np.ndarray, first: np.ndarray, doubt: float) -> bool:
    """Whether answers are not significantly worse than the first ones, on the images that both were tried on."""
    count = min(len(right), len(first))
    mine, theirs = right[:count], first[:count]
    return drop_bound(int((mine & ~theirs).sum()), int((theirs & ~mine).sum()), count, doubt) >= 0


def _check(result: ScoutResult, judge: PairJudge) -> Check:
    """The winner's score and gap closed on the images that took no part in choosing, all else as it was chosen."""
    pair, best = result.winner, _best(result, result.winner)
    anchors = [pair.alone(name) for name in (pair.front, pair.end)]
    front = pair.front_rows()
    rows = list({row.route: row for row in (best, *anchors, *front)}.values())
    stitched = [row.route for row in rows if isinstance(row.route, Route) and row.route.stitch_points]
    right: dict[Route | Cascade, np.ndarray] = dict(judge.run(stitched, judge.checked_on).items())
    macs = []
    for row in rows:
        macs.append(row.costs["mean_macs"])
        if row.route not in right:
            right[row.route], share = score_images(judge.checked, row.route)
            if isinstance(row, ProfiledCascade):
                stages = row.stage_costs["macs"]
                macs[-1] = stages[0] + share * stages[1]
    every = np.stack([right[row.route] for row in rows])
    gap, error = _gap(rows, front, macs, every)
    correct, count = int(every[0].sum()), every.shape[1]
    return Check(count, correct / count, standard_error(correct, count), float(macs[0]), gap, error)


def standard_error(successes: float, count: int) -> float:
    """Standard error of a share, after two successes and two failures more, so that it is not 0 for none or all.

    As in the interval of Agresti and Coull (1998, doi 10.1080/00031305.1998.10480550).

    Args:
        successes: number of successes.
        count: number of trials.
    """
    share = (successes + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))


def _gap(
    rows: Sequence[AnyProfiled], front: Sequence[AnyProfiled], macs: Sequence[float], right: np.ndarray
) -> tuple[float | None, float | None]:
    """The gap that the entries of a predicted front close on other images, and its error by the bootstrap.

    A budget gets the entry that it gets by prediction: none is chosen by its accuracy on these images, which would
    find the luckiest again.

    Args:
        rows: rows of the images' answers, anchors alone among them, as they were predicted.
        front: those that no other beats in prediction, the cheapest first.
        macs: MACs of each row on these images, as a mean.
        right: booleans (rows, N), whether a row is right on an image.

    Returns:
        The share and its standard error; None for both where fewer than `DEFINED` of the draws have a share.
    """
    ends = anchor_ends(rows, "mean_macs", "accuracy")
    assert ends is not None
    places = {row.route: place for place, row in enumerate(rows)}
    least, most = (places[row.route] for row in ends)
    entries = [places[row.route] for row in front]
    if not macs[most] > macs[least]:
        return None, None
    begins = np.maximum.accumulate(np.clip([macs[each] for each in entries], macs[least], macs[most]))
    widths = np.diff([macs[least], *begins, macs[most]]) / (macs[most] - macs[least])

    def gaps(accuracies: np.ndarray) -> np.ndarray:
        low, high = accuracies[:, least], accuracies[:, most]
        above = (accuracies[:, [least, *entries]] - low[:, None]) @ widths
        return np.divide(above, high - low, out=np.full(len(low), np.nan), where=high > low)

    rng, count = np.random.default_rng(0), right.shape[1]
    draws = rng.multinomial(count, np.full(count, 1 / count), DRAWS)
    drawn, (measured,) = gaps(draws @ right.T / count), gaps(right.mean(1)[None])
    if not np.isfinite(measured) or np.isfinite(drawn).mean() < DEFINED:
        return None, None
    low, high = np.nanquantile(drawn, (0.1587, 0.8413))  # of a ratio, whose variance may be infinite
    return float(measured), float(high - low) / 2
