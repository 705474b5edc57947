"""Float32 weights that train beside anchors in half precision: activations are cast where they enter and leave."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn


Function = TypeVar("Function", bound=Callable[..., Any])


def trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights train: float32 instead of float16 and bfloat16, as PEFT's ``autocast_adapter_dtype``.

    Args:
        dtype: type of the anchors' weights.
    """
    return torch.promote_types(dtype, torch.float32)


def in_full_precision(function: Function) -> Function:
    """A function that computes in the types of its tensors, also where ``torch.autocast`` is on around it.

    Args:
        function: function whose first argument is a tensor on the device that it computes on.
    """

    @wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return cast("Function", run)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type of ``torch.autocast`` on a device; None where it is off.

    Args:
        device: device on which tensors are computed.
    """
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """The type of a module's first weight; None where it has none."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def run_in_own_type(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module in the type of its weights; the result has the type of the input.

    Args:
        module: module whose first parameter has the type of all.
        x: activation (N, ...) of any type.
    """
    return module(x.to(next(module.parameters()).dtype)).to(x.dtype)


class InOwnType(nn.Module):
    """A module that runs another one as `run_in_own_type` does.

    Args:
        module: module that may have weights of another type.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """The module's output for an activation (N, ...), in the activation's type."""
        return run_in_own_type(self.module, x)


def accept_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself, or in `InOwnType` where its weights have another type than the activations.

    Args:
        module: module that may have weights of another type.
        dtype: type of the activations.
    """
    return module if weight_dtype(module) in (None, dtype) else InOwnType(module)


def make_trainable(module: nn.Module) -> bool:
    """Cast a module that was cast to half precision back to float32, in which it trains.

    Args:
        module: a stitch, head or tuned part; changed in place.

    Returns:
        Whether it was cast.
    """
    dtype = weight_dtype(module)
    if dtype is None or trained_dtype(dtype) == dtype:
        return False
    module.to(trained_dtype(dtype))
    return True


def match_stored_types(parts: Mapping[str, nn.Module], weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Cast parts to the anchors' type where a file has them in it, so that they compute what they did when saved.

    Args:
        parts: stitches, heads and tuned parts by name; changed in place.
        weights: tensors of the file, by name.
        dtype: type of the anchors' weights.
    """
    if trained_dtype(dtype) == dtype:
        return
    for name, part in parts.items():
        stored = {weights[f"{name}.{key}"].dtype for key, own in part.state_dict().items() if own.is_floating_point()}
        if stored == {dtype}:
            part.to(dtype)
