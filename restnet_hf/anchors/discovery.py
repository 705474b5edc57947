"""Find the cuts of any classifier: dominators of its autograd graph, certified by running it in segments."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from restnet_hf.anchors.cut import Cut, CutTensor, OutputSpec
from restnet_hf.anchors.layouts import AnyLayout, JointLayout, Layout, infer_layout
from restnet_hf.anchors.segments import run_segment
from restnet_hf.anchors.tracing import Call, Product, Trace, materialize, meta_copy, trace, tracing_mode


GRANULARITIES = ("block", "module")
MIN_CUTS = 2
MAX_TENSORS = 4
PROBE_BATCH = 2  # shows which tensors have a batch axis
CERTIFY_BATCH = 1
CHECK_BATCH = 3


@dataclass(frozen=True)
class Cuts:
    """The result of `find_cuts`.

    Args:
        cuts: certified cuts, from the image on; cut ``k`` of an anchor is ``cuts[k - 1]``.
        classes: number of logits for an image.
        classifier: path of the linear layer that returns the logits, which a new head can replace; None if there is
            none.
        features: input channels of that layer; None if there is none.
        rejected: reason by name for each candidate that failed certification.
    """

    cuts: tuple[Cut, ...]
    classes: int
    classifier: str | None = None
    features: int | None = None
    rejected: dict[str, str] = field(default_factory=dict)


def find_cuts(model: nn.Module, image_size: tuple[int, int], granularity: str = "block") -> Cuts:
    """Find the cuts of a classifier in evaluation mode.

    A cut is the output of a module call through which every path from the image to the logits goes: a dominator of the
    logits in the autograd graph. Where there are fewer than two of those, it may be several tensors that only together
    carry the image, such as the outputs of two neighbouring cells. Candidates are then certified from the last to the
    first: run from its own activation on another batch, each must return the activation of the next one, and the last
    the logits.

    Args:
        model: classifier that maps images (N, 3, H, W) to logits.
        image_size: height and width of the images that the model will be used with.
        granularity: ``block`` for elements of module lists and repeated siblings, ``module`` for every module.

    Raises:
        ValueError: there is no such granularity, there are no logits, or the network is on the meta device and cannot
            be rebuilt.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is not one of {GRANULARITIES}")
    model = materialize(model)
    with tracing_mode(model):
        traced = _trace_shapes(model, image_size)
        search = _Search.of(traced, granularity, image_size)
        cuts, rejected = _certify(model, _single_tensor_cuts(search), image_size)
        if len(cuts) < MIN_CUTS:
            every = {cut.name: cut for cut in (*_joint_cuts(search), *cuts)}
            ended = {call.name: call.ended for call in traced.calls}
            ordered = sorted(every.values(), key=lambda cut: ended[cut.name])
            cuts, failed = _certify(model, ordered, image_size)
            rejected |= failed
        classifier = _find_classifier(traced)
    return Cuts(tuple(cuts), traced.classes, *classifier, rejected)


def _trace_shapes(model: nn.Module, image_size: tuple[int, int]) -> Trace:
    """Trace on the meta device, for shapes and graph only, or with values where the network needs them."""
    images = _noise(model, PROBE_BATCH, image_size, seed=0)
    try:
        return trace(meta_copy(model), images.to("meta"))
    except Exception:  # whatever it is, the real forward raises it
        return trace(model, images)


def _noise(model: nn.Module, batch: int, image_size: tuple[int, int], seed: int) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    noise = torch.randn(batch, 3, *image_size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return noise.to(like.device, like.dtype)


def _find_blocks(model: nn.Module) -> set[nn.Module]:
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
class _Search:
    """A traced network, from which candidates are made.

    Args:
        trace: trace of a forward.
        blocks: calls that may end in a cut, in order of completion.
        single: calls of modules that are called once.
        image_size: height and width of the images.
        grids: heights and widths of all maps in the network.
        maps: layout of maps whose shape is ambiguous.
    """

    trace: Trace
    blocks: list[Call]
    single: list[Call]
    image_size: tuple[int, int]
    grids: set[tuple[int, int]]
    maps: str

    @classmethod
    def of(cls, trace: Trace, granularity: str, image_size: tuple[int, int]) -> "_Search":
        model = trace.model
        times: dict[nn.Module, int] = {}
        for call in trace.calls:
            times[call.module] = times.get(call.module, 0) + 1
        single = [call for call in trace.calls if times[call.module] == 1]
        chosen = _find_blocks(model) if granularity == "block" else set(model.modules())
        blocks = [call for call in single if call.module in chosen and call.module is not model]
        shapes = [tuple(c.first.tensor.shape) for c in trace.calls if c.first and c.first.tensor.dim() == 4]
        grids = {(s[2], s[3]) for s in shapes} | {(s[1], s[2]) for s in shapes}
        return cls(trace, blocks, single, image_size, grids, _kind_of_maps(blocks, trace.dominators(), image_size))

    def layout(self, tensor: Tensor) -> Layout | None:
        """The layout of a tensor for the probe's batch; None where it has none."""
        layout = infer_layout(tensor.shape, self.image_size, self.grids, self.maps)
        return layout if layout is not None and layout.shape(PROBE_BATCH) == tuple(tensor.shape) else None

    def cut(self, call: Call, aliases: Iterable[str], layout: AnyLayout, made: Iterable[tuple[Call, Product]]) -> Cut:
        """Make a cut at the end of a call from tensors of that call and earlier ones."""
        # modules that do not depend on the image, such as tables of relative positions, run: they may be used later
        before = _outermost([c for c in self.single if c.ended < call.began and c.depends])
        after = _outermost([c for c in self.single if c.began > call.ended])
        return Cut(
            call.name,
            tuple(aliases),
            layout,
            tuple(CutTensor(c.name, OutputSpec.of(c.output, PROBE_BATCH), p.leaf, p.modified) for c, p in made),
            tuple((c.name, OutputSpec.of(c.output, PROBE_BATCH)) for c in before),
            tuple((c.name, OutputSpec.of(c.output, PROBE_BATCH)) for c in after),
        )


def _kind_of_maps(blocks: list[Call], dominators: set[Any], image_size: tuple[int, int]) -> str:
    """NCHW or NHWC, as the shape of most maps at cuts shows; the shape of a cube does not."""
    firsts = [call.first for call in blocks]
    shapes = [tuple(p.tensor.shape) for p in firsts if p and p.node in dominators and p.tensor.dim() == 4]
    clear = [infer_layout(shape, image_size) for shape in shapes if len(set(shape[1:])) > 1]
    nhwc = sum(layout is not None and layout.kind == "NHWC" for layout in clear)
    return "NHWC" if 2 * nhwc > len(clear) else "NCHW"


def _single_tensor_cuts(search: _Search) -> list[Cut]:
    """Candidates whose activation is one tensor."""
    dominators = search.trace.dominators()
    places: dict[
        Any, list[tuple[Call, Product]]
    ] = {}  # calls that return the same tensor: a block, its last layer, its stage
    for call in search.blocks:
        if call.first and not call.first.passed and call.first.node in dominators:
            places.setdefault(call.first.node, []).append((call, call.first))
    cuts = []
    for *inner, (call, product) in sorted(places.values(), key=lambda place: place[-1][0].ended):
        layout = search.layout(product.tensor)
        if layout is not None:
            cuts.append(search.cut(call, (c.name for c, _ in inner), layout, [(call, product)]))
    return cuts


def _joint_cuts(search: _Search) -> list[Cut]:
    """Candidates whose activation is several tensors: outputs of one block, or of it and earlier ones."""
    made: dict[Any, tuple[Call, Product]] = {}  # the call that makes each tensor; of nested calls, the outermost
    frontiers: dict[frozenset[Any], list[Call]] = {}
    for call in search.single:
        made |= {p.node: (call, p) for p in call.products if p.node is not None and not p.passed}
        if call not in search.blocks:
            continue
        inside = search.trace.ancestors(call)
        frontier = search.trace.frontier(inside)
        # a module beside the block, on another branch, would have to run again
        beside = any(c.ended < call.began and not search.trace.output_nodes(c) <= inside for c in search.trace.calls)
        if 1 < len(frontier) <= MAX_TENSORS and frontier <= made.keys() and not beside:
            frontiers.setdefault(frontier, []).append(call)
    cuts = []
    for frontier, (*inner, call) in frontiers.items():
        # the block's own tensors first, then those that it leaves unchanged
        tensors = sorted((made[node] for node in frontier), key=lambda m: (-m[0].ended, m[1].leaf))
        layouts = _joint_layouts(search, [product.tensor for _, product in tensors])
        if layouts is not None:
            cuts.append(search.cut(call, (c.name for c in inner), JointLayout(layouts), tensors))
    return cuts


def _joint_layouts(search: _Search, tensors: list[Tensor]) -> tuple[Layout, ...] | None:
    """Layouts of tensors at one place. A tensor with windows as its batch is read as tokens, one for each window."""
    layouts = {index: layout for index, tensor in enumerate(tensors) if (layout := search.layout(tensor)) is not None}
    grids = {layout.grid[0] * layout.grid[1]: layout.grid for layout in layouts.values()}
    for index, tensor in enumerate(tensors):
        grid = grids.get(tensor.shape[0] // PROBE_BATCH)
        if index not in layouts and grid is not None:
            layouts[index] = Layout("NLC", tensor[0].numel(), grid)
    return tuple(layouts[index] for index in range(len(tensors))) if len(layouts) == len(tensors) else None


def _outermost(calls: list[Call]) -> list[Call]:
    outermost: list[Call] = []
    for call in sorted(calls, key=lambda c: (c.began, -c.ended)):
        if not outermost or call.began > outermost[-1].ended:
            outermost.append(call)
    return outermost


def _channels(module: nn.Module) -> tuple[int, int] | None:
    """Input and output channels of a linear layer or 1x1 convolution; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
        return module.in_channels, module.out_channels
    return None


def _find_classifier(trace: Trace) -> tuple[str | None, int | None]:
    """Path and input channels of the linear layer that returns the logits; None where there is none."""
    dominators = trace.dominators()
    for call in reversed(trace.calls):
        channels = _channels(call.module)
        once = sum(other.module is call.module for other in trace.calls) == 1
        last = channels is not None and channels[1] == trace.classes and once
        if channels is not None and last and call.first and call.first.node in dominators:
            return call.name, channels[0]
    return None, None


@torch.no_grad()
def _certify(model: nn.Module, candidates: list[Cut], image_size: tuple[int, int]) -> tuple[list[Cut], dict[str, str]]:
    """The candidates that pass, in order, and the reasons why the others do not, by name."""
    images = _noise(model, CERTIFY_BATCH, image_size, seed=1)
    end = len(candidates)
    constants = {path: spec.constants for cut in candidates for path, spec in cut.specs().items() if spec.constants}
    with _collected_leaves(model, constants) as values:
        truth = run_segment(model, images, None, {**dict(enumerate(candidates)), end: None}, image_size)
    candidates = [_with_values(cut, values) for cut in candidates]
    unstable = _find_unstable(model, candidates, constants, image_size)
    following, rejected = end, {}
    accepted: list[Cut] = []
    for index in reversed(range(end)):
        cut = candidates[index]
        goal = None if following == end else candidates[following]
        try:
            result = run_segment(model, truth[index], cut, {following: goal}, image_size)[following]
            reason = unstable.get(cut.name) or _difference(result, truth[following])
        except Exception as error:  # a network may fail in any way when it is entered at a place that is no cut
            reason = f"{type(error).__name__}: {error}"
        if reason:
            rejected[cut.name] = reason
        else:
            accepted.append(cut)
            following = index
    return accepted[::-1], rejected


@contextmanager
def _collected_leaves(
    model: nn.Module, wanted: Mapping[str, Collection[int]]
) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Collect leaves of the outputs of modules during the block, by path and index."""
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


def _find_unstable(
    model: nn.Module, candidates: list[Cut], constants: Mapping[str, Collection[int]], image_size: tuple[int, int]
) -> dict[str, str]:
    """Why cuts are invalid, by name, that store values which change with the images or their number.

    Autograd does not see that a mask or an index depends on the image.
    """
    if not constants:
        return {}
    with _collected_leaves(model, constants) as values:
        run_segment(model, _noise(model, CHECK_BATCH, image_size, seed=2), None, {0: None}, image_size)
    reasons: dict[str, str] = {}
    for cut in candidates:
        entered = {**dict(cut.before), **{made.path: made.output for made in cut.tensors}}
        for path, spec in entered.items():  # the outputs of modules after a cut are not used
            stored = {index: spec.leaves[index] for index in spec.constants}
            if not all(leaf.matches(values[path][index], CHECK_BATCH) for index, leaf in stored.items()):
                reasons[cut.name] = f"'{path}' hands on values that depend on the images beside the activation"
    return reasons


def _difference(result: Tensor, truth: Tensor) -> str | None:
    if torch.equal(result, truth):
        return None
    if result.shape != truth.shape:
        return f"returns shape {tuple(result.shape)}, not {tuple(truth.shape)}"
    # kernels may sum in another order for another memory layout; the error of a wrong cut is far larger
    error = (result - truth).abs().max().item()
    limit = max(4 * torch.finfo(truth.dtype).eps, 1e-5) * (truth.max() - truth.min()).item()
    return None if error <= limit else f"run from here on, the network is off by {error:.1e} (allowed {limit:.1e})"
