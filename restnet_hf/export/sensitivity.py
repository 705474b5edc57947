"""Sensitivity of layers: how much eight bits change the output of each."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from restnet_hf.export.folding import module_of
from restnet_hf.export.programs import LAYERS, Program


def rounded(x: Tensor, low: Tensor, high: Tensor, steps: int = 255) -> Tensor:
    """Values rounded to an even scale that contains zero.

    Args:
        x: values that are rounded.
        low: lowest value of the scale.
        high: highest value of the scale.
        steps: number of steps from the lowest to the highest value.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = ((high - low) / steps).clamp_min(torch.finfo(x.dtype).tiny)
    zero = (low / step).round()
    return ((x / step).round().clamp(zero, zero + steps)) * step


class _Comparison(fx.Interpreter):
    """Runs a graph and compares the output of each layer with the output in eight bits."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.noise: dict[str, float] = defaultdict(float)
        self.signal: dict[str, float] = defaultdict(float)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; add the squared error in eight bits, and the variance, of a layer's output to the sums."""
        result = super().run_node(n)
        if n.target in LAYERS and isinstance(result, Tensor):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            x, weight, *rest = args
            rows = weight.flatten(1) if weight.dim() > 1 else weight[None]
            shape = (-1, *[1] * (weight.dim() - 1))
            most = rows.abs().amax(1).view(shape)
            low = rounded(x, x.min(), x.max()), rounded(weight, -most, most)
            error = n.target(*low, *rest, **kwargs) - result
            self.noise[module_of(n)] += float(error.double().square().sum())
            self.signal[module_of(n)] += float((result.double() - result.double().mean()).square().sum())
        return result


@torch.no_grad()
def most_sensitive(program: Program, images: Tensor) -> list[str]:
    """The layers of a program, the most sensitive first.

    A layer's sensitivity is the squared error of its output where its own input and weight are in eight bits, over the
    variance of the output. Inputs have one scale from the lowest to the highest value, weights one for each output
    channel.

    Args:
        program: program of a route.
        images: prepared images (N, 3, H, W).
    """
    module = program.exported.module()
    comparison = _Comparison(module)
    batch = len(program.example)
    for piece in images.split(batch):
        if len(piece) == batch:
            comparison.run(piece.to(program.example.dtype))
    noise, signal = comparison.noise, comparison.signal
    share = {layer: noise[layer] / max(signal[layer], 1e-30) for layer in noise}
    return sorted(share, key=lambda layer: -share[layer])
