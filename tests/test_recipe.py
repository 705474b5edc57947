"""The whole job on toy sizes, from Python and from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SIZE, save_model
from datasets import ClassLabel, Dataset, Features, Image
from typer.testing import CliRunner

from restnet_hf import Profile, StitchedModelForImageClassification
from restnet_hf.cli import app
from restnet_hf.embedded import DATA, END, FRONT, RECIPE
from restnet_hf.recipe import Recipe, load_recipe, run_recipe


RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
TOY = {"front": str(FRONT), "end": str(END), "dataset": str(DATA), "train_images": 96, "eval_images": 50}
TOY |= {"calibration_images": 64, "max_routes": 2}
TOY_STITCHES = {"num_train_epochs": 1, "batch_size": 32}


@pytest.fixture
def new_task(tmp_path):
    """Two random anchors, and a data set of three classes that they do not know."""
    for name in ("resnet", "vit"):
        save_model(name, tmp_path / name)
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "green", "blue"])})
    pixels = torch.zeros(24, SIZE, SIZE, 3, dtype=torch.uint8)
    for index in range(24):
        pixels[index, ..., index % 3] = 200 + index
    rows = {"image": list(pixels.numpy()), "label": [i % 3 for i in range(24)]}
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    return tmp_path


def test_the_whole_job(tmp_path):
    out = tmp_path / "out"
    report = run_recipe(Recipe(**TOY, stitches=TOY_STITCHES), out)
    assert report["checks"] == {"anchors_unchanged": True, "reloaded_logits_equal": True}
    assert sorted(file.name for file in out.iterdir()) == ["adapter", "report.json", "similarity.png", "tradeoff.png"]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("similarity", "tradeoff"))
    rows = {row["route"]: row for row in report["routes"]}
    assert len(rows) == 4
    assert rows["resnet_fashion[:]"]["accuracy"] > 0.8 and rows["vit_fashion[:]"]["accuracy"] > 0.75
    macs = [row["macs"] for row in report["routes"]]
    assert macs == sorted(macs)
    profile = Profile.load(out / "adapter" / "profile.json")
    assert {str(row.route): row.scores["accuracy"] for row in profile.routes} == {
        name: row["accuracy"] for name, row in rows.items()
    }
    assert str(tmp_path) not in (out / "adapter" / "profile.json").read_text()
    model = StitchedModelForImageClassification.from_pretrained(out / "adapter")
    assert len(model.active_route.segments) == 2


def test_stitching_trained_anchors_works(demo_model, clothes):
    """Least squares alone keeps most of the accuracy: far above chance, and above a stitch with random weights."""
    calibration, test = clothes(demo_model, "train", 400), clothes(demo_model, "test", 300)
    routes = demo_model.select_stitches(calibration, max_routes=3)
    random = {row.route: row.scores["accuracy"] for row in demo_model.profile(test).routes}
    r2 = demo_model.fit_stitches(calibration)
    fitted = {row.route: row.scores["accuracy"] for row in demo_model.profile(test).routes}
    assert all(fitted[route] > max(0.6, random[route] + 0.2) for route in routes)
    assert all(0.2 < value < 1 for value in r2.values())


def test_new_task_needs_no_flag(new_task):
    recipe = {"front": str(new_task / "resnet"), "end": str(new_task / "vit"), "dataset": str(new_task / "data")}
    recipe |= {"image_size": SIZE, "max_routes": 1, "heads": TOY_STITCHES | {"train_head": True, "distillation": 0.0}}
    (new_task / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"stitches": TOY_STITCHES}))
    report = run_recipe(load_recipe(new_task / "recipe.yaml"), new_task / "out")
    assert all(report["checks"].values()) and len(report["routes"]) == 3
    model = StitchedModelForImageClassification.from_pretrained(new_task / "out" / "adapter")
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    with pytest.raises(ValueError, match=r"classes are not the anchors' .*; set new_head: true|do not name the same"):
        run_recipe(load_recipe(new_task / "recipe.yaml", new_head=False), new_task / "other")


def test_a_recipe_gives_the_same_every_time(new_task):
    recipe = {"front": str(new_task / "resnet"), "end": str(new_task / "vit"), "dataset": str(new_task / "data")}
    recipe |= {"max_routes": 1, "heads": TOY_STITCHES | {"distillation": 0.0}, "stitches": TOY_STITCHES}
    weights = []
    for run in ("one", "two"):
        torch.rand(7)  # whatever has happened before
        run_recipe(Recipe(**recipe), new_task / run)
        weights.append((new_task / run / "adapter" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("path", [*RECIPES, RECIPE], ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    data = yaml.safe_load(path.read_text())
    missing = {key: "x" for key in ("front", "end", "dataset") if key not in data}
    recipe = load_recipe(path, **missing)
    assert recipe.stitches.num_train_epochs > 0
    assert path == RECIPE or not missing


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_at_toy_size(path, new_task):
    """With tiny anchors and images in place of those it names."""
    toy = {"front": str(new_task / "resnet"), "end": str(new_task / "vit"), "dataset": str(new_task / "data")}
    report = run_recipe(load_recipe(path, **toy, image_size=SIZE, calibration_images=16), new_task / "out")
    assert all(report["checks"].values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("front: [", "cannot be read"),
        ("- a", "is not a mapping"),
        ("front: a\nend: b\ndataset: c\nepochs: 3", "epochs: Unexpected keyword argument"),
        ("front: a\nend: b\ndataset: c\nstitches: {learning_rate: fast}", "stitches.learning_rate: Input should be"),
        ("front: a", "end: Field required"),
    ],
)
def test_bad_recipe(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command(tmp_path):
    recipe = {
        "train_images": 64,
        "eval_images": 32,
        "calibration_images": 32,
        "max_routes": 1,
        "stitches": TOY_STITCHES,
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--front", FRONT, "--end", END, "--dataset", DATA, "--out", tmp_path / "out"]
    result = invoke("train", tmp_path / "toy.yaml", *options)
    assert result.exit_code == 0, result.output
    assert "resnet_fashion[:" in result.output and "anchors unchanged: yes" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["demo", "--front", "timm/x"], 2, "together"),
        (["train", "missing.yaml", "--out", "o"], 1, "cannot be read"),
        (["demo", "--front", "nobody/none", "--end", END, "--dataset", DATA], 1, "cannot be loaded"),
        (["demo", "--front", FRONT, "--end", END, "--dataset", "nowhere/at-all"], 1, "cannot be loaded"),
    ],
)
def test_command_errors(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == code and message in " ".join(result.output.split())
    assert "Traceback" not in result.output and list(tmp_path.iterdir()) == []


def test_similarity_by_command(tmp_path):
    """The routes printed are those that the matrix written says are best; both directions, and labels that help."""
    out = tmp_path / "out"
    command = ["similarity", str(FRONT), str(END), "--dataset", str(DATA), "--images", "64", "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--method", "cka", "--method", "fitted_accuracy", "--order", "auto"])
    assert result.exit_code == 0, result.output
    names = {f"{name}{back}.{kind}" for name in ("cka", "fitted_accuracy") for back in ("", "_back")
             for kind in ("npz", "csv", "png")}  # fmt: skip
    assert {file.name for file in out.iterdir()} == names
    for name in ("cka", "fitted_accuracy"):
        with np.load(out / f"{name}.npz") as data, np.load(out / f"{name}_back.npz") as back:
            values, behind, settings = data["values"], back["values"], json.loads(str(data["settings"]))
        assert values.shape == (8, 6) and settings["method"] == name and settings["images"] == 64
        lines = (out / f"{name}.csv").read_text().splitlines()
        assert np.allclose([[float(x) for x in line.split(",")[1:]] for line in lines[1:]], values)
        assert lines[0].startswith("resnet_fashion,vit.layers.0,") and len(lines) == 9
    assert settings["labels"] is True
    assert "dominated" in result.output and "vit_fashion[:" in result.output
    i, j = np.unravel_index(values.argmax(), values.shape)
    assert values.max() < behind.max() or f"resnet_fashion[:{i + 1}] + vit_fashion[{j + 1}:]" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "method='magic' is not one of"),
        (["--macs", "10"], "no stitched route fits macs<=10"),
        (["--split", "none"], "cannot be loaded"),
        (["--order", "both"], "order='both' is not one of"),
    ],
)
def test_similarity_by_command_refused(tmp_path, options, message):
    command = ["similarity", str(FRONT), str(END), "--dataset", str(DATA), "--images", "16", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_similarity_of_other_classes(new_task):
    """Anchors need not share classes to be compared, and labels of another task are no labels."""
    command = ["similarity", str(new_task / "resnet"), str(END), "--dataset", str(DATA), "--images", "32"]
    result = CliRunner().invoke(app, [*command, "--out", str(new_task / "out")])
    assert result.exit_code == 0, result.output
    assert (new_task / "out" / "cka.png").exists()
