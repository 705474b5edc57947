"""Normalisation layers, and the statistics of BatchNorm on a route."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.distributed import add_up


NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: a class of torch, or one whose name contains "norm"."""
    return isinstance(module, NORMS) or ("norm" in type(module).__name__.lower() and not any(module.children()))


class _Moments:
    """Mean and variance of each channel over several batches, of which processes have parts, in float64."""

    def __init__(self) -> None:
        self.total = torch.zeros(())  # number of rows, their sums (C,) and the sums of their squares (C,)

    def add(self, x: Tensor, counts: bool = True) -> None:
        """Add a batch, of which this process has x (N, C, ...); without ``counts`` only other processes have any."""
        rows = x.double().transpose(0, 1).flatten(1)
        own = torch.cat([rows.new_tensor([rows.shape[1]]), rows.sum(1), rows.square().sum(1)])
        self.total = self.total + add_up(own if counts else torch.zeros_like(own))

    @property
    def mean(self) -> Tensor:
        """Mean (C,)."""
        return self.total[1:].chunk(2)[0] / self.total[0]

    @property
    def var(self) -> Tensor:
        """Variance (C,), biased."""
        return (self.total[1:].chunk(2)[1] / self.total[0] - self.mean.square()).clamp_min(0)


@contextmanager
def _with_hooks(norms: Mapping[str, _BatchNorm], hook: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``hook`` with the name and the input of each norm, before the norm runs."""
    handles = [
        norm.register_forward_pre_hook(lambda module, args, name=name: hook(name, args[0]))
        for name, norm in norms.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def recalibrate(
    tensors: Mapping[str, Tensor],
    anchor: Anchor,
    start: int,
    activations: Iterable[tuple[Callable[[], Tensor], Callable[[], Tensor], bool]],
) -> bool:
    """Set the BatchNorm statistics of a tuned segment so that each norm's output has the anchor's own moments.

    The output of a norm on the route gets the mean and the variance of its output in the anchor itself on the same
    images. The route's plain statistics would not do: they would also remove the difference between these images and
    the training data, on which the head relies. The norms are set one after the other, batch by batch.

    Args:
        tensors: tensors that replace the segment's own weights and buffers, by name; changed in place.
        anchor: anchor at the end of the route.
        start: cut at which the segment begins.
        activations: two functions for each batch that return activations at the segment's start: the anchor's own,
            and that of the stitch; and whether they count, or only those of other processes do. Processes have parts
            of each batch.

    Returns:
        Whether the segment has any BatchNorm.
    """
    paths = [name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")]
    modules = {path: anchor.model.get_submodule(path) for path in paths}
    norms = {path: norm for path, norm in modules.items() if isinstance(norm, _BatchNorm)}
    if not norms:
        return False
    initial = {
        path: (tensors[f"{path}.running_mean"].double(), tensors[f"{path}.running_var"].double() + norm.eps)
        for path, norm in norms.items()
    }
    own, route = ({path: _Moments() for path in norms} for _ in range(2))

    def record(counts: bool, path: str, x: Tensor) -> None:
        own[path].add(x, counts)

    def correct(counts: bool, path: str, x: Tensor) -> None:
        route[path].add(x, counts)
        (mean, var), a, b, eps = initial[path], own[path], route[path], norms[path].eps
        scale = (b.var + eps) / (a.var + eps)
        tensors[f"{path}.running_var"].copy_((var * scale - eps).clamp_min(0))
        tensors[f"{path}.running_mean"].copy_(b.mean - scale.sqrt() * (a.mean - mean))

    for original, stitched, counts in activations:
        with _with_hooks(norms, partial(record, counts)):
            anchor(original(), start)
        with _with_hooks(norms, partial(correct, counts)):
            anchor(stitched(), start, None, lambda *span: tensors)
    return True
