"""TUNINGS: what routes put in the place of an anchor's own weights while they run; the anchor itself never changes."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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


class _Moments:
    """Mean and variance of each channel over all that was seen, in float64."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def see(self, x: Tensor) -> None:
        """Add a batch (N, C, ...)."""
        rows = x.double().transpose(0, 1).flatten(1)
        self.count += rows.shape[1]
        self.sums, self.squares = self.sums + rows.sum(1), self.squares + rows.square().sum(1)

    @property
    def mean(self) -> Tensor:
        return self.sums / self.count

    @property
    def var(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp_min(0)


@contextmanager
def _watched(norms: Mapping[str, _BatchNorm], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the name and the input of each norm, before it runs."""
    handles = [
        norm.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
        for name, norm in norms.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def recalibrate(
    tuned: Tuned, anchor: Anchor, activations: Iterable[tuple[Callable[[], Tensor], Callable[[], Tensor]]]
) -> bool:
    """Set the BatchNorm statistics of a tuned segment so that each norm gives a route what it gives the anchor itself.

    What a norm puts out for the route's images gets the mean and the variance of what it puts out for the anchor's own
    activations of the same images; taking the route's plain statistics would undo what the data's own differ from
    those of training, to which the head is used. One norm after the other, as the images come.

    Args:
        tuned: of the end of a route.
        anchor: whose segment it is.
        activations: for each batch, functions that give the activation at the segment's start: the anchor's own, and
            what the stitch gives in its place.

    Returns:
        Whether there was any BatchNorm.
    """
    start = tuned.config.start
    tensors = tuned.tensors(anchor, start)
    paths = [name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")]
    found = {path: anchor.model.get_submodule(path) for path in paths}
    norms = {path: norm for path, norm in found.items() if isinstance(norm, _BatchNorm)}
    if not norms:
        return False
    kept = {
        path: (tensors[f"{path}.running_mean"].double(), tensors[f"{path}.running_var"].double() + norm.eps)
        for path, norm in norms.items()
    }
    own, mine = ({path: _Moments() for path in norms} for _ in range(2))

    def correct(path: str, x: Tensor) -> None:
        mine[path].see(x)
        (mean, var), a, b, eps = kept[path], own[path], mine[path], norms[path].eps
        scale = (b.var + eps) / (a.var + eps)
        tensors[f"{path}.running_var"].copy_((var * scale - eps).clamp_min(0))
        tensors[f"{path}.running_mean"].copy_(b.mean - scale.sqrt() * (a.mean - mean))

    for theirs, stitched in activations:
        with _watched(norms, lambda path, x: own[path].see(x)):
            anchor(theirs(), start)
        with _watched(norms, correct):
            anchor(stitched(), start, None, lambda *span: tensors)
    return True


def tuned_tensors(parts: Iterable[Tuned], anchor: Anchor, start: int, stop: int | None) -> Mapping[str, Tensor]:
    """All that a route replaces in a segment; of the same tensor the last one counts."""
    return {name: tensor for part in parts for name, tensor in part.tensors(anchor, start, stop).items()}
