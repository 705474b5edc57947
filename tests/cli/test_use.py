"""predict, profile and push by command; push to a Hub is in tests/hub/test_repository.py."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner
from versions import needs_export

from restnet_hf import Profile, StitchedModelForImageClassification
from restnet_hf.cli import app
from restnet_hf.data.datasets import load_images
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.export import export_routes


ROUTE = "resnet_fashion[:7] + vit_fashion[6:]"


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


@pytest.mark.parametrize("exported", [False, pytest.param(True, marks=needs_export)])
def test_predict_prints_what_the_model_predicts(adapter, pictures, tmp_path, exported):
    model, names = StitchedModelForImageClassification.from_pretrained(adapter), list(map(str, pictures))
    folder = tmp_path / "profiled"
    model.profile()
    model.save_pretrained(folder)
    if exported:
        folder = tmp_path / "exported"
        model = export_routes(model, folder, [ROUTE, "resnet_fashion[:]"])
    result = invoke("predict", folder, *pictures, "--budget", "macs=1e9", "--budget", "params=1e7", "--top-k", "2")
    assert result.exit_code == 0, result.output
    answers = model.predict(names, budget={"macs": 1e9, "params": 1e7}, top_k=2)
    assert result.stdout.splitlines() == [
        f"{name}: " + ", ".join(f"{each['label']} {each['score']:.1%}" for each in answer)
        for name, answer in zip(names, answers, strict=True)
    ]
    result = invoke("predict", folder, *pictures, "--route", ROUTE, "--json")
    answers = model.predict(names, route=ROUTE)
    assert json.loads(result.stdout) == [
        {"picture": name, "classes": answer} for name, answer in zip(names, answers, strict=True)
    ]
    if not exported:
        cascade = f"resnet_fashion[:] >1 {ROUTE}"  # sure of almost none
        result = invoke("predict", folder, *pictures, "--cascade", cascade, "--json")
        expected = model.predict(names, cascade=cascade)
        assert [row["classes"] for row in json.loads(result.stdout)] == expected
    both = invoke("predict", folder, *pictures, "--route", ROUTE, "--budget", "macs=1")
    assert both.exit_code == 2 and "not several" in both.stderr


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
