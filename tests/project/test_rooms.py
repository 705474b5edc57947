"""Rooms import in one direction, late imports too, every file says its job, and devices need no torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest


ROOMS = {  # from the ground up: a room, and what lies in it; a file imports from its own room and those before it
    "ground": [
        "caching",
        "distributed",
        "errors",
        "files",
        "hashing",
        "limits",
        "progress",
        "public_names",
        "sources",
        "verbosity",
    ],
    "routes": ["blocks", "cascade", "confidences", "device_table", "families", "fronts", "profile", "route", "tables"],
    "runtime": [
        *("controller", "drift", "exported_cascades", "exported_files", "exported_model", "golden", "measuring"),
        *("mil", "mil_operations", "pictures", "pixels", "processor", "resident", "runners", "sustained", "targets"),
        "torch_archives",
    ],
    "data": [
        *("ahead", "augment", "collected", "columns", "datasets", "folders", "labels", "pictures", "pixel_values"),
        *("prepare", "preprocessing", "shares", "targets"),
    ],
    "anchors": [
        *("anchor", "attention", "config_entry", "cut", "cut_cache", "discovery", "layouts", "loading", "runs"),
        *("segments", "tracing", "weights"),
    ],
    "stitches": ["adding", "branches", "layers", "least_squares", "norms", "precision", "pruning", "rates", "tuning"],
    "middle": ["cascading", "configuration_restnet", "prediction", "steps"],
    "profiling": [
        *("accuracy", "bounds", "cascade_rows", "cascades", "costs", "device", "device_tables", "latency", "macs"),
        *("memory", "metric", "mixin", "plots", "route_plots", "timing"),
    ],
    "selection": [
        *("cache", "cka", "dropping", "mixin", "pairs", "plots", "racing", "ranking", "samples", "selectors"),
    ],
    "hub": [
        *("adapter_files", "cards", "latency_tables", "loading_options", "mixin", "paging", "peft_names"),
        *("repository", "several_adapters"),
    ],
    "model": ["modeling_restnet"],
    "training": [
        *("args", "checkpoints", "feature_cache", "frozen", "heads", "learner", "loaders", "loop", "losses"),
        *("outside", "pace", "restoring", "samplers", "shared_steps", "teachers", "tracking"),
        "validation",
    ],
    "adaptation": ["adapt", "calibration", "neighbours", "scorer", "search", "surrogate"],
    "export": [
        *("coreml", "device_files", "executorch", "export", "exporter", "folding", "litert", "onnx", "openvino"),
        *("parts", "programs", "sensitivity", "torch_program", "verification"),
    ],
    "scouting": ["checks", "pairs", "passes", "results", "scout"],
    "demo": ["model", "paths"],
    "top": [
        *("caches", "comparing", "recipe_checks", "reports", "recipe", "auto_classes"),
    ],
    "app": ["build", "device_tab", "entries", "share_tab", "start", "stitch_tab", "svg", "tradeoff_tab", "try_tab"],
    "cli": [
        "__main__",
        "base",
        "cache",
        "commands",
        "device",
        "pages",
        "flags",
        "jobs",
        "options",
        "outputs",
        "share",
        "tables",
        "use",
    ],
}
FOLDERLESS = ("ground", "middle", "model", "top")  # their files lie in the package itself
PLACES = {file if room in FOLDERLESS else f"{room}.{file}": room for room, files in ROOMS.items() for file in files}
HEIGHT = {room: height for height, room in enumerate(ROOMS)}
WITHOUT_TORCH = [
    *("caches", "caching", "errors", "files", "limits"),
    *(name for name, room in PLACES.items() if room in ("routes", "runtime")),
    *("hub.cards", "hub.latency_tables", "hub.repository"),
]


def path_of(package, name):
    return package / f"{name.replace('.', '/')}.py"


def imports_of(path):
    """Modules of ours that a file imports, anywhere in it; and names that it takes from a room's ``__init__``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "restnet_hf":
            module = node.module.removeprefix("restnet_hf").lstrip(".")
            below = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
            found |= below & {*PLACES} or {module}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("restnet_hf.") for a in node.names if a.name.startswith("restnet_hf.")}
    return found


def test_every_file_is_in_a_room(package):
    files = {".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    files -= {"demo.adapter.modeling_restnet"}  # a file of the embedded adapter
    assert {name for name in files if not name.endswith("__init__")} == {*PLACES}


@pytest.mark.parametrize("name", PLACES)
def test_imports_only_from_rooms_above(package, name):
    for other in imports_of(path_of(package, name)):
        # a KeyError here is an import from the __init__ of a room
        assert HEIGHT[PLACES[other]] <= HEIGHT[PLACES[name]], f"{name} imports {other}"


def test_no_file_imports_itself_by_way_of_others(package):
    graph = {name: imports_of(path_of(package, name)) for name in PLACES}
    assert len([*TopologicalSorter(graph).static_order()]) == len(PLACES)


@pytest.mark.parametrize("name", PLACES)
def test_says_its_job(package, name):
    assert ast.get_docstring(ast.parse(path_of(package, name).read_text()))


def test_the_one_class_fits_in_a_file(package):
    assert path_of(package, "modeling_restnet").read_text().count("\n") <= 700


@pytest.mark.parametrize(
    ("absent", "modules"),
    [
        (["torch", "transformers"], WITHOUT_TORCH),
        (["torch", "transformers", "numpy", "PIL", "huggingface_hub"], ["routes.profile", "runtime.controller"]),
    ],
)
def test_a_device_needs_little(absent, modules):
    code = (
        "import importlib, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name.split('.')[0] in {absent}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import restnet_hf\n"
        f"for name in {modules}: importlib.import_module('restnet_hf.' + name)\n"
        "assert str(restnet_hf.Route.parse('a[:2] + b[1:]')) == 'a[:2] + b[1:]'\n"
        "assert restnet_hf.Profile(()).best and 'torch' not in sys.modules\n"
        "assert hasattr(restnet_hf, 'train')\n"
        "from restnet_hf import *\n"
        "load = lambda: StitchedModelForImageClassification.from_pretrained\n"
        "for use in (lambda: train(), load, lambda: isinstance(1, Anchor)):\n"
        "    try:\n"
        "        use()\n"
        "    except ImportError as error:\n"
        "        assert 'restnet_hf.' in str(error) and ' needs torch, which is not installed' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError\n"
        "try:\n"
        "    class Mine(Anchor): pass\n"
        "except ModuleNotFoundError:\n"
        "    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
