"""A page in the browser on which a model's budgets, routes and trade-offs can be tried; needs gradio."""

from typing import TYPE_CHECKING

from restnet_hf.public_names import lazy_imports


if TYPE_CHECKING:
    from restnet_hf.app.build import build, launch_options

MODULES = {"build": "app.build", "launch_options": "app.build"}
__getattr__, __dir__, __all__ = lazy_imports(__name__, MODULES)
