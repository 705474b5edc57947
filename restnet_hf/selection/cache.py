"""Cache of similarities on disk, by anchors, images and settings."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from restnet_hf.caching import SIMILARITIES, assets_folder, note_use
from restnet_hf.files import atomic_file
from restnet_hf.hashing import software_sha256
from restnet_hf.selection.ranking import Similarity


LIBRARIES = ("torch", "torchvision", "transformers", "timm")
CODE = ("data", "anchors", "stitches", "steps.py", "selection")  # rooms and files that similarities depend on
logger = logging.getLogger(__name__)


def cache_file(dependencies: Mapping[str, Any]) -> Path | None:
    """Path of the cached similarity that depends on ``dependencies``; None if there can be no cache.

    The files are in ``HF_HOME/assets/restnet_hf`` and can be deleted.

    Args:
        dependencies: everything the similarity depends on besides our code and the libraries, fit for JSON.
    """
    key = json.dumps(dependencies, sort_keys=True, default=str) + software_sha256(LIBRARIES, CODE)
    name = hashlib.sha256(key.encode()).hexdigest()
    try:
        return assets_folder(SIMILARITIES) / f"{name}.npz"
    except (OSError, ValueError) as error:  # a file in the way is a ValueError there
        logger.info("similarities cannot be cached: %s", error)
        return None


def read_similarity(file: Path | None, front: str, end: str) -> Similarity | None:
    """Read a file that `write_similarity` wrote; None if there is none, or it is damaged.

    Args:
        file: path of the file; None for no cache.
        front: name of the front anchor.
        end: name of the end anchor.
    """
    try:
        if file is None or not file.exists():
            return None
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as data:
            settings = json.loads(str(data["settings"]))
            note_use(file)
            return Similarity(front, end, np.ma.masked_array(data["values"], data["mask"]), settings)
    except Exception as error:  # whatever is wrong with the file, the similarity is computed again
        logger.info("%s cannot be read: %s", file, error)
        return None


def write_similarity(similarity: Similarity, path: Path) -> None:
    """Write values, mask and settings of a similarity as npz.

    Raises:
        OSError: the file cannot be written.
    """
    values = similarity.values
    with atomic_file(path) as temporary:
        np.savez(
            temporary,
            values=values.filled(np.nan),
            mask=np.ma.getmaskarray(values),
            settings=json.dumps(dict(similarity.settings)),
            of=f"{similarity.front}, {similarity.end}",
        )


def cache_similarity(similarity: Similarity, path: Path) -> None:
    """Write a similarity to the cache; one that cannot be written, on a full disk say, is not cached."""
    try:
        write_similarity(similarity, path)
    except OSError as error:
        logger.info("similarities cannot be cached: %s", error)
