"""How an anchor wants its images: measured from its image processor, converted from one anchor's way to another's."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate


MAX_SIDE = 4096  # pixels: a larger number in a file is a mistake, or an attempt on the memory
MAX_VALUE = 1e6  # of means and standard deviations, and of 1 / std: float32 holds their products and ratios
# What image processors make of settings of another kind than theirs.
ODD_SETTINGS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Preprocessing:
    """Images of ``image_size`` (height, width), RGB values of 0..1 less ``mean`` over ``std`` per channel."""

    image_size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        size, values = self.image_size, (self.mean, self.std)
        if not _is_row(size, 2) or not all(type(side) is int and 0 < side <= MAX_SIDE for side in size):
            raise ValueError(
                f"image_size={str(size)[:100]} must be two whole numbers, height and width, from 1 to {MAX_SIDE}"
            )
        if not all(_is_row(row, 3) and all(map(_is_value, row)) for row in values) or min(self.std) < 1 / MAX_VALUE:
            raise ValueError(
                f"mean and std must hold three numbers each, up to {MAX_VALUE:g}, std above 0 (from {1 / MAX_VALUE:g} "
                f"on); they are {str(values)[:200]}"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of ``dataclasses.asdict``, also after JSON made lists of the tuples; raises ValueError."""
        try:
            return cls(**{key: tuple(value) for key, value in data.items()})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"image_size, mean and std must be lists of numbers: {str(error)[:200]}") from error

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """Measure an image processor: a black and a white image show its size, mean and std whatever its options.

        Raises:
            ValueError: it prepares no image, or not by mean and std.
        """
        try:
            black, white = (
                processor(Image.new("RGB", (320, 320), (level,) * 3), return_tensors="pt")["pixel_values"][0]
                for level in (0, 255)
            )
            low, high = (image[:, image.shape[1] // 2, image.shape[2] // 2].double() for image in (black, white))
        except ODD_SETTINGS as error:
            raise ValueError(f"{type(processor).__name__} cannot prepare an image: {str(error)[:200]}") from error
        std = 1 / (high - low)
        mean = -low * std
        # pixels are float32: what lies past six digits is rounding
        rounded = (tuple(float(f"{v:.6g}") for v in values.tolist()) for values in (mean, std))
        return cls((black.shape[-2], black.shape[-1]), *rounded)

    def check(self, pixel_values: Tensor) -> None:
        """Raise ValueError or TypeError unless ``pixel_values`` is a batch of such images, (N, 3, height, width)."""
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            came = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise TypeError(f"pixel_values must be a floating point tensor, normalised by the processor; it is {came}")
        wanted = (3, *self.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != wanted:
            raise ValueError(
                f"pixel_values must have shape (N, {', '.join(map(str, wanted))}), not {tuple(pixel_values.shape)}; "
                "for another size build the model with from_anchors(..., image_size=...)"
            )


def _is_row(value: Any, length: int) -> bool:
    return isinstance(value, tuple | list) and len(value) == length


def _is_value(value: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and -MAX_VALUE <= value <= MAX_VALUE


class Reprocess(nn.Module):
    """Images prepared for one anchor, (N, 3, H, W), as another wants them: exact in value, bilinear in size."""

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
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            pixel_values = interpolate(pixel_values, size=self.image_size, mode="bilinear", antialias=True)
        return pixel_values * self.scale + self.shift


def timm_processor(pretrained_cfg: dict[str, Any]) -> Any:
    """timm's evaluation transform as an image processor that can be saved.

    It agrees with timm's own within two of 255 levels, and half a pixel where the crop's margin is odd.

    Raises:
        ValueError: the settings are not those of a transform.
    """
    try:
        return _timm_processor(pretrained_cfg)
    except ODD_SETTINGS as error:
        raise ValueError(f"timm's settings of an image transform are invalid: {str(error)[:200]}") from error


def _timm_processor(pretrained_cfg: dict[str, Any]) -> Any:
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    height, width = config["input_size"][1:]
    crop_pct, squash = config["crop_pct"], config["crop_mode"] == "squash"
    resized = (
        {"height": height, "width": width} if squash else {"shortest_edge": math.floor(max(height, width) / crop_pct)}
    )
    from transformers import BitImageProcessor  # see `restnet_hf.anchors.tracing.sketch`

    return BitImageProcessor(
        size=resized,
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        resample={"nearest": 0, "bilinear": 2, "bicubic": 3}.get(config["interpolation"], 3),
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )


def with_image_size(processor: Any, image_size: tuple[int, int]) -> Any:
    """A copy of an image processor that yields another size, its proportions of resizing and cropping kept.

    Raises:
        ValueError: the size is not from 1 to ``MAX_SIDE``, or the processor does not follow.
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
                    f"for {image_size} images would be resized to {edge} pixels first; give a smaller image_size"
                )
        elif size:
            settings[key] = {"height": image_size[0], "width": image_size[1]}
    changed = type(processor).from_dict(settings)
    if Preprocessing.of(changed).image_size != image_size:
        raise ValueError(
            f"{type(processor).__name__} gives images of {native}, and cannot be set to {image_size}; "
            "leave image_size out, or pass preprocessing= for this anchor"
        )
    return changed


def prepare(processor: Any, images: Sequence[Any]) -> Tensor:
    """PIL images or arrays of any mode as ``pixel_values`` (N, 3, H, W)."""
    pictures = [image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)) for image in images]
    return processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")["pixel_values"]
