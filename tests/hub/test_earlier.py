"""What earlier versions wrote loads as it did: adapters of each kind, a whole checkpoint, and an exported folder."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from versions import needs_new_names

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.runtime.exported_model import ExportedModel


VERSIONS = sorted((Path(__file__).parent / "earlier").iterdir())
ADAPTERS = [file.parent for version in VERSIONS for file in sorted(version.glob("*/config.json"))]


@needs_new_names
@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_adapters(folder):
    """Logits were computed where each was written, so another processor may round them otherwise."""
    seen = load_file(folder.parent / "logits.safetensors")
    seeds = {"resnet": 0, "vit": 0}
    if folder.name == "branch":
        del seeds["resnet"]
    anchors = {} if folder.name == "standalone" else {name: make_model(name, seed) for name, seed in seeds.items()}
    model = StitchedModelForImageClassification.from_pretrained(folder, anchors=anchors)
    with torch.no_grad():
        assert torch.allclose(model(seen["images"]).logits, seen[folder.name], atol=1e-4, rtol=1e-4)
    assert model.profiled is not None
    assert model.active_route in {row.route for row in model.profiled.routes}


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_exported_folders(folder):
    pytest.importorskip("onnxruntime")
    seen = load_file(folder / "logits.safetensors")
    model = ExportedModel(folder / "onnx")
    assert len(model.routes) == 2
    assert torch.allclose(torch.from_numpy(model(seen["images"].numpy())), seen["onnx"], atol=1e-3)
