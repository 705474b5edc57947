"""Classifiers from outside as teachers: loaded, with images of their own kind, and narrowed to the model's classes."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.loading import load_anchor, own_preprocessing
from restnet_hf.data.labels import find_classes, label_names, list_some
from restnet_hf.data.preprocessing import Reprocess
from restnet_hf.errors import quote
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.stitches.precision import weight_dtype
from restnet_hf.training.args import AUTO, MEAN


class OutsideClassifier:
    """A classifier that is not an anchor of the model, as a function from the model's images to its logits.

    Args:
        call: function of images (N, 3, H, W), which returns logits (N, columns) or an output with ``logits``.
        title: name of the classifier in messages.
        columns: number of columns of the logits.
        module: network that ``call`` runs; None where ``call`` is any other function.
        converter: conversion of the model's images to those that ``call`` takes; None where they are the same.
        order: column of each of the model's classes; None for all columns as they are.
    """

    def __init__(
        self,
        call: Callable[[Tensor], Any],
        title: str,
        columns: int,
        module: nn.Module | None = None,
        converter: nn.Module | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        self.call, self.title, self.columns = call, title, columns
        self.module, self.converter, self.order = module, converter, order

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) in the model's order, for images (N, 3, H, W) in the model's preprocessing.

        Raises:
            ValueError: the result has another type or shape than logits of the right number of classes.
        """
        x = images if self.converter is None else self.converter.to(images.device)(images)
        dtype = None if self.module is None else weight_dtype(self.module)
        output = self.call(x if dtype is None else x.to(dtype))
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise ValueError(
                f"teacher {self.title} is no classifier: for images it returns {type(output).__name__}; it must "
                "return a floating point tensor of logits (N, classes), or an output with such .logits"
            )
        if tuple(logits.shape) != (len(images), self.columns):
            raise ValueError(
                f"teacher {self.title} returns logits of shape {tuple(logits.shape)} for {len(images)} images, and "
                f"({len(images)}, {self.columns}) are needed: a column for each class. A classifier with class names, "
                "such as a folder, a Hub id or load_anchor(..., label_names=), is narrowed to the model's classes"
            )
        return logits if self.order is None else logits[:, list(self.order)]


def load_outside(model: StitchedModelForImageClassification, teacher: Any) -> OutsideClassifier:
    """Load a classifier and put its logits in the order of the model's classes.

    Anchors, and modules of transformers and timm, get images as their own image processor prepares them, and their
    columns are chosen by class name. Other modules and functions get the model's images, and return its classes.

    Args:
        model: model of the routes that learn from it.
        teacher: folder, Hub id, anchor, module or function.

    Raises:
        OSError: a folder or Hub id cannot be loaded.
        ValueError: the classifier lacks classes of the model, cannot be compared with it, or has weights that train.
    """
    if isinstance(teacher, str | os.PathLike):
        try:
            teacher = load_anchor(teacher, dtype=model.dtype)
        except (OSError, ValueError) as error:
            raise OSError(
                f"teacher={quote(str(teacher))} is not '{AUTO}', '{MEAN}' or the name of an anchor "
                f"({', '.join(model.anchors)}), and there is no classifier of that folder or Hub id: {error}"
            ) from error
    title = _title_of(teacher)
    if not isinstance(teacher, nn.Module):
        return OutsideClassifier(teacher, title, model.config.num_labels)
    _check_separate(model, teacher, title)
    own, converter = own_preprocessing(teacher), None
    if own is not None and own != model.preprocessing:
        converter = Reprocess(model.preprocessing, own)
    names = teacher.label_names if isinstance(teacher, Anchor) else _names_of(teacher)
    order = _class_order(model, names, title, named=isinstance(teacher, Anchor))
    call = teacher.logits if isinstance(teacher, Anchor) else teacher
    columns = model.config.num_labels if order is None or names is None else len(names)
    return OutsideClassifier(call, title, columns, teacher, converter, order)


def _title_of(teacher: Any) -> str:
    if isinstance(teacher, Anchor):
        return quote(teacher.repo_id or teacher.name)
    return quote(getattr(teacher, "__name__", type(teacher).__name__))


def _names_of(module: nn.Module) -> tuple[str, ...] | None:
    names = getattr(getattr(module, "config", None), "id2label", None)
    return label_names(names) if names else None


def _check_separate(model: StitchedModelForImageClassification, module: nn.Module, title: str) -> None:
    """Raise ValueError where a teacher has weights that train."""
    parts = (*model.stitches.values(), *model.heads.values(), *model.tuned.values())
    trained = {id(parameter) for part in parts for parameter in part.parameters()}
    if any(id(parameter) in trained for parameter in module.parameters()):
        raise ValueError(
            f"teacher {title} shares weights with the model, which train, so it would change with its pupils; give a "
            "copy, copy.deepcopy(...)"
        )


def _class_order(
    model: StitchedModelForImageClassification, names: Sequence[str] | None, title: str, named: bool
) -> list[int] | None:
    """Position among a teacher's classes of each of the model's; None where its columns must be the model's own.

    Raises:
        ValueError: classes are missing, or cannot be compared by name.
    """
    ours = label_names(model.config.id2label)
    if names is None and (ours is None or not named):
        return None
    if names is None or ours is None:
        which = "the model's classes have" if ours is None else f"those of teacher {title} have"
        raise ValueError(
            f"the classes of teacher {title} cannot be put in the model's order: {which} no names. Name them with "
            "id2label= or labels_from= of from_anchors, or load_anchor(..., label_names=); or give a function of "
            f"images that returns logits of the model's {model.config.num_labels} classes"
        )
    order = find_classes(ours, names)
    missing = [name for name, place in zip(ours, order, strict=True) if place is None]
    if missing:
        what = f"lacks {len(missing)}" if len(missing) < len(ours) else "has none"
        raise ValueError(
            f"teacher {title} {what} of the model's {len(ours)} classes ({list_some(missing)}); its {len(names)} "
            f"classes are {list_some(names)}. A teacher must have all of the model's classes, by name: choose another "
            "one, or rename its classes with load_anchor(..., label_names=)"
        )
    return [place for place in order if place is not None]


@contextmanager
def ready_teacher(teacher: Any, device: torch.device) -> Iterator[None]:
    """Put the network of a teacher from outside in evaluation mode on a device, and leave it as it was afterwards.

    Args:
        teacher: teacher of `TrainArgs`, after `load_teacher`.
        device: device of the model.
    """
    module = teacher.module if isinstance(teacher, OutsideClassifier) else None
    if module is None:
        yield
        return
    modes = {part: part.training for part in module.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in module.parameters()}
    before = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), device)
    try:
        module.eval().requires_grad_(False)
        if before != device:
            module.to(device)
        yield
    finally:
        if before != device:
            module.to(before)
        for part, mode in modes.items():
            part.training = mode
        for parameter, wanted in gradients.items():
            parameter.requires_grad_(wanted)
