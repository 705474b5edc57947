"""Multiply-accumulates of routes, from one count per block, and parameters."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.routes.route import Segment
from restnet_hf.steps import Step


@torch.no_grad()
def count_macs(run: Callable[[Tensor], object], x: Tensor) -> int:
    """Multiply-accumulates of ``run(x)``: matrix products and convolutions, half of what torch counts as FLOPs.

    Attention counts as its two matrix products, whichever fused kernel would compute it.

    Args:
        run: function whose operations are counted.
        x: input of the function.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(x)
    return counter.get_total_flops() // 2


class MacsTable:
    """MACs of routes, with each block of an anchor counted once, so that a segment is a sum."""

    def __init__(self) -> None:
        self._blocks: dict[Anchor, list[int]] = {}
        self._modules: dict[str, int] = {}

    def macs(self, steps: Sequence[Step]) -> int:
        """MACs of a route for one image."""
        return sum(self._step(step) for step in steps)

    def _step(self, step: Step) -> int:
        if step.segment is not None:
            assert isinstance(step.module, Anchor)
            return sum(self.blocks(step.module)[step.segment.start : step.segment.stop])
        if step.name not in self._modules:
            self._modules[step.name] = count_macs(step, _zeros(step.shape, step.module))
        return self._modules[step.name]

    def blocks(self, anchor: Anchor) -> list[int]:
        """MACs from each cut to the next, from the image on; the last entry is from the last cut to the logits.

        Args:
            anchor: anchor whose blocks are counted, once.
        """
        if anchor not in self._blocks:
            inputs = [_zeros((1, 3, *anchor.preprocessing.image_size), anchor)]
            inputs += [_zeros(cut.layout.shape(1), anchor) for cut in anchor.cuts]
            stops = [*range(1, anchor.depth + 1), None]
            self._blocks[anchor] = [
                count_macs(partial(anchor, start=start, stop=stop), inputs[start]) for start, stop in enumerate(stops)
            ]
        return self._blocks[anchor]


def _zeros(shape: tuple[int, ...], module: torch.nn.Module) -> Tensor:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


class ParamsTable:
    """Parameters of routes, with those of each segment collected once."""

    def __init__(self) -> None:
        self._segments: dict[tuple[Anchor, Segment], frozenset[torch.nn.Parameter]] = {}

    def params(self, steps: Sequence[Step]) -> int:
        """Parameters that a route uses, each once."""
        return sum(parameter.numel() for parameter in {p for step in steps for p in self._step(step)})

    def _step(self, step: Step) -> Iterable[torch.nn.Parameter]:
        if step.segment is None:
            return step.parameters()
        assert isinstance(step.module, Anchor)
        key = step.module, step.segment
        if key not in self._segments:
            self._segments[key] = frozenset(step.parameters())
        return self._segments[key]


def count_params(steps: Sequence[Step]) -> int:
    """Parameters that a route uses, each once."""
    return ParamsTable().params(steps)
