"""Random augmentation of images for training."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torchvision.transforms import v2

from restnet_hf.data.pictures import open_picture


Augment = Callable[[Image.Image], Image.Image]

AREA = v2.RandomResizedCrop(size=1, scale=(0.6, 1.0))  # only draws where to crop; its size is never used


def random_crop(image: Image.Image) -> Image.Image:
    """Crop an image to 0.6 to 1 of its area, 3:4 to 4:3 in shape; only the anchor's processor resizes it, once."""
    return v2.functional.crop(image, **AREA.make_params([image]))


def _after_crop(*others: Callable[[], Augment]) -> Augment:
    return v2.Compose([random_crop, v2.RandomHorizontalFlip(), *(make() for make in others)])


# Factories of transforms from an RGB image to an RGB image, which draw only from torch's global generator.
AUGMENTATIONS: dict[str, Callable[[], Augment]] = {
    "flip": v2.RandomHorizontalFlip,
    "crop": _after_crop,
    # arXiv 1909.13719
    "randaugment": lambda: _after_crop(lambda: v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)),
    # arXiv 2103.10158
    "trivial": lambda: v2.Compose(
        [v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)]
    ),
}


def make_augmentation(augment: str | Augment | None) -> Augment | None:
    """Make the transform of a key of `AUGMENTATIONS`; return None and callables as they are.

    Raises:
        ValueError: ``augment`` is neither a key nor callable.
    """
    if augment is None or callable(augment):
        return augment
    if augment not in AUGMENTATIONS:
        raise ValueError(
            f"augment={augment!r} is not one of {sorted(AUGMENTATIONS)}; it may also be None, or a function from one "
            "PIL image to another"
        )
    return AUGMENTATIONS[augment]()


def augment_images(augment: Augment, images: Sequence[Any]) -> list[Image.Image]:
    """Convert PIL images or arrays of any mode to RGB images, and augment each on its own.

    Raises:
        TypeError: ``augment`` returns anything but a PIL image.
    """
    results = []
    for image in images:
        result = augment(open_picture(image))
        if not isinstance(result, Image.Image):
            raise TypeError(
                f"augment returns {type(result).__name__}; it must return a PIL image, which the anchor's own "
                "processor then turns into a tensor"
            )
        results.append(result)
    return results
