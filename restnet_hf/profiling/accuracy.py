"""Accuracy of every route on the same images; what routes have in common runs once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from restnet_hf.data.collected import RowsInOrder
from restnet_hf.data.datasets import Batch, no_labels_error
from restnet_hf.data.shares import OwnBatch, own_batches
from restnet_hf.distributed import Own
from restnet_hf.routes.route import Route
from restnet_hf.steps import Walk, split_at_shared_cuts, walk_tree


@torch.no_grad()
def predict_routes(
    walks: Sequence[Walk], batches: Iterable[Batch] | Own[OwnBatch], device: torch.device
) -> tuple[dict[Route, Tensor], Tensor]:
    """Predict the class of each image by each route; returns predictions and labels, (images,) each.

    Several processes share the batches, and all return the whole result.

    Args:
        walks: routes with their steps.
        batches: batches of labelled images in the model's preprocessing, the same on every process, or its own.
        device: device to run on.

    Raises:
        ValueError: a batch has no labels, or no image of any process has one.
    """
    shared, rows = split_at_shared_cuts(walks), RowsInOrder()
    for number, _, batch in own_batches(batches):
        if "labels" not in batch:
            raise ValueError("accuracy needs labels: batches must hold 'labels' beside 'pixel_values'")
        logits = walk_tree(batch["pixel_values"].to(device, non_blocking=True), shared)
        found = [(route, each.argmax(-1)) for route, each in logits]  # all are queued before the first is read
        rows.put(number, {"labels": batch["labels"], **{str(route): each for route, each in found}})
    every = rows.all()
    if not every:
        raise no_labels_error()
    return {route: every[str(route)] for route, _ in walks}, every["labels"]


def score_routes(
    walks: Sequence[Walk], batches: Iterable[Batch] | Own[OwnBatch], device: torch.device
) -> tuple[dict[Route, float], int]:
    """Accuracy of each route, and the number of images; see `predict_routes`.

    Args:
        walks: routes with their steps.
        batches: batches of labelled images in the model's preprocessing, the same on every process, or its own.
        device: device to run on.
    """
    from restnet_hf.profiling.metric import Accuracy

    predictions, labels = predict_routes(walks, batches, device)
    metric = Accuracy(keep_in_memory=True)
    scores = {
        route: metric.compute(predictions=predicted.numpy(), references=labels.numpy())["accuracy"]
        for route, predicted in predictions.items()
    }
    return scores, len(labels)


@torch.no_grad()
def mean_probabilities(
    walks: Sequence[Walk], batches: Iterable[Batch] | Own[OwnBatch], device: torch.device
) -> dict[Route, float]:
    """Mean probability of the labels by each route, from 0 to 1; on few images less noisy than accuracy.

    Several processes share the batches, and all return the whole result.

    Args:
        walks: routes with their steps.
        batches: batches of labelled images in the model's preprocessing, the same on every process, or its own;
            without any, the result is empty.
        device: device to run on.
    """
    shared, rows = split_at_shared_cuts(walks), RowsInOrder()
    for number, _, batch in own_batches(batches):
        labels = batch["labels"].to(device)[:, None]
        logits = walk_tree(batch["pixel_values"].to(device), shared)
        rows.put(number, {str(route): x.float().softmax(-1).gather(1, labels) for route, x in logits})
    every = rows.all()
    return {route: every[str(route)].mean().item() for route, _ in walks if every}
