"""Public names of a package, each imported on first use (PEP 562)."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy_imports(
    package: str, modules: Mapping[str, str], rooms: Collection[str] = (), imported: Callable[[], None] = lambda: None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` of a package that imports its public names on first use.

    Most modules need torch, which is not installed on a device that only follows budgets.

    Args:
        package: name of the package.
        modules: module of each public name, relative to ``restnet_hf``.
        rooms: packages inside it that are attributes too, without an import of their own.
        imported: function called after each import.
    """
    namespace = vars(sys.modules[package])

    def import_name(name: str) -> Any:
        if name in rooms:
            return import_module(f"{package}.{name}")
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        namespace[name] = value = getattr(import_module(f"restnet_hf.{modules[name]}"), name)
        imported()
        return value

    return import_name, lambda: sorted({*namespace, *modules}), list(modules)
