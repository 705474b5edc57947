"""Trace a forward of a classifier: every call of its modules, and the autograd graph of the logits."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from restnet_hf.anchors.cut import logits_of


if TYPE_CHECKING:
    import networkx as nx  # takes a tenth of a second, and an anchor whose cuts are cached needs none of it


@dataclass(frozen=True, eq=False)
class Product:
    """A tensor in the output of a call.

    Args:
        leaf: index of the tensor among the leaves of the output.
        tensor: the tensor itself, with its graph.
        node: autograd node that made the tensor; None where it does not depend on the image.
        version: version counter of the tensor when the call ended.
        passed: whether the tensor is one of the call's inputs.
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
    """The result of `trace`.

    Args:
        model: network that was traced.
        calls: calls of modules, in order of completion.
        graph: autograd graph from the logits to the image.
        end: node of the logits.
        start: node of the image.
        classes: number of logits for an image.
    """

    model: nn.Module
    calls: list[Call]
    graph: "nx.DiGraph[Any]"
    end: Any
    start: Any
    classes: int

    def dominators(self) -> set[Any]:
        """Nodes that every path from the logits to the image goes through."""
        import networkx as nx

        immediate = nx.immediate_dominators(self.graph, self.end)
        chain, node = {self.end}, self.start
        while node is not None and node not in chain:
            chain.add(node)
            node = immediate.get(node)
        return chain

    def output_nodes(self, call: Call) -> set[Any]:
        """Nodes of a call's output that the logits are computed from."""
        return {product.node for product in call.products if product.node in self.graph}

    def ancestors(self, call: Call) -> set[Any]:
        """The `output_nodes` of a call, and all nodes that they were computed from."""
        import networkx as nx

        nodes = self.output_nodes(call)
        return nodes.union(*(nx.descendants(self.graph, node) for node in nodes))

    def frontier(self, inside: set[Any]) -> frozenset[Any]:
        """The nodes of ``inside`` that nodes outside read: together they carry the image on."""
        return frozenset(n for n in inside if any(reader not in inside for reader in self.graph.predecessors(n)))


@contextmanager
def tracing_mode(model: nn.Module) -> Iterator[None]:
    """Compute gradients with respect to the image alone, whatever mode or ``torch.device`` the caller is in.

    The model's state is restored afterwards.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = {module: module.training for module in model.modules()}
    device = next((p.device for p, _ in before), torch.device("cpu"))
    # tensors that the network creates must be on the device of its weights
    default = device if torch.get_default_device().type != "cpu" else nullcontext()
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), default:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
        for module, mode in training.items():
            module.training = mode


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, without weights: it computes shapes and builds graphs at no cost."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def materialize(model: nn.Module) -> nn.Module:
    """The model, or a copy on the CPU with random weights if it is on the meta device.

    Raises:
        ValueError: the model has buffers on the meta device and is not one of transformers, so it cannot be rebuilt.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return model
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    copied = model
    from transformers import PreTrainedModel  # the Auto classes import our config while transformers loads its models

    if any(buffer.is_meta for buffer in model.buffers()) and isinstance(model, PreTrainedModel):
        with torch.device("cpu"):  # buffers hold tables that only the constructor can compute
            copied = type(model)(copy.deepcopy(model.config)).to(dtype).eval()
    if any(buffer.is_meta for buffer in copied.buffers()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where it has no values to find cuts with; build it on "
            "another device, and move it afterwards"
        )
    memo: dict[int, Any] = {id(p): _random(p) for p in copied.parameters() if p.is_meta}
    return copy.deepcopy(copied, memo) if memo else copied


def _random(parameter: nn.Parameter) -> nn.Parameter:
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()), device="cpu")
    return nn.Parameter(noise.to(parameter.dtype) / max(1, parameter[:1].numel()) ** 0.5, requires_grad=False)


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run a model on images (N, 3, H, W), within `tracing_mode`.

    Raises:
        ValueError: the model does not map images to logits that depend on them.
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
            f"{type(model).__name__} does not map images to logits: for {tuple(images.shape)} it returned "
            f"{tuple(logits.shape)}, {'' if logits.grad_fn else 'not '}depending on the images"
        )
    graph, start = _graph(logits.grad_fn, images)
    return Trace(model, calls, graph, logits.grad_fn, start, logits.shape[-1])


def _products(output: Any, inputs: Any) -> list[Product]:
    input_ids = {id(leaf) for leaf in tree_leaves(inputs)}
    return [
        Product(index, leaf, leaf.grad_fn, leaf._version, id(leaf) in input_ids)
        for index, leaf in enumerate(tree_leaves(output))
        if isinstance(leaf, Tensor)
    ]


def _graph(end: Any, image: Tensor) -> tuple["nx.DiGraph[Any]", Any]:
    """The nodes on paths from ``end`` to the accumulator of ``image``, and that accumulator."""
    import networkx as nx

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
