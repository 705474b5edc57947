"""OpenVINO files (.xml and .bin), converted from ONNX; several routes share one file of weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from restnet_hf.export.exporter import Exporter, Quantization, SharedWeights, file_names
from restnet_hf.export.onnx import OnnxModel, to_onnx
from restnet_hf.export.parts import RouteOrPart
from restnet_hf.export.programs import Program
from restnet_hf.runtime.runners import openvino_core, without_telemetry


WEIGHTS = "weights.bin"


class OpenVinoExporter(Exporter):
    """Exporter for OpenVINO.

    ``bf16`` is the file of ``fp32``, computed in bfloat16 where the processor supports that. NNCF quantises ``int8``.
    Its more careful way is without SmoothQuant where there is attention, as that loses on some networks (windows of
    attention, or a convolutional front); else it corrects biases layer by layer.
    """

    runtime = "openvino"
    packages = ("onnx", "onnxscript", "openvino", "nncf")
    precisions = ("fp32", "bf16", "int8")
    careful = True
    takes_pixels = True

    def convert(self, program: Program, precision: str) -> tuple[OnnxModel, Any, str]:
        """The ONNX graph, OpenVINO's model of it, and the type in which it computes."""
        model = to_onnx(program, precision)
        read = openvino_core().read_model(model.proto.SerializeToString())
        return model, read, "bf16" if precision == "bf16" else "f32"

    def quantize(
        self, model: tuple[OnnxModel, Any, str], images: Iterable[np.ndarray], how: Quantization
    ) -> tuple[OnnxModel, Any, str]:
        """A model in eight bits, by NNCF."""
        import nncf
        from nncf.quantization import advanced_parameters as advanced

        graph, whole, compute = model
        attention = any(node.op_type == "Softmax" for node in graph.proto.graph.node)
        samples = list(images)
        smooth = advanced.AdvancedSmoothQuantParameters(**({"convolution": -1, "matmul": -1} if how.careful else {}))
        kept = [f"{name}(/.*)?" for name in graph.nodes(how.keep)]
        with without_telemetry():
            quantized = nncf.quantize(
                whole.clone(),
                nncf.Dataset(samples),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER if attention else None,
                subset_size=len(samples),
                ignored_scope=nncf.IgnoredScope(patterns=kept, validate=False) if kept else None,
                fast_bias_correction=attention or not how.careful,
                advanced_parameters=advanced.AdvancedQuantizationParameters(
                    overflow_fix=advanced.OverflowFix.DISABLE if how.full_range else advanced.OverflowFix.ENABLE,
                    smooth_quant_alphas=smooth,
                ),
            )
        return graph, quantized, compute

    def add_preprocessing(
        self, model: tuple[OnnxModel, Any, str], how: Mapping[str, Any]
    ) -> tuple[OnnxModel, Any, str]:
        """A model from ``pixels`` to ``probabilities``, by OpenVINO's own preprocessing."""
        import openvino
        from openvino import opset13

        graph, whole, compute = model
        steps = openvino.preprocess.PrePostProcessor(whole.clone())
        steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
        steps.input().model().set_layout(openvino.Layout("NCHW"))
        mean, std = ([255 * each for each in how[key]] for key in ("mean", "std"))
        steps.input().preprocess().convert_element_type(openvino.Type.f32).mean(mean).scale(std)
        steps.output().postprocess().custom(lambda output: opset13.softmax(output, -1).output(0))
        built = steps.build()
        built.input().set_names({"pixels"})
        built.output().set_names({"probabilities"})
        return graph, built, compute

    def save(
        self, models: Mapping[RouteOrPart, tuple[OnnxModel, Any, str]], folder: Path
    ) -> dict[RouteOrPart, dict[str, str]]:
        """Write one graph for each route, and one file with the weights of all."""
        import openvino

        entries, names = {}, file_names(models)
        with open(folder / WEIGHTS, "wb") as file:
            weights = SharedWeights(file)
            for route, (_, model, compute) in models.items():
                path = folder / f"{names[route]}.xml"
                openvino.save_model(model, path, compress_to_fp16=False)
                _move_weights(path, weights)
                entries[route] = {"file": path.name, "weights": WEIGHTS, "compute": compute}
        return entries


def _move_weights(path: Path, weights: SharedWeights) -> None:
    """Move the constants of a graph into the shared file of weights."""
    own = path.with_suffix(".bin")
    data, tree = own.read_bytes(), ElementTree.parse(path)
    for constant in tree.iter("data"):
        if "offset" in constant.attrib:
            start, size = int(constant.attrib["offset"]), int(constant.attrib["size"])
            constant.attrib["offset"] = str(weights.add(data[start : start + size]))
    tree.write(path)
    own.unlink()
