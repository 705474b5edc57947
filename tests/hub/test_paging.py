"""A model holds only the weights that its routes use, or those of the active one, and computes what it did."""

import pytest
import torch
from safetensors import safe_open

from restnet_hf import StitchedModelForImageClassification


TEXTS = ("resnet[:2] + vit[2:]", "resnet[:3] + vit[1:]", "resnet[:4] + vit[3:]", "resnet[:1] + resnet[3:]")


@pytest.fixture
def model(pair):
    for text in TEXTS:
        pair.add_stitch(text)
    pair.set_route(TEXTS[0])
    return pair


@torch.no_grad()
def logits(model, images):
    found = {}
    for text in TEXTS:
        model.set_route(text)
        found[text] = model(images).logits
    return found


def held(model):
    """Bytes of each anchor's parameters in memory."""
    return {name: sum(p.nbytes for p in anchor.parameters()) for name, anchor in model.anchors.items()}


def used(model, *routes):
    """Bytes that some routes use of each anchor."""
    found = {}
    for name, anchor in model.anchors.items():
        segments = [s for route in routes for s in model.route(route).segments if s.anchor == name]
        found[name] = sum(
            p.nbytes for p in {p for s in segments for p in anchor.own_parameters(s.start, s.stop).values()}
        )
    return found


def test_pruned_to_some_routes(model, images, tmp_path, saved):
    expected, everything = logits(model, images), held(model)
    kept = TEXTS[:2]
    wanted = used(model, *kept)
    model.prune_to(kept)
    assert held(model) == wanted and all(wanted[name] < everything[name] for name in wanted)
    assert [str(route) for route in model.routes] == list(kept) and str(model.active_route) == kept[0]
    assert len(model.stitches) == 2
    with torch.no_grad():
        for text in kept:
            model.set_route(text)
            assert torch.equal(model(images).logits, expected[text])
            assert torch.equal(model.bake()(images), expected[text])
        with pytest.raises(ValueError, match="weights of anchor 'resnet' are not in memory"):
            model.set_route("resnet[:]")
            model(images)
    with pytest.raises(ValueError, match="at least one route"):
        model.prune_to([])


def test_pruned_model_is_saved_as_an_adapter(model, images, tmp_path):
    """With the fingerprints of the whole anchors, so that it loads with them."""
    expected = logits(model, images)
    whole = {name: anchor.model for name, anchor in model.anchors.items()}
    copies = {name: type(anchor.model)(anchor.model.config) for name, anchor in model.anchors.items()}
    for name, copy in copies.items():
        copy.load_state_dict(whole[name].state_dict())
    model.prune_to(TEXTS[1:2])
    model.save_pretrained(tmp_path / "adapter")
    again = StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter", anchors=copies)
    with torch.no_grad():
        assert torch.equal(again(images).logits, expected[TEXTS[1]])
    with pytest.raises(ValueError, match="weights of anchor"):
        model.save_pretrained(tmp_path / "whole", standalone=True)
    assert not (tmp_path / "whole").exists()


def test_paged(model, images, tmp_path):
    expected = logits(model, images)
    model.set_route(TEXTS[0])
    model.page_to(tmp_path / "pages")
    assert held(model) == used(model, TEXTS[0])
    with torch.no_grad():
        for text in (*TEXTS, *TEXTS[::-1]):
            model.set_route(text)
            assert held(model) == used(model, text)
            assert torch.equal(model(images).logits, expected[text])
        other = model.anchors["vit"]
        with pytest.raises(ValueError, match="weights of anchor 'vit' are not in memory"):
            other.logits(images)


def test_only_what_differs_is_read(model, tmp_path):
    before, after, both = (used(model, *routes) for routes in (TEXTS[:1], TEXTS[1:2], TEXTS[:2]))
    model.page_to(tmp_path)
    read = model.weight_files.load(model.anchors, model.steps(model.route(TEXTS[1])))
    assert read == sum(both[name] - before[name] for name in both) and 0 < read < sum(after.values())
    assert model.weight_files.load(model.anchors, model.steps(model.route(TEXTS[1]))) == 0
    with safe_open(tmp_path / "resnet.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.anchors["resnet"].model.named_parameters()}


def test_pages_that_are_gone(model, tmp_path):
    model.page_to(tmp_path)
    (tmp_path / "resnet.safetensors").write_bytes(b"no weights")
    (tmp_path / "vit.safetensors").unlink()
    before = model.active_route
    with pytest.raises(OSError, match="which holds weights of"):
        model.set_route(TEXTS[2])
    assert model.active_route == before


def test_pruned_weights_do_not_come_back(model, images):
    model.prune_to(TEXTS[:1])
    with pytest.raises(ValueError, match="not in memory"):
        model.prune_to(["resnet[:]"])
