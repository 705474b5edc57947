"""Find where any classifier can be cut: dominators of its autograd graph, certified by running it in parts."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from restnet_hf.anchors.cut import Cut, Made, OutputSpec
from restnet_hf.anchors.layouts import AnyLayout, JointLayout, Layout, infer_layout
from restnet_hf.anchors.segments import run
from restnet_hf.anchors.tracing import Call, Product, Trace, sketch, trace, undisturbed, with_values


GRANULARITIES = ("block", "module")
MIN_CUTS = 2
MAX_TENSORS = 4
PROBE_BATCH = 2  # tells what has an axis of images
CERTIFY_BATCH = 1
CHECK_BATCH = 3


@dataclass(frozen=True)
class Cuts:
    """What `find_cuts` returns.

    Args:
        cuts: certified, from the image on; cut ``k`` of an anchor is ``cuts[k - 1]``.
        classes: number of logits.
        classifier: path of the last linear layer, where one gives the logits; a new head can take its place.
        features: channels of that layer's input.
        rejected: name and reason of each candidate that failed its certification.
    """

    cuts: tuple[Cut, ...]
    classes: int
    classifier: str | None = None
    features: int | None = None
    rejected: dict[str, str] = field(default_factory=dict)


def find_cuts(model: nn.Module, image_size: tuple[int, int], granularity: str = "block") -> Cuts:
    """Cuts of a classifier in evaluation mode.

    A cut is the output of a module call through which every path from the image to the logits goes: a dominator of the
    logits in the autograd graph. Where there are fewer than two of those, it may be several tensors that only together
    carry the image, such as the outputs of two neighbouring cells. Candidates are then certified from the last to the
    first: run from its own activation on another batch, each must give the activation of the next one, and the last
    the logits.

    Args:
        model: maps images (N, 3, H, W) to logits.
        image_size: height and width of the images it will be used with.
        granularity: ``block`` for elements of module lists and repeated siblings, ``module`` for every module.

    Raises:
        ValueError: no such granularity, no logits, or a network on the meta device that cannot be built anew.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is not one of {GRANULARITIES}")
    model = with_values(model)
    with undisturbed(model):
        found = _watched(model, image_size)
        scene = _Scene.of(found, granularity, image_size)
        cuts, rejected = _certified(model, _single(scene), image_size)
        if len(cuts) < MIN_CUTS:
            every = {cut.name: cut for cut in (*_joint(scene), *cuts)}
            ended = {call.name: call.ended for call in found.calls}
            ordered = sorted(every.values(), key=lambda cut: ended[cut.name])
            cuts, failed = _certified(model, ordered, image_size)
            rejected |= failed
        classifier = _classifier(found)
    return Cuts(tuple(cuts), found.classes, *classifier, rejected)


def _watched(model: nn.Module, image_size: tuple[int, int]) -> Trace:
    """Shapes and graph are all that is wanted of the first forward; a network that needs values for them runs."""
    images = _noise(model, PROBE_BATCH, image_size, seed=0)
    try:
        return trace(sketch(model), images.to("meta"))
    except Exception:  # whatever it is, the real forward will tell
        return trace(model, images)


def _noise(model: nn.Module, batch: int, image_size: tuple[int, int], seed: int) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    noise = torch.randn(batch, 3, *image_size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return noise.to(like.device, like.dtype)


def _blocks(model: nn.Module) -> set[nn.Module]:
    """Elements of module lists and sequences and, outside of those, siblings of one class that hold layers."""
    blocks: set[nn.Module] = set()
    pending = [model]
    while pending:
        module = pending.pop()
        children = list(module.children())
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for child in children:
                blocks.add(child)
                for inner in child.modules():
                    if isinstance(inner, nn.ModuleList | nn.Sequential):
                        blocks.update(inner.children())
            continue
        pending += children
        layered = [c for c in children if next(c.children(), None) and any(p.dim() > 1 for p in c.parameters())]
        classes = [type(child) for child in layered]
        blocks.update(child for child in layered if classes.count(type(child)) > 1)
    return blocks


@dataclass(frozen=True)
class _Scene:
    """What candidates are made from.

    Args:
        found: the watched forward.
        blocks: calls that may end in a cut, in order of completion.
        single: calls of modules that are called once.
        image_size: of the images.
        grids: heights and widths of all maps in the network.
        maps: the kind of its maps, where a shape does not tell.
    """

    found: Trace
    blocks: list[Call]
    single: list[Call]
    image_size: tuple[int, int]
    grids: set[tuple[int, int]]
    maps: str

    @classmethod
    def of(cls, found: Trace, granularity: str, image_size: tuple[int, int]) -> "_Scene":
        model = found.model
        times: dict[nn.Module, int] = {}
        for call in found.calls:
            times[call.module] = times.get(call.module, 0) + 1
        single = [call for call in found.calls if times[call.module] == 1]
        wanted = _blocks(model) if granularity == "block" else set(model.modules())
        blocks = [call for call in single if call.module in wanted and call.module is not model]
        shapes = [tuple(c.first.tensor.shape) for c in found.calls if c.first and c.first.tensor.dim() == 4]
        grids = {(s[2], s[3]) for s in shapes} | {(s[1], s[2]) for s in shapes}
        return cls(found, blocks, single, image_size, grids, _kind_of_maps(blocks, found.dominators(), image_size))

    def layout(self, tensor: Tensor) -> Layout | None:
        """Of a tensor for the probe's batch, if it has one."""
        layout = infer_layout(tensor.shape, self.image_size, self.grids, self.maps)
        return layout if layout is not None and layout.shape(PROBE_BATCH) == tuple(tensor.shape) else None

    def cut(self, call: Call, aliases: Iterable[str], layout: AnyLayout, made: Iterable[tuple[Call, Product]]) -> Cut:
        """A cut at the end of a call, whose activation is these tensors of it and earlier ones."""
        # What does not depend on the image (tables of relative positions, say) runs for real: it may be used later.
        before = _outermost([c for c in self.single if c.ended < call.began and c.depends])
        after = _outermost([c for c in self.single if c.began > call.ended])
        return Cut(
            call.name,
            tuple(aliases),
            layout,
            tuple(Made(c.name, OutputSpec.of(c.output, PROBE_BATCH), p.leaf, p.modified) for c, p in made),
            tuple((c.name, OutputSpec.of(c.output, PROBE_BATCH)) for c in before),
            tuple((c.name, OutputSpec.of(c.output, PROBE_BATCH)) for c in after),
        )


def _kind_of_maps(blocks: list[Call], dominators: set[Any], image_size: tuple[int, int]) -> str:
    """Most of the maps at cuts tell by their shape whether channels come first; a cube does not."""
    firsts = [call.first for call in blocks]
    shapes = [tuple(p.tensor.shape) for p in firsts if p and p.node in dominators and p.tensor.dim() == 4]
    clear = [infer_layout(shape, image_size) for shape in shapes if len(set(shape[1:])) > 1]
    nhwc = sum(layout is not None and layout.kind == "NHWC" for layout in clear)
    return "NHWC" if 2 * nhwc > len(clear) else "NCHW"


def _single(scene: _Scene) -> list[Cut]:
    """Candidates whose activation is one tensor."""
    dominators = scene.found.dominators()
    places: dict[Any, list[tuple[Call, Product]]] = {}  # the same tensor: a block, its last layer, its stage
    for call in scene.blocks:
        if call.first and not call.first.passed and call.first.node in dominators:
            places.setdefault(call.first.node, []).append((call, call.first))
    cuts = []
    for *inner, (call, product) in sorted(places.values(), key=lambda place: place[-1][0].ended):
        layout = scene.layout(product.tensor)
        if layout is not None:
            cuts.append(scene.cut(call, (c.name for c, _ in inner), layout, [(call, product)]))
    return cuts


def _joint(scene: _Scene) -> list[Cut]:
    """Candidates whose activation is several tensors: outputs of one block, or of it and earlier ones."""
    made: dict[Any, tuple[Call, Product]] = {}  # where each tensor is made; of nested calls, the outermost
    frontiers: dict[frozenset[Any], list[Call]] = {}
    for call in scene.single:
        made |= {p.node: (call, p) for p in call.products if p.node is not None and not p.passed}
        if call not in scene.blocks:
            continue
        inside = scene.found.ancestors(call)
        frontier = scene.found.frontier(inside)
        # what runs beside the block, on another branch, would have to run again
        beside = any(c.ended < call.began and not scene.found.on_way(c) <= inside for c in scene.found.calls)
        if 1 < len(frontier) <= MAX_TENSORS and frontier <= made.keys() and not beside:
            frontiers.setdefault(frontier, []).append(call)
    cuts = []
    for frontier, (*inner, call) in frontiers.items():
        # the block's own tensors first, then those that it leaves as they were
        tensors = sorted((made[node] for node in frontier), key=lambda m: (-m[0].ended, m[1].leaf))
        layouts = _layouts_together(scene, [product.tensor for _, product in tensors])
        if layouts is not None:
            cuts.append(scene.cut(call, (c.name for c in inner), JointLayout(layouts), tensors))
    return cuts


def _layouts_together(scene: _Scene, tensors: list[Tensor]) -> tuple[Layout, ...] | None:
    """Layouts of tensors at one place. One that has windows for its batch is read as tokens, a window each."""
    known = {index: layout for index, tensor in enumerate(tensors) if (layout := scene.layout(tensor)) is not None}
    grids = {layout.grid[0] * layout.grid[1]: layout.grid for layout in known.values()}
    for index, tensor in enumerate(tensors):
        grid = grids.get(tensor.shape[0] // PROBE_BATCH)
        if index not in known and grid is not None:
            known[index] = Layout("NLC", tensor[0].numel(), grid)
    return tuple(known[index] for index in range(len(tensors))) if len(known) == len(tensors) else None


def _outermost(calls: list[Call]) -> list[Call]:
    kept: list[Call] = []
    for call in sorted(calls, key=lambda c: (c.began, -c.ended)):
        if not kept or call.began > kept[-1].ended:
            kept.append(call)
    return kept


def _ends(module: nn.Module) -> tuple[int, int] | None:
    """Channels in and out of a linear layer or 1x1 convolution."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
        return module.in_channels, module.out_channels
    return None


def _classifier(found: Trace) -> tuple[str | None, int | None]:
    """Path and input channels of the linear layer that gives the logits, if one does."""
    dominators = found.dominators()
    for call in reversed(found.calls):
        ends = _ends(call.module)
        once = sum(other.module is call.module for other in found.calls) == 1
        if ends is not None and ends[1] == found.classes and once and call.first and call.first.node in dominators:
            return call.name, ends[0]
    return None, None


@torch.no_grad()
def _certified(
    model: nn.Module, candidates: list[Cut], image_size: tuple[int, int]
) -> tuple[list[Cut], dict[str, str]]:
    """The candidates that pass, in order, and why the others do not."""
    images = _noise(model, CERTIFY_BATCH, image_size, seed=1)
    end = len(candidates)
    constants = {path: spec.constants for cut in candidates for path, spec in cut.specs().items() if spec.constants}
    with _values(model, constants) as values:
        truth = run(model, images, None, {**dict(enumerate(candidates)), end: None}, image_size)
    candidates = [_with_values(cut, values) for cut in candidates]
    changing = _changing(model, candidates, constants, image_size)
    following, rejected = end, {}
    accepted: list[Cut] = []
    for index in reversed(range(end)):
        cut = candidates[index]
        goal = None if following == end else candidates[following]
        try:
            result = run(model, truth[index], cut, {following: goal}, image_size)[following]
            reason = changing.get(cut.name) or _difference(result, truth[following])
        except Exception as error:  # a network may fail in any way when it is entered where it cannot be
            reason = f"{type(error).__name__}: {error}"
        if reason:
            rejected[cut.name] = reason
        else:
            accepted.append(cut)
            following = index
    return accepted[::-1], rejected


@contextmanager
def _values(model: nn.Module, wanted: Mapping[str, Collection[int]]) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Collect those leaves of the outputs of modules for one forward, by path."""
    values: dict[str, dict[int, Tensor]] = {}

    def keep(path: str, module: nn.Module, args: Any, output: Any) -> None:
        leaves = tree_leaves(output)
        values[path] = {index: leaves[index].detach().clone() for index in wanted[path]}

    handles = [model.get_submodule(path).register_forward_hook(partial(keep, path)) for path in wanted]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def _with_values(cut: Cut, values: Mapping[str, Mapping[int, Tensor]]) -> Cut:
    return cut.with_specs({path: spec.with_values(values.get(path, {})) for path, spec in cut.specs().items()})


def _changing(
    model: nn.Module, candidates: list[Cut], constants: Mapping[str, Collection[int]], image_size: tuple[int, int]
) -> dict[str, str]:
    """Why cuts are not sound that keep values which other images, or another number of them, would change.

    Autograd does not see that a mask or an index depends on the image.
    """
    if not constants:
        return {}
    with _values(model, constants) as seen:
        run(model, _noise(model, CHECK_BATCH, image_size, seed=2), None, {0: None}, image_size)
    found: dict[str, str] = {}
    for cut in candidates:
        entered = {**dict(cut.before), **{made.path: made.output for made in cut.tensors}}
        for path, spec in entered.items():  # what comes after a cut gives nothing back
            kept = {index: spec.leaves[index] for index in spec.constants}
            if not all(leaf.tells(seen[path][index], CHECK_BATCH) for index, leaf in kept.items()):
                found[cut.name] = f"'{path}' hands on values that depend on the images beside the activation"
    return found


def _difference(result: Tensor, truth: Tensor) -> str | None:
    if torch.equal(result, truth):
        return None
    if result.shape != truth.shape:
        return f"gives shape {tuple(result.shape)}, not {tuple(truth.shape)}"
    # Kernels may choose another summation order for another memory layout; a wrong cut is off by far more.
    error = (result - truth).abs().max().item()
    limit = max(4 * torch.finfo(truth.dtype).eps, 1e-5) * (truth.max() - truth.min()).item()
    return None if error <= limit else f"run from here on, the network is off by {error:.1e} (allowed {limit:.1e})"
