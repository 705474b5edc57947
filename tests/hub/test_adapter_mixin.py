"""Adapters come back exactly, hold only what was trained, and damaged ones are refused."""

import json
import shutil
import signal

import pytest
import torch
from conftest import make_anchor, make_model, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline
from versions import older

from restnet_hf import BudgetError, RestNetConfig, StitchConfig, StitchedModelForImageClassification
from restnet_hf.data.datasets import load_images
from restnet_hf.demo.paths import DATA
from restnet_hf.hub.adapter_files import OWN_FILES, WEIGHTS
from restnet_hf.steps import run_steps


def test_round_trip(saved):
    model, path, images, logits = saved
    again = StitchedModelForImageClassification.from_pretrained(path)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(images).logits, logits)
    assert again.routes == model.routes and again.active_route == model.active_route
    assert again.profiled == model.profiled
    assert again.set_budget(macs=1e12) in again.all_routes
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable and all(name.startswith("stitches.") for name in trainable)


def test_auto_classes(saved):
    _, path, images, logits = saved
    assert isinstance(AutoConfig.from_pretrained(path), RestNetConfig)
    with torch.no_grad():
        assert torch.equal(AutoModelForImageClassification.from_pretrained(path)(images).logits, logits)


@pytest.mark.slow
def test_new_process(saved, tmp_path, processes):
    _, path, images, logits = saved
    save_file({"images": images, "logits": logits}, tmp_path / "seen.safetensors")
    code = (
        "import sys, torch\nfrom safetensors.torch import load_file\n"
        "import restnet_hf\nfrom transformers import AutoModelForImageClassification\n"
        "seen = load_file(sys.argv[2])\n"
        "model = AutoModelForImageClassification.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): assert torch.equal(model(seen['images']).logits, seen['logits'])\n"
    )
    done = processes.run(code, [str(path), str(tmp_path / "seen.safetensors")])
    assert done.returncode == 0, done.stderr


def test_files(saved):
    model, path, _, _ = saved
    weights = load_file(path / WEIGHTS)
    assert weights.keys() == {key for key in model.state_dict() if key.startswith("stitches.")}
    assert sum(value.numel() for value in weights.values()) == sum(p.numel() for p in model.stitches.parameters())
    assert {file.name for file in path.iterdir()} == set(OWN_FILES)
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "restnet"
    assert [entry["fingerprint"].split(":")[0] for entry in config["anchors"]] == ["float32", "float32"]


def test_saving_again_gives_the_same_files(saved, tmp_path):
    _, path, _, _ = saved
    StitchedModelForImageClassification.from_pretrained(path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (path / WEIGHTS).read_bytes()
    first, second = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "again"))
    assert first == second


def test_dtype(saved):
    _, path, images, logits = saved
    half = StitchedModelForImageClassification.from_pretrained(path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.anchors.parameters()} == {half.dtype} == {torch.bfloat16}
    assert {p.dtype for p in half.stitches.parameters()} == {torch.float32}, "as PEFT loads its adapters"
    with torch.no_grad():
        assert torch.allclose(half(images).logits.float(), logits, atol=0.3)


def test_stitches_keep_the_type_of_the_file(saved, tmp_path):
    """A model that was cast as a whole is reloaded as it was; in any other type its stitches are in float32."""
    model, _, images, _ = saved
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    same, other = (
        StitchedModelForImageClassification.from_pretrained(tmp_path / "half", dtype=dtype)
        for dtype in (None, torch.float16)
    )
    stitches = [{p.dtype for p in each.stitches.parameters()} for each in (same, other)]
    assert stitches == [{torch.bfloat16}, {torch.float32}] and other.dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(same(images).logits, model(images).logits)
    assert same.load_stitch(tmp_path / "half", "night") and other.load_stitch(tmp_path / "half", "night")
    name = "night:resnet_2__vit_1"
    assert [each.stitches[name].proj.weight.dtype for each in (same, other)] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_in_another_type(demo_model, tmp_path, dtype):
    """Cast after loading, or loaded, cast and saved once more: the parents are still known."""
    images = torch.rand(2, 3, 56, 56)
    for folder in ("first", "second"):
        demo_model.to(dtype).save_pretrained(tmp_path / folder)
        again = StitchedModelForImageClassification.from_pretrained(tmp_path / folder)
        assert again.dtype == dtype
        with torch.no_grad():
            assert torch.equal(again(images).logits, demo_model(images).logits)
        demo_model = StitchedModelForImageClassification.from_pretrained(tmp_path / folder, dtype=torch.float32)


def test_config_alone_builds_the_model(saved):
    model, path, images, _ = saved
    fresh = StitchedModelForImageClassification(RestNetConfig.from_pretrained(path)).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images).logits, model(images).logits)
    assert fresh.load_state_dict(model.adapter_state_dict()).missing_keys == []
    with pytest.raises(RuntimeError, match="missing keys"):
        fresh.load_state_dict({})


def test_new_head_is_saved(tmp_path, images):
    for name in ("resnet", "vit"):
        save_model(name, tmp_path / name)
    model = StitchedModelForImageClassification.from_anchors(
        tmp_path / "resnet", tmp_path / "vit", order="given", num_labels=3
    )
    model.set_route(model.add_stitch("resnet[:2] + vit[1:]"))
    model.save_pretrained(tmp_path / "adapter")
    again = StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
    assert {key.split(".")[0] for key in load_file(tmp_path / "adapter" / WEIGHTS)} == {"stitches", "heads"}


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", torch.device("cpu"), {"": "cpu"}])
@pytest.mark.parametrize("end", ["mobilenet", "vit", "swin"])
def test_device_map(tmp_path, images, end, device_map):
    model = StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), make_anchor(end), order="given")
    model.set_route(model.add_stitch(f"resnet[:2] + {end}[2:]"))
    model.save_pretrained(tmp_path)
    again = StitchedModelForImageClassification.from_pretrained(
        tmp_path, anchors={"resnet": make_model("resnet"), end: make_model(end)}, device_map=device_map
    )
    with torch.no_grad():
        assert torch.allclose(again(images.to(again.device)).logits.cpu(), model(images).logits, atol=1e-4)


@pytest.mark.parametrize(
    "device_map",
    [
        "balanced",
        {"anchors": "cpu", "stitches": "cpu"},
        {"": "disk"},
        "nowhere",
        {},
        {"": None},
        {"stitches": "cpu"},
        True,
    ],
)
def test_device_maps_of_several_devices_are_refused(saved, device_map):
    with pytest.raises(ValueError, match="device"):
        StitchedModelForImageClassification.from_pretrained(saved[1], device_map=device_map)


def test_an_adapter_of_an_earlier_format(saved):
    file = saved[1] / "config.json"
    config = json.loads(file.read_text())
    del config["anchors"][0]["pieces"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"anchor 0 lacks \['pieces'\]; save the adapter again"):
        StitchedModelForImageClassification.from_pretrained(saved[1])


def test_a_missing_parent_is_named(saved, tmp_path):
    shutil.rmtree(tmp_path / "vit")
    with pytest.raises(
        OSError, match=r"anchor '.*vit' cannot be loaded.*If the anchor has moved, pass it: from_pretrained"
    ):
        StitchedModelForImageClassification.from_pretrained(saved[1])


def edit(path, change):
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file(weights, path / WEIGHTS, {"format": "pt"})


KEY = "stitches.resnet_2__vit_1.proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(KEY), f"missing: {KEY}"),
        (lambda w: w.update(extra=torch.zeros(1)), "not expected: extra"),
        (lambda w: w.update({KEY: torch.zeros(2, 2)}), rf"of another shape: {KEY} \(2, 2\) instead of"),
    ],
)
def test_wrong_weights(saved, change, message):
    edit(saved[1], change)
    with pytest.raises(ValueError, match=message):
        StitchedModelForImageClassification.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 64 + data, lambda data: b""]
)
def test_damaged_file(saved, damage):
    file = saved[1] / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(OSError, match="is damaged or cut short"):
        StitchedModelForImageClassification.from_pretrained(saved[1])


def test_no_weights(saved):
    (saved[1] / WEIGHTS).unlink()
    with pytest.raises(OSError, match=WEIGHTS):
        StitchedModelForImageClassification.from_pretrained(saved[1])


def at(*keys, value):
    """An edit of config.json: set the entry at ``keys``."""

    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


STITCH = ("stitches", "resnet_2__vit_1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at(*STITCH, "config", "kind", value="cubic"), "the entry of stitch 'resnet_2__vit_1' is invalid"),
        (at(*STITCH, "source", "channels", value=-4), "the entry of stitch 'resnet_2__vit_1' is invalid"),
        (at(*STITCH, "source", "prefix", value=10**9), "the entry of stitch 'resnet_2__vit_1' is invalid"),
        (at(*STITCH, "source", "grid", value=[9, 9]), "was made for .* at cut 2 of 'resnet', which is"),
        (at(*STITCH, "point", "target_cut", value=2), "has the point of"),
        (at("stitches", value={"../up": {}}), "the entry of stitch '../up' is invalid"),
        (at("anchors", value=[]), "there are no anchors"),
        (at("anchors", value=[3, 4]), "anchor 0 lacks"),
        (at("anchors", 0, "fingerprint", value=None), "anchor 0 lacks its fingerprint"),
        (at("anchors", 0, "fingerprint", value="float16:dead"), "is not the network this adapter was made for"),
        (at("anchors", 0, "granularity", value="module"), "cut 1 is .* here and was"),
        (at("active_route", value="who[:]"), "names anchors or stitches that are not there"),
        (at("active_route", value="resnet[:1] + vit[1:]"), "names anchors or stitches that are not there"),
        (at("routes", value=["x"]), "is not a route"),
        (at("routes", value=3), "routes must be a list of strings|routes"),
    ],
)
def test_invalid_config(saved, change, message):
    file = saved[1] / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        StitchedModelForImageClassification.from_pretrained(saved[1])


def test_route_and_budget(saved):
    """Only what the route runs is checked, and so read; another route has its weights checked when it runs."""
    model, path, images, _ = saved
    load = StitchedModelForImageClassification.from_pretrained
    late = load(path, route="resnet[:4] + vit[2:]")
    early = load(path, route="resnet[:2] + vit[1:]")
    assert str(early.active_route) == early.config.active_route == "resnet[:2] + vit[1:]"
    pending = [{name: set(anchor._expected) for name, anchor in m.anchors.items()} for m in (early, late)]
    assert pending == [
        {"resnet": set(range(2, 7)), "vit": {0}},
        {"resnet": set(range(4, 7)), "vit": {0, 1}},
    ]
    with torch.no_grad():
        for other in model.all_routes:
            assert torch.equal(run_steps(images, early.steps(other)), run_steps(images, model.steps(other)))
    cheapest = min(model.profiled.routes, key=lambda row: row.costs["macs"])
    chosen = load(path, budget={"macs": cheapest.costs["macs"]})
    assert chosen.active_route == cheapest.route
    with pytest.raises(BudgetError, match="the cheapest is"):
        load(path, budget={"macs": 1})
    with pytest.raises(ValueError, match="either route or budget"):
        load(path, budget={"macs": 1}, route="vit[:]")
    with pytest.raises(ValueError, match="names anchors or stitches that are not there"):
        load(path, route="resnet[:1] + vit[1:]")
    (path / "profile.json").unlink()
    with pytest.raises(BudgetError, match="has no profile"):
        load(path, budget={"macs": 1})


@pytest.mark.parametrize("options", [{"bugdet": {"macs": 3}}, {"quantise": True}])
def test_unknown_options(saved, options):
    with pytest.raises(TypeError, match=f"takes no \\['{next(iter(options))}'\\]"):
        StitchedModelForImageClassification.from_pretrained(saved[1], **options)
    with pytest.raises(ValueError, match=r"anchors= names \['who'\]"):
        StitchedModelForImageClassification.from_pretrained(saved[1], anchors={"who": make_model("vit")})
    with pytest.raises(ValueError, match="the anchors have 5 classes, not num_labels=3"):
        AutoModelForImageClassification.from_pretrained(saved[1], num_labels=3)


@pytest.mark.parametrize("dtype", ["load", "float99"])
def test_unknown_dtype(saved, dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is not the name of a type of weights"):
        StitchedModelForImageClassification.from_pretrained(saved[1], dtype=dtype)


def test_nothing_stale_is_left(saved, tmp_path):
    """An adapter saved over another keeps nothing of it, and other files are left alone."""
    model, path, _, _ = saved
    (path / "notes.txt").write_text("mine")
    model.profiled = None
    model.save_pretrained(path)
    assert not (path / "profile.json").exists() and (path / "notes.txt").read_text() == "mine"
    assert StitchedModelForImageClassification.from_pretrained(path).profiled is None
    with pytest.raises(NotADirectoryError, match="is a file"):
        model.save_pretrained(path / "notes.txt")


def test_without_stitches(saved, tmp_path, images):
    model = StitchedModelForImageClassification.from_anchors(tmp_path / "resnet", tmp_path / "vit", order="given")
    model.save_pretrained(tmp_path / "empty")
    again = StitchedModelForImageClassification.from_pretrained(tmp_path / "empty")
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


def test_pipeline(demo_model, tmp_path):
    """transformers' own pipeline, on real images."""
    demo_model.save_pretrained(tmp_path / "adapter")
    classify = pipeline("image-classification", model=str(tmp_path / "adapter"))
    rows = load_images(DATA, "test").select(range(40))
    hits = [classify(row["image"].convert("RGB"))[0]["label"] for row in rows]
    names = rows.features["label"].names
    assert sum(hit == names[label] for hit, label in zip(hits, rows["label"], strict=True)) > 34


def jiggled(model, seed=0):
    """Other stitches than those that are made."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.stitches.state_dict().values():
            tensor.add_(0.05 * torch.rand(tensor.shape, generator=rng))
    return model


def one(folder, name, **options):
    """An elastic model out of one folder."""
    save_model(name, folder / name)
    return jiggled(StitchedModelForImageClassification.from_anchors(folder / name, routes="skip", **options))


@torch.no_grad()
def equal_routes(model, again, images):
    assert again.routes == model.routes and again.all_routes == model.all_routes
    for route in model.all_routes:
        assert torch.equal(run_steps(images, again.steps(route)), run_steps(images, model.steps(route))), route
    return True


@pytest.mark.parametrize("options", [{}, {"num_labels": 3}])
@pytest.mark.parametrize("name", ["resnet", "vit", "mobilenet"])
def test_one_anchor_round_trip(tmp_path, images, name, options):
    """Every route gives its logits to the bit; the file holds the branches' own tensors alone."""
    if name == "mobilenet":  # made in code, with pruned copies and statistics of BatchNorm
        anchor = make_anchor(name)
        model = StitchedModelForImageClassification.from_anchors(anchor, **options)
        jiggled(model).add_stitches(
            ["mobilenet[:2] + mobilenet[5:]", "mobilenet[:3] +prune50_3 mobilenet[4:4] +prune25_4 mobilenet[5:]"],
            StitchConfig("branch"),
        )
        given = {"anchors": {name: make_model(name)}}
    else:
        model, given = one(tmp_path, name, **options), {}
    model = jiggled(model)
    model.set_route(model.routes[-1])
    model.profile([(images, torch.zeros(len(images), dtype=torch.long))])
    model.save_pretrained(tmp_path / "adapter")
    for load in (AutoModelForImageClassification, StitchedModelForImageClassification)[bool(given) :]:
        again = load.from_pretrained(tmp_path / "adapter", **given)
        with torch.no_grad():
            assert torch.equal(again(images).logits, model(images).logits)
        assert again.active_route == model.active_route and again.profiled == model.profiled
        assert equal_routes(model, again, images)
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    numbers = [*model.stitches.parameters(), *model.stitches.buffers(), *model.heads.parameters()]
    assert sum(value.numel() for value in weights.values()) == sum(tensor.numel() for tensor in numbers)
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_branches_in_another_type(tmp_path, images, dtype):
    """Pruned copies too: what certifies them is not less exact in half a float."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor("mobilenet"))
    model.add_stitch("mobilenet[:2] +prune50_2 mobilenet[3:4] + mobilenet[6:]", StitchConfig("branch"))
    jiggled(model).save_pretrained(tmp_path)
    again = StitchedModelForImageClassification.from_pretrained(
        tmp_path, anchors={"mobilenet": make_model("mobilenet")}, dtype=dtype
    )
    assert {tensor.dtype for tensor in again.anchors.parameters()} == {dtype}
    for key, value in model.stitches.state_dict().items():
        assert torch.equal(again.stitches.state_dict()[key], value)
    noise = images.to(dtype)
    with torch.no_grad():
        logits = again(noise, route=again.routes[0]).logits
        assert logits.dtype == dtype and torch.equal(again.bake(again.routes[0])(noise), logits)


def test_standalone_with_branches(tmp_path, images):
    """Anchors and branches in one file, no parent needed; equal tensors are kept apart."""
    model = one(tmp_path, "resnet")
    model.save_pretrained(tmp_path / "whole", standalone=True)
    shutil.rmtree(tmp_path / "resnet")
    assert equal_routes(model, StitchedModelForImageClassification.from_pretrained(tmp_path / "whole"), images)


def test_shared_stitches_are_saved_once(tmp_path, images):
    for name in ("resnet", "vit"):
        save_model(name, tmp_path / name)
    model = StitchedModelForImageClassification.from_anchors(tmp_path / "resnet", tmp_path / "vit", order="given")
    model.add_stitches([f"resnet[:{i}] +both vit[{j}:]" for i in (2, 3) for j in (1, 2, 3)])
    model.fit_stitches(images)
    model.save_pretrained(tmp_path / "adapter")
    again = StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert {key.rsplit(".", 2)[0] for key in load_file(tmp_path / "adapter" / WEIGHTS)} == {
        "stitches.resnet__vit~both"
    }
    assert equal_routes(model, again, images)
    again.delete_stitch(again.routes[0])
    assert len(again.stitches) == 1, "five routes go on with it"
    file = tmp_path / "adapter" / "config.json"
    config = json.loads(file.read_text())
    for route, message in (
        ("resnet[:1] +both vit[1:]", "'resnet__vit~both' was made for .* at cut 1 of 'resnet', which is"),
        ("resnet[:2] +both vit[9:]", "'vit' has cuts 1 to 3, not 9"),
        ("resnet[:2] +other vit[1:]", "names anchors or stitches that are not there"),
        ("vit[:2] +both resnet[3:]", "names anchors or stitches that are not there"),
    ):
        file.write_text(json.dumps({**config, "routes": [route]}))
        with pytest.raises(ValueError, match=message):
            StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("point", "target_cut", value=1), "has the point of"),
        (at("config", "prune", value=1.5), "is invalid"),
        (at("config", "prune", value="0.5"), "is invalid"),
        (at("config", "kind", value="linear"), "missing|not expected"),
        (at("config", "prune", value=0.5), "of another shape"),
    ],
)
def test_invalid_branches(tmp_path, change, message):
    one(tmp_path, "vit").save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "config.json"
    config = json.loads(file.read_text())
    change(config["stitches"]["vit_1__vit_3"])
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(("start", "stop"), [(3, 1), (2, 2)])
def test_branches_that_lead_nowhere(tmp_path, start, stop):
    """In an untrusted config."""
    one(tmp_path, "vit").save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "config.json"
    config = json.loads(file.read_text())
    entry = config["stitches"].pop("vit_1__vit_3")
    entry["point"].update(source_cut=start, target_cut=stop)
    config["stitches"][f"vit_{start}__vit_{stop}"] = entry
    config["routes"] = [f"vit[:{start}] + vit[{stop}:]"]
    file.write_text(json.dumps(config))
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    renamed = {key.replace("vit_1__vit_3", f"vit_{start}__vit_{stop}"): value for key, value in weights.items()}
    save_file({key: value.clone() for key, value in renamed.items()}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(ValueError, match="must lead from a cut to a later one, 1 to 3, not from"):
        StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")


def test_a_failed_save_leaves_the_old_adapter(saved):
    model, path, images, logits = saved
    model.profiled.metadata["bad"] = object()  # not JSON
    with pytest.raises(TypeError):
        model.save_pretrained(path)
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]
    with torch.no_grad():
        assert torch.equal(StitchedModelForImageClassification.from_pretrained(path)(images).logits, logits)


def test_image_processor_is_saved(demo_model, tmp_path):
    demo_model.save_pretrained(tmp_path / "adapter")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "adapter")
    image = load_images(DATA, "test")[0]["image"].convert("RGB")
    ours = demo_model.image_processor(image, return_tensors="pt")["pixel_values"]
    again = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(again, ours) or (older(transformers="5.17") and (again - ours).abs().max() < 0.03)


KILLED = """
import json, os, shutil, signal, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from restnet_hf import StitchedModelForImageClassification

torch.set_num_threads(1)
torch.set_grad_enabled(False)
folder = Path(sys.argv[1])
images = load_file(folder / "images.safetensors")["images"]
old = StitchedModelForImageClassification.from_pretrained(folder / "adapter")
new = StitchedModelForImageClassification.from_pretrained(folder / "adapter")
new.set_route(new.add_stitch("resnet[:3] + vit[2:]"))
new.delete_stitch("resnet[:2] + vit[1:]")
new.fit_stitches(images)
logits = {"old": old(images).logits, "new": new(images).logits}

def save(target, last):
    writes = 0
    def count(event, arguments):
        nonlocal writes
        wrote = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if wrote or event in ("os.rename", "os.remove", "os.mkdir"):
            writes += 1
            if writes > last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    new.save_pretrained(target)

found = []
while not found or code:
    target = shutil.copytree(folder / "adapter", folder / f"out{len(found)}")
    child = os.fork()
    if not child:
        save(target, len(found))
        os._exit(0)
    code = os.waitpid(child, 0)[1]
    again = AutoModelForImageClassification.from_pretrained(target)
    (which,) = [name for name in logits if torch.equal(again(images).logits, logits[name])]
    found.append((which, code, again.profiled is not None))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_killed_while_saving(saved, processes):
    """Wherever the process dies while it saves over an adapter, that loads as it was, or as the new one."""
    _, path, images, _ = saved
    save_file({"images": images}, path.parent / "images.safetensors")
    done = processes.run(KILLED, [str(path.parent)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found[0] == ["old", signal.SIGKILL, True] and found[-1] == ["new", 0, False]
    order = [which for which, *_ in found]
    assert order == sorted(order, reverse=True), "old to some step, new from there on"
    assert all(profiled is (which == "old") for which, _, profiled in found)
    assert order.count("old") > 5 and order.count("new") > 5
