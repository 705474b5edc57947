"""Pruning: what is left of a block's tensors when the weakest of its hidden channels are taken out."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.segments import outside, own_modules
from restnet_hf.stitches.norms import is_norm


EXACT = 1e-4  # of the range of an output: float32 may add up in another order, a wrong channel is off by far more
AT_LEAST = 8  # channels are kept, and a multiple of them, as kernels like it


def prunable(anchor: Anchor, block: int) -> bool:
    """Whether the piece that ends in cut ``block`` has hidden channels that a copy can go without."""
    try:
        return bool(pruned(anchor, block, 0.5))
    except ValueError:
        return False


@dataclass(frozen=True)
class _Hidden:
    """Channels that live between two layers only: who makes, who carries and who takes them, by name."""

    makers: tuple[str, ...]
    takers: tuple[str, ...]


@torch.no_grad()
def pruned(anchor: Anchor, block: int, share: float) -> dict[str, Tensor]:
    """The tensors of a piece that become smaller when its hidden channels of the smallest weights are left out.

    Hidden channels are those of a 1x1 convolution or linear layer that only depthwise convolutions, BatchNorm and
    squeeze-and-excite gates touch before the next such layer takes them: the wide middle of an inverted residual, or
    of a perceptron. A channel's weight is the norm over all that makes and takes it. Each group is certified: with
    the channels taken out, the piece gives what it gives with their weights at zero.

    Args:
        anchor: whose piece it is.
        block: the cut that it ends in, from 2 on.
        share: of the channels, from 0 to 1.

    Raises:
        ValueError: the piece has no such channels or, on the meta device, no weights; or the share is none.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of channels to leave out must be above 0 and below 1, not {share}")
    x, modules = activation(anchor, block - 1), dict(anchor.model.named_modules())
    if x.is_meta:
        raise ValueError(
            f"which channels of '{anchor.name}' a pruned copy keeps depends on its weights, and it has none on the "
            "meta device; build the model on another device, and move it after"
        )
    kept: dict[str, dict[int, Tensor]] = {}  # of each tensor, by dimension
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
                kept[name] = {**kept.get(name, {}), **dims}
    if not kept:
        raise ValueError(
            f"the block of '{anchor.name}' that ends in cut {block} has no hidden channels that can be left out"
        )
    return _slim(anchor, kept)


def _strongest(hidden: "_Hidden", modules: Mapping[str, nn.Module], share: float) -> Tensor:
    """Numbers of the channels that stay."""
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
    below = (len(strength) - 1) // AT_LEAST  # some go whatever the share, so that all shares prune the same blocks
    count = AT_LEAST * max(1, min(below, round((1 - share) * len(strength) / AT_LEAST)))
    return strength.topk(min(len(strength), count)).indices.sort().values


def _slim(anchor: Anchor, kept: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, dims in kept.items():
        path, _, leaf = name.rpartition(".")
        old = tensor = getattr(anchor.model.get_submodule(path), leaf)
        for dim, keep in dims.items():
            tensor = tensor.index_select(dim, keep)
        found[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
    return found


def _same(
    anchor: Anchor, block: int, x: Tensor, group: Mapping[str, Mapping[int, Tensor]], taken: Iterable[str]
) -> bool:
    """Whether the piece gives the same without some channels as with zeros where they are taken."""
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
        found = run(_slim(anchor, group))
    except (RuntimeError, ValueError, IndexError):  # shapes do not fit: others use these channels, too
        return False
    wanted = run(zeroed)
    near = found.shape == wanted.shape and (found - wanted).abs().max() <= EXACT * (wanted.max() - wanted.min())
    return bool(near)


def _single(anchor: Anchor, block: int) -> dict[str, Tensor]:
    """The tensors of a piece in float32: half a float's rounding would hide a wrong channel."""
    own = own_modules(anchor.model, outside(anchor.cut(block - 1), anchor.cut(block), None))
    found = {
        f"{path}.{leaf}" if path else leaf: tensor
        for module, path in own.items()
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    return {name: tensor.float() for name, tensor in found.items() if tensor.is_floating_point()}


def _hidden(anchor: Anchor, block: int, x: Tensor) -> Iterator[_Hidden]:
    """Groups that look like hidden channels, by the order in which layers run."""
    order: dict[nn.Module, str] = {}
    own = own_modules(anchor.model, outside(anchor.cut(block - 1), anchor.cut(block), None))
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
        gates: set[int] = set()  # widths of squeezed channels that come back
        for layer in run[index + 1 :]:
            ends = _ends(layer)
            if ends is None or ends == (0, width) or (ends[0] in gates and ends[1] == width):
                makers.append(order[layer])
            elif ends[0] == width and _comes_back(run[run.index(layer) + 1 :], ends[1], width):
                takers.append(order[layer])
                gates.add(ends[1])
            elif ends[0] == width:
                yield _Hidden(tuple(makers), (*takers, order[layer]))
                break
            else:
                break


def _comes_back(later: list[nn.Module], squeezed: int, width: int) -> bool:
    """Whether a layer widens squeezed channels again, and another takes the wide ones after it."""
    ends = [found for module in later if (found := _ends(module)) is not None]
    return ends[:1] == [(squeezed, width)] and any(found[0] == width for found in ends[1:])


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
    """What there is at a cut for an image of noise."""
    like = next(anchor.parameters())
    rng, size = torch.Generator().manual_seed(0), anchor.preprocessing.image_size
    images = torch.randn(1, 3, *size, generator=rng, device="cpu")  # whatever torch.device() the caller is in
    return anchor(images.to(like.device, like.dtype), 0, cut)
