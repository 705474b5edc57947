"""ONNX files for ONNX Runtime; several routes share one file of weights."""

from __future__ import annotations  # onnx is imported when it is needed

import ast
import io
import logging
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
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
from restnet_hf.export.parts import RouteOrPart
from restnet_hf.export.programs import Program


if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYER_TYPES = ("Conv", "MatMul", "Gemm")
SMALL = 1024  # bytes below which a tensor stays in the graph
WEIGHTS = "weights.bin"
LOWEST, HIGHEST = "lowest_number", "highest_number"  # names of constants


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX graph.

    Args:
        proto: graph as ONNX's protocol buffer.
        layers: by name of each node, the path of the module that the node computes or follows.
        metadata: text of the graph's ``metadata_props`` by key.
    """

    proto: ModelProto
    layers: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def nodes(self, layers: Collection[str]) -> list[str]:
        """Names of the nodes of some layers, and of the nodes between them and the next layer."""
        return [name for name, layer in self.layers.items() if layer in layers]


def to_onnx(program: Program, precision: str) -> OnnxModel:
    """A program as ONNX, without metadata on the source code.

    Norms are merged into the convolutions before them only for low precision, which must quantise both as one.
    Otherwise the runtime merges them when it loads, and routes with tuned norms still share their convolutions.

    Args:
        program: program of a route.
        precision: a precision of the runtime.

    Raises:
        UnsupportedExportError: ONNX has no counterpart of an operation.
    """
    from onnxscript import optimizer

    merge_norms = precision.startswith(QUANTIZED)
    with _quiet():
        try:
            exported = torch.onnx.export(
                program.exported,
                dynamo=True,
                verbose=False,
                optimize=merge_norms,
                input_names=["pixel_values"],
                output_names=["logits"],
            )
            assert exported is not None
            if not merge_norms:
                for clean in (optimizer.inline, optimizer.fold_constants, optimizer.remove_unused_nodes):
                    clean(exported.model)
        except Exception as error:  # errors of several libraries, which have no class in common
            raise UnsupportedExportError(f"route '{program.route}' cannot be written as ONNX: {error}") from error
    proto = exported.model_proto
    layers, last = dict[str, str](), ""
    for node in proto.graph.node:
        last = _layer(node) if node.op_type in LAYER_TYPES else last
        layers[node.name] = last
    for each in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer, *proto.graph.value_info):
        del each.metadata_props[:]  # they hold paths of this machine
    for each in (*proto.graph.input, *proto.graph.output, *proto.functions):
        del each.metadata_props[:]
    _name_batch(proto)
    _describe(proto, program.metadata)
    return OnnxModel(proto, layers, program.metadata)


def _name_batch(proto: ModelProto) -> None:
    """Name the number of images ``batch`` in all shapes, in place of the tracer's symbol."""
    symbol = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if symbol and size.dim_param:
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", size.dim_param)


def _describe(proto: ModelProto, metadata: Mapping[str, str]) -> None:
    """Set the version of a graph, and add text to its metadata."""
    from onnx import helper

    proto.model_version = 1  # ONNX Runtime reports 2**63 - 1 for none
    helper.set_model_props(proto, {**{each.key: each.value for each in proto.metadata_props}, **metadata})


def _layer(node: NodeProto) -> str:
    """Path of the module that a node belongs to; for a convolution merged with a norm, from the name of its weight."""
    weight = node.input[1] if len(node.input) > 1 else ""
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    return ["", "", *ast.literal_eval(scopes)][-2]  # the last is the operation


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what exporters and quantisers report of opsets, optimisers and histograms, which is not for users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class OnnxExporter(Exporter):
    """Exporter for ONNX Runtime.

    ``int8`` is static: every activation has a scale from calibration. ``int8_dynamic`` computes the scales of the
    inputs of matrix products in each run, and does not quantise convolutions. The more careful way of ``int8`` is
    unsigned weights where signed ones would have seven bits, else scales of all but the rarest activations.
    """

    runtime = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    precisions = ("fp32", "int8", "int8_dynamic")
    careful = True
    takes_pixels = True

    def convert(self, program: Program, precision: str) -> OnnxModel:
        """A program as ONNX; see `to_onnx`."""
        return to_onnx(program, precision)

    def quantize(self, model: OnnxModel, images: Iterable[np.ndarray], how: Quantization) -> OnnxModel:
        """A model in eight bits, by ONNX Runtime's quantiser."""
        import onnx
        from onnxruntime import quantization as q

        dynamic = how.precision == "int8_dynamic"
        # On targets without the full range sums of two products of signed weights overflow, unless these have seven
        # bits; unsigned ones of eight bits are summed in another way, which takes longer.
        options: dict[str, Any] = {"per_channel": True, "nodes_to_exclude": model.nodes(how.keep)}
        unsigned = bool(how.careful) and not how.full_range
        options |= {"weight_type": q.QuantType.QUInt8 if unsigned else q.QuantType.QInt8}
        options |= {"reduce_range": not (how.full_range or unsigned)}
        if dynamic or any(node.op_type == "Softmax" for node in model.proto.graph.node):
            # the operations between the matrix products of a transformer have outliers, and are cheap
            options["op_types_to_quantize"] = ["MatMul", "Gemm"] if dynamic else list(LAYER_TYPES)
            options["extra_options"] = {"MatMulConstBOnly": True}
        with tempfile.TemporaryDirectory() as name, _quiet():
            source, target = Path(name) / "source.onnx", Path(name) / "target.onnx"
            onnx.save(model.proto, source)
            if dynamic:
                q.quantize_dynamic(source, target, **options)
            else:
                if how.careful and how.full_range:
                    options["calibrate_method"] = q.CalibrationMethod.Percentile  # outliers do not widen the scales
                q.quantize_static(source, target, _Reader(images), activation_type=q.QuantType.QUInt8, **options)
            proto = onnx.load(target)
            _keep_in_float(proto, options["nodes_to_exclude"])
            _describe(proto, model.metadata)  # which the quantiser does not keep
            return replace(model, proto=proto)

    def add_preprocessing(self, model: OnnxModel, how: Mapping[str, Any]) -> OnnxModel:
        """A graph from ``pixels`` to ``probabilities``."""
        return replace(model, proto=_with_preprocessing(model.proto, how))

    def save(self, models: Mapping[RouteOrPart, OnnxModel], folder: Path) -> dict[RouteOrPart, dict[str, str]]:
        """Write one graph for each route; the weights of several routes are in one file."""
        import onnx

        names = file_names(models)
        if len(models) == 1:
            ((route, model),) = models.items()
            onnx.save(model.proto, folder / "model.onnx")
            return {route: {"file": "model.onnx"}}
        with open(folder / WEIGHTS, "wb") as file:
            weights = SharedWeights(file)
            for route, model in models.items():
                onnx.save(_with_external_weights(model.proto, weights), folder / f"{names[route]}.onnx")
        return {route: {"file": f"{name}.onnx"} for route, name in names.items()}


def _keep_in_float(proto: ModelProto, names: Collection[str]) -> None:
    """Keep ONNX Runtime from quantising the layers that were left in float.

    When it loads a graph, its optimiser ``WeightBiasQuantization`` gives a convolution or product in float whose
    input was in eight bits a weight in eight bits, too, with one scale for all channels. An operation between the two
    prevents that: here a clip to all numbers that there are, which other runtimes also compute.

    Args:
        proto: quantised graph, which is changed.
        names: names of the nodes that are in float.
    """
    from onnx import helper, numpy_helper

    graph, kept, nodes = proto.graph, {*names}, list[Any]()
    made = {output: node.op_type for node in graph.node for output in node.output}
    for node in graph.node:
        if node.name in kept and node.op_type in LAYER_TYPES and made.get(node.input[0]) == "DequantizeLinear":
            name = f"{node.name}_input"
            nodes.append(helper.make_node("Clip", [node.input[0], LOWEST, HIGHEST], [name], name=name))
            node.input[0] = name
        nodes.append(node)
    if len(nodes) > len(graph.node):
        highest = np.finfo(np.float32).max
        limits = {LOWEST: -highest, HIGHEST: highest}
        graph.initializer.extend(numpy_helper.from_array(np.array(x), name) for name, x in limits.items())
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def _with_preprocessing(proto: ModelProto, how: Mapping[str, Any]) -> ModelProto:
    """A copy of the graph that begins with a normalisation of pixels, and ends with a softmax."""
    from onnx import TensorProto, helper, numpy_helper

    graph = type(proto)()
    graph.CopyFrom(proto)
    images, logits = graph.graph.input[0], graph.graph.output[0]
    batch, _, height, width = ((d.dim_param or d.dim_value) for d in images.type.tensor_type.shape.dim)
    rows, classes = ((d.dim_param or d.dim_value) for d in logits.type.tensor_type.shape.dim)
    mean, std = (np.array(how[key], np.float32) for key in ("mean", "std"))
    constants = {"pixels_scale": 1 / (255 * std), "pixels_offset": -mean / std}
    before = [
        helper.make_node("Cast", ["pixels"], ["pixels_float"], name="pixels_float", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels_float", "pixels_scale"], ["pixels_scaled"], name="pixels_scaled"),
        helper.make_node("Add", ["pixels_scaled", "pixels_offset"], ["pixels_normal"], name="pixels_normal"),
        helper.make_node("Transpose", ["pixels_normal"], [images.name], name="pixels_first", perm=[0, 3, 1, 2]),
    ]
    after = helper.make_node("Softmax", [logits.name], ["probabilities"], name="probabilities", axis=-1)
    nodes = [*before, *graph.graph.node, after]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    for part, items in (
        (graph.graph.node, copies),
        (graph.graph.input, [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [batch, height, width, 3])]),
        (graph.graph.output, [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [rows, classes])]),
    ):
        del part[:]
        part.extend(items)
    graph.graph.initializer.extend(numpy_helper.from_array(x, name) for name, x in constants.items())
    return graph


def _with_external_weights(proto: ModelProto, weights: SharedWeights) -> ModelProto:
    """A copy of the graph whose large tensors are in a file of weights."""
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
    """Calibration images in the form that the quantiser reads, one after the other."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image; None after the last one."""
        image = next(self._images, None)
        return None if image is None else {"pixel_values": image}
