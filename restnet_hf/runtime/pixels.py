"""Exported routes that normalise pixels and compute probabilities themselves, run as all others are. No torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from restnet_hf.runtime.runners import RUNTIMES, Run


INPUT, PIXELS = "input", "pixels"  # key of the profile's metadata, and its value where files take pixels
SMALLEST = np.finfo(np.float32).tiny  # probability whose logarithm is finite


def to_pixels(images: np.ndarray, how: Mapping[str, Any]) -> np.ndarray:
    """Undo the normalisation of images.

    Args:
        images: images (N, 3, H, W) as they are prepared.
        how: ``mean`` and ``std`` of values from 0 to 1.

    Returns:
        Pixels (N, H, W, 3) in uint8.
    """
    levels = 255 * (images.transpose(0, 2, 3, 1) * np.float32(how["std"]) + np.float32(how["mean"]))
    return np.ascontiguousarray(levels.round().clip(0, 255).astype(np.uint8))


def normalise(pixels: np.ndarray, how: Mapping[str, Any]) -> np.ndarray:
    """Normalise pixels.

    Args:
        pixels: pixels (N, H, W, 3) in uint8.
        how: ``mean`` and ``std`` of values from 0 to 1.

    Returns:
        Images (N, 3, H, W) in float32.
    """
    images = (pixels.astype(np.float32) / 255 - np.float32(how["mean"])) / np.float32(how["std"])
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def to_logits(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities (N, classes), of which none is below that of the smallest normal float32."""
    return np.log(np.maximum(probabilities, SMALLEST))


class PixelRun:
    """A function from images to logits, of a file that computes probabilities (N, classes) from pixels (N, H, W, 3).

    The logits are logarithms of the probabilities: they differ from the network's by one number for each image.

    Args:
        run: function that runs the file.
        how: ``mean`` and ``std`` of values from 0 to 1.
    """

    def __init__(self, run: Any, how: Mapping[str, Any]) -> None:
        self._run, self._how = run, how
        shape = getattr(run, "input_shape", None)
        self.input_shape = None if shape is None or len(shape) != 4 else tuple(shape[axis] for axis in (0, 3, 1, 2))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of images (N, 3, H, W)."""
        return to_logits(self._run(to_pixels(images, self._how)))

    def timed(self, images: np.ndarray) -> tuple[Any, np.ndarray]:
        """The function of the file alone and its pixels, as a program on a device calls it."""
        return self._run, to_pixels(images, self._how)


def load_run(
    runtime: str,
    folder: Path,
    entry: Mapping[str, str],
    threads: int | None,
    trust_remote_code: bool,
    how: Mapping[str, Any] | None,
    batch_size: int | None = None,
) -> Run:
    """Load an exported route as a function from images (N, 3, H, W) to logits (N, classes).

    Args:
        runtime: a key of `RUNTIMES`.
        folder: folder of the exported files.
        entry: names of the route's files.
        threads: number of threads of the processor; None for the runtime's own default.
        trust_remote_code: whether files that may run code of their author are loaded.
        how: ``mean`` and ``std`` of values from 0 to 1 where the file takes pixels; None where it takes images.
        batch_size: number of images that the file takes in a run, where the function is to take any number.
    """
    run = RUNTIMES[runtime].run(folder, entry, threads, trust_remote_code)
    run = run if batch_size is None else partial(run_in_batches, run, batch_size=batch_size)
    return run if how is None else PixelRun(run, how)


def run_in_batches(run: Run, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Logits (N, classes) from a function that only takes batches of one size; the last batch is padded.

    Args:
        run: function that takes that many images.
        images: images (N, ...) of any number.
        batch_size: number of images in a batch.
    """
    padded = np.concatenate([images, images[-1:].repeat(-len(images) % batch_size, 0)])
    logits = [run(padded[start : start + batch_size]) for start in range(0, len(padded), batch_size)]
    return np.concatenate(logits)[: len(images)]
