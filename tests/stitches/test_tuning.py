"""What is tuned stands in the place of an anchor's weights for stitched routes, and nowhere else."""

import copy
import json

import pytest
import torch
from conftest import MODELS, make_anchor
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from restnet_hf import Route, StitchedModelForImageClassification
from restnet_hf.routes.route import TunedKey
from restnet_hf.stitches.norms import is_norm, recalibrate
from restnet_hf.stitches.tuning import SHARED_KINDS, TUNINGS, WEIGHTED_LAYERS, Tuned, TunedConfig, tuned_keys
from restnet_hf.training.loop import set_checkpointing


ROUTE = "resnet[:2] + vit[1:]"
BACK = "vit[:1] + resnet[2:]"


def moved(tuned):
    """Weights that are certainly others than the anchor's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tuned


def tune(model, route, kind):
    """One kind, for the last segment of a route."""
    route = model.route(route)
    key = next(key for key in tuned_keys(route)[-1] if key.kind == kind)
    last = route.segments[-1]
    return model.add_tuned(key, TunedConfig(kind, last.anchor, 0 if kind in SHARED_KINDS else last.start))


@pytest.mark.parametrize("kind", TUNINGS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_stands_in_for_the_weights(name, kind, images):
    """Equal at first; other logits once it has moved; the anchor itself is never touched, and baking is the same."""
    anchor = make_anchor(name)
    if (name, kind) == ("plain", "norm"):
        with pytest.raises(ValueError, match="anchor 'plain' has nothing of kind 'norm' from cut 1 on"):
            Tuned(anchor, TunedConfig(kind, name, 1))
        return
    before = {key: value.clone() for key, value in anchor.state_dict().items()}
    x = anchor(images, 0, 1)
    whole = anchor(x, 1)
    tuned = Tuned(anchor, TunedConfig(kind, name, 1))
    assert sum(p.numel() for p in tuned.parameters())
    tensors = tuned.tensors(anchor, 1)
    assert {*tensors} <= {*anchor.model.state_dict()}
    assert torch.allclose(anchor(x, 1, None, lambda *span: tuned.tensors(anchor, *span)), whole, atol=1e-5)
    moved(tuned)
    other = anchor(x, 1, None, lambda *span: tuned.tensors(anchor, *span))
    assert not torch.allclose(other, whole, atol=1e-3)
    assert torch.allclose(anchor.bake(1, None, tuned.tensors(anchor, 1))(x), other, atol=1e-5)
    assert torch.equal(anchor(x, 1), whole)
    assert all(torch.equal(value, before[key]) for key, value in anchor.state_dict().items())


def test_what_each_kind_takes():
    """By walking the network ourselves: norms' affine parameters and statistics, biases, weights, everything."""
    for name in ("resnet", "vit", "mobilenet"):
        anchor = make_anchor(name)
        modules = dict(anchor.model.named_modules())
        layers = {key for key, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
        norms = {key for key, module in modules.items() if "Norm" in type(module).__name__}
        assert norms == {key for key, module in modules.items() if is_norm(module)} and WEIGHTED_LAYERS == (
            nn.Linear,
            nn.Conv2d,
        )
        names = {kind: {*Tuned(anchor, TunedConfig(kind, name)).tensors(anchor)} for kind in TUNINGS}
        assert names["lora"] == {f"{key}.weight" for key in layers}
        assert names["bias"] == {f"{key}.bias" for key in layers if modules[key].bias is not None}
        ends = ("weight", "bias", "running_mean", "running_var")
        assert names["norm"] == {f"{key}.{end}" for key in norms for end in ends if hasattr(modules[key], end)}
        assert names["full"] == {key for key, _ in anchor.model.named_parameters()}
        head = next(key for key in reversed(modules) if isinstance(modules[key], nn.Linear))
        assert names["head"] == {f"{head}.weight", f"{head}.bias"}
        anchor.drop_classifier()
        with pytest.raises(ValueError, match="has nothing of kind 'head'"):
            Tuned(anchor, TunedConfig("head", name))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "mobilenet"])
def test_low_rank_updates_are_those_of_peft(name, images):
    """The same A and B in PEFT's own LoRA give the same logits."""
    anchor = make_anchor(name)
    tuned = Tuned(anchor, TunedConfig("lora", name, r=3, lora_alpha=6))
    assert all(not B.any() for B in tuned.B.values())
    moved(tuned)
    found = anchor(images, 0, None, lambda *span: tuned.tensors(anchor, *span))
    peers = copy.deepcopy(anchor.model)
    layers = [key for key, module in peers.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    plain = [key for key in layers if getattr(peers.get_submodule(key), "groups", 1) == 1]
    for key in {*layers} - {*plain}:  # PEFT wants the rank of grouped convolutions to be a multiple of the groups
        weight = peers.get_submodule(key).weight
        weight.copy_(tuned.tensors(anchor)[f"{key}.weight"])
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=plain), peers)
    for key in plain:
        layer, ours = peers.get_submodule(key), f"{key}.weight".replace(".", "/")
        layer.lora_A["default"].weight.copy_(tuned.A[ours].view_as(layer.lora_A["default"].weight))
        layer.lora_B["default"].weight.copy_(tuned.B[ours].view_as(layer.lora_B["default"].weight))
    logits = peers(images)
    assert torch.allclose(getattr(logits, "logits", logits), found, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_statistics_by_hand(name, images):
    """What every BatchNorm puts out for a stitch's activations has the mean and variance of what it puts out for the
    anchor's own, in float64; nothing else is touched."""
    anchor = make_anchor(name)
    tuned = Tuned(anchor, TunedConfig("norm", name, 2))
    before = {key: value.clone() for key, value in anchor.state_dict().items()}
    own = anchor(images, 0, 2)
    stitched = 3 * own.roll(1, 1) + 1
    activations = [(lambda: own, lambda: stitched, True)]
    assert recalibrate(tuned.tensors(anchor, tuned.config.start), anchor, tuned.config.start, activations)
    tensors = tuned.tensors(anchor, 2)
    paths = [key.removesuffix(".running_mean") for key in tensors if key.endswith("running_mean")]
    assert len(paths) > 2
    state = anchor.model.state_dict()
    inputs = {}
    for which, run in (
        ("own", lambda: anchor(own, 2)),
        ("stitched", lambda: anchor(stitched, 2, None, lambda *span: tensors)),
    ):
        handles = [
            anchor.model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, key=(which, path): inputs.update({key: args[0].double()})
            )
            for path in paths
        ]
        run()
        for handle in handles:
            handle.remove()
    for path in paths:
        eps = anchor.model.get_submodule(path).eps
        out = {}
        for which, values in (("own", state), ("stitched", tensors)):
            mean, var = (values[f"{path}.running_{end}"].double()[:, None] for end in ("mean", "var"))
            rows = inputs[which, path].transpose(0, 1).flatten(1)
            out[which] = (rows - mean) / (var + eps).sqrt()
        alive = out["own"].std(1) > 0.05  # of a channel that is all but constant the eps is most
        assert alive.sum() > 0.5 * len(alive)
        for measure in (torch.mean, torch.std):
            assert torch.allclose(
                measure(out["own"], 1)[alive], measure(out["stitched"], 1)[alive], rtol=0.02, atol=0.02
            )
    assert all(torch.equal(value, before[key]) for key, value in anchor.state_dict().items())
    transformer = make_anchor("vit")
    assert not recalibrate(
        Tuned(transformer, TunedConfig("norm", "vit", 1)).tensors(transformer, 1), transformer, 1, []
    )


def test_keys():
    route = Route.parse("night: a[:2] + b[1:3] + a[4:]")
    own = "night:a_2__b_1+night:b_3__a_4"
    shared = [["full-night:a", "lora-night:a"], ["full-night:b", "lora-night:b"], ["full-night:a", "lora-night:a"]]
    assert [[*map(str, keys)] for keys in tuned_keys(route)] == [
        *shared[:2],
        [*shared[2], f"bias-{own}", f"norm-{own}"],
    ]
    assert tuned_keys(Route.parse("a[:]")) == [[]]
    alone = ["full-night:a", "lora-night:a", "bias-night:tuned~a", "norm-night:tuned~a", "head-night:tuned~a"]
    assert [[*map(str, keys)] for keys in tuned_keys(Route.parse("night: tuned a[:]"))] == [alone]


@pytest.fixture
def tuned_model(pair):
    """Both directions, several kinds."""
    for route in (ROUTE, BACK):
        pair.add_stitch(route)
    for route, kind in ((ROUTE, "norm"), (ROUTE, "lora"), (BACK, "norm"), (BACK, "bias")):
        moved(tune(pair, route, kind))
    return pair


@torch.no_grad()
def test_belongs_to_its_routes(tuned_model, images):
    """An own kind changes one route, a shared one all stitched routes of the anchor, none an anchor alone."""
    model = tuned_model

    def logits():
        return {str(route): (model.set_route(route), model(images).logits)[1] for route in model.all_routes}

    first = logits()
    for kind, changed in (("norm", {ROUTE}), ("lora", {ROUTE, BACK, "resnet[:3] + vit[2:]"})):
        moved(next(t for key, t in model.tuned.items() if key.startswith(kind) and "vit" in key.split("__")[-1]))
        second = logits()
        assert {name for name in first if not torch.equal(first[name], second[name])} == changed
        first = second


@torch.no_grad()
def test_saved_loaded_and_added_to_others(tuned_model, images, tmp_path):
    model = tuned_model
    model.save_pretrained(tmp_path)
    expected = {str(route): (model.set_route(route), model(images).logits)[1] for route in model.routes}
    given = {name: copy.deepcopy(anchor.model) for name, anchor in model.anchors.items()}
    again = StitchedModelForImageClassification.from_pretrained(tmp_path, anchors=given)
    assert again.config.tuned == model.config.tuned and len(model.config.tuned) == 4
    for name, logits in expected.items():
        again.set_route(name)
        assert torch.equal(again(images).logits, logits)
        assert torch.allclose(again.bake()(images), logits, atol=1e-5)
    other = StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), order="given"
    )
    other.load_stitch(tmp_path, "night")
    for name, logits in expected.items():
        other.set_route(f"night: {name}")
        assert torch.equal(other(images).logits, logits)
    other.set_route("resnet[:]")
    other.delete_stitch("night")
    assert not other.tuned and not other.config.tuned


def test_scores_are_of_what_was_measured(tuned_model, images):
    model = tuned_model
    model.profile([(images, torch.zeros(len(images), dtype=torch.long))])
    moved(model.tuned["norm-" + model.route(ROUTE).stitch_points[0].name])
    rows = {str(row.route): row.scores for row in model.valid_profile().routes}
    assert [name for name, scores in rows.items() if not scores] == [ROUTE]


def test_deleted_with_the_last_route(tuned_model):
    model = tuned_model
    model.set_route("resnet[:]")
    model.delete_stitch(ROUTE)
    assert sorted(TunedKey.parse(key).kind for key in model.tuned) == ["bias", "lora", "norm"]
    model.delete_stitch("resnet[:3] + vit[2:]")
    model.delete_stitch(BACK)
    assert not model.tuned and model.config.tuned == {}


def test_costs_are_those_of_the_anchor(tuned_model):
    """A low-rank update is merged before it runs on a device, and copies take the place of what they replace."""
    rows = {str(row.route): dict(row.costs) for row in tuned_model.profile().routes}
    plain = StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), order="given"
    )
    plain.add_stitch(ROUTE)
    (expected,) = [row.costs for row in plain.profile().routes if str(row.route) == ROUTE]
    more = sum(t.nbytes for tuned in tuned_model.tuned.values() for t in (*tuned.parameters(), *tuned.buffers()))
    assert 0 < rows[ROUTE].pop("memory_mb") - expected["memory_mb"] <= more / 2**20, "beside the anchor's own"
    assert rows[ROUTE] == {cost: value for cost, value in expected.items() if cost != "memory_mb"}


def test_gradients_through_checkpoints(tuned_model, images):
    """Activation checkpointing gives what is tuned the same gradients."""
    model, found = tuned_model, []
    model.set_route(ROUTE)
    for checkpointing in (False, True):
        set_checkpointing(model, checkpointing)
        model.train()
        model.zero_grad()
        model(images).logits.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.tuned.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    assert all(torch.allclose(value, found[1][name], atol=1e-6) for name, value in found[0].items())


@pytest.mark.parametrize(
    "change",
    [{"kind": "magic"}, {"anchor": "other"}, {"r": 0}, {"strange": 1}, {"kind": "bias"}],
)
def test_invalid_config(tuned_model, tmp_path, change):
    tuned_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    key = next(key for key in config["tuned"] if key.startswith("norm"))
    config["tuned"][key] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the tuned entry 'norm-.*' is invalid"):
        StitchedModelForImageClassification.from_pretrained(tmp_path)
