"""Stitches of every kind carry any layout to any other, start from least squares, and train what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, MODELS, SIZE, make_anchor, make_model, save_model
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification
from restnet_hf.anchors.layouts import JointLayout, Layout, resize, resize_matrix
from restnet_hf.profiling.macs import count_macs
from restnet_hf.routes.route import StitchPoint
from restnet_hf.stitches.layers import CLASS_TOKENS, OPTIONS, STITCHES, StitchConfig, make_stitch
from restnet_hf.stitches.least_squares import LeastSquares, fit_stitches


SOURCES = [Layout("NCHW", 6, (4, 4)), Layout("NHWC", 6, (6, 6)), *(Layout("NLC", 6, (4, 4), n) for n in (0, 1, 2, 5))]
SOURCES += [JointLayout((Layout("NLC", 2, (2, 2), 1), Layout("NCHW", 4, (4, 4))))]
TARGETS = [
    Layout("NCHW", 5, (4, 4)),
    Layout("NCHW", 5, (7, 7)),
    Layout("NHWC", 5, (3, 3)),
    Layout("NLC", 5, (4, 4), 1),
    Layout("NLC", 5, (4, 4)),
    Layout("NLC", 5, (4, 4), 2),
    Layout("NLC", 5, (2, 2), 5),
    JointLayout((Layout("NLC", 3, (4, 4), 1), Layout("NHWC", 2, (2, 2)))),
]
FROZEN = {"lora": "proj.weight"}  # by kind, what keeps the value that least squares gave it
BESIDE = {"linear": [], "lora": ["A.weight", "B.weight"], "mlp": ["hidden.bias", "hidden.weight", "out.weight"]}


def every_kind():
    return [StitchConfig(kind, token) for kind in STITCHES for token in CLASS_TOKENS]


def fit(stitch, x, y):
    """Set the weights by least squares on all positions of activations (N, ...)."""
    for problem in stitch.problems():
        sums = LeastSquares()
        sums.update(problem.inputs(x, None).flatten(0, 1), problem.outputs(y, None).flatten(0, 1))
        problem.assign(*sums.solve()[:2])


def as_trained(stitch):
    """The stitch with no weight at the zero that it starts from."""
    with torch.no_grad():
        for parameter in stitch.parameters():
            if not parameter.any():
                parameter.normal_()
    return stitch


def frozen(stitch, kind):
    """The parameters that are not to train, by the table above."""
    return {name for name, _ in stitch.named_parameters() if kind in FROZEN and name.endswith(FROZEN[kind])}


@pytest.mark.parametrize("config", every_kind(), ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_contract(source, target, config):
    """Shape, gradients where it trains, and a fit that beats a random stitch and is the linear one whatever was."""
    torch.manual_seed(0)
    stitch = as_trained(make_stitch(source, target, config))
    x = torch.randn(source.shape(40))
    y = torch.tanh(make_stitch(source, target, StitchConfig())(x)).detach()
    out = stitch(x)
    assert out.shape == target.shape(40)
    out.sum().backward()
    with_gradient = {name for name, p in stitch.named_parameters() if p.grad is not None and p.grad.any()}
    everything = {name for name, _ in stitch.named_parameters()}
    assert with_gradient == everything - frozen(stitch, config.kind)
    assert with_gradient == {name for name, p in stitch.named_parameters() if p.requires_grad}
    random = (out - y).square().mean().item()
    linear = make_stitch(source, target, replace(config, kind="linear"))
    fit(stitch, x, y)
    fit(linear, x, y)
    with torch.no_grad():
        assert (stitch(x) - y).square().mean().item() < 0.7 * random
        assert torch.allclose(stitch(x), linear(x), atol=1e-6)


@pytest.mark.parametrize("end", ["vit", "mobilenet", "tnt"])
@pytest.mark.parametrize("front", ["resnet", "registers", "tnt"])
def test_new_stitches_of_real_networks_are_the_linear_one(anchors, images, front, end):
    point, outputs = StitchPoint(front, 2, end, 2), {}
    for kind in STITCHES:
        stitch = make_stitch(anchors[front].layout(2), anchors[end].layout(2), StitchConfig(kind))
        fit_stitches({point: stitch}, anchors, [{front: images, end: images}])
        with torch.no_grad():
            outputs[kind] = stitch(anchors[front](images, stop=2))
    assert outputs["linear"].std() > 0.01
    assert all(torch.allclose(out, outputs["linear"], rtol=1e-4, atol=1e-5) for out in outputs.values())


def used(kind, **options):
    """A config with those of the options that its kind uses."""
    return StitchConfig(kind, **{name: value for name, value in options.items() if name in OPTIONS[kind]})


LINES = {  # what becomes of a line of cells of one length as one of another: averaged, or interpolated between centres
    (4, 4): np.eye(4),
    (4, 2): np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]),
    (2, 4): np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]),
}


@pytest.mark.parametrize("sides", LINES)
@pytest.mark.parametrize("form", ["NCHW", "NHWC", "NLC"])
@pytest.mark.parametrize("kind", ["lora", "mlp"])
def test_by_hand(kind, form, sides):
    """In float64: what shrinks is resized before the channels are mapped, what grows after; shared tokens are not."""
    torch.manual_seed(0)
    side, target_side = sides
    prefix = int(form == "NLC")
    source, target = Layout(form, 6, (side, side), prefix), Layout("NLC", 5, (target_side, target_side), prefix)
    stitch = as_trained(make_stitch(source, target, used(kind, r=2, lora_alpha=5, hidden=3)))
    x = torch.randn(source.shape(7))
    w = {name: p.detach().double().squeeze().numpy() for name, p in stitch.named_parameters()}

    def channels(rows):
        plain = rows @ w["proj.weight"].T + w["proj.bias"]
        if kind == "lora":
            return plain + 5 / 2 * rows @ (w["B.weight"] @ w["A.weight"]).T
        return plain + np.maximum(rows @ w["hidden.weight"].T + w["hidden.bias"], 0) @ w["out.weight"].T

    spatial, tokens = source.split(x.double())
    rows = spatial.flatten(2).transpose(1, 2).numpy()
    resized = np.kron(LINES[sides], LINES[sides])
    before, after = channels(resized @ rows), resized @ channels(rows)
    expected = before if target_side < side else after
    if prefix:
        expected = np.concatenate([channels(tokens.numpy()), expected], axis=1)
    np.testing.assert_allclose(stitch(x).detach().numpy(), expected, atol=1e-5)
    commutes = kind == "lora" or side == target_side
    assert np.allclose(before, after) == commutes


def test_low_rank_update_is_that_of_peft():
    """The same weights in PEFT's own LoRA of a linear layer give the same; A starts from the same distribution."""
    torch.manual_seed(0)
    stitch = make_stitch(
        Layout("NLC", 64, (2, 2)), Layout("NLC", 5, (2, 2)), StitchConfig("lora", r=200, lora_alpha=7)
    )
    layers = nn.Sequential(nn.Linear(64, 5))
    inject_adapter_in_model(LoraConfig(r=200, lora_alpha=7, target_modules=["0"]), layers)
    for mine, theirs in ((stitch.A, layers[0].lora_A["default"]), (stitch.B, layers[0].lora_B["default"])):
        assert mine.weight.shape == theirs.weight.shape
        assert mine.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.02)
        assert mine.weight.abs().max().item() == pytest.approx(theirs.weight.abs().max().item(), rel=0.02)
    as_trained(stitch)
    with torch.no_grad():
        layers[0].base_layer.load_state_dict(stitch.proj.state_dict())
        layers[0].lora_A["default"].load_state_dict(stitch.A.state_dict())
        layers[0].lora_B["default"].load_state_dict(stitch.B.state_dict())
        x = torch.randn(3, 4, 64)
        assert torch.allclose(stitch(x), layers(x), atol=1e-4)


C, D, R, H = 6, 5, 4, 9
EXTRA = {"linear": (0, 0), "lora": (R * (C + D), 0), "mlp": (H * (C + D), H)}  # weights, which multiply, and biases


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sides", [(4, 4), (4, 2), (2, 6)])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kind", STITCHES)
def test_costs(kind, prefix, sides, device):
    """Parameters, those that train, and MACs: one map of channels for each position of the smaller grid."""
    source, target = (Layout("NLC", n, (side, side), prefix) for n, side in zip((C, D), sides, strict=True))
    with torch.device(device):
        stitch = make_stitch(source, target, used(kind, r=R, hidden=H))
        macs = count_macs(stitch, torch.zeros(source.shape(1)))
    weights, biases = EXTRA[kind]
    parameters = C * D + D + weights + biases
    assert sum(p.numel() for p in stitch.parameters()) == parameters
    trains = sum(p.numel() for p in stitch.parameters() if p.requires_grad)
    assert trains == parameters - (C * D if kind == "lora" else 0)
    assert macs == (prefix + min(sides) ** 2) * (C * D + weights)


def test_hidden_is_as_wide_as_the_target():
    parts = (Layout("NLC", 3, (4, 4), 1), Layout("NHWC", 8, (2, 2)))
    stitch = make_stitch(Layout("NCHW", 6, (4, 4)), JointLayout(parts), StitchConfig("mlp"))
    assert [part.hidden.weight.shape[:2] for part in stitch.parts] == [(3, 6), (8, 6)]


@pytest.mark.parametrize("config", every_kind(), ids=str)
@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[3], TARGETS[7]], ids=str)
@pytest.mark.parametrize("source", [SOURCES[0], SOURCES[5], SOURCES[6]], ids=str)
def test_state_dict(source, target, config):
    """Loaded into a new stitch it gives the same; no key looks like one of PEFT's, which it would load as its own."""
    torch.manual_seed(0)
    stitch, again = as_trained(make_stitch(source, target, config)), make_stitch(source, target, config)
    x = torch.randn(source.shape(3))
    assert not torch.equal(stitch(x), again(x))
    again.load_state_dict(stitch.state_dict())
    assert torch.equal(stitch(x), again(x)) and not any("lora_" in key for key in stitch.state_dict())
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == frozen(stitch, config.kind)


@pytest.mark.parametrize("kind", STITCHES)
def test_saved_and_loaded(tmp_path, images, kind):
    """A whole model: logits, options, and what trains are the same again."""
    for name in ("resnet", "vit"):
        save_model(name, tmp_path / name)
    model = StitchedModelForImageClassification.from_anchors(tmp_path / "resnet", tmp_path / "vit", order="given")
    config = used(kind, r=3, lora_alpha=2.5, hidden=7)
    model.set_route(model.add_stitch("resnet[:2] + vit[1:]", config))
    model.fit_stitches(images)
    as_trained(model.stitches)
    model.save_pretrained(tmp_path / "adapter")
    again = StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
    assert again.config.stitch_parts("resnet_2__vit_1")[3] == config
    trains = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, again)]
    assert trains[0] == trains[1] and ("stitches.resnet_2__vit_1.proj.weight" in trains[1]) == (kind != "lora")


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_training_goes_on_from_the_fit(kind):
    """Fitted to |x|, of which no affine map explains anything, an MLP learns it; rank 1 learns a change of rank 1."""
    torch.manual_seed(0)
    stitch = make_stitch(Layout("NCHW", 6, (4, 4)), Layout("NCHW", 5, (4, 4)), used(kind, r=1, hidden=24))
    x = torch.randn(64, 6, 4, 4)
    y, change = x[:, :5].abs(), torch.einsum("d,nchw->ndhw", torch.arange(5.0), x)
    fit(stitch, x, y)
    goal, weight, variance = y if kind == "mlp" else y + change, stitch.proj.weight.clone(), 1 - 2 / np.pi
    optimizer = torch.optim.AdamW((p for p in stitch.parameters() if p.requires_grad), lr=0.02, weight_decay=0)
    losses = []
    for _ in range(250):
        loss = (stitch(x) - goal).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(variance if kind == "mlp" else variance + 36, rel=0.1)
    assert losses[-1] < 0.2 * variance if kind == "mlp" else losses[-1] == pytest.approx(variance, rel=0.1)
    assert torch.equal(stitch.proj.weight, weight) == (kind == "lora")


def test_learned_class_token_is_the_mean():
    source, target = Layout("NCHW", 3, (4, 4)), Layout("NLC", 4, (4, 4), 1)
    stitch = make_stitch(source, target, StitchConfig(class_token="learn"))
    y = torch.randn(target.shape(30))
    x = torch.randn(source.shape(30))
    fit(stitch, x, y)
    assert torch.allclose(stitch(x)[:, 0], y[:, 0].mean(0).expand(30, 4), atol=1e-6)


@pytest.mark.parametrize("spare", [1, 5])
def test_spare_tokens_are_added_or_dropped(spare):
    """A target that is a map of the grid plus another of the prefix tokens: adding finds both, dropping cannot."""
    torch.manual_seed(0)
    source, target = Layout("NLC", 3, (4, 4), spare), Layout("NCHW", 2, (4, 4))
    x = torch.randn(source.shape(60))
    spatial, prefix = source.split(x)
    of_grid, of_prefix, bias = torch.randn(2, 3), torch.randn(2, 3 * spare), torch.randn(2)
    y = torch.einsum("dc,nchw->ndhw", of_grid, spatial) + (prefix.flatten(1) @ of_prefix.T + bias)[:, :, None, None]
    errors = {}
    for token in ("add", "drop"):
        stitch = make_stitch(source, target, StitchConfig(class_token=token))
        fit(stitch, x, y)
        errors[token] = (stitch(x) - y).abs().max().item()
    assert errors["add"] < 1e-4 and errors["drop"] > 0.1
    stitch = make_stitch(source, target, StitchConfig(class_token="add"))
    assert stitch.added.weight.shape == (2, 3 * spare)


@pytest.mark.parametrize("kind", STITCHES)
def test_each_value_decides_for_its_own_direction(kind):
    """Towards a class token "add" and "drop" mean "pool"; away from one "learn" and "pool" mean "drop".

    These are the names in saved adapters, too.
    """
    cnn, vit = Layout("NCHW", 3, (4, 4)), Layout("NLC", 4, (4, 4), 1)

    def weights(source, target, token):
        stitch = make_stitch(source, target, StitchConfig(kind, token))
        return sorted(name for name, _ in stitch.named_parameters())

    assert weights(cnn, vit, "add") == weights(cnn, vit, "drop") == weights(cnn, vit, "pool")
    assert weights(vit, cnn, "learn") == weights(vit, cnn, "pool") == weights(vit, cnn, "drop")
    plain = ["proj.bias", "proj.weight", *BESIDE[kind]]
    assert weights(vit, cnn, "add") == sorted(["added.weight", *plain])
    assert weights(cnn, vit, "learn") == sorted(["prefix", *plain])
    assert weights(cnn, vit, "pool") == sorted(["pool.bias", "pool.weight", *plain])


@pytest.mark.parametrize("end", MODELS)
@pytest.mark.parametrize("front", MODELS)
def test_every_pair_trains(anchors, images, front, end):
    """Any layout to any other, on real networks: logits, gradients, and a fit that beats random weights."""
    torch.manual_seed(0)
    point = StitchPoint(front, 2, end, 1 if end == front else 2)
    stitch = make_stitch(anchors[front].layout(2), anchors[end].layout(point.target_cut), StitchConfig())
    with torch.no_grad():
        source, goal = anchors[front](images, stop=2), anchors[end](images, stop=point.target_cut)
        random = (stitch(source) - goal).square().mean()
    logits = anchors[end](stitch(source), start=point.target_cut)
    assert logits.shape == (len(images), CLASSES)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stitch.parameters())
    fit_stitches({point: stitch}, anchors, [{front: images, end: images}])
    with torch.no_grad():
        assert (stitch(source) - goal).square().mean() < 0.9 * random


@pytest.mark.parametrize("token", CLASS_TOKENS)
@pytest.mark.parametrize("end", ["resnet", "vit", "swin", "plain"])
@pytest.mark.parametrize("front", ["mobilenet", "registers", "plain"])
def test_anchors_of_different_image_sizes(front, end, token):
    """A CNN at 96 pixels beside networks at 64: grids that do not divide each other."""
    torch.manual_seed(0)
    side = 96 if front in ("mobilenet", "plain") else SIZE
    anchors = [Anchor(make_model(front), "front", Preprocessing((side, side))), make_anchor(end, 1)]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    route = model.set_route(model.add_stitch(f"front[:2] + {anchors[1].name}[2:]", StitchConfig(class_token=token)))
    images, (stitch,) = torch.randn(6, 3, side, side), model.stitches.values()
    assert stitch.source.grid != stitch.target.grid or front == "registers"
    model(images, labels=torch.arange(6) % CLASSES).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stitch.parameters())
    (point,) = route.stitch_points
    with torch.no_grad():
        source, goal = anchors[0](images, stop=2), anchors[1](model.images_for(anchors[1].name, images), stop=2)
        random = (stitch(source) - goal).square().mean()
        model.fit_stitches(images)
        assert (stitch(source) - goal).square().mean() < 0.9 * random
    assert point.name in model.config.stitches


@pytest.mark.parametrize("options", [{"kind": "cubic"}, {"class_token": "guess"}])
def test_config_refused(options):
    with pytest.raises(ValueError, match="is not one of"):
        StitchConfig(**options)


WHOLE = [{"r": value} for value in (0, -1, 2.0, True, "8", None, 10**9)]
WHOLE += [{"hidden": value} for value in (0, -1, 2.0, True, "8")]


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_not_a_whole_number(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be a whole number from 1 to 16384"):
        StitchConfig("lora", **options)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 10**400, "16", None, True])
def test_not_a_scale(value):
    with pytest.raises(ValueError, match="lora_alpha=.* must be a finite number above 0"):
        StitchConfig("lora", lora_alpha=value)


UNUSED = [
    ("linear", {"r": 4}),
    ("linear", {"hidden": 8}),
    ("mlp", {"lora_alpha": 4}),
    ("branch", {"class_token": "add"}),
]


@pytest.mark.parametrize(("kind", "options"), UNUSED, ids=str)
def test_an_option_that_the_kind_does_not_use(kind, options):
    """An error; in an adapter of an earlier version, which took it, it has no effect."""
    with pytest.raises(ValueError, match=f"kind '{kind}' do not use .*{next(iter(options))}"):
        StitchConfig(kind, **options)
    assert StitchConfig.from_dict({"kind": kind, **options}) == StitchConfig(kind)
    with pytest.raises(TypeError, match="unexpected"):
        StitchConfig.from_dict({"kind": kind, "rank": 4})


@pytest.mark.parametrize("token", CLASS_TOKENS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_sample_of_positions(source, target, token):
    """Sampled rows are the full rows at the places drawn, those of inputs and outputs at the same ones."""
    torch.manual_seed(1)
    x, y = torch.randn(source.shape(6)), torch.randn(target.shape(6))
    problems = [p for kind in STITCHES for p in make_stitch(source, target, StitchConfig(kind, token)).problems()]
    for problem in problems:
        chosen = problem.chosen(6, 3, seed=4)
        for activation, rows in ((x, problem.inputs), (y, problem.outputs)):
            every = rows(activation, None)
            assert every.shape[:2] == (6, problem.positions)
            if chosen is None:
                assert problem.positions <= 3
                continue
            assert chosen.shape == (6, 3) and all(len(set(row)) == 3 for row in chosen.tolist())
            some = rows(activation, chosen)
            expected = torch.stack([image[places] for image, places in zip(every, chosen, strict=True)])
            assert torch.allclose(some, expected, atol=1e-6)


@pytest.mark.parametrize("source", [(4, 4), (3, 5), (7, 7)])
@pytest.mark.parametrize("target", [(4, 4), (2, 2), (9, 8), (5, 3)])
def test_resizing_as_a_matrix(source, target):
    x = torch.randn(2, 3, *source)
    by_matrix = x.flatten(2) @ resize_matrix(source, target).T
    assert torch.allclose(by_matrix, resize(x, target).flatten(2), atol=1e-6)


def test_a_printed_stitch_has_its_shapes(pair):
    """Of what goes in and comes out; a copy of a block names its anchor."""
    assert "LinearStitch(\n  (N, 16, 8, 8) -> (N, 17, 32)\n" in repr(pair.stitches["resnet_3__vit_2"])
    (name,) = (point.name for point in pair.add_stitch("vit[:1] + vit[3:]", StitchConfig("branch")).stitch_points)
    assert repr(pair.stitches[name]).startswith("BranchStitch(\n  anchor='vit', block=")
