"""What routes learn by: labels, a teacher's logits, and the end anchor's own features."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, softmax

from restnet_hf.data.datasets import IGNORED


def task_loss(
    logits: Tensor, labels: Tensor | None, taught: Tensor | None, distillation: float, temperature: float
) -> Tensor:
    """``(1 - w)`` cross-entropy ``+ w T²`` KL divergence from the teacher (Hinton et al., arXiv 1503.02531).

    Args:
        logits: (N, classes).
        labels: (N,), for w below 1; the cross-entropy is a mean over images whose label is not -100.
        taught: logits of the teacher (N, classes), for w above 0.
        distillation: w.
        temperature: T.
    """
    loss = logits.new_zeros(())
    if distillation < 1 and labels is not None:
        known = (labels != IGNORED).sum().clamp_min(1) if labels.dim() == 1 else len(labels)  # never a mean of nothing
        loss = loss + (1 - distillation) * cross_entropy(logits, labels, reduction="sum") / known
    if taught is not None:
        heat = temperature
        target = softmax(taught.float() / heat, dim=-1)
        divergence = kl_div(log_softmax(logits / heat, dim=-1), target, reduction="batchmean")
        loss = loss + distillation * heat**2 * divergence
    return loss


def matching_loss(found: Mapping[str, Tensor], goals: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """Mean over goals of the squared error in units of the goal's variance (arXiv 2603.12433, 2505.20142).

    Args:
        found: what the route has, by the goal's name.
        goals: what the end anchor itself has on the same images.
        scales: the variance of each goal.
    """
    terms = [mse_loss(value.float(), goals[name].float()) / scales[name] for name, value in found.items()]
    return torch.stack(terms).mean()


def goal_scales(goals: Mapping[str, Tensor]) -> dict[str, float]:
    """The variance of each goal over images, averaged over its entries; 1 where it is constant."""
    variances = {name: goal.double().flatten(1).var(0).mean().item() for name, goal in goals.items()}
    return {name: variance if variance > 0 else 1.0 for name, variance in variances.items()}
