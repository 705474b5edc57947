"""Branches: a trainable copy of a block replaces several blocks, or a pruned copy the block itself."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.segments import remaining_modules, unused_paths
from restnet_hf.anchors.tracing import meta_copy
from restnet_hf.routes.families import pruned_share
from restnet_hf.routes.route import StitchPoint
from restnet_hf.stitches.layers import BRANCH, Problem, Stitch, StitchConfig, make_stitch
from restnet_hf.stitches.norms import is_norm
from restnet_hf.stitches.precision import accept_type, run_in_own_type, trained_dtype
from restnet_hf.stitches.pruning import activation, pruned


class BranchStitch(Stitch):
    """A block of an anchor with weights of its own (AdaptiveNet, arXiv 2303.07129), from one cut to a later one.

    The copied block is the last one between the cuts that changes the layout, so that strides and widths fit and
    every weight comes from the anchor; if none does, it is the first. If two blocks change the layout, as in a stage
    of one block, an affine stitch precedes the copy. The copy runs as the anchor's own segment does, with its tensors
    in place of the anchor's. BatchNorm statistics are copied and stay constant.

    Args:
        anchor: anchor whose block is copied; it is neither changed nor registered as a submodule.
        start: cut whose activation the branch takes.
        stop: cut whose activation the branch computes; above ``start``.
        prune: share of the hidden channels that the copy leaves out.
        shapes_only: whether the copy shares the anchor's memory, which is enough where only shapes are needed.

    Raises:
        ValueError: the cuts are not of a span of blocks, or the block has no hidden channels that can be pruned.
    """

    def __init__(self, anchor: Anchor, start: int, stop: int, prune: float = 0.0, shapes_only: bool = False) -> None:
        super().__init__()
        if not 0 < start < stop <= anchor.depth:
            raise ValueError(
                f"a branch of '{anchor.name}' must lead from a cut to a later one, 1 to {anchor.depth}, not from "
                f"{start} to {stop}"
            )
        self._anchor = (anchor,)  # in a tuple, so that it is not a submodule
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
            key, copy = name.replace(".", "/"), tensor.detach() if shapes_only else tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                self.own[key] = nn.Parameter(copy)
            else:
                self.register_buffer(key, copy)
        self._names = tuple(tensors)

    @property
    def anchor(self) -> Anchor:
        """The anchor whose block was copied."""
        return self._anchor[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the copy runs, that of the anchor; the weights that train may be in float32."""
        return next(self.anchor.parameters()).dtype

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that replace the anchor's own, in its type, by their names in the anchor's network."""
        keys, dtype = ((name, name.replace(".", "/")) for name in self._names), self.dtype
        return {name: (self.own[key] if key in self.own else getattr(self, key)).to(dtype) for name, key in keys}

    def forward(self, x: Tensor) -> Tensor:
        """Map an activation at cut ``start`` to one at cut ``stop``."""
        if self.enter is not None:
            x = run_in_own_type(self.enter, x)
        block = self.anchor(x.to(self.dtype), self.block - 1, self.block, lambda *span: self.tensors())
        return block.to(x.dtype)

    def bake(self) -> nn.Module:
        """A plain module that computes the same, with copies of the weights."""
        baked = self.anchor.bake(self.block - 1, self.block, self.tensors())
        if self.enter is None:
            return baked
        enter = self.enter.bake()
        return nn.Sequential(enter, accept_type(baked, next(enter.parameters()).dtype))

    def extra_repr(self) -> str:
        """The anchor and the number of the block that was copied."""
        return f"anchor={self.anchor.name!r}, block={self.block}"

    def problems(self) -> list[Problem]:
        """The least-squares problems of the affine stitch before the copy, if there is one."""
        return [] if self.enter is None else self.enter.problems()


def stitch_at(
    point: StitchPoint, anchors: Mapping[str, Anchor], config: StitchConfig, shapes_only: bool = False
) -> Stitch:
    """Make a new stitch for a stitch point, in float32 also where the anchors are in half precision.

    A branch is pruned if its name asks for it, as the names that `families.skip` gives do.

    Args:
        point: cuts that the stitch joins.
        anchors: mapping from names to anchors.
        config: options of the stitch, such as its kind.
        shapes_only: whether only shapes are needed, so that the stitch takes no memory.

    Raises:
        ValueError: a branch would join two anchors, or lead back.
    """
    source, target = anchors[point.source], anchors[point.target]
    like = next(target.parameters())
    if config.kind != BRANCH:
        layouts = source.layout(point.source_cut), target.layout(point.target_cut)
        with torch.device("meta" if shapes_only else torch.get_default_device()):
            stitch = make_stitch(*layouts, config)
        return stitch if shapes_only else stitch.to(like.device, trained_dtype(like.dtype))
    if source is not target:
        raise ValueError(
            f"a branch replaces blocks of one anchor and cannot join '{point.source}' to '{point.target}'; choose "
            "another kind of stitch"
        )
    prune = config.prune or pruned_share(point.via)
    branch = BranchStitch(source, point.source_cut, point.target_cut, prune, shapes_only)
    return branch.to(like.device, trained_dtype(like.dtype))


def stitch_that_fits(
    point: StitchPoint, anchors: Mapping[str, Anchor], config: StitchConfig, check: Callable[[nn.Module], None]
) -> Stitch:
    """Make a stitch as `stitch_at` does, and check it before it takes memory.

    A branch, which takes no more memory than a block of its anchor, is checked once it is made.

    Args:
        point: cuts that the stitch joins.
        anchors: mapping from names to anchors.
        config: options of the stitch, such as its kind.
        check: function that raises an error if the module does not fit.
    """
    if config.kind != BRANCH:
        check(stitch_at(point, anchors, config, shapes_only=True))
        return stitch_at(point, anchors, config)
    branch = stitch_at(point, anchors, config)
    check(branch)
    return branch


def block_tensors(anchor: Anchor, block: int) -> dict[str, Tensor]:
    """The parameters that the block ending in cut ``block`` uses, and the statistics of its norms, by name."""
    own = remaining_modules(anchor.model, unused_paths(anchor.cut(block - 1), anchor.cut(block), None))
    names = {parameter: name for name, parameter in anchor.own_parameters(block - 1, block).items()}
    anchor = _on_one_device(anchor)
    with torch.inference_mode(False), torch.enable_grad():
        copies = {name: parameter.detach().clone().requires_grad_() for parameter, name in names.items()}
        end = anchor(activation(anchor, block - 1), block - 1, block, lambda *span: copies)
        reached = torch.autograd.grad(end.float().sum(), list(copies.values()), allow_unused=True)
    used = {name for name, gradient in zip(copies, reached, strict=True) if gradient is not None}
    tensors: dict[str, Tensor] = {name: parameter for parameter, name in names.items() if name in used}
    for module, path in own.items():
        if is_norm(module):
            tensors |= {
                f"{path}.{leaf}": b for leaf, b in module.named_buffers(recurse=False) if b.is_floating_point()
            }
    return tensors


def _on_one_device(anchor: Anchor) -> Anchor:
    """The anchor, or its copy on the meta device if its weights are there and its buffers are not."""
    if len({tensor.is_meta for tensor in (*anchor.model.parameters(), *anchor.model.buffers())}) == 1:
        return anchor
    copy = Anchor(meta_copy(anchor.model), anchor.name, anchor.preprocessing, granularity=anchor.granularity)
    copy._found = anchor.search_result
    return copy
