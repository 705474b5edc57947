"""The streaming least-squares fit of stitches: all of them in one pass over each anchor, which processes share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.shares import OwnBatch, own_batches
from restnet_hf.distributed import (
    Own,
    add_up,
    divide_jobs,
    gather,
    send_from,
    send_sum_to,
    this_process,
)
from restnet_hf.routes.route import Route, StitchPoint
from restnet_hf.stitches.layers import Chosen, Problem, Stitch
from restnet_hf.stitches.precision import make_trainable, trained_dtype


ROWS_AT_ONCE = 16384  # rows of float64 features that are processed at a time
MAX_POSITIONS = 256  # of each image that a stitch is fitted on; more add little information at the same cost each
RIDGE = 1e-6  # relative to the mean variance: far below that of real features, far above float64 rounding
AUTO = "auto"  # the best of `RIDGES` on held-out images
RIDGES = (RIDGE, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MARGIN = 1e-4  # of R², by which a larger ridge must be better to be taken
HELD_OUT = 5  # every fifth image, from the second on, is held out
ROWS_PER_CHANNEL = 2  # below which a fit is warned of
logger = logging.get_logger(__name__)


class Moments(NamedTuple):
    """Number of rows x (M, C) and y (M, D), their means, and their second moments about these, in float64."""

    rows: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Moments":
        """The moments of rows x (M, C) and y (M, D)."""
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        return cls(len(x), mean_x, mean_y, x.T @ x, x.T @ y, y.square().sum(0))


class LeastSquares:
    """Affine regression of rows Y (M, D) on rows X (M, C) that arrive in batches.

    The means and the centred second moments are accumulated in float64 by the pairwise update of Chan, Golub and
    LeVeque (1983), so an offset of the features costs no digits and memory does not grow with the data.
    """

    def __init__(self) -> None:
        self.moments: Moments | None = None

    @property
    def rows(self) -> int:
        """The number of rows."""
        return 0 if self.moments is None else self.moments.rows

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (M, C) and y (M, D)."""
        for rows_x, rows_y in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
            if len(rows_x):
                self.merge(Moments.of(rows_x.double(), rows_y.double()))

    def merge(self, new: Moments | None) -> None:
        """Add the rows of other moments; None for no rows."""
        old = self.moments
        if old is None or new is None:
            self.moments = old or new
            return
        rows = old.rows + new.rows
        step_x, step_y, share = new.mean_x - old.mean_x, new.mean_y - old.mean_y, old.rows * new.rows / rows
        self.moments = Moments(
            rows,
            old.mean_x + step_x * (new.rows / rows),
            old.mean_y + step_y * (new.rows / rows),
            old.xx.add_(new.xx).addr_(step_x, step_x, alpha=share),
            old.xy.add_(new.xy).addr_(step_x, step_y, alpha=share),
            old.yy.add_(new.yy).add_(step_y.square(), alpha=share),
        )

    def shift(self, rows: int, mean_x: Tensor, mean_y: Tensor) -> None:
        """Make these moments a part of the moments of more rows: those of all parts add up.

        Args:
            rows: number of all rows.
            mean_x: mean (C,) of all x.
            mean_y: mean (D,) of all y.
        """
        old = self.moments
        if old is None:
            c, d = len(mean_x), len(mean_y)
            zeros = (mean_x.new_zeros(shape) for shape in ((c, c), (c, d), (d,)))
            self.moments = Moments(rows, mean_x, mean_y, *zeros)
            return
        step_x, step_y = old.mean_x - mean_x, old.mean_y - mean_y
        self.moments = Moments(
            rows,
            mean_x,
            mean_y,
            old.xx.addr_(step_x, step_x, alpha=old.rows),
            old.xy.addr_(step_x, step_y, alpha=old.rows),
            old.yy.add_(step_y.square(), alpha=old.rows),
        )

    def weights(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """Weight (D, C) and bias (D,) in float64.

        Args:
            ridge: value added to the diagonal of XᵀX, relative to the diagonal's mean.

        Raises:
            ValueError: there were no rows, or the features were not finite.
        """
        if self.moments is None:
            raise ValueError("no features to fit a stitch on: the calibration set is empty")
        _, mean_x, mean_y, xx, xy, _ = self.moments
        if not (xx.isfinite().all() and xy.isfinite().all() and self.moments.yy.isfinite().all()):
            raise ValueError("features hold NaN or infinite values")
        if xx.numel() == 0 or not xx.diagonal().any():  # only a constant can be fitted
            return xy.T.new_zeros(xy.shape[1], len(xx)), mean_y
        weight = _solve_spd(xx, xy, ridge * xx.diagonal().mean().item())
        return weight.T, mean_y - mean_x @ weight

    def solve(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor, float]:
        """Weight (D, C) and bias (D,) in float64, and R² on the same rows; see `weights` and `r2`."""
        weight, bias = self.weights(ridge)
        return weight, bias, self.r2(weight, bias)

    def r2(self, weight: Tensor, bias: Tensor, baseline: Tensor | None = None) -> float:
        """R², the share of these rows' variance that an affine map explains; NaN where there are no rows.

        Args:
            weight: weight (D, C) of the map.
            bias: bias (D,) of the map.
            baseline: constant (D,) about which the variance is taken; the mean of these rows by default.
        """
        if self.moments is None:
            return math.nan
        rows, mean_x, mean_y, xx, xy, yy = self.moments
        offset = mean_y if baseline is None else baseline
        total = yy.sum().item() + rows * (mean_y - offset).square().sum().item()
        missed = rows * (mean_y - bias - mean_x @ weight.T).square().sum().item()
        around = yy.sum().item() - 2 * (weight * xy.T).sum().item() + (weight.T * (xx @ weight.T)).sum().item()
        return 1 - (around + missed) / total if total > 0 else float(missed == 0)


def _solve_spd(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve by Cholesky, with ten times the ridge as long as the matrix is singular to rounding."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    floor = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal().max().item()
    while True:
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * eye)
        if not failed:
            return torch.cholesky_solve(right, factor)
        ridge = max(10 * ridge, floor)


@dataclass(frozen=True)
class _Job:
    """One least-squares problem of a stitch, with the moments of the images it is fitted on and of those held out."""

    name: str
    problem: Problem
    fit: LeastSquares = field(default_factory=LeastSquares)
    held: LeastSquares = field(default_factory=LeastSquares)

    def update(self, source: Tensor, target: Tensor, chosen: Chosen, order: Tensor, fitted: int) -> None:
        """Add a batch of activations (N, ...).

        Args:
            source: activation at the stitch's source.
            target: activation that the stitch replaces.
            chosen: positions of each image.
            order: indices (N,) of the images, those that are held out last.
            fitted: number of images that are not held out.
        """
        x, y = (
            rows.index_select(0, order).split([fitted, len(order) - fitted])
            for rows in (self.problem.inputs(source, chosen), self.problem.outputs(target, chosen))
        )
        for sums, *rows in zip((self.fit, self.held), x, y, strict=True):
            sums.update(*(part.flatten(0, 1) for part in rows))

    def solve(self, ridges: Sequence[float]) -> tuple[Tensor, Tensor, float]:
        """Weight and bias of the best ridge on all images; R² of a fit without the held-out images on these.

        Raises:
            ValueError: there were no rows, or the features were not finite; names the stitch.
        """
        try:
            ridge, r2 = self._choose(ridges)
            self.fit.merge(self.held.moments)  # from here on all images
            return *self.fit.weights(ridge), r2
        except ValueError as error:
            raise ValueError(f"stitch '{self.name}' cannot be fitted: {error}") from error

    def _choose(self, ridges: Sequence[float]) -> tuple[float, float]:
        """The ridge that explains most of the held-out images, and R² there."""
        best, most = ridges[0], -math.inf
        if not self.held.rows:  # a single image
            return best, math.nan
        for ridge in ridges:
            weight, bias = self.fit.weights(ridge)
            assert self.fit.moments is not None
            r2 = self.held.r2(weight, bias, self.fit.moments.mean_y)
            if r2 > most + MARGIN:
                best, most = ridge, r2
            elif r2 < most - MARGIN:  # a larger one removes still more
                break
        return best, most

    @property
    def shortage(self) -> float:
        """The number of images that there should be, as a multiple of that there are; 1 or less where they suffice."""
        moments = self.fit.moments or self.held.moments
        rows = self.fit.rows + self.held.rows
        return 0.0 if moments is None else ROWS_PER_CHANNEL * len(moments.mean_x) / rows


def _ridges(ridge: float | str) -> Sequence[float]:
    """The ridges to choose from; ValueError unless there is one number of at least 0, or ``auto``."""
    if ridge == AUTO:
        return RIDGES
    if isinstance(ridge, str) or not 0 <= ridge < math.inf:
        raise ValueError(f"ridge={ridge!r} must be a number of at least 0, or {AUTO!r}")
    return (ridge,)


@torch.no_grad()
def fit_stitches(
    stitches: Mapping[StitchPoint, Stitch],
    anchors: Mapping[str, Anchor],
    images: Iterable[Mapping[str, Tensor]] | Own[OwnBatch],
    ridge: float | str = AUTO,
) -> dict[str, float]:
    """Set the weights of stitches to the least-squares solution, all of them in one pass over each anchor.

    Each stitch is fitted to the activation that it replaces (SN-Net, arXiv 2302.06586, equation 3). A stitch at
    several points is fitted on the activations of all of them. Every fifth image is held out, for R² and to choose the
    ridge; the weights are then fitted on all images. Processes share the images, add up their moments in float64, and
    share the solving.

    Args:
        stitches: stitches to fit, by stitch point.
        anchors: mapping from names to anchors.
        images: batches of images by anchor name, each anchor's in its own preprocessing, the same on every process; or
            those of this process.
        ridge: regularisation relative to the mean variance, see `LeastSquares.weights`; ``auto`` for the best of
            `RIDGES` on the held-out images.

    Returns:
        R² of each stitch's map of positions on the held-out images, by stitch name; NaN for a single image.

    Raises:
        ValueError: no images, or features that are not finite (the message names the stitch).
    """
    return _fit(stitches, anchors, images, ridge)[0]


def _fit(
    stitches: Mapping[StitchPoint, Stitch],
    anchors: Mapping[str, Anchor],
    images: Iterable[Mapping[str, Tensor]] | Own[OwnBatch],
    ridge: float | str,
) -> tuple[dict[str, float], int]:
    """Fit stitches, see `fit_stitches`; returns R² by stitch name, and the number of images."""
    ridges, points = _ridges(ridge), dict[str, list[StitchPoint]]()
    for point, stitch in stitches.items():
        target_cut = point.target_cut if stitch.target_cut is None else stitch.target_cut
        if stitch.problems():
            points.setdefault(point.name, []).append(replace(point, target_cut=target_cut))
    by_name = {point.name: stitch for point, stitch in stitches.items()}
    jobs = [_Job(name, problem) for name, stitch in by_name.items() for problem in stitch.problems()]
    count = int(add_up(torch.tensor(_read(jobs, points, anchors, images))))
    owners = _merge(jobs, next(next(iter(anchors.values())).parameters()).device)
    first: dict[str, _Job] = {}
    for job in jobs:  # a class token's own map has a row for each image alone, and relies on the ridge
        first.setdefault(job.name, job)
    _warn_of_shortage(first.values(), count)
    solutions = _solve(jobs, owners, ridges)  # nothing is assigned before everything is solved
    for stitch in by_name.values():
        make_trainable(stitch)  # solutions may exceed the range of float16
    r2: dict[str, float] = {}
    for job, (weight, bias, explained) in zip(jobs, solutions, strict=True):
        job.problem.assign(weight, bias)
        r2.setdefault(job.name, explained)
    torch.clear_autocast_cache()  # which may hold the weights that the stitches had
    return r2, count


def _merge(jobs: Sequence[_Job], device: torch.device) -> list[int]:
    """Add up the moments of all processes, each job's in the process that is to solve it; returns these processes."""
    if this_process().num_processes == 1:
        return [0] * len(jobs)
    every = [sums for job in jobs for sums in (job.fit, job.held)]
    sizes = [(0, 0) if sums.moments is None else tuple(map(len, sums.moments[1:3])) for sums in every]
    shapes = [max(of_one) for of_one in zip(*gather(sizes), strict=True)]  # a process may have no images
    owners = divide_jobs([c * c * (c / 3 + 3 * d) for c, d in map(max, shapes[::2], shapes[1::2])])
    parts = [
        torch.zeros(1 + c + d, dtype=torch.float64, device=device)
        if sums.moments is None
        else torch.cat([sums.moments.mean_x.new_ones(1), *sums.moments[1:3]]) * sums.rows
        for sums, (c, d) in zip(every, shapes, strict=True)
    ]
    totals = add_up(torch.cat(parts)).split([len(part) for part in parts]) if parts else ()
    for number, (sums, total, (c, d)) in enumerate(zip(every, totals, shapes, strict=True)):
        if total[0] > 0:
            sums.shift(int(total[0]), *(total[1:] / total[0]).split([c, d]))
            for moment in sums.moments[3:] if sums.moments is not None else ():
                send_sum_to(owners[number // 2], moment)
    return owners


def _solve(jobs: Sequence[_Job], owners: Sequence[int], ridges: Sequence[float]) -> list[tuple[Tensor, Tensor, float]]:
    """Weight, bias and R² of each job, which its owner solves, on every process."""
    process, solutions = this_process().process_index, dict[int, tuple[Tensor, Tensor, float]]()
    failed: dict[int, ValueError] = {}
    for number, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
        try:
            if owner == process and not failed:
                solutions[number] = job.solve(ridges)
        except ValueError as error:  # all processes raise the first one
            failed[number] = error
    failed = dict(chain.from_iterable(gather([*failed.items()])))
    if failed:
        raise failed[min(failed)]
    if this_process().num_processes == 1:
        return [*solutions.values()]
    scores = dict(chain.from_iterable(gather([(number, each[2]) for number, each in solutions.items()])))
    for number, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
        moments = job.fit.moments or job.held.moments
        assert moments is not None  # else it was not solved
        empty = moments.xy.new_empty(moments.xy.shape[::-1]), torch.empty_like(moments.mean_y)
        weight, bias = solutions[number][:2] if number in solutions else empty
        solutions[number] = send_from(owner, weight.contiguous()), send_from(owner, bias), scores[number]
    return [solutions[number] for number in range(len(jobs))]


def _read(
    jobs: Sequence[_Job],
    points: Mapping[str, Sequence[StitchPoint]],
    anchors: Mapping[str, Anchor],
    images: Iterable[Mapping[str, Tensor]] | Own[OwnBatch],
) -> int:
    """Run each anchor once on each batch of this process, and add its activations; returns the number of images."""
    cuts: dict[str, set[int | None]] = {}
    for point in chain.from_iterable(points.values()):
        cuts.setdefault(point.source, set()).add(point.source_cut)
        cuts.setdefault(point.target, set()).add(point.target_cut)
    count = 0
    for _, start, batch in own_batches(images):
        features = {name: _in_float32(anchors[name].capture(batch[name], some)) for name, some in cuts.items()}
        size = len(next(iter(batch.values())))
        held = torch.arange(start, start + size) % HELD_OUT == 1  # the second image first, so that two suffice
        order, fitted = held.int().argsort(stable=True), size - int(held.sum())
        for job in jobs:
            for point in points[job.name]:
                source = features[point.source][point.source_cut]
                target = features[point.target][point.target_cut]
                chosen = job.problem.chosen(size, MAX_POSITIONS, start)
                job.update(source, target, chosen, order.to(source.device), fitted)
        count += size
    return count


def _in_float32(features: Mapping[int | None, Tensor]) -> dict[int | None, Tensor]:
    """Activations of an anchor in half precision as a stitch gets them, in float32."""
    return {cut: x.to(trained_dtype(x.dtype)) for cut, x in features.items()}


def _warn_of_shortage(jobs: Iterable[_Job], images: int) -> None:
    """Warn once if stitches have fewer rows than weights of an output need."""
    short = {job.name: job.shortage for job in jobs if job.shortage > 1}
    if short:
        worst = max(short, key=short.__getitem__)
        logger.warning(
            f"{images} images are few to fit stitches {sorted(short)[:8]}, whose inputs have many channels. "
            f"Give at least {math.ceil(images * short[worst])} images, as '{worst}' needs"
        )


def fit_routes(
    model: Any, images: Iterable[Mapping[str, Tensor]] | Own[OwnBatch], routes: Sequence[Route], ridge: float | str
) -> dict[str, float]:
    """Fit the stitches of routes, and record it in the model's config.

    Args:
        model: stitched model whose stitches are fitted.
        images: batches of images by anchor name, as for `fit_stitches`.
        routes: routes of the model.
        ridge: regularisation, as in the model's `fit_stitches`.

    Returns:
        R² by stitch name.

    Raises:
        ValueError: see `fit_stitches`; or the routes have no stitches.
    """
    points = {point: model.stitches[point.name] for route in routes for point in route.stitch_points}
    if not points:
        raise ValueError("there are no stitches to fit; call select_stitches or add_stitch first")
    r2, count = _fit(points, model.anchors, images, ridge)
    for name, explained in r2.items():
        model.config.stitches[name]["r2"] = None if math.isnan(explained) else explained  # JSON holds no NaN
    stage = {"stage": "least squares", "images": count, "routes": len(routes), "ridge": ridge}
    model.config.training = [*model.config.training, stage]
    model.unfitted.difference_update(r2)
    model.forget_profile()
    return r2
