"""Counts the places at which a processor would wait for an accelerator, on a processor alone."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Waits(TorchDispatchMode):
    """Numbers that are read from tensors, and selections by a mask, whose shape depends on one; ``count`` of them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = args[1] if func is torch.ops.aten.index.Tensor else ()
        self.count += func in READS or any(mask is not None and mask.dtype == torch.bool for mask in masks)
        return func(*args, **(kwargs or {}))


def waits(function):
    """How often a function waits, once it has run before."""
    function()
    with Waits() as mode:
        function()
    return mode.count
