"""Images changed at random, so that a network never trains on quite the same one twice."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import v2


Augment = Callable[[Image.Image], Image.Image]

AREA = v2.RandomResizedCrop(size=1, scale=(0.6, 1.0))  # only draws where to cut, so its size is never used


def random_cut(image: Image.Image) -> Image.Image:
    """0.6 to 1 of an image's area, from 3:4 to 4:3 in shape; the anchor's processor resizes it, once and not twice."""
    return v2.functional.crop(image, **AREA.make_params([image]))


def _after_cut(*others: Callable[[], Augment]) -> Augment:
    return v2.Compose([random_cut, v2.RandomHorizontalFlip(), *(make() for make in others)])


# Factories of transforms from an RGB image to an RGB image; they draw from torch's global generator alone.
AUGMENTATIONS: dict[str, Callable[[], Augment]] = {
    "flip": v2.RandomHorizontalFlip,
    "crop": _after_cut,
    # arXiv 1909.13719
    "randaugment": lambda: _after_cut(lambda: v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)),
    # arXiv 2103.10158
    "trivial": lambda: v2.Compose(
        [v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)]
    ),
}


def augmentation(augment: str | Augment | None) -> Augment | None:
    """The transform that a key of `AUGMENTATIONS` stands for; anything callable is one itself.

    Raises:
        ValueError: it is no key, and cannot be called.
    """
    if augment is None or callable(augment):
        return augment
    if augment not in AUGMENTATIONS:
        raise ValueError(
            f"augment={augment!r} is not one of {sorted(AUGMENTATIONS)}; it may also be None, or a function from one "
            "PIL image to another"
        )
    return AUGMENTATIONS[augment]()


def augmented(augment: Augment, images: Sequence[Any]) -> list[Image.Image]:
    """PIL images or arrays of any mode as RGB images, each of them changed on its own.

    Raises:
        TypeError: ``augment`` gives anything but a PIL image.
    """
    changed = []
    for image in images:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        result = augment(picture.convert("RGB"))
        if not isinstance(result, Image.Image):
            raise TypeError(
                f"augment gives {type(result).__name__}; it must give a PIL image, which the anchor's own processor "
                "then turns into a tensor"
            )
        changed.append(result)
    return changed
