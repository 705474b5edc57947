"""Golden outputs: logits of made images at the export, with which a device compares what it computes. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from restnet_hf.errors import quote
from restnet_hf.runtime.exported_files import image_size, read_json
from restnet_hf.runtime.pixels import normalise


CHECK = "check.json"
IMAGES = 2
MOST = 256  # logits that are kept of each image
TOLERANCES = {"fp32": 0.01, "fp16": 0.1, "bf16": 0.1}  # largest difference of a logit, in their standard deviations
TOLERANCE = 0.5  # in eight bits, where processors round sums differently
PICTURE = "(y * (3 + k) + x * (5 - k) + 40 * c + y * x // 8) % 256"  # in whole numbers, so the same everywhere


def made_images(how: Mapping[str, Any]) -> np.ndarray:
    """Pictures of a pattern, as images (N, 3, H, W).

    Args:
        how: settings that ``preprocessing.json`` holds.

    Raises:
        ValueError: the size of prepared images depends on the picture.
    """
    size = image_size(how)
    if size is None:
        raise ValueError(
            "images of no fixed size cannot be made; give the preprocessing a crop, or a height and width"
        )
    height, width = size
    y, x, c = np.ogrid[:height, :width, :3]
    pictures = np.stack([(y * (3 + k) + x * (5 - k) + 40 * c + y * x // 8) % 256 for k in range(IMAGES)])
    return normalise(pictures, how)


def golden(logits: Mapping[str, np.ndarray], precision: str) -> dict[str, Any]:
    """The content of ``check.json``.

    Args:
        logits: logits (N, classes) of the made images, by route or cascade.
        precision: precision of the export.
    """
    kept = {name: each[:, :: step_of(each.shape[1])].astype(np.float64).round(6) for name, each in logits.items()}
    return {
        "tolerance": TOLERANCES.get(precision, TOLERANCE),
        "logits": {name: each.tolist() for name, each in kept.items()},
    }


def step_of(classes: int) -> int:
    """Every how many of the logits is kept."""
    return -(-classes // MOST)


def read_golden(folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    """The tolerance and the logits in ``check.json``.

    Raises:
        OSError: there is no such file, as in folders that 0.1 wrote.
        ValueError: its content is something else.
    """
    if not (folder / CHECK).exists():
        raise FileNotFoundError(f"{folder} has no {CHECK}, which earlier versions did not write; export it again")
    content = read_json(folder, CHECK, dict)
    try:
        logits = {str(name): np.array(each, np.float32) for name, each in content["logits"].items()}
        tolerance = float(content["tolerance"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CHECK} is invalid: {quote(error)}") from error
    if not logits or any(each.ndim != 2 or len(each) != IMAGES for each in logits.values()):
        raise ValueError(f"{folder / CHECK} must hold logits of {IMAGES} images for each route")
    return tolerance, logits


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of a logit, in standard deviations of the expected ones (N, classes); NaN where one is.

    Args:
        logits: all logits (N, classes).
        expected: logits that `golden` kept.
    """
    kept = logits[:, :: step_of(logits.shape[1])]
    if kept.shape != expected.shape:
        return float("inf")
    return float(np.abs(kept - expected).max() / max(expected.std(), 1e-9))
