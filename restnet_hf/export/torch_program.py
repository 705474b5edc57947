"""Programs of torch.export (.pt2), for torch itself, AOTInductor and other compilers."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from transformers.utils import logging

from restnet_hf.export.exporter import Exporter, file_names
from restnet_hf.export.parts import RouteOrPart
from restnet_hf.export.programs import Program
from restnet_hf.runtime.torch_archives import UntrustedProgramError, safe_archive


logger = logging.get_logger(__name__)


class TorchExporter(Exporter):
    """Exporter for torch.export; each route is a file of its own with all of its weights."""

    runtime = "torch"
    packages = ("torch",)
    precisions = ("fp32", "bf16")
    dtypes = MappingProxyType({"bf16": torch.bfloat16})

    def convert(self, program: Program, precision: str) -> Program:
        """The program itself, which is traced in the type of the precision."""
        return program

    def save(self, models: Mapping[RouteOrPart, Program], folder: Path) -> dict[RouteOrPart, dict[str, str]]:
        """Write one file for each route; warn where loading it needs trust_remote_code."""
        entries = {}
        for route, name in file_names(models).items():
            file = folder / f"{name}.pt2"
            torch.export.save(models[route].exported, file)
            try:
                safe_archive(file)
            except UntrustedProgramError as error:
                logger.warning("'%s' can only be loaded with trust_remote_code=True: %s", route, error)
            compute = str(models[route].example.dtype).removeprefix("torch.")
            entries[route] = {"file": file.name, "compute": compute}
        return entries
