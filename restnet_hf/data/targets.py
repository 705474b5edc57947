"""Check the labels that a loss is computed from."""

import torch
from torch import Tensor

from restnet_hf.data.datasets import MULTI_LABEL, check_labels, check_problem_type


def check_targets(labels: Tensor, classes: int, problem_type: str | None) -> None:
    """Raise ValueError unless labels are classes, one or several for an image.

    Values are not checked on accelerators, nor while a model is compiled.

    Args:
        labels: class indices (N,), or 0 or 1 for each class (N, classes).
        classes: number of classes of the model.
        problem_type: kind of task as in transformers; None to infer it from the labels.
    """
    check_problem_type(problem_type if problem_type or classes > 1 else "regression")  # as transformers
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if problem_type != MULTI_LABEL and not (problem_type is None and labels.is_floating_point() and labels.dim() == 2):
        check_labels(labels.reshape(-1), classes)
    elif labels.shape[1:] != (classes,):
        raise ValueError(f"labels of several classes must have shape (N, {classes}), not {tuple(labels.shape)}")
