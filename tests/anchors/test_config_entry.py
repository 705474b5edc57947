"""Parents are known again, a changed one is refused, and a standalone checkpoint needs none."""

import json
import shutil

import pytest
import torch
from conftest import SIZE, make_anchor, make_model, save_model, vit_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.hub.adapter_files import WEIGHTS
from restnet_hf.steps import run_steps


def test_modules_made_in_code(tmp_path, images):
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("plain"), make_anchor("mobilenet"), order="given"
    )
    model.set_route(model.add_stitch("plain[:2] + mobilenet[3:]"))
    model.save_pretrained(tmp_path / "adapter")
    load = StitchedModelForImageClassification.from_pretrained
    with pytest.raises(ValueError, match=r"'plain' was made in code; pass it: from_pretrained\(..., anchors="):
        load(tmp_path / "adapter")
    again = load(tmp_path / "adapter", anchors={n: make_model(n) for n in ("plain", "mobilenet")})
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
    with pytest.raises(
        ValueError, match="'plain' .* is not the network this adapter was made for: its fingerprint is"
    ):
        load(tmp_path / "adapter", anchors={"plain": make_model("plain", 9), "mobilenet": make_model("mobilenet")})


def test_a_parent_that_changed_where_no_route_uses_it(saved, tmp_path):
    """It loads, as the routes are what they were; the anchor alone is refused."""
    _, path, images, logits = saved
    other = make_model("vit")
    with torch.no_grad():
        vit_layers(other)[0].layernorm_before.weight.add_(1)
    other.save_pretrained(tmp_path / "vit")
    again = StitchedModelForImageClassification.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(again(images).logits, logits)
        again.set_route("vit[:]")
        with pytest.raises(ValueError, match="the weights of anchor 'vit' from cut 0 to 1 have SHA-256 .* anchors="):
            again(images)
    with pytest.raises(ValueError, match="'vit' .* is not the network this adapter was made for"):
        StitchedModelForImageClassification.from_pretrained(path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the weights of anchor 'vit' from cut 0 to 1"):
        again.half()


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 4), ("hidden_act", "relu"), ("layer_norm_eps", 1.0)]
)
def test_a_parent_with_other_settings_is_refused(saved, tmp_path, key, value):
    """They change the logits, and are in no weight."""
    _, path, _, _ = saved
    file = tmp_path / "vit" / "config.json"
    config = json.loads(file.read_text())
    then = config[key]
    file.write_text(json.dumps(config | {key: value}))
    with pytest.raises(
        ValueError, match=f"'vit' .* is not the network .* setting {key} is {value!r} and was {then!r}"
    ):
        StitchedModelForImageClassification.from_pretrained(path)


def test_an_anchor_may_be_given(saved):
    _, path, images, logits = saved
    again = StitchedModelForImageClassification.from_pretrained(path, anchors={"vit": make_anchor("vit")})
    with torch.no_grad():
        assert torch.allclose(again(images).logits, logits, atol=1e-5)


def test_casts_after_loading_are_not_taken_for_changes(saved):
    _, path, images, logits = saved
    model = StitchedModelForImageClassification.from_pretrained(path)
    model.to("cpu")
    assert all(anchor._expected for anchor in model.anchors.values())  # nothing had to be read
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.allclose(model(images).logits.float(), logits, atol=0.3)
        for route in model.all_routes:
            model.set_route(route)
            model(images)


def test_a_changed_parent_is_refused(saved, tmp_path):
    _, path, _, _ = saved
    shutil.copytree(tmp_path / "vit", tmp_path / "moved")
    make_model("vit", 5).save_pretrained(tmp_path / "vit")
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match="'vit' .* is not the network this adapter was made for"):
            StitchedModelForImageClassification.from_pretrained(path, dtype=dtype)
    StitchedModelForImageClassification.from_pretrained(path, anchors={"vit": tmp_path / "moved"})


@pytest.fixture
def own_folders(tmp_path, images):
    """A model of anchors in folders that can be deleted: a timm CNN and a Swin of transformers; and its logits."""
    from timm.models import save_for_hf

    save_for_hf(make_model("mobilenet"), tmp_path / "small", safe_serialization=True)
    save_model("swin", tmp_path / "swin")
    model = StitchedModelForImageClassification.from_anchors(
        tmp_path / "small", tmp_path / "swin", order="given", image_size=SIZE, num_labels=3
    )
    model.set_route(model.add_stitch("small[:4] + swin[2:]"))
    with torch.no_grad():
        return model, tmp_path, {str(r): run_steps(images, model.steps(r)) for r in model.all_routes}


def test_standalone(own_folders, images):
    """The whole checkpoint loads with both parents deleted, every route gives equal logits, and it stays whole."""
    model, folder, logits = own_folders
    model.save_pretrained(folder / "whole", standalone=True)
    assert not model.config.standalone
    for name in ("small", "swin"):
        shutil.rmtree(folder / name)
    with pytest.raises(OSError, match="'small' has moved|cannot be loaded"):
        model.save_pretrained(folder / "adapter")
        StitchedModelForImageClassification.from_pretrained(folder / "adapter")
    again = StitchedModelForImageClassification.from_pretrained(folder / "whole")
    assert again.config.standalone and not any(p.requires_grad for p in again.anchors.parameters())
    with torch.no_grad():
        for route, expected in logits.items():
            again.set_route(route)
            assert torch.allclose(again(images).logits, expected, atol=1e-5)
    again.save_pretrained(folder / "again")
    weights = (load_file(folder / name / WEIGHTS) for name in ("whole", "again"))
    assert all(torch.equal(a, b) for a, b in zip(*(sorted_values(w) for w in weights), strict=True))
    auto = AutoModelForImageClassification.from_pretrained(folder / "again")
    assert torch.equal(auto(images).logits, again(images).logits)


def sorted_values(weights):
    return [weights[key] for key in sorted(weights)]


def test_a_damaged_standalone_is_refused(own_folders, images):
    model, folder, _ = own_folders
    model.save_pretrained(folder / "whole", standalone=True)
    weights = load_file(folder / "whole" / WEIGHTS)
    key = next(k for k in weights if k.startswith("anchors.swin.model.") and weights[k].dim() > 1)
    for change, message in (
        ({key: weights[key] + 1}, "'swin' .* is not the network this adapter was made for"),
        ({key: weights[key][:-1]}, "do not fit its config.json. of another shape"),
        ({"anchors.swin.model.more": weights[key]}, "do not fit its config.json. not expected"),
    ):
        damaged = {k: v.clone().contiguous() for k, v in (weights | change).items()}
        save_file(damaged, folder / "whole" / WEIGHTS, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            model = StitchedModelForImageClassification.from_pretrained(folder / "whole")
            model.set_route("swin[:]")
            model(images)


def test_modules_made_in_code_cannot_stand_alone(tmp_path):
    model = StitchedModelForImageClassification.from_anchors(make_anchor("plain"), make_anchor("vit"), order="given")
    with pytest.raises(ValueError, match=r"anchors \['plain'\] were made in code"):
        model.save_pretrained(tmp_path / "whole", standalone=True)
    assert not (tmp_path / "whole").exists()
