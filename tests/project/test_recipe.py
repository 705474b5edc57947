"""The whole job on toy sizes, from Python and from the command line."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SIZE, save_model
from datasets import ClassLabel, Dataset, Features, Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from restnet_hf import Profile, Route, StitchedModelForImageClassification
from restnet_hf.cli import app
from restnet_hf.data.datasets import load_images
from restnet_hf.demo.paths import DATA, END, FRONT, RECIPE
from restnet_hf.recipe import Recipe, load_recipe, run_recipe


FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
FRONTS = {"deit_small_tiny_cifar10": "other_vit"}  # at toy size, where it is not a ResNet
TOY = {"front": str(FRONT), "end": str(END), "dataset": str(DATA), "train_images": 96, "eval_images": 50}
TOY |= {"calibration_images": 64, "max_routes": 2, "drop_dominated": False}
ALL = {"drop_dominated": False}
TOY_STITCHES = {"num_train_epochs": 1, "batch_size": 32}


@pytest.fixture
def new_task(tmp_path):
    """A few random anchors, and a data set of three classes that they do not know."""
    anchors = (("resnet", "resnet", 0), ("other_resnet", "resnet", 1), ("vit", "vit", 0), ("other_vit", "vit", 1))
    for name, kind, seed in anchors:
        save_model(kind, tmp_path / name, seed)
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
    report = run_recipe(Recipe(**{**TOY, "drop_dominated": True}, stitches=TOY_STITCHES), out)
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
        name: row["accuracy"] for name, row in rows.items() if name not in report["dropped"]
    }
    assert {*report["dropped"]} == {name for name, row in rows.items() if not row["front"] and "r2" in row}
    assert all(rows[rival]["macs"] <= rows[name]["macs"] for name, rival in report["dropped"].items())
    assert report["gap_closed"] == report["gap_closed_stitched"] and report["gap_closed"] >= 0
    assert str(tmp_path) not in (out / "adapter" / "profile.json").read_text()
    model = StitchedModelForImageClassification.from_pretrained(out / "adapter")
    assert {*map(str, model.routes)} == {name for name, row in rows.items() if "r2" in row and row["front"]}
    assert model.routes == () or model.active_route in model.routes


@pytest.mark.slow
def test_cascades_of_a_recipe(tmp_path):
    """They are in the report and the adapter, with the routes that they run, and can be left out."""
    recipe = {**TOY, "eval_images": 120, "drop_dominated": True}
    report = run_recipe(Recipe(**recipe, stitches=TOY_STITCHES), tmp_path / "with")
    model = StitchedModelForImageClassification.from_pretrained(tmp_path / "with" / "adapter")
    assert [row["cascade"] for row in report["cascades"]] == [str(row.route) for row in model.profiled.cascades] != []
    used = {route for row in model.profiled.cascades for route in row.route.routes}
    assert used <= {*model.all_routes}
    assert not used & {*map(Route.parse, report["dropped"])}
    assert report["gap_closed"] == model.profiled.gap_closed() > report["gap_closed_stitched"]
    without = run_recipe(Recipe(**recipe, cascades=False, stitches=TOY_STITCHES), tmp_path / "without")
    assert without["cascades"] == []


@pytest.mark.slow
def test_stitching_trained_anchors_works(demo_model, clothes):
    """Least squares alone keeps most of the accuracy: far above chance, and above a stitch with random weights."""
    calibration, test = clothes(demo_model, "train", 400), clothes(demo_model, "test", 300)
    routes = demo_model.select_stitches(calibration, max_routes=3)
    random = {row.route: row.scores["accuracy"] for row in demo_model.profile(test).routes}
    r2 = demo_model.fit_stitches(calibration)
    fitted = {row.route: row.scores["accuracy"] for row in demo_model.profile(test).routes}
    assert all(fitted[route] > max(0.6, random[route] + 0.2) for route in routes)
    assert all(0.2 < value < 1 for value in r2.values())


@pytest.mark.slow
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


@pytest.mark.parametrize("tuning", ["norm", pytest.param("full", marks=pytest.mark.slow)])
def test_tuned_anchors_are_compared(new_task, tuning):
    """Beside the routes and the anchors as they are, in the report, in the adapter and in its profile."""
    recipe = {"front": str(new_task / "resnet"), "end": str(new_task / "vit"), "dataset": str(new_task / "data")}
    recipe |= {"image_size": SIZE, "routes": ["resnet[:2] + vit[1:]"], "tuned_anchors": True, "drop_dominated": False}
    recipe |= {"heads": TOY_STITCHES | {"distillation": 0.0}, "stitches": TOY_STITCHES | {"tuning": tuning}}
    report = run_recipe(Recipe(**recipe), new_task / "out")
    assert all(report["checks"].values())
    rows = {row["route"]: row for row in report["routes"]}
    assert {*rows} == {
        "resnet[:2] + vit[1:]",
        *(f"{mark}{n}[:]" for mark in ("", "tuned ") for n in ("resnet", "vit")),
    }
    assert rows["tuned vit[:]"]["macs"] == rows["vit[:]"]["macs"] and "accuracy" in rows["tuned vit[:]"]
    model = StitchedModelForImageClassification.from_pretrained(new_task / "out" / "adapter")
    assert {str(row.route) for row in model.profiled.routes} == {*rows} and "tuned~vit" in model.heads


@pytest.mark.slow
def test_a_recipe_gives_the_same_every_time(new_task):
    recipe = {"front": str(new_task / "resnet"), "end": str(new_task / "vit"), "dataset": str(new_task / "data")}
    recipe |= {"max_routes": 1, "heads": TOY_STITCHES | {"distillation": 0.0}, "stitches": TOY_STITCHES, **ALL}
    weights = []
    for run in ("one", "two"):
        torch.rand(7)  # whatever has happened before
        run_recipe(Recipe(**recipe), new_task / run)
        weights.append((new_task / run / "adapter" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("path", [*RECIPES, RECIPE], ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    data = yaml.safe_load(path.read_text())
    wanted = ("front", "dataset", *(() if "family" in data else ("end",)))
    missing = {key: "x" for key in wanted if key not in data}
    recipe = load_recipe(path, **missing)
    assert recipe.stitches.matching_epochs + recipe.stitches.num_train_epochs > 0
    assert path == RECIPE or not missing


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_how_they_are_run(path):
    top = path.read_text().partition("\nfront:")[0]
    assert all(line.startswith("#") for line in top.splitlines())
    assert f"#   restnet-hf train recipes/{path.name} --out runs/" in top
    assert "minutes on 2 cores" in top and "# Results: recipes/README.md" in top


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_at_toy_size(path, new_task):
    """With tiny anchors and images in place of those it names."""
    recipe = load_recipe(path)
    front = new_task / FRONTS.get(path.stem, "resnet")
    toy = {"front": str(front), "end": str(new_task / "vit"), "dataset": str(new_task / "data"), "image_size": SIZE}
    if recipe.family is not None:  # anchors whose stages fit one another
        toy |= {"end": str(new_task / "other_resnet")} if recipe.end else {"end": None}
        toy |= {
            "between": [],
            "family": {**recipe.family, **({"max_routes": 2} if "max_routes" in recipe.family else {})},
        }
    if recipe.label_free:  # the anchors must know the classes
        toy = {**TOY, "eval_split": "test", "image_size": 56}
    report = run_recipe(
        load_recipe(path, **{**toy, "calibration_images": 16, "max_routes": 2, **ALL}), new_task / "out"
    )
    assert all(report["checks"].values())
    model = StitchedModelForImageClassification.from_pretrained(new_task / "out" / "adapter")
    assert bool(model.tuned) == (recipe.stitches.tuning != "stitch")
    assert {entry["config"]["kind"] for entry in model.config.stitches.values()} == {recipe.stitch_config().kind}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("front: [", "cannot be read"),
        ("- a", "is not a mapping"),
        ("front: a\nend: b\ndataset: c\nepochs: 3", "epochs: Unexpected keyword argument"),
        ("front: a\nend: b\ndataset: c\nstitches: {learning_rate: fast}", "stitches.learning_rate: Input should be"),
        ("front: a", "dataset: Field required"),
        ("front: a\nend: b\ndataset: c\nroutes: []", "routes: List should have at least 1 item"),
        (
            "front: a\nend: b\ndataset: c\nstitch_kind: cubic",
            r"valid:\n- stitch_kind: stitch kind 'cubic' is not one of",
        ),
        ("front: a\nend: b\ndataset: c\naugment: blur", "augment='blur' is not one of"),
        ("front: a\nend: b\ndataset: c\naugment: flip\nstitches: {cache_dir: d}", "leave one of the two out"),
        ("front: a\nend: b\ndataset: c\nlabel_free: true\nnew_head: true", "leave new_head or label_free out"),
        ("front: a\nend: b\ndataset: c\nlabel_free: true", "set stitches.distillation to 1, or"),
    ],
)
def test_bad_recipe(tmp_path, text, message):
    """What is wrong is found before anything is loaded."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    """A mistake in a later stage was found only after heads were trained."""
    wrong = {
        "front": "a", "end": "b", "dataset": "c", "method": "ckaa", "routes": ["a[:2] b[1:]", "a[:1] + b[x:]"],
        "family": {"kind": "nearst"}, "stitch_kind": "cubic", "class_token": "keep", "augment": "blur",
        "train_images": 0, "label_free": True, "new_head": True, "heads": {"learning_rate": -1},
        "stitches": {"num_train_epochs": 0, "matching_epochs": 1, "log_with": "wand", "output_dir": "there",
                     "torch_compile": True, "torch_compile_backend": "inducto"},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ValueError) as raised:
        load_recipe(tmp_path / "r.yaml")
    _, *lines = str(raised.value).splitlines()
    named = [line.removeprefix("- ").partition(":")[0] for line in lines]
    assert sorted(named) == sorted(
        ["method", "routes", "family", "stitch_kind", "class_token", "augment", "train_images", "label_free",
         "heads.learning_rate", "stitches"]
    )  # fmt: skip
    assert "Value error" not in str(raised.value)
    stitches = lines[named.index("stitches")]
    assert all(name in stitches for name in ("log_with='wand'", "output_dir", "torch_compile_backend='inducto'"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("end: b\nfamily: {kind: nearst}", "family: kind='nearst' is not one of"),
        ("end: b\nfamily: {kind: nearest, kernl: 3}", r"family 'nearest' has no options \['kernl'\]"),
        ("end: b\nfamily: {kind: nearest, budget: {mac: 1}}", "mac"),
        ("end: b\nfamily: {kind: nearest, budget: {macs: -1}}", "macs=-1 must be a number above 0"),
        ("end: b\nfamily: {kind: nearest, max_routes: 0}", "max_routes=0 must be a whole number"),
        ("end: b\nstitch_kind: branch", "cannot join two"),
        ("family: {kind: skip, prune: [0.5]}\nstitch_kind: linear", "prune makes copies of blocks"),
        ("family: {kind: nearest}", "one anchor needs a family of"),
        ("end: b\nstitches: {sampler: al}", "sampler='al' is not one of"),
        ("end: b\nheads: {log_with: wand}", "heads: .*wand"),
        ("end: b\ntuned_anchors: true\nstitches: {num_train_epochs: 0, matching_epochs: 1}", "tuned_anchors learn"),
    ],
)
def test_bad_options_of_a_recipe(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(f"front: a\ndataset: c\n{text}")
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_all_that_cannot_be_loaded_is_listed(tmp_path):
    recipe = Recipe(front=str(FRONT), end="nobody/none", dataset=str(DATA), train_split="trian", eval_split="tets")
    with pytest.raises(ValueError, match=r"(?s)be run:\n- data set .*trian.*\n- data set .*tets.*\n- anchor 'nobody"):
        run_recipe(recipe, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no such folder: \./a, \./c"):
        run_recipe(Recipe(front="./a", end="me/b", dataset="./c"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routes": ["resnet[:99] + vit[1:]", "resnet[:1] + vit[77:]"]}, "(?s)99.*77"),
        ({"routes": ["resnet[:2] + vit[1:]"], "stitch_kind": "branch"}, "cannot join"),
        ({"family": {"kind": "nearest", "budget": {"macs": 1}}}, "no route of family|stages"),
        ({"calibration_images": 2}, "2 calibration images are too few for method 'cka'"),
        ({"stitches": {"teacher": "resnet5"}}, "teacher='resnet5' is not 'auto', 'mean' or the name of an anchor"),
    ],
)
def test_routes_and_teacher_are_checked_before_heads_are_trained(new_task, monkeypatch, options, message):
    monkeypatch.setattr("restnet_hf.recipe.train", lambda *_: pytest.fail("heads were trained"))
    anchors = {"front": str(new_task / "resnet"), "end": str(new_task / "vit"), "dataset": str(new_task / "data")}
    with pytest.raises((OSError, ValueError), match=message):
        run_recipe(Recipe(**anchors, **options), new_task / "out")


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
    files = "adapter/, report.json, similarity.png, tradeoff.png"
    assert result.stdout.splitlines()[-1] == f"written to {tmp_path / 'out'}: {files}"
    assert "it/s" not in result.stderr and max(map(len, result.stdout.splitlines()[:-2])) <= 80

    weights = tmp_path / "out" / "adapter" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = invoke("train", tmp_path / "toy.yaml", *options)
    assert again.exit_code == 1 and "exists already; give --overwrite" in again.stderr
    resumed = invoke("train", tmp_path / "toy.yaml", *options, "--resume")
    assert resumed.exit_code == 0 and "it is finished" in resumed.stdout and "trained," in resumed.stdout
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe | {"seed": 1}))
    other = invoke("train", tmp_path / "toy.yaml", *options, "--resume")
    assert other.exit_code == 1 and "another recipe, which differs in seed" in other.stderr
    assert weights.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["demo", "--front", "timm/x"], 2, "together"),
        (["train", "missing.yaml", "--out", "o"], 2, "does not exist"),
        (["demo", "--front", "nobody/none", "--end", END, "--dataset", DATA], 1, "cannot be loaded"),
        (["demo", "--front", FRONT, "--end", END, "--dataset", "nowhere/at-all"], 1, "cannot be loaded"),
    ],
)
def test_command_errors(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == code and message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_similarity_by_command(tmp_path):
    """The routes printed have the highest values of the matrix written; both directions, and labels that help."""
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
    assert result.stdout.splitlines()[-1] == f"written to {out}: {', '.join(sorted(names))}"
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    i, j = np.unravel_index(values.argmax(), values.shape)
    assert values.max() < behind.max() or f"resnet_fashion[:{i + 1}]" in result.output
    assert values.max() < behind.max() or f"vit_fashion[{j + 1}:]" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "magic"], "--method 'magic' is not one of"),
        (["--macs", "10"], "no stitched route fits macs<=10"),
        (["--split", "none"], "cannot be loaded"),
        (["--order", "both"], "--order 'both' is not one of"),
    ],
)
def test_similarity_by_command_refused(tmp_path, options, message):
    command = ["similarity", str(FRONT), str(END), "--dataset", str(DATA), "--images", "16", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert "16 images are too few" in result.stderr and result.stdout == ""


def test_similarity_of_other_classes(new_task):
    """Anchors need not share classes to be compared, and labels of another task are no labels."""
    command = ["similarity", str(new_task / "resnet"), str(END), "--dataset", str(DATA), "--images", "32"]
    result = CliRunner().invoke(app, [*command, "--out", str(new_task / "out")])
    assert result.exit_code == 0, result.output
    assert (new_task / "out" / "cka.png").exists()


@pytest.mark.slow
def test_augmentation_is_for_training_alone(tmp_path):
    """All that least squares gives stays as it was, and what training gives does not."""
    reports, weights = [], []
    for augment in (None, "crop"):
        out = tmp_path / str(augment)
        stitches = {**TOY_STITCHES, "keep": "last"}  # else least squares may be the best state of both
        reports.append(run_recipe(Recipe(**TOY, augment=augment, stitches=stitches), out)["routes"])
        weights.append(load_file(out / "adapter" / "model.safetensors"))
    for key in ("route", "similarity", "r2", "accuracy_least_squares"):
        assert [row.get(key) for row in reports[0]] == [row.get(key) for row in reports[1]]
    assert not any(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_label_free_looks_at_no_label(tmp_path):
    """With and without labels of the training images the same adapter to the last bit."""
    images = {split: load_images(DATA, split).select(range(48)) for split in ("train", "test")}
    stitches = {"matching_epochs": 1, "num_train_epochs": 1, "distillation": 1.0, "batch_size": 16}
    recipe = {**TOY, "method": "fitted_accuracy", "max_routes": 1, "label_free": True, "stitches": stitches}
    weights = []
    for name in ("labelled", "not"):
        rows = images["train"] if name == "labelled" else images["train"].remove_columns("label")
        (tmp_path / name).mkdir()
        rows.to_parquet(tmp_path / name / "train.parquet")
        images["test"].to_parquet(tmp_path / name / "test.parquet")
        report = run_recipe(Recipe(**{**recipe, "dataset": str(tmp_path / name)}), tmp_path / "out" / name)
        assert report["similarity"]["labels"] is False and report["routes"][-1]["accuracy"] > 0.8
        weights.append((tmp_path / "out" / name / "adapter" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_label_free_needs_anchors_that_know_the_classes(new_task):
    recipe = {"front": str(new_task / "resnet"), "end": str(new_task / "vit"), "dataset": str(new_task / "data")}
    with pytest.raises(ValueError, match="3 classes are not those that all anchors know, and new heads cannot be"):
        run_recipe(Recipe(**recipe, label_free=True, stitches={"distillation": 1.0}), new_task / "out")
    assert not (new_task / "out").exists()


@pytest.mark.slow
def test_routes_by_name(tmp_path):
    """They take the place of those that a selector would choose, so there is no similarity to show."""
    routes = ["resnet_fashion[:2] + vit_fashion[4:]", "resnet_fashion[:6] + vit_fashion[vit.layers.4:]"]
    recipe = {**TOY, "routes": routes, "stitch_kind": "mlp", "stitches": TOY_STITCHES}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    result = invoke("train", tmp_path / "toy.yaml", "--out", out)
    assert result.exit_code == 0, result.output
    assert "cka" not in result.output and "similarity.png" not in result.output
    assert sorted(file.name for file in out.iterdir()) == ["adapter", "report.json", "tradeoff.png"]
    report = json.loads((out / "report.json").read_text())
    assert report["similarity"] is None
    stitched = {row["route"]: row for row in report["routes"] if "r2" in row}
    assert stitched.keys() == {routes[0], "resnet_fashion[:6] + vit_fashion[5:]"}
    config = StitchedModelForImageClassification.from_pretrained(out / "adapter").config
    assert [entry["config"]["kind"] for entry in config.stitches.values()] == ["mlp", "mlp"]
    recipe["routes"] = ["resnet_fashion[:2] + vit_fashion[9:]"]
    with pytest.raises(ValueError, match=r"vit_fashion.*9"):
        run_recipe(Recipe(**recipe), tmp_path / "other")


@pytest.mark.slow
def test_a_killed_run_goes_on(new_task):
    """SIGTERM in the middle of training: exit status 143 and a checkpoint; resumed, the same adapter as without it."""
    recipe = {"front": str(new_task / "resnet"), "end": str(new_task / "vit"), "dataset": str(new_task / "data")}
    recipe |= {"routes": ["resnet[:2] + vit[1:]", "resnet[:4] + vit[2:]"], "stitch_kind": "lora", **ALL}
    recipe |= {"heads": TOY_STITCHES | {"distillation": 0.0}, "augment": "crop"}
    recipe |= {"stitches": {"num_train_epochs": 20, "batch_size": 8, "save_steps": 1, "sampler": "importance"}}
    (new_task / "toy.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train", str(new_task / "toy.yaml"), "--out"]
    checkpoints = new_task / "killed" / "training" / "stitches"
    process = subprocess.Popen([sys.executable, "-m", "restnet_hf.cli", *command, str(new_task / "killed")])
    while not any(checkpoints.glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(300) == 143
    assert any(checkpoints.glob("checkpoint-*")) and not (new_task / "killed" / "adapter").exists()
    for name, options in (("killed", ["--resume"]), ("whole", [])):
        result = invoke(*command, new_task / name, *options)
        assert result.exit_code == 0, result.output
    killed, whole = (load_file(new_task / name / "adapter" / "model.safetensors") for name in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    assert not checkpoints.exists()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """The same accuracies; weights agree to float32 rounding, and only one of the processes speaks."""
    recipe = {**TOY, "train_images": 128, "max_routes": 1, "augment": "crop", "stitches": TOY_STITCHES}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "restnet_hf.cli"]
    done = subprocess.run(
        [sys.executable, *run, "train", str(tmp_path / "toy.yaml"), "--out", str(tmp_path / "two")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.count("routes, cheapest first") == 1
    one = run_recipe(Recipe(**recipe), tmp_path / "one")
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    for key in ("route", "accuracy_least_squares", "accuracy"):
        assert [row.get(key) for row in one["routes"]] == [row.get(key) for row in two["routes"]]
    weights = [load_file(tmp_path / name / "adapter" / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(value, weights[1][name], atol=1e-5) for name, value in weights[0].items())
    config = json.loads((tmp_path / "two" / "adapter" / "config.json").read_text())
    assert config["training"][-1]["processes"] == 2


@pytest.mark.slow
def test_as_transformers_trainer(pair, monkeypatch):
    """In the same order of images both take the same steps: weights within 1e-6, after moving by over a thousandth."""
    spec = importlib.util.spec_from_file_location("with_trainer", FOLDER / "with_trainer.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "BATCH_SIZE", 8)
    pixels = torch.randn(20, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": [i % 5 for i in range(20)]})
    rows = rows.with_format("torch")
    models = [copy.deepcopy(pair) for _ in range(2)]
    accuracies = [way(m, rows, rows, 2) for way, m in zip((script.by_trainer, script.by_train), models, strict=True)]
    assert accuracies[0] == accuracies[1]
    assert script.largest_difference(*models) <= 1e-6 < 1e-3 < script.largest_difference(pair, models[0])


def test_checkpoints_of_a_recipe(tmp_path):
    """A recipe may ask for them; the folder is that of the job."""
    path = tmp_path / "recipe.yaml"
    path.write_text("front: a\nend: b\ndataset: c\nstitches: {save_steps: 5}\n")
    assert load_recipe(path).stitches.save_steps == 5
