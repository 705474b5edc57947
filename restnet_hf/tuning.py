"""TUNINGS: what routes put in the place of an anchor's own weights while they run; the anchor itself never changes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from restnet_hf.anchors import Anchor
from restnet_hf.routes import Route, of_adapter
from restnet_hf.segments import outside, own_modules


HIGHEST = 4096  # rank: a config of a stranger must not fill the memory
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class TunedConfig:
    """What is tuned.

    Args:
        kind: a key of `TUNINGS`.
        anchor: name of the anchor whose weights are replaced.
        start, stop: cuts between which they are.
        r: rank of low-rank updates.
        lora_alpha: their scale is ``lora_alpha / r``, as in PEFT.

    Raises:
        ValueError: there is no such kind, or a number is not above zero.
    """

    kind: str
    anchor: str
    start: int = 0
    stop: int | None = None
    r: int = 8
    lora_alpha: float = 8.0

    def __post_init__(self) -> None:
        if self.kind not in TUNINGS:
            raise ValueError(f"kind={self.kind!r} is not one of {sorted(TUNINGS)}")
        if type(self.r) is not int or not 1 <= self.r <= HIGHEST or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"r={self.r} must be from 1 to {HIGHEST}, and lora_alpha={self.lora_alpha} above 0")


class Tuned(nn.Module):
    """Tensors for a segment's own: copies that train, or low-rank updates.

    Args:
        anchor: whose weights are replaced; it is neither held nor changed.
        config: see `TunedConfig`.

    Raises:
        ValueError: the segment has nothing of that kind.
    """

    def __init__(self, anchor: Anchor, config: TunedConfig) -> None:
        super().__init__()
        self.config = config
        self.own = nn.ParameterDict()
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        names = tunable(anchor, config.kind, config.start, config.stop)
        if not names:
            raise ValueError(
                f"anchor '{config.anchor}' has nothing of kind {config.kind!r} from cut {config.start} on"
            )
        for name in names:
            tensor, key = _tensor(anchor.model, name), name.replace(".", "/")
            if config.kind == "lora":
                self.A[key] = nn.Parameter(tensor.new_empty(config.r, tensor[0].numel()))
                self.B[key] = nn.Parameter(tensor.new_zeros(len(tensor), config.r))
                nn.init.kaiming_uniform_(self.A[key], a=5**0.5)
            elif isinstance(tensor, nn.Parameter):
                self.own[key] = nn.Parameter(tensor.detach().clone())
            else:
                self.register_buffer(key, tensor.detach().clone())
        self._inside: dict[tuple[int, int | None], list[str]] = {(config.start, config.stop): names}

    def tensors(self, anchor: Anchor, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """What to put in the place of the segment's weights and buffers, by name.

        A low-rank update is ``W + lora_alpha / r · B A`` (Hu et al., arXiv 2106.09685).
        """
        if (start, stop) not in self._inside:
            there = set(self._inside[self.config.start, self.config.stop])
            names = tunable(anchor, self.config.kind, start, stop)
            self._inside[start, stop] = [name for name in names if name in there]
        found = {}
        for name in self._inside[start, stop]:
            key = name.replace(".", "/")
            if key in self.A:
                weight = _tensor(anchor.model, name)
                update = (self.B[key] @ self.A[key]).view_as(weight)
                found[name] = weight + update * (self.config.lora_alpha / self.config.r)
            else:
                found[name] = self.own[key] if key in self.own else getattr(self, key)
        return found

    def extra_repr(self) -> str:
        return f"kind={self.config.kind!r}, anchor={self.config.anchor!r}"


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def tunable(anchor: Anchor, kind: str, start: int = 0, stop: int | None = None) -> list[str]:
    """Names in the network of the tensors of a segment that a kind replaces, each tensor once."""
    last = None if stop is None else anchor.cut(stop)
    names, seen = [], set()
    for module, path in own_modules(anchor.model, outside(anchor.cut(start), last, anchor.classifier)).items():
        for leaf, tensor in TUNINGS[kind](module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                names.append(f"{path}.{leaf}" if path else leaf)
    return names


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's own kinds, and those of libraries that are called so."""
    return isinstance(module, NORMS) or ("norm" in type(module).__name__.lower() and not any(module.children()))


Named = Iterable[tuple[str, Tensor]]


def _norm(module: nn.Module) -> Named:
    if is_norm(module):
        yield from ((name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 1)
        yield from ((name, b) for name, b in module.named_buffers(recurse=False) if name.startswith("running_"))


def _bias(module: nn.Module) -> Named:
    if isinstance(module, LAYERS) and module.bias is not None:
        yield "bias", module.bias


def _lora(module: nn.Module) -> Named:
    if isinstance(module, LAYERS):
        yield "weight", module.weight


def _full(module: nn.Module) -> Named:
    return module.named_parameters(recurse=False)


# What each kind replaces of a module. The first two are shared by the routes of an adapter, the others a route's own.
TUNINGS: dict[str, Callable[[nn.Module], Named]] = {"full": _full, "lora": _lora, "bias": _bias, "norm": _norm}
SHARED = ("full", "lora")


def tuned_keys(route: Route) -> list[list[str]]:
    """For each segment of a route the keys under which a model keeps what is tuned of it.

    An anchor alone stays what it was: nothing is ever tuned of it.
    """
    points = route.stitch_points
    if not points:
        return [[]]
    own = "+".join(point.name for point in points)
    found = []
    for index, segment in enumerate(route.segments):
        shared = of_adapter(route.adapter, segment.anchor)
        last = index == len(route.segments) - 1
        found.append([f"{kind}-{shared if kind in SHARED else own}" for kind in TUNINGS if last or kind in SHARED])
    return found


@contextmanager
def _counting(anchor: Anchor, start: int) -> Iterator[None]:
    """BatchNorm of a segment normalises by the batch and averages what it sees, for as long as this is open."""
    modules = own_modules(anchor.model, outside(anchor.cut(start), None, anchor.classifier))
    norms = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [(module, module.momentum, module.num_batches_tracked) for module in norms]
    for module in norms:
        module.training, module.momentum = True, None
        module.num_batches_tracked = torch.tensor(0)
    try:
        yield
    finally:
        for module, momentum, batches in before:
            module.training, module.momentum, module.num_batches_tracked = False, momentum, batches


@torch.no_grad()
def recalibrate(tuned: Tuned, anchor: Anchor, activations: Iterable[Callable[[], Tensor]]) -> bool:
    """Set the BatchNorm statistics of a tuned segment to those of the activations that a stitch gives it.

    Args:
        tuned: of the end of a route.
        anchor: whose segment it is.
        activations: for each batch, a function that gives the activation at the segment's start.

    Returns:
        Whether there was any BatchNorm.
    """
    start = tuned.config.start
    running = {name: buffer for name, buffer in tuned.named_buffers() if name.rpartition("/")[2].startswith("running")}
    if not running:
        return False
    with _counting(anchor, start):
        for activation in activations:
            anchor(activation(), start, None, partial(tuned.tensors, anchor))
    return True


def tuned_tensors(parts: Iterable[Tuned], anchor: Anchor, start: int, stop: int | None) -> Mapping[str, Tensor]:
    """All that a route replaces in a segment; of the same tensor the last one counts."""
    return {name: tensor for part in parts for name, tensor in part.tensors(anchor, start, stop).items()}
