"""Folding of linear stitches: an affine map before other affine maps is merged into them."""

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from restnet_hf.profiling.macs import count_macs
from restnet_hf.stitches.layers import LinearStitch, LowRankStitch


aten = torch.ops.aten
AFFINE = {aten.conv2d.default, aten.linear.default}
MOVES = {  # operations that move numbers and compute nothing
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
TOLERANCE = 1e-4  # share of the largest output; rounding of networks in float32 is smaller


def merge_stitches(steps: nn.Sequential) -> None:
    """Replace low-rank stitches by the single affine map that they compute."""
    for index, step in enumerate(steps):
        if isinstance(step, LowRankStitch):
            steps[index] = step.merged()


@torch.no_grad()
def fold_stitches(steps: nn.Sequential, example: Tensor, exported: ExportedProgram) -> int:
    """Fold linear stitches into the layers that follow, where that is exact and saves work.

    A stitch is folded where its output goes, through nothing but moves, to convolutions without padding or to linear
    layers on its channels: W (V x + c) + b is (W V) x + (W c + b). It is kept where the layer that follows is so wide
    that folding costs more than it saves. The outputs before and after are compared on noise.

    Args:
        steps: a baked route; changed in place.
        example: images (N, 3, H, W) of noise.
        exported: graph of the route; paths of its modules begin with ``steps.``.

    Returns:
        Number of stitches that were folded.
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
            _merge(layer, proj)
        stitch.proj = cast(Any, nn.Identity())  # the stitch's other work, such as resizing, is still done
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
    except RuntimeError:  # the network depends on the number of channels
        return False


def _following(exported: ExportedProgram, path: str) -> list[str]:
    """Paths in the steps of all layers that take a layer's output; none where one of them cannot be merged."""
    graph = exported.graph
    uses = Counter(module_of(node) for node in graph.nodes if node.target in AFFINE)
    pending = [node for node in graph.nodes if node.target in AFFINE and module_of(node) == path]
    if len(pending) != 1:
        return []
    layers: dict[str, None] = {}
    while pending:
        for user in pending.pop().users:
            if user.target in MOVES:
                pending.append(user)
            elif _can_merge(user) and uses[module_of(user)] == 1:
                layers[module_of(user).removeprefix("steps.")] = None
            else:
                return []
    return list(layers)


def _can_merge(node: fx.Node) -> bool:
    """Whether a node is a layer without padding or groups that uses the weights of its module unchanged."""
    args: list[Any] = [*node.args]
    if node.target not in AFFINE or args[1].op != "placeholder":
        return False
    if node.target is aten.linear.default:
        return True
    args += [None, [1, 1], [0, 0], [1, 1], 1][len(args) - 2 :]
    return not any(args[4]) and args[6] == 1


def _merge(layer: Any, before: Any) -> None:
    """Merge the affine map before a layer into the layer."""
    inner = before.weight.flatten(1).double()  # (C, C in)
    shift = before.bias.double()
    weight = layer.weight.double()
    if weight.dim() == 4:
        changed = torch.einsum("ochw,ci->oihw", weight, inner)
        moved = weight.sum((2, 3)) @ shift
    else:  # a patch merge takes the channels of several positions side by side
        pieces = weight.unflatten(1, (-1, len(inner)))
        changed, moved = (pieces @ inner).flatten(1), pieces.sum(1) @ shift
    bias = moved if layer.bias is None else layer.bias.double() + moved
    layer.weight = nn.Parameter(changed.to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


def module_of(node: fx.Node) -> str:
    """Path of the module whose forward the node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(stack.values())), "")
