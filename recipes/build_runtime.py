# /// script
# requires-python = ">=3.11"
# dependencies = ["build", "tomlkit", "typer"]
# ///
"""Build restnet-hf-runtime: this package with the few dependencies that a device needs.

    python recipes/build_runtime.py dist

The wheel holds the same modules as restnet-hf, without the demo, and installs without torch: it reads profiles,
follows budgets, finds adapters and runs exported folders. Install one of the two: both hold the package `restnet_hf`.
"""

import shutil
import tempfile
from pathlib import Path

import tomlkit
import typer
from build import ProjectBuilder
from build.env import DefaultIsolatedEnv


ROOT = Path(__file__).parents[1]
NAME = "restnet-hf-runtime"
DESCRIPTION = "Run exported models of restnet-hf and follow their budgets on a device, without torch"
PAGE = f"""# {NAME}

{DESCRIPTION}: `restnet_hf.ExportedModel`, `Profile`, `Budget`, `Controller` and `find_adapters` of
[restnet-hf](https://pypi.org/project/restnet-hf), which also makes, trains and exports such models and holds
everything that is here. Install one of the two.

```bash
pip install '{NAME}[onnx]'  # or openvino
```

```python
from restnet_hf import ExportedModel

board = ExportedModel.from_pretrained("board", budget={{"latency_ms": 50}}, threads=1)
print(board.predict("photo.jpg")[0])
```
"""
NEEDED = ("filelock", "huggingface-hub", "numpy", "packaging", "pillow", "pyyaml", "safetensors")
RUNTIMES = {
    "coreml": "coremltools",
    "litert": "ai-edge-litert",
    "onnx": "onnxruntime",
    "openvino": "openvino",
}  # what running needs of the extras, which export too


def name_of(requirement: str) -> str:
    """The name of the package that a requirement such as ``numpy>=2.0`` is of."""
    return requirement.partition(">=")[0]


def runtime_project(text: str) -> str:
    """The pyproject.toml of the runtime, from that of the whole package.

    Raises:
        ValueError: the whole package does not depend on something that the runtime needs.
    """
    document = tomlkit.parse(text)
    project = document["project"]
    whole, extras = project["dependencies"], project["optional-dependencies"]
    if missing := sorted({*NEEDED} - {name_of(each) for each in whole}):
        raise ValueError(f"pyproject.toml does not depend on {missing}")
    project["name"], project["description"] = NAME, DESCRIPTION
    project["dependencies"] = [each for each in whole if name_of(each) in NEEDED]
    project["optional-dependencies"] = {
        extra: [each for each in extras[extra] if name_of(each) == package] for extra, package in RUNTIMES.items()
    }
    del project["scripts"]
    document["tool"]["setuptools"]["package-data"]["restnet_hf"] = ["py.typed"]
    return tomlkit.dumps(document)


def main(out: Path) -> None:
    """Build the wheel of the runtime in the folder OUT."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / NAME
        shutil.copytree(ROOT / "restnet_hf", source / "restnet_hf", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "LICENSE", source)
        (source / "README.md").write_text(PAGE)
        (source / "pyproject.toml").write_text(runtime_project((ROOT / "pyproject.toml").read_text()))
        with DefaultIsolatedEnv() as environment:
            builder = ProjectBuilder.from_isolated_env(environment, source)
            environment.install(builder.build_system_requires)
            environment.install(builder.get_requires_for_build("wheel"))
            print(builder.build("wheel", out.resolve()))


if __name__ == "__main__":
    typer.run(main)
