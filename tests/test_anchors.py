"""Any classifier is cut where it can be, and its parts make the whole."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import transformers
from conftest import CLASSES, MODELS, SIZE, make_anchor, make_model, save_model, spread
from torch import nn

from restnet_hf.anchors import Anchor, unique_names
from restnet_hf.loading import load_anchor
from restnet_hf.preprocessing import Preprocessing


DEMO_ANCHORS = ["resnet_fashion", "vit_fashion"]


@pytest.mark.parametrize("name", MODELS)
def test_cuts_and_layouts(anchors, name):
    anchor = anchors[name]
    _, kind, prefix = MODELS[name]
    assert anchor.depth >= 2 and not anchor.found.rejected
    assert {(cut.layout.kind, cut.layout.prefix) for cut in anchor.cuts} == {(kind, prefix)}
    assert anchor.found.classes == CLASSES


def assert_parts_make_the_whole(anchor, images):
    with torch.no_grad():
        whole = anchor(images)
        captured = anchor.capture(images, [*range(1, anchor.depth + 1), None])
        assert torch.equal(captured[None], whole)
        assert whole.std(0).mean() > 1e-3, "logits hardly depend on the image, equality would say nothing"
        for index in range(1, anchor.depth + 1):
            activation = anchor(images, stop=index)
            assert activation.shape == anchor.layout(index).shape(len(images))
            assert torch.equal(activation, captured[index])
            kept = activation.clone()
            assert torch.equal(anchor(activation, start=index), whole)
            assert torch.equal(activation, kept), "the segment wrote into what it was given"
            if index < anchor.depth:
                assert torch.equal(anchor(activation, index, index + 1), captured[index + 1])


@pytest.mark.parametrize("name", MODELS)
def test_segments_of_every_layout(anchors, images, name):
    assert_parts_make_the_whole(anchors[name], images)


@pytest.mark.parametrize("name", DEMO_ANCHORS)
def test_segments_of_the_demo_anchors(demo_anchor, name):
    anchor = demo_anchor(name)
    assert_parts_make_the_whole(anchor, torch.randn(5, 3, *anchor.preprocessing.image_size))


@pytest.mark.parametrize("name", MODELS)
def test_segments_equal_the_model_itself(images, name):
    """Against the plain model, never wrapped."""
    anchor, model = make_anchor(name), make_model(name)
    with torch.no_grad():
        output = model(images.clone())
        assert torch.equal(anchor(anchor(images, stop=2), start=2), getattr(output, "logits", output))


@pytest.mark.parametrize("name", MODELS)
def test_baked_segments(anchors, images, name):
    anchor = anchors[name]
    middle = anchor.depth // 2 + 1
    with torch.no_grad():
        activation = anchor(images, stop=middle)
        front, end = anchor.bake(0, middle), anchor.bake(middle)
        assert torch.equal(front(images), activation)
        assert torch.equal(end(activation), anchor(images))
        assert torch.equal(copy.deepcopy(end)(activation[:2]), end(activation[:2]))
        inner = anchor.bake(middle - 1, middle)
        assert torch.equal(inner(anchor(images, stop=middle - 1)), activation)
    for baked, bounds in ((front, (0, middle)), (end, (middle, None)), (inner, (middle - 1, middle))):
        assert sum(p.numel() for p in baked.parameters()) == sum(
            p.numel() for p in anchor.own_parameters(*bounds).values()
        )
    whole = sum(p.numel() for p in anchor.parameters())
    assert 0 < sum(p.numel() for p in inner.parameters()) < whole


def test_baked_segment_compiles_and_exports(anchors, images):
    anchor = anchors["resnet"]
    end, activation = anchor.bake(3), anchor(images, stop=3)
    with torch.no_grad():
        expected = end(activation)
        compiled = torch.compile(end, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(activation), expected, atol=1e-6)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(end, (activation,), dynamic_shapes={"x": {0: batch}}, strict=False)
        assert torch.allclose(program.module()(activation[:2]), expected[:2], atol=1e-6)


def test_names_address_cuts(anchors):
    anchor = anchors["resnet"]
    for index, cut in enumerate(anchor.cuts, 1):
        assert [anchor.cut_index(name) for name in (cut.name, *cut.aliases)] == [index] * (1 + len(cut.aliases))
    assert anchor.cut_index(2) == 2
    assert any(cut.aliases for cut in anchor.cuts)
    with pytest.raises(ValueError, match="no cut 'layer9'; its cuts are"):
        anchor.cut_index("layer9")
    with pytest.raises(ValueError, match=f"cuts 1 to {anchor.depth}, not 99"):
        anchor.cut_index(99)
    with pytest.raises(ValueError, match="cannot stop at"):
        anchor(torch.zeros(anchor.layout(3).shape(1)), 3, 2)


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


def test_a_failing_run_leaves_the_model_as_it_was(anchors):
    anchor = anchors["vit"]
    with pytest.raises(RuntimeError):
        anchor(torch.zeros(1, 3, 3), start=1)
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in anchor.model.modules())


def test_cubes_are_laid_out_as_their_neighbours():
    """16 channels on a grid of 16 x 16 say nothing themselves, and inside its blocks this network is channels-last."""
    config = transformers.ConvNextV2Config(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=CLASSES)
    anchor = Anchor(spread(transformers.ConvNextV2ForImageClassification(config)), "a", Preprocessing((SIZE, SIZE)))
    assert {cut.layout.kind for cut in anchor.cuts} == {"NCHW"} and anchor.layout(1).grid == (16, 16)


class OneBlock(nn.Module):
    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3, 2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks[0](x).mean((2, 3)))


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


class Sharing(OneBlock):
    """Two blocks hold the same layer."""

    class Block(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.own, self.shared = nn.Conv2d(4, 4, 1), shared

        def forward(self, x):
            return self.own(x) + self.shared(x)

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3, 2), *(self.Block(shared) for _ in range(3))])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_what_blocks_share_is_kept_and_counted_once():
    anchor = Anchor(spread(Sharing(), 0), "sharing", Preprocessing((16, 16)))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(anchor.bake(2)(anchor.bake(0, 2)(images)), anchor(images))
    shared, own, head = 4 * 4 * 9 + 4 + 8, 4 * 4 + 4, 4 * 2 + 2
    for bounds, count in (((2, None), shared + 2 * own + head), ((3, None), shared + own + head), ((4, None), head)):
        assert sum(p.numel() for p in anchor.own_parameters(*bounds).values()) == count
        assert sum(p.numel() for p in anchor.bake(*bounds).parameters()) == count


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
    assert anchor.depth == 3 and not anchor.found.rejected
    assert_parts_make_the_whole(anchor, torch.randn(5, 3, 16, 16))
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(anchor.bake(2)(anchor(images, stop=2)), anchor(images))


def test_not_a_classifier():
    with pytest.raises(ValueError, match="does not map images to logits"):
        Anchor(nn.Conv2d(3, 4, 3), "conv", Preprocessing((16, 16))).cuts  # noqa: B018


@pytest.mark.parametrize("name", ["resnet", "vit", "mobilenet", "swin_nhwc"])
def test_headless(images, name):
    anchor = make_anchor(name)
    with torch.no_grad():
        logits = anchor(images)
        size = anchor.drop_classifier()
        features = anchor(images)
        assert features.shape == (len(images), size)
        assert torch.allclose(anchor.model.get_submodule(anchor.classifier)(features), logits, atol=1e-6)
        assert torch.equal(anchor(anchor(images, stop=2), start=2), features)
        assert torch.equal(anchor.bake(2)(anchor(images, stop=2)), features)
        assert torch.equal(anchor.logits(images), logits)


def test_two_heads_cannot_be_replaced(anchors):
    with pytest.raises(ValueError, match="'distilled' .* cannot take a new head"):
        anchors["distilled"].drop_classifier()


def test_load(tmp_path, images):
    save_model("vit", tmp_path / "my.vit.v1")
    model = make_model("vit")
    for source in (tmp_path / "my.vit.v1", str(tmp_path / "my.vit.v1"), f"local-dir:{tmp_path}/my.vit.v1"):
        anchor = load_anchor(source)
        assert (anchor.name, anchor.repo_id) == ("my", str(tmp_path / "my.vit.v1"))
        assert torch.allclose(anchor(images), model.eval()(images).logits, atol=1e-5)
    assert not any(p.requires_grad for p in anchor.parameters())


def test_load_from_a_folder_that_timm_wrote(tmp_path, images):
    from timm.models import save_for_hf

    model = MODELS["mobilenet"][0]().eval()
    save_for_hf(model, tmp_path / "small", safe_serialization=True)
    anchor = load_anchor(tmp_path / "small", image_size=SIZE)
    # the file's tensors lie at other addresses, and kernels round by alignment
    assert torch.allclose(anchor(images), model(images), atol=1e-5)
    assert anchor.preprocessing.image_size == (SIZE, SIZE)
    assert anchor.preprocessing.mean == model.pretrained_cfg["mean"]


def test_unknown_id():
    with pytest.raises(OSError, match=r"anchor 'nobody/nothing' cannot be loaded: it must be a local folder"):
        load_anchor("nobody/nothing")


def test_names():
    with pytest.raises(ValueError, match="may hold only letters"):
        Anchor(OneBlock(), "a b", Preprocessing((16, 16)))
    same = [Anchor(OneBlock(), "net", Preprocessing((16, 16))) for _ in range(3)]
    unique_names(same)
    assert [anchor.name for anchor in same] == ["net", "net_2", "net_3"]


def test_fingerprint():
    one, two = make_anchor("resnet"), make_anchor("resnet")
    assert one.fingerprint() == two.fingerprint()
    with torch.no_grad():
        next(two.model.parameters()).view(-1)[0] += 1e-6
    assert one.fingerprint() != two.fingerprint()


def test_images_must_be_understood(tmp_path):
    with pytest.raises(
        ValueError, match=r"how Plain wants its images is not known.*Pass load_anchor\(..., preprocessing="
    ):
        load_anchor(make_model("plain"), image_size=SIZE)
    make_model("vit").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare wants its images is not known"):
        load_anchor(tmp_path / "bare")
    told = Preprocessing((SIZE, SIZE), (0.1,) * 3, (0.2,) * 3)
    assert load_anchor(tmp_path / "bare", preprocessing=told).preprocessing == told
    save_model("vit", tmp_path / "full")
    other = load_anchor(tmp_path / "full", preprocessing=told)
    assert (other.preprocessing, other.processor) == (told, None)
    with pytest.raises(ValueError, match="either image_size or preprocessing"):
        load_anchor(tmp_path / "full", preprocessing=told, image_size=SIZE)
    with pytest.raises(ValueError, match="is made already"):
        load_anchor(other, image_size=SIZE)


def test_wrong_size_names_the_anchor():
    anchor = Anchor(make_model("vit"), "vit", Preprocessing((SIZE * 2, SIZE)))
    with pytest.raises(ValueError, match="anchor 'vit' cannot run on images of 128x64 pixels"):
        _ = anchor.cuts


def test_threads_do_not_disturb_each_other(anchors, images):
    anchor = anchors["resnet"]
    with torch.no_grad():
        expected = [anchor(images[i : i + 1], stop=2) for i in range(4)]

        def work(i):
            with torch.no_grad():
                return all(torch.equal(anchor(images[i : i + 1], stop=2), expected[i]) for _ in range(30))

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [True] * 4


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
