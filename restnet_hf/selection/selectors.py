"""SELECTORS: values of stitches at every pair of cuts of anchors, all from one pass over each anchor."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.distributed import Own, add_up, gather, own_items, this_process
from restnet_hf.progress import progress_bar
from restnet_hf.selection.cka import HSIC, KERNELS, gram
from restnet_hf.selection.ranking import Similarity
from restnet_hf.selection.samples import Pair, Samples, SampleStore, SelectionBatch, not_finite
from restnet_hf.stitches.precision import run_in_own_type


FEATURES = ("pooled", "flattened", "tokens")
RIDGE = 1e-2  # of fits on samples of positions, relative to the mean variance of the features
TOKENS = 3  # on each side of the grid whose positions are samples of their own


class Selector(ABC):
    """Reads batches of both anchors' activations and gives every pair of cuts a value, the higher the better.

    Subclasses may take options of their own as keyword arguments.

    Args:
        pair: front and end anchor, and options of stitches.
        samples: samples of activations that all selectors share.
    """

    cuts = True  # whether the selector needs activations
    symmetric = False  # whether the values of the other direction are the transpose
    labels = True  # whether labels are read, which must then be of the model's classes
    all_images = True  # whether batches are read beyond the images that `samples` keeps

    def __init__(self, pair: Pair, samples: Samples) -> None:
        self.pair, self.samples = pair, samples

    def read(self, anchor: Anchor, cut: int, activation: Tensor, batch: SelectionBatch) -> None:  # noqa: B027
        """Read one activation of a batch, which is not kept.

        Args:
            anchor: anchor that computed the activation.
            cut: number of the cut.
            activation: activation in the layout of the cut.
            batch: images, labels and logits of the batch.
        """

    def update(self, batch: SelectionBatch) -> None:  # noqa: B027
        """Finish a batch after all of its activations were read."""

    def state(self) -> Any:
        """The state of this process, for the others."""
        return None

    def merge(self, states: Iterable[Any]) -> None:  # noqa: B027
        """Merge the states of all processes, in their order."""

    @abstractmethod
    def values(self) -> np.ma.MaskedArray:
        """Values (front cuts, end cuts), masked where undefined."""

    def settings(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {}


class CKA(Selector):
    """Centered kernel alignment (Kornblith et al., arXiv 1905.00414), the selector of ReStNet.

    Args:
        pair: front and end anchor, and options of stitches.
        samples: samples of activations that all selectors share.
        estimator: estimator of the criterion, ``unbiased`` or ``biased``; see `HSIC`.
        average: average over batches, ``sum`` or ``mean``; see `HSIC`.
        kernel: kernel of the Gram matrices, ``linear`` or ``rbf``; see `gram`.
        features: features of an activation: ``pooled`` is the mean over positions, ``flattened`` takes every position
            as a feature, ``tokens`` takes the positions of a coarse grid as samples of their own.
    """

    labels = False
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
        for name, value, allowed in (("features", features, FEATURES), ("kernel", kernel, KERNELS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {allowed}")
        self.kernel, self.features = kernel, features
        self.sums = HSIC(estimator, average)
        self.batch_size = 0
        self._grams: dict[tuple[str, int], Tensor] = {}

    def read(self, anchor: Anchor, cut: int, activation: Tensor, batch: SelectionBatch) -> None:
        """Add the Gram matrix of one activation of a batch."""
        key = (anchor.name, cut, self.features, self.kernel)
        self._grams[anchor.name, cut] = batch.compute_once(key, lambda: self._gram(anchor, cut, activation))

    def _gram(self, anchor: Anchor, cut: int, activation: Tensor) -> Tensor:
        """The Gram matrix of one activation; raises ValueError where it is not finite."""
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
        return matrix

    def update(self, batch: SelectionBatch) -> None:
        """Add the Gram matrices of a batch to the sums."""
        self.batch_size = max(self.batch_size, batch.size)
        front, end = (
            torch.stack([self._grams.pop((anchor.name, cut)) for cut in range(1, anchor.depth + 1)])
            for anchor in (self.pair.front, self.pair.end)
        )
        self.sums.update(front, end, batch.start)

    def state(self) -> tuple[HSIC, int]:
        """The sums of this process, and the size of its largest batch."""
        return self.sums, self.batch_size

    def merge(self, states: Iterable[tuple[HSIC, int]]) -> None:
        """Add up the sums of all processes."""
        total = HSIC(self.sums.estimator, self.sums.average)
        for sums, batch_size in states:
            total.add(sums)
            self.batch_size = max(self.batch_size, batch_size)
        self.sums = total

    def values(self) -> np.ma.MaskedArray:
        """Values (front cuts, end cuts), masked where undefined."""
        return self.sums.cka()

    def settings(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        samples = TOKENS**2 if self.features == "tokens" else 1
        settings = {"estimator": self.sums.estimator, "average": self.sums.average, "kernel": self.kernel}
        return {
            **settings,
            "features": self.features,
            "images": self.sums.images // samples,
            "batch_size": self.batch_size,
        }


class Position(Selector):
    """Closeness of the two cuts in relative depth, without any data: SN-Net's rule (arXiv 2302.06586, section 3.3)."""

    labels = False
    cuts = False
    symmetric = True

    def values(self) -> np.ma.MaskedArray:
        """Values (front cuts, end cuts), masked where undefined."""
        depths = [np.arange(1, anchor.depth + 1) / (anchor.depth + 1) for anchor in (self.pair.front, self.pair.end)]
        return np.ma.masked_array(1 - np.abs(depths[0][:, None] - depths[1][None, :]))


class LeastSquaresR2(Selector):
    """Share of the replaced activation's variance that the fitted stitch explains on held-out images.

    Args:
        pair: front and end anchor, and options of stitches.
        samples: samples of activations that all selectors share.
        ridge: regularisation of the fit, relative to the mean variance of the features; larger than in `fit_stitches`,
            as the fit uses a sample of positions.
    """

    labels = False
    all_images = False

    def __init__(self, pair: Pair, samples: Samples, *, ridge: float = RIDGE) -> None:
        super().__init__(pair, samples)
        samples.keep_rows()
        self.ridge = ridge

    def values(self) -> np.ma.MaskedArray:
        """Values (front cuts, end cuts), masked where undefined."""
        values = np.full((self.pair.front.depth, self.pair.end.depth), np.nan)
        own = {cuts: first.r2 for cuts, (first, *_) in self.samples.solve(self.ridge, self.samples.own_cuts)}
        for (i, j), r2 in chain.from_iterable(each.items() for each in gather(own)):
            values[i - 1, j - 1] = r2
        return np.ma.masked_invalid(values)

    def settings(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"ridge": self.ridge, **self.samples.settings()}


class FittedAccuracy(Selector):
    """Accuracy of the route with the fitted, untrained stitch on held-out images.

    Without labels, the predictions of the largest anchor count as right. The values are less than what training
    reaches, most of all for early cuts; those of the anchors alone, on the same images, are in the settings.

    Args:
        pair: front and end anchor, and options of stitches.
        samples: samples of activations that all selectors share.
        ridge: regularisation of the fit, relative to the mean variance of the features.
    """

    all_images = False

    def __init__(self, pair: Pair, samples: Samples, *, ridge: float = RIDGE) -> None:
        super().__init__(pair, samples)
        samples.keep_rows()
        samples.keep_images()
        self.ridge = ridge

    def values(self) -> np.ma.MaskedArray:
        """Values (front cuts, end cuts), masked where undefined."""
        cuts = self.samples.own_cuts
        stitches = self.samples.stitches(self.ridge, cuts)
        shape, device = (self.pair.front.depth, self.pair.end.depth), next(self.pair.end.parameters()).device
        right = torch.zeros(shape, dtype=torch.float64, device=device)  # counted there: nothing waits for a result
        batches = list(self.samples.held_out()) if cuts else []
        with progress_bar(desc="routes", total=len(batches) * len(stitches)) as bar:
            for images, targets in batches:
                activations = self.pair.front.capture(images, cuts)
                for (i, j), stitch in stitches.items():
                    logits = self.pair.finish(self.pair.end(run_in_own_type(stitch, activations[i]), j))
                    right[i - 1, j - 1] += (logits.argmax(-1) == targets).sum()
                    bar.update()
        total = add_up(right).cpu()
        return np.ma.masked_array((total / int(self.samples.held.sum())).numpy())

    def settings(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        anchors = {each.name: self.samples.accuracy(each) for each in (self.pair.front, self.pair.end)}
        settings = {"ridge": self.ridge, "labels": self.samples.labelled, **self.samples.settings()}
        return {**settings, "anchors": anchors}


class ProbeKL(Selector):
    """Loss of information of a linear probe between the two cuts, compared to that in the end's next block.

    A softmax classifier is trained on the pooled features of each cut. With Θ the mean Kullback-Leibler divergence of
    two probes' outputs on images that they were not trained on, and g(j+1) the end's next cut (its logits, after the
    last one), the ratio is Θ(f(i) || g(j)) / Θ(g(j) || g(j+1)) (KLAS, arXiv 2605.29259). The value is 1 / (1 + ratio).

    Args:
        pair: front and end anchor, and options of stitches.
        samples: samples of activations that all selectors share.
        weight_decay: weight decay of the probes.
    """

    all_images = False

    def __init__(self, pair: Pair, samples: Samples, *, weight_decay: float = 1e-2) -> None:
        super().__init__(pair, samples)
        samples.keep_pooled()
        self.weight_decay = weight_decay

    def values(self) -> np.ma.MaskedArray:
        """Values (front cuts, end cuts), masked where undefined."""
        front, end = (self.samples.probes(a, self.weight_decay) for a in (self.pair.front, self.pair.end))
        last = self.samples.log_probabilities(self.pair.end)
        steps = torch.stack([_divergence(a, b) for a, b in zip(end, [*end[1:], last], strict=True)])
        across = torch.stack([torch.stack([_divergence(f, g) for g in end]) for f in front])
        return np.ma.masked_invalid((1 / (1 + across / steps.clamp_min(1e-9))).numpy())

    def settings(self) -> dict[str, Any]:
        """Settings that the values depend on."""
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


Method = str | type[Selector]
"""A key of `SELECTORS`, or a selector's class that need not be in it."""


def find_selector(method: Method) -> type[Selector]:
    """The class of a selector.

    Args:
        method: key of `SELECTORS`, or class of a selector.

    Raises:
        ValueError: there is no such selector.
    """
    if isinstance(method, str) and method in SELECTORS:
        return SELECTORS[method]
    if isinstance(method, type) and issubclass(method, Selector):
        return method
    raise ValueError(f"method={method!r} is not one of {sorted(SELECTORS)}, nor the class of a Selector")


def method_key(method: Method) -> Method:
    """The key of a method in results: that of its row where it has one, else the class; see `find_selector`."""
    kind = find_selector(method)
    return method if isinstance(method, str) else next((key for key, row in SELECTORS.items() if row is kind), kind)


@dataclass
class _Run:
    """The selectors of one pair in one direction."""

    pair: Pair
    samples: Samples
    selectors: dict[Method, Selector] = field(default_factory=dict)


@torch.no_grad()
def compare(
    pairs: Iterable[Pair],
    images: Callable[[], Iterable[SelectionBatch] | Own[SelectionBatch]],
    methods: Mapping[Method, Mapping[str, Any]],
    kept_images: int = 512,
) -> dict[Method, list[Similarity]]:
    """Compute the values of selectors for pairs of anchors, from one pass over each anchor.

    With several processes each takes every n-th batch, and all return the same result.

    Args:
        pairs: pairs of anchors, one for each direction.
        images: function that returns batches for all of the anchors, the same on every process, or those of this one.
        methods: options by key of `SELECTORS`, or by class.
        kept_images: number of images that selectors which fit something keep samples of.

    Returns:
        By method, a `Similarity` for each pair.

    Raises:
        ValueError: an unknown method or option, no images, or an activation that is not finite (named).
    """
    runs, store = dict[tuple[str, str], _Run](), SampleStore(kept_images)
    for pair in pairs:
        run = _Run(pair, Samples(pair, store=store))
        for name, options in methods.items():
            kind = find_selector(name)
            if kind.symmetric and run.pair.names[::-1] in runs:
                continue
            try:
                run.selectors[name] = kind(pair, run.samples, **options)
            except TypeError as error:
                raise ValueError(f"method {name!r}: {error}") from error
        runs[run.pair.names] = run
    if any(selector.cuts for run in runs.values() for selector in run.selectors.values()):
        _stream(runs.values(), store, images())
    values = {
        (name, names): (selector.values(), {"method": getattr(name, "__name__", name), **selector.settings()})
        for names, run in runs.items()
        for name, selector in run.selectors.items()
    }

    def similarity(name: Method, names: tuple[str, str]) -> Similarity:
        if (name, names) in values:
            return Similarity(*names, *values[name, names])
        matrix, settings = values[name, names[::-1]]
        return Similarity(*names, matrix.T, settings)

    return {name: [similarity(name, names) for names in runs] for name in methods}


def _stream(
    runs: Collection[_Run], store: SampleStore, images: Iterable[SelectionBatch] | Own[SelectionBatch]
) -> None:
    """Show all batches to the samples and selectors, and merge their states over processes."""
    parts: list[Any] = [store, *(selector for run in runs for selector in run.selectors.values())]
    readers = [(run.pair.names, selector) for run in runs for selector in run.selectors.values()]
    everything = any(selector.all_images for _, selector in readers)
    for batch in own_items(images):
        if not everything and batch.start >= store.images:
            break
        batch.run(partial(_read, store, readers, batch))
        for part in parts:
            part.update(batch)
    if this_process().num_processes > 1:
        states = gather([part.state() for part in parts])
        for index, part in enumerate(parts):
            part.merge([each[index] for each in states])


def _read(
    store: SampleStore,
    readers: Iterable[tuple[tuple[str, str], Selector]],
    batch: SelectionBatch,
    anchor: Anchor,
    cut: int,
    activation: Tensor,
) -> None:
    """Show one activation to the samples, and to the selectors of the anchor's pairs."""
    store.read(anchor, cut, activation, batch)
    for names, selector in readers:
        if anchor.name in names:
            selector.read(anchor, cut, activation, batch)
