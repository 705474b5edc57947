"""Cut: a place where a network can be left and entered, with descriptions of its modules' outputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """Description of a tensor in an output: its shape and, where it does not depend on the image, its values.

    Args:
        shape: shape of the tensor for one image, where the first axis is the batch or a multiple of it.
        dtype: type of the tensor.
        batched: whether the first axis grows with the batch.
        constant: whether the values do not depend on the image, such as the positions of patches.
        values: values of a constant; None until they are computed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool
    constant: bool
    values: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, batch: int) -> "Leaf":
        """Describe a tensor of a traced forward with so many images."""
        shape = tuple(tensor.shape)
        batched = bool(shape) and shape[0] % batch == 0
        if batched:
            shape = (shape[0] // batch, *shape[1:])
        return cls(shape, tensor.dtype, batched, tensor.grad_fn is None)

    def with_values(self, tensor: Tensor) -> "Leaf":
        """A copy with the values of the tensor, computed for one image; unchanged where it is not a constant."""
        if not self.constant:
            return self
        # the traced batch may divide the rows of a table by chance
        batched = self.batched and tensor.shape[0] == self.shape[0]
        return replace(self, shape=tuple(tensor.shape), batched=batched, values=tensor)

    def matches(self, tensor: Tensor, batch: int) -> bool:
        """Whether the values are those of the tensor when it is computed for other images."""
        return self.values is not None and torch.equal(self._repeated(self.values, batch), tensor)

    def _repeated(self, value: Tensor, batch: int) -> Tensor:
        return value.repeat(batch, *[1] * (value.dim() - 1)) if self.batched else value.clone()

    def fill(self, like: Tensor) -> Tensor:
        """The tensor for the batch of ``like``; without values, zeros as one expanded scalar that takes no memory."""
        dtype = like.dtype if self.dtype.is_floating_point else self.dtype
        if self.values is None:
            value, shape = torch.zeros((), dtype=dtype, device=like.device), self.shape
            return value.expand(shape[0] * like.shape[0], *shape[1:]) if self.batched else value.expand(shape)
        return self._repeated(self.values.to(like.device, dtype), like.shape[0])


@dataclass(frozen=True)
class OutputSpec:
    """The structure of a module's output, with a description of its tensors."""

    leaves: tuple[Any, ...]
    tree: TreeSpec

    @classmethod
    def of(cls, output: Any, batch: int) -> "OutputSpec":
        """Describe an output of a traced forward with so many images; `with_values` completes it."""
        leaves, tree = tree_flatten(output)
        return cls(tuple(Leaf.of(x, batch) if isinstance(x, Tensor) else x for x in leaves), tree)

    @property
    def constants(self) -> tuple[int, ...]:
        """Indices of the leaves whose values must be stored."""
        return tuple(i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Leaf) and leaf.constant)

    def with_values(self, values: Mapping[int, Tensor]) -> "OutputSpec":
        """A copy with the values of leaves, by index."""
        leaves = (leaf.with_values(values[i]) if i in values else leaf for i, leaf in enumerate(self.leaves))
        return OutputSpec(tuple(leaves), self.tree)

    def fill(self, like: Tensor, given: Mapping[int, Tensor] | None = None) -> Any:
        """The output for the batch of ``like``, with the tensors ``given`` in place of leaves, by index."""
        given = given or {}
        filled = [
            given[index] if index in given else leaf.fill(like) if isinstance(leaf, Leaf) else leaf
            for index, leaf in enumerate(self.leaves)
        ]
        return tree_unflatten(filled, self.tree)


@dataclass(frozen=True)
class CutTensor:
    """A tensor of the activation at a cut, and where the network makes it.

    Args:
        path: path of the module whose output holds the tensor.
        output: structure of that output.
        leaf: index of the tensor among the leaves of the output.
        modified: whether a later module writes into the tensor.
    """

    path: str
    output: OutputSpec
    leaf: int
    modified: bool


@dataclass(frozen=True)
class Cut:
    """A place where a network can be left and entered: the output of a block that every path to the logits crosses.

    Args:
        name: path of the module in the network.
        aliases: paths of other modules that return the very same tensor.
        layout: layout of the activation.
        tensors: tensors of the activation: one, or several that only together carry the image.
        before: paths and outputs of the modules that are complete before the block starts, outermost only.
        after: paths and outputs of the modules that start after the block is complete, outermost only.
    """

    name: str
    aliases: tuple[str, ...]
    layout: AnyLayout
    tensors: tuple[CutTensor, ...]
    before: tuple[tuple[str, OutputSpec], ...]
    after: tuple[tuple[str, OutputSpec], ...]

    def specs(self) -> dict[str, OutputSpec]:
        """Every output of the cut, by path of its module."""
        return {**dict(self.before), **dict(self.after), **{made.path: made.output for made in self.tensors}}

    def with_specs(self, specs: Mapping[str, OutputSpec]) -> "Cut":
        """A copy with other outputs for the same modules, by path."""
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
        """The tensors of the activation that a module made, by their index in `tensors`.

        Args:
            path: path of the module.
            output: output of the module.
            copy: whether to copy tensors that the network will write into; not needed where they are used at once.
        """
        leaves = tree_flatten(output)[0]
        return {
            number: leaves[made.leaf].clone() if made.modified and copy else leaves[made.leaf]
            for number, made in enumerate(self.tensors)
            if made.path == path
        }

    def pack(self, tensors: Mapping[int, Tensor]) -> Tensor:
        """Combine the tensors of the activation, by index, into one."""
        if len(self.tensors) == 1:
            return tensors[0]
        flat = []
        for number, made in enumerate(self.tensors):
            x, spec = tensors[number], made.output.leaves[made.leaf]
            flat.append(x.reshape(x.shape[0] // spec.shape[0], -1))
        return torch.cat(flat, dim=1)

    def write(self, path: str, activation: Tensor) -> Any:
        """The output of a module, with its tensors of the activation in place."""
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
