"""Pictures as RGB images: from files, bytes, arrays and PIL images, with an error that names a broken one."""

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from restnet_hf.errors import PictureError, shorten
from restnet_hf.runtime.pictures import decode


CHANNELS = (1, 3, 4)


def is_picture(value: Any) -> bool:
    """Whether a value is one picture: a PIL image, a path, an encoded picture, or an array of whole numbers."""
    if isinstance(value, Mapping):
        return {"bytes", "path"} <= value.keys()
    if isinstance(value, np.ndarray | Tensor):
        whole = not value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind in "iub"
        in_channels = value.ndim == 3 and (value.shape[0] in CHANNELS or value.shape[-1] in CHANNELS)
        return whole and (value.ndim == 2 or in_channels)
    return isinstance(value, Image.Image | str | bytes | os.PathLike)


def picture_path(picture: Any) -> str | None:
    """Path of the file that a picture comes from; None where it has none."""
    path = picture.get("path") if isinstance(picture, Mapping) else getattr(picture, "filename", picture)
    return os.fspath(path) if isinstance(path, str | os.PathLike) and os.fspath(path) else None


def open_picture(picture: Any, name: str = "a picture") -> Image.Image:
    """Decode a picture to an RGB image, turned upright as its EXIF data say.

    Its size is checked before it is decoded: more pixels than Pillow's ``PIL.Image.MAX_IMAGE_PIXELS`` are refused.

    Args:
        picture: PIL image of any mode; path of a file; bytes of one; dict of ``bytes`` and ``path``; array (H, W),
            (H, W, C) or (C, H, W) of whole numbers from 0 to 255.
        name: name of the picture, for errors, where it has no path.

    Raises:
        PictureError: the picture is broken, truncated or too large.
        TypeError: the picture has another type.
    """
    if isinstance(picture, np.ndarray | Tensor | list):
        return _from_array(picture, name)
    if not is_picture(picture):
        raise TypeError(
            f"{name} is {type(picture).__name__}; a picture is a PIL image, a path, bytes, or an array of whole "
            "numbers from 0 to 255"
        )
    try:
        if isinstance(picture, Image.Image):
            return decode(picture)
        with _open(picture) as image:
            return decode(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"is too large: {error}"
    except MemoryError:
        raise
    except Exception as error:  # decoders may fail in any way on a broken file
        reason = f"cannot be read: {shorten(str(error), 300) or type(error).__name__}"
    raise PictureError(
        f"{picture_path(picture) or name} {reason}. Repair or remove it, or leave out all such pictures with "
        "on_error='skip'"
    ) from None


def _open(picture: Any) -> Image.Image:
    """A PIL image that is not decoded yet."""
    if isinstance(picture, Mapping):
        data, path = picture["bytes"], picture["path"]
        if data is None and path is not None and not Path(path).exists():  # within an archive, or on the Hub
            return ImageFeature().decode_example({"bytes": None, "path": os.fspath(path)})
        picture = path if data is None else data
    if picture is None:
        raise ValueError("it has neither bytes nor a path")
    return Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture)


def _from_array(array: Any, name: str) -> Image.Image:
    pixels = array.numpy(force=True) if isinstance(array, Tensor) else np.asarray(array)
    if pixels.ndim == 3 and pixels.shape[0] in CHANNELS and pixels.shape[-1] not in CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    whole = pixels.dtype.kind in "iub"
    if not whole or pixels.ndim not in (2, 3) or pixels.size == 0:
        raise TypeError(
            f"{name} is an array of {pixels.dtype} of shape {pixels.shape}; a picture is (H, W) or (H, W, 3) whole "
            "numbers from 0 to 255, and images that are prepared already come as pixel_values (N, 3, H, W)"
        )
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "b" and not (pixels.min() >= 0 and pixels.max() <= 255):
            raise PictureError(f"{name} has values from {pixels.min()} to {pixels.max()}, not from 0 to 255")
        pixels = pixels.astype(np.uint8) * (255 if pixels.dtype.kind == "b" else 1)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def split_pictures(array: np.ndarray | Tensor) -> list[Any] | Tensor:
    """Pictures of an array of whole numbers; images (N, 3, H, W) that are prepared already, of one of floats.

    Args:
        array: one picture, pictures (N, ...), images (N, 3, H, W), or one image (3, H, W).
    """
    if is_picture(array):
        return [array]
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) and array.dtype.kind == "f" else array
    if isinstance(tensor, Tensor) and tensor.is_floating_point():
        return tensor[None] if tensor.dim() == 3 else tensor
    return list(array)
