"""Kinds of processors, from what the system lists; weights of the full range only where sums cannot saturate."""

import json

import numpy as np
import pytest
import torch
from conftest import SIZE
from versions import needs_export

from restnet_hf import ExportedModel, export_routes
from restnet_hf.runtime import processor, targets
from restnet_hf.runtime.targets import TARGETS, resolve_target, this_target


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("aarch64", None, "arm"),
        ("arm64", None, "arm"),
        ("x86_64", "fpu sse2 avx2", "x86-avx2"),
        ("x86_64", "fpu avx2 avx_vnni", "x86-vnni"),
        ("AMD64", "avx512f avx512_vnni", "x86-vnni"),
        ("x86_64", None, "x86-avx2"),  # unknown: what runs well anywhere
    ],
)
def test_this_processor(tmp_path, monkeypatch, machine, flags, expected):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : avx_vnni\nflags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(targets.platform, "machine", lambda: machine)
    assert this_target() == expected


def test_names():
    assert resolve_target("auto") == this_target() and all(resolve_target(name) == name for name in TARGETS)
    with pytest.raises(ValueError, match="target='x86' is not one of"):
        resolve_target("x86")


@needs_export
@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_range_of_weights(pair, tmp_path, runtime, monkeypatch):
    """Seven bits for x86-avx2, eight for the others, which warn where they run on such a processor."""
    pytest.importorskip("onnxruntime" if runtime == "onnx" else "openvino")
    images = torch.randn(24, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    pair.fit_stitches(images)
    largest = {}
    for target in TARGETS:
        out = tmp_path / target
        options = {"data": images, "calibration_images": 8, "min_agreement": 0.1, "target": target}
        exported = export_routes(pair, out, "resnet[:3] + vit[2:]", runtime=runtime, precision="int8", **options)
        assert exported.profiled.metadata["target"] == target
        largest[target] = largest_weight(out)
    assert largest == {"x86-avx2": 64, "x86-vnni": 127, "arm": 127}
    monkeypatch.setattr(targets, "this_target", lambda: "x86-avx2")
    with pytest.warns(UserWarning, match="quantised for arm, and this processor is x86-avx2"):
        ExportedModel(tmp_path / "arm")
    ExportedModel(tmp_path / "x86-avx2")  # warnings are errors


def largest_weight(folder):
    """The largest absolute weight in eight bits of a folder, from the runtime's own file."""
    if (folder / "model.onnx").exists():
        import onnx

        tensors = onnx.load(folder / "model.onnx").graph.initializer
        arrays = [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8]
    else:
        import openvino

        (graph,) = folder.glob("*.xml")
        model = openvino.Core().read_model(graph, folder / "weights.bin")
        arrays = [
            node.data for node in model.get_ops() if node.get_type_name() == "Constant" and node.data.dtype == np.int8
        ]
    return max(int(np.abs(array.astype(int)).max()) for array in arrays if array.size > 1)


@needs_export
def test_a_target_that_is_not_known(pair, tmp_path):
    """A folder of a later version, for a kind of processor that is not known here, loads."""
    pair.fit_stitches(torch.randn(24, 3, SIZE, SIZE))
    export_routes(pair, tmp_path / "out", "resnet[:3] + vit[2:]")
    profile = json.loads((tmp_path / "out" / "profile.json").read_text())
    profile["metadata"]["target"] = ["riscv"]
    (tmp_path / "out" / "profile.json").write_text(json.dumps(profile))
    ExportedModel(tmp_path / "out")
