"""Public names of a package, each imported on first use (PEP 562)."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any, NoReturn


class Unavailable:
    """A public name whose module needs a package that is not installed; any use of it raises ImportError.

    As with the dummy objects of transformers, ``hasattr`` and ``from restnet_hf import *`` work on a device.

    Args:
        name: full name, for the error.
        cause: error of the import.
    """

    def __init__(self, name: str, cause: ModuleNotFoundError) -> None:
        self._name, self._cause = name, cause

    def _raise(self) -> NoReturn:
        package = (self._cause.name or str(self._cause)).partition(".")[0]
        raise ModuleNotFoundError(
            f"{self._name} needs {package}, which is not installed; pip install restnet-hf brings it", name=package
        ) from self._cause

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ModuleNotFoundError, which names the package to install."""
        self._raise()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what tools ask of any object
            raise AttributeError(name)
        self._raise()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> NoReturn:
        self._raise()

    def __instancecheck__(self, instance: Any) -> NoReturn:
        self._raise()

    def __repr__(self) -> str:
        return f"<{self._name}, which needs {(self._cause.name or str(self._cause)).partition('.')[0]}>"


def lazy_imports(
    package: str, modules: Mapping[str, str], rooms: Collection[str] = (), imported: Callable[[], None] = lambda: None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` of a package that imports its public names on first use.

    Most modules need torch, which is not installed on a device that only follows budgets: there the names are
    `Unavailable`.

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
        try:
            value = getattr(import_module(f"restnet_hf.{modules[name]}"), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "restnet_hf":
                raise
            return Unavailable(f"{package}.{name}", error)  # not kept, as the package may be installed meanwhile
        namespace[name] = value
        imported()
        return value

    return import_name, lambda: sorted({*namespace, *modules}), list(modules)
