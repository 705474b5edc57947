"""Layouts of activations (NCHW, NHWC, tokens with a prefix) and conversion between them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad


KINDS = ("NCHW", "NHWC", "NLC")
MAX_PREFIX = 8  # class, distillation and register tokens; no known classifier has more than five


@dataclass(frozen=True)
class Layout:
    """The layout of an activation.

    Args:
        kind: ``NCHW`` or ``NHWC`` for maps, ``NLC`` for tokens, row by row.
        channels: size of the channel axis.
        grid: height and width of the map, or of the grid of tokens.
        prefix: number of tokens before those of the grid (class, distillation, registers).

    Raises:
        ValueError: the values are no layout.
    """

    kind: str
    channels: int
    grid: tuple[int, int]
    prefix: int = 0

    def __post_init__(self) -> None:
        numbers = (self.channels, *self.grid)
        if self.kind not in KINDS or len(self.grid) != 2 or not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(f"{self} is not a layout: kind must be one of {KINDS}, channels and grid above 0")
        if type(self.prefix) is not int or not 0 <= self.prefix <= MAX_PREFIX or (self.prefix and self.kind != "NLC"):
            raise ValueError(f"{self} is not a layout: 0 to {MAX_PREFIX} prefix tokens, and only with NLC")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Layout":
        """The inverse of ``dataclasses.asdict``, also after JSON made a list of the grid."""
        return cls(**{**data, "grid": tuple(data["grid"])})

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape of a batch in this layout."""
        if self.kind == "NCHW":
            return (batch, self.channels, *self.grid)
        if self.kind == "NHWC":
            return (batch, *self.grid, self.channels)
        return (batch, self.prefix + self.grid[0] * self.grid[1], self.channels)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The spatial part as a map (N, C, H, W), and the prefix tokens (N, prefix, C) where there are any."""
        if self.kind == "NCHW":
            return x, None
        if self.kind == "NHWC":
            return x.permute(0, 3, 1, 2), None
        tokens = x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return tokens, x[:, : self.prefix] if self.prefix else None

    def join(self, spatial: Tensor, prefix: Tensor | None = None) -> Tensor:
        """The inverse of `split`: a map (N, C, H, W) and prefix tokens (N, prefix, C) in this layout."""
        if self.kind == "NCHW":
            return spatial
        if self.kind == "NHWC":
            return spatial.permute(0, 2, 3, 1)
        tokens = spatial.flatten(2).transpose(1, 2)
        return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


@dataclass(frozen=True)
class JointLayout:
    """The layout of several tensors that carry the image together, flattened and concatenated: (N, total).

    `split` returns one map on the finest of their grids, with the channels of all; prefix tokens are also concatenated
    along the channels, with zeros for a tensor that has fewer.

    Args:
        parts: layout of each tensor.
    """

    parts: tuple[Layout, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"{self} is not a layout of several tensors")

    @property
    def kind(self) -> str:
        """The kinds of the parts, such as ``NLC+NLC``."""
        return "+".join(part.kind for part in self.parts)

    @property
    def channels(self) -> int:
        """The channels of all parts together."""
        return sum(part.channels for part in self.parts)

    @property
    def grid(self) -> tuple[int, int]:
        """The finest grid of a part."""
        return max((part.grid for part in self.parts), key=math.prod)

    @property
    def prefix(self) -> int:
        """The most prefix tokens of a part."""
        return max(part.prefix for part in self.parts)

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape of a batch in this layout."""
        return (batch, sum(self._sizes()))

    def _sizes(self) -> list[int]:
        return [math.prod(part.shape(1)) for part in self.parts]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Split an activation into its parts, each in its own layout."""
        pieces = x.split(self._sizes(), dim=1)
        return [piece.unflatten(1, part.shape(1)[1:]) for piece, part in zip(pieces, self.parts, strict=True)]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """One map (N, C, H, W), and prefix tokens (N, prefix, C) where there are any."""
        maps, prefixes = [], []
        for part, piece in zip(self.parts, self.unpack(x), strict=True):
            spatial, prefix = part.split(piece)
            maps.append(resize(spatial, self.grid))
            prefix = x.new_zeros(x.shape[0], 0, part.channels) if prefix is None else prefix
            prefixes.append(pad(prefix, (0, 0, 0, self.prefix - part.prefix)))
        return torch.cat(maps, dim=1), torch.cat(prefixes, dim=2) if self.prefix else None


AnyLayout = Layout | JointLayout


def layout_from_dict(data: Mapping[str, Any]) -> AnyLayout:
    """The inverse of ``dataclasses.asdict`` of a layout, also after JSON made lists of tuples."""
    if "parts" in data:
        return JointLayout(tuple(Layout.from_dict(part) for part in data["parts"]))
    return Layout.from_dict(data)


def resize(spatial: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a map (N, C, H, W) to another grid: area averages where it shrinks, bilinear where it grows.

    Every output is a weighted mean of inputs with weights that sum to 1, so resizing commutes with a 1x1 convolution.
    """
    height, width = spatial.shape[-2:]
    if (height, width) == tuple(grid):
        return spatial
    if grid[0] <= height and grid[1] <= width:
        return interpolate(spatial, size=grid, mode="area")
    return interpolate(spatial, size=grid, mode="bilinear", antialias=grid[0] < height or grid[1] < width)


@cache
def resize_matrix(source: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The matrix by which `resize` maps each channel (positions of ``grid``, positions of ``source``)."""
    positions = math.prod(source)
    return resize(torch.eye(positions).unflatten(1, (1, *source)), grid).flatten(1).T.contiguous()


def infer_layout(
    shape: Sequence[int], image_size: tuple[int, int], grids: Collection[tuple[int, int]] = (), maps: str = "NCHW"
) -> Layout | None:
    """Infer a layout from a shape (N, ...); None for a vector or anything else that has no grid.

    Args:
        shape: shape of the activation, batch first.
        image_size: height and width of the image; a grid has about the same proportions.
        grids: grids of maps elsewhere in the same network, which decide how many tokens are prefix.
        maps: kind to assume where channels, height and width are all equal.
    """
    proportion = image_size[0] / image_size[1]

    def distortion(height: int, width: int) -> float:
        return abs(math.log(height / width / proportion))

    if len(shape) == 4:
        _, a, b, c = shape
        nchw, nhwc = distortion(b, c), distortion(a, b)
        kind = maps if nchw == nhwc else "NCHW" if nchw < nhwc else "NHWC"
        layout = Layout("NCHW", a, (b, c)) if kind == "NCHW" else Layout("NHWC", c, (a, b))
        return layout if math.prod(layout.grid) > 1 else None
    if len(shape) != 3:
        return None
    for must_be_known in (True, False):
        for prefix in range(min(MAX_PREFIX + 1, shape[1])):
            grid = _grid(shape[1] - prefix, proportion)
            if grid and math.prod(grid) > 1 and (not must_be_known or grid in grids):
                return Layout("NLC", shape[2], grid, prefix)
    return None


def _grid(length: int, proportion: float) -> tuple[int, int] | None:
    """Height and width with a product and about a proportion; None where there are none."""
    height = round(math.sqrt(length * proportion))
    for candidate in (height, height - 1, height + 1):
        if candidate > 0 and length % candidate == 0:
            width = length // candidate
            if abs(math.log(candidate / width / proportion)) < 0.2:
                return candidate, width
    return None
