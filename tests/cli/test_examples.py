"""The example in the help of each command runs, also under the name that makes it an extension of the hf command."""

import importlib.metadata
import json
import shlex
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner
from versions import needs_export

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.cli import app
from restnet_hf.data.datasets import load_images
from restnet_hf.demo.paths import DATA, END, FRONT


GROUPS = {"": app, **{f"{group.name} ": group.typer_instance for group in app.registered_groups}}
EXAMPLES = {
    f"{path}{command.name}": shlex.split(command.epilog.removeprefix("Example: "))
    for path, group in GROUPS.items()
    for command in group.registered_commands
}
HUB = ("find", "push")  # run in tests/hub/test_repository.py
SERVES = "app"  # until it is ended
WRITES = {
    "demo": "restnet-demo/adapter/model.safetensors",
    "train": "r50-mbv2/adapter/model.safetensors",
    "similarity": "similarity/cka.csv",
    "scout": "scouted/recipe.yaml",
    "profile": "me/r50-mbv2/profile.json",
    "measure": "latency.json",
    "adapt": "adapted/config.json",
    "export": "board/profile.json",
}
RECIPE = {
    "front": "timm/resnet50.a1_in1k",
    "end": "timm/mobilenetv2_100.ra_in1k",
    "dataset": "photos",
    "train_images": 64,
    "eval_images": 16,
    "calibration_images": 32,
    "max_routes": 1,
    "stitches": {"num_train_epochs": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which what the examples name is there: anchors and an adapter under Hub ids, pictures, a recipe."""
    folder = tmp_path_factory.mktemp("examples")
    for name, source in ((RECIPE["front"], FRONT), (RECIPE["end"], END)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(source)
    for split in ("train", "test"):
        for index, row in enumerate(load_images(DATA, split).select(range(120))):
            picture = folder / "photos" / split / str(row["label"]) / f"{index}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(picture)
    picture.rename(folder / "photo.jpg")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    model = StitchedModelForImageClassification.from_anchors(FRONT, END)
    images = load_images(DATA, "test").select(range(100))
    model.add_stitch("resnet_fashion[:7] + vit_fashion[6:]")
    model.fit_stitches(images)
    model.profile(images)
    model.save_pretrained(folder / "me" / "r50-mbv2")
    return folder


def test_every_command_has_one():
    assert all(words[: 1 + len(name.split())] == ["restnet-hf", *name.split()] for name, words in EXAMPLES.items())
    assert {"demo", "cache list", "cache prune"} <= {*EXAMPLES}
    for name in EXAMPLES:
        printed = " ".join(CliRunner().invoke(app, [*name.split(), "--help"]).output.split())
        assert "Example: restnet-hf" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_export) if n == "export" else n for n in EXAMPLES if n not in (*HUB, SERVES)]
)
def test_examples_run(place, monkeypatch, name):
    monkeypatch.chdir(place)
    result = CliRunner().invoke(app, EXAMPLES[name][1:])
    assert result.exit_code == 0, result.output
    assert name not in WRITES or (place / WRITES[name]).stat().st_mtime >= (place / "recipe.yaml").stat().st_mtime


@pytest.mark.slow
def test_the_example_that_serves(place):
    """It prints its address, which answers."""
    pytest.importorskip("gradio")
    code = f"from restnet_hf.cli import app; app({[*EXAMPLES[SERVES][1:], '--no-browser']})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=place, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[0]
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert answer.status == 200
        finally:
            process.terminate()


def test_the_extension_is_the_same_command():
    scripts = importlib.metadata.distribution("restnet-hf").entry_points
    assert {script.name: script.value for script in scripts if script.group == "console_scripts"} == {
        "restnet-hf": "restnet_hf.cli:app",
        "hf-restnet": "restnet_hf.cli:app",
    }
