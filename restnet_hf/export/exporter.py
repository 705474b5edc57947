"""Exporter: writes routes for one runtime; and the file in which several routes share their weights."""

import hashlib
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from packaging.version import Version

from restnet_hf.export.parts import RouteOrPart
from restnet_hf.export.programs import Program
from restnet_hf.runtime.runners import LEAST_TORCH, RUNTIMES, import_for_runtime


ALIGNED = 64  # bytes of a cache line and of the widest vector, at multiples of which tensors begin
QUANTIZED = "int8"  # prefix of the precisions that need calibration


class UnsupportedExportError(ValueError):
    """A runtime does not support a precision, or an operation of a route."""


@dataclass(frozen=True)
class Quantization:
    """How a model is quantised.

    Args:
        precision: a precision that begins with ``int8``.
        careful: whether the runtime's slower and more exact algorithm is used, where it has one.
        keep: names of the layers, as in `Program.layers`, that stay in full precision.
        full_range: whether weights can have all eight bits; seven where the target's sums saturate, see `TARGETS`.
    """

    precision: str
    careful: bool = False
    keep: tuple[str, ...] = ()
    full_range: bool = False


class Exporter(ABC):
    """Writes routes for one runtime.

    A row of `RUNTIMES` names a subclass, and has the function that runs what it writes.

    Attributes:
        runtime: key of the exporter's row in `RUNTIMES`.
        packages: modules that the export needs.
        precisions: precisions that the runtime supports.
        any_batch: whether one file takes any number of images.
        takes_pixels: whether `add_preprocessing` exists.
        careful: whether there is a slower and more exact way to quantise.
        dtypes: type of the weights by precision, where they are not in float32.
    """

    runtime: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    precisions: ClassVar[tuple[str, ...]]
    any_batch: ClassVar[bool] = True
    takes_pixels: ClassVar[bool] = False
    careful: ClassVar[bool] = False
    dtypes: ClassVar[Mapping[str, torch.dtype]] = MappingProxyType({})

    def check(self, precision: str) -> None:
        """Check that a precision is supported and that all packages are installed.

        Raises:
            MissingRuntimeError: a package is not installed.
            UnsupportedExportError: the runtime does not support the precision, or torch is too old to export.
        """
        if Version(torch.__version__) < Version(LEAST_TORCH):
            raise UnsupportedExportError(f"exporting needs torch>={LEAST_TORCH}, not {torch.__version__}; upgrade it")
        if precision not in self.precisions:
            raise UnsupportedExportError(
                f"precision={precision!r} is not one of {self.precisions} of runtime '{self.runtime}'"
            )
        for package in self.packages:
            import_for_runtime(package, self.runtime)

    @abstractmethod
    def convert(self, program: Program, precision: str) -> Any:
        """A program in the runtime's own format.

        Args:
            program: program of a route.
            precision: precision, one of `precisions`.
        """

    def quantize(self, model: Any, images: Iterable[np.ndarray], how: Quantization) -> Any:
        """A converted model in low precision, by the runtime's own quantiser; ``model`` itself does not change.

        Args:
            model: a model that `convert` returned.
            images: calibration images, each (1, 3, H, W).
            how: the precision, and the layers that stay in full precision.
        """
        raise UnsupportedExportError(f"runtime '{self.runtime}' does not quantise")

    def add_preprocessing(self, model: Any, how: Mapping[str, Any]) -> Any:
        """A model of a route that takes pixels (N, H, W, 3) in uint8, and returns probabilities (N, classes).

        Args:
            model: a model that `convert` or `quantize` returned, which may change.
            how: ``mean`` and ``std`` of values from 0 to 1.
        """
        raise UnsupportedExportError(f"files of runtime '{self.runtime}' cannot be given their preprocessing")

    @abstractmethod
    def save(self, models: Mapping[RouteOrPart, Any], folder: Path) -> dict[RouteOrPart, dict[str, str]]:
        """Write models, with each weight once where the runtime allows it.

        Args:
            models: models that `convert` or `quantize` returned, by route.
            folder: folder to write to.

        Returns:
            The entry of each route, from which the runtime loads it: ``file``, and the other `Runtime.fields`.
        """


def load_exporter(runtime: str) -> Exporter:
    """The exporter of a runtime.

    Args:
        runtime: a key of `RUNTIMES`.

    Raises:
        ValueError: there is no such runtime, or its exporter is for another one.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is not one of {sorted(RUNTIMES)}")
    exporter = RUNTIMES[runtime].exporter
    if isinstance(exporter, str):
        module, _, name = exporter.partition(":")
        exporter = getattr(importlib.import_module(module), name)
    if isinstance(exporter, type):
        exporter = exporter()
    if exporter.runtime != runtime:
        raise ValueError(f"the exporter of runtime '{runtime}' has runtime='{exporter.runtime}'; give both one name")
    return exporter


def file_names(routes: Iterable[RouteOrPart]) -> dict[RouteOrPart, str]:
    """A file name for each route, of letters, digits and ``_``; ``model`` for a single route."""
    routes = list(routes)
    if len(routes) == 1:
        return {routes[0]: "model"}
    names: dict[RouteOrPart, str] = {}
    for route in routes:
        name = re.sub(r"\W+", "_", str(route), flags=re.ASCII).strip("_")
        names[route] = name if name not in names.values() else f"{name}_{len(names)}"
    return names


class SharedWeights:
    """A file of tensors that holds equal bytes once.

    Args:
        file: file that is open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._places = file, dict[bytes, int]()

    def add(self, data: bytes) -> int:
        """Write bytes that the file does not hold yet; returns their offset in the file."""
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNED))
            self._places[key] = self._file.tell()
            self._file.write(data)
        return self._places[key]
