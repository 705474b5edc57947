"""What a device needs to run exported routes and to follow a budget. No torch."""

from typing import TYPE_CHECKING

from restnet_hf.public_names import lazy_imports


if TYPE_CHECKING:
    from restnet_hf.runtime.controller import Controller, Decision
    from restnet_hf.runtime.exported_model import ExportedModel
    from restnet_hf.runtime.runners import RUNTIMES, MissingRuntimeError, Runtime
    from restnet_hf.runtime.torch_archives import UntrustedProgramError

MODULES = {
    "Controller": "runtime.controller",
    "Decision": "runtime.controller",
    "ExportedModel": "runtime.exported_model",
    "MissingRuntimeError": "runtime.runners",
    "RUNTIMES": "runtime.runners",
    "Runtime": "runtime.runners",
    "UntrustedProgramError": "runtime.torch_archives",
}
__getattr__, __dir__, __all__ = lazy_imports(__name__, MODULES)
