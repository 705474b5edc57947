"""Adapters load where another version of a library has renamed the layers of an anchor, as happened to ViT."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from restnet_hf import StitchedModelForImageClassification, TrainArgs, load_anchor, train
from restnet_hf.anchors.weights import WeightsError
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.hashing import Piece, fingerprint, weights_sha256
from restnet_hf.hub.adapter_files import WEIGHTS


def as_if_renamed(path, change=lambda piece: piece):
    """Write an adapter's config as a version would in which the layers of 'vit' had other names."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    entry = next(entry for entry in config["anchors"] if entry["name"] == "vit")
    for number, piece in enumerate(entry["pieces"]):
        piece["cut"] = piece["cut"] and f"vit.old.{number}"
        piece["sha256"] = "0" * 64  # with other names it is another
    entry["pieces"] = [change(piece) for piece in entry["pieces"]]
    pieces = [Piece.from_dict(piece) for piece in entry["pieces"]]
    entry["fingerprint"] = fingerprint(load_anchor(path.parent / "vit").model, pieces)
    file.write_text(json.dumps(config))


def test_names_of_layers_may_differ(saved):
    model, path, images, _ = saved
    as_if_renamed(path)
    again = StitchedModelForImageClassification.from_pretrained(path)
    again.load_stitch(path, "twin")
    with torch.no_grad():
        for route in model.all_routes:
            assert torch.equal(again(images, route=route).logits, model(images, route=route).logits)
    again.save_pretrained(path.parent / "twice")
    assert RestNetConfig.from_pretrained(path.parent / "twice").anchors == again.config.anchors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda piece: {**piece, "unnamed": "0" * 64}, "the weights of anchor 'vit' from cut"),
        (lambda piece: {k: v for k, v in piece.items() if k != "unnamed"}, "here and was 'vit.old.0'"),
        (lambda piece: {**piece, "shape": [1, *piece["shape"][1:]]}, "here and was"),
    ],
)
def test_other_networks_are_refused(saved, change, message):
    """Other weights, what 0.1 wrote, which knows the weights by name alone, and activations of other shapes."""
    _, path, _, _ = saved
    as_if_renamed(path, change)
    with pytest.raises(ValueError, match=message):
        StitchedModelForImageClassification.from_pretrained(path)


def test_weights_without_names():
    """The same under any names; types, shapes and values count."""
    a, b = torch.arange(3.0), torch.ones(2)
    piece = Piece.of("cut", (4,), {"x": a, "y": b})
    assert piece.sha256 == weights_sha256({"x": a, "y": b}) != piece.unnamed
    assert piece.holds({"x": a, "y": b}) and piece.holds({"new.y": b, "new.x": a})
    others = (
        {"x": a},
        {"x": a, "y": b + 1},
        {"x": a.half(), "y": b},
        {"x": a[None], "y": b},
        {"x": a, "y": b, "z": b},
    )
    assert not any(piece.holds(other) for other in others)
    old = Piece.from_dict({k: v for k, v in asdict(piece).items() if k != "unnamed"})
    assert old.holds({"x": a, "y": b}) and not old.holds({"x": a, "z": b})


@pytest.fixture
def tuned(saved):
    """An adapter with tuned norms: (model, its folder)."""
    model, path, images, _ = saved
    labels = torch.arange(len(images)) % model.config.num_labels
    data = torch.utils.data.TensorDataset(images.repeat(4, 1, 1, 1), labels.repeat(4))
    train(model, data, TrainArgs(num_train_epochs=1, batch_size=4, tuning="norm", keep="last"))
    model.save_pretrained(path)
    return model, path


def rename(path, change):
    tensors = load_file(path / WEIGHTS)
    renamed = {change(key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path / WEIGHTS, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("sha256", None)  # checksums of the files
    (path / "config.json").write_text(json.dumps(config))


def test_tuned_tensors_of_renamed_layers(tuned, images):
    model, path = tuned
    rename(path, lambda key: key.replace("own.vit/", "own.vit/older/"))
    again = StitchedModelForImageClassification.from_pretrained(path)
    again.load_stitch(path, "twin")
    twins = [route for route in again.routes if route.adapter == "twin"]
    assert len(twins) == len(model.routes)
    with torch.no_grad():
        for route, twin in zip(model.routes, twins, strict=True):
            expected = model(images, route=route).logits
            assert torch.equal(again(images, route=route).logits, expected)
            assert torch.equal(again(images, route=twin).logits, expected)


def test_tensors_that_cannot_be_told_apart_are_refused(tuned):
    _, path = tuned
    rename(path, lambda key: key.replace("layernorm_before", "first_norm"))
    with pytest.raises(WeightsError, match="missing: .*layernorm_before.*first_norm.*where layers have new names"):
        StitchedModelForImageClassification.from_pretrained(path)
