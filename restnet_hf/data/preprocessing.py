"""An anchor's preprocessing: measured from its image processor, and converted from one anchor's to another's."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from restnet_hf.data.pictures import open_picture
from restnet_hf.limits import MAX_SIDE, MAX_VALUE, MIN_STD, is_mean, is_side, is_std


# errors that image processors raise for invalid settings
SETTINGS_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Preprocessing:
    """Size and normalisation of an anchor's images.

    Args:
        image_size: height and width in pixels.
        mean: mean of each channel, subtracted from RGB values from 0 to 1.
        std: standard deviation of each channel, by which the difference is divided.

    Raises:
        ValueError: a value is out of range.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        size = self.image_size
        if not isinstance(size, tuple | list) or len(size) != 2 or not all(map(is_side, size)):
            raise ValueError(
                f"image_size={str(size)[:100]} must be two whole numbers, height and width, from 1 to {MAX_SIDE}"
            )
        if not (is_mean(self.mean) and is_std(self.std)):
            raise ValueError(
                f"mean and std must hold three numbers each, up to {MAX_VALUE:g}, std from {MIN_STD:g} on; they are "
                f"{str((self.mean, self.std))[:200]}"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of ``dataclasses.asdict``, also after JSON made lists of the tuples.

        Raises:
            ValueError: a value is of the wrong type, or out of range.
        """
        try:
            return cls(**{key: tuple(value) for key, value in data.items()})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"image_size, mean and std must be lists of numbers: {str(error)[:200]}") from error

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """Measure an image processor's size, mean and std, whatever its options, on a black and a white image.

        Raises:
            ValueError: the processor cannot prepare an image, or not by mean and std.
        """
        try:
            black, white = (
                processor(Image.new("RGB", (320, 320), (level,) * 3), return_tensors="pt")["pixel_values"][0]
                for level in (0, 255)
            )
            low, high = (image[:, image.shape[1] // 2, image.shape[2] // 2].double() for image in (black, white))
        except SETTINGS_ERRORS as error:
            raise ValueError(f"{type(processor).__name__} cannot prepare an image: {str(error)[:200]}") from error
        std = 1 / (high - low)
        mean = -low * std
        # pixels are float32: digits after the sixth are rounding errors
        rounded = (tuple(float(f"{v:.6g}") for v in values.tolist()) for values in (mean, std))
        return cls((black.shape[-2], black.shape[-1]), *rounded)

    def check(self, pixel_values: Tensor | None) -> None:
        """Raise ValueError or TypeError unless ``pixel_values`` is a batch of such images, (N, 3, height, width)."""
        if pixel_values is None:
            raise ValueError(
                "there are no pixel_values; prepare pictures with model.prepare_data(data) first, for Trainer too, "
                "which drops columns of other names"
            )
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            kind = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise TypeError(f"pixel_values must be a floating point tensor, normalised by the processor; it is {kind}")
        expected = (3, *self.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must have shape (N, {', '.join(map(str, expected))}), not {tuple(pixel_values.shape)}; "
                "for another size build the model with from_anchors(..., image_size=...)"
            )


class Reprocess(nn.Module):
    """Converts images from one anchor's preprocessing to another's: exact in value, bilinear in size."""

    scale: Tensor
    shift: Tensor

    def __init__(self, source: Preprocessing, target: Preprocessing) -> None:
        super().__init__()
        self.image_size = target.image_size
        scale = [s / t for s, t in zip(source.std, target.std, strict=True)]
        shift = [(m - n) / t for m, n, t in zip(source.mean, target.mean, target.std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Convert ``pixel_values`` (N, 3, H, W)."""
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            pixel_values = interpolate(pixel_values, size=self.image_size, mode="bilinear", antialias=True)
        return pixel_values * self.scale + self.shift


def timm_processor(pretrained_cfg: dict[str, Any]) -> Any:
    """Make an image processor, which can be saved, from the settings of timm's evaluation transform.

    It matches timm's own within two of 255 levels, and half a pixel where the crop's margin is odd.

    Raises:
        ValueError: the settings are not those of a transform.
    """
    try:
        return _timm_processor(pretrained_cfg)
    except SETTINGS_ERRORS as error:
        raise ValueError(f"timm's settings of an image transform are invalid: {str(error)[:200]}") from error


def _timm_processor(pretrained_cfg: dict[str, Any]) -> Any:
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    height, width = config["input_size"][1:]
    crop_pct, squash = config["crop_pct"], config["crop_mode"] == "squash"
    resized = (
        {"height": height, "width": width} if squash else {"shortest_edge": math.floor(max(height, width) / crop_pct)}
    )
    from transformers import BitImageProcessor  # see `restnet_hf.anchors.tracing.materialize`

    return BitImageProcessor(
        size=resized,
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        resample={"nearest": 0, "bilinear": 2, "bicubic": 3}.get(config["interpolation"], 3),
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )


def with_image_size(processor: Any, image_size: tuple[int, int]) -> Any:
    """A copy of an image processor for another image size, with the same proportions of resizing and cropping.

    Raises:
        ValueError: the size is not from 1 to ``MAX_SIDE``, or the processor cannot be set to it.
    """
    Preprocessing(image_size)
    native = Preprocessing.of(processor).image_size
    if native == image_size:
        return processor
    settings = copy.deepcopy(processor.to_dict())
    for key in ("size", "crop_size"):
        size = settings.get(key)
        if size and "shortest_edge" in size:
            factor = max(image_size[0] / native[0], image_size[1] / native[1])
            settings[key] = {"shortest_edge": (edge := round(size["shortest_edge"] * factor))}
            if edge > 2 * MAX_SIDE:
                raise ValueError(
                    f"for {image_size} images would be resized to {edge} pixels first; pass a smaller image_size"
                )
        elif size:
            settings[key] = {"height": image_size[0], "width": image_size[1]}
    changed = type(processor).from_dict(settings)
    if Preprocessing.of(changed).image_size != image_size:
        raise ValueError(
            f"{type(processor).__name__} returns images of {native}, and cannot be set to {image_size}; "
            "leave image_size out, or pass preprocessing= for this anchor"
        )
    return changed


def plain_processor(preprocessing: Preprocessing) -> Any:
    """Make an image processor, which can be saved, that resizes to a size and normalises by a mean and std.

    Args:
        preprocessing: size, mean and std of the images.
    """
    from transformers import BitImageProcessor  # see `restnet_hf.anchors.tracing.materialize`

    height, width = preprocessing.image_size
    return BitImageProcessor(
        size={"height": height, "width": width},
        do_center_crop=False,
        resample=Image.Resampling.BILINEAR,
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
    )


def prepare_images(processor: Any, images: Sequence[Any]) -> Tensor:
    """Prepare PIL images or arrays of any mode as ``pixel_values`` (N, 3, H, W)."""
    return processor([open_picture(image) for image in images], return_tensors="pt")["pixel_values"]
