"""Which layers low precision costs the most, each by itself."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from restnet_hf.export.folding import module_of
from restnet_hf.export.programs import LAYERS, Program


def rounded(x: Tensor, low: Tensor, high: Tensor, steps: int = 255) -> Tensor:
    """Values on an even scale of so many steps from ``low`` to ``high``, and zero on it."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = ((high - low) / steps).clamp_min(torch.finfo(x.dtype).tiny)
    zero = (low / step).round()
    return ((x / step).round().clamp(zero, zero + steps)) * step


class _Watch(fx.Interpreter):
    """Runs a graph, and at each layer compares what it gives with what it would give in eight bits."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.noise: dict[str, float] = defaultdict(float)
        self.signal: dict[str, float] = defaultdict(float)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in LAYERS and isinstance(result, Tensor):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            x, weight, *rest = args
            rows = weight.flatten(1) if weight.dim() > 1 else weight[None]
            shape = (-1, *[1] * (weight.dim() - 1))
            most = rows.abs().amax(1).view(shape)
            low = rounded(x, x.min(), x.max()), rounded(weight, -most, most)
            off = n.target(*low, *rest, **kwargs) - result
            self.noise[module_of(n)] += float(off.double().square().sum())
            self.signal[module_of(n)] += float((result.double() - result.double().mean()).square().sum())
        return result


@torch.no_grad()
def most_sensitive(program: Program, images: Tensor) -> list[str]:
    """The layers of a program, the one first whose own output eight bits change the most, relative to its variance.

    Inputs are on one scale from the least to the largest, weights on one for each output channel.

    Args:
        program: of a route.
        images: (N, 3, H, W), prepared.
    """
    module = program.exported.module()
    watch = _Watch(module)
    batch = len(program.example)
    for piece in images.split(batch):
        if len(piece) == batch:
            watch.run(piece.to(program.example.dtype))
    share = {layer: watch.noise[layer] / max(watch.signal[layer], 1e-30) for layer in watch.noise}
    return sorted(share, key=lambda layer: -share[layer])
