"""How an anchor wants its images: measured from its image processor, converted from one anchor's way to another's."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import BitImageProcessor


MAX_SIDE = 4096  # pixels: a larger number in a file is a mistake, or an attempt on the memory


@dataclass(frozen=True)
class Preprocessing:
    """Images of ``image_size`` (height, width), RGB values of 0..1 less ``mean`` over ``std`` per channel."""

    image_size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.image_size) != 2 or not all(type(n) is int and 0 < n <= MAX_SIDE for n in self.image_size):
            raise ValueError(
                f"image_size={self.image_size!r} must be two whole numbers, height and width, from 1 to {MAX_SIDE}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ValueError(f"mean={self.mean} and std={self.std} must hold three numbers each, std above 0")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Preprocessing":
        """The inverse of ``dataclasses.asdict``, also after JSON made lists of the tuples."""
        return cls(**{key: tuple(value) for key, value in data.items()})

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """Measure an image processor: a black and a white image show its size, mean and std whatever its options."""
        black, white = (
            processor(Image.new("RGB", (320, 320), (level,) * 3), return_tensors="pt")["pixel_values"][0]
            for level in (0, 255)
        )
        low, high = (image[:, image.shape[1] // 2, image.shape[2] // 2].double() for image in (black, white))
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


def timm_processor(pretrained_cfg: dict[str, Any]) -> BitImageProcessor:
    """timm's evaluation transform as an image processor that can be saved.

    It agrees with timm's own within two of 255 levels, and half a pixel where the crop's margin is odd.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    height, width = config["input_size"][1:]
    crop_pct, squash = config["crop_pct"], config["crop_mode"] == "squash"
    resized = (
        {"height": height, "width": width} if squash else {"shortest_edge": math.floor(max(height, width) / crop_pct)}
    )
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

    Raises ValueError where the processor does not follow.
    """
    native = Preprocessing.of(processor).image_size
    if native == image_size:
        return processor
    settings = copy.deepcopy(processor.to_dict())
    for key in ("size", "crop_size"):
        size = settings.get(key)
        if size and "shortest_edge" in size:
            factor = max(image_size[0] / native[0], image_size[1] / native[1])
            settings[key] = {"shortest_edge": round(size["shortest_edge"] * factor)}
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
