"""Any classifier is cut where it can be."""

import copy

import pytest
import timm
import torch
import transformers
from conftest import CLASSES, MODELS, SIZE, OneBlock, assert_parts_make_the_whole, make_anchor, make_model, spread
from torch import nn

from restnet_hf.anchors import discovery
from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.layouts import JointLayout, Layout
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.stitches.layers import StitchConfig, make_stitch


@pytest.mark.parametrize("name", MODELS)
def test_cuts_and_layouts(anchors, name):
    anchor = anchors[name]
    _, kind, prefix = MODELS[name]
    assert anchor.depth >= 2 and not anchor.search_result.rejected
    assert {(cut.layout.kind, cut.layout.prefix) for cut in anchor.cuts} == {(kind, prefix)}
    assert anchor.search_result.classes == CLASSES


def test_module_granularity_finds_more():
    blocks, modules = make_anchor("resnet"), make_anchor("resnet")
    modules.granularity = "module"
    assert modules.depth > blocks.depth


def test_search_leaves_the_model_as_it_was(images):
    model = MODELS["mobilenet"][0]().train()
    before = copy.deepcopy(model.state_dict())
    anchor = Anchor(model, "a", Preprocessing((SIZE, SIZE)))
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert anchor.depth > 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())
    anchor.train()
    assert not any(module.training for module in model.modules())


def test_cubes_are_laid_out_as_their_neighbours():
    """16 channels on a grid of 16 x 16 say nothing themselves, and inside its blocks this network is channels-last."""
    config = transformers.ConvNextV2Config(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=CLASSES)
    anchor = Anchor(spread(transformers.ConvNextV2ForImageClassification(config)), "a", Preprocessing((SIZE, SIZE)))
    assert {cut.layout.kind for cut in anchor.cuts} == {"NCHW"} and anchor.layout(1).grid == (16, 16)


def test_too_few_cuts():
    anchor = Anchor(OneBlock(), "small", Preprocessing((16, 16)))
    with pytest.raises(ValueError, match=r"'small' \(OneBlock\) has 1 places .* 2 are needed.* Choose another"):
        _ = anchor.cuts


class Bypassed(OneBlock):
    """The second block's output misses what went around it, so it is no cut."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3, 2), *(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(3))])

    def forward(self, x):
        x = self.blocks[0](x)
        y = self.blocks[1](x)
        z = self.blocks[2](y) + x
        return self.head(self.blocks[3](z).mean((2, 3)))


def test_only_dominators_are_cuts():
    anchor = Anchor(spread(Bypassed(), 0), "skip", Preprocessing((16, 16)))
    assert [cut.name for cut in anchor.cuts] == ["blocks.0", "blocks.3"]


class Remembers(OneBlock):
    """The last block reads a shape that only a real run of the first one leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(c, 4, 3, 1, 1) for c in (3, 4, 4))

    def forward(self, x):
        x = self.blocks[0](x)
        scale = x.detach().mean()
        x = self.blocks[1](x)
        return self.head((self.blocks[2](x) * scale).mean((2, 3)))


def test_certification_rejects_what_autograd_cannot_see():
    anchor = Anchor(spread(Remembers(), 0), "hidden", Preprocessing((16, 16)))
    with pytest.raises(ValueError, match=r"blocks\.1: run from here on, the network is off by"):
        _ = anchor.cuts


class Positioned(OneBlock):
    """The first block also returns the positions of its patches, which a later one reads."""

    class Patches(nn.Conv2d):
        def forward(self, x):
            x = super().forward(x)
            return x, torch.arange(x.shape[-1]).expand(len(x), -1)

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.Patches(3, 4, 3, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(3))

    def forward(self, x):
        x, positions = self.stem(x)
        for block in self.blocks:
            x = block(x) * (1 + positions[:, None, None, :])
        return self.head(x.mean((2, 3)))


def test_values_that_do_not_depend_on_the_image_are_kept():
    anchor = Anchor(spread(Positioned(), 0), "positioned", Preprocessing((16, 16)))
    assert anchor.depth == 3 and not anchor.search_result.rejected
    assert_parts_make_the_whole(anchor, torch.randn(5, 3, 16, 16))
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(anchor.bake(2)(anchor(images, stop=2)), anchor(images))


class Tabled(Positioned):
    """Beside the map, the first block returns a table of two rows, as many as there are images in the search."""

    class Patches(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), torch.tensor([[1.0], [2.0]], device=x.device)

    def forward(self, x):
        x, table = self.stem(x)
        for block in self.blocks:
            x = block(x) * table[0] + table[1]
        return self.head(x.mean((2, 3)))


def test_a_table_is_not_taken_for_a_batch():
    anchor = Anchor(spread(Tabled(), 0), "tabled", Preprocessing((16, 16)))
    assert anchor.depth == 3 and not anchor.search_result.rejected
    for size in (2, 5):
        assert_parts_make_the_whole(anchor, torch.randn(size, 3, 16, 16))


class Masked(Positioned):
    """Beside the map, the first block returns a mask that autograd cannot see to depend on the image."""

    class Patches(nn.Conv2d):
        def forward(self, x):
            x = super().forward(x)
            return x, x.mean(1, keepdim=True) > 0

    def forward(self, x):
        x, mask = self.stem(x)
        for block in self.blocks:
            x = block(x) * mask
        return self.head(x.mean((2, 3)))


class Late(Masked):
    """Only the last block hands on a mask, so all places before it are valid cuts."""

    class Patches(nn.Conv2d):
        pass

    class Last(nn.Conv2d):
        def forward(self, x):
            x = super().forward(x)
            return x, x.mean(1, keepdim=True) > x.mean()

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(self.Last(4, 4, 3, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks[:-1]:
            x = block(x)
        x, mask = self.blocks[-1](x)
        return self.head((x * mask).mean((2, 3)))


def test_values_that_change_later_do_no_harm():
    anchor = Anchor(spread(Late(), 0), "late", Preprocessing((16, 16)))
    assert [cut.name for cut in anchor.cuts] == [f"blocks.{k}" for k in range(3)]
    assert list(anchor.search_result.rejected) == ["blocks.3"]
    images = torch.randn(5, 3, 16, 16)
    assert_parts_make_the_whole(anchor, images)
    assert torch.equal(anchor.bake(2)(anchor.bake(0, 2)(images)), anchor(images))


class Indexed(Positioned):
    """Beside the map, the first block returns where each image begins: one number more than there are images."""

    class Patches(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), torch.arange(len(x) + 1, device=x.device)

    def forward(self, x):
        x, begins = self.stem(x)
        for block in self.blocks:
            x = block(x) * (1 + begins[:-1, None, None, None])
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("network", [Masked, Indexed])
def test_values_that_change_are_not_taken_for_constants(network):
    anchor = Anchor(spread(network(), 0), "changing", Preprocessing((16, 16)))
    with pytest.raises(ValueError, match=r"blocks\.1: 'stem' hands on values that depend on the images"):
        _ = anchor.cuts


class Steps(Positioned):
    """Later blocks write into the constant that the first one returns."""

    class Patches(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), torch.zeros(1, device=x.device)

    def forward(self, x):
        x, step = self.stem(x)
        for block in self.blocks:
            x = block(x) * step.add_(1)
        return self.head(x.mean((2, 3)))


def test_constants_are_not_written_into():
    anchor = Anchor(spread(Steps(), 0), "steps", Preprocessing((16, 16)))
    for _ in range(2):
        assert_parts_make_the_whole(anchor, torch.randn(5, 3, 16, 16))


def test_not_a_classifier():
    with pytest.raises(ValueError, match="does not map images to logits"):
        Anchor(nn.Conv2d(3, 4, 3), "conv", Preprocessing((16, 16))).cuts  # noqa: B018


# The architectures of the recipes, at the recipes' size, with random weights: cuts do not depend on weights.
RECIPE_ANCHORS = {
    "resnet-50": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(downsample_in_bottleneck=True, num_labels=10)
    ),
    **{
        name: lambda name=name: timm.create_model(name, num_classes=10)
        for name in ("mobilenetv2_100", "tf_efficientnet_lite0", "tf_efficientnet_lite2")
    },
}


@pytest.mark.parametrize("name", RECIPE_ANCHORS)
def test_segments_of_the_recipes_anchors(name):
    anchor = Anchor(spread(RECIPE_ANCHORS[name]()), name, Preprocessing((96, 96)))
    assert_parts_make_the_whole(anchor, torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)))


class Cells(OneBlock):
    """Every cell reads the two before it, as in NASNet: only two outputs together carry the image."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.before = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x, previous):
            return self.last(x) + self.before(previous)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.blocks = nn.ModuleList(self.Cell() for _ in range(5))

    def forward(self, x):
        previous = x = self.stem(x)
        for cell in self.blocks:
            x, previous = cell(x, previous), x
        return self.head(x.mean((2, 3)) + 0.1 * previous.mean((2, 3)))


def test_two_tensors_together():
    anchor = Anchor(spread(Cells()), "cells", Preprocessing((16, 16)))
    part = Layout("NCHW", 4, (8, 8))
    assert [[made.path for made in cut.tensors] for cut in anchor.cuts[1:]] == [
        [f"blocks.{k}", f"blocks.{k - 1}"] for k in range(1, 5)
    ]
    assert {cut.layout for cut in anchor.cuts} == {JointLayout((part, part))} and not anchor.search_result.rejected
    images = torch.randn(5, 3, 16, 16)
    assert_parts_make_the_whole(anchor, images)
    with torch.no_grad():
        hidden = anchor(images, stop=3)
        first, second = (anchor.model.get_submodule(f"blocks.{k}") for k in (2, 1))
        seen = {}
        handles = [m.register_forward_hook(lambda m, a, out: seen.update({m: out})) for m in (first, second)]
        anchor.model(images)
        for handle in handles:
            handle.remove()
        expected = torch.stack([seen[first], seen[second]], dim=1)
        assert torch.equal(hidden.view(5, 2, 4, 8, 8), expected)
        assert torch.equal(anchor.layout(3).split(hidden)[0], expected.flatten(1, 2))
        assert torch.equal(anchor.bake(3)(anchor.bake(1, 3)(anchor.bake(0, 1)(images))), anchor(images))
    back = make_stitch(anchor.layout(3), anchor.layout(2), StitchConfig())
    assert back(hidden).shape == anchor.layout(2).shape(5)


class Fork(Cells):
    """Every cell has two branches of blocks: inside of it, one of them would have to run again."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (nn.Sequential(*(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(2))) for _ in range(2))

        def forward(self, x, previous):
            return self.left(x) + self.right(previous)


def test_no_cut_lies_beside_another_branch():
    found = discovery.find_cuts(spread(Fork()), (16, 16))
    names = [cut.name for cut in found.cuts]
    assert {f"blocks.{k}" for k in range(1, 5)} < set(names)
    assert not found.rejected and not any(".right" in name for name in names)


def test_where_one_tensor_will_do_no_others_are_looked_for(anchors):
    assert all(len(cut.tensors) == 1 for name in MODELS if name != "tnt" for cut in anchors[name].cuts)


class Counting(OneBlock):
    """Blocks count the images that they really see."""

    class Block(nn.Conv2d):
        seen = 0

        def forward(self, x):
            self.seen += 0 if x.is_meta else len(x)
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(c, 4, 3, 1, 1) for c in (3, 4, 4, 4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_search_costs_two_forwards_of_one_image():
    model = spread(Counting())
    anchor = Anchor(model, "counting", Preprocessing((16, 16)))
    assert anchor.depth == 4
    assert max(block.seen for block in model.blocks) <= 2


class Asks(Counting):
    """Needs a value of the image to go on, so it cannot run without data."""

    def forward(self, x):
        return super().forward(x * 2 if x.sum().item() > -1e9 else x)


def test_a_network_that_needs_values_is_run():
    anchor = Anchor(spread(Asks()), "asks", Preprocessing((16, 16)))
    assert [cut.name for cut in anchor.cuts] == [f"blocks.{k}" for k in range(4)]
    assert_parts_make_the_whole(anchor, torch.randn(3, 3, 16, 16))


@pytest.mark.parametrize("name", MODELS)
def test_a_sketch_finds_what_a_real_forward_finds(monkeypatch, anchors, name):
    def refuse(model):
        raise NotImplementedError

    monkeypatch.setattr(discovery, "meta_copy", refuse)
    model = make_model(name)
    found = discovery.find_cuts(model, (SIZE, SIZE))
    assert [(c.name, c.aliases, c.layout) for c in found.cuts] == [
        (c.name, c.aliases, c.layout) for c in anchors[name].cuts
    ]


def test_vectors_are_refused():
    anchor = make_anchor("resnet")
    anchor.granularity = "module"
    assert all(len(cut.layout.shape(1)) > 2 for cut in anchor.cuts)
    with pytest.raises(ValueError, match=r"has no cut 'resnet.pooler'; a cut is a map or a grid of tokens"):
        anchor.cut_index("resnet.pooler")
