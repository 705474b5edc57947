"""Accuracy of every route on the same images, shared beginnings run once."""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from restnet_hf.data import Batch, this_process
from restnet_hf.routes import Route
from restnet_hf.steps import Walk, split_at_shared_cuts, walk_tree


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, as an ``evaluate`` metric that needs no network.

    ``Accuracy().compute(predictions=[0, 1], references=[0, 0])`` gives ``{"accuracy": 0.5}``.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: class indices",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


@torch.no_grad()
def predict_routes(
    walks: Sequence[Walk], batches: Iterable[Batch], device: torch.device
) -> tuple[dict[Route, Tensor], Tensor]:
    """The class that each route gives each image, and the images' labels, (images,) each.

    Under several processes each takes every n-th batch, and all get the whole result.

    Args:
        walks: routes with their steps.
        batches: of images in the model's preprocessing, the same on every process.
        device: where to run.

    Raises:
        ValueError: a batch has no labels.
    """
    shared = split_at_shared_cuts(walks)
    state = this_process()
    chunks: list[tuple[int, Tensor, dict[Route, Tensor]]] = []
    for index, batch in enumerate(batches):
        if index % state.num_processes != state.process_index:
            continue
        if "labels" not in batch:
            raise ValueError("accuracy needs labels: batches must hold 'labels' beside 'pixel_values'")
        logits = walk_tree(batch["pixel_values"].to(device), shared)
        chunks.append((index, batch["labels"].cpu(), {route: each.argmax(-1).cpu() for route, each in logits}))
    ordered = sorted(gather_object(chunks), key=lambda chunk: chunk[0])
    predictions = {route: torch.cat([chunk[2][route] for chunk in ordered]) for route, _ in walks}
    return predictions, torch.cat([chunk[1] for chunk in ordered])


def score_routes(
    walks: Sequence[Walk], batches: Iterable[Batch], device: torch.device
) -> tuple[dict[Route, float], int]:
    """Accuracy of each route, and on how many images; see `predict_routes`."""
    predictions, labels = predict_routes(walks, batches, device)
    metric = Accuracy(keep_in_memory=True)
    scores = {
        route: metric.compute(predictions=predicted.numpy(), references=labels.numpy())["accuracy"]
        for route, predicted in predictions.items()
    }
    return scores, len(labels)
