"""ONNX files for ONNX Runtime; several routes share one file of weights."""

from __future__ import annotations  # onnx is imported when it is needed

import ast
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from restnet_hf.export.exporter import (
    QUANTIZED,
    Exporter,
    Quantization,
    SharedWeights,
    UnsupportedExportError,
    file_names,
)
from restnet_hf.export.programs import Program
from restnet_hf.routes.route import Route


if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYER_TYPES = ("Conv", "MatMul", "Gemm")
SMALL = 1024  # bytes that stay in the graph
WEIGHTS = "weights.bin"


@dataclass(frozen=True)
class OnnxModel:
    """A graph, and by name of each node the layer that it is, or follows, as the path of that module."""

    proto: ModelProto
    layers: Mapping[str, str]

    def nodes(self, layers: Collection[str]) -> list[str]:
        """Names of the nodes of some layers, with what is done to their outputs before the next layer."""
        return [name for name, layer in self.layers.items() if layer in layers]


def to_onnx(program: Program, precision: str) -> OnnxModel:
    """A program as ONNX, without the notes on where in the source it comes from.

    Norms become one with the convolutions before them only for low precision, which must see both as one. Otherwise a
    runtime does that as it loads, and routes whose norms were tuned still share their convolutions.

    Raises:
        UnsupportedExportError: an operation has no counterpart.
    """
    from onnxscript import optimizer

    one = precision.startswith(QUANTIZED)
    with _quiet():
        try:
            made = torch.onnx.export(
                program.exported,
                dynamo=True,
                verbose=False,
                optimize=one,
                input_names=["pixel_values"],
                output_names=["logits"],
            )
            assert made is not None
            if not one:
                for clean in (optimizer.inline, optimizer.fold_constants, optimizer.remove_unused_nodes):
                    clean(made.model)
        except Exception as error:  # of several libraries, of no common kind
            raise UnsupportedExportError(f"route '{program.route}' cannot be written as ONNX: {error}") from error
    proto = made.model_proto
    layers, last = dict[str, str](), ""
    for node in proto.graph.node:
        last = _layer(node) if node.op_type in LAYER_TYPES else last
        layers[node.name] = last
    for each in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.value_info):
        del each.metadata_props[:]  # they hold paths of this machine
    for each in (*proto.graph.input, *proto.graph.output, *proto.functions):
        del each.metadata_props[:]
    return OnnxModel(proto, layers)


def _layer(node: NodeProto) -> str:
    """The module that a node is of. A convolution that took in a norm goes by its weight."""
    weight = node.input[1] if len(node.input) > 1 else ""
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    return ["", "", *ast.literal_eval(scopes)][-2]  # the last is the operation


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on opsets and optimisers are of no use to people."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class OnnxExporter(Exporter):
    """ONNX Runtime: ``int8`` is static, every activation on a scale that calibration found; ``int8_dynamic`` scales
    the inputs of matrix products as they come, and leaves convolutions as they are."""

    runtime = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    precisions = ("fp32", "int8", "int8_dynamic")
    careful = True

    def convert(self, program: Program, precision: str) -> OnnxModel:
        return to_onnx(program, precision)

    def quantize(self, model: OnnxModel, images: Iterable[np.ndarray], how: Quantization) -> OnnxModel:
        import onnx
        from onnxruntime import quantization as q

        dynamic = how.precision == "int8_dynamic"
        # Where a processor has no VNNI, sums of two products of signed weights overflow, unless these have seven bits;
        # unsigned ones of eight bits are summed in another way, which takes longer.
        options: dict[str, Any] = {"per_channel": True, "nodes_to_exclude": model.nodes(how.keep)}
        options |= {"weight_type": q.QuantType.QUInt8 if how.careful else q.QuantType.QInt8}
        options |= {"reduce_range": not how.careful}
        if dynamic or any(node.op_type == "Softmax" for node in model.proto.graph.node):
            # what lies between the matrix products of a transformer has outliers, and is cheap
            options["op_types_to_quantize"] = ["MatMul", "Gemm"] if dynamic else list(LAYER_TYPES)
            options["extra_options"] = {"MatMulConstBOnly": True}
        with tempfile.TemporaryDirectory() as name, _quiet():
            given, made = Path(name) / "given.onnx", Path(name) / "made.onnx"
            onnx.save(model.proto, given)
            if dynamic:
                q.quantize_dynamic(given, made, **options)
            else:
                q.quantize_static(given, made, _Reader(images), activation_type=q.QuantType.QUInt8, **options)
            return OnnxModel(onnx.load(made), model.layers)

    def save(self, models: Mapping[Route, OnnxModel], folder: Path) -> dict[Route, dict[str, str]]:
        import onnx

        names = file_names(models)
        if len(models) == 1:
            ((route, model),) = models.items()
            onnx.save(model.proto, folder / "model.onnx")
            return {route: {"file": "model.onnx"}}
        with open(folder / WEIGHTS, "wb") as file:
            weights = SharedWeights(file)
            for route, model in models.items():
                onnx.save(_outside(model.proto, weights), folder / f"{names[route]}.onnx")
        return {route: {"file": f"{name}.onnx"} for route, name in names.items()}


def _outside(proto: ModelProto, weights: SharedWeights) -> ModelProto:
    """The graph with its tensors in a file beside it."""
    from onnx import numpy_helper
    from onnx.external_data_helper import set_external_data

    graph = type(proto)()
    graph.CopyFrom(proto)
    for tensor in graph.graph.initializer:
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        data = tensor.raw_data
        if len(data) >= SMALL:
            set_external_data(tensor, WEIGHTS, weights.add(data), len(data))
            tensor.ClearField("raw_data")
    return graph


class _Reader:
    """Images as the quantiser wants them, one after the other."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {"pixel_values": image}
