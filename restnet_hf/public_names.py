"""Public names of a package, each imported when it is first used (PEP 562)."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def imported_when_used(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Most of our modules need torch, and a device that follows budgets has none.

    Args:
        package: name of the package.
        modules: module of each public name, below ``restnet_hf``.
    """
    namespace = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        namespace[name] = value = getattr(import_module(f"restnet_hf.{modules[name]}"), name)
        return value

    return get, lambda: sorted({*namespace, *modules}), list(modules)
