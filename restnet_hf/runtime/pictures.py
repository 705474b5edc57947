"""Pictures as PIL images: from files, arrays and PIL images, with the name of one that cannot be used. No torch."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from restnet_hf.errors import PictureError, quote, shorten


ONE = (str, os.PathLike, Image.Image)  # types of a single picture
MAX_MESSAGE = 500  # characters of what a decoder reports


def is_one_picture(pictures: Any) -> bool:
    """Whether an argument is one picture and not several.

    Args:
        pictures: PIL image, path or array (H, W, 3) for one; an array (N, H, W, 3) or any other iterable for several.
    """
    return isinstance(pictures, ONE) or (isinstance(pictures, np.ndarray) and pictures.ndim <= 3)


def open_pictures(pictures: Any) -> Iterator[Image.Image]:
    """Open one or several pictures, one after the other, as RGB images.

    Args:
        pictures: PIL images, paths or arrays (H, W, 3) in uint8, one or several.

    Raises:
        OSError: a file cannot be opened; the message names it.
        PictureError: a picture is broken, or too large to decode; the message names it.
        TypeError: a picture is of another type.
        ValueError: an array has another shape or type.
    """
    if not is_one_picture(pictures) and not isinstance(pictures, Iterable):
        raise TypeError(f"pictures must be PIL images, paths or arrays (H, W, 3), not {type(pictures).__name__}")
    for number, picture in enumerate([pictures] if is_one_picture(pictures) else pictures):
        yield open_picture(picture, f"picture {number}")


def open_picture(picture: Any, name: str = "picture") -> Image.Image:
    """Open one picture as an RGB image; see `open_pictures`.

    Args:
        picture: PIL image, path or array (H, W, 3) in uint8.
        name: name of the picture for errors, where it has none of its own.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise ValueError(
                f"{name} is an array of shape {picture.shape} in {picture.dtype}; give (H, W, 3) in uint8, or "
                "call the model with prepared pixel_values"
            )
        return Image.fromarray(picture)
    if not isinstance(picture, ONE):
        raise TypeError(f"{name} is of type {type(picture).__name__}; give a PIL image, a path or an array (H, W, 3)")
    path = getattr(picture, "filename", "") if isinstance(picture, Image.Image) else os.fspath(picture)
    name = f"{name} ({quote(path)})" if path else name
    try:
        if isinstance(picture, Image.Image):
            return decode(picture)
        with Image.open(picture) as image:
            return decode(image)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise type(error)(f"{name} cannot be opened: {error.strerror or error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"{name} is too large: {shorten(str(error), MAX_MESSAGE)}") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders may fail in any way on a broken file
        raise PictureError(f"{name} cannot be decoded: {shorten(str(error), MAX_MESSAGE)}") from error


def decode(image: Image.Image) -> Image.Image:
    """Decode a picture to RGB, turned upright as its EXIF data say.

    Args:
        image: PIL image of any mode, decoded or not.

    Raises:
        PIL.Image.DecompressionBombError: it has more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, where Pillow warns.
    """
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} pixels, and PIL.Image.MAX_IMAGE_PIXELS is {most:,}"
        )
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image.convert("RGB")
