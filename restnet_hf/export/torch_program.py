"""Programs of torch.export (.pt2), for whatever loads them: torch itself, AOTInductor, other compilers."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from restnet_hf.export.exporter import Exporter, file_names
from restnet_hf.export.programs import Program
from restnet_hf.routes import Route


class TorchExporter(Exporter):
    """torch.export: each route is a file of its own, with all of its weights."""

    runtime = "torch"
    packages = ("torch",)
    precisions = ("fp32", "bf16")
    dtypes = MappingProxyType({"bf16": torch.bfloat16})

    def convert(self, program: Program, precision: str) -> Program:
        return program

    def save(self, models: Mapping[Route, Program], folder: Path) -> dict[Route, dict[str, str]]:
        entries = {}
        for route, name in file_names(models).items():
            torch.export.save(models[route].exported, folder / f"{name}.pt2")
            compute = str(models[route].example.dtype).removeprefix("torch.")
            entries[route] = {"file": f"{name}.pt2", "compute": compute}
        return entries
