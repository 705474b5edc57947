"""Exported files that take pixels and return probabilities, run by the runtime itself and as any other export."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, make_model
from exports import ABSENT, changed_json, needs_runtime, without_checksums
from PIL import Image
from versions import needs_export

from restnet_hf import Anchor, ExportedModel, StitchedModelForImageClassification, export_routes
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.export.exporter import UnsupportedExportError, load_exporter
from restnet_hf.runtime.pixels import normalise, to_pixels
from restnet_hf.runtime.runners import RUNTIMES, openvino_core


pytestmark = needs_export
HOW = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
ROUTES = ["resnet[:3] + vit[2:]", "resnet[:2] + vit[2:]"]
ABLE = [name for name in RUNTIMES if load_exporter(name).takes_pixels]


def pictures(count, seed=0):
    """Pixels (N, H, W, 3) of coarse patterns, which the classes depend on."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(each).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for each in coarse]
    )


def prepared(pixels):
    return torch.from_numpy(normalise(pixels, HOW))


@pytest.fixture(scope="module")
def model():
    anchors = [
        Anchor(make_model(name, seed), name, Preprocessing((SIZE, SIZE), HOW["mean"], HOW["std"]))
        for seed, name in enumerate(("resnet", "vit"))
    ]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    for route in ROUTES:
        model.add_stitch(route)
    model.fit_stitches(prepared(pictures(40, 5)))
    return model


@torch.no_grad()
def expected_probabilities(model, route, pixels):
    """Those of PyTorch, whose normalisation is written down here again."""
    mean, std = (torch.tensor(HOW[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return model(images, route=route).logits.softmax(-1).numpy()


def run_by_itself(runtime, folder, pixels):
    """The active route of a folder, by the runtime alone."""
    metadata = json.loads((folder / "profile.json").read_text())["metadata"]
    entry = metadata["files"][metadata["active"]]
    if runtime == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / entry["file"])
        return session.run(["probabilities"], {"pixels": pixels})[0]
    whole = openvino_core().read_model(folder / entry["file"], folder / entry["weights"])
    compiled = openvino_core().compile_model(whole, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"pixels": pixels})["probabilities"]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "runtime", [name if name == "onnx" else pytest.param(name, marks=pytest.mark.slow) for name in ABLE]
)
def test_a_file_takes_pixels(model, tmp_path, runtime, precision):
    needs_runtime(runtime)
    data = [(prepared(pictures(64, 1)), torch.arange(64) % CLASSES)]
    routes = ROUTES if precision == "fp32" else ROUTES[:1]
    options = {"min_agreement": 0.5, "calibration_images": 32, "with_preprocessing": True}
    out = tmp_path / "out"
    exported = export_routes(model, out, routes, runtime=runtime, precision=precision, data=data, **options)
    pixels, close = pictures(5, 2), 1e-5 if precision == "fp32" else 0.25
    expected = expected_probabilities(model, ROUTES[0], pixels)
    found = run_by_itself(runtime, out, pixels)
    assert found.shape == expected.shape and np.abs(found.sum(1) - 1).max() < 1e-5
    assert np.abs(found - expected).max() < close
    assert precision == "fp32" or np.abs(found - expected).max() > 1e-4  # it is in eight bits
    logits = exported(prepared(pixels).numpy())
    assert np.allclose(np.exp(logits), found, atol=1e-6)
    assert max(exported.check().values()) < 1e-3
    Image.fromarray(pixels[0]).save(tmp_path / "picture.png")
    assert exported.predict(tmp_path / "picture.png")[0]["label"] == exported.labels[int(found[0].argmax())]
    script = ABSENT + (out / "run.py").read_text()
    for argument, end in ((tmp_path / "picture.png", exported.labels[int(found[0].argmax())]), ("--check", "of ")):
        done = subprocess.run(
            [sys.executable, "-c", script.replace("__file__", repr(str(out / "run.py"))), str(argument)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert end in done.stdout
    if len(routes) > 1:
        exported.set_route(ROUTES[1])
        other = expected_probabilities(model, ROUTES[1], pixels)
        assert np.allclose(np.exp(exported(prepared(pixels).numpy())), other, atol=1e-5)


def test_without_images_of_your_own(model, tmp_path):
    """What noise verifies is noise of pixels."""
    exported = export_routes(model, tmp_path / "out", ROUTES[0], with_preprocessing=True)
    assert exported.profiled.metadata["logit_error"][ROUTES[0]] < 1e-3


def test_sure_networks_are_as_good(tmp_path):
    """Logits whose probabilities are too small for float32 are no disagreement."""
    anchors = [
        Anchor(make_model(name, seed), name, Preprocessing((SIZE, SIZE), HOW["mean"], HOW["std"]))
        for seed, name in enumerate(("resnet", "vit"))
    ]
    with torch.no_grad():
        anchors[1].model.classifier.weight.mul_(200.0)
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    with torch.no_grad():
        assert model(prepared(pictures(8)), route="vit[:]").logits.std() > 87
    exported = export_routes(model, tmp_path / "out", "vit[:]", with_preprocessing=True)
    assert exported.profiled.metadata["logit_error"]["vit[:]"] < 1e-3 and max(exported.check().values()) < 1e-3


def test_a_file_says_what_it_takes(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    export_routes(model, tmp_path / "out", ROUTES[0], with_preprocessing=True)
    told = {each.key: each.value for each in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert told["input"] == "pixels" and not {"mean", "std"} & told.keys()


def test_every_pixel_survives():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert (to_pixels(normalise(pixels, HOW), HOW) == pixels).all()


def test_what_is_refused(model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="levels off. Give pictures"):
        export_routes(model, out, ROUTES[0], with_preprocessing=True, data=torch.randn(8, 3, SIZE, SIZE))
    with pytest.raises(UnsupportedExportError, match=r"with_preprocessing is for runtimes \['onnx', 'openvino'\]"):
        export_routes(model, out, ROUTES[0], runtime="torch", with_preprocessing=True)
    cascade = f"{ROUTES[1]} >0.5 {ROUTES[0]}"
    with pytest.raises(ValueError, match="with_preprocessing is for routes"):
        export_routes(model, out, cascades=cascade, with_preprocessing=True)
    assert not out.exists()


def test_a_folder_that_names_another_input(model, tmp_path):
    out = tmp_path / "out"
    export_routes(model, out, ROUTES[0], with_preprocessing=True)
    changed_json(without_checksums(out), "profile.json", lambda data: data["metadata"].update(input="sound"))
    with pytest.raises(ValueError, match="input='sound' must be 'pixels', or left out"):
        ExportedModel(out)
    changed_json(out, "profile.json", lambda data: data["metadata"].pop("input"))
    with pytest.raises(ValueError, match="it takes images of shape"):  # not run with images that it does not take
        ExportedModel(out)
