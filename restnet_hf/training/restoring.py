"""Restore a model where its training fails."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from restnet_hf.modeling_restnet import StitchedModelForImageClassification


RECORDS = ("stitches", "tuned", "trained_heads", "training")  # entries of the config that training changes


@contextmanager
def restored_on_error(model: StitchedModelForImageClassification) -> Iterator[None]:
    """Restore stitches, heads, tuned parts and their records if the block raises, or is interrupted.

    The copies are in the main memory, as large as the adapter.

    Args:
        model: model that trains in the block.
    """
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.adapter_state_dict().items()}
    records = {key: copy.deepcopy(getattr(model.config, key)) for key in RECORDS}
    unfitted, profiled, cascade = set(model.unfitted), model.profiled, model.active_cascade
    try:
        yield
    except BaseException:
        for key in set(model.tuned) - set(records["tuned"] or ()):
            del model.tuned[key]
        _set_tensors(model, before)
        for key, value in records.items():
            setattr(model.config, key, value)
        model.unfitted, model.profiled = unfitted, profiled
        if model.active_cascade != cascade:
            model.make_active(model.active_route, cascade)
        raise


@torch.no_grad()
def _set_tensors(model: StitchedModelForImageClassification, tensors: dict[str, Tensor]) -> None:
    for name, own in (*model.named_parameters(), *model.named_buffers()):
        if name not in tensors:
            continue
        if own.dtype != tensors[name].dtype:  # it was cast to train
            own.data = tensors[name].to(own.device)
        own.copy_(tensors[name])
