"""Stitches: small adapters from one anchor's activation to another's, and their fit by streaming least squares."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from restnet_hf.anchors import Anchor
from restnet_hf.features import AnyLayout, JointLayout, Layout, resize, resize_matrix
from restnet_hf.routes import StitchPoint


CLASS_TOKENS = ("pool", "learn", "drop", "add")
ROWS = 16384  # of float64 features at a time
POSITIONS = 256  # of each image that a stitch is fitted on; more of a map tell little new and cost as much each
RIDGE = 1e-6  # of the mean variance: far below what real features carry, far above float64 rounding


@dataclass(frozen=True)
class StitchConfig:
    """How stitches are made; the counterpart of a PEFT config.

    Args:
        kind: a key of `STITCHES`.
        class_token: what becomes of prefix tokens that one side has and the other lacks. Those that the target has
            more are computed from the mean of the source's grid (``pool``, the default), or a constant is fitted
            (``learn``), which tells nothing of the image to a late cut. Those that the source has more are left out
            (``drop``, the default), or mapped and added to every position (``add``; the readout of DPT,
            arXiv 2103.13413, section 3). Each value decides for its own direction.

    Raises:
        ValueError: an option is not one of those.
    """

    kind: str = "linear"
    class_token: str = "pool"

    def __post_init__(self) -> None:
        if self.kind not in STITCHES:
            raise ValueError(f"stitch kind {self.kind!r} is not one of {sorted(STITCHES)}")
        if self.class_token not in CLASS_TOKENS:
            raise ValueError(f"class_token={self.class_token!r} is not one of {CLASS_TOKENS}")


Chosen = Tensor | None  # positions (N, P) of each image, None for all


@dataclass(frozen=True)
class Problem:
    """A least-squares problem.

    Of images with more positions than are asked for a sample is taken, the same of inputs and of outputs.

    Args:
        inputs: rows (N, P, C) of the source's activation.
        outputs: rows (N, P, D) of the target's.
        assign: where the solution, weight (D, C) and bias (D,), goes.
        positions: P, where all are taken.
        key_in: equal for equal rows of the same activation.
        key_out: likewise.
    """

    inputs: Callable[[Tensor, Chosen], Tensor]
    outputs: Callable[[Tensor, Chosen], Tensor]
    assign: Callable[[Tensor, Tensor], None]
    positions: int
    key_in: Hashable
    key_out: Hashable

    def chosen(self, images: int, most: int, seed: int) -> Chosen:
        """At most so many of the positions of each image (N, P), drawn at random; None for all of them."""
        if self.positions <= most:
            return None
        dice = torch.Generator().manual_seed(1_000_003 * seed + self.positions)
        return torch.rand(images, self.positions, generator=dice).argsort(1)[:, :most]


class Stitch(nn.Module, ABC):
    """A module from an activation in one layout to one in another, whose weights least squares can set."""

    @abstractmethod
    def problems(self) -> list[Problem]:
        """The least-squares problems whose solutions are this stitch's weights."""


class LinearStitch(Stitch):
    """One affine map of channels for every position: a 1x1 convolution on maps, a linear layer on tokens.

    Between different grids the map is resized on the cheaper side of the affine map (the two commute). Prefix tokens
    that both sides have go through the same map, as in SN-Net (arXiv 2302.06586, section 3.2); for the others see
    ``class_token`` of `StitchConfig`.

    Args:
        source: layout that comes in.
        target: layout that goes out.
        config: see `StitchConfig`.
    """

    def __init__(self, source: AnyLayout, target: Layout, config: StitchConfig) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.shared = min(source.prefix, target.prefix)
        self.missing = target.prefix - self.shared
        self.proj: nn.Conv2d | nn.Linear
        if source.kind == "NCHW":
            self.proj = nn.Conv2d(source.channels, target.channels, 1)
        else:
            self.proj = nn.Linear(source.channels, target.channels)
        self.shrinks = target.grid[0] * target.grid[1] < source.grid[0] * source.grid[1]
        self.prefix: nn.Parameter | None = None
        self.pool: nn.Linear | None = None
        if self.missing and config.class_token == "learn":
            self.prefix = nn.Parameter(torch.zeros(1, self.missing, target.channels))
        elif self.missing:
            self.pool = nn.Linear(source.channels, self.missing * target.channels)
        self.spare = source.prefix - self.shared if config.class_token == "add" else 0
        self.added: nn.Linear | None = None
        if self.spare:
            self.added = nn.Linear(self.spare * source.channels, target.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """An activation in the source's layout as one in the target's."""
        spatial, prefix = self.source.split(x)
        pooled = spatial.mean((2, 3)) if self.pool is not None else None
        if self.shrinks:
            spatial = resize(spatial, self.target.grid)
        spatial = self._project(spatial)
        if not self.shrinks:
            spatial = resize(spatial, self.target.grid)
        if self.added is not None and prefix is not None:
            spatial = spatial + self.added(prefix[:, self.shared :].flatten(1))[:, :, None, None]
        return self.target.join(spatial, self._prefix(prefix, pooled, x.shape[0]))

    def _project(self, spatial: Tensor) -> Tensor:
        if isinstance(self.proj, nn.Conv2d):
            return self.proj(spatial)
        return self.proj(spatial.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _prefix(self, prefix: Tensor | None, pooled: Tensor | None, batch: int) -> Tensor | None:
        tokens = []
        if self.shared and prefix is not None:
            tokens.append(self.proj(prefix[:, : self.shared]))
        if self.prefix is not None:
            tokens.append(self.prefix.expand(batch, -1, -1))
        elif self.pool is not None:
            tokens.append(self.pool(pooled).unflatten(1, (self.missing, self.target.channels)))
        return torch.cat(tokens, dim=1) if tokens else None

    def problems(self) -> list[Problem]:
        places = self.shared + math.prod(self.target.grid)
        rows_in, rows_out = ("rows", self.target.grid, self.shared, self.spare), ("rows", self.shared)
        found = [Problem(self._rows_in, self._rows_out, self._set_projection, places, rows_in, rows_out)]
        missing = ("missing", self.shared)
        if self.prefix is not None:
            found.append(Problem(self._nothing_in, self._missing_out, self._set_prefix, 1, "nothing", missing))
        elif self.pool is not None:
            found.append(Problem(self._mean_in, self._missing_out, self._set_pool, 1, "mean", missing))
        return found

    def _rows_in(self, x: Tensor, chosen: Chosen) -> Tensor:
        spatial, prefix = self.source.split(x)
        if chosen is None or self.shrinks:
            rows = self._at(resize(spatial, self.target.grid), chosen)
        else:  # what grows is never made as a whole
            matrix = resize_matrix(self.source.grid, self.target.grid).to(x.device, x.dtype)
            rows = matrix[(chosen.to(x.device) - self.shared).clamp_min(0)] @ spatial.flatten(2).transpose(1, 2)
        if self.spare and prefix is not None:  # what is added to every position is an input of every position
            tokens = prefix[:, self.shared :].flatten(1)[:, None].expand(-1, rows.shape[1], -1)
            rows = torch.cat([rows, tokens], dim=2)
        return self._with_prefix(rows, prefix, chosen)

    def _rows_out(self, y: Tensor, chosen: Chosen) -> Tensor:
        spatial, prefix = self.target.split(y)
        return self._with_prefix(self._at(spatial, chosen), prefix, chosen)

    def _at(self, spatial: Tensor, chosen: Chosen) -> Tensor:
        """A map on the target's grid as rows (N, P, C)."""
        rows = spatial.flatten(2).transpose(1, 2)
        if chosen is None:
            return rows
        at = (chosen.to(rows.device) - self.shared).clamp_min(0)
        return rows.gather(1, at[..., None].expand(-1, -1, rows.shape[2]))

    def _with_prefix(self, rows: Tensor, prefix: Tensor | None, chosen: Chosen) -> Tensor:
        """Rows with those of the shared prefix tokens before them, or in the places that were chosen for them."""
        if not self.shared or prefix is None:
            return rows
        tokens = pad(prefix[:, : self.shared], (0, rows.shape[2] - prefix.shape[2]))
        if chosen is None:
            return torch.cat([tokens, rows], dim=1)
        chosen = chosen.to(rows.device)[..., None].expand(-1, -1, rows.shape[2])
        return torch.where(chosen < self.shared, tokens.gather(1, chosen.clamp_max(self.shared - 1)), rows)

    def _nothing_in(self, x: Tensor, chosen: Chosen) -> Tensor:
        return x.new_zeros(len(x), 1, 0)

    def _mean_in(self, x: Tensor, chosen: Chosen) -> Tensor:
        return self.source.split(x)[0].mean((2, 3))[:, None]

    def _missing_out(self, y: Tensor, chosen: Chosen) -> Tensor:
        return y[:, self.shared : self.target.prefix].flatten(1)[:, None]

    @torch.no_grad()
    def _set_projection(self, weight: Tensor, bias: Tensor) -> None:
        self.proj.weight.copy_(weight[:, : self.source.channels].reshape(self.proj.weight.shape))
        if self.added is not None:
            self.added.weight.copy_(weight[:, self.source.channels :])
        assert self.proj.bias is not None
        self.proj.bias.copy_(bias)

    @torch.no_grad()
    def _set_prefix(self, weight: Tensor, bias: Tensor) -> None:
        assert self.prefix is not None
        self.prefix.copy_(bias.view_as(self.prefix))

    @torch.no_grad()
    def _set_pool(self, weight: Tensor, bias: Tensor) -> None:
        assert self.pool is not None
        self.pool.weight.copy_(weight)
        self.pool.bias.copy_(bias)


STITCHES: dict[str, Callable[[AnyLayout, Layout, StitchConfig], Stitch]] = {"linear": LinearStitch}


class JointStitch(Stitch):
    """A stitch for each tensor of an activation of several.

    Args:
        source: layout that comes in.
        target: layout that goes out.
        config: of each.
    """

    def __init__(self, source: AnyLayout, target: JointLayout, config: StitchConfig) -> None:
        super().__init__()
        self.target = target
        self.parts = nn.ModuleList(STITCHES[config.kind](source, part, config) for part in target.parts)

    def forward(self, x: Tensor) -> Tensor:
        """An activation in the source's layout as one in the target's."""
        return torch.cat([part(x).flatten(1) for part in self.parts], dim=1)

    def problems(self) -> list[Problem]:
        found = []
        for index, part in enumerate(self.parts):
            assert isinstance(part, Stitch)
            for problem in part.problems():
                outputs = partial(self._outputs, index, problem.outputs)
                found.append(replace(problem, outputs=outputs, key_out=(index, problem.key_out)))
        return found

    def _outputs(self, index: int, outputs: Callable[[Tensor, Chosen], Tensor], y: Tensor, chosen: Chosen) -> Tensor:
        return outputs(self.target.unpack(y)[index], chosen)


def make_stitch(source: AnyLayout, target: AnyLayout, config: StitchConfig) -> Stitch:
    """A new stitch of the kind that ``config`` names."""
    if isinstance(target, JointLayout):
        return JointStitch(source, target, config)
    return STITCHES[config.kind](source, target, config)


class LeastSquares:
    """Affine regression of rows Y (M, D) on rows X (M, C) that arrive in batches.

    Keeps the means and the centred second moments in float64 and merges batches by the pairwise update of Chan, Golub
    and LeVeque (1983), so an offset of the features costs no digits and memory does not grow with the data.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.moments: Any = None

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows."""
        for rows_x, rows_y in zip(x.split(ROWS), y.split(ROWS), strict=True):
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
            ridge: added to the diagonal of XᵀX, relative to its mean.

        Raises:
            ValueError: there were no rows, or the features were not finite.
        """
        if self.moments is None:
            raise ValueError("no features to fit a stitch on: the calibration set is empty")
        mean_x, mean_y, xx, xy, yy = self.moments
        if not (xx.isfinite().all() and xy.isfinite().all() and yy.isfinite().all()):
            raise ValueError("features hold NaN or infinite values")
        total = yy.sum().item()
        if xx.numel() == 0 or not xx.diagonal().any():  # a constant is all that can be fitted
            return xy.T.new_zeros(len(yy), len(xx)), mean_y, 0.0
        weight = _solve_spd(xx, xy, ridge * xx.diagonal().mean().item())
        residual = total - 2 * (weight * xy).sum().item() + (weight * (xx @ weight)).sum().item()
        r2 = 1 - residual / total if total > 0 else 1.0
        return weight.T, mean_y - mean_x @ weight, r2


def _solve_spd(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve by Cholesky; where the matrix is singular to rounding, with ten times the ridge until it is not."""
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

    Each stitch is to give the activation that it replaces (SN-Net, arXiv 2302.06586, equation 3).

    Args:
        stitches: to fit, by where they sit.
        anchors: by name.
        images: batches; each holds the same images as every anchor wants them, by anchor.
        ridge: see `LeastSquares.solve`.

    Returns:
        R² of each stitch's map of positions on the calibration images, by stitch name.

    Raises:
        ValueError: no images, or features that are not finite (the message names the stitch).
    """
    jobs = [(point, problem, LeastSquares()) for point, s in stitches.items() for problem in s.problems()]
    wanted: dict[str, set[int | None]] = {}
    for point in stitches:
        wanted.setdefault(point.source, set()).add(point.source_cut)
        wanted.setdefault(point.target, set()).add(point.target_cut)
    start = 0
    for batch in images:
        features = {name: anchors[name].capture(batch[name], cuts) for name, cuts in wanted.items()}
        for point, problem, sums in jobs:
            source = features[point.source][point.source_cut]
            target = features[point.target][point.target_cut]
            chosen = problem.chosen(len(source), POSITIONS, start)
            sums.update(problem.inputs(source, chosen).flatten(0, 1), problem.outputs(target, chosen).flatten(0, 1))
        start += len(next(iter(batch.values())))
    r2: dict[str, float] = {}
    solutions = []
    for point, problem, sums in jobs:  # nothing is assigned before everything is solved
        try:
            weight, bias, explained = sums.solve(ridge)
        except ValueError as error:
            raise ValueError(f"stitch '{point.name}' cannot be fitted: {error}") from error
        solutions.append((problem, weight, bias))
        r2.setdefault(point.name, explained)
    for problem, weight, bias in solutions:
        problem.assign(weight, bias)
    return r2
