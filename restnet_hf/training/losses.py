"""Losses of training: cross-entropy, distillation from a teacher, and feature matching."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, softmax

from restnet_hf.data.datasets import IGNORED


def task_loss(
    logits: Tensor,
    labels: Tensor | None,
    teacher_logits: Tensor | None,
    distillation: float,
    temperature: float,
    labelled: Tensor | None = None,
) -> Tensor:
    """``(1 - w)`` cross-entropy ``+ w T²`` KL divergence from the teacher (Hinton et al., arXiv 1503.02531).

    Args:
        logits: logits of the route, (N, classes).
        labels: labels of the images, (N,), for w below 1; the cross-entropy is a mean over those that are not -100.
        teacher_logits: logits of the teacher, (N, classes), for w above 0.
        distillation: weight w of the distillation, from 0 to 1.
        temperature: temperature T of the distillation.
        labelled: number of labels that the cross-entropy is divided by; by default those that are not -100. For a
            part of a step it is the part's share of the step's.
    """
    loss = logits.new_zeros(())
    if distillation < 1 and labels is not None:
        count: Tensor | int = len(labels)
        if labels.dim() == 1:
            count = count_labels(labels).clamp_min(1) if labelled is None else labelled  # never 0
        loss = loss + (1 - distillation) * cross_entropy(logits, labels, reduction="sum") / count
    if teacher_logits is not None:
        target = softmax(teacher_logits.float() / temperature, dim=-1)
        divergence = kl_div(log_softmax(logits / temperature, dim=-1), target, reduction="batchmean")
        loss = loss + distillation * temperature**2 * divergence
    return loss


def count_labels(labels: Tensor) -> Tensor:
    """Number of labels (N,) that are not -100."""
    return (labels != IGNORED).sum()


def matching_loss(features: Mapping[str, Tensor], goals: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """Mean over goals of the squared error in units of the goal's variance (arXiv 2603.12433, 2505.20142).

    Args:
        features: features of the route, by the name of the goal that each should match.
        goals: features of the anchors themselves for the same images, by name.
        scales: variance of each goal, by name.
    """
    terms = [mse_loss(value.float(), goals[name].float()) / scales[name] for name, value in features.items()]
    return torch.stack(terms).mean()


def goal_scales(goals: Mapping[str, Tensor]) -> dict[str, float]:
    """The variance of each goal over images, averaged over its entries; 1 where it is constant."""
    variances = {name: goal.double().flatten(1).var(0).mean().item() for name, goal in goals.items()}
    return {name: variance if variance > 0 else 1.0 for name, variance in variances.items()}
