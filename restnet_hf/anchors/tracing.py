"""One watched forward of a classifier: every call of its modules, and the autograd graph of the logits."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from restnet_hf.anchors.cut import logits_of


@dataclass(frozen=True, eq=False)
class Product:
    """A tensor in the output of a call.

    Args:
        leaf: which leaf of the output it is.
        tensor: itself.
        node: that made it, in the autograd graph; None where it does not depend on the image.
        version: of the tensor when the call ended.
        passed: the call only passes it on, from its own inputs.
    """

    leaf: int
    tensor: Tensor
    node: Any
    version: int
    passed: bool

    @property
    def modified(self) -> bool:
        """Whether it was written into after the call."""
        return self.tensor._version != self.version


@dataclass(eq=False)
class Call:
    """One call of a module; ``began`` and ``ended`` are ticks of a common clock."""

    module: nn.Module
    name: str
    began: int
    ended: int = 0
    output: Any = None
    products: list[Product] = field(default_factory=list)

    @property
    def depends(self) -> bool:
        """Whether anything in the output depends on the image."""
        return any(product.node is not None for product in self.products)

    @property
    def first(self) -> Product | None:
        """The first tensor in the output."""
        return self.products[0] if self.products else None


@dataclass(frozen=True)
class Trace:
    """What `trace` returns.

    Args:
        model: that ran.
        calls: in order of completion.
        graph: of autograd, from the logits (``end``) to the image (``start``).
        classes: number of logits.
    """

    model: nn.Module
    calls: list[Call]
    graph: "nx.DiGraph[Any]"
    end: Any
    start: Any
    classes: int

    def dominators(self) -> set[Any]:
        """Nodes that every path from the logits to the image goes through."""
        immediate = nx.immediate_dominators(self.graph, self.end)
        chain, node = {self.end}, self.start
        while node is not None and node not in chain:
            chain.add(node)
            node = immediate.get(node)
        return chain

    def on_way(self, call: Call) -> set[Any]:
        """Nodes of a call's output that the logits are computed from."""
        return {product.node for product in call.products if product.node in self.graph}

    def ancestors(self, call: Call) -> set[Any]:
        """Those nodes, and all that they were computed from."""
        made = self.on_way(call)
        return made.union(*(nx.descendants(self.graph, node) for node in made))

    def frontier(self, inside: set[Any]) -> frozenset[Any]:
        """Those of the nodes that others read: together they carry the image on."""
        return frozenset(n for n in inside if any(reader not in inside for reader in self.graph.predecessors(n)))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Gradients with respect to the image alone, whatever mode or ``torch.device`` the caller is in.

    Everything is as before afterwards.
    """
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    training = {module: module.training for module in model.modules()}
    device = next((p.device for p, _ in wanted), torch.device("cpu"))
    here = device if torch.get_default_device().type != "cpu" else nullcontext()  # what it makes meets its weights
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), here:
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, needed in wanted:
            parameter.requires_grad_(needed)
        for module, mode in training.items():
            module.training = mode


def sketch(model: nn.Module) -> nn.Module:
    """A copy without weights, on the meta device: it computes shapes and builds graphs, at no cost."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def with_values(model: nn.Module) -> nn.Module:
    """The model, or if it has no values, being on the meta device, one on the CPU like it with random ones.

    Raises:
        ValueError: it is no model of transformers, of which another could be made.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    twin = model
    from transformers import PreTrainedModel  # the Auto classes import our config while transformers loads its models

    if any(buffer.is_meta for buffer in model.buffers()) and isinstance(model, PreTrainedModel):
        with torch.device("cpu"):  # buffers hold tables that only the constructor can compute
            twin = type(model)(copy.deepcopy(model.config)).to(dtype).eval()
    if any(buffer.is_meta for buffer in twin.buffers()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where it has no values to be searched with; build it on "
            "another device, and move it after"
        )
    memo: dict[int, Any] = {id(p): _random(p) for p in twin.parameters() if p.is_meta}
    return copy.deepcopy(twin, memo) if memo else twin


def _random(parameter: nn.Parameter) -> nn.Parameter:
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()), device="cpu")
    return nn.Parameter(noise.to(parameter.dtype) / max(1, parameter[:1].numel()) ** 0.5, requires_grad=False)


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run a model on images (N, 3, H, W), within `undisturbed`.

    Raises:
        ValueError: it does not map them to logits that depend on them.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: list[Call] = []
    open_calls: list[Call] = []
    clock = iter(range(1 << 62))

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        open_calls.append(Call(module, names[module], next(clock)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = open_calls.pop()
        call.ended, call.output = next(clock), output
        call.products = _products(output, (args, kwargs))
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
    graph, start = _graph(logits.grad_fn, images)
    return Trace(model, calls, graph, logits.grad_fn, start, logits.shape[-1])


def _products(output: Any, inputs: Any) -> list[Product]:
    given = {id(leaf) for leaf in tree_leaves(inputs)}
    return [
        Product(index, leaf, leaf.grad_fn, leaf._version, id(leaf) in given)
        for index, leaf in enumerate(tree_leaves(output))
        if isinstance(leaf, Tensor)
    ]


def _graph(end: Any, image: Tensor) -> tuple["nx.DiGraph[Any]", Any]:
    """The nodes on a way from ``end`` to the accumulator of ``image``, and that accumulator."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    start, stack, seen = None, [end], {end}
    while stack:
        current = stack.pop()
        if getattr(current, "variable", None) is image:
            start = current
        for following in _following(current):
            graph.add_edge(current, following)
            if following not in seen:
                seen.add(following)
                stack.append(following)
    if start is None:
        raise ValueError("the logits do not depend on the images")
    return graph.subgraph(nx.ancestors(graph, start) | {start}).copy(), start


def _following(node: Any) -> Iterable[Any]:
    return (following for following, _ in node.next_functions if following is not None)
