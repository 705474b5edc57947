"""A model to train, its data, and what was trained of it."""

import torch
from conftest import CLASSES, SIZE, make_anchor
from torch.utils.data import TensorDataset

from restnet_hf import StitchedModelForImageClassification


ROUTES = ["resnet[:2] + vit[1:]", "resnet[:4] + vit[2:]"]


def build(**options):
    """The same model every time, two stitches."""
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), **{"order": "given", **options}
    )
    torch.manual_seed(3)
    for route in ROUTES:
        model.add_stitch(route)
    return model


def data(size=24, classes=CLASSES):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return TensorDataset(images, torch.arange(size) % classes)


FAST = {"num_train_epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "keep": "last"}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


WAYS = {  # to train, each the same on any number of processes
    "all": {},
    "matching": {"matching_epochs": 1, "num_train_epochs": 1, "match": "later"},
    "cache": {"cache_dir": "cache"},
    "best": {
        "keep": "best",
        "batch_size": 12,
        "learning_rate": 0.03,
        "tuning": "norm",
    },  # one has none held out
    "importance": {"sampler": "importance", "tuning": "lora"},
    "sandwich": {"sampler": "sandwich", "tuning": "full", "gradient_accumulation_steps": 2},
}


class Noisy(torch.utils.data.Dataset):
    """Images that are augmented at random each time they are read; ``left`` can be, then the power fails."""

    def __init__(self, rows, left=10**9):
        self.rows, self.left = rows, left

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        image, label = self.rows[index]
        return image + 0.3 * torch.randn(image.shape), label
