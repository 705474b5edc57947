"""Run a segment of a network through its own forward: modules before it are bypassed, those after it do not run."""

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restnet_hf.anchors.cut import Cut, OutputSpec, logits_of
from restnet_hf.anchors.runs import Run, copy_module, running


class _Activations:
    """The activation at which a segment starts, and the tensors at which it stops."""

    def __init__(self, source: Tensor | None = None) -> None:
        self.source = source
        self.kept: dict[int, Tensor] = {}


class _OfThread(_Activations, threading.local):
    """The same, of each thread its own."""


class _Call:
    """What the forwards of one run share."""

    def __init__(self, source: Tensor) -> None:
        self.now = _Activations(source)


class _Flow:
    """What the forwards of a baked segment share: the activations of the thread that calls them."""

    def __init__(self) -> None:
        self._traced, self._of_thread = _Activations(), _OfThread()

    @property
    def now(self) -> _Activations:
        """The activations now. A compiler traces them once, and would compile anew for each thread's own."""
        return self._traced if torch.compiler.is_compiling() else self._of_thread

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # between calls there is nothing to copy


class _Placeholder:
    """Forward of a module that lies outside the segment."""

    def __init__(self, flow: _Call | _Flow, spec: OutputSpec) -> None:
        self.flow, self.spec = flow, spec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.flow.now.source is not None
        return self.spec.fill(self.flow.now.source)


class _Entry:
    """Forward of a block at whose output the segment starts."""

    def __init__(self, flow: _Call | _Flow, cut: Cut, path: str) -> None:
        self.flow, self.cut, self.path = flow, cut, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.flow.now.source is not None
        return self.cut.write(self.path, self.flow.now.source)


class _Exit:
    """Forward of a block at which a baked segment stops: stores its tensors, and the network continues."""

    def __init__(self, flow: _Call | _Flow, cut: Cut, path: str, forward: Callable[..., Any]) -> None:
        self.flow, self.cut, self.path, self.forward = flow, cut, path, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        self.flow.now.kept.update(self.cut.read(self.path, output))
        return output


class _Features:
    """Forward of a classifier that a new head replaces: returns the features."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Reached(BaseException):
    """Raised by the hook at the last cut to read; no network catches a BaseException."""


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _has_fewer_channels(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a depthwise convolution of fewer channels."""
    if not isinstance(module, nn.Conv2d) or name != "weight":
        return False
    return 1 < module.groups == len(module.weight) and module.groups != len(tensor)


def _narrow_forward(module: nn.Module, tensors: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The forward of a depthwise convolution with other tensors, of fewer channels."""
    narrow = copy.copy(module)
    narrow.__dict__["_parameters"] = {**module._parameters, **tensors}
    narrow.__dict__["groups"] = len(tensors["weight"])  # an attribute that no run can have for itself
    return type(narrow).forward.__get__(narrow)


def replace_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace tensors of modules permanently, by copies of other tensors with their names."""
    for path, tensor in tensors.items():
        module, name = _owner(model, path)
        if _has_fewer_channels(module, name, tensor):
            module.__dict__["groups"] = len(tensor)
        own: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        value = tensor.detach().clone()
        own[name] = nn.Parameter(value, requires_grad=False) if isinstance(own[name], nn.Parameter) else value


def _run(model: nn.Module, forwards: Iterable[tuple[str, Any]], tensors: Mapping[str, Tensor]) -> Run:
    """A run with other forwards, by path, and other tensors, by name."""
    owned = {_owner(model, name): tensor for name, tensor in tensors.items()}
    replaced = {model.get_submodule(path): forward for path, forward in forwards}
    for (module, name), tensor in owned.items():
        if _has_fewer_channels(module, name, tensor):
            its = {leaf: value for (owner, leaf), value in owned.items() if owner is module}
            replaced.setdefault(module, _narrow_forward(module, its))
    return Run(replaced, owned)


class _Capture:
    """Collects the activations at cuts, or the results of ``see`` for them, and stops the forward at the last.

    Args:
        wanted: cuts to read, by any key.
        go_on: whether the forward continues after the last of the cuts.
        see: function of a key and an activation, whose result is kept instead.
    """

    def __init__(self, wanted: Mapping[int, Cut], go_on: bool, see: Callable[[int, Tensor], Any] | None) -> None:
        self.wanted, self.go_on, self.see = wanted, go_on, see
        self.kept: dict[int, Any] = {}

    def hooks(self, model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The modules to watch, each with its hook. No reference to them stays here, so activations are freed at once.

        Args:
            model: network that is run.
        """
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        for key, cut in self.wanted.items():
            tensors: dict[int, Tensor] = {}
            hooks += [(model.get_submodule(path), partial(self._keep, key, path, tensors)) for path in cut.paths]
        return hooks

    def _keep(
        self, key: int, path: str, tensors: dict[int, Tensor], module: nn.Module, args: Any, output: Any
    ) -> None:
        cut, see = self.wanted[key], self.see
        tensors |= cut.read(path, output, copy=see is None or len(cut.tensors) > 1)
        if len(tensors) == len(cut.tensors):
            self.kept[key] = cut.pack(tensors) if see is None else see(key, cut.pack(tensors))
            tensors.clear()  # frees their memory
        if not self.go_on and len(self.kept) == len(self.wanted):
            raise _Reached


def _entry_forwards(flow: _Call | _Flow, start: Cut | None, classifier: str | None) -> list[tuple[str, Any]]:
    """Paths and new forwards for a run that enters at ``start`` and, with ``classifier``, ends in features."""
    forwards: list[tuple[str, Any]] = [(classifier, _Features())] if classifier else []
    if start is not None:
        forwards += [(path, _Placeholder(flow, spec)) for path, spec in start.before if path not in start.paths]
        forwards += [(path, _Entry(flow, start, path)) for path in start.paths]
    return forwards


def _image(x: Tensor, start: Cut | None, image_size: tuple[int, int]) -> Tensor:
    return x if start is None else torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape[0], 3, *image_size)


def run_segment(
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

    Threads can run the same network at the same time.

    Args:
        model: network that the segment is a part of.
        x: images (N, 3, H, W), or the activation at ``start``.
        start: cut at which ``x`` enters; None for images.
        stops: cuts to read, by any key; None for the logits. Nothing runs past the last of them.
        image_size: height and width of the images that the network is used with.
        classifier: path of a last layer to leave out; the features before it are then returned for the logits.
        see: function called with each key and activation once it is computed. Its result is returned instead of the
            activation, which is then not kept.
        tensors: tensors to use instead of the network's own parameters and buffers, by name.
    """
    wanted = {key: cut for key, cut in stops.items() if cut is not None}
    capture = _Capture(wanted, go_on=len(wanted) < len(stops), see=see)
    kept = capture.kept
    run = _run(model, _entry_forwards(_Call(x), start, classifier), tensors or {})
    with running(run, capture.hooks(model)):
        try:
            output = model(_image(x, start, image_size))
        except _Reached:
            return kept
    missing = [cut.name for key, cut in wanted.items() if key not in kept]
    if missing:
        raise RuntimeError(f"{type(model).__name__} did not run {missing} on this input; find its cuts again")
    return kept | {key: logits_of(output) for key, cut in stops.items() if cut is None}


def unused_paths(start: Cut | None, stop: Cut | None, classifier: str | None) -> tuple[str, ...]:
    """Paths of the modules that a segment does not run.

    Args:
        start: cut at which the segment starts; None for the image.
        stop: cut at which the segment stops; None for the logits.
        classifier: path of a last layer that is left out; None where it runs.
    """
    paths = [] if start is None else [*(path for path, _ in start.before), *start.paths]
    if stop is not None:
        paths += [path for path, _ in stop.after]
    elif classifier:
        paths.append(classifier)
    return tuple(paths)


def remaining_modules(model: nn.Module, paths: Iterable[str]) -> dict[nn.Module, str]:
    """The modules of ``model`` that remain without those at ``paths``, with their names.

    A module that several blocks share remains as long as one of them does.
    """
    dropped, remaining = set(paths), dict[nn.Module, str]()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if name not in dropped:
            remaining.setdefault(module, name)
            children = [(f"{name}.{key}" if name else key, child) for key, child in module._modules.items()]
            pending += [(key, child) for key, child in reversed(children) if child is not None]
    return remaining


def remaining_parameters(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of `remaining_modules` by name, each once."""
    names: dict[nn.Parameter, str] = {}
    for module, name in remaining_modules(model, paths).items():
        for key, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, f"{name}.{key}" if name else key)
    return {name: parameter for parameter, name in names.items()}


def remaining_tensors(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """The parameters and saved buffers of `remaining_modules` by name."""
    tensors: dict[str, Tensor] = {}
    for module, name in remaining_modules(model, paths).items():
        unsaved = module._non_persistent_buffers_set
        buffers = ((key, b) for key, b in module.named_buffers(recurse=False) if key not in unsaved)
        for key, tensor in (*module.named_parameters(recurse=False), *buffers):
            tensors[f"{name}.{key}" if name else key] = tensor
    return tensors


class BakedSegment(nn.Module):
    """A segment as a plain module with only its own weights, without hooks or exceptions; compiles and exports.

    Threads can share it.

    Args:
        model: network that the segment is a part of.
        start: cut at which the segment starts; None for images.
        stop: cut at which the segment stops; None for the logits.
        image_size: height and width of the images that the network is used with.
        classifier: path of a last layer to leave out; the features before it are then returned for the logits.
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
        dropped = unused_paths(start, stop, classifier)
        kept = {id(parameter) for parameter in remaining_parameters(model, dropped).values()}
        empty: dict[int, Any] = {
            id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters() if id(p) not in kept
        }
        self.model = copy_module(model, empty)  # weights that are left out are never copied
        self.start, self.stop, self.image_size = start, stop, image_size
        self.flow = _Flow()
        forwards = dict(_entry_forwards(self.flow, start, classifier if stop is None else None))
        if stop is not None:
            forwards |= {path: _Placeholder(self.flow, spec) for path, spec in stop.after}
            for path in stop.paths:
                module = self.model.get_submodule(path)
                inner = forwards.get(path) or partial(type(module).forward, module)
                forwards[path] = _Exit(self.flow, stop, path, inner)
        for path, forward in forwards.items():
            self.model.get_submodule(path).forward = forward
        remaining = remaining_modules(self.model, dropped)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if module not in remaining:
                    setattr(module, name, buffer.new_empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """The activation at ``stop``, or the logits, for images or the activation at ``start``."""
        now = self.flow.now
        now.source = x
        output = self.model(_image(x, self.start, self.image_size))
        result = logits_of(output) if self.stop is None else self.stop.pack(now.kept)
        now.source, now.kept = None, {}
        return result
