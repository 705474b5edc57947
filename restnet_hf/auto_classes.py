"""The Auto classes of transformers know ours as soon as both packages are imported, in whichever order."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


OURS = {  # modules of transformers that hold an Auto class, and those of ours that register with it
    "transformers.models.auto.configuration_auto": "restnet_hf.configuration_restnet",
    "transformers.models.auto.modeling_auto": "restnet_hf.modeling_restnet",
}


class _Registering(Loader):
    """A loader that imports one of our modules after the one that it loads."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self._loader, self._ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(self._ours)


class _Finder(MetaPathFinder):
    """Finds the Auto classes as they are found anyway, and has ours registered after them."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in OURS or self._looking:
            return None
        self._looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, OURS[fullname])
        return spec


def register_when_imported() -> None:
    """Register our classes now with the Auto classes that are imported, and with others when they will be.

    To import them here would take torch and seconds, which reading a profile must not.
    """
    for theirs, ours in OURS.items():
        if theirs in sys.modules:
            import_module(ours)
    sys.meta_path.insert(0, _Finder())
