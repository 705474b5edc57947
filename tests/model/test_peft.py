"""PEFT's own LoRA works on top of a stitched model: trained, saved, loaded again, merged."""

import json

import pytest
import torch
import transformers.integrations.peft
from conftest import CLASSES, make_anchor, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification
from versions import needs_saved_modules

from restnet_hf import StitchConfig, StitchedModelForImageClassification
from restnet_hf.routes.route import Route


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT asks by the old name


@pytest.fixture
def tuned(tmp_path, images):
    """An adapter, LoRA trained for some steps on its end anchor and its stitch, and the logits of both."""
    for name in ("resnet", "vit"):
        save_model(name, tmp_path / name)
    model = StitchedModelForImageClassification.from_anchors(tmp_path / "resnet", tmp_path / "vit", order="given")
    model.set_route(model.add_stitch("resnet[:2] + vit[1:]"))
    model.save_pretrained(tmp_path / "adapter")
    base = StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        before = base(images).logits
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=r"anchors\.vit\..*\.(q_proj|v_proj|query|value)",
        modules_to_save=["stitches.resnet_2__vit_1"],
        r=4,
    )
    lora = get_peft_model(base, config).train()
    frozen = {n: p.clone() for n, p in lora.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        lora(pixel_values=images, labels=torch.arange(len(images)) % CLASSES).loss.backward()
        optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in lora.named_parameters() if n in frozen)
    lora.eval()
    lora.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        return tmp_path, before, lora(pixel_values=images).logits


def test_loaded_by_peft_and_merged(tuned, images):
    folder, before, expected = tuned
    assert (expected - before).abs().max() > 0.01
    base = StitchedModelForImageClassification.from_pretrained(folder / "adapter")
    lora = PeftModel.from_pretrained(base, folder / "lora").eval()
    with torch.no_grad():
        assert torch.equal(lora(pixel_values=images).logits, expected)
        assert torch.allclose(lora.merge_and_unload()(images).logits, expected, atol=1e-5)


@needs_saved_modules
def test_loaded_by_auto_class(tuned, images):
    """The folder that PEFT wrote names the adapter, which names the anchors; nothing of the three is left out."""
    folder, _, expected = tuned
    model = AutoModelForImageClassification.from_pretrained(folder / "lora")
    assert isinstance(model, StitchedModelForImageClassification)
    with torch.no_grad():
        assert torch.equal(model(images).logits, expected)
        again = StitchedModelForImageClassification.from_pretrained(folder / "adapter")
        assert not torch.equal(again(images).logits, expected)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("route", ["resnet[:3] + vit[2:]", "resnet[:3] + mobilenet[5:]", "vit[:1] + resnet[4:]"])
def test_on_stitches(images, route, kind):
    """Also on those that are 1x1 convolutions, which PEFT puts a class of its own in the place of."""
    names = [segment.anchor for segment in Route.parse(route).segments]
    model = StitchedModelForImageClassification.from_anchors(*map(make_anchor, names), order="given")
    model.set_route(model.add_stitch(route, StitchConfig(kind)))
    with torch.no_grad():
        before = model(images).logits
    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(target_modules=r"stitches\..*\.(proj|hidden|out)", r=2)).train()
    with torch.no_grad():
        assert torch.equal(lora(pixel_values=images).logits, before), "the update starts at zero"
    optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        lora(pixel_values=images, labels=torch.arange(len(images)) % CLASSES).loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = lora.eval()(pixel_values=images).logits
        assert not torch.allclose(learned, before, atol=1e-3)
        merged = lora.merge_and_unload()
        assert torch.allclose(merged(images).logits, learned, atol=1e-4)
    assert merged is model and not any("lora" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("rank", "held", "message"),
    [
        (4, 5000, "lacks what its adapter_config.json asks for"),
        (10**6, 5000, r"asks for ranks \[1000000\], and .* holds none above 5000"),
        (5000, 5000, "its file of weights does not hold as many"),
        (4, None, "no adapter_model.safetensors; save the LoRA again as safetensors"),
    ],
)
def test_a_lora_that_is_not_whole(tuned, rank, held, message):
    """Nothing is filled in at random, nothing larger than the file is made, and no pickle is read."""
    folder = tuned[0] / "lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": rank}))
    if held is None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    else:
        save_file({"a": torch.zeros(held)}, folder / "adapter_model.safetensors")
    with pytest.raises(OSError, match=message):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (
            lambda m: m.add_adapter("night"),
            TypeError,
            r"add_adapter takes a config of PEFT, not 'night'.*add_stitch\(",
        ),
        (lambda m: m.set_adapter("night"), ValueError, r"PEFT, and this model has none. To switch, call set_route\("),
        (lambda m: m.delete_adapter("night"), ValueError, "PEFT, and this model has none.*call delete_stitch"),
        (lambda m: m.enable_adapters(), ValueError, r"set_route\(route\)"),
        (lambda m: m.disable_adapters(), ValueError, r"set_route\('anchor\[:\]'\)"),
        (lambda m: m.active_adapters(), ValueError, "model.active_route"),
        (lambda m: m.get_adapter_state_dict(), ValueError, r"adapter_state_dict\(\)"),
    ],
)
def test_words_of_peft_name_ours(pair, use, error, message):
    with pytest.raises(error, match=message):
        use(pair)


def test_load_adapter_names_load_stitch(tuned):
    model = StitchedModelForImageClassification.from_pretrained(tuned[0] / "adapter")
    with pytest.raises(
        ValueError, match=r"no adapter_config.json. .* load_stitch\('.*adapter', name\) adds an adapter of stitches"
    ):
        model.load_adapter(str(tuned[0] / "adapter"))


def test_adapters_of_peft_on_the_model_itself(pair, images, monkeypatch):
    """transformers' own methods go on working for them, where it takes the version of PEFT."""
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)
    with torch.no_grad():
        before = pair(images).logits
        pair.add_adapter(
            LoraConfig(target_modules=r"anchors\.vit\..*\.(q_proj|v_proj|query|value)", r=2, init_lora_weights=False)
        )
        after = pair(images).logits
        assert pair.active_adapters() == ["default"] and not torch.allclose(after, before, atol=1e-4)
        pair.disable_adapters()
        assert torch.allclose(pair(images).logits, before, atol=1e-6)
        pair.enable_adapters()
        pair.set_adapter("default")
        assert torch.equal(pair(images).logits, after) and pair.get_adapter_state_dict()
        with pytest.raises(
            ValueError, match=r"adapters of PEFT are \['default'\], not 'night'. To switch, call set_route"
        ):
            pair.set_adapter("night")
        pair.delete_adapter("default")
