"""Branches: a trainable copy of one of an anchor's own blocks stands for several, or a slimmer one for itself."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.segments import outside, own_modules
from restnet_hf.anchors.tracing import sketch
from restnet_hf.routes.families import pruned_share
from restnet_hf.routes.route import StitchPoint
from restnet_hf.stitches.layers import BRANCH, Problem, Stitch, StitchConfig, make_stitch
from restnet_hf.stitches.norms import is_norm
from restnet_hf.stitches.pruning import activation, pruned


class BranchStitch(Stitch):
    """A block of an anchor with weights of its own (AdaptiveNet, arXiv 2303.07129), from one cut to a later one.

    The block that is copied is the last one in between that changes the layout, so that strides and widths are right
    and every weight comes from the anchor; where none does, it is the first. Where two blocks change the layout, as
    in a stage of one block, an affine stitch leads to the copy. The copy runs as the anchor's own segment does, with
    its tensors in the place of the anchor's. BatchNorm statistics are copied and stay.

    Args:
        anchor: whose block it is; it is neither held nor changed.
        start, stop: cuts that the branch leads from and to.
        prune: share of the hidden channels that the copy goes without.
        ghost: share the anchor's memory, where only shapes are needed.

    Raises:
        ValueError: the cuts are not of a span of blocks, or the block has no hidden channels that can be pruned.
    """

    def __init__(self, anchor: Anchor, start: int, stop: int, prune: float = 0.0, ghost: bool = False) -> None:
        super().__init__()
        if not 0 < start < stop <= anchor.depth:
            raise ValueError(
                f"a branch of '{anchor.name}' must lead from a cut to a later one, 1 to {anchor.depth}, not from "
                f"{start} to {stop}"
            )
        self._anchor = (anchor,)  # in a tuple: no module of this one
        changes = [cut for cut in range(start + 1, stop + 1) if anchor.layout(cut) != anchor.layout(cut - 1)]
        self.block = max(changes, default=start + 1)
        self.enter: Stitch | None = None
        if anchor.layout(start) != anchor.layout(self.block - 1):
            self.enter = make_stitch(anchor.layout(start), anchor.layout(self.block - 1), StitchConfig())
            self.target_cut = self.block - 1
        tensors = block_tensors(anchor, self.block)
        if prune:
            tensors |= pruned(anchor, self.block, prune)
        self.own = nn.ParameterDict()
        for name, tensor in tensors.items():
            key, copy = name.replace(".", "/"), tensor.detach() if ghost else tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                self.own[key] = nn.Parameter(copy)
            else:
                self.register_buffer(key, copy)
        self._names = tuple(tensors)

    @property
    def anchor(self) -> Anchor:
        """Whose block it is."""
        return self._anchor[0]

    def tensors(self) -> dict[str, Tensor]:
        """What takes the place of the anchor's own, by name in the network."""
        keys = ((name, name.replace(".", "/")) for name in self._names)
        return {name: self.own[key] if key in self.own else getattr(self, key) for name, key in keys}

    def forward(self, x: Tensor) -> Tensor:
        """The activation at ``start`` as one at ``stop``."""
        if self.enter is not None:
            x = self.enter(x)
        return self.anchor(x, self.block - 1, self.block, lambda *span: self.tensors())

    def bake(self) -> nn.Module:
        baked = self.anchor.bake(self.block - 1, self.block, self.tensors())
        return baked if self.enter is None else nn.Sequential(self.enter.bake(), baked)

    def problems(self) -> list[Problem]:
        return [] if self.enter is None else self.enter.problems()


def stitch_at(point: StitchPoint, anchors: Mapping[str, Anchor], config: StitchConfig, ghost: bool = False) -> Stitch:
    """A new stitch for a place, with the type of the weights that it leads to.

    A branch whose name says so, as those of `families.skip` do, is a pruned one.

    Args:
        point: the place.
        anchors: by name.
        config: of the stitch.
        ghost: one of which only shapes are needed, and which takes no memory.

    Raises:
        ValueError: a branch would join two anchors, or lead back.
    """
    source, target = anchors[point.source], anchors[point.target]
    like = next(target.parameters())
    if config.kind != BRANCH:
        layouts = source.layout(point.source_cut), target.layout(point.target_cut)
        with torch.device("meta" if ghost else torch.get_default_device()):
            made = make_stitch(*layouts, config)
        return made if ghost else made.to(like.device, like.dtype)
    if source is not target:
        raise ValueError(
            f"a branch stands for blocks of one anchor and cannot join '{point.source}' to '{point.target}'; choose "
            "another kind of stitch"
        )
    prune = config.prune or pruned_share(point.via)
    return BranchStitch(source, point.source_cut, point.target_cut, prune, ghost).to(like.device, like.dtype)


def stitch_that_fits(
    point: StitchPoint, anchors: Mapping[str, Anchor], config: StitchConfig, check: Callable[[nn.Module], None]
) -> Stitch:
    """`stitch_at`, checked before it takes memory, or where it takes no more than a block of its anchor, after."""
    if config.kind != BRANCH:
        check(stitch_at(point, anchors, config, ghost=True))
        return stitch_at(point, anchors, config)
    made = stitch_at(point, anchors, config)
    check(made)
    return made


def block_tensors(anchor: Anchor, block: int) -> dict[str, Tensor]:
    """The parameters that the piece that ends in cut ``block`` uses, and its norms' statistics, by name, each once."""
    own = own_modules(anchor.model, outside(anchor.cut(block - 1), anchor.cut(block), None))
    names = {parameter: name for name, parameter in anchor.own_parameters(block - 1, block).items()}
    anchor = _on_one_device(anchor)
    with torch.inference_mode(False), torch.enable_grad():
        copies = {name: parameter.detach().clone().requires_grad_() for parameter, name in names.items()}
        end = anchor(activation(anchor, block - 1), block - 1, block, lambda *span: copies)
        reached = torch.autograd.grad(end.float().sum(), list(copies.values()), allow_unused=True)
    used = {name for name, gradient in zip(copies, reached, strict=True) if gradient is not None}
    found: dict[str, Tensor] = {name: parameter for parameter, name in names.items() if name in used}
    for module, path in own.items():
        if is_norm(module):
            found |= {f"{path}.{leaf}": b for leaf, b in module.named_buffers(recurse=False) if b.is_floating_point()}
    return found


def _on_one_device(anchor: Anchor) -> Anchor:
    """An anchor that can run: one whose weights are on the meta device and whose buffers are not is all put there."""
    if len({tensor.is_meta for tensor in (*anchor.model.parameters(), *anchor.model.buffers())}) == 1:
        return anchor
    other = Anchor(sketch(anchor.model), anchor.name, anchor.preprocessing, granularity=anchor.granularity)
    other._found = anchor.found
    return other
