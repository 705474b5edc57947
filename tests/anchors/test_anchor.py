"""Any classifier is cut where it can be, and its parts make the whole."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import MODELS, SIZE, OneBlock, assert_parts_make_the_whole, make_anchor, make_model, spread
from torch import nn

from restnet_hf.anchors.anchor import Anchor, make_names_unique
from restnet_hf.data.preprocessing import Preprocessing


DEMO_ANCHORS = ["resnet_fashion", "vit_fashion"]


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
    if any(True for _ in anchor.buffers()) and name in ("resnet", "mobilenet"):  # statistics of BatchNorm, for each
        assert sum(b.numel() for b in inner.buffers()) < sum(b.numel() for b in anchor.buffers()) / 2


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
    with pytest.raises(ValueError, match="no cut 'layer9'; .* Its cuts are"):
        anchor.cut_index("layer9")
    with pytest.raises(ValueError, match=f"cuts 1 to {anchor.depth}, not 99"):
        anchor.cut_index(99)
    with pytest.raises(ValueError, match="cannot stop at"):
        anchor(torch.zeros(anchor.layout(3).shape(1)), 3, 2)


def test_a_failing_run_leaves_the_model_as_it_was(anchors):
    anchor = anchors["vit"]
    with pytest.raises(RuntimeError):
        anchor(torch.zeros(1, 3, 3), start=1)
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in anchor.model.modules())


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


def test_names():
    with pytest.raises(ValueError, match="may hold only letters"):
        Anchor(OneBlock(), "a b", Preprocessing((16, 16)))
    same = [Anchor(OneBlock(), "net", Preprocessing((16, 16))) for _ in range(3)]
    make_names_unique(same)
    assert [anchor.name for anchor in same] == ["net", "net_2", "net_3"]


def test_fingerprint():
    one, two = make_anchor("resnet"), make_anchor("resnet")
    assert one.fingerprint() == two.fingerprint()
    with torch.no_grad():
        next(two.model.parameters()).view(-1)[0] += 1e-6
    assert one.fingerprint() != two.fingerprint()


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
