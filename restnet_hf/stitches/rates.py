"""Learning rates of stitches, from the size of their weights and the number of their inputs."""

import math
from typing import cast

from torch import Tensor, nn

from restnet_hf.stitches.branches import BranchStitch
from restnet_hf.stitches.layers import Stitch
from restnet_hf.stitches.tuning import WEIGHTED_LAYERS


SHARE = 0.3  # of an output's size that one step may change
OTHERS = 1e-3  # for biases, constants, low-rank updates, and weights that begin at zero
BRANCHES = 1e-4  # for copies of an anchor's own blocks, which know the task


def learning_rates(stitch: Stitch) -> dict[nn.Parameter, float]:
    """A learning rate of Adam for each parameter of a stitch that has been fitted.

    For a weight ``W`` of so many inputs it is ``SHARE · rms(W) / sqrt(inputs)``. Adam moves each entry by about its
    rate in a step; where the entries of a row move together, as at first, its output changes by ``SHARE`` of its own
    size, whatever the width and the scale of the activations are (as in μP, arXiv 2203.03466, section 3, where rates
    fall with the width).

    Args:
        stitch: stitch of any kind.
    """
    rates = dict.fromkeys(stitch.parameters(), BRANCHES if isinstance(stitch, BranchStitch) else OTHERS)
    for module in stitch.modules():
        if isinstance(module, WEIGHTED_LAYERS):
            rates[cast("nn.Parameter", module.weight)] = _rate(module.weight)
    return rates


def _rate(weight: Tensor) -> float:
    size = weight.detach().float().square().mean().sqrt().item()
    return SHARE * size / math.sqrt(weight[0].numel()) if size > 0 and math.isfinite(size) else OTHERS
