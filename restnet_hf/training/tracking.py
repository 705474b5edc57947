"""Where a training's numbers go: a file of JSON lines, or any tracker of Accelerate."""

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


# Trackers that an extra of this package installs, and whether they are there.
EXTRAS: dict[str, Callable[[], bool]] = {"tensorboard": is_tensorboard_available, "trackio": is_trackio_available}


class JsonlTracker(GeneralTracker):
    """Writes ``log.jsonl``, one JSON object a line, which needs no service and no other package to be read.

    The first line of a run is ``{"config": {...}}``; each of the others holds ``step``, ``time`` (seconds since 1970)
    and the values. A run that is resumed goes on in the same file, with a line of its own for its configuration, and
    writes the steps since its checkpoint again: of lines with equal steps the last counts. Only the main process
    writes. Numbers that JSON does not know are the strings ``nan``, ``inf`` and ``-inf``.

    Args:
        logging_dir: folder of the file; made where it does not exist.
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
        """Open the file, after a last line that a killed run did not finish is taken off."""
        if self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as raw:
            raw.seek(0)
            raw.truncate(raw.read().rfind(b"\n") + 1)
        self._file = self.path.open("a", encoding="utf-8")

    @on_main_process
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Write the line of the run's options."""
        self._write({"config": values})

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write the line of a step; further options are those of other trackers, and mean nothing here."""
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
    """A value as JSON has it: numbers out of tensors and arrays, and text for what it does not know."""
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
    """What to give to ``Accelerator(log_with=...)``.

    Args:
        log_with: ``jsonl``, ``none``, another name that Accelerate knows, a tracker, or a list of these. None is
            ``jsonl`` where there is a folder, and ``none`` where there is not.
        logging_dir: folder of `JsonlTracker`; other trackers have theirs from ``Accelerator(project_dir=...)``.

    Raises:
        ValueError: ``jsonl`` has no folder, or a tracker is not installed.
    """
    if log_with is None:
        log_with = [] if logging_dir is None else ["jsonl"]
    wanted = log_with if isinstance(log_with, Sequence) and not isinstance(log_with, str) else [log_with]
    found = [_tracker(each, logging_dir) for each in wanted if each != "none"]
    return found or None


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
