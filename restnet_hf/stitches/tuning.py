"""TUNINGS: tensors that replace an anchor's own while a route runs; the anchor itself never changes."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.segments import remaining_modules, unused_paths
from restnet_hf.routes.route import Route, TunedKey, prefix_key
from restnet_hf.stitches.norms import is_norm
from restnet_hf.stitches.precision import trained_dtype


HEAD = "head"
MAX_RANK = 4096  # an untrusted config must not exhaust memory
WEIGHTED_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class TunedConfig:
    """Which tensors of an anchor are tuned, and how.

    Args:
        kind: kind of tuning, a key of `TUNINGS`.
        anchor: name of the anchor whose tensors are replaced.
        start: cut after which tensors are replaced; 0 for the image.
        stop: cut up to which tensors are replaced; None for the logits.
        r: rank of low-rank updates.
        lora_alpha: scale of low-rank updates, which are multiplied by ``lora_alpha / r``, as in PEFT.

    Raises:
        ValueError: the kind is unknown, or a number is out of range.
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
        if type(self.r) is not int or not 1 <= self.r <= MAX_RANK or not 0 < alpha <= sys.float_info.max:
            raise ValueError(f"r={self.r} must be from 1 to {MAX_RANK}, and lora_alpha={alpha} finite and above 0")
        if type(self.start) is not int or type(stop) is not int or min(self.start, stop) < 0:
            raise ValueError(f"start={self.start} and stop={self.stop} must be numbers of cuts, 0 or more")


class Tuned(nn.Module):
    """Tensors that replace a segment's own: copies that train, or low-rank updates; in float32 beside half precision.

    Args:
        anchor: anchor whose tensors are replaced; it is neither changed nor registered as a submodule.
        config: kind, cuts and rank of the tensors.
        shapes_only: whether only shapes are needed, so that the tensors are on the meta device.

    Raises:
        ValueError: the segment has no tensors of that kind.
    """

    def __init__(self, anchor: Anchor, config: TunedConfig, shapes_only: bool = False) -> None:
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
            if shapes_only:
                like = torch.empty_like(tensor, device="meta")
                tensor = nn.Parameter(like) if isinstance(tensor, nn.Parameter) else like
            dtype = trained_dtype(tensor.dtype)
            if config.kind == "lora":
                self.A[key] = nn.Parameter(tensor.new_empty(config.r, tensor[0].numel(), dtype=dtype))
                self.B[key] = nn.Parameter(tensor.new_zeros(len(tensor), config.r, dtype=dtype))
                nn.init.kaiming_uniform_(self.A[key], a=5**0.5)
            elif isinstance(tensor, nn.Parameter):
                self.own[key] = nn.Parameter(tensor.detach().to(dtype, copy=True))
            else:
                self.register_buffer(key, tensor.detach().to(dtype, copy=True))
        self._inside: dict[tuple[int, int | None], list[str]] = {(config.start, config.stop): names}

    def tensors(self, anchor: Anchor, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """The tensors that replace weights and buffers of a segment, by name, in the types of these.

        A low-rank update gives ``W + lora_alpha / r · B A`` (Hu et al., arXiv 2106.09685).

        Args:
            anchor: anchor of the segment, for the weights that low-rank updates add to.
            start: cut at which the segment begins.
            stop: cut at which the segment ends; None for the logits.
        """
        if (start, stop) not in self._inside:
            tuned = set(self._inside[self.config.start, self.config.stop])
            names = tunable(anchor, self.config.kind, start, stop)
            self._inside[start, stop] = [name for name in names if name in tuned]
        tensors = {}
        for name in self._inside[start, stop]:
            key, weight = name.replace(".", "/"), _tensor(anchor.model, name)
            if key in self.A:
                update = (self.B[key] @ self.A[key]).view_as(weight)
                tensor = weight + update * (self.config.lora_alpha / self.config.r)
            else:
                tensor = self.own[key] if key in self.own else getattr(self, key)
            tensors[name] = tensor.to(weight.dtype)
        return tensors

    @torch.no_grad()
    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Set copies to values that were computed in the anchor's type, such as statistics of BatchNorm.

        Args:
            tensors: tensors that `tensors` returned, some of them changed in place since.
        """
        for name, tensor in tensors.items():
            key = name.replace(".", "/")
            if key in self.A:  # an update is no copy, and nothing sets it in place
                continue
            own = self.own[key] if key in self.own else getattr(self, key)
            if own is not tensor:
                own.copy_(tensor)

    def extra_repr(self) -> str:
        """Kind and anchor, for ``repr``."""
        return f"kind={self.config.kind!r}, anchor={self.config.anchor!r}"


def tuned_on_meta(anchors: Mapping[str, Anchor], config: TunedConfig) -> Tuned:
    """Tuned tensors of one of several anchors, on the meta device."""
    return Tuned(anchors[config.anchor], config, shapes_only=True)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def tunable(anchor: Anchor, kind: str, start: int = 0, stop: int | None = None) -> list[str]:
    """Names, in the anchor's network, of the tensors of a segment that a kind replaces, each tensor once.

    Args:
        anchor: anchor of the segment.
        kind: kind of tuning, a key of `TUNINGS`.
        start: cut at which the segment begins.
        stop: cut at which the segment ends; None for the logits.
    """
    last = None if stop is None else anchor.cut(stop)
    if kind == HEAD and (stop is not None or anchor.headless):
        return []  # a new head is a module of the model
    modules = remaining_modules(anchor.model, unused_paths(anchor.cut(start), last, anchor.classifier))
    if kind == HEAD:
        modules = _head_modules(anchor)
    names, seen = [], set()
    for module, path in modules.items():
        for leaf, tensor in TUNINGS[kind](module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                names.append(f"{path}.{leaf}" if path else leaf)
    return names


def _head_modules(anchor: Anchor) -> dict[nn.Module, str]:
    """The anchor's linear classifier with its path; all modules behind the last cut where the logits are from more."""
    path = anchor.search_result.classifier
    if path is not None:
        return {anchor.model.get_submodule(path): path}
    return remaining_modules(anchor.model, unused_paths(anchor.cut(anchor.depth), None, None))


Named = Iterable[tuple[str, Tensor]]


def _norm(module: nn.Module) -> Named:
    if is_norm(module):
        yield from ((name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 1)
        yield from ((name, b) for name, b in module.named_buffers(recurse=False) if name.startswith("running_"))


def _bias(module: nn.Module) -> Named:
    if isinstance(module, WEIGHTED_LAYERS) and module.bias is not None:
        yield "bias", module.bias


def _lora(module: nn.Module) -> Named:
    if isinstance(module, WEIGHTED_LAYERS):
        yield "weight", module.weight


def _full(module: nn.Module) -> Named:
    return module.named_parameters(recurse=False)


def _head(module: nn.Module) -> Named:
    yield from (*_lora(module), *_bias(module))


# The tensors of a module that each kind replaces; ``head`` those of the classifier alone. Routes of an adapter share
# those of the first two kinds; each route has its own of the others. The head is tuned of anchors alone.
TUNINGS: dict[str, Callable[[nn.Module], Named]] = {
    "full": _full,
    "lora": _lora,
    "bias": _bias,
    "norm": _norm,
    HEAD: _head,
}
SHARED_KINDS = ("full", "lora")


def tuned_keys(route: Route) -> list[list[TunedKey]]:
    """The keys of tensors that a model may tune, for each segment of a route.

    An anchor alone has none: it always runs with its own weights. A tuned one shares what routes share with those of
    its adapter, since in SN-Net the anchors train with the stitches.
    """
    if route.is_anchor:
        return [[]]
    own = route.head if route.tuned else "+".join(point.name for point in route.stitch_points)
    keys = []
    for index, segment in enumerate(route.segments):
        shared = prefix_key(route.adapter, segment.anchor)
        last = index == len(route.segments) - 1
        keys.append(
            [
                TunedKey(kind, shared if kind in SHARED_KINDS else own)
                for kind in TUNINGS
                if (last or kind in SHARED_KINDS) and (route.tuned or kind != HEAD)
            ]
        )
    return keys


def tuned_tensors(parts: Iterable[Tuned], anchor: Anchor, start: int, stop: int | None) -> Mapping[str, Tensor]:
    """All tensors that replace a segment's own, by name; of several for one name the last counts.

    Args:
        parts: tuned tensors that the route uses.
        anchor: anchor of the segment.
        start: cut at which the segment begins.
        stop: cut at which the segment ends; None for the logits.
    """
    return {name: tensor for part in parts for name, tensor in part.tensors(anchor, start, stop).items()}
