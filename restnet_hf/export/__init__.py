"""Export of routes to the runtimes of devices."""

from typing import TYPE_CHECKING

from restnet_hf.public_names import lazy_imports


if TYPE_CHECKING:
    from restnet_hf.export.export import export_routes
    from restnet_hf.export.exporter import Exporter, Quantization, UnsupportedExportError
    from restnet_hf.export.verification import DisagreementError

MODULES = {
    "DisagreementError": "export.verification",
    "Exporter": "export.exporter",
    "Quantization": "export.exporter",
    "UnsupportedExportError": "export.exporter",
    "export_routes": "export.export",
}
__getattr__, __dir__, __all__ = lazy_imports(__name__, MODULES)
