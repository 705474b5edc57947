"""Trackers of training: a file of JSON lines, or any tracker of Accelerate."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import is_tensorboard_available, is_trackio_available
from torch import Tensor


# Trackers that an extra of this package installs, and functions that report whether they are installed.
EXTRAS: dict[str, Callable[[], bool]] = {"tensorboard": is_tensorboard_available, "trackio": is_trackio_available}


class JsonlTracker(GeneralTracker):
    """Writes ``log.jsonl``, one JSON object a line, which any program can read.

    The first line of a run is ``{"config": {...}}``; each of the others holds ``step``, ``time`` (seconds since 1970)
    and the values. A resumed run appends to the same file: a line for its configuration, then the steps since its
    checkpoint again; of several lines with the same step the last one counts. Only the main process writes. Numbers
    that JSON cannot hold are the strings ``nan``, ``inf`` and ``-inf``.

    Args:
        logging_dir: folder of the file; it is made if it does not exist.
    """

    name = "jsonl"
    requires_logging_directory = True

    def __init__(self, logging_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(logging_dir) / "log.jsonl"
        self._file: TextIO | None = None

    @property
    def tracker(self) -> TextIO | None:
        """The open file; None before `start`, after `finish`, and on all processes but the main one."""
        return self._file

    @on_main_process
    def start(self) -> None:
        """Open the file, and remove a last line that a killed run left incomplete."""
        if self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as raw:
            raw.seek(0)
            raw.truncate(raw.read().rfind(b"\n") + 1)
        self._file = self.path.open("a", encoding="utf-8")

    @on_main_process
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write the line of the run's options.

        Args:
            values: options of the run by name.
        """
        self._write({"config": values})

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write the line of a step.

        Args:
            values: numbers of the step by name.
            step: number of the step.
            **kwargs: options of other trackers, which this one ignores.
        """
        self._write({"step": step, "time": time.time(), **values})

    @on_main_process
    def finish(self) -> None:
        """Close the file; `start` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        self.start()
        assert self._file is not None
        self._file.write(json.dumps(_plain(line), allow_nan=False) + "\n")
        self._file.flush()


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers for tensors and arrays, text for other types."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def trackers(log_with: Any, logging_dir: str | os.PathLike[str] | None) -> list[Any] | None:
    """The value of ``Accelerator(log_with=...)``.

    Args:
        log_with: ``jsonl``, ``none``, another name of Accelerate's, a tracker, or a list of these. None is ``jsonl``
            where there is a folder, and ``none`` where there is not.
        logging_dir: folder of `JsonlTracker`; for other trackers ``Accelerator(project_dir=...)`` sets it.

    Raises:
        ValueError: ``jsonl`` has no folder, or a tracker is not installed.
    """
    if log_with is None:
        log_with = [] if logging_dir is None else ["jsonl"]
    wanted = log_with if isinstance(log_with, Sequence) and not isinstance(log_with, str) else [log_with]
    return [_tracker(each, logging_dir) for each in wanted if each != "none"] or None


def _tracker(wanted: Any, logging_dir: str | os.PathLike[str] | None) -> Any:
    if wanted == JsonlTracker.name:
        if logging_dir is None:
            raise ValueError("log_with='jsonl' writes to a folder, and there is none; give an output_dir")
        return JsonlTracker(logging_dir)
    name = str(wanted)  # Accelerate's names may also be members of an enum
    if name in EXTRAS and not EXTRAS[name]():
        raise ValueError(
            f"log_with={name!r} needs a package that is not installed: pip install restnet-hf[{name}], or log with "
            "'jsonl', which needs none"
        )
    return wanted
