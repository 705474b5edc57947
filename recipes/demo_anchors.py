# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Train the demo's two anchors on Fashion-MNIST and cut the slice of data that ships with the package.

    python recipes/demo_anchors.py OUT                                      # from the Hub
    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DEB
    python recipes/demo_anchors.py OUT --dataset DEB                        # from Debian's package, no Hub

Writes OUT/resnet_fashion (timm, 1.07 M parameters, float16), OUT/vit_fashion (transformers, 0.30 M),
OUT/data/*.parquet
and OUT/accuracy.json with both anchors' accuracy on the full 10,000 test images. About 25 minutes on 2 cores.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import torch
import typer
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from torch.nn.functional import interpolate
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)


LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
IMAGE_SIZE = 56  # the 28 px images are enlarged, so that a stock ResNet stem leaves a 14 x 14 map
SLICE = {"train": 3000, "test": 1500}
Split = tuple[np.ndarray, np.ndarray]


def read_fashion_mnist(source: str) -> dict[str, Split]:
    """Images (N, 28, 28) uint8 and labels (N,) of both splits, from a Hub id or the folder of Debian's package."""
    if not Path(source).is_dir():
        columns = load_dataset(source).with_format("numpy")
        return {split: (columns[split]["image"][:], columns[split]["label"][:]) for split in SLICE}

    def idx(stem: str, header_bytes: int) -> np.ndarray:
        path = next(Path(source).rglob(f"{stem}-ubyte.gz"))
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header_bytes)

    return {
        split: (idx(f"{stem}-images-idx3", 16).reshape(-1, 28, 28), idx(f"{stem}-labels-idx1", 8).astype(np.int64))
        for split, stem in (("train", "train"), ("test", "t10k"))
    }


class Clothes(torch.utils.data.Dataset):
    """Whole batches at once: enlarged, normalised and, for training, flipped and shifted by up to two pixels."""

    def __init__(self, split: Split, mean: float, std: float, augment: bool) -> None:
        self.images, self.labels = torch.from_numpy(split[0].copy()), torch.from_numpy(split[1].copy())
        self.mean, self.std, self.augment = mean, std, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        images = self.images[indices].float()[:, None] / 255
        if self.augment:
            flip = torch.rand(len(images)) < 0.5
            images[flip] = images[flip].flip(-1)
            y, x = torch.randint(0, 5, (2,)).tolist()
            images = torch.nn.functional.pad(images, (2, 2, 2, 2))[..., y : y + 28, x : x + 28]
        images = interpolate((images - self.mean) / self.std, size=IMAGE_SIZE, mode="bilinear")
        return {"pixel_values": images.expand(-1, 3, -1, -1).contiguous(), "labels": self.labels[indices]}


def fit(model: PreTrainedModel, splits: dict[str, Split], epochs: int, learning_rate: float, **args: object) -> float:
    """Train on the full training split; return the accuracy on the full test split."""
    mean, std = args.pop("normalisation")  # type: ignore[misc]
    data = {split: Clothes(splits[split], mean, std, augment=split == "train") for split in SLICE}
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir="unused",
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=128,
            per_device_eval_batch_size=256,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=500,
            label_smoothing_factor=0.1,
            save_strategy="no",
            logging_steps=200,
            report_to="none",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            **args,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=lambda batch: batch,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    model.half().float()  # what is saved is what is measured
    return trainer.evaluate()["eval_accuracy"]


def cnn() -> TimmWrapperForImageClassification:
    config = TimmWrapperConfig(
        architecture="resnet18",
        model_args={"channels": [32, 64, 96, 128]},
        id2label=dict(enumerate(LABELS)),
        pretrained_cfg={
            "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": [0.286] * 3,
            "std": [0.353] * 3,
        },
    )
    return TimmWrapperForImageClassification(config)


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=14,
        hidden_size=72,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=144,
        id2label=dict(enumerate(LABELS)),
    )
    return ViTForImageClassification(config)


def write_slice(splits: dict[str, Split], out: Path) -> None:
    """The same number of images of every class from each split, as parquet with an image and a label column."""
    out.mkdir(parents=True, exist_ok=True)
    for split, size in SLICE.items():
        images, labels = splits[split]
        rng = np.random.default_rng(0)
        per_class = [rng.choice(np.flatnonzero(labels == c), size // len(LABELS), replace=False) for c in range(10)]
        chosen = rng.permutation(np.concatenate(per_class))
        columns = {"image": list(images[chosen]), "label": labels[chosen].tolist()}
        features = Features({"image": Image(), "label": ClassLabel(names=LABELS)})
        Dataset.from_dict(columns, features=features).to_parquet(out / f"{split}.parquet")


def main(
    out: Path, dataset: str = "zalando-datasets/fashion_mnist", cnn_epochs: int = 15, vit_epochs: int = 30
) -> None:
    """Train both anchors and write them to OUT."""
    set_seed(0)
    splits = read_fashion_mnist(dataset)
    write_slice(splits, out / "data")
    accuracy = {}
    for name, model, epochs, rate, (mean, std), bf16 in (
        ("vit_fashion", vit(), vit_epochs, 1e-3, (0.5, 0.5), False),
        ("resnet_fashion", cnn().to(memory_format=torch.channels_last), cnn_epochs, 3e-3, (0.286, 0.353), True),
    ):
        accuracy[name] = fit(model, splits, epochs, rate, normalisation=(mean, std), bf16=bf16)
        model.to(memory_format=torch.contiguous_format).half().save_pretrained(out / name)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(out / "vit_fashion")
    (out / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
