"""Several published adapters live on the same anchors: loaded beside each other, switched between, freed."""

import gc
import json
import weakref

import pytest
import torch
from conftest import save_model

from restnet_hf import StitchConfig, StitchedModelForImageClassification, TrainArgs, load_anchor, train
from restnet_hf.hub.cards import make_card


ROUTES = ("resnet[:2] + vit[1:]", "resnet[:4] + vit[2:]")


def make(folder, seed=0, names=("resnet", "vit"), **options):
    """An adapter whose stitches are random in its own way, on the anchors in a folder."""
    anchors = [load_anchor(folder / kind, name=name) for kind, name in zip(("resnet", "vit"), names, strict=True)]
    torch.manual_seed(seed)
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given", **options)
    for route in ROUTES:
        model.set_route(model.add_stitch(route.replace("resnet", names[0]).replace("vit", names[1])))
    with torch.no_grad():
        for parameter in [*model.stitches.parameters(), *model.heads.parameters()]:
            parameter.normal_(0, 0.3)
    return model


def profiled(model, images, **metadata):
    model.profile([(images, torch.arange(len(images)) % model.config.num_labels)], metadata=metadata)
    return model


@pytest.fixture
def folder(tmp_path):
    for name in ("resnet", "vit"):
        save_model(name, tmp_path / name)
    return tmp_path


@torch.no_grad()
def logits(model, images, route):
    model.set_route(route)
    return model(images).logits


@pytest.mark.parametrize("options", [{}, {"num_labels": 3}])
@pytest.mark.parametrize("names", [("resnet", "vit"), ("big", "small")])
def test_beside_the_first(folder, images, names, options):
    """Each gives its own logits on the same anchors, whatever its author called them, also saved and loaded again."""
    first, second = make(folder, 0, **options), make(folder, 1, names, **options)
    for model, name in ((first, "first"), (second, "second")):
        profiled(model, images, dataset="noise").save_pretrained(folder / name)
    model = StitchedModelForImageClassification.from_pretrained(folder / "first")
    added = model.load_stitch(folder / "second", "night")
    assert list(map(str, added)) == [f"night: {route}" for route in ROUTES]
    for again in (model, None):
        if again is None:
            model.save_pretrained(folder / "both")
            again = StitchedModelForImageClassification.from_pretrained(folder / "both")
        for index, route in enumerate(ROUTES):
            assert torch.equal(logits(again, images, route), logits(first, images, first.routes[index]))
            assert torch.equal(logits(again, images, f"night: {route}"), logits(second, images, second.routes[index]))
        if options:
            alone = logits(second, images, f"{names[1]}[:]")
            assert torch.equal(logits(again, images, "night: vit[:]"), alone)
            assert not torch.equal(logits(again, images, "vit[:]"), alone)
        rows = {str(row.route): (row.costs, row.scores) for row in again.profiled.routes}
        assert len(rows) == len(again.all_routes) == (8 if options else 6)
        for row in second.profiled.routes[2:]:
            mine = str(row.route).replace(names[0] + "[", "resnet[").replace(names[1] + "[", "vit[")
            assert rows[f"night: {mine}"] == (row.costs, row.scores)


def test_profiles_of_other_images_and_devices(folder, images):
    """Accuracies on other images and latencies of another device are left out; MACs are the same everywhere."""
    first, second = profiled(make(folder, 0), images, dataset="a"), profiled(make(folder, 1), images, dataset="b")
    for row in second.profiled.routes:
        row.costs["latency_ms"] = 1.0
    second.profiled.metadata["device"] = "cuda"
    second.save_pretrained(folder / "second")
    first.load_stitch(folder / "second", "night")
    (row,) = [row for row in first.profiled.routes if str(row.route) == f"night: {ROUTES[0]}"]
    assert row.costs.keys() == {"macs", "params"} and not row.scores


def test_deleted_and_freed(folder, images):
    make(folder, 1, num_labels=3).save_pretrained(folder / "second")
    model = make(folder, 0, num_labels=3)
    before = model.adapter_state_dict().keys()
    expected = {route: logits(model, images, route) for route in ROUTES}
    model.load_stitch(folder / "second", "night")
    parts = [*model.stitches.values(), *model.heads.values()]
    watched = [weakref.ref(part) for part in parts]
    del parts
    model.set_route(f"night: {ROUTES[0]}")
    with pytest.raises(ValueError, match="'night: resnet.*is the active route; set another one first"):
        model.delete_stitch("night")
    with pytest.raises(ValueError, match="is the active route"):
        model.set_route("night: vit[:]")
        model.delete_stitch("night")
    assert len(model.routes) == 4
    model.set_route(ROUTES[0])
    model.delete_stitch("night")
    gc.collect()
    assert [ref() is None for ref in watched] == [False, False, True, True, False, False, True, True]
    assert model.adapter_state_dict().keys() == before and list(map(str, model.routes)) == list(ROUTES)
    assert all(torch.equal(logits(model, images, route), expected[route]) for route in ROUTES)
    model.load_stitch(folder / "second", "night")  # the name is free again
    model.delete_stitch(f"night: {ROUTES[0]}")
    assert len(model.routes) == 3 and "night:vit" in model.heads
    model.delete_stitch(f"night: {ROUTES[1]}")
    assert model.adapter_state_dict().keys() == before


def test_deleted_from_the_record_of_training(folder, images):
    """What config.json and the card say of the training of an adapter goes with its last route."""
    second = make(folder, 1)
    second.fit_stitches(images)
    second.save_pretrained(folder / "second")
    model = make(folder, 0)
    model.fit_stitches(images[:5])
    alone = list(model.config.training)
    model.load_stitch(folder / "second", "night")
    model.load_stitch(folder / "second", "nightly")
    both = model.config.training
    assert [entry.get("adapter") for entry in both] == [None, "night", "nightly"]
    model.delete_stitch(f"night: {ROUTES[0]}")
    assert model.config.training == both, "another route of it is left"
    model.save_pretrained(folder / "three")
    model.load_stitch(folder / "three", "far")  # with all that it holds: far, far-night and far-nightly
    for name in ("far", "far-night"):
        model.delete_stitch(name)
        assert model.config.training[-1]["adapter"] == "far", "far-nightly is left"
    model.delete_stitch("far-nightly")
    assert model.config.training == both
    for name in ("night", "nightly"):
        model.delete_stitch(name)
    assert model.config.training == alone
    card = str(make_card("me/it", [a | {"license": None} for a in model.config.anchors], None, training=alone))
    assert "night" not in card and "least squares: images 5" in card


def test_one_is_trained_and_the_other_is_not(folder, images):
    make(folder, 1, num_labels=3).save_pretrained(folder / "second")
    model = make(folder, 0, num_labels=3)
    model.load_stitch(folder / "second", "night")
    before = {key: value.clone() for key, value in model.adapter_state_dict().items()}
    rows = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]
    args = TrainArgs(num_train_epochs=1, batch_size=3, distillation=0.0, keep="last")
    train(model, rows, args, routes=[f"night: {ROUTES[0]}"])
    moved = {
        key.rsplit(".", 1)[0] for key, value in model.adapter_state_dict().items() if (value != before[key]).any()
    }
    assert {part.split(".")[1] for part in moved} == {"night:resnet_2__vit_1", "night:vit"}
    assert model.config.trained_heads == ["night:vit"]


def test_stitches_of_ones_own_under_a_name(folder, images):
    """A second set may be made here, too; its head begins as a copy of the first."""
    model = make(folder, 0, num_labels=3)
    route = model.add_stitch(f"mine: {ROUTES[0]}")
    model.fit_stitches(images, routes=[route])
    assert not torch.equal(logits(model, images, route), logits(model, images, ROUTES[0]))
    assert torch.equal(logits(model, images, "mine: vit[:]"), logits(model, images, "vit[:]"))


def elastic(folder, seed, routes=None, name="resnet"):
    """An adapter of branches and a shared stitch, random in its own way, on one anchor or both."""
    torch.manual_seed(seed)
    anchors = [load_anchor(folder / "resnet", name=name), *([load_anchor(folder / "vit")] if routes else [])]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    if routes:
        model.add_stitches(routes)
    model.add_stitches([f"{name}[:1] + {name}[3:]", f"{name}[:1] +prune50_1 {name}[2:4] + {name}[6:]"], BRANCH)
    with torch.no_grad():
        for parameter in model.stitches.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


BRANCH = StitchConfig("branch")
SHARED = ["resnet[:2] +both vit[2:]", "resnet[:3] +both vit[2:]"]


def test_branches_beside_branches(folder, images):
    """A second elastic adapter of the same anchor, called otherwise by its author: each set has its own weights."""
    first, second = elastic(folder, 0), elastic(folder, 1, name="big")
    for model, name in ((first, "first"), (second, "second")):
        profiled(model, images, dataset="noise").save_pretrained(folder / name)
    model = StitchedModelForImageClassification.from_pretrained(folder / "first")
    added = model.load_stitch(folder / "second", "night")
    assert list(map(str, added)) == [f"night: {route}" for route in first.routes]
    assert set(model.stitches) == {*first.stitches, *(f"night:{name}" for name in first.stitches)}
    model.save_pretrained(folder / "both")
    for again in (model, StitchedModelForImageClassification.from_pretrained(folder / "both")):
        for route, original in zip(first.routes, second.routes, strict=True):
            assert torch.equal(logits(again, images, route), logits(first, images, route))
            assert torch.equal(logits(again, images, f"night: {route}"), logits(second, images, original))
            assert not torch.equal(logits(again, images, f"night: {route}"), logits(again, images, route))
        rows = {str(row.route): (row.costs, row.scores) for row in again.profiled.routes}
        assert all(rows[f"night: {m}"] == (r.costs, r.scores) for m, r in
                   zip(first.routes, second.profiled.routes[1:], strict=True))  # fmt: skip
    model.set_route("resnet[:]")
    model.delete_stitch("night")
    assert set(model.stitches) == set(model.config.stitches) == set(first.stitches)


def test_shared_stitches_beside_each_other(folder, images):
    """A stitch that routes share stays one in each set, and goes with its last route."""
    first, second = elastic(folder, 0, SHARED), elastic(folder, 1, SHARED)
    second.save_pretrained(folder / "second")
    first.load_stitch(folder / "second", "night")
    for route in SHARED:
        assert torch.equal(logits(first, images, f"night: {route}"), logits(second, images, route))
    assert {"resnet__vit~both", "night:resnet__vit~both"} < set(first.stitches)
    first.set_route("resnet[:]")
    first.delete_stitch(f"night: {SHARED[0]}")
    assert torch.equal(logits(first, images, f"night: {SHARED[1]}"), logits(second, images, SHARED[1]))
    first.set_route("resnet[:]")
    first.delete_stitch(f"night: {SHARED[1]}")
    assert "night:resnet__vit~both" not in first.stitches and "resnet__vit~both" in first.stitches


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a b", None, "no adapter can be named 'a b'"),
        ("", None, "no adapter can be named ''"),
        ("taken", None, r"none of \['taken'\]"),
        ("night", lambda c: c["anchors"][1].update(fingerprint="float32:0"), "this model does not have"),
        ("night", lambda c: c["anchors"][1]["preprocessing"].update(mean=[0, 0, 0]), "gives 'vit' images prepared by"),
        ("night", lambda c: c.update(id2label={"0": "cat", "1": "dog"}), "has 2 classes, this model"),
        ("night", lambda c: c.update(routes=[]), "has no stitched routes"),
        (
            "night",
            lambda c: c.update(routes=["resnet[:99] + vit[1:]"]),
            "names anchors or stitches that are not there",
        ),
        ("night", lambda c: c["stitches"].pop("resnet_2__vit_1"), "names anchors or stitches that are not there"),
        (
            "night",
            lambda c: c["stitches"]["resnet_2__vit_1"]["source"].update(channels=2**40),
            "stitch 'night:resnet_2__vit_1' was made for",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(folder, images, name, change, message):
    make(folder, 1).save_pretrained(folder / "second")
    model = make(folder, 0)
    model.load_stitch(folder / "second", "taken")
    before, config = set(model.state_dict()), model.config.to_dict()
    if change is not None:
        edited(folder / "second", change)
    with pytest.raises(ValueError, match=message):
        model.load_stitch(folder / "second", name)
    assert set(model.state_dict()) == before and model.config.to_dict() == config


def test_weights_that_do_not_fit(folder):
    make(folder, 1, num_labels=3).save_pretrained(folder / "second")
    with pytest.raises(ValueError, match="has 3 classes and a new head, this model"):
        make(folder, 0).load_stitch(folder / "second", "night")
    (folder / "second" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(OSError, match="damaged or cut short"):
        make(folder, 0).load_stitch(folder / "second", "night")
    with pytest.raises(TypeError, match="load_stitch takes no"):
        make(folder, 0).load_stitch(folder / "second", "night", devicemap="cpu")


def test_a_stitch_shared_where_layouts_differ_is_refused(folder, images):
    elastic(folder, 1, SHARED).save_pretrained(folder / "second")
    model = elastic(folder, 0, SHARED)
    edited(folder / "second", lambda c: c["routes"].append("resnet[:1] +both vit[2:]"))
    before, routes, stitches = set(model.state_dict()), model.routes, dict(model.config.stitches)
    with pytest.raises(ValueError, match="was made for"):
        model.load_stitch(folder / "second", "night")
    assert set(model.state_dict()) == before and (model.routes, model.config.stitches) == (routes, stitches)
