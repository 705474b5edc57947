"""Centered kernel alignment of features that arrive in batches: Gram matrices and the independence criterion."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from restnet_hf.stitches.precision import in_full_precision


ESTIMATORS = ("unbiased", "biased")
KERNELS = ("linear", "rbf")
AVERAGES = ("sum", "mean")
COLUMNS_AT_ONCE = 16384  # of a flattened feature


class HSIC:
    """The Hilbert-Schmidt independence criterion of two sets of features, over batches.

    The ratio is formed from sums over batches (minibatch CKA; Nguyen, Raghu and Kornblith, arXiv 2010.15327, equation
    3), or averaged over the batches' own ratios, with the unbiased estimator of Song et al. (JMLR 2012, equation 5) or
    the biased one of Gretton et al. (2005).

    Batches are weighted by their images. A batch of less than half the images of the first is left out, as its
    estimate is noisy and the biased estimate depends on the batch size.

    Args:
        estimator: estimator of the criterion, ``unbiased`` (batches of at least 4 images) or ``biased`` (at least 2).
        average: average over batches, ``sum`` for the ratio of sums or ``mean`` for the mean of ratios.
    """

    def __init__(self, estimator: str = "unbiased", average: str = "sum") -> None:
        for name, value, allowed in (("estimator", estimator, ESTIMATORS), ("average", average, AVERAGES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {allowed}")
        self.estimator, self.average = estimator, average
        self.least = 4 if estimator == "unbiased" else 2
        self.first: tuple[int, int] | None = None  # place of the first batch that is large enough, and its images
        self.sums: dict[int, list[Any]] = {}  # by batch size: images, and sums of xy, xx and yy over batches

    def update(self, x: Tensor, y: Tensor, place: int = 0) -> None:
        """Add one batch of Gram matrices; a batch that is too small is left out.

        Args:
            x: Gram matrices (cuts, N, N) of the front's centred features, float64.
            y: Gram matrices (cuts, N, N) of the end's centred features, float64.
            place: place of the batch in the data, where other processes have batches before it.
        """
        n = x.shape[-1]
        if n < self.least:
            return
        self.first = self.first or (place, n)
        x, y = (self._centred(gram).flatten(1) for gram in (x, y))
        scale = (n - 3) if self.estimator == "unbiased" else (n - 1) ** 2 / n  # n times the estimate
        xy, xx, yy = (x @ y.T / scale).cpu(), (x.square().sum(1) / scale).cpu(), (y.square().sum(1) / scale).cpu()
        if self.average == "mean":  # ratios, weighted by images
            norm = (xx[:, None] * yy[None, :]).sqrt()
            self._add(n, [n, torch.where(norm > torch.finfo(norm.dtype).tiny, n * xy / norm, torch.nan), 0.0, 0.0])
        else:
            self._add(n, [n, xy, xx, yy])

    def _add(self, size: int, sums: list[Any]) -> None:
        old = self.sums.get(size)
        self.sums[size] = sums if old is None else [a + b for a, b in zip(old, sums, strict=True)]

    def add(self, other: "HSIC") -> None:
        """Add the sums over other batches."""
        if other.first is not None:
            self.first = min(self.first or other.first, other.first)
        for size, sums in other.sums.items():
            self._add(size, sums)

    def _total(self) -> list[Any]:
        """Images, and sums of xy, xx and yy, over the batches that are large enough."""
        kept = [sums for size, sums in sorted(self.sums.items()) if self.first and 2 * size >= self.first[1]]
        return [sum(each) for each in zip(*kept, strict=True)] if kept else [0, 0.0, 0.0, 0.0]

    @property
    def images(self) -> int:
        """The number of images of all batches that are large enough."""
        return self._total()[0]

    def _centred(self, gram: Tensor) -> Tensor:
        if self.estimator == "biased":
            rows = gram.mean(2)
            return gram - rows[:, :, None] - rows[:, None, :] + rows.mean(1)[:, None, None]
        n = gram.shape[-1]
        gram = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        rows = gram.sum(2) / (n - 2)
        total = rows.sum(1) / (n - 1)
        gram = gram - rows[:, :, None] - rows[:, None, :] + total[:, None, None]
        return gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))

    def cka(self) -> np.ma.MaskedArray:
        """Centered kernel alignment of every pair of cuts, masked where a feature has no variation.

        Raises:
            ValueError: there was no batch of enough images.
        """
        images, xy, xx, yy = self._total()
        if not images:
            raise ValueError(f"no images to compare features on: batches of at least {self.least} are needed")
        if self.average == "mean":
            return np.ma.masked_invalid((xy / images).numpy())
        norm = (xx[:, None] * yy[None, :]).sqrt()
        undefined = norm <= torch.finfo(torch.float64).tiny
        values = xy / norm.masked_fill(undefined, 1.0)
        return np.ma.masked_array(values.numpy(), undefined.numpy())


@in_full_precision
def gram(feature: Tensor, kernel: str = "linear") -> Tensor:
    """Gram matrix (N, N) in float64 of features that are flattened and centred over the batch.

    It is summed over blocks of columns, so that the whole feature is never copied.

    Args:
        feature: features (N, ...) of a batch.
        kernel: kernel of the Gram matrix, ``linear``, or ``rbf`` with the median distance of the batch as its width
            (Kornblith et al., arXiv 1905.00414, section 3).
    """
    flat = feature.flatten(1)
    total = flat.new_zeros(len(flat), len(flat), dtype=torch.float64)
    for block in flat.split(COLUMNS_AT_ONCE, dim=1):
        centred = block.double() if block.shape[1] <= 4096 else block.float()
        centred = centred - centred.mean(0)
        total += (centred @ centred.T).double()
    if kernel == "linear":
        return total
    squares = total.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * total).clamp_min(0)
    width = distances[~torch.eye(len(flat), dtype=torch.bool, device=flat.device)].median()
    return torch.exp(-distances / (2 * width)) if width > 0 else torch.ones_like(total)
