# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Fine-tune ImageNet classifiers in full on a data set of small pictures, as anchors that have learned the task.

    python recipes/finetune_anchors.py OUT ANCHOR... [--dataset uoft-cs/cifar10] [--sizes 64,64,96]
        [--learning-rate 1e-3] [--bf16]

ANCHOR is a Hub id or a folder that transformers loads, timm's models included. One epoch is trained at each of the
sizes, in pixels, on all training images, flipped and shifted by up to an eighth; the last size is what the anchor
then expects. Small pictures make most epochs cheap. Writes OUT/NAME in the format of transformers, with its image
processor, and OUT/NAME/accuracy.json: accuracy on the test images, and the seconds. An anchor that is there already is
left alone, so that the same command goes on where it was stopped.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import Dataset, load_dataset
from torch.nn.functional import interpolate, pad
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CLASS_COLUMNS = ("label", "fine_label", "labels")


def label_column(rows: Dataset) -> str:
    """The name of the column of classes."""
    return next(name for name in CLASS_COLUMNS if name in rows.features)


class Pictures(torch.utils.data.Dataset):
    """Whole batches at once: enlarged, normalised and, for training, flipped and shifted by up to an eighth."""

    def __init__(self, rows: Dataset, mean: list[float], std: list[float], size: int, augment: bool) -> None:
        image = next(name for name in ("image", "img") if name in rows.features)
        pictures = [np.asarray(picture.convert("RGB")) for picture in rows[image][:]]
        self.images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(rows[label_column(rows)][:])
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.size, self.augment = size, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        images = self.images[indices]
        if self.augment:
            images = torch.stack([self.shifted(image) for image in images])
        images = interpolate(images.float() / 255, size=self.size, mode="bilinear")
        return {"pixel_values": (images - self.mean) / self.std, "labels": self.labels[indices]}

    @staticmethod
    def shifted(image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        y, x = (int(torch.randint(0, 2 * (side // 8) + 1, ())) for side in (height, width))
        return pad(image, (width // 8,) * 2 + (height // 8,) * 2)[:, y : y + height, x : x + width]


class Sizes(TrainerCallback):
    """Sets the size of the pictures at the beginning of each epoch."""

    def __init__(self, pictures: Pictures, sizes: list[int]) -> None:
        self.pictures, self.sizes = pictures, sizes

    def on_epoch_begin(self, args: object, state: object, control: object, **_: object) -> None:
        self.pictures.size = self.sizes[round(state.epoch or 0)]  # type: ignore[attr-defined]


def load(source: str, names: list[str]) -> tuple[PreTrainedModel, list[float], list[float]]:
    """A classifier with a new head for these classes, and the mean and standard deviation that it expects."""
    config = AutoConfig.from_pretrained(source, num_labels=len(names))
    config.id2label, config.label2id = dict(enumerate(names)), {name: row for row, name in enumerate(names)}
    if getattr(config, "model_args", None):
        config.model_args.pop("num_classes", None)  # else timm's wrapper gives timm both
    model = AutoModelForImageClassification.from_pretrained(source, config=config, ignore_mismatched_sizes=True)
    known = getattr(config, "pretrained_cfg", None) or IMAGENET
    return model, list(known["mean"]), list(known["std"])


def save(model: PreTrainedModel, folder: Path, mean: list[float], std: list[float], size: int) -> None:
    """Write the weights and a processor that resizes to the last size, without a crop."""
    model.to(memory_format=torch.contiguous_format)
    if isinstance(model, TimmWrapperForImageClassification):
        expected = {"input_size": [3, size, size], "test_input_size": None, "interpolation": "bilinear"}
        model.config.pretrained_cfg |= expected | {"crop_pct": 1.0, "test_crop_pct": None}
    else:
        sides = {"height": size, "width": size}
        ViTImageProcessor(size=sides, image_mean=mean, image_std=std).save_pretrained(folder)
    model.save_pretrained(folder)


def fine_tune(
    source: str, folder: Path, rows: dict[str, Dataset], sizes: list[int], learning_rate: float, bf16: bool
) -> None:
    """Train one anchor on all weights and write it."""
    set_seed(0)
    model, mean, std = load(source, rows["train"].features[label_column(rows["train"])].names)
    data = {split: Pictures(rows[split], mean, std, sizes[-1], split == "train") for split in ("train", "test")}
    trainer = Trainer(
        model.to(memory_format=torch.channels_last),
        TrainingArguments(
            output_dir=str(folder / "unused"),
            num_train_epochs=len(sizes),
            learning_rate=learning_rate,
            per_device_train_batch_size=128,
            per_device_eval_batch_size=256,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=200,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=bf16,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=lambda batch: batch,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[Sizes(data["train"], sizes)],
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    accuracy = trainer.evaluate()["eval_accuracy"]
    save(model, folder, mean, std, sizes[-1])
    report = {"accuracy": accuracy, "images": len(data["test"]), "seconds": seconds, "sizes": sizes}
    report["learning_rate"] = learning_rate
    (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")


def main(
    out: Path,
    anchors: list[str],
    dataset: str = "uoft-cs/cifar10",
    sizes: str = "64,64,96",
    learning_rate: float = 1e-3,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16: faster where the processor has it.")
    ] = False,
) -> None:
    """Fine-tune anchors and write them to OUT."""
    rows = {split: load_dataset(dataset, split=split) for split in ("train", "test")}
    for source in anchors:
        folder = out / Path(source).name
        if not (folder / "accuracy.json").is_file():
            fine_tune(source, folder, rows, [int(size) for size in sizes.split(",")], learning_rate, bf16)


if __name__ == "__main__":
    typer.run(main)
