"""Scout runs each candidate once over the images, goes on where it stopped, and finds what a search by hand finds."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers
from conftest import CLASSES, SIZE, VIT, make_model, save_model
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets
from PIL import Image as Picture
from transformers import ViTImageProcessor
from typer.testing import CliRunner

from restnet_hf import (
    Budget,
    BudgetError,
    Cascade,
    ScoutResult,
    StitchedModelForImageClassification,
    load_anchor,
    scout,
)
from restnet_hf.cli import app
from restnet_hf.data.datasets import batches, load_images, with_pixel_values
from restnet_hf.data.pixel_values import PixelValues
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.profiling.cascades import Observations
from restnet_hf.profiling.costs import CostTable
from restnet_hf.recipe import load_recipe
from restnet_hf.routes.fronts import measure_gap
from restnet_hf.routes.profile import Profile, ProfiledRoute
from restnet_hf.routes.route import Route, Segment
from restnet_hf.scouting import checks
from restnet_hf.scouting import pairs as scout_pairs
from restnet_hf.scouting import passes as passes_file
from restnet_hf.scouting import scout as scouting
from restnet_hf.scouting.pairs import PairJudge
from restnet_hf.scouting.passes import AnchorPasses, cache_pictures
from restnet_hf.scouting.results import ScoutedPair
from restnet_hf.selection.samples import SelectionBatch
from restnet_hf.selection.selectors import FittedAccuracy
from restnet_hf.steps import run_steps


NAMES = [f"class {number}" for number in range(CLASSES)]
LOOSE = {"macs": 1e9}
FEW = {"images": 40, "eval_images": 20, "head_images": 30}


def save_named(name, folder, seed=0, names=NAMES):
    """A tiny classifier of these classes, or with numbered ones."""
    save_model(name, folder, seed)
    if names:
        config = json.loads((folder / "config.json").read_text())
        labels = dict(enumerate(names))
        config |= {"id2label": labels, "label2id": {text: number for number, text in labels.items()}}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny classifiers of five classes, one that cannot be cut, and pictures that a ResNet mostly knows."""
    folder = tmp_path_factory.mktemp("scout")
    for name, seed in (("resnet", 0), ("vit", 1), ("swin", 0)):
        save_named(name, folder / name, seed)
    save_named("vit", folder / "numbered", 2, None)
    whole = transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=1, **VIT))
    whole.save_pretrained(folder / "uncut")
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder / "uncut")
    rng = np.random.default_rng(0)
    pictures = [Picture.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)) for _ in range(120)]
    x = ViTImageProcessor(size={"height": SIZE, "width": SIZE})(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        labels = make_model("resnet")(x).logits.argmax(-1).numpy()
    labels = np.where(rng.random(120) < 0.2, rng.integers(0, CLASSES, 120), labels)
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    for split, part in (("train", slice(0, 60)), ("test", slice(60, 120))):
        rows = {"image": pictures[part], "label": labels[part].tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    return folder


@pytest.fixture
def runs(monkeypatch):
    """Images that ran through each anchor in passes, pictures that were opened, races, and heads that trained."""
    seen = {"images": {}, "pictures": 0, "races": [], "heads": []}
    run, opened = SelectionBatch.run, PixelValues._open
    race, heads = scout_pairs.race_routes, scouting.train_heads

    def counted_run(batch, hook):
        for name in batch._anchors:
            seen["images"][name] = seen["images"].get(name, 0) + batch.size
        return run(batch, hook)

    def counted_open(prepared, pictures, indices):
        seen["pictures"] += len(pictures)
        return opened(prepared, pictures, indices)

    def counted_race(walks, *args, **options):
        seen["races"].append(walks[0][0])
        return race(walks, *args, **options)

    def counted_heads(model, rows, anchors):
        seen["heads"] += anchors
        return heads(model, rows, anchors=anchors)

    monkeypatch.setattr(SelectionBatch, "run", counted_run)
    monkeypatch.setattr(PixelValues, "_open", counted_open)
    monkeypatch.setattr(scout_pairs, "race_routes", counted_race)
    monkeypatch.setattr(scouting, "train_heads", counted_heads)
    return seen


def candidates(place, *names):
    return [str(place / name) for name in names]


def test_each_candidate_runs_once(place, runs, tmp_path):
    three = candidates(place, "resnet", "vit", "swin")
    result = scout(three, place / "data", LOOSE, tmp_path, **FEW)
    assert runs["images"] == dict.fromkeys(("resnet", "vit", "swin"), 40) and runs["pictures"] == 40
    assert len(runs["races"]) == len(result.pairs) == 3 and not runs["heads"] and not result.new_head
    assert result.passes == 3 and result.images == 40 and result.left_out == {}
    assert set(result.sources.values()) == set(three)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pairs.csv",
        "recipe.yaml",
        "scout.json",
        "tradeoff.png",
    ]
    best = result.winner.best(LOOSE)
    assert best.scores["accuracy"] == max(row.scores["accuracy"] for pair in result.pairs for row in pair.rows)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert {recipe.front, recipe.end} == {result.sources[n] for n in (result.winner.front, result.winner.end)}
    assert (recipe.method, recipe.train_split, recipe.eval_split, recipe.new_head) == (
        "fitted_accuracy", "train", "test", False,
    )  # fmt: skip
    with (tmp_path / "pairs.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [(row["front"], row["end"]) for row in rows] == [(pair.front, pair.end) for pair in result.pairs]
    assert float(rows[0]["accuracy"]) == best.scores["accuracy"] and rows[0]["best"] == str(best.route)
    loaded = ScoutResult.load(tmp_path)
    assert loaded == result and "3 pairs" in repr(loaded)


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(place, runs, tmp_path, monkeypatch):
    """After an interruption in the second pass, and one in the second race, no pass and no race is repeated."""
    three = candidates(place, "resnet", "vit", "swin")
    expected = scout(three, place / "data", LOOSE, tmp_path / "whole", **FEW)
    for kind in ("images", "races"):
        runs[kind].clear()
    runs["pictures"], write, races = 0, passes_file.FeatureCache.write, scout_pairs.write_similarity
    begun = []

    def stop_in_the_third(cache, specs, **options):
        begun.append(cache)
        if len(begun) == 4:  # the first holds the images, two the first anchor's samples and logits
            raise KeyboardInterrupt
        return write(cache, specs, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes_file.FeatureCache, "write", stop_in_the_third)
        scout(three, place / "data", LOOSE, tmp_path / "out", **FEW)
    ended, _ = runs["images"]
    assert (runs["images"][ended], runs["pictures"], runs["races"]) == (40, 40, [])

    def stop_in_the_second(similarity, path):
        if len(runs["races"]) == 2:
            raise KeyboardInterrupt
        races(similarity, path)

    runs["images"].clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scout_pairs, "write_similarity", stop_in_the_second)
        scout(three, place / "data", LOOSE, tmp_path / "out", **FEW, resume=True)
    assert runs["images"].keys() == {"resnet", "vit", "swin"} - {ended} and runs["pictures"] == 40
    assert set(runs["images"].values()) == {40}
    result = scout(three, place / "data", LOOSE, tmp_path / "out", **FEW, resume=True)
    assert set(runs["images"].values()) == {40} and runs["pictures"] == 40
    assert len(runs["races"]) == 4 and runs["races"][1] == runs["races"][2], (
        "only the race that did not end runs again"
    )
    assert result.pairs == expected.pairs and not (tmp_path / "out" / ".scout").exists()
    again = scout(three, place / "data", LOOSE, tmp_path / "out", **FEW, resume=True)
    assert again == result and len(runs["races"]) == 4


def test_a_finished_run_is_ranked_for_another_budget(place, runs, tmp_path):
    two = candidates(place, "resnet", "vit", "swin")
    result = scout(two, place / "data", LOOSE, tmp_path, **FEW)
    small = min(row.costs["macs"] for pair in result.pairs for row in pair.rows)
    again = scout(two, place / "data", {"mean_macs": small}, tmp_path, **FEW, resume=True)
    assert again.pairs != () and again.winner.best({"macs": small}).costs["macs"] == small
    assert runs["pictures"] == 40 and ScoutResult.load(tmp_path) == again
    with pytest.raises(BudgetError, match=r"nothing of any pair fits macs<=1; the cheapest is"):
        scout(two, place / "data", {"macs": 1}, tmp_path, **FEW, resume=True)
    with pytest.raises(ValueError, match="another images"):
        scout(two, place / "data", LOOSE, tmp_path, images=30, eval_images=20, head_images=30, resume=True)
    with pytest.raises(ValueError, match="another budget"):
        scout(two, place / "data", {"params": 1e9}, tmp_path, **FEW, resume=True)


def test_what_cannot_be_an_anchor_is_left_out(place, runs, tmp_path):
    five = candidates(place, "resnet", "uncut", "vit", "data", "numbered")
    result = scout(five, place / "data", LOOSE, tmp_path / "own", **FEW, new_head=False)
    assert {path.rsplit("/", 1)[1]: reason for path, reason in result.left_out.items()}.keys() == {
        "uncut", "data", "numbered",
    }  # fmt: skip
    assert "2 are needed" in result.left_out[five[1]] and "does not know" in result.left_out[five[4]]
    assert len(result.pairs) == 1 and not runs["heads"]
    with pytest.raises(ValueError, match=r"1 of the candidates can be an anchor, not two:\n- .*uncut: "):
        scout(five[:2], place / "data", LOOSE, tmp_path / "one", **FEW)


def test_new_heads_where_classes_differ(place, runs, tmp_path, monkeypatch):
    """One head for each candidate, on images that are not those of the passes; an interruption repeats none."""
    two = candidates(place, "resnet", "numbered")

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AnchorPasses, "run", stop)
        scout(two, place / "data", LOOSE, tmp_path, **FEW)
    result = scout(two, place / "data", LOOSE, tmp_path, **FEW, resume=True)
    assert runs["heads"] == ["resnet", "numbered"] and result.new_head and result.winner.front == "resnet"
    assert runs["pictures"] == 30 + 40, "30 images are left for the heads"
    assert load_recipe(tmp_path / "recipe.yaml").new_head is True


def no_pass(*args, **options):
    raise AssertionError("an anchor ran")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"budget": {"macs": 1}}, BudgetError, r"nothing fits macs<=1: the cheapest candidate is 'vit' with"),
        ({"budget": {"latency_ms": 1}}, BudgetError, r"\['latency_ms'\], which would have to be measured"),
        ({"budget": {"maccs": 1}}, ValueError, r"\['maccs'\], which are no costs"),
        ({"order": "up"}, ValueError, r"order='up' is not one of"),
        ({"images": 2}, ValueError, r"images=2 must be at least 8"),
        ({"images": 40, "eval_images": 19}, ValueError, r"eval_images=19 must be at least 20: half of images=40 "),
        (
            {"images": 2000, "eval_images": 1000},
            ValueError,
            r"eval_images=1000 must be at least 1499: half of .* 499 ",
        ),
        ({"eval_split": "train"}, ValueError, "split and eval_split are both 'train'"),
        ({"eval_split": "validation"}, ValueError, r"validation.parquet"),
        ({"flavour": 1}, TypeError, "flavour"),
    ],
)
def test_wrong_options(place, tmp_path, monkeypatch, options, error, text):
    monkeypatch.setattr(AnchorPasses, "run", no_pass)
    with pytest.raises(error, match=text):
        scout(
            candidates(place, "resnet", "vit"), place / "data", out=tmp_path / "out", **{"budget": LOOSE, **options}
        )  # fmt: skip
    assert not (tmp_path / "out" / "scout.json").exists()


@pytest.mark.parametrize("names", [("resnet",), ("resnet", "resnet"), ()])
def test_two_candidates_are_needed(place, tmp_path, names):
    with pytest.raises(ValueError, match="at least two different candidates"):
        scout(candidates(place, *names), place / "data", LOOSE, tmp_path)


def answers_by_hand(place, names):
    """On which of the 60 test images, in the order of scout, candidates are right, by name."""
    rows = load_images(place / "data", "test")
    rows = rows.select(torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist())
    right = {}
    for name in names:
        model = StitchedModelForImageClassification.from_anchors(place / name, dtype="float32")
        data = with_pixel_values(rows, model.image_processor)
        with torch.no_grad():
            logits = model(torch.stack([row["pixel_values"] for row in data])).logits
        right[name] = (logits.argmax(-1) == torch.tensor(rows["label"])).numpy()
    return right


def no_images(passes):
    raise AssertionError("all held-out pictures at once")


def no_pixels(cache, name, read=passes_file.FeatureCache.rows):
    assert name != "pixel_values", "all pictures at once"
    return read(cache, name)


def test_logits_of_more_images_choose_and_others_check(place, runs, tmp_path, monkeypatch):
    """Of 60 held-out images 40 choose, 20 of them stitched routes too, and 20 only check; each anchor runs once."""
    monkeypatch.setattr(scouting, "LEAST_CHECKING", 20)
    monkeypatch.setattr(passes_file.FeatureCache, "rows", no_pixels)
    monkeypatch.setattr(AnchorPasses, "held_images", property(no_images))
    three = candidates(place, "resnet", "vit", "swin")
    result = scout(three, place / "data", LOOSE, tmp_path, images=40, eval_images=60)
    assert runs["images"] == dict.fromkeys(("resnet", "vit", "swin"), 20 + 60) and runs["pictures"] == 80
    assert (result.images, result.eval_images) == (40, 60)
    right = answers_by_hand(place, ("resnet", "vit", "swin"))
    for pair in result.pairs:
        assert pair.profile.metadata["images"] == 40 and pair.profile.metadata["images_of_stitched"] == 20
        for name in (pair.front, pair.end):
            assert pair.alone(name).scores["accuracy"] == pytest.approx(right[name][:40].mean())
    best = result.winner.best(LOOSE)
    share = result.check.accuracy
    assert result.check.images == 20 and result.check.mean_macs == best.costs["macs"]
    more = (20 * share + 2) / 24
    assert result.check.standard_error == pytest.approx(np.sqrt(more * (1 - more) / 24))
    (worse,) = (pair for pair in result.pairs if "resnet" not in (pair.front, pair.end))
    assert not worse.near_best and len(result.near) == 2
    assert ScoutResult.load(tmp_path) == result
    with (tmp_path / "pairs.csv").open() as file:
        assert [row["near_best"] for row in csv.DictReader(file)] == ["True", "True", "False"]
    assert f"{share:.1%} (standard error" in (tmp_path / "recipe.yaml").read_text()


def test_earlier_results_and_other_budgets_are_not_checked(place, tmp_path, monkeypatch):
    monkeypatch.setattr(scouting, "LEAST_CHECKING", 20)
    result = scout(candidates(place, "resnet", "vit"), place / "data", LOOSE, tmp_path, images=40, eval_images=60)
    other = result.ranked({"macs": 2e9})
    assert result.check and (other.check, other.near, other.winner.near_best) == (None, (), None)
    assert result.ranked(LOOSE) == result and other.ranked({"macs": 3e9}).ranked(LOOSE) == result
    two = candidates(place, "resnet", "vit"), place / "data"
    other = scout(*two, {"macs": 2e9}, tmp_path, images=40, eval_images=60, resume=True)
    assert other.check is None and ScoutResult.load(tmp_path) == other
    assert scout(*two, LOOSE, tmp_path, images=40, eval_images=60, resume=True) == result, "as before the other budget"
    data = json.loads((tmp_path / "scout.json").read_text())
    for name in ("check", "eval_images"):
        del data[name]
    del data["job"]["eval_images"], data["pairs"][0]["near_best"]
    (tmp_path / "scout.json").write_text(json.dumps(data))
    old = ScoutResult.load(tmp_path)
    assert (old.check, old.eval_images, old.near) == (None, 0, ()) and old.winner.profile == result.winner.profile
    again = scout(candidates(place, "resnet", "vit"), place / "data", LOOSE, tmp_path, images=40, resume=True)
    assert again == old
    with pytest.raises(ValueError, match="another eval_images"):
        scout(*two, LOOSE, tmp_path, images=40, eval_images=9000, resume=True)


def run_by_hand(judge, route, data):
    """On which images a stitched route is right, as scout fits it."""
    with torch.no_grad():
        logits = run_steps(torch.stack([row["pixel_values"] for row in data]), judge.fit([route])[0][1])
    return (logits.argmax(-1) == torch.tensor([row["labels"] for row in data])).numpy()


def test_a_stitched_route_that_leads_is_run_on_all_images_that_choose(place, tmp_path, monkeypatch):
    """Within half the MACs of the ResNet stitched routes lead; what is reported of the winner is what it gives."""
    monkeypatch.setattr(scouting, "LEAST_CHECKING", 20)
    table = CostTable(memory=False)
    model = StitchedModelForImageClassification.from_anchors(place / "resnet", dtype="float32")
    limits = Budget(macs=0.9 * table.costs(model.steps("resnet[:]"))["macs"])
    options = {
        "split": "train", "eval_split": "test", "images": 40, "eval_images": 60, "head_images": 1, "image_size": None,
        "order": "auto", "new_head": False,
    }  # fmt: skip
    two = candidates(place, "resnet", "swin")
    result, judge = scouting.judge_pairs(two, place / "data", limits, tmp_path, **options)
    best, rows = result.winner.best(limits), load_images(place / "data", "test")
    assert best.route.stitch_points, "the test needs a stitched route that leads"
    rows = rows.select(torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist())
    right = run_by_hand(judge, best.route, with_pixel_values(rows, judge.model.image_processor))
    assert best.scores["accuracy"] == pytest.approx(right[:40].mean())
    assert np.array_equal(judge.raced(best.route), right[:20])
    assert result.winner.profile.metadata["images_of"][str(best.route)] == 40
    assert result.check.accuracy == pytest.approx(right[40:].mean())
    assert best == max(
        (row for row in result.winner.rows if limits.allows(row.costs)),
        key=lambda row: (row.scores["accuracy"], -limits.usage(row.costs)),
    )


class Trials:
    """Runs of routes that were raced on 1,000 images, on 2,000 others, with an accuracy of its own for each route."""

    chosen_on, raced_on, checked_on = range(3000), range(1000), ()

    def __init__(self, true, rows):
        self.true, self.rounds = true, []
        self.right = {row.route: np.arange(1000) < 1000 * row.scores["accuracy"] for row in rows}

    def raced(self, route):
        return self.right[route]

    def run(self, routes, numbers):
        self.rounds.append(list(routes))
        return {route: np.arange(len(numbers)) < self.true[route] * len(numbers) for route in routes}


def reviewed(accuracies, true, limit):
    """The rounds of a review of one pair within so many MACs, and its best route then."""
    rows = stitched_rows(accuracies)
    trials = Trials(dict(zip((row.route for row in rows), true, strict=True)), rows)
    trials.observed = Observations(
        tuple(row.route for row in rows[:2]), "probability", (1.0, 1.0), np.zeros((2, 3000), int),
        np.stack([np.arange(3000) < 3000 * row.scores["accuracy"] for row in rows[:2]]), np.zeros((2, 3000)),
    )  # fmt: skip
    limits = Budget(macs=limit)
    pair = ScoutedPair("large", "small", Profile(tuple(rows), {}, ()))
    result = checks.review(ScoutResult((pair,), limits, {}).ranked(limits), trials)
    return [[rows.index(next(row for row in rows if row.route == each)) for each in some] for some in trials.rounds], (
        result.winner.best(limits)
    )


def test_a_lucky_and_an_unlucky_race_are_mended():
    """A lucky leader falls back; a route just below the best is tried once and rises; those far below are not run."""
    rounds, best = reviewed([0.8, 0.9, 0.83, 0.5, 0.4], [0.8, 0.9, 0.7, 0.5, 0.4], 1.9)
    assert rounds == [[2]] and best.route == Route.alone("small")
    rounds, best = reviewed([0.8, 0.9, 0.79, 0.5, 0.4], [0.8, 0.9, 0.85, 0.5, 0.4], 1.9)
    assert rounds == [[2]] and best.scores["accuracy"] == pytest.approx((790 + 1700) / 3000)
    rounds, _ = reviewed([0.8, 0.9, 0.7, 0.5, 0.4], [0.8, 0.9, 0.9, 0.5, 0.4], 1.9)
    assert rounds == [], "more than two standard errors below"


def test_where_nothing_was_tried_one_route_begins():
    """No anchor is within the budget: one route runs, not all, and another one where it leads then."""
    rows = stitched_rows([0.9, 0.9, 0.8, 0.7, 0.2])
    pair = ScoutedPair("large", "small", Profile(tuple(rows[2:]), {}, ()))
    result = ScoutResult((pair,), Budget(macs=1.9), {})
    assert checks._leaders(result, {}, 1000) == {0: rows[2].route}
    assert checks._leaders(result, {rows[2].route: np.ones(3000, bool)}, 1000) == {}


def test_missing_logits_or_samples_are_made_again(place, runs, tmp_path):
    """Where logits are lost all images run, where samples are only those that samples are taken of."""
    model = StitchedModelForImageClassification.from_anchors(*candidates(place, "resnet", "vit"), dtype="float32")
    rows = with_pixel_values(load_images(place / "data", "test"), model.image_processor)
    passes = AnchorPasses(model, cache_pictures(model, rows, tmp_path / "images"), tmp_path / "anchors", sampled=40)
    assert passes.run("vit") and runs["images"].pop("vit") == 60
    logits, name = passes.logits("vit"), next(iter(passes.needed("vit").values()))
    assert logits.shape == (60, CLASSES) and len(passes.cache("vit").rows(name)) == 40
    (passes.logits_cache("vit").folder / "logits.json").unlink()
    assert passes.run("vit") and runs["images"].pop("vit") == 60 and torch.equal(passes.logits("vit"), logits)
    (passes.cache("vit").folder / f"{name}.json").unlink()
    assert passes.run("vit") and runs["images"].pop("vit") == 40 and not passes.run("vit")


def test_near_equals_by_plain_arithmetic():
    """One-sided at 95 %: Wald's bound of the paired difference with half an image in each cell."""
    first = np.arange(1000) < 800
    for count in range(0, 60, 3):
        other = first.copy()
        other[: count + 10], other[900:910] = False, True  # loses count + 10 images, gains 10
        lost, won = count + 10, 10
        variance = (lost + won + 1 - (lost - won) ** 2 / 1002) / 1002**2
        worse = (lost - won) / 1002 - 1.6448536 * np.sqrt(variance) > 0
        assert checks._is_near(other, first, 0.05) != worse
    assert checks._is_near(first[:30], first, 0.05)


class Drawn:
    """Answers of pairs that are equally good in truth, where one image is hard for all; each pair is one anchor."""

    def __init__(self, rng, pairs, images):
        self.right = (0.84 * rng.standard_normal(images) + 0.54 * rng.standard_normal((pairs, images))) < 1.04
        routes = tuple(Route.alone(f"a{number}") for number in range(pairs))
        zeros = np.zeros(self.right.shape)
        self.observed = Observations(routes, "probability", (1.0,) * pairs, zeros.astype(int), self.right, zeros)
        rows = [
            ProfiledRoute(route, {"macs": 1.0}, {"accuracy": right.mean().item()})
            for route, right in zip(routes, self.right, strict=True)
        ]
        scouted = (ScoutedPair(f"a{n}", f"a{n}", Profile((row,), {}, ())) for n, row in enumerate(rows))
        self.result = ScoutResult(tuple(scouted), Budget(macs=2.0), {}).ranked({"macs": 2.0})


def test_the_best_of_fifty_equal_pairs_is_marked():
    """Of fifty equals the first may be called the best; it has to be marked in 95 % of the draws of images."""
    rng, marked = np.random.default_rng(0), 0
    for _ in range(100):
        drawn = Drawn(rng, 50, 1000)
        marked += "a0" in {pair.front for pair in checks._mark_near(drawn.result, drawn, {}).near}
    assert marked >= 95, "at 5 % for each pair it is about half"


def stitched_rows(accuracies):
    """Rows of two anchors of 1 and 2 MACs, and of stitched routes between them, the cheapest first."""
    routes = [Route.alone("small"), Route.alone("large")]
    routes += [Route((Segment("large", 0, n), Segment("small", n))) for n in range(1, len(accuracies) - 1)]
    macs = [1.0, 2.0, *(1 + n / (len(accuracies) - 1) for n in range(1, len(accuracies) - 1))]
    return [
        ProfiledRoute(route, {"macs": each, "mean_macs": each}, {"accuracy": accuracy})
        for route, each, accuracy in zip(routes, macs, accuracies, strict=True)
    ]


def test_the_gap_closed_is_not_chosen_anew_on_other_images():
    """Entries that are equal in truth close half the gap in the median, where the best of each draw close far more."""
    true, rng = np.array([0.7, 0.8, *[0.75] * 8]), np.random.default_rng(0)
    rows = stitched_rows([0.7, 0.8, *(0.75 + n / 1000 for n in range(8))])  # the front of prediction has all of them
    front, macs = sorted(rows, key=lambda row: row.costs["macs"]), [row.costs["macs"] for row in rows]
    found, anew = [], []
    for _ in range(60):
        right = rng.random((len(true), 600)) < true[:, None]
        found.append(checks._gap(rows, front, macs, right)[0])
        scored = zip(rows, right.mean(1), strict=True)
        anew.append(measure_gap([replace(row, scores={"accuracy": a}) for row, a in scored], "macs", "accuracy")[0])
    by_hand = 0.5 * 8 / 9
    assert None not in anew and found.count(None) < 10
    assert np.median([each for each in found if each is not None]) == pytest.approx(by_hand, abs=0.05)
    assert np.median(anew) > by_hand + 0.1


def test_a_gap_within_the_noise_is_not_reported():
    """Both or neither: where the dearer anchor is hardly better there is no gap to close, and no error of it."""
    right = np.arange(300)[None].repeat(2, 0) < 240
    right[1, 250:270], right[1, :19] = True, False  # one image more
    rows = stitched_rows(right.mean(1))
    assert checks._gap(rows, rows, [1.0, 2.0], right) == (None, None)
    right[1, :19] = True
    gap, error = checks._gap(rows, rows, [1.0, 2.0], right)
    assert gap == 0 and error is not None


def test_a_share_of_all_has_an_error():
    assert checks.standard_error(20, 20) == pytest.approx(np.sqrt(22 / 24 * 2 / 24 / 24))


@pytest.mark.slow
def test_a_cascade_that_wins_is_checked(tmp_path, monkeypatch):
    """Its accuracy, mean MACs and the gap closed, with numpy from logits of the images that chose nothing."""
    monkeypatch.setattr(checks, "DEFINED", 0.5)  # these anchors differ by little
    limit = {"mean_macs": 12e6}
    result = scout([str(FRONT), str(END)], DATA, limit, tmp_path, images=200, eval_images=900)
    best, check = result.winner.best(limit), result.check
    assert isinstance(best.route, Cascade) and check.images == 300
    rows = load_images(DATA, "test")
    rows = rows.select(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[600:900].tolist())
    labels, logits = np.array(rows["label"]), {}
    for source in (FRONT, END):
        model = StitchedModelForImageClassification.from_anchors(source, dtype="float32")
        data = with_pixel_values(rows, model.image_processor)
        with torch.no_grad():
            logits[f"{next(iter(model.anchors))}[:]"] = np.concatenate(
                [model(batch["pixel_values"]).logits.numpy() for batch in batches(data, 100)]
            )

    def answer(row):
        """Accuracy and mean MACs."""
        if isinstance(row.route, Cascade):
            small, large = (logits[str(route)] for route in row.route.routes)
            scaled = small.astype(float) / (row.route.temperatures or (1.0,))[0]
            p = np.exp(scaled - scaled.max(1, keepdims=True))
            sure = (p / p.sum(1, keepdims=True)).max(1) >= row.route.thresholds[0]
            stages = row.stage_costs["macs"]
            right = np.where(sure, small.argmax(1) == labels, large.argmax(1) == labels)
            return right.mean(), stages[0] + (~sure).mean() * stages[1]
        return (logits[str(row.route)].argmax(1) == labels).mean(), row.costs["macs"]

    assert (check.accuracy, check.mean_macs) == pytest.approx(answer(best))
    more = (300 * check.accuracy + 2) / 304
    assert check.standard_error == pytest.approx(np.sqrt(more * (1 - more) / 304))
    front = result.winner.front_rows()
    assert not any(isinstance(row.route, Route) and row.route.stitch_points for row in front), "for logits to do"
    (small, low), (large, high) = sorted(
        (cost, score) for score, cost in (answer(result.winner.alone(name)) for name in result.sources)
    )
    area, at, top = 0.0, small, low
    for score, cost in [*map(answer, front), (0.0, large)]:  # in the order of prediction, each entry as it was chosen
        cost = min(max(cost, at), large)
        area, at, top = area + (cost - at) / (large - small) * (top - low) / (high - low), cost, score
    assert check.gap_closed == pytest.approx(area) and 0 < check.gap_error < 0.5


@pytest.fixture
def judge(place, tmp_path):
    """The judge of two tiny anchors, in both directions, without a race."""
    model = StitchedModelForImageClassification.from_anchors(
        *candidates(place, "resnet", "vit"), order="given", dtype="float32"
    )
    rows = load_images(place / "data", "test").select(range(40))
    pictures = cache_pictures(model, with_pixel_values(rows, model.image_processor), tmp_path / "images")
    passes = AnchorPasses(model, pictures, tmp_path / "anchors", "auto")
    assert [passes.run(name) for name in model.anchors] == [True, True]
    assert not any(map(passes.run, model.anchors))
    return PairJudge(passes, tmp_path / "pairs", error=0)


def test_samples_on_disk_give_what_the_selector_finds(judge):
    """In memory, from the pictures themselves, and from the caches: the same accuracies of the same routes."""
    model, passes = judge.model, judge.passes
    tensors = torch.utils.data.TensorDataset(passes.pictures.rows("pixel_values"), passes.labels)
    found = model.compare(tensors, ["fitted_accuracy"], order="auto")["fitted_accuracy"]
    costs = model.route_costs()
    for expected in found:
        pair = expected.front, expected.end
        cached = FittedAccuracy(passes.pairs[pair].pair, passes.pairs[pair])
        assert np.array_equal(cached.values(), expected.values)
        assert cached.settings() == {key: value for key, value in expected.settings.items() if key != "method"}
        raced, most = judge.race(*pair).values, judge.alone["resnet"]["macs"]
        ran = ~np.ma.getmaskarray(raced)
        assert ran.any() and np.array_equal(raced[ran], expected.values[ran])
        for (i, j), value in np.ndenumerate(ran):
            route = Route.parse(f"{pair[0]}[:{i + 1}] + {pair[1]}[{j + 1}:]")
            assert value == (costs(route)["macs"] < most), "with no error allowed only dear routes are left out"
        for name in pair:
            assert judge.right[name].mean() == pytest.approx(expected.settings["anchors"][name])


def by_hand(front, end, data, held):
    """Mean MACs and accuracy of all that a pair offers by name, from a model of the pair alone."""
    model = StitchedModelForImageClassification.from_anchors(front, end, dtype="float32")
    ready = with_pixel_values(data, model.image_processor)
    (found,) = model.compare(ready, ["fitted_accuracy"], kept_images=len(data), max_images=None)["fitted_accuracy"]
    profile = model.profile(with_pixel_values(held, model.image_processor), cascades=True)
    entries = {str(row.route): (row.costs["mean_macs"], row.scores["accuracy"]) for row in profile.rows}
    most, costs = max(row.costs["macs"] for row in profile.routes), model.route_costs()
    for (i, j), value in np.ndenumerate(found.values):
        route = Route.parse(f"{found.front}[:{i + 1}] + {found.end}[{j + 1}:]")
        if costs(route)["macs"] < most:
            entries[str(route)] = costs(route)["macs"], float(value)
    return entries


@pytest.mark.slow
def test_the_winner_is_that_of_a_search_by_hand(tmp_path, monkeypatch):
    """Of four candidates, two of them disturbed copies of the demo's, at several budgets, in all six pairs."""
    places = {"resnet_fashion": FRONT, "vit_fashion": END}
    for name, source in [*places.items()]:
        anchor = load_anchor(source, dtype=torch.float32)
        rng = torch.Generator().manual_seed(0)
        for parameter in anchor.model.parameters():
            if parameter.dim() > 1:
                parameter += parameter.std() * 0.25 * torch.randn(parameter.shape, generator=rng)
        places[f"{name}_2"] = tmp_path / f"{name}_2"
        anchor.model.save_pretrained(places[f"{name}_2"])
        if "vit" in name:
            ViTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(places[f"{name}_2"])
    budgets = (5.5e6, 10e6, 20e6, 40e6)
    monkeypatch.setattr(scout_pairs, "NEAR_BUDGET", ())  # a profile by hand has no cascades for a budget
    few = {"images": 200, "eval_images": 100}
    result = scout([*map(str, places.values())], DATA, {"mean_macs": budgets[0]}, tmp_path / "out", **few)
    fitted, held = (load_images(DATA, split) for split in ("train", "test"))
    order = [torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:100] for rows in (fitted, held)]
    fitted, held = (rows.select(each.tolist()) for rows, each in zip((fitted, held), order, strict=True))
    both = concatenate_datasets([fitted, held]).select([n // 2 + n % 2 * 100 for n in range(200)])
    hand = {frozenset(pair): by_hand(*map(places.get, pair), both, held) for pair in combinations(places, 2)}
    for budget in budgets:
        best = {
            pair: max((score, -cost) for cost, score in [(0.0, -1.0), *entries.values()] if cost <= budget)
            for pair, entries in hand.items()
        }
        ranked = result.ranked({"mean_macs": budget})
        for pair in ranked.pairs:
            found, entries = pair.best({"mean_macs": budget}), hand[frozenset((pair.front, pair.end))]
            ours = (-1.0, 0.0) if found is None else (found.scores["accuracy"], -found.costs["mean_macs"])
            assert ours == pytest.approx(best[frozenset((pair.front, pair.end))])
            for row in pair.rows:
                assert (row.costs["mean_macs"], row.scores["accuracy"]) == pytest.approx(entries[str(row.route)])
        assert best[frozenset((ranked.winner.front, ranked.winner.end))] == max(best.values())


def test_the_check_is_printed(place, tmp_path, monkeypatch):
    monkeypatch.setattr(scouting, "LEAST_CHECKING", 20)
    common = [
        *candidates(place, "resnet", "vit"),
        "--dataset",
        place / "data",
        "--images",
        40,
        "--out",
        tmp_path / "a",
    ]
    common += ["--eval-images", 60]
    result = CliRunner().invoke(app, ["scout", *map(str, common), "--budget", "macs=1e9"])
    check, text = ScoutResult.load(tmp_path / "a").check, " ".join(result.stdout.split())
    error = f"{100 * check.standard_error:.1f}"
    assert f"the first pair on 20 images that chose nothing: {100 * check.accuracy:.1f} ± {error} %" in text
    assert "2 anchors, one pass over 80 images each" in text
    macs = f"{check.mean_macs / 1e6:.1f}"
    assert f"it takes {macs} M mean MACs there (budget macs<=1e+09)" in text and "not 40" not in text
    assert f"where it takes {check.mean_macs:.4g} mean MACs" in (tmp_path / "a" / "recipe.yaml").read_text()
    again = CliRunner().invoke(app, ["scout", *map(str, common), "--budget", "macs=2e9", "--resume"])
    assert "near equals are not known, and the first pair is not checked" in " ".join(again.stdout.split())


def test_a_short_split_is_printed(place, tmp_path):
    """Of 60 training and 60 test images no 100 of each can be taken."""
    arguments = [
        *candidates(place, "resnet", "vit"),
        "--dataset",
        place / "data",
        "--images",
        200,
        "--out",
        tmp_path / "a",
    ]
    result = CliRunner().invoke(app, ["scout", *map(str, arguments), "--budget", "macs=1e9"])
    text = "stitched routes were fitted and tested on 120 images, not 200: the splits have no more"
    assert text in " ".join(result.stdout.split()) and ScoutResult.load(tmp_path / "a").images == 120


def test_by_command(place, tmp_path):
    out = tmp_path / "scouted"
    common = [*candidates(place, "resnet", "vit"), "--dataset", place / "data", "--images", 40, "--out", out]
    common += ["--eval-images", 20]
    result = CliRunner().invoke(app, ["scout", *map(str, common), "--budget", "macs=1e9"])
    assert result.exit_code == 0, result.output
    assert "1 pairs" in result.stdout and "2 anchors, one pass over 40 images each" in result.stdout
    assert f"restnet-hf train {out / 'recipe.yaml'}" in " ".join(result.stdout.split())
    assert "20 images are too few for the comparison of stitched routes" in result.stderr
    text = " ".join(result.stdout.split())
    assert "~: 1 of 1 pairs are not significantly worse than the first; the best is among them (95 %)" in text
    assert "the first pair is not checked: 20 held-out images are too few" in text
    again = CliRunner().invoke(app, ["scout", *map(str, common), "--budget", "macs=1e9"])
    assert again.exit_code == 1 and "exists already" in again.stderr
    for path in out.iterdir():
        os.utime(path, (0, 0))
    resumed = CliRunner().invoke(app, ["scout", *map(str, common), "--budget", "macs=1e9", "--resume"])
    assert resumed.exit_code == 0 and "nothing is left to resume" in resumed.stdout
    none = CliRunner().invoke(app, ["scout", *map(str, common), "--budget", "macs=1", "--overwrite"])
    assert none.exit_code == 1 and "nothing fits macs<=1" in none.stderr
    typo = CliRunner().invoke(app, ["scout", str(place / "resnt"), str(place / "vit"), *map(str, common[2:])])
    assert typo.exit_code == 2 and "budget" in typo.stderr


@pytest.mark.slow
def test_two_processes_share_the_work(place, tmp_path):
    """Heads, passes and races by two processes give what one gives."""
    arguments = ["scout", *candidates(place, "resnet", "vit", "numbered"), "--dataset", place / "data"]
    arguments += ["--budget", "macs=1e9", "--images", 40, "--eval-images", 20, "--head-images", 30]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, run in (("two", launch), ("one", [sys.executable])):
        done = subprocess.run(
            [*run, "-m", "restnet_hf.cli", *map(str, arguments), "--out", str(tmp_path / name)],
            capture_output=True, text=True, timeout=600,
            env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("3 pairs, best first") == 1
    two, one = (ScoutResult.load(tmp_path / name) for name in ("two", "one"))
    assert two.new_head and two.pairs == one.pairs and two.sources == one.sources


def test_a_missing_folder_is_named(place, tmp_path):
    arguments = ["scout", str(place / "resnt"), str(place / "vit"), "--dataset", str(place / "data")]
    result = CliRunner().invoke(app, [*arguments, "--budget", "macs=1e9", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "there is no such folder" in result.stderr and "resnt" in result.stderr
