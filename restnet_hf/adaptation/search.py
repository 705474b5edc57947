"""SEARCHES: find the best routes under budgets with few evaluations; costs and scores are passed in. No torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from restnet_hf.adaptation.neighbours import Neighbours
from restnet_hf.adaptation.surrogate import improvement, predict, route_features, squared_distances, standard_scores
from restnet_hf.routes.profile import AnyProfiled, Budget, Profile, ProfiledRoute
from restnet_hf.routes.route import Route


NEAR = 0.8  # share of a budget from which on a cost is close to it
Costs = Callable[[Route], Mapping[str, float]]
Scores = Callable[[Sequence[Route]], Mapping[Route, float]]
Predictor = Callable[[Route], float | None]


@dataclass(frozen=True)
class Rejected:
    """A candidate that was not chosen for a budget.

    Args:
        route: the candidate that was rejected.
        why: kind of the reason.
        detail: reason in words, with the numbers.
    """

    route: Route
    why: Literal["over budget", "worse", "not evaluated"]
    detail: str


@dataclass(frozen=True)
class SearchResult:
    """What a search returns.

    Args:
        best: for each budget, the evaluated route of the highest score within the budget; where none was evaluated,
            the route of the most MACs within the budget, without a score.
        rows: all candidates with their costs; the evaluated ones come first, in order of evaluation, with their score.
        score: key of the score.
        finished: whether the search ended by itself; False after an interrupt, from which `Search.run` goes on.
    """

    best: Mapping[Budget, ProfiledRoute]
    rows: tuple[ProfiledRoute, ...]
    score: str
    finished: bool

    @property
    def evaluated(self) -> tuple[ProfiledRoute, ...]:
        """The rows with a score, in the order of evaluation."""
        return tuple(row for row in self.rows if self.score in row.scores)

    def pareto(self, cost: str = "macs") -> tuple[ProfiledRoute, ...]:
        """The evaluated routes that no other beats in both cost and score, the cheapest first.

        Args:
            cost: name of the cost.
        """
        return Profile(self.evaluated).pareto(cost, self.score)

    def rejected(self, budget: Budget, best: AnyProfiled | None = None) -> list[Rejected]:
        """All candidates but the best one for a budget, with the reasons.

        Args:
            budget: one of the budgets of the search.
            best: row that was chosen; by default that of the search.
        """
        chosen = self.best[budget] if best is None else best
        return [self._reason(row, chosen, budget) for row in self.rows if row.route != chosen.route]

    def _reason(self, row: ProfiledRoute, best: AnyProfiled, budget: Budget) -> Rejected:
        over = [
            f"{c}={row.costs[c]:g} is over {limit:g}" for c, limit in budget.limits.items() if row.costs[c] > limit
        ]
        if over:
            return Rejected(row.route, "over budget", ", ".join(over))
        if self.score not in row.scores:
            return Rejected(row.route, "not evaluated", f"the search stopped before its {self.score} was known")
        than = f"'{best.route}' has {best.scores[self.score]:g}"
        return Rejected(row.route, "worse", f"{self.score}={row.scores[self.score]:g}, {than}")


class Search(ABC):
    """Evaluates candidates, a batch at a time, until none is left or the limit is reached.

    Iterating yields the rows of each batch when it was evaluated. A search can be stopped at any time and resumed, in
    this process or from `state_dict`, and then evaluates the same routes as without the stop. Several budgets share
    evaluations.

    Args:
        candidates: routes to search; one that is given twice counts once.
        costs: function that returns the costs of a route, called once for each candidate. Routes over all budgets are
            not evaluated.
        scores: function that returns the score of each route of a batch, the higher the better; no route is scored
            twice.
        budgets: one budget or several.
        max_evaluations: largest number of routes to evaluate; None for all that fit a budget.
        seed: seed of random draws, 0 or above.
        score: key of the scores in the result.
        batch_size: number of routes that are evaluated at a time.
        **options: options of the search.

    Raises:
        BudgetError: no candidate fits one of the budgets (the message names the cheapest), or a cost is missing.
        ValueError: there are no candidates or no budgets, or an option is out of range.
    """

    def __init__(
        self,
        candidates: Iterable[Route],
        costs: Costs,
        scores: Scores,
        budgets: Budget | Sequence[Budget],
        *,
        max_evaluations: int | None = None,
        seed: int = 0,
        score: str = "accuracy",
        batch_size: int = 32,
    ) -> None:
        self.budgets = (budgets,) if isinstance(budgets, Budget) else tuple(dict.fromkeys(budgets))
        self.costs = {route: costs(route) for route in dict.fromkeys(candidates)}
        if not self.costs or not self.budgets:
            raise ValueError(
                f"got {len(self.costs)} candidates and {len(self.budgets)} budgets; give at least one each"
            )
        if batch_size < 1 or (max_evaluations is not None and max_evaluations < 1):
            raise ValueError(f"batch_size={batch_size} and max_evaluations={max_evaluations} must be at least 1")
        self.scores, self.score, self.batch_size = scores, score, batch_size
        self.routes = tuple(self.costs)
        limits = [budget.limits for budget in self.budgets]
        limited = dict.fromkeys(cost for each in limits for cost in each)
        most = np.array([[[each.get(cost, math.inf) for cost in limited]] for each in limits])
        self._costs = np.array([[each.get(cost, math.nan) for cost in limited] for each in self.costs.values()])
        self.fits = np.all(self._costs <= most, axis=2)  # (budgets, candidates)
        self.shares = np.max(self._costs / most, axis=2)  # (budgets, candidates), share of the closest limit
        for budget, fits in zip(self.budgets, self.fits, strict=True):
            if not fits.any():  # this raises, with the cheapest route
                Profile(tuple(ProfiledRoute(route, each) for route, each in self.costs.items())).best(budget)
        unknown = [str(self.routes[index]) for index in np.flatnonzero(~np.isfinite(self.shares).all(axis=0))]
        if unknown:
            raise ValueError(f"costs gave no finite number for {unknown}; leave out routes whose cost is not known")
        self.max_evaluations = len(self.routes) if max_evaluations is None else max_evaluations
        self._found: dict[int, float] = {}  # score by index of the candidate, in the order of evaluation
        self._pending: list[int] = []
        self._random = np.random.default_rng(seed)

    @abstractmethod
    def _propose(self, unseen: np.ndarray, most: int) -> list[int]:
        """Indices of the candidates to evaluate next: one to ``most`` in the mask ``unseen``, (candidates,)."""

    @property
    def _unseen(self) -> np.ndarray:
        """Mask of the candidates that fit a budget and were not evaluated, (candidates,)."""
        unseen = np.array(self.fits.any(axis=0))
        unseen[[*self._found]] = False
        return unseen

    def __iter__(self) -> Iterator[list[ProfiledRoute]]:
        while rows := self.step():
            yield rows

    def step(self) -> list[ProfiledRoute]:
        """Evaluate the next batch; empty when the search is over.

        Raises:
            ValueError: ``scores`` left out a route or returned a score that is not a finite number.
        """
        unseen, before = self._unseen, self._random.bit_generator.state
        most = max(0, min(self.max_evaluations - len(self._found), int(unseen.sum())))
        self._pending = [index for index in self._pending if unseen[index]][:most]
        if most and not self._pending:
            try:
                self._pending = self._propose(unseen, most)
            except BaseException:  # after an interrupt the next step must draw the same
                self._random.bit_generator.state = before
                raise
        if not self._pending:
            return []
        batch = [self.routes[index] for index in self._pending]
        scores = self.scores(batch)
        wrong = [str(route) for route in batch if not math.isfinite(scores.get(route, math.nan))]
        if wrong:
            raise ValueError(f"scores gave no finite number for {wrong}; it must score every route it is given")
        self._found = self._found | {index: float(scores[self.routes[index]]) for index in self._pending}
        done, self._pending = self._pending, []
        return [self._row(index) for index in done]

    def run(self, callback: Callable[[list[ProfiledRoute]], object] | None = None) -> SearchResult:
        """Search to the end; KeyboardInterrupt ends the search early with the best route so far.

        Args:
            callback: function that is called with the rows of each batch.
        """
        try:
            for rows in self:
                if callback is not None:
                    callback(rows)
        except KeyboardInterrupt:
            return self.result(finished=False)
        return self.result()

    def result(self, finished: bool = True) -> SearchResult:
        """The result so far.

        Args:
            finished: whether the search ended by itself.
        """
        best = {}
        for budget, fits in zip(self.budgets, self.fits, strict=True):
            within = [index for index in self._found if fits[index]] or [*np.flatnonzero(fits)]
            best[budget] = Profile(tuple(map(self._row, within))).best_route(budget, self.score)
        order = dict.fromkeys([*self._found, *range(len(self.routes))])
        return SearchResult(best, tuple(map(self._row, order)), self.score, finished)

    def _row(self, index: int) -> ProfiledRoute:
        scores = {self.score: self._found[index]} if index in self._found else {}
        return ProfiledRoute(self.routes[index], self.costs[self.routes[index]], scores)

    def state_dict(self) -> dict[str, Any]:
        """The state of the search, as JSON can hold it."""
        return {
            "search": type(self).__name__,
            "found": {str(self.routes[index]): score for index, score in self._found.items()},
            "pending": [str(self.routes[index]) for index in self._pending],
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state; budgets and costs may be others, and evaluated routes are not evaluated again.

        Args:
            state: state that `state_dict` returned.

        Raises:
            ValueError: the state belongs to another kind of search or other candidates, or is invalid.
        """
        names = {str(route): index for index, route in enumerate(self.routes)}
        try:
            if state["search"] != type(self).__name__:
                raise ValueError(f"it belongs to {state['search']}, not to {type(self).__name__}")
            if others := sorted({*state["found"], *state["pending"]} - names.keys()):
                raise ValueError(f"it holds {others}, which are not among the candidates")
            found = {names[name]: float(score) for name, score in state["found"].items()}
            if not all(map(math.isfinite, found.values())):
                raise ValueError("it holds scores that are not finite")
            pending = [names[name] for name in state["pending"]]
            self._random.bit_generator.state = state["random"]
        except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
            raise ValueError(f"this search cannot go on from that state: {error}; use the one it came from") from error
        self._found, self._pending = found, pending


class Exhaustive(Search):
    """Evaluates every route that fits a budget; routes with the same beginning are in the same batch."""

    @cached_property
    def _sorted(self) -> list[int]:
        return sorted(range(len(self.routes)), key=lambda index: _from_the_image_on(self.routes[index]))

    def _propose(self, unseen: np.ndarray, most: int) -> list[int]:
        return [index for index in self._sorted if unseen[index]][: min(most, self.batch_size)]


def _from_the_image_on(route: Route) -> tuple[Any, ...]:
    return route.adapter, [(s.anchor, s.start, math.inf if s.stop is None else s.stop) for s in route.segments]


class Ranked(Search):
    """Evaluates the routes that a predictor ranks first, for each budget in turn.

    Args:
        *args: candidates, costs, scores and budgets, as in `Search`.
        predictor: function that returns a prediction for a route, the higher the better, such as ``Similarity.value``
            of a selector or the score on a few images. Routes with None or NaN come last.
        **options: other options of `Search`.
    """

    def __init__(self, *args: Any, predictor: Predictor, **options: Any) -> None:
        super().__init__(*args, **options)
        values = _predictions(predictor, self.routes)
        self.predicted = np.where(np.isnan(values), -math.inf, values)

    def _propose(self, unseen: np.ndarray, most: int) -> list[int]:
        chosen: list[int] = []
        for turn in range(len(self._found), len(self._found) + min(most, self.batch_size)):
            within = unseen & self.fits[turn % len(self.budgets)]
            left = np.flatnonzero(within if within.any() else unseen)
            chosen.append(int(left[self.predicted[left].argmax()]))
            unseen[chosen[-1]] = False
        return chosen


def _predictions(predictor: Predictor, routes: Sequence[Route]) -> np.ndarray:
    """Predictions for routes, NaN where there is none, (routes,)."""
    return np.array([math.nan if (value := predictor(route)) is None else value for route in routes], dtype=float)


class Evolution(Search):
    """Evolution after AdaptiveNet's search on the device (arXiv 2303.07129), with a surrogate before each evaluation.

    The first fifth of the evaluated routes cost nearly as much as a budget allows. After them, parents are drawn from
    the best quarter of the routes that fit a budget, the better the more often. In a child a stitch or a skip is
    added, removed, moved or changed in length. Where a child is over the budget, a second change compensates for the
    first. One child in ten is any candidate. Those children are evaluated for which a Gaussian process on the
    evaluated routes predicts the largest improvement, summed over the budgets.

    Unlike in AdaptiveNet there is no crossover, and no route over all budgets is evaluated.

    Args:
        *args: candidates, costs, scores and budgets, as in `Search`.
        predictor: function that returns a prediction for a route, the higher the better; None and NaN stand for no
            prediction. The search learns how reliable the predictions are.
        children: number of children that are drawn for each batch; where fewer candidates are left, all of them.
        **options: other options of `Search`. By default ``batch_size`` is a third of the root of the number of
            evaluations, from 1 to 32: smaller batches are chosen with more knowledge.
    """

    def __init__(
        self, *args: Any, predictor: Predictor = lambda route: None, children: int = 1024, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if children < 1:
            raise ValueError(f"children={children} must be at least 1")
        total = min(self.max_evaluations, int(self._unseen.sum()))
        self.batch_size = options.get("batch_size", min(max(1, math.isqrt(total) // 3), 32))
        self.children, self.population = children, min(max(4, total // 5), 100)
        self._neighbours = Neighbours(self.routes)
        features, values = route_features(self.routes, self._costs), _predictions(predictor, self.routes)
        values[~self.fits.any(axis=0)] = math.nan  # only routes that fit a budget are compared
        self._features = np.column_stack([features, standard_scores(values)])

    def _propose(self, unseen: np.ndarray, most: int) -> list[int]:
        if len(self._found) < self.population:
            return self._first(unseen, min(most, self.population - len(self._found)))
        return self._screen(self._children(unseen), min(most, self.batch_size))

    def _first(self, unseen: np.ndarray, count: int) -> list[int]:
        """Different routes close to each budget in turn: of 8 close ones the one farthest from those chosen."""
        chosen: list[int] = []
        turns = np.linspace(0, len(self.budgets) - 1, min(count, len(self.budgets))).round().astype(int)
        for number in range(count):
            turn = turns[number % len(turns)]
            within = np.flatnonzero(unseen & self.fits[turn])
            within = within if len(within) else np.flatnonzero(unseen)
            near = within[self.shares[turn, within] > NEAR]
            few = self._random.permutation(near if len(near) else within)[:8]
            apart = squared_distances(self._features[few], self._features[chosen])
            chosen.append(int(few[apart.min(1, initial=math.inf).argmax()]))
            unseen[chosen[-1]] = False
        return chosen

    def _children(self, unseen: np.ndarray) -> np.ndarray:
        """Children to choose from, for each budget in turn; all unseen candidates where these are few."""
        left = np.flatnonzero(unseen)
        if len(left) <= self.children:
            return left
        parents = [self._parents(fits) for fits in self.fits]
        born: dict[int, None] = {}
        for number in range(self.children):
            budget = number % len(self.budgets)
            child = self.child(parents[budget], budget) if parents[budget] and self._random.random() > 0.1 else None
            child = self._draw(left) if child is None else child
            if unseen[child]:
                born[child] = None
        return np.array([*born] or left)

    def _parents(self, fits: np.ndarray) -> list[int]:
        """The best quarter of the evaluated routes within a budget, the best first; at least 4 if possible."""
        fitting = sorted((i for i in self._found if fits[i]), key=self._found.__getitem__, reverse=True)
        return fitting[: max(4, len(fitting) // 4)]

    def child(self, parents: Sequence[int], budget: int) -> int | None:
        """Draw a candidate within a budget that differs from a parent by one or two changes.

        Args:
            parents: indices of candidates, the best first; better ones are drawn more often.
            budget: index of the budget.

        Returns:
            Index of the candidate; None where the draw led to none.
        """
        parent = parents[int(len(parents) * self._random.random() ** 2)]
        changed = self._neighbours.of(parent)
        mutant = self._draw(changed) if len(changed) else None
        if mutant is None or self.fits[budget, mutant]:
            return mutant
        compensated = self._neighbours.of(mutant)
        within = compensated[self.fits[budget, compensated]]
        return self._draw(within) if len(within) else None

    def _draw(self, numbers: np.ndarray) -> int:
        return int(numbers[int(len(numbers) * self._random.random())])

    def _screen(self, children: np.ndarray, count: int) -> list[int]:
        """The children of the largest predicted improvement, summed over the budgets that they fit."""
        seen = np.array([*self._found][-512:])  # more would cost more time than they are worth
        values = np.array([self._found[index] for index in seen])
        means, deviations = predict(self._features[seen], values, self._features[children])
        best = [values[fits[seen]].max(initial=values.min()) for fits in self.fits]
        gains = [improvement(means, deviations, value) for value in best]
        order = np.argsort(-(self.fits[:, children] * gains).sum(axis=0), kind="stable")
        return [int(index) for index in children[order[:count]]]


SEARCHES: dict[str, type[Search]] = {"exhaustive": Exhaustive, "evolution": Evolution, "ranked": Ranked}
