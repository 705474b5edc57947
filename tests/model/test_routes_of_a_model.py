"""A route works outside of eager mode: baked, compiled, exported, copied, pickled, in other types and layouts."""

import copy
import pickle

import pytest
import torch
from conftest import CLASSES, MODELS, SIZE, make_anchor, make_model

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification
from restnet_hf.training.loop import set_checkpointing


ENDS = ["resnet", "vit", "swin", "swin_nhwc", "registers", "tnt"]


@pytest.fixture(params=ENDS)
def stitched(request):
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("mobilenet"), make_anchor(request.param, seed=1), order="given"
    )
    model.set_route(model.add_stitch(f"mobilenet[:5] + {request.param}[2:]"))
    return model


@torch.no_grad()
def test_baked(stitched, images):
    baked, expected = stitched.bake(), stitched(images).logits
    assert torch.equal(baked(images), expected)
    assert torch.equal(copy.deepcopy(baked)(images[:2]), baked(images[:2]))
    assert torch.equal(pickle.loads(pickle.dumps(baked))(images), expected)
    profile = stitched.profile(routes=[stitched.active_route])
    assert sum(p.numel() for p in baked.parameters()) == profile.routes[0].costs["params"]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_baked_holds_what_the_profile_says(images, name):
    """Every representative in front and at the end, with its own classifier and with a new head."""
    for options in ({}, {"num_labels": 3}) if name != "distilled" else ({},):
        anchors = [make_anchor(name), make_anchor("resnet", seed=1)]
        anchors[1].name = "other"
        model = StitchedModelForImageClassification.from_anchors(*anchors, order="given", **options)
        for route in (f"{name}[:2] + other[3:]", f"other[:3] + {name}[2:]", f"{name}[:]"):
            route = model.add_stitch(route)
            baked = model.bake(route)
            model.set_route(route)
            assert torch.equal(baked(images), model(images).logits)
            (row,) = model.profile(routes=[route]).routes
            assert sum(p.numel() for p in baked.parameters()) == row.costs["params"]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_whole(stitched, images):
    baked = stitched.bake()
    compiled = torch.compile(baked, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images), baked(images), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_exported_with_a_dynamic_batch(stitched, images):
    baked = stitched.bake()
    batch = torch.export.Dim("batch", min=1, max=32)
    program = torch.export.export(baked, (images,), dynamic_shapes=({0: batch},), strict=False).module()
    for size in (1, 2, 6):
        assert torch.allclose(program(images[:size]), baked(images[:size]), atol=1e-5)


@torch.no_grad()
def test_copied_and_pickled(stitched, images):
    expected = stitched(images).logits
    for twin in (copy.deepcopy(stitched), pickle.loads(pickle.dumps(stitched))):
        assert torch.equal(twin(images).logits, expected)
        assert twin.steps(twin.active_route)[0].module is not stitched.steps(stitched.active_route)[0].module


@torch.no_grad()
def test_types_and_memory_layouts(stitched, images):
    expected = stitched(images).logits
    last = stitched.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)).logits
    assert torch.allclose(last, expected, atol=1e-4)
    half = stitched.to(torch.bfloat16)
    assert (half(images).logits.float() - expected).abs().max() < 0.15 * expected.abs().max()
    assert torch.equal(half.bake()(images.bfloat16()), half(images).logits)


def saved_for_the_way_back(model, images):
    """Numbers that autograd keeps for one loss, and the gradients it gives."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images, labels=torch.arange(len(images)) % CLASSES).loss
    loss.backward()
    return sum(kept.values()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", [True, False])
def test_activation_checkpointing(stitched, images, mode):
    """Equal gradients from far fewer numbers kept, and transformers' own switch turns it on and off."""
    stitched.train(mode)
    whole, gradients = saved_for_the_way_back(stitched, images)
    set_checkpointing(stitched, True)
    assert all(anchor.gradient_checkpointing for anchor in stitched.anchors.values())
    few, again = saved_for_the_way_back(stitched, images)
    assert few < whole / 2
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True)) and len(gradients) >= 2
    with torch.no_grad():
        stitched(images)
    set_checkpointing(stitched, False)
    assert saved_for_the_way_back(stitched, images)[0] == whole


@pytest.mark.parametrize("name", ["swin", "swin_nhwc"])
def test_a_networks_own_checkpointing_does_no_harm(images, name):
    """Where a stage recomputes itself, a segment that starts inside of it still gives the right gradients."""
    gradients = []
    for own in (False, True):
        network = make_model(name, 1)
        if own:
            network.set_grad_checkpointing() if name == "swin_nhwc" else set_checkpointing(network, True)
        model = StitchedModelForImageClassification.from_anchors(
            make_anchor("mobilenet"), Anchor(network, "end", Preprocessing((SIZE, SIZE))), order="given"
        )
        torch.manual_seed(0)
        model.set_route(model.add_stitch("mobilenet[:5] + end[2:]"))
        gradients.append(saved_for_the_way_back(model, images)[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointed_segments_are_checked_too(stitched):
    set_checkpointing(stitched, True)
    anchor = stitched.anchors["mobilenet"]
    hidden = torch.zeros(anchor.layout(2).shape(1), requires_grad=True)
    for stop in (1, 2):
        with pytest.raises(ValueError, match="cannot stop at"):
            anchor(hidden, 2, stop)


def test_other_batch_sizes(stitched):
    with torch.no_grad():
        assert [len(stitched(torch.randn(n, 3, SIZE, SIZE)).logits) for n in (1, 3, 7)] == [1, 3, 7]
