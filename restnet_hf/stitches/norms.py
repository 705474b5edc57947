"""Layers that normalise, and the statistics of BatchNorm on a route."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from restnet_hf.anchors.anchor import Anchor


NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's own kinds, and those of libraries that are called so."""
    return isinstance(module, NORMS) or ("norm" in type(module).__name__.lower() and not any(module.children()))


class _Moments:
    """Mean and variance of each channel over all that was seen, in float64."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def see(self, x: Tensor) -> None:
        """Add a batch (N, C, ...)."""
        rows = x.double().transpose(0, 1).flatten(1)
        self.count += rows.shape[1]
        self.sums, self.squares = self.sums + rows.sum(1), self.squares + rows.square().sum(1)

    @property
    def mean(self) -> Tensor:
        return self.sums / self.count

    @property
    def var(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp_min(0)


@contextmanager
def _watched(norms: Mapping[str, _BatchNorm], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the name and the input of each norm, before it runs."""
    handles = [
        norm.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
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
    activations: Iterable[tuple[Callable[[], Tensor], Callable[[], Tensor]]],
) -> bool:
    """Set the BatchNorm statistics of a tuned segment so that each norm gives a route what it gives the anchor itself.

    What a norm puts out for the route's images gets the mean and the variance of what it puts out for the anchor's own
    activations of the same images; taking the route's plain statistics would undo what the data's own differ from
    those of training, to which the head is used. One norm after the other, as the images come.

    Args:
        tensors: what a route puts in the place of the segment's own weights and buffers, by name; changed in place.
        anchor: anchor at the end of the route.
        start: cut at which the segment begins.
        activations: for each batch, functions that give the activation at the segment's start: the anchor's own, and
            what the stitch gives in its place.

    Returns:
        Whether there was any BatchNorm.
    """
    paths = [name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")]
    found = {path: anchor.model.get_submodule(path) for path in paths}
    norms = {path: norm for path, norm in found.items() if isinstance(norm, _BatchNorm)}
    if not norms:
        return False
    kept = {
        path: (tensors[f"{path}.running_mean"].double(), tensors[f"{path}.running_var"].double() + norm.eps)
        for path, norm in norms.items()
    }
    own, mine = ({path: _Moments() for path in norms} for _ in range(2))

    def correct(path: str, x: Tensor) -> None:
        mine[path].see(x)
        (mean, var), a, b, eps = kept[path], own[path], mine[path], norms[path].eps
        scale = (b.var + eps) / (a.var + eps)
        tensors[f"{path}.running_var"].copy_((var * scale - eps).clamp_min(0))
        tensors[f"{path}.running_mean"].copy_(b.mean - scale.sqrt() * (a.mean - mean))

    for theirs, stitched in activations:
        with _watched(norms, lambda path, x: own[path].see(x)):
            anchor(theirs(), start)
        with _watched(norms, correct):
            anchor(stitched(), start, None, lambda *span: tensors)
    return True
