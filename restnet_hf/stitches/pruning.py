"""Pruning: the tensors of a block without the weakest of its hidden channels."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.segments import remaining_modules, unused_paths
from restnet_hf.stitches.norms import is_norm


TOLERANCE = 1e-4  # of an output's range: above the rounding of float32 sums, far below the effect of a wrong channel
CHANNEL_MULTIPLE = 8  # the number of channels is a multiple of it, for which kernels are fast


def prunable(anchor: Anchor, block: int) -> bool:
    """Whether the block that ends in cut ``block`` has hidden channels that a copy can leave out."""
    try:
        return bool(pruned(anchor, block, 0.5))
    except ValueError:
        return False


@dataclass(frozen=True)
class _Hidden:
    """Channels between two layers only: names of the layers that make or carry them, and of those that take them."""

    makers: tuple[str, ...]
    takers: tuple[str, ...]


@torch.no_grad()
def pruned(anchor: Anchor, block: int, share: float) -> dict[str, Tensor]:
    """The smaller tensors of a block whose weakest hidden channels are left out.

    Hidden channels are those of a 1x1 convolution or linear layer that pass only through depthwise convolutions,
    BatchNorm and squeeze-and-excite gates before the next such layer takes them: the wide middle of an inverted
    residual, or of a perceptron. The strength of a channel is the norm of all weights that make and take it. Each
    group of channels is verified: without them the block computes what it computes with their weights at zero.

    Args:
        anchor: anchor that holds the block; it is not changed.
        block: number of the cut at the end of the block, from 2 on.
        share: share of the channels to leave out, above 0 and below 1.

    Raises:
        ValueError: the block has no such channels or, on the meta device, no weights; or the share is out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of channels to leave out must be above 0 and below 1, not {share}")
    x, modules = activation(anchor, block - 1), dict(anchor.model.named_modules())
    if x.is_meta:
        raise ValueError(
            f"which channels of '{anchor.name}' a pruned copy keeps depends on its weights, and it has none on the "
            "meta device; build the model on another device, and move it after"
        )
    channels: dict[str, dict[int, Tensor]] = {}  # indices by tensor name and dimension
    for hidden in _hidden(anchor, block, x):
        keep = _strongest(hidden, modules, share)
        group = {
            f"{name}.{leaf}": {0: keep}
            for name in hidden.makers
            for leaf, tensor in (*modules[name].named_parameters(recurse=False), *modules[name].named_buffers())
            if tensor.dim()
        }
        group |= {f"{name}.weight": {1: keep} for name in hidden.takers}
        width = len(modules[hidden.makers[0]].get_parameter("weight"))
        if len(keep) < width and _same(anchor, block, x, group, [f"{name}.weight" for name in hidden.takers]):
            for name, dims in group.items():
                channels[name] = {**channels.get(name, {}), **dims}
    if not channels:
        raise ValueError(
            f"the block of '{anchor.name}' that ends in cut {block} has no hidden channels that can be left out"
        )
    return _slim(anchor, channels)


def _strongest(hidden: "_Hidden", modules: Mapping[str, nn.Module], share: float) -> Tensor:
    """Indices of the channels that stay."""
    makers, takers = (
        [
            modules[name].get_parameter("weight").detach().double()
            for name in names
            if "weight" in modules[name]._parameters
        ]
        for names in (hidden.makers, hidden.takers)
    )
    weights = [weight.flatten(1) for weight in makers if weight.dim() > 1]
    weights += [weight.transpose(0, 1).flatten(1) for weight in takers]
    strength = torch.stack([weight.square().sum(1) for weight in weights]).sum(0)
    below = (len(strength) - 1) // CHANNEL_MULTIPLE  # some go at any share, so that all shares prune the same blocks
    count = CHANNEL_MULTIPLE * max(1, min(below, round((1 - share) * len(strength) / CHANNEL_MULTIPLE)))
    return strength.topk(min(len(strength), count)).indices.sort().values


def _slim(anchor: Anchor, channels: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    """The tensors with only the given indices, by name."""
    tensors: dict[str, Tensor] = {}
    for name, dims in channels.items():
        path, _, leaf = name.rpartition(".")
        old = tensor = getattr(anchor.model.get_submodule(path), leaf)
        for dim, keep in dims.items():
            tensor = tensor.index_select(dim, keep)
        tensors[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
    return tensors


def _same(
    anchor: Anchor, block: int, x: Tensor, group: Mapping[str, Mapping[int, Tensor]], taken: Iterable[str]
) -> bool:
    """Whether the block computes the same without some channels as with zero weights where they are taken."""
    zeroed = {}
    for name in taken:
        weight = anchor.model.get_parameter(name)
        keep = group[name][1]
        zeroed[name] = torch.zeros_like(weight).index_copy(1, keep, weight.index_select(1, keep))
    whole = _single(anchor, block) if torch.finfo(x.dtype).bits < 32 else {}
    start = x.float() if whole else x

    def run(changed: Mapping[str, Tensor]) -> Tensor:
        tensors = {**whole, **{name: tensor.to(start.dtype) for name, tensor in changed.items()}}
        return anchor(start, block - 1, block, lambda *span: tensors)

    try:
        output = run(_slim(anchor, group))
    except (RuntimeError, ValueError, IndexError):  # shapes do not fit: other layers use these channels, too
        return False
    wanted = run(zeroed)
    near = output.shape == wanted.shape and (output - wanted).abs().max() <= TOLERANCE * (wanted.max() - wanted.min())
    return bool(near)


def _single(anchor: Anchor, block: int) -> dict[str, Tensor]:
    """The tensors of a block in float32: the rounding of half precision would hide a wrong channel."""
    own = remaining_modules(anchor.model, unused_paths(anchor.cut(block - 1), anchor.cut(block), None))
    tensors = {
        f"{path}.{leaf}" if path else leaf: tensor
        for module, path in own.items()
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    return {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}


def _hidden(anchor: Anchor, block: int, x: Tensor) -> Iterator[_Hidden]:
    """Groups of layers that look like those of hidden channels, by the order in which layers run."""
    order: dict[nn.Module, str] = {}
    own = remaining_modules(anchor.model, unused_paths(anchor.cut(block - 1), anchor.cut(block), None))
    layers = {module: name for module, name in own.items() if _ends(module) or is_norm(module)}
    handles = [m.register_forward_pre_hook(lambda m, args: order.setdefault(m, layers[m]) and None) for m in layers]
    try:
        anchor(x, block - 1, block)
    finally:
        for handle in handles:
            handle.remove()
    run = list(order)
    for index, first in enumerate(run):
        ends = _ends(first)
        if ends is None or ends[0] == 0:
            continue
        makers, takers, width = [order[first]], list[str](), ends[1]
        gates: set[int] = set()  # widths of squeezed channels that are widened again
        for layer in run[index + 1 :]:
            ends = _ends(layer)
            if ends is None or ends == (0, width) or (ends[0] in gates and ends[1] == width):
                makers.append(order[layer])
            elif ends[0] == width and _is_gate(run[run.index(layer) + 1 :], ends[1], width):
                takers.append(order[layer])
                gates.add(ends[1])
            elif ends[0] == width:
                yield _Hidden(tuple(makers), (*takers, order[layer]))
                break
            else:
                break


def _is_gate(later: list[nn.Module], squeezed: int, width: int) -> bool:
    """Whether a layer widens squeezed channels again, and another takes the wide ones after it."""
    ends = [channels for module in later if (channels := _ends(module)) is not None]
    return ends[:1] == [(squeezed, width)] and any(channels[0] == width for channels in ends[1:])


def _ends(module: nn.Module) -> tuple[int, int] | None:
    """Channels in and out of a layer that mixes channels, (0, channels) of a depthwise convolution."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        if module.groups == 1:
            return module.in_channels, module.out_channels
        if module.groups == module.in_channels == module.out_channels:
            return 0, module.out_channels
    return None


@torch.no_grad()
def activation(anchor: Anchor, cut: int) -> Tensor:
    """The activation at a cut for an image of noise."""
    like = next(anchor.parameters())
    rng, size = torch.Generator().manual_seed(0), anchor.preprocessing.image_size
    images = torch.randn(1, 3, *size, generator=rng, device="cpu")  # even inside a context of torch.device()
    return anchor(images.to(like.device, like.dtype), 0, cut)
