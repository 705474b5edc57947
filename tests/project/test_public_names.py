"""The public names are exactly these, and the Auto classes know ours in any order of imports."""

import ast
import importlib
import subprocess
import sys

import pytest
from fork_server import ForkServers

import restnet_hf


NAMES = {
    *(
        "Anchor",
        "Budget",
        "BudgetError",
        "Cascade",
        "Controller",
        "DisagreementError",
        "ExportedModel",
        "FoundAdapter",
    ),
    *(
        "MissingRuntimeError",
        "PictureError",
        "Preprocessing",
        "Profile",
        "ProfiledCascade",
        "ProfiledRoute",
        "RestNetConfig",
        "Route",
        "ScoutResult",
        "Segment",
    ),
    *("StitchConfig", "StitchedModelForImageClassification", "TrainArgs", "UnsupportedExportError"),
    *("UntrustedProgramError", "WeightsError", "adapt", "export_routes", "find_adapters", "load_anchor"),
    *("DeviceTable", "load_images", "push_latency", "scout", "train", "train_heads", "with_pixel_values"),
}


def test_the_public_names_are_these():
    assert {*restnet_hf.__all__} == NAMES
    assert {*dir(restnet_hf)} >= NAMES
    for name in NAMES:
        assert getattr(restnet_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Stitch'"):
        restnet_hf.Stitch  # noqa: B018


@pytest.mark.parametrize("room", ["", "data", "export", "runtime"])
def test_type_checkers_see_the_same_names(package, room):
    """The imports for type checkers and the table of modules are the same, and each name is there."""
    tree = ast.parse((package / room / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    module = importlib.import_module(f"restnet_hf.{room}".rstrip("."))
    assert seen == {name: f"restnet_hf.{where}" for name, where in module.MODULES.items()}
    assert all(hasattr(module, name) for name in module.__all__) and {*dir(module)} >= {*module.__all__}


def test_every_error_of_ours_is_public(package):
    errors = {
        node.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        if any(getattr(base, "id", "").endswith(("Error", "Exception")) for base in node.bases)
    }
    assert errors <= NAMES
    assert all(name.endswith("Error") for name in errors)


@pytest.fixture(scope="module")
def interpreters():
    """Processes that have imported torch, and neither transformers nor our package."""
    servers = ForkServers("import torch, torchvision, datasets, timm")
    yield servers
    servers.close()


@pytest.mark.parametrize(
    "first",
    [
        "import restnet_hf",
        pytest.param("import restnet_hf, transformers.image_processing_utils", marks=pytest.mark.slow),
        pytest.param(
            "from restnet_hf import Profile\nfrom transformers import ViTForImageClassification, pipeline",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "from transformers import AutoConfig, AutoModelForImageClassification\nimport restnet_hf",
            marks=pytest.mark.slow,
        ),
        pytest.param("from transformers import AutoConfig\nimport restnet_hf", marks=pytest.mark.slow),
        pytest.param("from restnet_hf import load_anchor", marks=pytest.mark.slow),
        pytest.param("import restnet_hf.comparing", marks=pytest.mark.slow),
        pytest.param("import restnet_hf.cli", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_know_ours(interpreters, first):
    code = (
        f"{first}\n"
        "from transformers import AutoConfig, AutoModelForImageClassification\n"
        "config = AutoConfig.for_model('restnet')\n"
        "print(type(AutoModelForImageClassification.from_config(config)).__name__)\n"
    )
    done = interpreters.run(code)
    assert done.stdout == "StitchedModelForImageClassification\n", done.stderr
    assert "do not know" not in done.stderr


def test_importing_brings_nothing_heavy():
    code = (
        "import sys, restnet_hf\n"
        "restnet_hf.Profile, restnet_hf.Budget, restnet_hf.Route\n"
        "assert not {'torch', 'transformers', 'timm', 'datasets', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rooms_with_public_names_are_attributes(interpreters):
    done = interpreters.run("import restnet_hf\nprint(restnet_hf.data.load_images, restnet_hf.runtime.Controller)")
    assert not done.returncode and done.stdout, done.stderr


@pytest.mark.parametrize("order", ["import restnet_hf, transformers", "import transformers, restnet_hf"])
def test_transformers_works_without_torch(order):
    """A device may have transformers for its image processors alone."""
    code = (
        "from importlib.machinery import PathFinder\n"
        "real = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name.split('.')[0] == 'torch' else real(name, *rest)\n"
        f"{order}\n"
        "from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('vit').model_type, restnet_hf.Route.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "vit Route\n", done.stderr
