"""What a run changes in a network: other forwards, other tensors and hooks, which only its own thread sees."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn


_CHANGING = threading.Lock()  # held while modules change, never while they compute


class Run:
    """One forward of a network in one thread.

    Args:
        forwards: forwards to use in place of the modules' own.
        tensors: tensors to use in place of the modules' own, by module and name.
    """

    def __init__(
        self,
        forwards: Mapping[nn.Module, Callable[..., Any]] = MappingProxyType({}),
        tensors: Mapping[tuple[nn.Module, str], Tensor] = MappingProxyType({}),
    ) -> None:
        self.forwards, self.tensors = forwards, tensors


class _Stack(threading.local):
    """The runs of a thread, the innermost last."""

    def __init__(self) -> None:
        self.runs: list[Run] = []


_STACK = _Stack()


def _current() -> Run | None:
    return _STACK.runs[-1] if _STACK.runs else None


class _Hook:
    """A forward hook that is called in the thread of its run only."""

    def __init__(self, run: Run, hook: Callable[..., Any]) -> None:
        self.run, self.hook = run, hook

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.hook(module, args, output) if _current() is self.run else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return self  # `copy_module` removes it


class _Forward:
    """Forward of a module while any thread replaces it: that of the calling thread's run, else the module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.users = module, 0
        self.before = module.__dict__.get("forward")
        self.__wrapped__ = self.before or type(module).forward.__get__(module)  # for those who read its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _current()
        forward = None if run is None else run.forwards.get(self.module)
        return (forward or self.__wrapped__)(*args, **kwargs)


class _Tensors(dict[str, Any]):
    """Parameters or buffers of a module while any thread replaces one: reading gives that of the calling thread's run.

    Whatever is written goes to the module's own dict, too.
    """

    def __init__(self, module: nn.Module, own: dict[str, Any]) -> None:
        super().__init__(own)
        self.module, self.own, self.users = module, own, 0

    def __getitem__(self, name: str) -> Any:
        run = _current()
        tensor = None if run is None else run.tensors.get((self.module, name))
        return super().__getitem__(name) if tensor is None else tensor

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.own[name] = value

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.own[name]


def _replace_forward(module: nn.Module) -> None:
    forward = module.__dict__.get("forward")
    if not isinstance(forward, _Forward):
        forward = module.__dict__["forward"] = _Forward(module)
    forward.users += 1


def _restore_forward(module: nn.Module) -> None:
    forward = module.__dict__.get("forward")
    if isinstance(forward, _Forward):
        forward.users -= 1
        if not forward.users:
            _put_back(module, forward)


def _put_back(module: nn.Module, forward: _Forward) -> None:
    if forward.before is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward.before


def _kind(module: nn.Module, name: str) -> str:
    return "_parameters" if name in module.__dict__["_parameters"] else "_buffers"


def _replace_tensors(module: nn.Module, kind: str) -> None:
    tensors = module.__dict__[kind]
    if not isinstance(tensors, _Tensors):
        tensors = module.__dict__[kind] = _Tensors(module, tensors)
    tensors.users += 1


def _restore_tensors(module: nn.Module, kind: str) -> None:
    tensors = module.__dict__[kind]
    if isinstance(tensors, _Tensors):
        tensors.users -= 1
        if not tensors.users:
            module.__dict__[kind] = tensors.own


@contextmanager
def running(run: Run, hooks: Iterable[tuple[nn.Module, Callable[..., Any]]] = ()) -> Iterator[None]:
    """Make a run that of this thread during the block. Other threads run the same modules meanwhile.

    The modules stay, so that parents can read their attributes; what other threads see of them does not change.

    Args:
        run: tensors that replace the modules' own in this thread.
        hooks: forward hooks, each called with a module, its arguments and its output.
    """
    kinds = [(module, _kind(module, name)) for module, name in run.tensors]
    with _CHANGING:
        handles = [module.register_forward_hook(_Hook(run, hook)) for module, hook in hooks]
        for module in run.forwards:
            _replace_forward(module)
        for module, kind in kinds:
            _replace_tensors(module, kind)
    _STACK.runs.append(run)
    try:
        yield
    finally:
        _STACK.runs.remove(run)
        with _CHANGING:
            for module, kind in kinds:
                _restore_tensors(module, kind)
            for module in run.forwards:
                _restore_forward(module)
            for handle in handles:
                handle.remove()


def copy_module(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a network as it is without the runs of other threads.

    Args:
        model: network whose modules are copied.
        memo: objects to use in place of copies, by id, as in `copy.deepcopy`.
    """
    with _CHANGING:
        copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if isinstance(forward := module.__dict__.get("forward"), _Forward):
            _put_back(module, forward)
        for kind in ("_parameters", "_buffers"):
            if isinstance(tensors := module.__dict__[kind], _Tensors):
                module.__dict__[kind] = tensors.own
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Hook)]:
            del module._forward_hooks[key]
    return copied
