"""TUNINGS: what routes put in the place of an anchor's own weights while they run; the anchor itself never changes."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.segments import outside, own_modules
from restnet_hf.routes.route import Route, TunedKey, of_adapter
from restnet_hf.stitches.norms import is_norm


HIGHEST = 4096  # rank: a config of a stranger must not fill the memory
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
        alpha, stop = self.lora_alpha, 1 if self.stop is None else self.stop
        if type(self.r) is not int or not 1 <= self.r <= HIGHEST or not 0 < alpha <= sys.float_info.max:
            raise ValueError(f"r={self.r} must be from 1 to {HIGHEST}, and lora_alpha={alpha} finite and above 0")
        if type(self.start) is not int or type(stop) is not int or min(self.start, stop) < 0:
            raise ValueError(f"start={self.start} and stop={self.stop} must be numbers of cuts")


class Tuned(nn.Module):
    """Tensors for a segment's own: copies that train, or low-rank updates.

    Args:
        anchor: whose weights are replaced; it is neither held nor changed.
        config: see `TunedConfig`.
        ghost: one of which only shapes are needed, and which takes no memory.

    Raises:
        ValueError: the segment has nothing of that kind.
    """

    def __init__(self, anchor: Anchor, config: TunedConfig, ghost: bool = False) -> None:
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
            if ghost:
                like = torch.empty_like(tensor, device="meta")
                tensor = nn.Parameter(like) if isinstance(tensor, nn.Parameter) else like
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


def ghost_tuned(anchors: Mapping[str, Anchor], config: TunedConfig) -> Tuned:
    """What would be tuned of one of several anchors, with shapes alone."""
    return Tuned(anchors[config.anchor], config, ghost=True)


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


def tuned_keys(route: Route) -> list[list[TunedKey]]:
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
        found.append([TunedKey(kind, shared if kind in SHARED else own) for kind in TUNINGS if last or kind in SHARED])
    return found


def tuned_tensors(parts: Iterable[Tuned], anchor: Anchor, start: int, stop: int | None) -> Mapping[str, Tensor]:
    """All that a route replaces in a segment; of the same tensor the last one counts."""
    return {name: tensor for part in parts for name, tensor in part.tensors(anchor, start, stop).items()}
