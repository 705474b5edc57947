# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Train a stitch with transformers.Trainer, and again with restnet_hf.train: the same stitch comes out.

    python recipes/with_trainer.py [--quick]        # about a minute on 2 cores

A stitched model is a model of transformers, so Trainer trains its active route like any other, and only the stitch
moves. `train` runs all routes in one pass over the front and knows distillation and tuning; asked for one route, no
distillation and the same optimizer, it takes the same steps. The pair and the images are the embedded demo's.
"""

import tempfile
import time
from typing import Any

import torch
import typer
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.utils import logging

from restnet_hf import StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.data import load_images, subset, with_pixel_values
from restnet_hf.demo.paths import DATA, END, FRONT


ROUTE = "resnet_fashion[:5] + vit_fashion[4:]"
BATCH_SIZE = 64
# No weight decay: Trainer leaves biases out of it, and ours does not.
SAME: dict[str, Any] = {"learning_rate": 3e-3, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0}


def by_trainer(model: StitchedModelForImageClassification, train_set: Any, test_set: Any, epochs: int) -> float:
    """Train the active route with ``transformers.Trainer``; returns its accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH_SIZE,
            optim="adamw_torch",
            lr_scheduler_type="cosine",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            **SAME,
        )
        trainer = Trainer(
            model, args, train_dataset=train_set, eval_dataset=test_set, compute_metrics=share_that_is_right
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


def share_that_is_right(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, as Trainer wants it."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def by_train(model: StitchedModelForImageClassification, train_set: Any, test_set: Any, epochs: int) -> float:
    """Train the active route with `restnet_hf.train`; returns its accuracy."""
    batches = DataLoader(train_set, BATCH_SIZE)  # in order, as Trainer's; a data set would be shuffled
    route = [model.active_route]
    options = {"distillation": 0.0, "warmup_ratio": 0.0, "keep": "last", **SAME}  # a Trainer holds out no images
    train(model, batches, TrainArgs(num_train_epochs=epochs, **options), route)
    return model.profile(test_set, route).routes[0].scores["accuracy"]


def largest_difference(one: StitchedModelForImageClassification, other: StitchedModelForImageClassification) -> float:
    """Between any two weights of their stitches."""
    weights = [torch.cat([p.detach().cpu().flatten() for p in model.stitches.parameters()]) for model in (one, other)]
    return (weights[0] - weights[1]).abs().max().item()


def main(quick: bool = False) -> None:
    """Train the same stitch both ways and print what came out."""
    logging.disable_progress_bar()
    sizes, epochs = ((256, 200), 1) if quick else ((None, None), 3)
    models = []
    for way in (by_trainer, by_train):
        model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32")
        model.set_route(model.add_stitch(ROUTE))
        train_set, test_set = (
            with_pixel_values(subset(load_images(DATA, split), size), model.image_processor)
            for split, size in zip(("train", "test"), sizes, strict=True)
        )
        model.fit_stitches(train_set)  # both start from here
        began = time.perf_counter()
        accuracy = way(model, train_set, test_set, epochs)
        print(f"{way.__name__}: accuracy {100 * accuracy:.2f} % in {time.perf_counter() - began:.0f} s", flush=True)
        models.append(model)
    print(f"largest difference between weights: {largest_difference(*models):.1e}")


if __name__ == "__main__":
    typer.run(main)
