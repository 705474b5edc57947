"""How alike two anchors are at every pair of cuts, and which pairs to stitch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restnet_hf.anchors import Anchor
from restnet_hf.routes import Route, Segment


ESTIMATORS = ("unbiased", "biased")
FEATURES = ("pooled", "flattened")
COLUMNS = 16384  # of a flattened feature at a time


@dataclass(frozen=True)
class Similarity:
    """Similarity of every cut of ``front`` (rows, cut 1 first) to every cut of ``end`` (columns).

    Args:
        front: name of the anchor whose activation comes in.
        end: name of the anchor whose activation at that cut a stitch would replace.
        values: masked where a value is not defined (a constant feature, say).
        settings: how they were computed, and from how many images.
    """

    front: str
    end: str
    values: np.ma.MaskedArray
    settings: Mapping[str, Any]


class HSIC:
    """Sums over batches of the Hilbert-Schmidt independence criterion of two sets of features, linear kernel.

    The ratio is formed from the sums (minibatch CKA; Nguyen, Raghu and Kornblith, arXiv 2010.15327, equation 3), with
    the unbiased estimator of Song et al. (JMLR 2012, equation 5) or the biased one of Gretton et al. (2005).

    Batches weigh by their images, and one of less than half the images of the first is left out: what it says is
    noise, and the biased estimate depends on the size of the batch.

    Args:
        estimator: ``unbiased`` (batches of at least 4 images) or ``biased`` (at least 2).
    """

    def __init__(self, estimator: str = "unbiased") -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator={estimator!r} is not one of {ESTIMATORS}")
        self.estimator = estimator
        self.least = 4 if estimator == "unbiased" else 2
        self.images = self.first = 0
        self.xy: Any = 0.0
        self.xx: Any = 0.0
        self.yy: Any = 0.0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add one batch of Gram matrices (cuts, N, N) of centred features, float64; too small a batch is left out."""
        n = x.shape[-1]
        if n < self.least or 2 * n < self.first:
            return
        self.first = self.first or n
        x, y = (self._centred(gram).flatten(1) for gram in (x, y))
        scale = (n - 3) if self.estimator == "unbiased" else (n - 1) ** 2 / n  # n times the estimate
        self.images += n
        self.xy += (x @ y.T / scale).cpu()
        self.xx += (x.square().sum(1) / scale).cpu()
        self.yy += (y.square().sum(1) / scale).cpu()

    def _centred(self, gram: Tensor) -> Tensor:
        if self.estimator == "biased":
            return gram  # of centred features: its rows and columns sum to zero already
        n = gram.shape[-1]
        gram = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        rows = gram.sum(2) / (n - 2)
        total = rows.sum(1) / (n - 1)
        gram = gram - rows[:, :, None] - rows[:, None, :] + total[:, None, None]
        return gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))

    def cka(self) -> np.ma.MaskedArray:
        """Centered kernel alignment of every pair, masked where one of the two has no variation.

        Raises:
            ValueError: there was no batch of enough images.
        """
        if not self.images:
            raise ValueError(f"no images to compare features on: batches of at least {self.least} are needed")
        norm = (self.xx[:, None] * self.yy[None, :]).sqrt()
        undefined = norm <= torch.finfo(torch.float64).tiny
        values = self.xy / norm.masked_fill(undefined, 1.0)
        return np.ma.masked_array(values.numpy(), undefined.numpy())


def gram(feature: Tensor) -> Tensor:
    """Gram matrix (N, N) in float64 of features (N, ...), flattened and centred over the batch before it is formed.

    Done in blocks of columns: a second copy of the whole feature is never made.
    """
    flat = feature.flatten(1)
    total = flat.new_zeros(len(flat), len(flat), dtype=torch.float64)
    for block in flat.split(COLUMNS, dim=1):
        centred = block.double() if block.shape[1] <= 4096 else block.float()
        centred = centred - centred.mean(0)
        total += (centred @ centred.T).double()
    return total


@torch.no_grad()
def cka(
    front: Anchor,
    end: Anchor,
    images: Iterable[Mapping[str, Tensor]],
    *,
    estimator: str = "unbiased",
    features: str = "pooled",
) -> Similarity:
    """Linear CKA between all cuts of two anchors, in one pass over each (Kornblith et al., arXiv 1905.00414).

    Args:
        front: anchor whose activations come in.
        end: anchor whose activations would be replaced.
        images: batches; each holds the same images as both anchors want them, by anchor name.
        estimator: see `HSIC`.
        features: ``pooled`` takes the mean over positions, ``flattened`` keeps every position.

    Raises:
        ValueError: an option is unknown, images are too few, or an activation is not finite (named).
    """
    if features not in FEATURES:
        raise ValueError(f"features={features!r} is not one of {FEATURES}")
    sums = HSIC(estimator)
    batch_size = 0
    for batch in images:
        batch_size = max(batch_size, len(batch[front.name]))
        sums.update(*(_grams(anchor, batch[anchor.name], features == "pooled") for anchor in (front, end)))
    settings = {"method": "cka", "estimator": estimator, "features": features}
    values = sums.cka()
    return Similarity(front.name, end.name, values, {**settings, "images": sums.images, "batch_size": batch_size})


def _grams(anchor: Anchor, images: Tensor, pooled: bool) -> Tensor:
    """Gram matrices (depth, N, N) of an anchor's activations at its cuts."""
    grams = []
    indices = range(1, anchor.depth + 1)
    captured = anchor.capture(images, indices)
    for index in indices:
        feature = captured[index]
        matrix = gram(anchor.layout(index).split(feature)[0].mean((2, 3)) if pooled else feature)
        if not matrix.isfinite().all():
            name = anchor.cuts[index - 1].name
            raise ValueError(f"activations of '{anchor.name}' at cut {index} ({name}) hold NaN or infinite values")
        grams.append(matrix)
    return torch.stack(grams)


SELECTORS: dict[str, Callable[..., Similarity]] = {"cka": cka}


def choose_routes(similarity: Similarity, max_routes: int) -> list[Route]:
    """Routes to stitch: for each cut of the front the most similar cut of the end, spread over the depth of the front.

    Where the front has more cuts than ``max_routes``, its depth is divided into as many equal parts, and the most
    similar pair of each is taken.

    Raises:
        ValueError: ``max_routes`` is below 1, or no similarity is defined.
    """
    if max_routes < 1:
        raise ValueError(f"max_routes={max_routes} must be at least 1")
    values = similarity.values.filled(-np.inf)
    rows = [i for i in range(len(values)) if np.isfinite(values[i]).any()]
    if not rows:
        raise ValueError(f"no cut of '{similarity.front}' has a defined similarity to one of '{similarity.end}'")
    parts = np.array_split(rows, min(max_routes, len(rows)))
    best = [max(part, key=lambda i: values[i].max()) for part in parts]
    return [
        Route((Segment(similarity.front, 0, int(i) + 1), Segment(similarity.end, int(values[i].argmax()) + 1)))
        for i in best
    ]
