"""SELECTORS: how promising a stitch is at every pair of cuts of two anchors, all of them from one pass over each."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.distributed import this_process
from restnet_hf.selection.cka import HSIC, KERNELS, gram
from restnet_hf.selection.ranking import Similarity
from restnet_hf.selection.samples import Pair, Samples, Seen, not_finite


FEATURES = ("pooled", "flattened", "tokens")
TOKENS = 3  # of a side of the grid whose positions are samples of their own


class Selector(ABC):
    """Sees batches of both anchors' activations and gives every pair of cuts a value, the higher the better.

    Args:
        pair: the anchors.
        samples: what one pass keeps for all selectors that ask for it.
        **options: of each selector.
    """

    cuts = True  # whether it needs activations at all
    symmetric = False  # whether the other direction has the transposed values

    def __init__(self, pair: Pair, samples: Samples) -> None:
        self.pair, self.samples = pair, samples

    def read(self, anchor: Anchor, cut: int, activation: Tensor, seen: Seen) -> None:  # noqa: B027
        """Look at one activation of a batch, which is gone afterwards."""

    def update(self, seen: Seen) -> None:  # noqa: B027
        """Close a batch, all of whose activations were read."""

    def state(self) -> Any:
        """What this process has summed up, for the others."""
        return None

    def absorb(self, states: Iterable[Any]) -> None:  # noqa: B027
        """Take what all processes have summed up, in their order."""

    @abstractmethod
    def values(self) -> np.ma.MaskedArray:
        """One value for each cut of the front (rows) and of the end (columns)."""

    def settings(self) -> dict[str, Any]:
        """What the values depend on."""
        return {}


class CKA(Selector):
    """Centered kernel alignment (Kornblith et al., arXiv 1905.00414): ReStNet's choice.

    Args:
        pair, samples: see `Selector`.
        estimator, average: see `HSIC`.
        kernel: see `gram`.
        features: ``pooled`` takes the mean over positions, ``flattened`` keeps every position as a feature, ``tokens``
            takes the positions of a coarse grid as samples of their own.
    """

    symmetric = True

    def __init__(
        self,
        pair: Pair,
        samples: Samples,
        *,
        estimator: str = "unbiased",
        average: str = "sum",
        kernel: str = "linear",
        features: str = "pooled",
    ) -> None:
        super().__init__(pair, samples)
        for name, value, known in (("features", features, FEATURES), ("kernel", kernel, KERNELS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {known}")
        self.kernel, self.features = kernel, features
        self.sums = HSIC(estimator, average)
        self.batch_size = 0
        self._grams: dict[tuple[str, int], Tensor] = {}

    def read(self, anchor: Anchor, cut: int, activation: Tensor, seen: Seen) -> None:
        feature = activation
        if self.features != "flattened":
            feature = anchor.layout(cut).split(feature)[0]
            if self.features == "pooled":
                feature = feature.mean((2, 3))
            else:
                feature = adaptive_avg_pool2d(feature, TOKENS).permute(0, 2, 3, 1).flatten(0, 2)
        matrix = gram(feature, self.kernel)
        if not matrix.isfinite().all():
            raise not_finite(anchor, cut)
        self._grams[anchor.name, cut] = matrix

    def update(self, seen: Seen) -> None:
        self.batch_size = max(self.batch_size, seen.size)
        front, end = (
            torch.stack([self._grams.pop((anchor.name, cut)) for cut in range(1, anchor.depth + 1)])
            for anchor in (self.pair.front, self.pair.end)
        )
        self.sums.update(front, end)

    def state(self) -> HSIC:
        return self.sums

    def absorb(self, states: Iterable[HSIC]) -> None:
        total = HSIC(self.sums.estimator, self.sums.average)
        for state in states:
            total.add(state)
        self.sums = total

    def values(self) -> np.ma.MaskedArray:
        return self.sums.cka()

    def settings(self) -> dict[str, Any]:
        samples = TOKENS**2 if self.features == "tokens" else 1
        about = {"estimator": self.sums.estimator, "average": self.sums.average, "kernel": self.kernel}
        return {
            **about,
            "features": self.features,
            "images": self.sums.images // samples,
            "batch_size": self.batch_size,
        }


class Position(Selector):
    """How near the two cuts are in relative depth: SN-Net's rule (arXiv 2302.06586, section 3.3), without any data."""

    cuts = False
    symmetric = True

    def values(self) -> np.ma.MaskedArray:
        depths = [np.arange(1, anchor.depth + 1) / (anchor.depth + 1) for anchor in (self.pair.front, self.pair.end)]
        return np.ma.masked_array(1 - np.abs(depths[0][:, None] - depths[1][None, :]))


class LeastSquaresR2(Selector):
    """Share of the replaced activation's variance that the fitted stitch explains, on images that are held out.

    Args:
        pair, samples: see `Selector`.
        ridge: of the fit, relative to the mean variance of the features; larger than that of `fit_stitches`, as it is
            made from a sample of positions.
    """

    def __init__(self, pair: Pair, samples: Samples, *, ridge: float = 1e-2) -> None:
        super().__init__(pair, samples)
        samples.keep_rows()
        self.ridge = ridge

    def values(self) -> np.ma.MaskedArray:
        found = np.full((self.pair.front.depth, self.pair.end.depth), np.nan)
        for (i, j), (first, *_) in self.samples.solve(self.ridge):
            found[i - 1, j - 1] = first.r2
        return np.ma.masked_invalid(found)

    def settings(self) -> dict[str, Any]:
        return {"ridge": self.ridge, **self.samples.settings()}


class FittedAccuracy(Selector):
    """How often the route through the fitted, untrained stitch is right, on images that it was not fitted on.

    Right is the label, or where there are no labels what the larger anchor says.

    Args:
        pair, samples: see `Selector`.
        ridge: as of `LeastSquaresR2`.
    """

    def __init__(self, pair: Pair, samples: Samples, *, ridge: float = 1e-2) -> None:
        super().__init__(pair, samples)
        samples.keep_rows()
        samples.keep_images()
        self.ridge = ridge

    def values(self) -> np.ma.MaskedArray:
        stitches = self.samples.stitches(self.ridge)
        right = torch.zeros(self.pair.front.depth, self.pair.end.depth, dtype=torch.float64)
        state = this_process()
        for index, (images, targets) in enumerate(self.samples.held_out()):
            if index % state.num_processes != state.process_index:
                continue
            activations = self.pair.front.capture(images, range(1, self.pair.front.depth + 1))
            for (i, j), stitch in stitches.items():
                logits = self.pair.finish(self.pair.end(stitch(activations[i]), j))
                right[i - 1, j - 1] += (logits.argmax(-1) == targets).sum().item()
        total = sum(gather_object([right]))
        return np.ma.masked_array((total / int(self.samples.held.sum())).numpy())

    def settings(self) -> dict[str, Any]:
        return {"ridge": self.ridge, "labels": self.samples.labelled, **self.samples.settings()}


class ProbeKL(Selector):
    """How much less a linear probe loses from one cut to the other than the end loses in its next block.

    A softmax classifier is trained on the pooled features of each cut. With Θ the mean Kullback-Leibler divergence of
    two probes' outputs on images that they were not trained on, and g(j+1) the end's next cut (its logits, after the
    last one), the ratio is Θ(f(i) || g(j)) / Θ(g(j) || g(j+1)) (KLAS, arXiv 2605.29259). The value is 1 / (1 + ratio).

    Args:
        pair, samples: see `Selector`.
        weight_decay: of the probes.
    """

    def __init__(self, pair: Pair, samples: Samples, *, weight_decay: float = 1e-2) -> None:
        super().__init__(pair, samples)
        samples.keep_pooled()
        self.weight_decay = weight_decay

    def values(self) -> np.ma.MaskedArray:
        front, end = (self.samples.probes(a, self.weight_decay) for a in (self.pair.front, self.pair.end))
        last = self.samples.log_probabilities(self.pair.end)
        steps = torch.stack([_divergence(a, b) for a, b in zip(end, [*end[1:], last], strict=True)])
        across = torch.stack([torch.stack([_divergence(f, g) for g in end]) for f in front])
        return np.ma.masked_invalid((1 / (1 + across / steps.clamp_min(1e-9))).numpy())

    def settings(self) -> dict[str, Any]:
        return {"weight_decay": self.weight_decay, "labels": self.samples.labelled, **self.samples.settings()}


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of b from a, from log-probabilities (N, classes)."""
    return (a.exp() * (a - b)).sum(-1).mean()


SELECTORS: dict[str, type[Selector]] = {
    "cka": CKA,
    "lstsq": LeastSquaresR2,
    "kl_probe": ProbeKL,
    "position": Position,
    "fitted_accuracy": FittedAccuracy,
}


@dataclass
class _Run:
    """The selectors of one direction."""

    pair: Pair
    samples: Samples
    selectors: dict[str, Selector] = field(default_factory=dict)


@torch.no_grad()
def compare(
    pairs: Iterable[Pair],
    images: Callable[[], Iterable[Seen]],
    methods: Mapping[str, Mapping[str, Any]],
    kept_images: int = 512,
) -> dict[str, list[Similarity]]:
    """What selectors say of pairs of anchors, from one pass over each anchor.

    Under several processes each takes every n-th batch, and all get the same result.

    Args:
        pairs: one for each direction, of the same two anchors.
        images: batches, as both anchors see them; see `Seen`.
        methods: options by key of `SELECTORS`.
        kept_images: how many of the images selectors that fit something may keep samples of.

    Returns:
        By method, a `Similarity` for each pair.

    Raises:
        ValueError: an unknown method or option, no images, or an activation that is not finite (named).
    """
    runs: list[_Run] = []
    for pair in pairs:
        run = _Run(pair, Samples(pair, kept_images))
        for name, options in methods.items():
            if name not in SELECTORS:
                raise ValueError(f"method={name!r} is not one of {sorted(SELECTORS)}")
            if runs and SELECTORS[name].symmetric:
                continue
            try:
                run.selectors[name] = SELECTORS[name](pair, run.samples, **options)
            except TypeError as error:
                raise ValueError(f"method {name!r}: {error}") from error
        runs.append(run)
    if any(selector.cuts for run in runs for selector in run.selectors.values()):
        _stream(runs, images())
    found: dict[str, list[Similarity]] = {name: [] for name in methods}
    for run in runs:
        for name in methods:
            if name in run.selectors:
                values = run.selectors[name].values()
                settings: Mapping[str, Any] = {"method": name, **run.selectors[name].settings()}
            else:
                values, settings = found[name][0].values.T, found[name][0].settings
            found[name].append(Similarity(run.pair.front.name, run.pair.end.name, values, settings))
    return found


def _stream(runs: Iterable[_Run], images: Iterable[Seen]) -> None:
    parts: list[Any] = [part for run in runs for part in (run.samples, *run.selectors.values())]
    state = this_process()
    for index, seen in enumerate(images):
        if index % state.num_processes == state.process_index:
            seen.visit(partial(_show, parts, seen))
            for part in parts:
                part.update(seen)
    if state.num_processes > 1:
        states = gather_object([[part.state() for part in parts]])
        for index, part in enumerate(parts):
            part.absorb([each[index] for each in states])


def _show(parts: Iterable[Any], seen: Seen, anchor: Anchor, cut: int, activation: Tensor) -> None:
    for part in parts:
        part.read(anchor, cut, activation, seen)
