"""Find where any classifier can be cut: dominators of its autograd graph, certified by running it in parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from restnet_hf.features import Layout, infer_layout
from restnet_hf.segments import Cut, OutputSpec, logits_of, run


GRANULARITIES = ("block", "module")
PROBE_BATCH = 2


@dataclass(eq=False)
class _Call:
    """One call of a module during the probe; ``began`` and ``ended`` are ticks of a common clock."""

    module: nn.Module
    name: str
    began: int
    ended: int = 0
    output: Any = None
    tensor: Tensor | None = None
    version: int = 0
    node: Any = None
    depends: bool = False  # on the image
    passes: bool = False  # returns one of its own inputs


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
    logits in the autograd graph. Candidates are then certified from the last to the first: run from its own activation
    on another batch, each must give the activation of the next one, and the last the logits.

    Args:
        model: maps images (N, 3, H, W) to logits.
        image_size: height and width of the images it will be used with.
        granularity: ``block`` for elements of module lists and repeated siblings, ``module`` for every module.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is not one of {GRANULARITIES}")
    with _undisturbed(model):
        calls, node, leaf, classes = _probe(model, _noise(model, PROBE_BATCH, image_size, seed=0))
        dominators = _dominators(node, leaf)
        candidates = _candidates(model, calls, dominators, granularity, image_size)
        classifier = _classifier(calls, dominators, classes)
        cuts, rejected = _certified(model, candidates, image_size)
    return Cuts(tuple(cuts), classes, *classifier, rejected)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Gradients with respect to the image alone, whatever mode the caller is in; everything as before afterwards."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    training = {module: module.training for module in model.modules()}
    device = next((p.device.type for p, _ in wanted), "cpu")
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, needed in wanted:
            parameter.requires_grad_(needed)
        for module, mode in training.items():
            module.training = mode


def _noise(model: nn.Module, batch: int, image_size: tuple[int, int], seed: int) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.randn(batch, 3, *image_size, generator=torch.Generator().manual_seed(seed))
    return noise.to(like.device, like.dtype)


def _probe(model: nn.Module, images: Tensor) -> tuple[list[_Call], Any, Tensor, int]:
    """Every module call of one forward in order of completion, the node of the logits, the image, the class count."""
    names = {module: name for name, module in model.named_modules()}
    calls: list[_Call] = []
    open_calls: list[_Call] = []
    clock = iter(range(1 << 62))

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        open_calls.append(_Call(module, names[module], next(clock)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = open_calls.pop()
        call.ended, call.output = next(clock), output
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        call.depends = any(tensor.grad_fn is not None for tensor in tensors)
        if tensors:
            call.tensor, call.node, call.version = tensors[0], tensors[0].grad_fn, tensors[0]._version
            call.passes = any(leaf is tensors[0] for leaf in tree_leaves((args, kwargs)))
        calls.append(call)

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_hook(after, with_kwargs=True) for m in model.modules()]
    images.requires_grad_()
    try:
        logits = logits_of(model(images))
    finally:
        for handle in handles:
            handle.remove()
    if logits.grad_fn is None or logits.dim() != 2:
        raise ValueError(
            f"{type(model).__name__} does not map images to logits: from {tuple(images.shape)} it gave "
            f"{tuple(logits.shape)}, {'' if logits.grad_fn else 'not '}depending on the images"
        )
    return calls, logits.grad_fn, images, logits.shape[-1]


def _dominators(node: Any, leaf: Tensor) -> set[Any]:
    """Nodes of the autograd graph that every path from ``node`` to the accumulator of ``leaf`` goes through."""
    graph: nx.DiGraph = nx.DiGraph()
    source, stack, seen = None, [node], {node}
    while stack:
        current = stack.pop()
        if getattr(current, "variable", None) is leaf:
            source = current
        for following, _ in current.next_functions:
            if following is not None:
                graph.add_edge(current, following)
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    if source is None:
        raise ValueError("the logits do not depend on the images")
    immediate = nx.immediate_dominators(graph, node)
    chain = {node}
    while source is not None and source not in chain:
        chain.add(source)
        source = immediate.get(source)
    return chain


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


def _candidates(
    model: nn.Module, calls: list[_Call], dominators: set[Any], granularity: str, image_size: tuple[int, int]
) -> list[Cut]:
    times: dict[nn.Module, int] = {}
    for call in calls:
        times[call.module] = times.get(call.module, 0) + 1
    blocks = _blocks(model) if granularity == "block" else set(model.modules())
    places: dict[Any, list[_Call]] = {}  # calls that return the same tensor: a block, its last layer, its stage
    for call in calls:
        usable = call.module in blocks and call.module is not model and times[call.module] == 1 and not call.passes
        if usable and call.node in dominators:
            places.setdefault(call.node, []).append(call)
    outer = [_Place(found[-1], tuple(call.name for call in found[:-1])) for found in places.values()]
    layouts = _layouts([place.call for place in outer], calls, image_size)
    single = [call for call in calls if times[call.module] == 1]
    return [
        _cut(place, layouts[place.call], single)
        for place in sorted(outer, key=lambda place: place.call.ended)
        if place.call in layouts
    ]


@dataclass(frozen=True)
class _Place:
    call: _Call
    aliases: tuple[str, ...]


def _layouts(places: list[_Call], calls: list[_Call], image_size: tuple[int, int]) -> dict[_Call, Layout]:
    """Layout of each place that has one.

    Grids seen anywhere in the network tell tokens from prefix; where a map is a cube, the other places tell its kind.
    """
    maps = [tuple(call.tensor.shape) for call in calls if call.tensor is not None and call.tensor.dim() == 4]
    grids = {(s[2], s[3]) for s in maps} | {(s[1], s[2]) for s in maps}
    shapes = [tuple(call.tensor.shape) for call in places if call.tensor is not None and call.tensor.dim() == 4]
    clear = [infer_layout(shape, image_size) for shape in shapes if len(set(shape[1:])) > 1]
    nhwc = sum(layout is not None and layout.kind == "NHWC" for layout in clear)
    kind = "NHWC" if 2 * nhwc > len(clear) else "NCHW"
    found = {}
    for call in places:
        assert call.tensor is not None
        layout = infer_layout(call.tensor.shape, image_size, grids, kind)
        if layout is not None and layout.shape(PROBE_BATCH) == tuple(call.tensor.shape):
            found[call] = layout
    return found


def _cut(place: _Place, layout: Layout, single: list[_Call]) -> Cut:
    call = place.call
    # What does not depend on the image (tables of relative positions, say) runs for real: it may be used again later.
    before = _outermost([c for c in single if c.ended < call.began and c.depends])
    after = _outermost([c for c in single if c.began > call.ended])
    assert call.tensor is not None
    return Cut(
        call.name,
        place.aliases,
        layout,
        OutputSpec.of(call.output, PROBE_BATCH),
        tuple((c.name, OutputSpec.of(c.output, PROBE_BATCH)) for c in before),
        tuple((c.name, OutputSpec.of(c.output, PROBE_BATCH)) for c in after),
        call.tensor._version != call.version,
    )


def _outermost(calls: list[_Call]) -> list[_Call]:
    kept: list[_Call] = []
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


def _classifier(calls: list[_Call], dominators: set[Any], classes: int) -> tuple[str | None, int | None]:
    """Path and input channels of the linear layer that gives the logits, if one does."""
    for call in reversed(calls):
        ends = _ends(call.module)
        once = sum(other.module is call.module for other in calls) == 1
        if ends is not None and ends[1] == classes and once and call.node in dominators:
            return call.name, ends[0]
    return None, None


@torch.no_grad()
def _certified(
    model: nn.Module, candidates: list[Cut], image_size: tuple[int, int]
) -> tuple[list[Cut], dict[str, str]]:
    """The candidates that pass, in order, and why the others do not."""
    images = _noise(model, PROBE_BATCH + 1, image_size, seed=1)
    end = len(candidates)
    truth = run(model, images, None, {**dict(enumerate(candidates)), end: None}, image_size)
    following, rejected = end, {}
    accepted: list[Cut] = []
    for index in reversed(range(end)):
        cut = candidates[index]
        goal = None if following == end else candidates[following]
        try:
            result = run(model, truth[index], cut, {following: goal}, image_size)[following]
            reason = _difference(result, truth[following])
        except Exception as error:  # a network may fail in any way when it is entered where it cannot be
            reason = f"{type(error).__name__}: {error}"
        if reason:
            rejected[cut.name] = reason
        else:
            accepted.append(cut)
            following = index
    return accepted[::-1], rejected


def _difference(result: Tensor, truth: Tensor) -> str | None:
    if torch.equal(result, truth):
        return None
    if result.shape != truth.shape:
        return f"gives shape {tuple(result.shape)}, not {tuple(truth.shape)}"
    # Kernels may choose another summation order for another memory layout; a wrong cut is off by far more.
    error = (result - truth).abs().max().item()
    limit = torch.finfo(truth.dtype).eps ** 0.5 * (truth.max() - truth.min()).item()
    return None if error <= limit else f"run from here on, the network is off by {error:.1e} (allowed {limit:.1e})"
