"""Stitches that need not run: an affine map before affine maps is one with them."""

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from restnet_hf.profiling.macs import count_macs
from restnet_hf.stitches.layers import LinearStitch, LowRankStitch


aten = torch.ops.aten
AFFINE = {aten.conv2d.default, aten.linear.default}
MOVES = {  # operations that move numbers about and compute nothing
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.unflatten.int,
    aten.view.default,
}
TOLERANCE = 1e-4  # of the largest output; float32 rounding in networks is below


def merge_stitches(steps: nn.Sequential) -> None:
    """Give low-rank stitches the one affine map that they are."""
    for index, step in enumerate(steps):
        if isinstance(step, LowRankStitch):
            steps[index] = step.merged()


@torch.no_grad()
def fold_stitches(steps: nn.Sequential, example: Tensor, exported: ExportedProgram) -> int:
    """Fold linear stitches into the layers that follow, where that is exact and saves work; returns how many.

    A stitch goes where every way from it leads, through nothing but moves, to convolutions without padding or to
    linear layers on its channels: W (V x + c) + b is (W V) x + (W c + b). Into a layer far wider than the stitch it
    would cost more than it saves, and stays. What comes out is compared with what came out before, on noise.

    Args:
        steps: a baked route; changed in place.
        example: images.
        exported: their graph; its modules' paths begin with ``steps.``.
    """
    folded = 0
    for index, stitch in enumerate(steps):
        if not isinstance(stitch, LinearStitch) or type(stitch)._map is not LinearStitch._map:
            continue
        layers = [steps.get_submodule(path) for path in _following(exported, f"steps.{index}.proj")]
        if not layers:
            continue
        before, cost = steps(example), count_macs(steps, example)
        proj: nn.Module = stitch.proj
        kept = [(layer.weight, layer.bias) for layer in layers]
        for layer in layers:
            _absorb(layer, proj)
        stitch.proj = cast(Any, nn.Identity())  # what else it does, resizing for one, is still done
        if _same(steps, example, before) and count_macs(steps, example) < cost:
            folded += 1
            continue
        stitch.proj = cast(Any, proj)
        for layer, (weight, bias) in zip(layers, kept, strict=True):
            layer.weight, layer.bias = weight, bias
    return folded


def _same(steps: nn.Sequential, example: Tensor, before: Tensor) -> bool:
    try:
        return bool((steps(example) - before).abs().max() <= TOLERANCE * before.abs().max())
    except RuntimeError:  # a network that counts on the number of channels
        return False


def _following(exported: ExportedProgram, path: str) -> list[str]:
    """Paths, in the steps, of all layers that the output of a layer goes to; none where one cannot take it in."""
    graph = exported.graph
    uses = Counter(module_of(node) for node in graph.nodes if node.target in AFFINE)
    pending = [node for node in graph.nodes if node.target in AFFINE and module_of(node) == path]
    if len(pending) != 1:
        return []
    found: dict[str, None] = {}
    while pending:
        for user in pending.pop().users:
            if user.target in MOVES:
                pending.append(user)
            elif _takes_in(user) and uses[module_of(user)] == 1:
                found[module_of(user).removeprefix("steps.")] = None
            else:
                return []
    return list(found)


def _takes_in(node: fx.Node) -> bool:
    """Whether a node is a layer without padding or groups, on weights as they are in its module."""
    args: list[Any] = [*node.args]
    if node.target not in AFFINE or args[1].op != "placeholder":
        return False
    if node.target is aten.linear.default:
        return True
    args += [None, [1, 1], [0, 0], [1, 1], 1][len(args) - 2 :]
    return not any(args[4]) and args[6] == 1


def _absorb(layer: Any, before: Any) -> None:
    """Make a layer do what another one does before it."""
    inner = before.weight.flatten(1).double()  # (C, C in)
    shift = before.bias.double()
    weight = layer.weight.double()
    if weight.dim() == 4:
        changed = torch.einsum("ochw,ci->oihw", weight, inner)
        moved = weight.sum((2, 3)) @ shift
    else:  # a patch merge has the channels of several positions side by side
        pieces = weight.unflatten(1, (-1, len(inner)))
        changed, moved = (pieces @ inner).flatten(1), pieces.sum(1) @ shift
    bias = moved if layer.bias is None else layer.bias.double() + moved
    layer.weight = nn.Parameter(changed.to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


def module_of(node: fx.Node) -> str:
    """Path of the module in whose forward a node is."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(stack.values())), "")
