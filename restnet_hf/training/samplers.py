"""SAMPLERS: which routes train at a step; equal in all processes and in resumed runs. No torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from restnet_hf.routes.route import Route


class Sampler(ABC):
    """Draws the routes of each step; a draw depends on the seed, the step and `state_dict`, and on nothing else.

    Args:
        routes: routes to draw from; one that is given twice counts once.
        macs: multiply-accumulate operations of each route.
        seed: seed of the draws, 0 or above.
        **options: options of the sampler.

    Raises:
        ValueError: there are no routes, the MACs of one are missing or not finite, or an option is out of range.
    """

    in_place = False  # whether the first route of a draw teaches the others (Yu & Huang, arXiv 1903.05134)

    def __init__(self, routes: Sequence[Route], macs: Mapping[Route, float], seed: int = 0) -> None:
        self.routes, self.seed = tuple(dict.fromkeys(routes)), seed
        if not self.routes:
            raise ValueError("there are no routes to draw from; give at least one")
        unknown = [str(route) for route in self.routes if route not in macs or not math.isfinite(macs[route])]
        if unknown:
            raise ValueError(f"macs has no finite number for {unknown}; give the MACs of every route")
        self.macs = {route: macs[route] for route in self.routes}

    @abstractmethod
    def draw(self, step: int) -> list[Route]:
        """The routes that train at ``step`` (0 is the first), no route twice."""

    def update(self, saliency: Mapping[Route, float]) -> None:
        """Update the scores after a step; most samplers have none.

        Args:
            saliency: mean of abs(gradient * weight) over the weights of each route that was drawn, equal in all
                processes.

        Raises:
            ValueError: a route is not one of ``routes``, or a saliency that the sampler uses is not a finite number of
                at least 0.
        """
        others = [str(route) for route in saliency if route not in self.macs]
        if others:
            raise ValueError(f"saliency of {others}, which are not among the routes {[*map(str, self.routes)]}")

    def without(self, routes: Collection[Route]) -> "Sampler":
        """A sampler with the same state that draws from the other routes.

        Args:
            routes: routes that leave the training.

        Raises:
            ValueError: no route is left.
        """
        left = [route for route in self.routes if route not in routes]
        return type(self)(left, self.macs, self.seed, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sampler."""
        return {}

    @property
    def scores(self) -> dict[Route, float]:
        """Estimated importance of routes, the higher the more important; empty where the sampler has none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state that draws depend on besides seed and step, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Args:
            state: state that `state_dict` returned.

        Raises:
            ValueError: the state belongs to another kind of sampler, or to other routes.
        """
        if state:
            raise ValueError(f"this sampler has no state, but got {sorted(state)}; use the sampler that it came from")

    def _random(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))


class All(Sampler):
    """Every route at every step, in the order given."""

    def draw(self, step: int) -> list[Route]:
        """The routes that train at ``step`` (0 is the first), no route twice."""
        return list(self.routes)


class Sandwich(Sampler):
    """The most costly route, which teaches, the cheapest, and others at random (Yu & Huang, arXiv 1903.05134).

    Args:
        routes: routes to draw from; one that is given twice counts once.
        macs: multiply-accumulate operations of each route.
        seed: seed of the draws, 0 or above.
        extra: number of other routes in a draw, if there are so many.
    """

    in_place = True

    def __init__(self, routes: Sequence[Route], macs: Mapping[Route, float], seed: int = 0, *, extra: int = 2) -> None:
        super().__init__(routes, macs, seed)
        if extra < 0:
            raise ValueError(f"extra={extra} must be at least 0")
        self.extra = extra
        *cheaper, largest = sorted(self.routes, key=self.macs.__getitem__)
        self.ends, self.others = [largest, *cheaper[:1]], cheaper[1:]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sampler."""
        return {"extra": self.extra}

    def draw(self, step: int) -> list[Route]:
        """The routes that train at ``step`` (0 is the first), no route twice."""
        order = self._random(step).permutation(len(self.others))
        return self.ends + [self.others[index] for index in order[: self.extra]]


class OneRoute(Sampler):
    """One route, drawn with the probabilities that a subclass defines."""

    @abstractmethod
    def probabilities(self) -> np.ndarray:
        """The probability of each of ``routes``, (routes,)."""

    def draw(self, step: int) -> list[Route]:
        """The routes that train at ``step`` (0 is the first), no route twice."""
        return [self.routes[self._random(step).choice(len(self.routes), p=self.probabilities())]]


class Uniform(OneRoute):
    """One route, each with the same probability (SN-Net, arXiv 2302.06586)."""

    def probabilities(self) -> np.ndarray:
        """The same probability for each of ``routes``, (routes,)."""
        return np.full(len(self.routes), 1 / len(self.routes))


class Buckets(OneRoute):
    """One route: a bucket of MACs at random, then a route of that bucket (SN-Netv2, arXiv 2307.00154).

    Args:
        routes: routes to draw from; one that is given twice counts once.
        macs: multiply-accumulate operations of each route.
        seed: seed of the draws, 0 or above.
        buckets: number of parts of equal width of the range of MACs; parts without a route are left out.
    """

    def __init__(
        self, routes: Sequence[Route], macs: Mapping[Route, float], seed: int = 0, *, buckets: int = 8
    ) -> None:
        super().__init__(routes, macs, seed)
        if buckets < 1:
            raise ValueError(f"buckets={buckets} must be at least 1")
        self.buckets = buckets

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sampler."""
        return {"buckets": self.buckets}

    def probabilities(self) -> np.ndarray:
        """The same probability for each bucket, and within a bucket for each route, (routes,)."""
        above = np.array([self.macs[route] for route in self.routes]) - min(self.macs.values())
        parts = np.minimum(above * self.buckets // (above.max() or 1), self.buckets - 1)
        _, part, sizes = np.unique(parts, return_inverse=True, return_counts=True)
        return 1 / (len(sizes) * sizes[part])


class Importance(OneRoute):
    """One route, more often the more its weights matter to the loss (after ESTA, arXiv 2311.17352).

    A route's score is the moving average of its saliency. Of n routes, one has probability
    (1 - floor) * score / sum of scores + floor / n. Routes without a score come first,
    each with the same probability.

    Args:
        routes: routes to draw from; one that is given twice counts once.
        macs: multiply-accumulate operations of each route.
        seed: seed of the draws, 0 or above.
        decay: weight of the old average when a new value comes in, from 0 to below 1.
        floor: share of the probability that is divided equally among all routes, from 0 to 1.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        macs: Mapping[Route, float],
        seed: int = 0,
        *,
        decay: float = 0.9,
        floor: float = 0.1,
    ) -> None:
        super().__init__(routes, macs, seed)
        if not (0 <= decay < 1 and 0 <= floor <= 1):
            raise ValueError(f"decay={decay} must be from 0 to below 1, and floor={floor} from 0 to 1")
        self.decay, self.floor = decay, floor
        self._averages: dict[Route, float] = {}

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sampler."""
        return {"decay": self.decay, "floor": self.floor}

    def without(self, routes: Collection[Route]) -> "Importance":
        """A sampler with the same averages that draws from the other routes; see `Sampler.without`."""
        other = Importance([r for r in self.routes if r not in routes], self.macs, self.seed, **self.options)
        other._averages = {route: value for route, value in self._averages.items() if route not in routes}
        return other

    def probabilities(self) -> np.ndarray:
        """The probability of each of ``routes``, (routes,), as in the description of the class."""
        new = np.array([route not in self._averages for route in self.routes])
        if new.any():
            return new / new.sum()
        averages = np.array([self._averages[route] for route in self.routes])
        averages = averages / averages.max() if averages.any() else np.ones_like(averages)  # no sum that overflows
        return (1 - self.floor) * averages / averages.sum() + self.floor / len(averages)

    def update(self, saliency: Mapping[Route, float]) -> None:
        """Add the saliency of the routes of a step to their moving averages; see `Sampler.update`."""
        super().update(saliency)
        for route, value in _checked(saliency).items():
            before = self._averages.get(route, value)
            self._averages[route] = self.decay * before + (1 - self.decay) * value

    @property
    def scores(self) -> dict[Route, float]:
        """Moving average of the saliency of each route that was drawn."""
        return dict(self._averages)

    def state_dict(self) -> dict[str, Any]:
        """The moving averages, by route; None for routes that were not drawn."""
        return {"averages": {str(route): self._averages.get(route) for route in self.routes}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore moving averages; see `Sampler.load_state_dict`."""
        averages, names = state.get("averages", {}), {str(route): route for route in self.routes}
        if set(averages) != set(names):
            raise ValueError(
                f"the state belongs to {sorted(averages)}, but routes are {sorted(names)}; give the same ones"
            )
        self._averages = _checked({names[name]: value for name, value in averages.items() if value is not None})


def _checked(saliency: Mapping[Route, float]) -> dict[Route, float]:
    """Saliency as plain floats; ValueError unless all are finite and at least 0."""
    wrong = {str(route): value for route, value in saliency.items() if not 0 <= value < math.inf}
    if wrong:
        raise ValueError(f"saliency must be finite and at least 0, not {wrong}; leave out steps that overflow")
    return {route: float(value) for route, value in saliency.items()}


SAMPLERS: dict[str, type[Sampler]] = {
    "all": All,
    "uniform": Uniform,
    "sandwich": Sandwich,
    "buckets": Buckets,
    "importance": Importance,
}
