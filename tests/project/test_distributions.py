"""What is installed: both distributions, floors that are the ones tested, and scripts that name what they import."""

import ast
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from versions import LEAST_TORCH


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = sorted((ROOT / "recipes").glob("*.py"))
BASE = {Requirement(text).name for text in PROJECT["dependencies"]}
DEMO = {"restnet_hf/demo/demo.yaml", "restnet_hf/demo/data/test.parquet", "restnet_hf/demo/vit_fashion/config.json"}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def header(path):
    """The metadata of a script, as `uv run` reads it (PEP 723)."""
    lines = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())[1]
    return tomllib.loads("".join(line[2:] for line in lines.splitlines(keepends=True)))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_name_what_they_import(script):
    about = header(script)
    assert about["requires-python"] == PROJECT["requires-python"]
    given = {Requirement(text).name for text in about["dependencies"]}
    nodes = list(ast.walk(ast.parse(script.read_text())))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {name.partition(".")[0] for name in modules}
    owners = packages_distributions()
    needed = {
        owners[name][0].lower().replace("_", "-") for name in imported - sys.stdlib_module_names if name in owners
    }
    assert needed <= given | (BASE if "restnet-hf" in given else set()), script.name


def test_every_requirement_has_a_floor():
    """And the version that exporting needs is the one that its extra asks for."""
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(text for name in extras if name != "dev" for text in extras[name])]:
        assert [part.operator for part in Requirement(text).specifier] == [">="], text
    assert extras["torch"] == [f"torch>={LEAST_TORCH}"]
    assert f'requires-python = "{PROJECT["requires-python"]}"' in (ROOT / "recipes/build_runtime.py").read_text()


def test_the_runtime_needs_no_torch():
    for package in ("build", "tomlkit"):
        pytest.importorskip(package)
    build = load(ROOT / "recipes/build_runtime.py")
    project = tomllib.loads(build.runtime_project((ROOT / "pyproject.toml").read_text()))["project"]
    assert project["name"] == "restnet-hf-runtime" and project["version"] == PROJECT["version"]
    assert {*project["dependencies"]} < {*PROJECT["dependencies"]} and "scripts" not in project
    assert {Requirement(text).name for text in project["dependencies"]} == {*build.NEEDED}
    assert "torch" not in str(project["dependencies"]) + str(project["optional-dependencies"])
    without = (ROOT / "pyproject.toml").read_text().replace('"pyyaml>=6.0.1",\n', "")
    with pytest.raises(ValueError, match=r"does not depend on \['pyyaml'\]"):
        build.runtime_project(without)


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    """They hold every module, the demo and the licence, nothing of tests or recipes, and metadata that pip can use."""
    pytest.importorskip("build")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("restnet_hf-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in tracked if name.startswith("restnet_hf/") and (copy / name).exists()}
    assert {name for name in names if name.startswith("restnet_hf/")} == modules >= {*DEMO, "restnet_hf/py.typed"}
    (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(zipfile.ZipFile(wheel).read(about))
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert len(metadata.get_all("Project-URL")) == len(PROJECT["urls"]) and metadata.get_payload().startswith(
        "# restnet"
    )
    assert f"{about.partition('/')[0]}/licenses/LICENSE" in names
    with tarfile.open(next(tmp_path.glob("restnet_hf-*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed >= modules | {"pyproject.toml", "README.md", "LICENSE"}
    assert not [name for name in packed if name.startswith(".")]


def test_python_versions_are_those_of_the_classifiers():
    listed = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text]
    least = PROJECT["requires-python"].removeprefix(">=")
    assert listed[0] == least and listed == sorted(listed, key=Version)
