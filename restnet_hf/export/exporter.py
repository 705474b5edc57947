"""Exporter: what a runtime must be able to do, and the file in which many routes share their weights."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

from restnet_hf.export.programs import Program
from restnet_hf.routes.route import Route
from restnet_hf.runtime.runners import need


ALIGNED = 64  # bytes: of a cache line, and of the widest vector
QUANTIZED = "int8"  # precisions of this beginning


class UnsupportedExportError(ValueError):
    """A runtime cannot do what a route needs."""


@dataclass(frozen=True)
class Quantization:
    """How a model is brought to low precision.

    Args:
        precision: one of those that begin with ``int8``.
        careful: in the runtime's slower and more exact way, where it has one.
        keep: layers, as `Program.layers` names them, that stay in full precision.
    """

    precision: str
    careful: bool = False
    keep: tuple[str, ...] = ()


class Exporter(ABC):
    """Writes routes for one runtime.

    A subclass is one row of `EXPORTERS`; `RUNNERS` has a row of the same name that runs what it writes.
    """

    runtime: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    precisions: ClassVar[tuple[str, ...]]
    any_batch: ClassVar[bool] = True  # one file takes any number of images
    careful: ClassVar[bool] = False  # it can quantise more exactly, at a price
    dtypes: ClassVar[Mapping[str, torch.dtype]] = MappingProxyType(
        {}
    )  # of weights, by precision, where they are not float32

    def check(self, precision: str) -> None:
        """Raise before anything is done.

        Raises:
            MissingRuntimeError: a package is not installed.
            UnsupportedExportError: the runtime has no such precision.
        """
        if precision not in self.precisions:
            raise UnsupportedExportError(
                f"precision={precision!r} is not one of {self.precisions} of runtime '{self.runtime}'"
            )
        for package in self.packages:
            need(package, self.runtime)

    @abstractmethod
    def convert(self, program: Program, precision: str) -> Any:
        """A program in the runtime's own form."""

    def quantize(self, model: Any, images: Iterable[np.ndarray], how: Quantization) -> Any:
        """A converted model in low precision, by the runtime's own quantiser; ``model`` stays as it is.

        Args:
            model: from `convert`.
            images: to calibrate with, each (1, 3, H, W).
            how: see there.
        """
        raise UnsupportedExportError(f"runtime '{self.runtime}' does not quantise")

    @abstractmethod
    def save(self, models: Mapping[Route, Any], folder: Path) -> dict[Route, dict[str, str]]:
        """Write models, each weight once where the runtime allows it.

        Returns:
            What `RUNNERS` needs to find each again: ``file`` and more.
        """


def file_names(routes: Iterable[Route]) -> dict[Route, str]:
    """A name for each route in which only letters, digits and ``_`` are; ``model`` for one alone."""
    routes = list(routes)
    if len(routes) == 1:
        return {routes[0]: "model"}
    names: dict[Route, str] = {}
    for route in routes:
        name = re.sub(r"\W+", "_", str(route), flags=re.ASCII).strip("_")
        names[route] = name if name not in names.values() else f"{name}_{len(names)}"
    return names


class SharedWeights:
    """A file of tensors in which equal bytes are once.

    Args:
        file: open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._places = file, dict[bytes, int]()

    def add(self, data: bytes) -> int:
        """Where in the file the bytes are."""
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNED))
            self._places[key] = self._file.tell()
            self._file.write(data)
        return self._places[key]
