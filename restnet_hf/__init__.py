"""restnet_hf: one network out of two pre-trained image classifiers, cut to the size of any device."""

from typing import TYPE_CHECKING

from restnet_hf.auto_classes import register_pending, register_when_imported
from restnet_hf.public_names import lazy_imports
from restnet_hf.verbosity import set_verbosity


if TYPE_CHECKING:
    from restnet_hf.adaptation.adapt import adapt
    from restnet_hf.anchors.anchor import Anchor
    from restnet_hf.anchors.loading import load_anchor
    from restnet_hf.anchors.weights import WeightsError
    from restnet_hf.configuration_restnet import RestNetConfig
    from restnet_hf.data.datasets import load_images
    from restnet_hf.data.pixel_values import with_pixel_values
    from restnet_hf.data.preprocessing import Preprocessing
    from restnet_hf.errors import BudgetError, PictureError
    from restnet_hf.export.export import export_routes
    from restnet_hf.export.exporter import UnsupportedExportError
    from restnet_hf.export.verification import DisagreementError
    from restnet_hf.hub.latency_tables import push_latency
    from restnet_hf.hub.repository import FoundAdapter, find_adapters
    from restnet_hf.modeling_restnet import StitchedModelForImageClassification
    from restnet_hf.routes.cascade import Cascade
    from restnet_hf.routes.device_table import DeviceTable
    from restnet_hf.routes.profile import Budget, Profile, ProfiledCascade, ProfiledRoute
    from restnet_hf.routes.route import Route, Segment
    from restnet_hf.runtime.controller import Controller
    from restnet_hf.runtime.exported_model import ExportedModel
    from restnet_hf.runtime.runners import MissingRuntimeError
    from restnet_hf.runtime.torch_archives import UntrustedProgramError
    from restnet_hf.scouting.results import ScoutResult
    from restnet_hf.scouting.scout import scout
    from restnet_hf.stitches.layers import StitchConfig
    from restnet_hf.training.args import TrainArgs
    from restnet_hf.training.loop import train, train_heads

MODULES = {
    "Anchor": "anchors.anchor",
    "Budget": "routes.profile",
    "BudgetError": "errors",
    "Cascade": "routes.cascade",
    "Controller": "runtime.controller",
    "DeviceTable": "routes.device_table",
    "DisagreementError": "export.verification",
    "ExportedModel": "runtime.exported_model",
    "FoundAdapter": "hub.repository",
    "MissingRuntimeError": "runtime.runners",
    "PictureError": "errors",
    "Preprocessing": "data.preprocessing",
    "Profile": "routes.profile",
    "ProfiledCascade": "routes.profile",
    "ProfiledRoute": "routes.profile",
    "RestNetConfig": "configuration_restnet",
    "Route": "routes.route",
    "ScoutResult": "scouting.results",
    "Segment": "routes.route",
    "StitchConfig": "stitches.layers",
    "StitchedModelForImageClassification": "modeling_restnet",
    "TrainArgs": "training.args",
    "UnsupportedExportError": "export.exporter",
    "UntrustedProgramError": "runtime.torch_archives",
    "WeightsError": "anchors.weights",
    "adapt": "adaptation.adapt",
    "export_routes": "export.export",
    "find_adapters": "hub.repository",
    "load_anchor": "anchors.loading",
    "load_images": "data.datasets",
    "push_latency": "hub.latency_tables",
    "scout": "scouting.scout",
    "train": "training.loop",
    "train_heads": "training.loop",
    "with_pixel_values": "data.pixel_values",
}
ROOMS = ("data", "demo", "export", "runtime")
__getattr__, __dir__, __all__ = lazy_imports(__name__, MODULES, ROOMS, register_pending)

set_verbosity()
register_when_imported()
