"""Register our classes with the Auto classes of transformers once both packages are imported, in either order."""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


logger = logging.getLogger(__name__)
REGISTERING = {  # modules of transformers that hold an Auto class, and ours that register with it
    "transformers.models.auto.configuration_auto": "restnet_hf.configuration_restnet",
    "transformers.models.auto.modeling_auto": "restnet_hf.modeling_restnet",
}


_PENDING: set[str] = set()  # our modules to import once those that are being imported are complete


def _register(module: str) -> None:
    """Import one of our modules, which registers itself."""
    try:
        import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == __package__:  # one of ours, which imports transformers just now
            _PENDING.add(module)
        else:  # transformers works all the same
            logger.warning("the Auto classes of transformers do not know restnet_hf: %s", error)


def register_pending() -> None:
    """Register the classes that could not be imported while other modules of ours were."""
    for module in [*_PENDING]:
        _PENDING.discard(module)
        _register(module)


class _RegisteringLoader(Loader):
    """A loader that imports one of our modules after the one that it loads."""

    def __init__(self, loader: Loader, module: str) -> None:
        self._loader, self._module = loader, module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module before it is executed; None to let Python create it."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then import ours, which registers itself."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(self._module)


class _Finder(MetaPathFinder):
    """Finds modules of Auto classes with a loader that then registers ours; removes itself after the last one.

    Args:
        waiting: names of modules of transformers that are not imported yet.
    """

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an Auto class's module, with a loader that registers ours; None for any other module."""
        if fullname not in self._waiting:
            return None
        self._waiting.remove(fullname)
        if not self._waiting:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, REGISTERING[fullname])
        return spec


def _has_torch() -> bool:
    try:
        return find_spec("torch") is not None
    except ModuleNotFoundError:
        return False


def register_when_imported() -> None:
    """Register our classes with the Auto classes that are imported already, and with the others on their import.

    Importing them here would import torch and take seconds, and reading a profile must do neither. Without torch there
    is no model to register.
    """
    if not _has_torch():
        return
    for auto_module in REGISTERING.keys() & sys.modules.keys():
        import_module(REGISTERING[auto_module])
    waiting = REGISTERING.keys() - sys.modules.keys()
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))
