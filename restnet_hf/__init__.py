"""restnet_hf: one network out of two pre-trained image classifiers, cut to the size of any device."""

from restnet_hf.controller import Controller
from restnet_hf.profiles import Budget, BudgetError, Profile
from restnet_hf.routes import Route, Segment


__all__ = ["Budget", "BudgetError", "Controller", "Profile", "Route", "Segment"]

try:
    import numpy  # noqa: F401
    import PIL  # noqa: F401
except ImportError:
    pass  # a device that only follows budgets
else:
    from restnet_hf.exported import ExportedModel

    __all__ += ["ExportedModel"]

try:
    import torch  # noqa: F401
except ImportError:
    pass  # a device that only reads profiles and follows budgets
else:
    from restnet_hf.adapting import adapt
    from restnet_hf.anchors import Anchor
    from restnet_hf.configuration_restnet import RestNetConfig
    from restnet_hf.exporting import export_routes
    from restnet_hf.hub import FoundAdapter, find_adapters
    from restnet_hf.loading import load_anchor
    from restnet_hf.modeling_restnet import StitchedModelForImageClassification
    from restnet_hf.preprocessing import Preprocessing
    from restnet_hf.stitches import StitchConfig
    from restnet_hf.training import TrainArgs, train

    __all__ += [
        "Anchor",
        "FoundAdapter",
        "Preprocessing",
        "RestNetConfig",
        "StitchConfig",
        "StitchedModelForImageClassification",
        "TrainArgs",
        "adapt",
        "export_routes",
        "find_adapters",
        "load_anchor",
        "train",
    ]
