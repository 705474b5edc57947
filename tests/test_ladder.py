"""Imports run in one direction, late ones too, and every file says its job."""

import ast
import subprocess
import sys

import pytest


LADDER = [
    "embedded",
    "files",
    "routes",
    "profiles",
    "limits",
    "ranking",
    "blocks",
    "families",
    "samplers",
    "genomes",
    "surrogate",
    "search",
    "controller",
    "torch_archives",
    "runners",
    "exported_files",
    "exported",
    "cards",
    "hub",
    "features",
    "preprocessing",
    "outputs",
    "segments",
    "tracing",
    "cuts",
    "cut_cache",
    "labels",
    "fingerprints",
    "anchors",
    "loading",
    "adapter_files",
    "parents",
    "augment",
    "data",
    "stitches",
    "least_squares",
    "tuning",
    "pruning",
    "branches",
    "hsic",
    "samples",
    "similarity",
    "similarity_cache",
    "plots",
    "steps",
    "paging",
    "costs",
    "memory",
    "device",
    "latency",
    "measuring",
    "accuracy",
    "evaluation",
    "configuration_restnet",
    "switching",
    "adapters",
    "loading_options",
    "saving",
    "selecting",
    "modeling_restnet",
    "checkpoints",
    "feature_cache",
    "tracking",
    "stopping",
    "training_args",
    "objectives",
    "frozen",
    "feeding",
    "learning",
    "training",
    "comparing",
    "judging",
    "adapting",
    "export.folding",
    "export.programs",
    "export.sensitivity",
    "export.exporter",
    "export.onnx",
    "export.openvino",
    "export.executorch",
    "export.torch_program",
    "export",
    "plain",
    "exporting",
    "recipe",
    "cli",
    "__init__",
]
NO_TORCH = LADDER[: LADDER.index("features")]


def module_name(package, path):
    name = ".".join(path.relative_to(package).with_suffix("").parts)
    return name.removesuffix(".__init__")


def text_of(package, name):
    path = package / name.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def test_every_module_is_on_the_ladder(package):
    assert sorted(module_name(package, path) for path in package.rglob("*.py")) == sorted(LADDER)


@pytest.mark.parametrize("name", LADDER)
def test_imports_only_from_above(package, name):
    tree = ast.parse(text_of(package, name))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    ours = {module.removeprefix("restnet_hf.") for module in imported if module.startswith("restnet_hf.")}
    ours |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "restnet_hf"
        for alias in node.names
        if alias.name in LADDER
    }
    assert ours <= set(LADDER[: LADDER.index(name)])


@pytest.mark.parametrize("name", LADDER)
def test_says_its_job_and_stays_small(package, name):
    text = text_of(package, name)
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= 400


@pytest.mark.parametrize(
    ("absent", "modules"),
    [
        (["torch", "transformers"], NO_TORCH),
        (["torch", "transformers", "numpy", "PIL"], ["profiles", "controller", "cards", "hub"]),
    ],
)
def test_reading_a_profile_needs_no_torch(absent, modules):
    code = (
        "import importlib, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name.split('.')[0] in {absent}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import restnet_hf\n"
        f"for name in {modules}: importlib.import_module('restnet_hf.' + name)\n"
        "assert str(restnet_hf.Route.parse('a[:2] + b[1:]')) == 'a[:2] + b[1:]'\n"
        "assert 'torch' not in sys.modules and not hasattr(restnet_hf, 'train')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_face():
    import restnet_hf

    assert all(hasattr(restnet_hf, name) for name in restnet_hf.__all__)
    assert {"StitchedModelForImageClassification", "StitchConfig", "Route", "Profile", "Budget", "train"} <= set(
        restnet_hf.__all__
    )
