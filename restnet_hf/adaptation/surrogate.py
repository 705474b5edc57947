"""Surrogate: a Gaussian process that predicts scores of routes from those of evaluated routes. No torch."""

import math
from collections.abc import Sequence

import numpy as np

from restnet_hf.routes.route import Route


LENGTH = 1.25  # length scale l of the kernel; the squared distance of two routes is typically 1
NOISE = 0.1  # share of noise in the variance of scores
STITCH = 0.3  # distance of routes that differ by one stitch of a kind; one whole anchor more or less is 1.2
LOGISTIC = 1.702  # 1 / (1 + exp(-1.702 z)) is within 0.01 of the normal distribution function


def route_features(routes: Sequence[Route], costs: np.ndarray) -> np.ndarray:
    """Features in which routes of similar scores are close to one another, (routes, features).

    One half of the squared distance is due to summaries: for each anchor the share of all its blocks, and of the
    blocks of its first, middle and last third, that run; the number of stitches of each kind (adapter, anchors and
    name; each skip and tuned anchor is a kind); and the logarithm of each cost. The other half is due to the single
    blocks.

    Args:
        routes: routes, at least one.
        costs: costs of the routes, (routes, costs), 0 or above.
    """
    depths: dict[str, int] = {}
    for segment in (segment for route in routes for segment in route.segments):
        depths[segment.anchor] = max(depths.get(segment.anchor, 1), segment.start + 1, segment.stop or 0)
    runs = {anchor: np.zeros((len(routes), depth)) for anchor, depth in depths.items()}
    kinds: dict[tuple[str | int, ...], np.ndarray] = {}
    for row, route in enumerate(routes):
        for segment in route.segments:
            runs[segment.anchor][row, segment.start : segment.stop] += 1
        if route.tuned:
            kinds.setdefault((route.adapter, "tuned", route.head), np.zeros(len(routes)))[row] += STITCH
        for stitch in route.stitch_points:
            skip = (stitch.source_cut, stitch.target_cut) if stitch.source == stitch.target else ()
            kind = (stitch.adapter, stitch.source, stitch.target, stitch.via, *skip)
            kinds.setdefault(kind, np.zeros(len(routes)))[row] += STITCH
    shares = [part.sum(1) / run.shape[1] for run in runs.values() for part in (run, *np.array_split(run, 3, 1))]
    summaries = np.column_stack([*shares, *kinds.values(), np.log(np.maximum(costs, 1e-12))])
    blocks = np.column_stack([run / math.sqrt(run.shape[1]) for run in runs.values()])
    return np.column_stack([_scale(summaries), _scale(blocks)])


def _scale(features: np.ndarray) -> np.ndarray:
    """Scale features so that the squared distance of different routes has a median of 1/2."""
    some = features[:: max(1, len(features) // 256)]
    apart = squared_distances(some, some)
    return features / math.sqrt(2 * np.median(apart[apart > 1e-9]) if (apart > 1e-9).any() else 1)


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Squared distances between the rows of two arrays, (n, features) and (m, features), as (n, m)."""
    return np.maximum((left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T, 0)


def predict(seen: np.ndarray, values: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and standard deviation of a Gaussian process at each point, (points,) each.

    Values are linear in the last feature, with an unknown slope, plus a term that is similar where the other features
    are: the kernel is exp(-d^2 / 2l^2) + tt'. The mean of the process is the mean of the values, and its variance the
    one of maximum likelihood (Rasmussen & Williams, Gaussian Processes for Machine Learning, algorithm 2.1 and
    sections 2.7 and 5.4).

    Args:
        seen: features of evaluated routes, (n, features); the last holds `standard_scores` of a predictor.
        values: scores of the evaluated routes, (n,).
        points: features of the routes to predict, (points, features).
    """
    root = np.linalg.cholesky(_kernel(seen, seen) + NOISE * np.eye(len(seen)))
    white = np.linalg.solve(root, values - values.mean())
    rows = np.linalg.solve(root, _kernel(seen, points))  # (n, points)
    variance = max(float(white @ white) / len(seen), 1e-12)  # all values may be equal
    left = 1 + points[:, -1] ** 2 - (rows**2).sum(0)
    return values.mean() + white @ rows, np.sqrt(variance * np.maximum(left, 1e-9))


def _kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    apart = squared_distances(left[:, :-1], right[:, :-1])
    return np.exp(-apart / (2 * LENGTH**2)) + np.outer(left[:, -1], right[:, -1])


def standard_scores(values: np.ndarray) -> np.ndarray:
    """Values shifted and scaled to mean 0 and variance 1; 0 where a value is not finite or all are equal."""
    finite = np.isfinite(values)
    shifted = np.where(finite, values - values[finite].mean() if finite.any() else 0.0, 0.0)
    spread = math.sqrt((shifted**2).sum() / max(finite.sum(), 1))
    return shifted / spread if spread > 1e-12 else np.zeros(len(values))


def improvement(means: np.ndarray, deviations: np.ndarray, best: float) -> np.ndarray:
    """Expected improvement over the best score, (points,); always above 0.

    Args:
        means: predicted mean of each point, (points,).
        deviations: predicted standard deviation of each point, (points,).
        best: best score so far.
    """
    return deviations / LOGISTIC * np.logaddexp(0, LOGISTIC * (means - best) / deviations)
