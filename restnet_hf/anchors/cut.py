"""What is kept of the outputs of a network's modules, and the cut: a place where it can be left and entered."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from restnet_hf.anchors.layouts import AnyLayout


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a classifier returns: a tensor, a ``ModelOutput``, a dict or a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if logits is not None else first_tensor(output)


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a nested output; raises TypeError where there is none."""
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor):
            return leaf
    raise TypeError(f"{type(output).__name__} holds no tensor")


@dataclass(frozen=True, eq=False)
class Leaf:
    """What is kept of a tensor of an output: its shape and, where it does not depend on the image, its values.

    Args:
        shape: with the first axis for one image, where that is the batch or windows of it.
        dtype: of the tensor.
        batched: whether it is.
        constant: whether the values do not depend on the image, such as the positions of patches.
        values: of a constant, once they are known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool
    constant: bool
    values: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, batch: int) -> "Leaf":
        """Of a tensor of a watched forward."""
        shape = tuple(tensor.shape)
        batched = bool(shape) and shape[0] % batch == 0
        if batched:
            shape = (shape[0] // batch, *shape[1:])
        return cls(shape, tensor.dtype, batched, tensor.grad_fn is None)

    def with_values(self, tensor: Tensor) -> "Leaf":
        """With the values of that tensor, the same one for one image, where it is a constant."""
        if not self.constant:
            return self
        # a table may have had an even number of rows by chance
        batched = self.batched and tensor.shape[0] == self.shape[0]
        return replace(self, shape=tuple(tensor.shape), batched=batched, values=tensor)

    def tells(self, tensor: Tensor, batch: int) -> bool:
        """Whether the values kept are those of that tensor, the same one for other images."""
        return self.values is not None and torch.equal(self._repeated(self.values, batch), tensor)

    def _repeated(self, value: Tensor, batch: int) -> Tensor:
        return value.repeat(batch, *[1] * (value.dim() - 1)) if self.batched else value.clone()

    def fill(self, like: Tensor) -> Tensor:
        """The tensor for the batch of ``like``; zeros for values, as one expanded scalar that takes no memory."""
        dtype = like.dtype if self.dtype.is_floating_point else self.dtype
        if self.values is None:
            value, shape = torch.zeros((), dtype=dtype, device=like.device), self.shape
            return value.expand(shape[0] * like.shape[0], *shape[1:]) if self.batched else value.expand(shape)
        return self._repeated(self.values.to(like.device, dtype), like.shape[0])


@dataclass(frozen=True)
class OutputSpec:
    """The structure of a module's output, with what is kept of its tensors, computed from a batch of images."""

    leaves: tuple[Any, ...]
    tree: TreeSpec

    @classmethod
    def of(cls, output: Any, batch: int) -> "OutputSpec":
        """Of an output of a watched forward; `with_values` completes it."""
        leaves, tree = tree_flatten(output)
        return cls(tuple(Leaf.of(x, batch) if isinstance(x, Tensor) else x for x in leaves), tree)

    @property
    def constants(self) -> tuple[int, ...]:
        """The leaves whose values are to be kept."""
        return tuple(i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Leaf) and leaf.constant)

    def with_values(self, values: Mapping[int, Tensor]) -> "OutputSpec":
        """With the values of those leaves."""
        leaves = (leaf.with_values(values[i]) if i in values else leaf for i, leaf in enumerate(self.leaves))
        return OutputSpec(tuple(leaves), self.tree)

    def fill(self, like: Tensor, given: Mapping[int, Tensor] = MappingProxyType({})) -> Any:
        """The structure for the batch of ``like``, with the tensors ``given`` in place of those leaves."""
        filled = [
            given[index] if index in given else leaf.fill(like) if isinstance(leaf, Leaf) else leaf
            for index, leaf in enumerate(self.leaves)
        ]
        return tree_unflatten(filled, self.tree)


@dataclass(frozen=True)
class Made:
    """A tensor of an activation and where the network makes it.

    Args:
        path: of the module in whose output it is.
        output: structure of that output.
        leaf: which of its leaves the tensor is.
        modified: a later module writes into it.
    """

    path: str
    output: OutputSpec
    leaf: int
    modified: bool


@dataclass(frozen=True)
class Cut:
    """A place where a network can be left and entered: the output of a block that every path to the logits crosses.

    Args:
        name: path of the module in the network; ``aliases`` are other modules that return the very same tensor.
        layout: of the activation.
        tensors: what the activation is made of: one tensor, or several that only together carry the image.
        before: modules that are complete before the block starts, outermost only, with their outputs.
        after: paths of the modules that start after the block is complete, outermost only, with their outputs.
    """

    name: str
    aliases: tuple[str, ...]
    layout: AnyLayout
    tensors: tuple[Made, ...]
    before: tuple[tuple[str, OutputSpec], ...]
    after: tuple[tuple[str, OutputSpec], ...]

    def specs(self) -> dict[str, OutputSpec]:
        """Every spec, by path of its module."""
        return {**dict(self.before), **dict(self.after), **{made.path: made.output for made in self.tensors}}

    def with_specs(self, specs: Mapping[str, OutputSpec]) -> "Cut":
        """With other specs for the same modules."""
        return replace(
            self,
            tensors=tuple(replace(made, output=specs[made.path]) for made in self.tensors),
            before=tuple((path, specs[path]) for path, _ in self.before),
            after=tuple((path, specs[path]) for path, _ in self.after),
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules that make the tensors, each once."""
        return tuple(dict.fromkeys(made.path for made in self.tensors))

    def read(self, path: str, output: Any, copy: bool = True) -> dict[int, Tensor]:
        """Those of the tensors that this module made, by number.

        With ``copy``, those that the network would write into are copied; not needed where they are used at once.
        """
        leaves = tree_flatten(output)[0]
        return {
            number: leaves[made.leaf].clone() if made.modified and copy else leaves[made.leaf]
            for number, made in enumerate(self.tensors)
            if made.path == path
        }

    def pack(self, tensors: Mapping[int, Tensor]) -> Tensor:
        """The activation out of its tensors."""
        if len(self.tensors) == 1:
            return tensors[0]
        flat = []
        for number, made in enumerate(self.tensors):
            x, spec = tensors[number], made.output.leaves[made.leaf]
            flat.append(x.reshape(x.shape[0] // spec.shape[0], -1))
        return torch.cat(flat, dim=1)

    def write(self, path: str, activation: Tensor) -> Any:
        """The output of the module that made tensors of the activation, with them in place."""
        made = {number: made for number, made in enumerate(self.tensors) if made.path == path}
        tensors = self._unpack(activation)
        given = {m.leaf: tensors[n].clone() if m.modified else tensors[n] for n, m in made.items()}
        return next(iter(made.values())).output.fill(activation, given)

    def _unpack(self, activation: Tensor) -> list[Tensor]:
        if len(self.tensors) == 1:
            return [activation]
        shapes = [made.output.leaves[made.leaf].shape for made in self.tensors]
        pieces = activation.split([math.prod(shape) for shape in shapes], dim=1)
        return [
            piece.contiguous().view(piece.shape[0] * shape[0], *shape[1:])
            for piece, shape in zip(pieces, shapes, strict=True)
        ]
