"""A route as a program: one graph of tensor operations, which exporters convert for their runtimes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from restnet_hf.export.folding import fold_stitches, merge_stitches, module_of
from restnet_hf.export.parts import RouteOrPart
from restnet_hf.steps import Step
from restnet_hf.stitches.layers import Stitch


LAYERS = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}
MAX_BATCH = 1024  # images in a batch, where a file takes any number


class ExportedRoute(nn.Module):
    """A baked route whose input is named as in transformers."""

    def __init__(self, steps: nn.Sequential) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        return self.steps(pixel_values)


@dataclass(frozen=True)
class Program:
    """A route or a part of one as one graph.

    Args:
        route: the route of a model, or the part of an exported cascade.
        module: the baked route, with its stitches folded where that is exact and cheaper.
        exported: graph of the module.
        example: images (N, 3, H, W) that the module was traced with.
        stitches: paths of the stitches in the module.
        folded: number of stitches that were folded.
        metadata: text that describes the file of the route, by key, for formats that have a place for it.
    """

    route: RouteOrPart
    module: ExportedRoute
    exported: ExportedProgram
    example: Tensor
    stitches: tuple[str, ...]
    folded: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def layers(self) -> dict[str, fx.Node]:
        """The convolutions and linear layers by the path of their module, in the order in which they run."""
        layers: dict[str, fx.Node] = {}
        for node in self.exported.graph.nodes:
            if node.target in LAYERS:
                layers.setdefault(module_of(node), node)
        return layers

    @property
    def first_kept(self) -> tuple[tuple[str, ...], ...]:
        """Layers to keep in full precision first where agreement is too low: the stitches, then the head too."""
        names = list(self.layers)
        stitched = tuple(name for name in names if any(name.startswith(f"{path}.") for path in self.stitches))
        return tuple(dict.fromkeys(kept for kept in (stitched, (*stitched, names[-1])) if kept))


def trace_route(
    route: RouteOrPart, steps: Sequence[Step], batch_size: int | None = None, dtype: torch.dtype | None = None
) -> Program:
    """Bake a route or a part of one and trace it.

    Args:
        route: the route of a model, or the part of an exported cascade.
        steps: steps of the route or part.
        batch_size: number of images in a run; None for any number.
        dtype: type of the weights and images; None for float32, also of a model in half precision.

    Raises:
        ValueError: the route cannot be traced.
    """
    image = steps[0].shape[1:]
    module = ExportedRoute(nn.Sequential(*(step.bake() for step in steps))).eval().requires_grad_(False).cpu().float()
    example = torch.randn(batch_size or 2, *image, generator=torch.Generator().manual_seed(0))
    sizes = None if batch_size else {"pixel_values": {0: Dim("batch", min=1, max=MAX_BATCH)}}
    merge_stitches(module.steps)
    exported = _trace(module, route, example, sizes)
    folded = fold_stitches(module.steps, example, exported)
    if dtype is not None:
        module, example = module.to(dtype), example.to(dtype)
    if folded or dtype is not None:
        exported = _trace(module, route, example, sizes)
    stitches = tuple(f"steps.{index}" for index, step in enumerate(steps) if isinstance(step.module, Stitch))
    return Program(route, module, exported, example, stitches, folded)


def _trace(module: nn.Module, route: RouteOrPart, example: Tensor, sizes: Any) -> ExportedProgram:
    try:
        return torch.export.export(module, (example,), dynamic_shapes=sizes, strict=False)
    except Exception as error:  # the errors of tracing have no class in common
        how = "; a batch of any size may be the cause: give batch_size=1" if sizes else ""
        raise ValueError(f"route '{route}' cannot be exported{how}: {type(error).__name__}: {error}") from error


def numpy_batches(images: Tensor) -> Iterator[Any]:
    """Images (N, 3, H, W) one by one, as arrays (1, 3, H, W) for calibration."""
    for image in images:
        yield image[None].float().numpy()
