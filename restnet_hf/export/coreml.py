"""Core ML packages (.mlpackage), for iPhones, iPads and Macs; each route is a package of its own."""

import contextlib
import io
import shutil
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from restnet_hf.export.exporter import QUANTIZED, Exporter, Quantization, UnsupportedExportError, file_names
from restnet_hf.export.folding import module_of
from restnet_hf.export.parts import RouteOrPart
from restnet_hf.export.programs import LAYERS, Program


aten = torch.ops.aten
REWRITTEN = (aten.addcmul.default, aten.addcdiv.default, aten._upsample_bilinear2d_aa.vec)  # which coremltools lacks
LAYER_TYPES = ("conv", "linear")
GRAPH, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
LEAST_SIZE = 512  # numbers above which a weight is in eight bits; smaller ones are no share of a file


@dataclass(frozen=True)
class CoreMlModel:
    """A converted route.

    Args:
        model: coremltools' ``MLModel``, which is not loaded.
        weights: for each layer, names of the constants that are its weights.
    """

    model: Any
    weights: Mapping[str, tuple[str, ...]]


class CoreMlExporter(Exporter):
    """Exporter for Core ML; a package takes a fixed number of images, and runs on iOS 17, macOS 14 or later.

    ``fp16`` and ``int8`` compute in float16, as the Neural Engine does. ``int8`` has weights in eight bits, with a
    scale for each channel; activations are not quantised, so the calibration images are not used. Core ML runs on
    Apple's systems alone; on others the files are verified by `restnet_hf.runtime.mil.MilProgram`.
    """

    runtime = "coreml"
    packages = ("coremltools",)
    precisions = ("fp32", "fp16", "int8")
    any_batch = False

    def convert(self, program: Program, precision: str) -> CoreMlModel:
        """The program of a route in Core ML's model intermediate language."""
        import coremltools

        half = precision != "fp32"
        try:
            with _quiet():
                model = coremltools.convert(
                    program.exported.run_decompositions(_rewrites()),
                    convert_to="mlprogram",
                    outputs=[coremltools.TensorType(name="logits", dtype=np.float32)],
                    minimum_deployment_target=coremltools.target.iOS17,
                    compute_precision=coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32,
                    skip_model_load=True,
                )
        except Exception as error:  # its errors have no class in common
            raise UnsupportedExportError(f"route '{program.route}' cannot be written for Core ML: {error}") from error
        model.user_defined_metadata.update(program.metadata)
        weights = _layer_weights(program, model) if precision.startswith(QUANTIZED) else {}
        return CoreMlModel(_kept_while_used(model), weights)

    def quantize(self, model: CoreMlModel, images: Iterable[np.ndarray], how: Quantization) -> CoreMlModel:
        """A model whose weights are in eight bits, but those of the layers to keep, which stay in float16."""
        from coremltools.optimize import coreml

        quantizer = coreml.OpLinearQuantizerConfig(
            mode="linear_symmetric", granularity="per_channel", weight_threshold=LEAST_SIZE
        )
        config = coreml.OptimizationConfig(
            op_type_configs=dict.fromkeys(LAYER_TYPES, quantizer),
            op_name_configs={name: None for layer in how.keep for name in model.weights.get(layer, ())},
        )
        with _quiet():
            return replace(model, model=_kept_while_used(coreml.linear_quantize_weights(model.model, config)))

    def save(self, models: Mapping[RouteOrPart, CoreMlModel], folder: Path) -> dict[RouteOrPart, dict[str, str]]:
        """Write a package for each route."""
        entries = {}
        for route, name in file_names(models).items():
            package = folder / f"{name}.mlpackage"
            models[route].model.save(str(package))
            for file in [each for each in package.iterdir() if each.name not in ("Manifest.json", "Data")]:
                shutil.rmtree(file) if file.is_dir() else file.unlink()  # tables for debuggers
            places = {"file": "Manifest.json", "graph": GRAPH, "weights": WEIGHTS}
            entries[route] = {
                key: f"{package.name}/{place}" for key, place in places.items() if (package / place).exists()
            }
        return entries


def _rewrites() -> dict[Any, Any]:
    """Rules that write operations as others, of which coremltools converts all."""
    known = torch.export.default_decompositions()
    return {aten.alias.default: lambda x: x, **{operation: known[operation] for operation in REWRITTEN}}


def _layer_weights(program: Program, model: Any) -> dict[str, tuple[str, ...]]:
    """Names of the constants that hold the weights of each layer, which the converter renames and scales.

    The converter keeps the order of the layers, and merges what comes after them into their weights.

    Raises:
        UnsupportedExportError: the layers of the route and of the converted graph differ.
    """
    function = model.get_spec().mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    names = [each.inputs["weight"].arguments[0].name for each in operations if each.type in LAYER_TYPES]
    layers = [module_of(node) for node in program.exported.graph.nodes if node.target in LAYERS]
    if len(names) != len(layers):
        raise UnsupportedExportError(
            f"route '{program.route}' has {len(layers)} convolutions and linear layers, and {len(names)} after its "
            "conversion, so layers cannot be kept in full precision by name; choose fp16"
        )
    weights: dict[str, tuple[str, ...]] = {}
    for layer, name in zip(layers, names, strict=True):
        weights[layer] = (*weights.get(layer, ()), name)
    return weights


def _kept_while_used(model: Any) -> Any:
    """A model whose temporary package is removed with it; coremltools keeps all of them until the process ends."""
    weakref.finalize(model, shutil.rmtree, model.package_path, ignore_errors=True)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence coremltools' progress bars and its warnings, which are not for users."""
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
