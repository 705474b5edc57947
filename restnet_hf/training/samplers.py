"""SAMPLERS: which routes train at a step; the same in every process and in a run that was resumed. No torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from restnet_hf.routes.route import Route


class Sampler(ABC):
    """Draws the routes of each step; a draw depends on the seed, the step and `state_dict`, and on nothing else.

    Args:
        routes: to draw from; one that is given twice counts once.
        macs: multiply-accumulate operations of each route.
        seed: 0 or above.
        **options: of each sampler.

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
        """Learn from a step that was made; most samplers have nothing to learn.

        Args:
            saliency: of each route that was drawn, the mean of abs(gradient * weight) over its weights. It must be the
                same in all processes.

        Raises:
            ValueError: a route is not one of ``routes``, or a saliency is not a finite number of at least 0 where the
                sampler learns from it.
        """
        others = [str(route) for route in saliency if route not in self.macs]
        if others:
            raise ValueError(f"saliency of {others}, which are not drawn from; there are {[*map(str, self.routes)]}")

    @property
    def scores(self) -> dict[Route, float]:
        """What is known of the importance of routes, the higher the more important."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What draws depend on besides seed and step; JSON can hold it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; ValueError if that was of another kind of sampler or of other routes."""
        if state:
            raise ValueError(f"this sampler has no state, but got {sorted(state)}; use the sampler that it came from")

    def _random(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))


class All(Sampler):
    """Every route at every step, in the order given."""

    def draw(self, step: int) -> list[Route]:
        return list(self.routes)


class Sandwich(Sampler):
    """The dearest route, which teaches, the cheapest, and others at random (Yu & Huang, arXiv 1903.05134).

    Args:
        routes, macs, seed: see `Sampler`.
        extra: how many others, if there are so many.
    """

    in_place = True

    def __init__(self, routes: Sequence[Route], macs: Mapping[Route, float], seed: int = 0, *, extra: int = 2) -> None:
        super().__init__(routes, macs, seed)
        if extra < 0:
            raise ValueError(f"extra={extra} must be at least 0")
        self.extra = extra
        *cheaper, dearest = sorted(self.routes, key=self.macs.__getitem__)
        self.ends, self.others = [dearest, *cheaper[:1]], cheaper[1:]

    def draw(self, step: int) -> list[Route]:
        order = self._random(step).permutation(len(self.others))
        return self.ends + [self.others[index] for index in order[: self.extra]]


class OneRoute(Sampler):
    """One route, by the probabilities that a subclass gives."""

    @abstractmethod
    def probabilities(self) -> np.ndarray:
        """Of each of ``routes``, (routes,)."""

    def draw(self, step: int) -> list[Route]:
        return [self.routes[self._random(step).choice(len(self.routes), p=self.probabilities())]]


class Uniform(OneRoute):
    """One route, each with the same probability (SN-Net, arXiv 2302.06586)."""

    def probabilities(self) -> np.ndarray:
        return np.full(len(self.routes), 1 / len(self.routes))


class Buckets(OneRoute):
    """One route: a part of the range of MACs at random, then a route of that part (SN-Netv2, arXiv 2307.00154).

    Args:
        routes, macs, seed: see `Sampler`.
        buckets: into how many parts of equal width the range is divided; parts without a route are left out.
    """

    def __init__(
        self, routes: Sequence[Route], macs: Mapping[Route, float], seed: int = 0, *, buckets: int = 8
    ) -> None:
        super().__init__(routes, macs, seed)
        if buckets < 1:
            raise ValueError(f"buckets={buckets} must be at least 1")
        self.buckets = buckets

    def probabilities(self) -> np.ndarray:
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
        routes, macs, seed: see `Sampler`.
        decay: how much of the average stays when a new value comes in, from 0 to below 1.
        floor: share of the probability that all routes have in equal parts, from 0 to 1.
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

    def probabilities(self) -> np.ndarray:
        new = np.array([route not in self._averages for route in self.routes])
        if new.any():
            return new / new.sum()
        averages = np.array([self._averages[route] for route in self.routes])
        averages = averages / averages.max() if averages.any() else np.ones_like(averages)  # no sum that overflows
        return (1 - self.floor) * averages / averages.sum() + self.floor / len(averages)

    def update(self, saliency: Mapping[Route, float]) -> None:
        super().update(saliency)
        for route, value in _checked(saliency).items():
            before = self._averages.get(route, value)
            self._averages[route] = self.decay * before + (1 - self.decay) * value

    @property
    def scores(self) -> dict[Route, float]:
        return dict(self._averages)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": {str(route): self._averages.get(route) for route in self.routes}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        averages, names = state.get("averages", {}), {str(route): route for route in self.routes}
        if set(averages) != set(names):
            raise ValueError(f"the state is of {sorted(averages)}, but routes are {sorted(names)}; give the same ones")
        self._averages = _checked({names[name]: value for name, value in averages.items() if value is not None})


def _checked(saliency: Mapping[Route, float]) -> dict[Route, float]:
    """As plain floats; ValueError unless all are finite and at least 0."""
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
