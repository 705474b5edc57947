"""The embedded demo: two trained anchors, the stitches between them, real images and a recipe."""

from typing import TYPE_CHECKING

from restnet_hf.public_names import lazy_imports


if TYPE_CHECKING:
    from restnet_hf.demo.model import load_demo
    from restnet_hf.demo.paths import ADAPTER, DATA, DEMO, END, FRONT, RECIPE

MODULES = {
    **dict.fromkeys(("ADAPTER", "DATA", "DEMO", "END", "FRONT", "RECIPE"), "demo.paths"),
    "load_demo": "demo.model",
}
__getattr__, __dir__, __all__ = lazy_imports(__name__, MODULES)
