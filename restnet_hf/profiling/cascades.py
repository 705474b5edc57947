"""Calibration of cascades: which routes in which order, with which thresholds, from one evaluation of all routes."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from numpy import ndarray

from restnet_hf.cascading import count_shared_steps
from restnet_hf.data.collected import RowsInOrder
from restnet_hf.data.datasets import Batch, no_labels_error
from restnet_hf.data.shares import OwnBatch, in_order, own_batches
from restnet_hf.distributed import Own, from_main, share_jobs, this_process
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.confidences import fit_temperature, measure_confidence, probabilities
from restnet_hf.routes.route import Route
from restnet_hf.steps import Step, Walk, split_at_shared_cuts, walk_tree


BUDGETS = 32  # mean costs for each of which the best cascade is searched
FOLDS = 5  # of cross-validation
LEAST_IMAGES = 100  # for a calibration
TEMPERATURE_IMAGES = 1000  # images on which temperatures are fitted
MOST_LOGITS = 2**26  # numbers of them that are held at once
FIRST_THRESHOLDS, SECOND_THRESHOLDS = 64, 256  # of three routes, thresholds that are tried at most
MOST_CASCADES = 8  # that a profile offers
MOST_ROUTES = 24  # routes that are combined; there are 2,024 triples of so many


@dataclass(frozen=True)
class Observations:
    """What each route answers on the same images, and how sure it is.

    Args:
        routes: routes that were run, in the order of the arrays.
        confidence: key of `CONFIDENCES` by which `sure` was measured.
        temperatures: temperature of each route.
        classes: class (routes, N) that each route gives.
        right: whether it is the label, or the reference route's class (routes, N).
        sure: confidence (routes, N) of each route as the first of a cascade.
        agreement: probability (routes, routes, N) that a route gives to the class of another; None unless this is the
            confidence.
    """

    routes: tuple[Route, ...]
    confidence: str
    temperatures: tuple[float, ...]
    classes: ndarray
    right: ndarray
    sure: ndarray
    agreement: ndarray | None = None

    def __len__(self) -> int:
        return self.classes.shape[1]

    def scores(self) -> dict[Route, float]:
        """Share of right answers of each route."""
        return {route: each.mean().item() for route, each in zip(self.routes, self.right, strict=True)}

    def sure_after(self, route: int, previous: int | None) -> ndarray:
        """Confidence (N,) of a route, by number, behind another one or as the first."""
        if previous is None or self.agreement is None:
            return self.sure[route]
        return self.agreement[route, previous]

    def select_images(self, images: ndarray) -> "Observations":
        """The observations on some images, by index or mask."""
        classes, right, sure = (each[:, images] for each in (self.classes, self.right, self.sure))
        after = None if self.agreement is None else self.agreement[..., images]
        return replace(self, classes=classes, right=right, sure=sure, agreement=after)

    def select_routes(self, routes: Sequence[int]) -> "Observations":
        """The observations of some routes, by number."""
        names = tuple(self.routes[at] for at in routes)
        temperatures = tuple(self.temperatures[at] for at in routes)
        classes, right, sure = (each[list(routes)] for each in (self.classes, self.right, self.sure))
        after = None if self.agreement is None else self.agreement[np.ix_(routes, routes)]
        return Observations(names, self.confidence, temperatures, classes, right, sure, after)


Chunk = tuple[int, ndarray | None, ndarray]  # number of a batch, labels (n,), logits (routes, n, classes)


@torch.no_grad()
def _logits(walks: Sequence[Walk], batches: Iterable[Batch] | Own[OwnBatch], device: torch.device) -> Iterator[Chunk]:
    """Logits of all routes on the batches of this process."""
    split = split_at_shared_cuts(walks)
    for number, _, batch in own_batches(batches):
        logits = dict(walk_tree(batch["pixel_values"].to(device, non_blocking=True), split))
        stacked = torch.stack([logits[route].float() for route, _ in walks]).cpu().numpy()  # one copy
        yield number, batch["labels"].cpu().numpy() if "labels" in batch else None, stacked


def observe_routes(
    walks: Sequence[Walk],
    batches: Iterable[Batch] | Own[OwnBatch],
    device: torch.device,
    confidence: str = "probability",
    reference: Route | None = None,
    *,
    scaled: bool = True,
) -> Observations:
    """Run all routes on the same images, once; several processes share the batches, and all return the whole result.

    Args:
        walks: routes with their steps.
        batches: batches of images in the model's preprocessing, the same on every process, or its own.
        device: device to run on.
        confidence: key of `CONFIDENCES` by which routes are sure.
        reference: route whose classes count as right; None for the labels.
        scaled: whether temperatures are fitted, on up to 1,000 of the images; else they are 1.

    Returns:
        What the routes answer.

    Raises:
        ValueError: there is no reference, and a batch has no labels.
    """
    routes = tuple(route for route, _ in walks)
    chunks, first = _logits(walks, batches, device), list[Chunk]()
    for chunk in chunks:
        first.append(chunk)
        if chunk[0] + this_process().num_processes >= _fitting_batches(chunk[2]):
            break

    def true_classes(chunk: Chunk) -> ndarray:
        if reference is not None:
            return chunk[2][routes.index(reference)].argmax(-1)
        if chunk[1] is None:
            raise ValueError("accuracy needs labels: batches must hold 'labels' beside 'pixel_values'")
        return chunk[1]

    temperatures = (1.0,) * len(routes)
    if scaled:
        whole = [chunk for chunk in in_order(first) if chunk[0] < _fitting_batches(chunk[2])]
        if not whole:
            raise no_labels_error()
        logits, classes = np.concatenate([c[2] for c in whole], 1), np.concatenate([true_classes(c) for c in whole])
        fitted = share_jobs(lambda at: round(fit_temperature(logits[at], classes), 2), len(routes))
        temperatures = tuple(fitted)
    rows = RowsInOrder()
    for chunk in itertools.chain(first, chunks):
        found, true = chunk[2].argmax(-1), true_classes(chunk)
        sure, after = _confidences(chunk[2], found, confidence, temperatures)
        columns = {"classes": found, "right": found == true, "sure": sure}
        columns |= {} if after is None else {"agreement": after}
        rows.put(chunk[0], {name: torch.from_numpy(np.moveaxis(each, -1, 0)) for name, each in columns.items()})
    every = {name: np.ascontiguousarray(np.moveaxis(each.numpy(), 0, -1)) for name, each in rows.all().items()}
    if not every:
        raise no_labels_error()
    return Observations(routes, confidence, temperatures, **every)


def observe_logits(
    routes: Sequence[Route],
    logits: ndarray,
    labels: ndarray,
    confidence: str = "probability",
    temperatures: Sequence[float] | None = None,
) -> Observations:
    """What routes answer on images, from logits that are there already; `observe_routes` runs the routes for them.

    Args:
        routes: routes that gave the logits.
        logits: logits (routes, N, classes).
        labels: class (N,) of each image.
        confidence: key of `CONFIDENCES` by which routes are sure.
        temperatures: temperature of each route; None to fit them, on up to 1,000 of the images.
    """
    classes, few = logits.argmax(-1), slice(TEMPERATURE_IMAGES)
    if temperatures is None:
        temperatures = tuple(round(fit_temperature(each[few], labels[few]), 2) for each in logits)
    sure, agreement = _confidences(logits, classes, confidence, temperatures)
    right = classes == labels
    return Observations(tuple(routes), confidence, tuple(temperatures), classes, right, sure, agreement)


def join_observations(parts: Sequence[Observations]) -> Observations:
    """The observations of several routes on the same images, each of which was observed by itself.

    Args:
        parts: observations of one route or more, by the same confidence, which is not ``agreement``.
    """
    routes = tuple(route for part in parts for route in part.routes)
    temperatures = tuple(each for part in parts for each in part.temperatures)
    classes, right, sure = (np.concatenate([getattr(p, n) for p in parts]) for n in ("classes", "right", "sure"))
    return Observations(routes, parts[0].confidence, temperatures, classes, right, sure)


def _fitting_batches(logits: ndarray) -> int:
    """Number of batches, the same for any number of processes, that temperatures are fitted on."""
    most = min(math.ceil(TEMPERATURE_IMAGES / logits.shape[1]), MOST_LOGITS // logits.size)
    return max(1, most)


def _confidences(
    logits: ndarray, classes: ndarray, confidence: str, temperatures: Sequence[float]
) -> tuple[ndarray, ndarray | None]:
    """Confidence (routes, N) of routes, and behind one another (routes, routes, N) where that matters."""
    pairs = list(zip(logits, temperatures, strict=True))
    sure = np.stack([measure_confidence(each, confidence, t) for each, t in pairs]).astype(np.float32)
    if confidence != "agreement":
        return sure, None
    rows = np.arange(logits.shape[1])
    p = [probabilities(*pair) for pair in pairs]
    return sure, np.stack([np.stack([each[rows, other] for other in classes]) for each in p]).astype(np.float32)


class StageCosts:
    """A cost of routes, and of the beginnings that two of them share, which a cascade runs once.

    Args:
        alone: cost of each route.
        shared: cost (routes, routes) of the steps that two routes have in common, from the images on.
    """

    def __init__(self, alone: Sequence[float] | ndarray, shared: ndarray) -> None:
        self.alone, self.shared = np.asarray(alone, float), shared

    @classmethod
    def of(cls, walks: Sequence[Walk], cost: Callable[[Sequence[Step]], float]) -> "StageCosts":
        """Costs of routes and of their common beginnings.

        Args:
            walks: routes with their steps.
            cost: function that returns the cost of some steps in a row.
        """
        count = len(walks)
        common = np.zeros((count, count))
        for a, b in combinations(range(count), 2):
            (_, first), (_, second) = split_at_shared_cuts([walks[a], walks[b]])
            same = count_shared_steps(tuple(step.name for step in first), tuple(step.name for step in second))
            common[a, b] = common[b, a] = cost(first[:same]) if same else 0.0
        return cls([cost(steps) for _, steps in walks], common)

    def added_costs(self, routes: Sequence[int]) -> list[float]:
        """What each route of a cascade, by number, adds to the cost of those before it."""
        return [
            max(0.0, self.alone[route] - max((self.shared[route, before] for before in routes[:at]), default=0.0))
            for at, route in enumerate(routes)
        ]

    def select_routes(self, routes: Sequence[int]) -> "StageCosts":
        """The costs of some routes, by number."""
        return StageCosts(self.alone[list(routes)], self.shared[np.ix_(routes, routes)])


@dataclass(frozen=True)
class Chain:
    """Routes of a cascade by number, or one route alone, with the thresholds between them."""

    routes: tuple[int, ...]
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a chain does on some images.

    Args:
        right: whether the answer to each image is right (N,).
        reached: number of images that each route answers or passes on.
    """

    right: ndarray
    reached: tuple[int, ...]

    def mean_cost(self, stages: Sequence[float]) -> float:
        """Mean cost over the images.

        Args:
            stages: what each route adds; see `StageCosts.added_costs`.
        """
        return sum(count * stage for count, stage in zip(self.reached, stages, strict=True)) / len(self.right)


def as_cascade(observed: Observations, chain: Chain) -> Cascade | Route:
    """The cascade that a chain stands for; the route where it is one alone."""
    routes = tuple(observed.routes[route] for route in chain.routes)
    if len(routes) == 1:
        return routes[0]
    temperatures = tuple(observed.temperatures[route] for route in chain.routes[:-1])
    return Cascade(routes, chain.thresholds, observed.confidence, temperatures)


def run_chain(observed: Observations, chain: Chain) -> Outcome:
    """What a chain answers on observed images."""
    right, left, reached = np.zeros(len(observed), bool), np.ones(len(observed), bool), []
    for at, route in enumerate(chain.routes):
        reached.append(int(left.sum()))
        if at == len(chain.thresholds):
            right[left] = observed.right[route][left]
            break
        sure = observed.sure_after(route, chain.routes[at - 1] if at else None) >= chain.thresholds[at]
        right[left & sure] = observed.right[route][left & sure]
        left &= ~sure
    return Outcome(right, tuple(reached))


class Best:
    """The best chain within each of several mean costs.

    Args:
        budgets: mean costs, in rising order.
    """

    def __init__(self, budgets: ndarray) -> None:
        self.budgets = budgets
        self.scores = np.full(len(budgets), -1.0)
        self.chains: list[Chain | None] = [None] * len(budgets)

    def offer(self, routes: tuple[int, ...], costs: ndarray, right: ndarray, thresholds: Sequence[ndarray]) -> None:
        """Consider cascades of the same routes, or a route alone.

        Args:
            routes: numbers of the routes of a cascade, in its order.
            costs: mean cost of each cascade, of any shape.
            right: share of right answers, of the same shape.
            thresholds: thresholds behind the first route, and the others, each of a shape that broadcasts to that.
        """
        cheapest = np.searchsorted(self.budgets * (1 + 1e-9), costs)  # the smallest budget that each is within
        best = np.full(len(self.budgets) + 1, -1.0)
        np.maximum.at(best, cheapest.ravel(), right.ravel())
        best = np.maximum.accumulate(best)[:-1]
        for budget in np.flatnonzero(best > self.scores + 1e-12):
            at = np.argmax((cheapest <= budget) & (right >= best[budget]))
            place = np.unravel_index(at, right.shape)
            values = (np.broadcast_to(each, right.shape)[place] for each in thresholds)
            self.scores[budget] = best[budget]
            self.chains[budget] = Chain(routes, tuple(float(value) for value in values))


def search_cascades(observed: Observations, costs: StageCosts, budgets: ndarray) -> Best:
    """The chain of one, two or three routes that is right most often within each mean cost.

    All routes, all pairs with all thresholds, and all triples with thresholds at up to 64 and 256 quantiles are tried.

    Args:
        observed: what each route answers.
        costs: costs of the routes.
        budgets: mean costs, in rising order.
    """
    best, order = Best(budgets), np.argsort(costs.alone, kind="stable").tolist()
    for route in order:
        best.offer((route,), costs.alone[route], observed.right[route].mean(), ())
    for pair in combinations(order, 2):
        _offer_pair(best, observed, costs.added_costs(pair), *pair)
    for triple in combinations(order, 3):
        _offer_triple(best, observed, costs.added_costs(triple), *triple)
    return best


def _places(sure: ndarray, most: int) -> tuple[ndarray, ndarray]:
    """Numbers of images that answer, and the thresholds for that, of confidences in falling order."""
    counts = np.flatnonzero(np.diff(sure) < 0) + 1  # a threshold lies between two different confidences
    if len(counts) > most:
        counts = counts[np.linspace(0, len(counts) - 1, most).round().astype(int)]
    above, below = sure[counts - 1].astype(float), sure[counts].astype(float)
    thresholds = (above + below) / 2
    for digits in (6, 5, 4, 3, 2):  # the shortest that lies between the two
        short = thresholds.round(digits)
        thresholds = np.where((below < short) & (short <= above), short, thresholds)
    return counts, thresholds


def _offer_pair(best: Best, observed: Observations, stages: Sequence[float], first: int, second: int) -> None:
    sure, count = observed.sure[first], len(observed)
    order = np.argsort(-sure, kind="stable")
    answered, thresholds = _places(sure[order], count)
    gained = np.cumsum(observed.right[first][order]) - np.cumsum(observed.right[second][order], dtype=int)
    right = (gained[answered - 1] + observed.right[second].sum()) / count
    best.offer((first, second), stages[0] + stages[1] * (count - answered) / count, right, [thresholds])


def _offer_triple(best: Best, observed: Observations, stages: Sequence[float], *routes: int) -> None:
    """Offer cascades of three routes: images are counted once by both confidences, and the counts summed."""
    first, second, _ = routes
    count, sure, after = len(observed), observed.sure[first], observed.sure_after(second, first)
    _, one = _places(np.sort(sure)[::-1], FIRST_THRESHOLDS)
    _, two = _places(np.sort(after)[::-1], SECOND_THRESHOLDS)
    above = (
        np.searchsorted(-one, -sure.astype(float)),
        np.searchsorted(-two, -after.astype(float)),
    )  # thresholds above
    shape = len(one) + 1, len(two) + 1
    cells = np.ravel_multi_index(above, shape)
    right = observed.right[list(routes)].astype(float)

    def left_and_answered(weights: ndarray | None) -> tuple[ndarray, ndarray]:
        """Sums over the images that the first leaves, and over those of them that the second answers."""
        table = np.bincount(cells, weights, math.prod(shape)).reshape(shape)
        left = table[::-1].cumsum(0)[::-1][1:]
        return left.sum(1, keepdims=True), left.cumsum(1)[:, :-1]

    reached, by_second = left_and_answered(None)
    third_for_first, _ = left_and_answered(right[2] - right[0])
    _, second_for_third = left_and_answered(right[1] - right[2])
    cost = stages[0] + (stages[1] * reached + stages[2] * (reached - by_second)) / count
    best.offer(routes, cost, (right[0].sum() + third_for_first + second_for_third) / count, [one[:, None], two])


@dataclass(frozen=True)
class Calibrated:
    """A cascade, and what is to be expected of it on images that its thresholds were not chosen on.

    Args:
        chain: its routes by number, and thresholds, chosen on all images.
        score: share of right answers, and
        mean_cost: mean cost, by cross-validation: thresholds for the same budget, chosen on the other folds.
        standard_error: standard error of the score.
        shares: share of images that reach each route.
    """

    chain: Chain
    score: float
    mean_cost: float
    standard_error: float
    shares: tuple[float, ...]


def check_images(count: int) -> None:
    """Raise ValueError where images are too few for a calibration."""
    if count < LEAST_IMAGES:
        raise ValueError(
            f"{count} images are too few to calibrate cascades on; give at least {LEAST_IMAGES}, better 1,000"
        )


def calibrate_cascades(
    observed: Observations, costs: StageCosts, folds: int = FOLDS, budgets: Sequence[float] = ()
) -> list[Calibrated]:
    """The cascades that no route and no other cascade beats in mean cost and score, the cheapest first.

    Several processes share the folds.

    Args:
        observed: what each route answers on held-out images.
        costs: costs of the routes.
        folds: number of parts of the images for cross-validation.
        budgets: further mean costs for each of which the best cascade is searched, and kept where nothing beats it.

    Raises:
        ValueError: there are too few images.
    """
    count = len(observed)
    check_images(count)
    least, most = costs.alone.min(), costs.alone.max()
    asked = [budget for budget in budgets if least <= budget <= most]
    every = np.union1d(np.linspace(least, most, BUDGETS), asked)
    fold_of = np.random.default_rng(0).permutation(count) % folds
    right, spent = np.zeros((len(every), count)), np.zeros((len(every), folds))

    def search(fold: int) -> list[Chain | None]:  # the last is on all images, of which none is of that fold
        return search_cascades(observed.select_images(fold_of != fold), costs, every).chains

    found = share_jobs(search, folds + 1)
    for fold in range(folds):
        inside = observed.select_images(fold_of == fold)
        for budget, chain in enumerate(found[fold]):
            assert chain is not None  # the cheapest route is within every budget
            outcome = run_chain(inside, chain)
            right[budget, fold_of == fold] = outcome.right
            spent[budget, fold] = outcome.mean_cost(costs.added_costs(chain.routes)) * len(inside)
    rivals = [(cost, each.mean()) for cost, each in zip(costs.alone, observed.right, strict=True)]
    chosen: dict[Chain, Calibrated] = {}
    for budget, chain in enumerate(found[folds]):
        assert chain is not None
        if chain.thresholds and chain not in chosen:
            score, cost = right[budget].mean().item(), spent[budget].sum().item() / count
            shares = tuple(reached / count for reached in run_chain(observed, chain).reached)
            error = math.sqrt(score * (1 - score) / count)
            chosen[chain] = Calibrated(chain, score, cost, error, shares)
    kept = [each for each in chosen.values() if not any(c <= each.mean_cost and s >= each.score for c, s in rivals)]
    kept.sort(key=lambda each: (each.mean_cost, -each.score))
    front = [each for at, each in enumerate(kept) if all(each.score > before.score for before in kept[:at])]
    wanted = {found[folds][at] for at in np.searchsorted(every, asked)}
    few = {each.chain for each in _few([*front], MOST_CASCADES)} | wanted
    return [each for each in front if each.chain in few]


def _few(front: list[Calibrated], most: int) -> list[Calibrated]:
    """Some cascades of a front, without those that others stand in for at the least loss; the two ends stay."""
    while len(front) > most:
        losses = [
            (b.score - a.score) * (c.mean_cost - b.mean_cost)
            for a, b, c in zip(front, front[1:], front[2:], strict=False)
        ]
        del front[1 + losses.index(min(losses))]
    return front


def images_for_promise(agreement: float, certainty: float) -> int:
    """Least number of images with which an agreement can be promised: as many again choose what is tested.

    Args:
        agreement: share of images, below 1.
        certainty: probability, below 1, that the promise holds.
    """
    return 2 * math.ceil(math.log(1 - certainty) / math.log(agreement))


def binomial_at_most(successes: int, trials: int, probability: float) -> float:
    """Probability that at most so many of some trials succeed."""
    logs = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(probability) + (trials - k) * math.log1p(-probability)
        for k in range(successes + 1)
    )  # fmt: skip
    return min(1.0, sum(map(math.exp, logs)))


def check_promise(agreement: float, certainty: float, images: int | None = None) -> None:
    """Raise ValueError unless an agreement can be promised.

    Args:
        agreement: share of images to agree on.
        certainty: probability that the promise holds.
        images: number of images; None where it is not known yet.
    """
    if not (0 < agreement < 1 and 0 < certainty < 1):
        raise ValueError(f"{agreement=} and {certainty=} must be above 0 and below 1")
    needed = max(LEAST_IMAGES, images_for_promise(agreement, certainty))
    if images is not None and images < needed:
        raise ValueError(
            f"{images} images cannot show {agreement=} with {certainty=}; give at least {needed}, better {3 * needed}"
        )


def certify_cascade(
    observed: Observations, costs: StageCosts, reference: int, agreement: float, certainty: float
) -> tuple[Chain, float]:
    """The cheapest chain that agrees with the reference as often as promised; and its agreement where it was tested.

    One half of the images gives chains in falling order of cost. On the other half each is tested in that order, by
    the exact binomial bound, until one fails: the tests of a fixed sequence need no correction for their number
    (Learn then Test, arXiv 2110.01052). The promise is on images that are drawn as these were: with the probability
    ``certainty`` over such draws, the share of images on which chain and reference agree is at least ``agreement``.

    Args:
        observed: answers, right where they are the reference's.
        costs: costs of the routes.
        reference: number of the reference.
        agreement: share of images to agree on, from 0 to 1, below 1.
        certainty: probability that the promise holds, below 1.

    Raises:
        ValueError: there are too few images, or a number is out of range.
    """
    check_promise(agreement, certainty, len(observed))
    chosen_on = np.random.default_rng(0).permutation(len(observed)) % 2 == 0
    budgets = np.linspace(costs.alone.min(), costs.alone[reference], 4 * BUDGETS)
    chains = from_main(lambda: search_cascades(observed.select_images(chosen_on), costs, budgets).chains)
    tested, passed = observed.select_images(~chosen_on), (Chain((reference,)), 1.0)
    for chain in dict.fromkeys(reversed(chains)):
        assert chain is not None
        right = run_chain(tested, chain).right
        if binomial_at_most(int((~right).sum()), len(tested), 1 - agreement) > 1 - certainty:
            break
        passed = chain, right.mean().item()
    return passed
