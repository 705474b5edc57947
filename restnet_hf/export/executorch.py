"""ExecuTorch programs (.pte) on XNNPACK; several routes are methods of one program, which has each weight once."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from restnet_hf.export.exporter import Exporter, Quantization, UnsupportedExportError, file_names
from restnet_hf.export.programs import Program
from restnet_hf.routes.route import Route


class ExecuTorchExporter(Exporter):
    """ExecuTorch, for phones and boards; a program takes the number of images that it was made for."""

    runtime = "executorch"
    packages = ("executorch.exir", "torchao.quantization.pt2e.quantize_pt2e")
    precisions = ("fp32", "int8")
    any_batch = False

    def convert(self, program: Program, precision: str) -> Program:
        return program

    def quantize(self, model: Program, images: Iterable[np.ndarray], how: Quantization) -> Program:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        for layer in how.keep:
            quantizer.set_module_name(layer, None)
        watched = prepare_pt2e(model.exported.module(), quantizer)
        batch = len(model.example)
        for image in images:
            watched(torch.from_numpy(image).expand(batch, -1, -1, -1))
        made = convert_pt2e(watched)
        return replace(model, exported=torch.export.export(made, (model.example,), strict=False))

    def save(self, models: Mapping[Route, Program], folder: Path) -> dict[Route, dict[str, str]]:
        from executorch.exir import to_edge_transform_and_lower

        names = file_names(models)
        programs = {names[route]: program.exported for route, program in models.items()}
        try:
            lowered = to_edge_transform_and_lower(programs, partitioner=[_partitioner()]).to_executorch()
        except Exception as error:  # of no common kind
            raise UnsupportedExportError(
                f"{list(map(str, models))} cannot be written for ExecuTorch: {error}"
            ) from error
        with open(folder / "model.pte", "wb") as file:
            lowered.write_to_file(file)
        return {route: {"file": "model.pte", "method": name} for route, name in names.items()}


def _partitioner() -> Any:
    """XNNPACK's, with reshapes in float32 alone: one in eight bits that also changes the scale would not load."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, ViewCopyConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class FloatView(ViewCopyConfig):
        def supported_precision_types(self) -> list[ConfigPrecisionType]:
            return [ConfigPrecisionType.FP32]

    configs = [FloatView if config is ViewCopyConfig else config for config in ALL_PARTITIONER_CONFIGS]
    return XnnpackPartitioner(configs=configs)
