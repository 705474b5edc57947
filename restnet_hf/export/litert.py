"""LiteRT files (.tflite), for Android, iOS and boards; each route is a file of its own."""

import contextlib
import io
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from restnet_hf.export.exporter import Exporter, Quantization, UnsupportedExportError, file_names
from restnet_hf.export.parts import RouteOrPart
from restnet_hf.export.programs import Program


SIGNATURE = "serving_default"


class LiteRtExporter(Exporter):
    """Exporter for LiteRT, which was TensorFlow Lite; a file takes a fixed number of images.

    Google's quantiser makes ``int8``: weights by channel, activations by tensor, images and logits in float32.
    """

    runtime = "litert"
    packages = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert.interpreter")
    precisions = ("fp32", "int8")
    any_batch = False

    def convert(self, program: Program, precision: str) -> bytes:
        """The file's content."""
        import litert_torch

        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress
                model = litert_torch.convert(program.module, sample_kwargs={"pixel_values": program.example})
        except Exception as error:  # its errors have no class in common
            raise UnsupportedExportError(f"route '{program.route}' cannot be written for LiteRT: {error}") from error
        return model.model_content()

    def quantize(self, model: bytes, images: Iterable[np.ndarray], how: Quantization) -> bytes:
        """A file in eight bits, where the layers to keep stay in float32."""
        from ai_edge_quantizer.quantizer import Quantizer
        from ai_edge_quantizer.recipe import AlgorithmName, TFLOperationName, static_wi8_ai8

        quantizer = Quantizer(model, static_wi8_ai8())
        for name in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            quantizer.update_quantization_recipe(".*", name, algorithm_key=AlgorithmName.NO_QUANTIZE)
        for name in _results(model, how.keep):
            quantizer.update_quantization_recipe(
                rf"{re.escape(name)}(?!\d)", TFLOperationName.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE
            )
        samples = [{"pixel_values": image} for image in images]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            observed = quantizer.calibrate({SIGNATURE: samples})
            return bytes(quantizer.quantize(observed).quantized_model)

    def save(self, models: Mapping[RouteOrPart, Any], folder: Path) -> dict[RouteOrPart, dict[str, str]]:
        """Write a file for each route."""
        entries = {route: {"file": f"{name}.tflite"} for route, name in file_names(models).items()}
        for route, entry in entries.items():
            (folder / entry["file"]).write_bytes(models[route])
        return entries


def _results(model: bytes, layers: Collection[str]) -> list[str]:
    """Names of the tensors that the operations of some layers make, by which the quantiser tells operations apart.

    An operation is a layer's where a weight or result has the name of the layer, as ``Net/Sequential_steps/Conv_0;``.
    """
    from ai_edge_litert.schema_py_generated import ModelT

    paths = ("/".join(f"[^/;]*_{re.escape(part)}" for part in layer.split(".")) for layer in layers)
    own = re.compile("|".join(f"ExportedRoute/{path};" for path in paths) or "(?!)")
    whole, results = ModelT.InitFromPackedBuf(model), []
    for graph in whole.subgraphs:
        for operation in graph.operators:
            made = [graph.tensors[index] for index in operation.outputs]
            read = [graph.tensors[index] for index in operation.inputs if index >= 0]
            weights = [tensor for tensor in read if whole.buffers[tensor.buffer].data is not None]
            if any(own.search(tensor.name.decode()) for tensor in (*made, *weights)):
                results += [tensor.name.decode() for tensor in made]
    return results
