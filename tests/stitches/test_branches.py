"""Branches: an anchor's own block with other weights, alone trained, from any cut to any later one."""

import copy
import gc
import pickle
import weakref
from itertools import pairwise

import pytest
import timm
import torch
from conftest import CLASSES, SIZE, make_anchor, spread
from torch import nn
from torch.utils.data import TensorDataset

from restnet_hf import StitchConfig, StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.routes.route import StitchPoint
from restnet_hf.stitches.branches import BranchStitch, block_tensors, stitch_at
from restnet_hf.stitches.layers import make_stitch
from restnet_hf.stitches.pruning import activation, pruned


BRANCH = StitchConfig("branch")
NETWORKS = {
    "resnet": ("resnet26", {"channels": (8, 16, 24, 32)}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "vit": ("vit_tiny_patch16_224", {"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 5, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": SIZE,
            "window_size": 2,
            "embed_dim": 16,
            "depths": (1, 4, 1, 1),
            "num_heads": (1, 2, 2, 2),
        },
    ),
}


def make(name):
    """A tiny anchor of timm, random, BatchNorm statistics too."""
    model, options = NETWORKS[name]
    network = spread(timm.create_model(model, num_classes=CLASSES, **options))
    rng = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=rng)
            module.running_var.uniform_(0.5, 2, generator=rng)
    return Anchor(network, name, Preprocessing((SIZE, SIZE)))


@pytest.fixture(scope="module")
def timm_anchors():
    """Cuts found once; tests do not change them."""
    return {name: make(name) for name in NETWORKS}


def blocks(network):
    """The modules between the cuts, by hand: those of cut 1 first."""
    if hasattr(network, "layer1"):
        return [block for stage in range(1, 5) for block in getattr(network, f"layer{stage}")]
    if hasattr(network, "layers"):  # Swin merges patches before the first block of a stage
        stages = [list(layer.blocks) for layer in network.layers]
        first = [
            nn.Sequential(layer.downsample, stage[0]) for layer, stage in zip(network.layers, stages, strict=True)
        ]
        return [block for head, stage in zip(first, stages, strict=True) for block in (head, *stage[1:])]
    found = list(network.blocks)
    return [block for stage in found for block in stage] if isinstance(found[0], nn.Sequential) else found


# Of each anchor: from where to where, which block is copied, and whether an affine stitch leads to it.
SPANS = {
    "resnet": [((1, 2), 2, False), ((3, 4), 4, False), ((4, 6), 5, False), ((2, 4), 3, False), ((2, 6), 5, True)],
    "mobilenet": [((4, 6), 5, False), ((3, 5), 4, False), ((8, 11), 9, False), ((2, 9), 9, True), ((1, 4), 4, True)],
    "vit": [((1, 2), 2, False), ((1, 3), 2, False), ((2, 5), 3, False)],
    "swin": [((2, 4), 3, False), ((2, 5), 3, False), ((1, 3), 2, False), ((5, 7), 7, True), ((1, 7), 7, True)],
}
CASES = [pytest.param(name, *case, id=f"{name}-{case[0][0]}-{case[0][1]}") for name in SPANS for case in SPANS[name]]


def moved(branch, seed=0):
    """The same branch with other weights, and statistics, than the anchor's."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in branch.state_dict().values():
            tensor.add_(0.05 * torch.rand(tensor.shape, generator=rng))
    return branch


def copied(anchor, branch):
    """The network with a branch's tensors loaded into it, by torch's own means."""
    network = copy.deepcopy(anchor.model)
    state = network.state_dict()
    assert branch.tensors().keys() <= state.keys()
    network.load_state_dict({**state, **branch.tensors()})
    return network


@pytest.mark.parametrize(("name", "span", "block", "enters"), CASES)
@torch.no_grad()
def test_by_hand(timm_anchors, name, span, block, enters):
    """Within a stage the first block, across borders the last that changes the layout, as a module of the network."""
    anchor, (start, stop) = timm_anchors[name], span
    assert len(blocks(anchor.model)) == anchor.depth
    kinds = [anchor.layout(cut) for cut in range(start, stop + 1)]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert enters == (anchor.layout(start) != anchor.layout(block - 1)) and (changes == 0) == (kinds[0] == kinds[-1])
    branch = BranchStitch(anchor, start, stop)
    assert branch.block == block and (branch.enter is not None) == enters
    x = anchor(torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)), 0, start)
    entered = branch.enter(x) if enters else x
    assert torch.equal(branch(x), anchor(entered, block - 1, block)), "it starts as the anchor's own block"
    moved(branch)
    entered = branch.enter(x) if enters else x
    by_hand = blocks(copied(anchor, branch))[block - 1](entered)
    assert branch(x).shape == anchor.layout(stop).shape(3)
    assert torch.allclose(branch(x), by_hand, atol=1e-5 * by_hand.abs().max())
    assert not torch.allclose(branch(x), anchor(entered, block - 1, block), atol=1e-2 * by_hand.abs().max())


@pytest.mark.parametrize(("name", "span", "block", "enters"), CASES)
def test_what_trains(timm_anchors, name, span, block, enters):
    """Exactly the parameters of the block by hand, and of the stitch that leads to it; all of them have a gradient."""
    anchor = timm_anchors[name]
    branch = BranchStitch(anchor, *span)
    inside = {id(parameter) for parameter in blocks(anchor.model)[block - 1].parameters()}
    wanted = {n: p for n, p in anchor.model.named_parameters() if id(p) in inside}
    assert {key.replace("/", ".") for key in branch.own} == wanted.keys()
    enter = sum(p.numel() for p in branch.enter.parameters()) if enters else 0
    assert sum(p.numel() for p in branch.parameters()) == sum(p.numel() for p in wanted.values()) + enter
    x = activation(anchor, span[0]).requires_grad_()
    weights = torch.randn(branch(x).shape, generator=torch.Generator().manual_seed(3))
    (branch(x) * weights).sum().backward()
    gradients = [parameter.grad for parameter in branch.parameters()] + [x.grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) > 0.8 * len(gradients)
    assert all(p.grad is None and not p.requires_grad for p in anchor.parameters())


@pytest.mark.parametrize(("name", "span", "block", "enters"), CASES)
@torch.no_grad()
def test_baked(timm_anchors, name, span, block, enters):
    """A plain module that gives the same to the bit and keeps its numbers when the branch moves on."""
    anchor = timm_anchors[name]
    branch = moved(BranchStitch(anchor, *span))
    x = activation(anchor, span[0]).repeat(2, *[1] * (activation(anchor, span[0]).dim() - 1))
    baked, expected = branch.bake(), branch(x)
    assert torch.equal(baked(x), expected)
    moved(branch, 5)
    assert torch.equal(baked(x), expected) and not torch.equal(branch(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(baked))(x), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_state_holds_the_block_alone(timm_anchors, name):
    """Parameters, and BatchNorm statistics as buffers; nothing of the rest of the anchor."""
    anchor = timm_anchors[name]
    branch = BranchStitch(anchor, 2, 4)
    module = blocks(anchor.model)[branch.block - 1]
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    numbers = sum(p.numel() for p in module.parameters()) + sum(2 * m.num_features for m in norms)
    state = branch.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == numbers
    assert len({*branch.buffers()}) == 2 * len(norms)
    assert not [m for m in branch.modules() if isinstance(m, Anchor)]
    fresh = BranchStitch(anchor, 2, 4)
    moved(branch)
    assert not torch.equal(fresh(activation(anchor, 2)), branch(activation(anchor, 2)))
    fresh.load_state_dict(branch.state_dict())
    assert torch.equal(fresh(activation(anchor, 2)), branch(activation(anchor, 2)))


@pytest.mark.parametrize(("name", "block"), [("mobilenet", 5), ("vit", 3), ("swin", 4), ("resnet", 4)])
def test_pruned_branch(timm_anchors, name, block):
    """The weakest channels are gone, all that is left trains, and it bakes to fewer weights."""
    anchor = timm_anchors[name]
    whole, slim = (BranchStitch(anchor, block - 1, block, share) for share in (0, 0.5))
    slimmed = pruned(anchor, block, 0.5)
    assert all(torch.equal(slim.tensors()[key], tensor) for key, tensor in slimmed.items())
    sizes = [sum(p.numel() for p in b.parameters()) for b in (slim, whole)]
    assert sizes[0] < 0.8 * sizes[1]
    x = activation(anchor, block - 1)
    slim(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.parameters())
    baked = moved(slim).bake()
    with torch.no_grad():
        assert torch.equal(baked(x), slim(x))
        assert torch.equal(whole(x), anchor(x, block - 1, block)), "the anchor is whole again"
    kept = sum(p.numel() for p in baked.parameters()) - sizes[0]
    assert kept == sum(p.numel() for p in whole.bake().parameters()) - sizes[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_ghosts_take_no_memory(timm_anchors, name):
    """A branch of which only shapes are needed shares the anchor's own weights, and changes none."""
    anchor = timm_anchors[name]
    before = {key: value.clone() for key, value in anchor.state_dict().items()}
    point = StitchPoint(name, 2, name, 4)
    shapes, real = (stitch_at(point, {name: anchor}, BRANCH, shapes_only=each) for each in (True, False))
    own = {tensor.data_ptr() for tensor in (*anchor.parameters(), *anchor.buffers())}
    assert {tensor.data_ptr() for tensor in shapes.own.values()} <= own
    assert not {tensor.data_ptr() for tensor in real.own.values()} & own
    assert [t.shape for t in shapes.state_dict().values()] == [t.shape for t in real.state_dict().values()]
    assert all(torch.equal(value, before[key]) for key, value in anchor.state_dict().items())


def test_names_say_what_is_pruned(timm_anchors):
    """As those of `skip` do; an option of the stitches comes first."""
    anchors = {"vit": timm_anchors["vit"]}

    def hidden(via, config=BRANCH):
        branch = stitch_at(StitchPoint("vit", 2, "vit", 3, via=via), anchors, config)
        return next(len(p) for key, p in branch.own.items() if key.endswith("fc1/weight"))

    assert {via: hidden(via) for via in ("", "w2", "pruned")} == dict.fromkeys(("", "w2", "pruned"), 128)
    assert (hidden("prune25_2"), hidden("prune50_2")) == (96, 64)
    assert hidden("prune25_2", StitchConfig("branch", prune=0.75)) == 32


def test_refused(timm_anchors):
    vit, resnet = timm_anchors["vit"], timm_anchors["resnet"]
    for start, stop in ((0, 2), (3, 2), (2, 2), (1, 6), (-1, 2)):
        with pytest.raises(ValueError, match="must lead from a cut to a later one, 1 to 5"):
            BranchStitch(vit, start, stop)
    with pytest.raises(ValueError, match="cannot join 'resnet' to 'vit'; choose another kind"):
        stitch_at(StitchPoint("resnet", 2, "vit", 3), {"vit": vit, "resnet": resnet}, BRANCH)
    with pytest.raises(ValueError, match="has no hidden channels"):
        BranchStitch(make_anchor("plain"), 1, 2, 0.5)
    with pytest.raises(ValueError, match="a stitch of kind 'branch' does not map layouts"):
        make_stitch(vit.layout(1), vit.layout(2), BRANCH)
    for options in (
        {"kind": "linear", "prune": 0.5},
        {"kind": "branch", "prune": 1},
        {"kind": "branch", "prune": "1"},
    ):
        with pytest.raises(ValueError, match="prune="):
            StitchConfig(**options)


@pytest.mark.parametrize("name", ["plain", "tnt", "swin", "distilled"])
@torch.no_grad()
def test_any_classifier(anchors, images, name):
    """Of every library and layout, activations of several tensors too."""
    anchor = anchors[name]
    branch = BranchStitch(anchor, 1, 3)
    x = anchor(images, 0, 1)
    kept = x.clone()
    assert moved(branch)(x).shape == anchor.layout(3).shape(len(images)) and torch.equal(x, kept)
    assert torch.equal(branch.bake()(x), branch(x))


def test_tensors_of_a_block_are_those_it_uses(anchors):
    """The embeddings of a ViT run in every segment, and are no part of its blocks."""
    names = block_tensors(anchors["vit"], 2).keys()
    assert names and all(name.startswith(("vit.layers.1.", "vit.encoder.layer.1.")) for name in names)


def test_made_while_nothing_keeps_gradients(anchors, images):
    """As where a model is loaded to be used at once."""
    with torch.inference_mode():
        names = block_tensors(anchors["resnet"], 3).keys()
        branch = BranchStitch(anchors["resnet"], 2, 3)
        found = branch(anchors["resnet"](images, 0, 2))
    assert names == block_tensors(anchors["resnet"], 3).keys()
    with torch.no_grad():
        assert torch.equal(found, anchors["resnet"](images, 0, 3))


def test_half_floats():
    anchor = make_anchor("mobilenet").to(torch.bfloat16)
    branch = stitch_at(StitchPoint("mobilenet", 1, "mobilenet", 4, via=""), {"mobilenet": anchor}, BRANCH)
    assert branch.enter is not None and {t.dtype for t in branch.state_dict().values()} == {torch.float32}
    assert branch(activation(anchor, 1)).dtype == torch.bfloat16


def elastic(name="resnet"):
    return StitchedModelForImageClassification.from_anchors(make(name), routes="skip")


def test_training_moves_branches_alone(images):
    """The anchor's logits stay to the bit, every branch moves, BatchNorm statistics of both stay."""
    model = elastic()
    anchor = model.anchors["resnet"]
    with torch.no_grad():
        before, frozen = anchor(images), {key: value.clone() for key, value in anchor.state_dict().items()}
    start = {key: value.clone() for key, value in model.stitches.state_dict().items()}
    data = TensorDataset(torch.randn(16, 3, SIZE, SIZE), torch.arange(16) % CLASSES)
    routes = ["resnet[:1] + resnet[3:5] + resnet[8:]", "resnet[:2] + resnet[4:4] + resnet[6:]"]
    args = TrainArgs(num_train_epochs=2, batch_size=8, learning_rate=1e-2, distillation=0.5, keep="last")
    train(model, data, args, routes=routes)
    used = {point.name for route in routes for point in model.route(route).stitch_points}
    for key, value in model.stitches.state_dict().items():
        name = key.split(".")[0]
        trains = name in used and "running_" not in key
        assert torch.equal(value, start[key]) != trains, key
    assert all(torch.equal(value, frozen[key]) for key, value in anchor.state_dict().items())
    with torch.no_grad():
        assert torch.equal(anchor(images), before)


def test_copies_have_their_own_anchor(images):
    """A copied model's branches run in its own anchor, and a deleted one is freed."""
    model = elastic("vit")
    route = model.set_route("vit[:1] + vit[3:]")
    twin = copy.deepcopy(model)
    name = route.stitch_points[0].name
    assert twin.stitches[name].anchor is twin.anchors["vit"] is not model.anchors["vit"]
    with torch.no_grad():
        assert torch.equal(twin(images).logits, model(images).logits)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images).logits, model(images).logits)
    watched = weakref.ref(twin.anchors["vit"])
    del twin
    gc.collect()
    assert watched() is None


def test_least_squares_lead_into_a_branch():
    """What stands for blocks of two layouts has an affine stitch that aims at the block's own input."""
    model = StitchedModelForImageClassification.from_anchors(make("swin"), make("vit"), order="given")
    route = model.add_stitch("swin[:5] + swin[7:]", BRANCH)
    other = model.add_stitch("swin[:2] + swin[4:]", BRANCH)
    noise = torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    r2 = model.fit_stitches(noise)
    assert r2.keys() == {"swin_5__swin_7"}, "the other has nothing to fit"
    assert model.config.stitches["swin_5__swin_7"]["r2"] == r2["swin_5__swin_7"]
    anchor, enter = model.anchors["swin"], model.stitches["swin_5__swin_7"].enter
    with torch.no_grad():
        x, y = anchor(noise, 0, 5), anchor(noise, 0, 6)
        found = enter(x)
        explained = 1 - (found - y).square().sum() / (y - y.flatten(0, 2).mean(0)).square().sum()
        assert 0.1 < r2["swin_5__swin_7"] < explained, "on held-out images a little less"
        model.set_route(route)
        assert torch.equal(model(noise).logits, anchor(anchor(enter(x), 6, 7), 7))
    model.set_route(other)


def test_what_cannot_be_made_leaves_nothing_behind():
    """The second stitch of a route fails: the first is not left without a route."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), make_anchor("vit", 1))
    with pytest.raises(ValueError, match="a branch replaces blocks of one anchor"):
        model.add_stitch("resnet[:1] + resnet[3:4] + vit[2:]", StitchConfig("branch"))
    assert not model.routes and not model.config.stitches and not len(model.stitches)
