"""Stitches: small adapters that map one anchor's activation to another's, of several kinds."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from restnet_hf.anchors.layouts import AnyLayout, JointLayout, Layout, resize, resize_matrix


MAX_WIDTH = 16384
BRANCH = "branch"  # the kind that copies a block of an anchor instead of mapping channels; see `BranchStitch`
OPTIONS = {  # that each of our kinds uses; any other must keep its default, and a user's own kind may use all
    "linear": ("class_token",),
    "lora": ("class_token", "r", "lora_alpha"),
    "mlp": ("class_token", "hidden"),
    BRANCH: ("prune",),
}
CLASS_TOKENS = ("pool", "learn", "drop", "add")
MAX_FLOAT = torch.finfo(torch.float32).max  # json.loads also returns infinity, and integers too large for a float


@dataclass(frozen=True)
class StitchConfig:
    """How stitches are made; the counterpart of a PEFT config.

    Args:
        kind: kind of stitch: a key of `STITCHES`, or ``branch`` for a trainable copy of one of an anchor's own blocks
            from one of its cuts to a later one (AdaptiveNet, arXiv 2303.07129).
        class_token: treatment of prefix tokens that only one side has. Tokens that only the target has are computed
            from the mean of the source's grid (``pool``, the default), or are fitted constants (``learn``), which
            give a late cut no information on the image. Tokens that only the source has are left out (``drop``, the
            default), or mapped and added to every position (``add``; the readout of DPT, arXiv 2103.13413, section
            3). Each value applies to its own direction.
        r: rank of the low-rank update of kind ``lora``, at least 1.
        lora_alpha: scale of the update of kind ``lora``: it is multiplied by ``lora_alpha / r``, as in PEFT.
        hidden: width of the hidden layer of kind ``mlp``; the target's channels by default.
        prune: share of the hidden channels that the copy of kind ``branch`` leaves out.

    Raises:
        ValueError: an option is not one of the values above, a number is out of range, or the kind does not use an
            option.
    """

    kind: str = "linear"
    class_token: str = "pool"
    r: int = 16
    lora_alpha: float = 16
    hidden: int | None = None
    prune: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in (*STITCHES, BRANCH):
            raise ValueError(f"stitch kind {self.kind!r} is not one of {sorted((*STITCHES, BRANCH))}")
        if self.class_token not in CLASS_TOKENS:
            raise ValueError(f"class_token={self.class_token!r} is not one of {CLASS_TOKENS}")
        for name, value in (("r", self.r), ("hidden", 1 if self.hidden is None else self.hidden)):
            if type(value) is not int or not 1 <= value <= MAX_WIDTH:  # an untrusted config must not exhaust memory
                raise ValueError(f"{name}={value!r} must be a whole number from 1 to {MAX_WIDTH}")
        if type(self.lora_alpha) not in (int, float) or not 0 < self.lora_alpha <= MAX_FLOAT:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} must be a finite number above 0")
        if type(self.prune) not in (int, float) or not 0 <= self.prune < 1 or (self.prune and self.kind != BRANCH):
            raise ValueError(f"prune={self.prune!r} must be at least 0, below 1, and 0 for other kinds than 'branch'")
        unused = {
            option.name: value
            for option in fields(self)[1:]
            if (value := getattr(self, option.name)) != option.default
            if option.name not in OPTIONS.get(self.kind, (option.name,))
        }
        if unused:
            raise ValueError(f"stitches of kind {self.kind!r} do not use {unused}; they take {OPTIONS[self.kind]}")

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "StitchConfig":
        """The config of an adapter; options that its kind does not use, which 0.1 accepted, get their defaults.

        Args:
            stored: options of a stitch by name, as config.json has them.
        """
        options = {option.name for option in fields(cls)[1:]}
        unused = options - {*OPTIONS.get(stored.get("kind", ""), options)}
        return cls(**{name: value for name, value in stored.items() if name not in unused})


Chosen = Tensor | None  # positions (N, P) of each image, None for all


@dataclass(frozen=True)
class Problem:
    """A least-squares problem whose solution sets weights of a stitch.

    If images have more positions than are wanted, a sample is drawn, the same for inputs and outputs.

    Args:
        inputs: function that returns rows (N, P, C) of the source's activation at the chosen positions.
        outputs: function that returns rows (N, P, D) of the target's activation at the chosen positions.
        assign: function that takes the solution, weight (D, C) and bias (D,).
        positions: number of positions P of an image.
        key_in: value that is equal for problems with equal input rows.
        key_out: value that is equal for problems with equal output rows.
    """

    inputs: Callable[[Tensor, Chosen], Tensor]
    outputs: Callable[[Tensor, Chosen], Tensor]
    assign: Callable[[Tensor, Tensor], None]
    positions: int
    key_in: Hashable
    key_out: Hashable

    def chosen(self, images: int, most: int, seed: int) -> Chosen:
        """Draw positions (N, P) of each image at random; None if all are to be used.

        Args:
            images: number of images N.
            most: largest number of positions of an image.
            seed: seed of the random numbers.
        """
        if self.positions <= most:
            return None
        rng = torch.Generator().manual_seed(1_000_003 * seed + self.positions)
        return torch.rand(images, self.positions, generator=rng).argsort(1)[:, :most]


class Stitch(nn.Module, ABC):
    """A module that maps an activation in one layout to one in another, and whose weights least squares can set.

    ``target_cut`` is the cut whose activation its problems fit, if that is not the cut that the stitch leads to.
    """

    target_cut: int | None = None

    @abstractmethod
    def problems(self) -> list[Problem]:
        """The least-squares problems whose solutions are this stitch's weights."""

    def extra_repr(self) -> str:
        """The shapes of its input and output, where it has layouts."""
        layouts = [getattr(self, name, None) for name in ("source", "target")]
        return " -> ".join(f"(N, {', '.join(map(str, each.shape(1)[1:]))})" for each in layouts if each is not None)

    def bake(self) -> nn.Module:
        """A plain module that computes the same, with copies of the weights."""
        return copy.deepcopy(self)


class LinearStitch(Stitch):
    """One affine map of channels for every position: a 1x1 convolution on maps, a linear layer on tokens.

    Between different grids the activation is resized on the cheaper side of the affine map (the two commute). Prefix
    tokens that both sides have go through the same map, as in SN-Net (arXiv 2302.06586, section 3.2); for the others
    see ``class_token`` of `StitchConfig`.

    Args:
        source: layout of the input.
        target: layout of the output.
        config: options of the stitch.
    """

    def __init__(self, source: AnyLayout, target: Layout, config: StitchConfig) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.shared = min(source.prefix, target.prefix)
        self.missing = target.prefix - self.shared
        self.proj = self._layer(source.channels, target.channels)
        self.shrinks = target.grid[0] * target.grid[1] < source.grid[0] * source.grid[1]
        self.prefix: nn.Parameter | None = None
        self.pool: nn.Linear | None = None
        if self.missing and config.class_token == "learn":
            self.prefix = nn.Parameter(torch.zeros(1, self.missing, target.channels))
        elif self.missing:
            self.pool = nn.Linear(source.channels, self.missing * target.channels)
        self.spare = source.prefix - self.shared if config.class_token == "add" else 0
        self.added: nn.Linear | None = None
        if self.spare:
            self.added = nn.Linear(self.spare * source.channels, target.channels, bias=False)

    def _layer(self, channels_in: int, channels_out: int, bias: bool = True) -> nn.Conv2d | nn.Linear:
        """A new map of channels: a convolution for maps, a linear layer for tokens."""
        if self.source.kind == "NCHW":
            return nn.Conv2d(channels_in, channels_out, 1, bias=bias)
        return nn.Linear(channels_in, channels_out, bias=bias)

    def _map(self, x: Tensor) -> Tensor:
        """Map the channels of every position; the axes are those that `_layer` takes."""
        return self.proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map an activation in the source's layout to one in the target's."""
        spatial, prefix = self.source.split(x)
        pooled = spatial.mean((2, 3)) if self.pool is not None else None
        if self.shrinks:
            spatial = resize(spatial, self.target.grid)
        spatial = self._project(spatial)
        if not self.shrinks:
            spatial = resize(spatial, self.target.grid)
        if self.added is not None and prefix is not None:
            spatial = spatial + self.added(prefix[:, self.shared :].flatten(1))[:, :, None, None]
        return self.target.join(spatial, self._prefix(prefix, pooled, x.shape[0]))

    def _project(self, spatial: Tensor) -> Tensor:
        if self.source.kind == "NCHW":  # not by the layer's class, which PEFT replaces by its own
            return self._map(spatial)
        mapped = self._map(spatial.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        # channels-last memory would slow down the convolutions of networks that were not made for it
        return mapped.contiguous() if self.target.kind == "NCHW" else mapped

    def _prefix(self, prefix: Tensor | None, pooled: Tensor | None, batch: int) -> Tensor | None:
        tokens = []
        if self.shared and prefix is not None:
            tokens.append(self._map(prefix[:, : self.shared]))
        if self.prefix is not None:
            tokens.append(self.prefix.expand(batch, -1, -1))
        elif self.pool is not None:
            tokens.append(self.pool(pooled).unflatten(1, (self.missing, self.target.channels)))
        return torch.cat(tokens, dim=1) if tokens else None

    def problems(self) -> list[Problem]:
        """The problem of the map of positions and, for tokens that only the target has, one of those tokens."""
        places = self.shared + math.prod(self.target.grid)
        rows_in, rows_out = ("rows", self.target.grid, self.shared, self.spare), ("rows", self.shared)
        problems = [Problem(self._rows_in, self._rows_out, self._set_projection, places, rows_in, rows_out)]
        missing = ("missing", self.shared)
        if self.prefix is not None:
            problems.append(Problem(self._nothing_in, self._missing_out, self._set_prefix, 1, "nothing", missing))
        elif self.pool is not None:
            problems.append(Problem(self._mean_in, self._missing_out, self._set_pool, 1, "mean", missing))
        return problems

    def _rows_in(self, x: Tensor, chosen: Chosen) -> Tensor:
        spatial, prefix = self.source.split(x)
        if chosen is None or self.shrinks:
            rows = self._at(resize(spatial, self.target.grid), chosen)
        else:  # the enlarged map is never computed as a whole
            matrix = resize_matrix(self.source.grid, self.target.grid).to(x.device, x.dtype)
            rows = matrix[(chosen.to(x.device) - self.shared).clamp_min(0)] @ spatial.flatten(2).transpose(1, 2)
        if self.spare and prefix is not None:  # tokens that are added to every position are inputs of every position
            tokens = prefix[:, self.shared :].flatten(1)[:, None].expand(-1, rows.shape[1], -1)
            rows = torch.cat([rows, tokens], dim=2)
        return self._with_prefix(rows, prefix, chosen)

    def _rows_out(self, y: Tensor, chosen: Chosen) -> Tensor:
        spatial, prefix = self.target.split(y)
        return self._with_prefix(self._at(spatial, chosen), prefix, chosen)

    def _at(self, spatial: Tensor, chosen: Chosen) -> Tensor:
        """A map on the target's grid as rows (N, P, C)."""
        rows = spatial.flatten(2).transpose(1, 2)
        if chosen is None:
            return rows
        at = (chosen.to(rows.device) - self.shared).clamp_min(0)
        return rows.gather(1, at[..., None].expand(-1, -1, rows.shape[2]))

    def _with_prefix(self, rows: Tensor, prefix: Tensor | None, chosen: Chosen) -> Tensor:
        """Rows with the shared prefix tokens in front, or at the chosen positions below ``shared``."""
        if not self.shared or prefix is None:
            return rows
        tokens = pad(prefix[:, : self.shared], (0, rows.shape[2] - prefix.shape[2]))
        if chosen is None:
            return torch.cat([tokens, rows], dim=1)
        chosen = chosen.to(rows.device)[..., None].expand(-1, -1, rows.shape[2])
        return torch.where(chosen < self.shared, tokens.gather(1, chosen.clamp_max(self.shared - 1)), rows)

    def _nothing_in(self, x: Tensor, chosen: Chosen) -> Tensor:
        return x.new_zeros(len(x), 1, 0)

    def _mean_in(self, x: Tensor, chosen: Chosen) -> Tensor:
        return self.source.split(x)[0].mean((2, 3))[:, None]

    def _missing_out(self, y: Tensor, chosen: Chosen) -> Tensor:
        return y[:, self.shared : self.target.prefix].flatten(1)[:, None]

    @torch.no_grad()
    def _set_projection(self, weight: Tensor, bias: Tensor) -> None:
        self.proj.weight.copy_(weight[:, : self.source.channels].reshape(self.proj.weight.shape))
        if self.added is not None:
            self.added.weight.copy_(weight[:, self.source.channels :])
        assert self.proj.bias is not None
        self.proj.bias.copy_(bias)

    @torch.no_grad()
    def _set_prefix(self, weight: Tensor, bias: Tensor) -> None:
        assert self.prefix is not None
        self.prefix.copy_(bias.view_as(self.prefix))

    @torch.no_grad()
    def _set_pool(self, weight: Tensor, bias: Tensor) -> None:
        assert self.pool is not None
        self.pool.weight.copy_(weight)
        self.pool.bias.copy_(bias)


class LowRankStitch(LinearStitch):
    """A linear stitch that trains a low-rank update: W x + b + (lora_alpha / r) B A x (SN-Netv2).

    SN-Netv2 (arXiv 2307.00154) found this more stable to train than the whole weight. W stays as least squares sets it
    and has no gradient; A, B, the bias and the maps of prefix tokens train. B is zero after a fit, as in PEFT, so the
    stitch starts as the linear one. Resizing commutes with the update, too.

    Args:
        source: layout of the input.
        target: layout of the output.
        config: options of the stitch, with the rank ``r`` and the scale ``lora_alpha``.
    """

    def __init__(self, source: AnyLayout, target: Layout, config: StitchConfig) -> None:
        super().__init__(source, target, config)
        self.proj.weight.requires_grad_(False)
        self.scaling, self.config = config.lora_alpha / config.r, config
        self.A = self._layer(
            source.channels, config.r, bias=False
        )  # not named lora_A, which PEFT would take for its own tensor
        self.B = self._layer(config.r, target.channels, bias=False)
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)

    def _map(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.scaling * self.B(self.A(x))

    @torch.no_grad()
    def merged(self) -> LinearStitch:
        """A linear stitch that computes the same up to rounding, like PEFT's ``merge_and_unload``."""
        merged = LinearStitch(self.source, self.target, self.config)
        merged.load_state_dict({key: value for key, value in self.state_dict().items() if key[:2] not in ("A.", "B.")})
        update = self.B.weight.flatten(1) @ self.A.weight.flatten(1)
        merged.proj.weight += self.scaling * update.view_as(merged.proj.weight)
        return merged.to(self.proj.weight.dtype)

    def _set_projection(self, weight: Tensor, bias: Tensor) -> None:
        super()._set_projection(weight, bias)
        nn.init.zeros_(self.B.weight)  # the solution is for the affine map alone


class MLPStitch(LinearStitch):
    """A two-layer perceptron for every position in addition to the affine map: W x + b + V relu(U x + c).

    An MLP is the best of the forms that arXiv 2603.12433 compares. V is zero after a fit, so the stitch starts as the
    linear one. Between different grids the activation is resized where the linear stitch resizes it, on the cheaper
    side, but the two do not commute here: a map that shrinks is averaged before the ReLU, one that grows is
    interpolated after V.

    Args:
        source: layout of the input.
        target: layout of the output.
        config: options of the stitch, with the width ``hidden``.
    """

    def __init__(self, source: AnyLayout, target: Layout, config: StitchConfig) -> None:
        super().__init__(source, target, config)
        hidden = target.channels if config.hidden is None else config.hidden
        self.hidden = self._layer(source.channels, hidden)
        self.out = self._layer(hidden, target.channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def _map(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.out(relu(self.hidden(x)))

    def _set_projection(self, weight: Tensor, bias: Tensor) -> None:
        super()._set_projection(weight, bias)
        nn.init.zeros_(self.out.weight)  # the solution is for the affine map alone


STITCHES: dict[str, Callable[[AnyLayout, Layout, StitchConfig], Stitch]] = {
    "linear": LinearStitch,
    "lora": LowRankStitch,
    "mlp": MLPStitch,
}


class JointStitch(Stitch):
    """A stitch for each tensor of an activation that consists of several.

    Args:
        source: layout of the input.
        target: layout of the output, with a part for each tensor.
        config: options of each part's stitch.
    """

    def __init__(self, source: AnyLayout, target: JointLayout, config: StitchConfig) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.parts = nn.ModuleList(STITCHES[config.kind](source, part, config) for part in target.parts)

    def forward(self, x: Tensor) -> Tensor:
        """Map an activation in the source's layout to one in the target's."""
        return torch.cat([part(x).flatten(1) for part in self.parts], dim=1)

    def problems(self) -> list[Problem]:
        """The least-squares problems of all parts."""
        problems = []
        for index, part in enumerate(self.parts):
            assert isinstance(part, Stitch)
            for problem in part.problems():
                outputs = partial(self._outputs, index, problem.outputs)
                problems.append(replace(problem, outputs=outputs, key_out=(index, problem.key_out)))
        return problems

    def _outputs(self, index: int, outputs: Callable[[Tensor, Chosen], Tensor], y: Tensor, chosen: Chosen) -> Tensor:
        return outputs(self.target.unpack(y)[index], chosen)


def make_stitch(source: AnyLayout, target: AnyLayout, config: StitchConfig) -> Stitch:
    """Make a new stitch between two layouts.

    Args:
        source: layout of the input.
        target: layout of the output.
        config: options of the stitch; its kind must be a key of `STITCHES`.

    Raises:
        ValueError: the kind does not map layouts.
    """
    if config.kind not in STITCHES:
        raise ValueError(f"a stitch of kind {config.kind!r} does not map layouts; choose one of {sorted(STITCHES)}")
    if isinstance(target, JointLayout):
        return JointStitch(source, target, config)
    return STITCHES[config.kind](source, target, config)
