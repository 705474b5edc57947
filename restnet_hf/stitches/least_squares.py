"""The streaming least-squares fit of stitches: all of them in one pass over each anchor."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.routes.route import StitchPoint
from restnet_hf.stitches.layers import Stitch


ROWS_AT_ONCE = 16384  # rows of float64 features that are processed at a time
MAX_POSITIONS = 256  # of each image that a stitch is fitted on; more add little information at the same cost each
RIDGE = 1e-6  # relative to the mean variance: far below that of real features, far above float64 rounding


class LeastSquares:
    """Affine regression of rows Y (M, D) on rows X (M, C) that arrive in batches.

    The means and the centred second moments are accumulated in float64 by the pairwise update of Chan, Golub and
    LeVeque (1983), so an offset of the features costs no digits and memory does not grow with the data.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.moments: Any = None

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (M, C) and y (M, D)."""
        for rows_x, rows_y in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
            self._merge(rows_x.double(), rows_y.double())

    def _merge(self, x: Tensor, y: Tensor) -> None:
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        new = (mean_x, mean_y, x.T @ x, x.T @ y, y.square().sum(0))
        if self.moments is None:
            self.rows, self.moments = len(x), new
            return
        rows = self.rows + len(x)
        old_x, old_y, xx, xy, yy = self.moments
        step_x, step_y, share = mean_x - old_x, mean_y - old_y, self.rows * len(x) / rows
        self.moments = (
            old_x + step_x * (len(x) / rows),
            old_y + step_y * (len(x) / rows),
            xx.add_(new[2]).addr_(step_x, step_x, alpha=share),
            xy.add_(new[3]).addr_(step_x, step_y, alpha=share),
            yy.add_(new[4]).add_(step_y.square(), alpha=share),
        )
        self.rows = rows

    def solve(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor, float]:
        """Weight (D, C) and bias (D,) in float64, and R², the share of Y's variance that they explain.

        Args:
            ridge: value added to the diagonal of XᵀX, relative to the diagonal's mean.

        Raises:
            ValueError: there were no rows, or the features were not finite.
        """
        if self.moments is None:
            raise ValueError("no features to fit a stitch on: the calibration set is empty")
        mean_x, mean_y, xx, xy, yy = self.moments
        if not (xx.isfinite().all() and xy.isfinite().all() and yy.isfinite().all()):
            raise ValueError("features hold NaN or infinite values")
        total = yy.sum().item()
        if xx.numel() == 0 or not xx.diagonal().any():  # only a constant can be fitted
            return xy.T.new_zeros(len(yy), len(xx)), mean_y, 0.0
        weight = _solve_spd(xx, xy, ridge * xx.diagonal().mean().item())
        residual = total - 2 * (weight * xy).sum().item() + (weight * (xx @ weight)).sum().item()
        r2 = 1 - residual / total if total > 0 else 1.0
        return weight.T, mean_y - mean_x @ weight, r2


def _solve_spd(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve by Cholesky, with ten times the ridge as long as the matrix is singular to rounding."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    floor = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal().max().item()
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * eye)
        if not failed:
            return torch.cholesky_solve(right, factor)
        ridge = max(10 * ridge, floor)


@torch.no_grad()
def fit_stitches(
    stitches: Mapping[StitchPoint, Stitch],
    anchors: Mapping[str, Anchor],
    images: Iterable[Mapping[str, Tensor]],
    ridge: float = RIDGE,
) -> dict[str, float]:
    """Set the weights of stitches to the least-squares solution, all of them in one pass over each anchor.

    Each stitch is fitted to the activation that it replaces (SN-Net, arXiv 2302.06586, equation 3). A stitch at
    several points is fitted on the activations of all of them.

    Args:
        stitches: stitches to fit, by stitch point.
        anchors: mapping from names to anchors.
        images: batches of images by anchor name, each anchor's in its own preprocessing.
        ridge: regularisation relative to the mean variance; see `LeastSquares.solve`.

    Returns:
        R² of each stitch's map of positions on the calibration images, by stitch name.

    Raises:
        ValueError: no images, or features that are not finite (the message names the stitch).
    """
    points: dict[str, list[StitchPoint]] = {}
    for point, stitch in stitches.items():
        target_cut = point.target_cut if stitch.target_cut is None else stitch.target_cut
        if stitch.problems():
            points.setdefault(point.name, []).append(replace(point, target_cut=target_cut))
    jobs = [
        (name, problem, LeastSquares())
        for name, stitch in {point.name: stitch for point, stitch in stitches.items()}.items()
        for problem in stitch.problems()
    ]
    cuts: dict[str, set[int | None]] = {}
    for point in chain.from_iterable(points.values()):
        cuts.setdefault(point.source, set()).add(point.source_cut)
        cuts.setdefault(point.target, set()).add(point.target_cut)
    start = 0
    for batch in images:
        features = {name: anchors[name].capture(batch[name], some) for name, some in cuts.items()}
        for point, problem, sums in ((point, *job[1:]) for job in jobs for point in points[job[0]]):
            source = features[point.source][point.source_cut]
            target = features[point.target][point.target_cut]
            chosen = problem.chosen(len(source), MAX_POSITIONS, start)
            sums.update(problem.inputs(source, chosen).flatten(0, 1), problem.outputs(target, chosen).flatten(0, 1))
        start += len(next(iter(batch.values())))
    r2: dict[str, float] = {}
    solutions = []
    for name, problem, sums in jobs:  # nothing is assigned before everything is solved
        try:
            weight, bias, explained = sums.solve(ridge)
        except ValueError as error:
            raise ValueError(f"stitch '{name}' cannot be fitted: {error}") from error
        solutions.append((problem, weight, bias))
        r2.setdefault(name, explained)
    for problem, weight, bias in solutions:
        problem.assign(weight, bias)
    return r2
