"""A model compares its anchors and chooses stitches: by any selector, both ways, under a budget, remembered."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, make_anchor, save_model
from several_processes import run_in_processes

from restnet_hf import (
    BudgetError,
    Profile,
    ProfiledRoute,
    Route,
    StitchConfig,
    StitchedModelForImageClassification,
    TrainArgs,
    train,
)
from restnet_hf.selection import mixin
from restnet_hf.selection.dropping import beaten_routes
from restnet_hf.selection.pairs import draw_images
from restnet_hf.selection.plots import plot_similarity
from restnet_hf.selection.selectors import SELECTORS, Position


def build(**options):
    return StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), order="given", **options
    )


@pytest.fixture
def noise():
    return torch.randn(24, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def labelled(images):
    return [{"pixel_values": images, "labels": torch.arange(len(images)) % CLASSES}]


@pytest.mark.parametrize("order", ["given", "auto"])
@pytest.mark.parametrize("method", SELECTORS)
def test_every_selector_selects(noise, method, order):
    model = build()
    chosen = model.select_stitches(noise, method, max_routes=4, order=order)
    assert 1 <= len(chosen) <= 4 and list(model.routes) == chosen
    assert [row.route for row in model.ranking if row.route == model.active_route]
    fronts = {row.route.segments[0].anchor for row in model.ranking}
    assert fronts == ({"resnet"} if order == "given" else {"resnet", "vit"})
    assert model.fit_stitches(noise).keys() == set(model.stitches)
    known = {row.route: row.costs for row in model.profile().routes}
    ranked = [row for row in model.ranking if row.route in known]
    assert ranked and all(row.costs.items() <= known[row.route].items() for row in ranked), "costs were predicted"


class Diagonal(Position):
    """A selector from outside, which no table has."""

    def __init__(self, pair, samples, *, power=1.0):
        super().__init__(pair, samples)
        self.power = power

    def values(self):
        return super().values() ** self.power


def test_a_selector_by_its_class(noise):
    """Its options are the call's; a class of the table is the row itself."""
    model = build()
    chosen = model.select_stitches(noise, Diagonal, max_routes=3, power=2.0)
    assert [*model.routes] == chosen and model.similarity.settings["method"] == "Diagonal"
    compared = model.compare(noise, [Diagonal, Position, "cka"])
    assert [*compared] == [Diagonal, "position", "cka"]
    with pytest.raises(ValueError, match="Diagonal.*unexpected keyword argument 'powr'"):
        model.select_stitches(noise, Diagonal, powr=2.0)
    for wrong in ("ckaa", int, Diagonal(model._pairs("given", [], StitchConfig())[0], None)):
        with pytest.raises(ValueError, match="is not one of .*'position'.*, nor the class of a Selector"):
            model.select_stitches(noise, wrong)


def test_budget(noise):
    model = build()
    model.select_stitches(noise, "position", max_routes=3)
    middle = np.median([row.costs["macs"] for row in model.ranking])
    again = build()
    chosen = again.select_stitches(noise, "position", max_routes=3, budget={"macs": middle})
    costs = again.route_costs()
    assert chosen and all(costs(route)["macs"] <= middle for route in chosen)
    with pytest.raises(ValueError, match="no stitched route fits params<=10"):
        again.select_stitches(noise, "position", budget={"params": 10})


def test_nothing_dearer_than_the_anchors(noise):
    model = build()
    chosen = model.select_stitches(noise, "position", max_routes=99)
    alone = max(row.costs["macs"] for row in model.profile(routes=["resnet[:]", "vit[:]"]).routes)
    assert all(row.costs["macs"] <= alone for row in model.ranking if row.route in chosen)
    assert any(row.costs["macs"] > alone for row in model.ranking), "or this shows nothing"


def test_one_pass_serves_all(noise):
    """All selectors at once give what each gives alone."""
    model, batches = build(), list(noise.split(8))
    together = model.compare(batches, list(SELECTORS), order="auto")
    for name in SELECTORS:
        for a, b in zip(together[name], model.compare(batches, [name], order="auto")[name], strict=True):
            assert np.array_equal(a.values, b.values) and (a.front, a.end) == (b.front, b.end)


def test_labels_are_used(noise):
    model = build()
    with_labels = model.compare(labelled(noise), ["fitted_accuracy"])["fitted_accuracy"][0]
    without = model.compare(noise, ["fitted_accuracy"])["fitted_accuracy"][0]
    assert with_labels.settings["labels"] and not without.settings["labels"]
    assert not np.array_equal(with_labels.values, without.values)
    with pytest.raises(ValueError, match="labels run from 0 to 99"):
        model.compare([{"pixel_values": noise[:8], "labels": torch.tensor([99] + [0] * 7)}], ["cka"])


def test_new_heads_must_be_trained_first(noise):
    model = build(num_labels=3)
    for name in ("kl_probe", "fitted_accuracy"):
        with pytest.raises(ValueError, match=r"new heads of \['resnet', 'vit'\] are not trained yet"):
            model.select_stitches(noise, name)
    model.select_stitches(noise, "cka")
    rows = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(noise)]
    train(model, rows, TrainArgs(num_train_epochs=1, distillation=0.0), ["resnet[:]", "vit[:]"])
    assert model.compare(noise, ["fitted_accuracy"])["fitted_accuracy"][0].values.shape == (6, 3)


def test_remembered(noise, monkeypatch):
    """The same anchors, images and settings are not computed again; anything else is."""
    runs, noise = [], noise + 7  # seen by no other test
    real = mixin.compare
    monkeypatch.setattr(
        mixin,
        "compare",
        lambda pairs, images, methods, kept: runs.append(methods) or real(pairs, images, methods, kept),
    )
    first = build().compare(noise, ["cka", "position"])
    assert runs == [{"cka": {}, "position": {}}]
    again = build().compare(noise.clone(), ["cka", "position", "lstsq"])
    assert runs[1:] == [{"lstsq": {}}], "only what is not known yet"
    for name in first:
        assert np.array_equal(first[name][0].values, again[name][0].values)
        assert dict(first[name][0].settings) == dict(again[name][0].settings)
    build().compare(noise + 1, ["cka"])
    build().compare(noise, {"cka": {"estimator": "biased"}})
    build().compare(noise, ["cka"], batch_size=8)
    StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet", seed=5), make_anchor("vit", seed=1), order="given"
    ).compare(noise, ["cka"])
    assert len(runs) == 6
    batches = list(noise.split(8))  # nothing distinguishes these from other batches
    build().compare(batches, ["cka"]), build().compare(batches, ["cka"])
    assert len(runs) == 8

    class Mine(SELECTORS["position"]):
        """A selector from outside, whose code we do not hash."""

    monkeypatch.setitem(SELECTORS, "mine", Mine)
    build().compare(noise, ["mine"]), build().compare(noise, ["mine", "cka"])
    assert runs[8:] == [{"mine": {}}, {"mine": {}}]
    with torch.autocast("cpu", torch.bfloat16):
        half = build().compare(noise, ["cka"])["cka"][0].values
    assert runs[10:] == [{"cka": {}}] and not np.array_equal(half, first["cka"][0].values)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY"])
def test_a_damaged_memory_is_made_anew(noise, damage):
    noise = noise + len(damage)  # a file for each
    expected = build().compare(noise * 3, ["cka"])["cka"][0]
    files = (Path(os.environ["HF_ASSETS_CACHE"]) / "restnet_hf" / "similarities").rglob("*.npz")
    file = max(files, key=lambda file: file.stat().st_mtime)
    file.write_bytes(damage)
    assert np.array_equal(build().compare(noise * 3, ["cka"])["cka"][0].values, expected.values)
    assert file.read_bytes() != damage


def test_bad_order(noise):
    with pytest.raises(ValueError, match="order='both' is not one of"):
        build().compare(noise, order="both")


def test_auto_takes_the_better_direction(noise):
    """Of all routes of both directions that cost no more than the anchors, the one with the highest value."""
    model = build()
    rows = model.compare(labelled(noise), ["fitted_accuracy"], order="auto")["fitted_accuracy"]
    (chosen,) = model.select_stitches(labelled(noise), "fitted_accuracy", max_routes=1, order="auto")
    most = max(row.costs["macs"] for row in model.profile(routes=["resnet[:]", "vit[:]"]).routes)
    values = [row.value(each.route) for each in model.ranking for row in rows if each.costs["macs"] <= most]
    assert max(value for value in values if value is not None) in [row.value(chosen) for row in rows]


PROCESSES = """
import json
from conftest import SIZE  # first: each process gets a cache of its own
import torch
from accelerate import PartialState
from torch.utils.data import TensorDataset
from test_selection_mixin import build
from restnet_hf.selection import mixin
from restnet_hf.selection.selectors import SELECTORS

noise = torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
batches = [{"pixel_values": part, "labels": torch.arange(len(part)) % 5} for part in noise.split(8)]
compute, computed = mixin.compare, []
mixin.compare = lambda *args: computed.append(1) or compute(*args)  # counts what is not remembered


def compared(data, **options):
    found = build().compare(data, list(SELECTORS), order="auto", kept_images=28, **options)
    return {f"{name} {s.front}": [s.values.tolist(), dict(s.settings)] for name, both in found.items() for s in both}


rows = TensorDataset(noise, torch.where(torch.arange(40) % 7 == 3, -100, torch.arange(40) % 5))
values = [compared(batches), compared(rows, batch_size=8), compared(rows, batch_size=32, max_images=36)]
before = len(computed)
again = compared(rows, batch_size=8)
assert again == values[1], "a comparison that was remembered is another"
if PartialState().is_main_process:
    print(json.dumps([PartialState().num_processes, values, [before, len(computed)]]))
"""


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path):
    """Also where some images have no label, or batches are fewer than processes; what was compared is remembered."""
    found = run_in_processes(PROCESSES, tmp_path)
    assert [processes for processes, *_ in found] == [1, 2, 3]
    assert [computed for *_, computed in found] == [[3, 3]] * 3
    for _, several, _ in found[1:]:
        for one, other in zip(found[0][1], several, strict=True):
            assert one.keys() == other.keys() and len(one) == 2 * len(SELECTORS)
            for name, (values, settings) in one.items():
                assert settings == other[name][1]
                assert np.allclose(values, other[name][0], atol=1e-12), name


def test_budgets_of_other_costs(noise):
    """Memory is counted where a budget limits it; what is not known here is an error at once."""
    model = build()
    model.select_stitches(noise, "position", 2)
    costs = {row.route: model.route_costs(memory=True)(row.route)["memory_mb"] for row in model.ranking}
    limit = sorted(costs.values())[len(costs) // 2]
    chosen = build().select_stitches(noise, "position", 2, budget={"memory_mb": limit})
    assert chosen and all(costs[route] <= limit for route in chosen)
    for budget in ({"latency_ms": 5.0}, {"energy_j": 1.0}):
        with pytest.raises(BudgetError, match="only .*'macs'.* are known here"):
            build().select_stitches(noise, "position", 2, budget=budget)
        with pytest.raises(BudgetError, match="only .*'macs'.* are known here"):
            build().add_family("skip", budget=budget, max_routes=2)


def scored(model, *points):
    """A profile of the model with given MACs and accuracies, in the order of its routes."""
    pairs = zip(model.all_routes, points, strict=True)
    rows = [ProfiledRoute(route, {"macs": macs}, {"accuracy": score}) for route, (macs, score) in pairs]
    return model.record_profile(rows)


def test_drop_dominated(noise):
    """What an anchor or a stitched route beats goes, shared stitches stay, and the best within the cost is active."""
    model = build()
    both = "resnet[:5] +both vit[2:]", "resnet[:5] +both vit[3:]"
    a, b, c, d = model.add_stitches(["resnet[:1] + vit[3:]", "resnet[:3] + vit[3:]", *both])
    model.set_route(b)
    scored(model, (100, 0.9), (10, 0.5), (20, 0.7), (30, 0.65), (90, 0.8), (80, 0.6))
    assert beaten_routes(model.profiled) == {b: a, d: a}
    assert model.drop_dominated() == [b, d] and [*model.routes] == [a, c] and model.active_route == a
    assert {*model.stitches} == {a.stitch_points[0].name, c.stitch_points[0].name} and len(model.profiled) == 4
    assert model.drop_dominated() == [] and model.active_route == a
    model.set_route(c)
    scored(model, (100, 0.9), (10, 0.8), (20, 0.7), (90, 0.8))
    assert model.drop_dominated() == [a, c] and str(model.active_route) == "vit[:]" and not model.stitches


def three(**options):
    return StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), make_anchor("plain"), order="given", **options
    )


def test_any_two_of_several_anchors(noise, tmp_path):
    """One selection takes the best routes between any two; pairs= says which, and order= in which directions."""
    model = three()
    chosen = model.select_stitches(labelled(noise), "fitted_accuracy", max_routes=6, order="auto")
    ranked = {tuple(s.anchor for s in row.route.segments) for row in model.ranking}
    assert len(ranked) == len(model.similarities) == 6 and model.similarity is model.similarities[0]
    assert {*model.routes} == {*chosen} and len({(r.segments[0].anchor, r.segments[1].anchor) for r in chosen}) > 1
    values = {row.route: row.score for row in model.ranking}
    assert all(next(v for s in model.similarities if (v := s.value(r)) is not None) == values[r] for r in chosen)
    plot_similarity(model.similarities, chosen, tmp_path / "all.png")
    assert len(model.compare(noise, ["position"], pairs="adjacent")["position"]) == 2
    ends = model.compare(noise, ["position"], "auto", pairs="ends")["position"]
    assert [(s.front, s.end) for s in ends] == [("resnet", "plain"), ("plain", "resnet")]
    with pytest.raises(ValueError, match=r"pairs='all' is not one of \('any', 'adjacent', 'ends'\)"):
        model.select_stitches(noise, pairs="all")


def test_a_cap_on_images(noise):
    """Drawn from all of the data, which may be sorted by class; a stream's first ones."""
    many = noise.repeat(4, 1, 1, 1) + torch.arange(96)[:, None, None, None]
    capped = build().compare(many, ["cka"], kept_images=16, max_images=40)["cka"][0]
    assert capped.settings["images"] == 40 and build().compare(noise, ["cka"])["cka"][0].settings["images"] == 24
    stream = build().compare(list(many.split(16)), ["cka"], kept_images=16, max_images=40)["cka"][0]
    assert stream.settings["images"] == 40 and not np.allclose(stream.values, capped.values)
    drawn = draw_images(many, 16, 40)
    numbers = drawn[:16].mean((1, 2, 3)).round().tolist()
    assert len(drawn) == 40 and min(numbers) < 24 and max(numbers) > 72 and draw_images(many, 96, 40) is many
    with pytest.raises(ValueError, match="max_images=0 must be at least 1"):
        build().compare(noise, max_images=0)


def test_nothing_stitched_is_left(tmp_path):
    """The model is still one, and saves and loads."""
    for name in ("resnet", "vit"):
        save_model(name, tmp_path / name)
    model = StitchedModelForImageClassification.from_anchors(tmp_path / "resnet", tmp_path / "vit", order="given")
    model.set_route(model.add_stitch("resnet[:6] + vit[1:]"))
    scored(model, (100, 0.9), (10, 0.9), (50, 0.9))
    assert len(model.drop_dominated()) == 1 and not model.routes and len(model.active_route.segments) == 1
    model.save_pretrained(tmp_path / "adapter")
    again = StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert again.active_route == model.active_route and not again.routes


def test_what_cannot_be_dropped(pair):
    with pytest.raises(BudgetError, match=r"not measured yet; call profile\(data\)"):
        pair.drop_dominated()
    pair.profile()
    with pytest.raises(BudgetError, match=r"no scores to compare; call profile\(data\)"):
        pair.drop_dominated()
    with pytest.raises(BudgetError, match="no latency_ms for its routes"):
        pair.drop_dominated("latency_ms")
    with pytest.raises(ValueError, match="no costs; the costs are"):
        pair.drop_dominated("speed")


def test_adapters_are_compared_with_their_own():
    """The routes of another task neither beat nor are beaten."""
    rows = [("a[:]", 30, 0.9), ("b[:]", 5, 0.5), ("a[:1] + b[1:]", 10, 0.6), ("night: a[:1] + b[1:]", 10, 0.55)]
    rows += [("night: a[:2] + b[1:]", 15, 0.52), ("night: a[:3] + b[1:]", 20, 0.95)]
    profile = Profile(tuple(ProfiledRoute(Route.parse(r), {"macs": m}, {"accuracy": s}) for r, m, s in rows))
    assert [*map(str, beaten_routes(profile))] == ["night: a[:2] + b[1:]"]
    head = ProfiledRoute(Route.parse("night: b[:]"), {"macs": 5}, {"accuracy": 0.99})
    assert len(beaten_routes(Profile((*profile.routes, head)))) == 3
