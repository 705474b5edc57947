"""ExecuTorch programs (.pte) on XNNPACK; several routes are methods of one program, which holds each weight once."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from restnet_hf.export.exporter import Exporter, Quantization, UnsupportedExportError, file_names
from restnet_hf.export.folding import module_of
from restnet_hf.export.parts import RouteOrPart
from restnet_hf.export.programs import Program


class ExecuTorchExporter(Exporter):
    """Exporter for ExecuTorch, for phones and boards; a program takes a fixed number of images."""

    runtime = "executorch"
    packages = ("executorch.exir", "torchao.quantization.pt2e.quantize_pt2e")
    precisions = ("fp32", "int8")
    any_batch = False

    def convert(self, program: Program, precision: str) -> Program:
        """The program itself: ExecuTorch lowers it when it is saved."""
        return program

    def quantize(self, model: Program, images: Iterable[np.ndarray], how: Quantization) -> Program:
        """A program in eight bits, by XNNPACK's quantiser, with one scale for each channel of a weight."""
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        kept = {*how.keep}
        quantizer.set_filter_function(lambda node: module_of(node) not in kept)
        observed = prepare_pt2e(model.exported.module(), quantizer)
        batch = len(model.example)
        for image in images:
            observed(torch.from_numpy(image).expand(batch, -1, -1, -1))
        quantized = convert_pt2e(observed)
        return replace(model, exported=torch.export.export(quantized, (model.example,), strict=False))

    def save(self, models: Mapping[RouteOrPart, Program], folder: Path) -> dict[RouteOrPart, dict[str, str]]:
        """Write one program with a method for each route."""
        from executorch.exir import to_edge_transform_and_lower

        names = file_names(models)
        programs = {names[route]: program.exported for route, program in models.items()}
        try:
            lowered = to_edge_transform_and_lower(programs, partitioner=[_partitioner()]).to_executorch()
        except Exception as error:  # its errors have no class in common
            raise UnsupportedExportError(
                f"{list(map(str, models))} cannot be written for ExecuTorch: {error}"
            ) from error
        with open(folder / "model.pte", "wb") as file:
            lowered.write_to_file(file)
        return {route: {"file": "model.pte", "method": name} for route, name in names.items()}


def _partitioner() -> Any:
    """XNNPACK's partitioner, with reshapes in float32 only: a quantised one that changes the scale would not load."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, ViewCopyConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class FloatView(ViewCopyConfig):
        def supported_precision_types(self) -> list[ConfigPrecisionType]:
            return [ConfigPrecisionType.FP32]

    configs = [FloatView if config is ViewCopyConfig else config for config in ALL_PARTITIONER_CONFIGS]
    return XnnpackPartitioner(configs=configs)
