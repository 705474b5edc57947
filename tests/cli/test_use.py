"""predict, profile and push by command; push to a Hub is in tests/hub/test_repository.py."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from restnet_hf import ExportedModel, Profile, StitchedModelForImageClassification
from restnet_hf.cli import app
from restnet_hf.data.datasets import load_images
from restnet_hf.demo.paths import DATA, END, FRONT


ROUTE = "resnet_fashion[:7] + vit_fashion[6:]"
CLASSES = [{"label": "shirt", "score": 0.75}, {"label": "coat", "score": 0.125}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The demo's anchors with a stitch, as a folder."""
    model = StitchedModelForImageClassification.from_anchors(FRONT, END)
    model.add_stitch(ROUTE)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    rows = load_images(DATA, "test").select(range(2))
    files = [tmp_path / f"{index}.png" for index in range(2)]
    for file, row in zip(files, rows, strict=True):
        row["image"].save(file)
    return files


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("exported", [False, True])
def test_predict_passes_everything_on(adapter, pictures, tmp_path, monkeypatch, exported):
    kind = ExportedModel if exported else StitchedModelForImageClassification
    calls = []

    def classify(model, images, **options):
        calls.append((images, options))
        return [CLASSES] * len(images)

    monkeypatch.setattr(kind, "predict", classify, raising=False)
    folder = adapter
    if exported:
        folder = tmp_path / "exported"
        folder.mkdir()
        (folder / "labels.json").touch()
        monkeypatch.setattr(ExportedModel, "__init__", lambda model, *arguments: None)
    options = ["--budget", "macs=1e9", "--budget", "params=1e7", "--top-k", "2"]
    result = invoke("predict", folder, *pictures, *options)
    assert result.exit_code == 0, result.output
    assert calls == [
        ([str(picture) for picture in pictures], {"route": None, "budget": {"macs": 1e9, "params": 1e7}, "top_k": 2})
    ]
    assert result.stdout.splitlines() == [f"{picture}: shirt 75.0%, coat 12.5%" for picture in pictures]
    result = invoke("predict", folder, *pictures, "--route", ROUTE, "--json")
    assert json.loads(result.stdout) == [{"picture": str(picture), "classes": CLASSES} for picture in pictures]
    assert calls[1][1] == {"route": ROUTE, "budget": None, "top_k": 5}
    both = invoke("predict", folder, *pictures, "--route", ROUTE, "--budget", "macs=1")
    assert both.exit_code == 2 and "not both" in both.stderr


@pytest.mark.skipif(not hasattr(StitchedModelForImageClassification, "predict"), reason="the model has no predict yet")
def test_predict_of_an_adapter(adapter, pictures):
    result = invoke("predict", adapter, *pictures, "--route", "resnet_fashion[:]", "--top-k", "1", "--json")
    assert result.exit_code == 0, result.output
    rows = load_images(DATA, "test").select(range(2))
    names = rows.features["label"].names
    found = [row["classes"][0]["label"].casefold() for row in json.loads(result.stdout)]
    assert found == [names[label].casefold() for label in rows["label"]]


def test_profile_by_command(adapter, tmp_path):
    """Written into the adapter, which then follows budgets; not over an older one unasked."""
    options = ["--data", DATA, "--split", "test", "--images", "40", "--batch-size", "20"]
    result = invoke("profile", adapter, *options)
    assert result.exit_code == 0, result.output
    assert "40 images are too few for the accuracy" in result.stderr and "accuracy," in result.stdout
    profile = Profile.load(adapter / "profile.json")
    assert {str(row.route) for row in profile.routes} == {"resnet_fashion[:]", "vit_fashion[:]", ROUTE}
    assert profile.metadata["dataset"] == DATA.name and str(DATA) not in (adapter / "profile.json").read_text()
    model = StitchedModelForImageClassification.from_pretrained(adapter)
    assert str(model.set_budget(macs=6e6)) == "vit_fashion[:]"
    again = invoke("profile", adapter, *options)
    assert again.exit_code == 1 and "profile.json exists already" in again.stderr
    other = invoke("profile", adapter, *options, "--out", tmp_path / "p.json")
    assert other.exit_code == 0 and Profile.load(tmp_path / "p.json").routes == profile.routes


def test_push_of_what_others_cannot_fetch(adapter):
    result = invoke("push", adapter, "me/pushed")
    assert result.exit_code == 1 and "push with --standalone" in result.stderr and "warning" not in result.stdout


def test_a_picture_that_is_none(adapter, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = invoke("predict", adapter, tmp_path / "a.png", tmp_path / "b.png")
    assert result.exit_code == 2 and "b.png" in result.stderr
