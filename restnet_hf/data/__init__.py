"""Images and labels: data sets as batches, preprocessing, augmentation."""

from typing import TYPE_CHECKING

from restnet_hf.public_names import lazy_imports


if TYPE_CHECKING:
    from restnet_hf.data.augment import AUGMENTATIONS
    from restnet_hf.data.datasets import batches, load_images, subset
    from restnet_hf.data.pixel_values import with_pixel_values
    from restnet_hf.data.preprocessing import Preprocessing

MODULES = {
    "AUGMENTATIONS": "data.augment",
    "Preprocessing": "data.preprocessing",
    "batches": "data.datasets",
    "load_images": "data.datasets",
    "subset": "data.datasets",
    "with_pixel_values": "data.pixel_values",
}
__getattr__, __dir__, __all__ = lazy_imports(__name__, MODULES)
