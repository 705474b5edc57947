"""Run part of a network through its own forward: what lies before is bypassed, what lies after does not run."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from restnet_hf.anchors.cut import Cut, OutputSpec, logits_of


class _Flow:
    """What the replaced forwards of one run share: the input they take their batch from, and the tensors kept."""

    def __init__(self, given: Tensor | None = None) -> None:
        self.given = given
        self.kept: dict[int, Tensor] = {}


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _lock(model: nn.Module) -> Any:
    """One lock for each network: while a segment runs, its modules have other forwards, in every thread."""
    return _LOCKS.setdefault(model, threading.RLock())


class _Placeholder:
    """Forward of a module that lies outside the segment."""

    def __init__(self, flow: _Flow, spec: OutputSpec) -> None:
        self.flow, self.spec = flow, spec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.flow.given is not None
        return self.spec.fill(self.flow.given)


class _Entry:
    """Forward of a block at whose output the segment starts."""

    def __init__(self, flow: _Flow, cut: Cut, path: str) -> None:
        self.flow, self.cut, self.path = flow, cut, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.flow.given is not None
        return self.cut.write(self.path, self.flow.given)


class _Exit:
    """Forward of a block after which a baked segment stops: keeps its tensors and lets the network go on."""

    def __init__(self, flow: _Flow, cut: Cut, path: str, forward: Callable[..., Any]) -> None:
        self.flow, self.cut, self.path, self.forward = flow, cut, path, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        self.flow.kept.update(self.cut.read(self.path, output))
        return output


class _Features:
    """Forward of a classifier that a new head takes the place of: passes on the features."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Reached(BaseException):
    """Raised by the hook at the last cut wanted; no network catches a BaseException."""


@contextmanager
def _replaced(forwards: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Give modules another forward for one call. The objects stay, so parents can read their attributes."""
    before = []
    try:
        for module, forward in forwards:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def _swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give modules other tensors for one call, wherever theirs are used."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            for own, leaf, value in _put(model, name, tensor):
                before.append((own, leaf, own[leaf]))
                own[leaf] = value
        yield
    finally:
        for own, leaf, value in reversed(before):
            own[leaf] = value


def _put(model: nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where in a module's attributes a tensor goes, and what must change with its size."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    depthwise = isinstance(module, nn.Conv2d) and leaf == "weight" and 1 < module.groups == len(module.weight)
    yield module._parameters if leaf in module._parameters else module._buffers, leaf, tensor
    if depthwise and module.groups != len(tensor):
        yield module.__dict__, "groups", len(tensor)  # a depthwise convolution of fewer channels


def replace_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give modules copies of other tensors for good."""
    for name, tensor in tensors.items():
        for own, leaf, value in _put(model, name, tensor.detach().clone()):
            own[leaf] = nn.Parameter(value, requires_grad=False) if isinstance(own[leaf], nn.Parameter) else value


@contextmanager
def _kept(
    model: nn.Module, wanted: Mapping[int, Cut], go_on: bool, see: Callable[[int, Tensor], Any] | None
) -> Iterator[dict[int, Any]]:
    """Collect the activations at cuts, or what ``see`` makes of them, for one call.

    The call ends with the last of the cuts unless it is to go on.
    """
    kept: dict[int, Any] = {}

    def keep(key: int, path: str, tensors: dict[int, Tensor], module: nn.Module, args: Any, output: Any) -> None:
        cut = wanted[key]
        tensors |= cut.read(path, output, copy=see is None or len(cut.tensors) > 1)
        if len(tensors) == len(cut.tensors):
            kept[key] = cut.pack(tensors) if see is None else see(key, cut.pack(tensors))
            tensors.clear()  # nothing of it is held here
        if not go_on and len(kept) == len(wanted):
            raise _Reached

    handles = []
    for key, cut in wanted.items():
        tensors: dict[int, Tensor] = {}
        for path in cut.paths:
            hook = partial(keep, key, path, tensors)
            handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _entering(flow: _Flow, start: Cut | None, classifier: str | None) -> list[tuple[str, Any]]:
    """What to replace for a run that enters at ``start`` and, with ``classifier``, ends in features."""
    forwards: list[tuple[str, Any]] = [(classifier, _Features())] if classifier else []
    if start is not None:
        forwards += [(path, _Placeholder(flow, spec)) for path, spec in start.before if path not in start.paths]
        forwards += [(path, _Entry(flow, start, path)) for path in start.paths]
    return forwards


def _image(x: Tensor, start: Cut | None, image_size: tuple[int, int]) -> Tensor:
    return x if start is None else torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape[0], 3, *image_size)


def run(
    model: nn.Module,
    x: Tensor,
    start: Cut | None,
    stops: Mapping[int, Cut | None],
    image_size: tuple[int, int],
    classifier: str | None = None,
    see: Callable[[int, Tensor], Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[int, Any]:
    """Run ``model`` from ``start`` and return its activation at each of ``stops``, in one forward.

    Args:
        model: the network.
        x: images (N, 3, H, W), or the activation at ``start``.
        start: where ``x`` belongs; None for images.
        stops: cuts to read, under any key; None stands for the logits. Nothing runs past the last of them.
        image_size: of the images the network is used with.
        classifier: path of the last layer, to be left out: the logits are then the features before it.
        see: is called with each key and activation as it comes; what it returns is returned instead of the activation,
            which is then not kept.
        tensors: in the place of the network's own parameters and buffers, by name.
    """
    wanted = {key: cut for key, cut in stops.items() if cut is not None}
    entering = _entering(_Flow(x), start, classifier)
    with (
        _lock(model),
        _kept(model, wanted, go_on=len(wanted) < len(stops), see=see) as kept,
        _replaced((model.get_submodule(path), forward) for path, forward in entering),
        _swapped(model, tensors or {}),
    ):
        try:
            output = model(_image(x, start, image_size))
        except _Reached:
            return kept
    missing = [cut.name for key, cut in wanted.items() if key not in kept]
    if missing:
        raise RuntimeError(f"{type(model).__name__} did not run {missing} on this input; cuts must be found again")
    return kept | {key: logits_of(output) for key, cut in stops.items() if cut is None}


def outside(start: Cut | None, stop: Cut | None, classifier: str | None) -> tuple[str, ...]:
    """Paths of the modules that a segment does not run."""
    paths = [] if start is None else [*(path for path, _ in start.before), *start.paths]
    if stop is not None:
        paths += [path for path, _ in stop.after]
    elif classifier:
        paths.append(classifier)
    return tuple(paths)


def own_modules(model: nn.Module, paths: Iterable[str]) -> dict[nn.Module, str]:
    """The modules of ``model`` that can be reached other than through ``paths``, with their names.

    A module that blocks share stays as long as one of them does.
    """
    dropped, found = set(paths), dict[nn.Module, str]()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if name not in dropped:
            found.setdefault(module, name)
            children = [(f"{name}.{key}" if name else key, child) for key, child in module._modules.items()]
            pending += [(key, child) for key, child in reversed(children) if child is not None]
    return found


def own_parameters(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of those modules, each once."""
    found: dict[nn.Parameter, str] = {}
    for module, name in own_modules(model, paths).items():
        for key, parameter in module.named_parameters(recurse=False):
            found.setdefault(parameter, f"{name}.{key}" if name else key)
    return {name: parameter for parameter, name in found.items()}


def own_tensors(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """The parameters and saved buffers of those modules."""
    found: dict[str, Tensor] = {}
    for module, name in own_modules(model, paths).items():
        unsaved = module._non_persistent_buffers_set
        buffers = ((key, b) for key, b in module.named_buffers(recurse=False) if key not in unsaved)
        for key, tensor in (*module.named_parameters(recurse=False), *buffers):
            found[f"{name}.{key}" if name else key] = tensor
    return found


class BakedSegment(nn.Module):
    """A segment as a plain module with only its own weights: no hooks, no exceptions; compiles and exports.

    ``forward`` takes what `run` takes and returns the activation at ``stop``, or the logits. One call at a time: give
    each thread a copy of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Cut | None,
        stop: Cut | None,
        image_size: tuple[int, int],
        classifier: str | None = None,
    ) -> None:
        super().__init__()
        dropped = outside(start, stop, classifier)
        kept = {id(parameter) for parameter in own_parameters(model, dropped).values()}
        empty: dict[int, Any] = {
            id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters() if id(p) not in kept
        }
        self.model = copy.deepcopy(model, empty)  # weights that are left out are never copied
        self.start, self.stop, self.image_size = start, stop, image_size
        self.flow = _Flow()
        forwards = dict(_entering(self.flow, start, classifier if stop is None else None))
        if stop is not None:
            forwards |= {path: _Placeholder(self.flow, spec) for path, spec in stop.after}
            for path in stop.paths:
                module = self.model.get_submodule(path)
                inner = forwards.get(path) or partial(type(module).forward, module)
                forwards[path] = _Exit(self.flow, stop, path, inner)
        for path, forward in forwards.items():
            self.model.get_submodule(path).forward = forward
        own = own_modules(self.model, dropped)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if module not in own:
                    setattr(module, name, buffer.new_empty(0))

    def forward(self, x: Tensor) -> Tensor:
        self.flow.given = x
        output = self.model(_image(x, self.start, self.image_size))
        result = logits_of(output) if self.stop is None else self.stop.pack(self.flow.kept)
        self.flow.given, self.flow.kept = None, {}
        return result
