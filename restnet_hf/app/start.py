"""What ``restnet-hf app`` opens: the embedded demo, an adapter, or two anchors that are stitched for it."""

import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from restnet_hf.data.datasets import load_images, subset
from restnet_hf.demo.model import load_demo
from restnet_hf.demo.paths import DATA
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.training.loop import train_heads


IMAGES, EXAMPLES = 500, 6  # images to compare and profile with, and pictures to try
MAX_ROUTES = 6
MEASURED_S = 3.0
logger = logging.getLogger(__name__)


def open_demo() -> tuple[StitchedModelForImageClassification, Any, list[str]]:
    """The embedded demo, with latencies of this device.

    Returns:
        The model, images, and paths of pictures to try, for `build`.
    """
    model = load_demo()
    add_latency(model)
    return model, subset(load_images(DATA, "train"), IMAGES), example_pictures(load_images(DATA, "test"))


def open_adapter(adapter: str, data: str | None = None) -> tuple[StitchedModelForImageClassification, Any, list[str]]:
    """An adapter, with latencies of this device.

    Args:
        adapter: Hub id or local folder.
        data: labelled images, a Hub id or a local folder, which profile an adapter that has no profile.

    Returns:
        The model, images, and paths of pictures to try, for `build`.

    Raises:
        ValueError: the adapter has no profile, and there are no images to make one.
        OSError: the adapter or the images cannot be loaded.
    """
    model = StitchedModelForImageClassification.from_pretrained(adapter)
    images, examples = (None, []) if data is None else _images_of(data, "train")
    if model.profiled is None:
        if data is None:
            raise ValueError(f"{adapter} has no profile to show; give labelled images with data (--data DIR)")
        model.profile(_images_of(data, "test")[0], cascades=True)
    add_latency(model)
    return model, images, examples


def open_anchors(front: str, end: str, dataset: str) -> tuple[StitchedModelForImageClassification, Any, list[str]]:
    """Two anchors with a few stitches between them, fitted by least squares and profiled.

    Args:
        front: anchor whose early blocks run: a Hub id or a local folder.
        end: anchor whose late blocks run: a Hub id or a local folder.
        dataset: labelled images: a Hub id or a local folder.

    Returns:
        The model, images, and paths of pictures to try, for `build`.

    Raises:
        ValueError: the anchors or the images do not fit.
        OSError: an anchor or the images cannot be loaded.
    """
    (images, _), (held_out, examples) = _images_of(dataset, "train"), _images_of(dataset, "test")
    model = StitchedModelForImageClassification.from_anchors(front, end, labels_from=images)
    if model.config.new_head:
        train_heads(model, images)
    model.select_stitches(images, max_routes=MAX_ROUTES)
    model.fit_stitches(images)
    model.profile(held_out, cascades=True)
    add_latency(model)
    return model, images, examples


def _images_of(dataset: str, split: str) -> tuple[Dataset, list[str]]:
    """Some images of a split, and pictures to try."""
    images = load_images(dataset, split)
    return subset(images, IMAGES), example_pictures(images)


def add_latency(model: StitchedModelForImageClassification) -> None:
    """Measure the latencies of this device, unless other programs disturb that too much."""
    try:
        model.record_latency(model.measure_latency(seconds=MEASURED_S))
    except RuntimeError as error:
        logger.warning("there are no limits on latency on the page: %s", error)


def example_pictures(images: Dataset, column: str | None = None) -> list[str]:
    """Write a few pictures of a data set to files.

    Args:
        images: data set with a column of pictures.
        column: name of that column; by default the first one of pictures.
    """
    from datasets import Image

    names: Sequence[str] = [name for name, kind in images.features.items() if isinstance(kind, Image)]
    if not names:
        return []
    folder = tempfile.mkdtemp(prefix="restnet-hf-")
    paths = []
    for number, row in enumerate(images.select(range(min(EXAMPLES, len(images))))):
        paths.append(os.path.join(folder, f"{number}.png"))
        row[column or names[0]].convert("RGB").save(paths[-1])
    return paths
