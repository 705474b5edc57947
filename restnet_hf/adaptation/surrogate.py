"""What routes that were not evaluated would score, guessed from those that were: a Gaussian process. No torch."""

import math
from collections.abc import Sequence

import numpy as np

from restnet_hf.routes.route import Route


LENGTH = 1.25  # l; the squared distance of two routes is typically 1
NOISE = 0.1  # share of the variance of scores that is chance
STITCH = 0.3  # how far apart routes are that differ by one stitch of a kind; one whole anchor more or less is 1.2
LOGISTIC = 1.702  # 1 / (1 + exp(-1.702 z)) is within 0.01 of the normal distribution function


def route_features(routes: Sequence[Route], costs: np.ndarray) -> np.ndarray:
    """Numbers in which routes of similar scores are near one another, (routes, features).

    One half of the squared distance is of what is alike in far routes too: of each anchor the share of all its blocks,
    and of those of its first, middle and last third, that run; how many stitches of each kind there are (whose,
    between which anchors, of which name; each skip is a kind); and the logarithm of each cost. The other half is of
    each block.

    Args:
        routes: at least one.
        costs: (routes, costs), 0 or above.
    """
    depths: dict[str, int] = {}
    for segment in (segment for route in routes for segment in route.segments):
        depths[segment.anchor] = max(depths.get(segment.anchor, 1), segment.start + 1, segment.stop or 0)
    runs = {anchor: np.zeros((len(routes), depth)) for anchor, depth in depths.items()}
    kinds: dict[tuple[str | int, ...], np.ndarray] = {}
    for row, route in enumerate(routes):
        for segment in route.segments:
            runs[segment.anchor][row, segment.start : segment.stop] += 1
        for stitch in route.stitch_points:
            skip = (stitch.source_cut, stitch.target_cut) if stitch.source == stitch.target else ()
            kind = (stitch.adapter, stitch.source, stitch.target, stitch.via, *skip)
            kinds.setdefault(kind, np.zeros(len(routes)))[row] += STITCH
    shares = [part.sum(1) / run.shape[1] for run in runs.values() for part in (run, *np.array_split(run, 3, 1))]
    alike = np.column_stack([*shares, *kinds.values(), np.log(np.maximum(costs, 1e-12))])
    blocks = np.column_stack([run / math.sqrt(run.shape[1]) for run in runs.values()])
    return np.column_stack([_scaled(alike), _scaled(blocks)])


def _scaled(features: np.ndarray) -> np.ndarray:
    """So that the squared distance of routes that differ has a median of 1/2."""
    some = features[:: max(1, len(features) // 256)]
    apart = squared_distances(some, some)
    return features / math.sqrt(2 * np.median(apart[apart > 1e-9]) if (apart > 1e-9).any() else 1)


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each row of (n, features) to each of (m, features), (n, m)."""
    return np.maximum((left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T, 0)


def predicted(seen: np.ndarray, values: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a Gaussian process expects at each point, and by how much that may be off (one standard deviation).

    Values follow a straight line over the last feature, whose slope is not known, and beside it are alike where the
    other features are: the kernel is exp(-d^2 / 2l^2) + tt'. Its mean is that of the values, and its variance the one
    that makes the values likeliest (Rasmussen & Williams, Gaussian Processes for Machine Learning, algorithm 2.1 and
    sections 2.7 and 5.4).

    Args:
        seen: features of what was evaluated, (n, features); the last is of `standard_scores`, what a predictor says.
        values: of that, (n,).
        points: features of what is asked about, (points, features).
    """
    root = np.linalg.cholesky(_kernel(seen, seen) + NOISE * np.eye(len(seen)))
    white = np.linalg.solve(root, values - values.mean())
    rows = np.linalg.solve(root, _kernel(seen, points))  # (n, points)
    variance = max(float(white @ white) / len(seen), 1e-12)  # all values may be the same
    left = 1 + points[:, -1] ** 2 - (rows**2).sum(0)
    return values.mean() + white @ rows, np.sqrt(variance * np.maximum(left, 1e-9))


def _kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    apart = squared_distances(left[:, :-1], right[:, :-1])
    return np.exp(-apart / (2 * LENGTH**2)) + np.outer(left[:, -1], right[:, -1])


def standard_scores(values: np.ndarray) -> np.ndarray:
    """Of mean 0 and variance 1; 0 for values that are not finite, which say nothing, and for all that are the same."""
    known = np.isfinite(values)
    off = np.where(known, values - values[known].mean() if known.any() else 0.0, 0.0)
    spread = math.sqrt((off**2).sum() / max(known.sum(), 1))
    return off / spread if spread > 1e-12 else np.zeros(len(values))


def improvement(means: np.ndarray, deviations: np.ndarray, best: float) -> np.ndarray:
    """By how much points of these means and deviations are expected to exceed ``best``, (points,); always above 0."""
    return deviations / LOGISTIC * np.logaddexp(0, LOGISTIC * (means - best) / deviations)
