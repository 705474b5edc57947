"""OpenVINO files (.xml and .bin), by way of ONNX; several routes share one file of weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from restnet_hf.export.exporter import Exporter, Quantization, SharedWeights, file_names
from restnet_hf.export.onnx import OnnxModel, to_onnx
from restnet_hf.export.programs import Program
from restnet_hf.routes.route import Route
from restnet_hf.runtime.runners import openvino_core, without_telemetry


WEIGHTS = "weights.bin"


class OpenVinoExporter(Exporter):
    """OpenVINO: ``bf16`` is the same file, computed in bfloat16 where the processor does that; ``int8`` is NNCF's."""

    runtime = "openvino"
    packages = ("onnx", "onnxscript", "openvino", "nncf")
    precisions = ("fp32", "bf16", "int8")
    careful = True

    def convert(self, program: Program, precision: str) -> tuple[OnnxModel, Any, str]:
        model = to_onnx(program, precision)
        read = openvino_core().read_model(model.proto.SerializeToString())
        return model, read, "bf16" if precision == "bf16" else "f32"

    def quantize(
        self, model: tuple[OnnxModel, Any, str], images: Iterable[np.ndarray], how: Quantization
    ) -> tuple[OnnxModel, Any, str]:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

        graph, whole, compute = model
        attention = any(node.op_type == "Softmax" for node in graph.proto.graph.node)
        samples = list(images)
        kept = [f"{name}(/.*)?" for name in graph.nodes(how.keep)]
        with without_telemetry():
            made = nncf.quantize(
                whole.clone(),
                nncf.Dataset(samples),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER if attention else None,
                subset_size=len(samples),
                ignored_scope=nncf.IgnoredScope(patterns=kept, validate=False) if kept else None,
                fast_bias_correction=not how.careful,
                # products of pairs of eight-bit weights overflow where a processor has no VNNI
                advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
            )
        return graph, made, compute

    def save(self, models: Mapping[Route, tuple[OnnxModel, Any, str]], folder: Path) -> dict[Route, dict[str, str]]:
        import openvino

        entries, names = {}, file_names(models)
        with open(folder / WEIGHTS, "wb") as file:
            weights = SharedWeights(file)
            for route, (_, model, compute) in models.items():
                path = folder / f"{names[route]}.xml"
                openvino.save_model(model, path, compress_to_fp16=False)
                _share(path, weights)
                entries[route] = {"file": path.name, "weights": WEIGHTS, "compute": compute}
        return entries


def _share(path: Path, weights: SharedWeights) -> None:
    """Have the constants of a graph in the common file."""
    own = path.with_suffix(".bin")
    data, tree = own.read_bytes(), ElementTree.parse(path)
    for constant in tree.iter("data"):
        if "offset" in constant.attrib:
            start, size = int(constant.attrib["offset"]), int(constant.attrib["size"])
            constant.attrib["offset"] = str(weights.add(data[start : start + size]))
    tree.write(path)
    own.unlink()
