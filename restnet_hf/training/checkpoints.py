"""Checkpoints of a training: trained weights, optimizer state and place in the data, written whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from restnet_hf.files import atomic_folder, complete_folder


KEPT = 2  # checkpoints that are not deleted
PLACE, WEIGHTS = "training.json", "training.safetensors"


class Checkpoints:
    """The checkpoints of one training, ``checkpoint-STEP`` each.

    Args:
        folder: folder of the checkpoints; None for no checkpoints.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def paths(self) -> list[Path]:
        """Folders of the checkpoints that exist, the latest last."""
        names = [] if self.folder is None else self.folder.glob("checkpoint-*")
        return sorted((p for p in names if p.name[11:].isdecimal()), key=lambda p: int(p.name[11:]))

    def read_place(self) -> dict[str, Any]:
        """The ``place`` that `save` was given for the latest checkpoint.

        Raises:
            OSError: the checkpoint is damaged.
        """
        folder = complete_folder(self.paths()[-1], PLACE)
        try:
            return json.loads((folder / PLACE).read_text())
        except ValueError as error:
            raise OSError(f"{folder} is damaged ({error}); delete it to go on from the one before") from error

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Any,
        place: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        best: Mapping[str, Tensor],
    ) -> None:
        """Write a checkpoint, and delete all but the last `KEPT`.

        Args:
            step: number of steps done.
            parameters: parameters that train, by name, in the order of the optimizer.
            optimizer: optimizer of the parameters.
            place: other values that a resumed run needs, as JSON can hold them.
            buffers: buffers that training has set, by name.
            best: the best states seen so far, by name of the tensor.

        Raises:
            OSError: the checkpoint cannot be written; earlier ones do not change.
        """
        if self.folder is None:
            return
        tensors = {f"parameters/{name}": p.detach().contiguous() for name, p in parameters.items()}
        tensors |= {f"buffers/{name}": buffer.contiguous() for name, buffer in buffers.items()}
        tensors |= {f"best/{name}": tensor.contiguous() for name, tensor in best.items()}
        moments = optimizer.state_dict()["state"]
        for index, name in enumerate(parameters):
            tensors |= {f"{key}/{name}": value.contiguous() for key, value in moments.get(index, {}).items()}
        try:
            with atomic_folder(self.folder / f"checkpoint-{step}", PLACE) as folder:
                save_file(tensors, folder / WEIGHTS)
                (folder / PLACE).write_text(json.dumps({"step": step, **place}))
        except (OSError, SafetensorError) as error:
            last = self.paths()[-1:]
            raise OSError(
                f"checkpoint-{step} cannot be written to {self.folder}: {error}. Free some disk space and go on with "
                f"resume_from_checkpoint=True{f' from {last[0].name}' if last else ''}"
            ) from error
        for old in self.paths()[:-KEPT]:
            shutil.rmtree(old)

    def load(
        self, total: int, parameters: Mapping[str, nn.Parameter], optimizer: Any, buffers: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Set parameters, buffers and optimizer to those of the latest checkpoint.

        Args:
            total: number of steps of this training.
            parameters: parameters that train, by name, in the order of the optimizer.
            optimizer: optimizer of the parameters.
            buffers: buffers that training sets, by name.

        Returns:
            The ``place`` and the best states that `save` was given.

        Raises:
            ValueError: the checkpoint belongs to another training.
            OSError: the checkpoint is damaged.
        """
        folder = complete_folder(self.paths()[-1], PLACE)
        try:
            place = json.loads((folder / PLACE).read_text())
            with safe_open(folder / WEIGHTS, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise OSError(f"{folder} is damaged ({error}); delete it to go on from the one before") from error
        sections: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            section, _, name = key.partition("/")
            sections.setdefault(section, {})[name] = tensor
        weights, stored, best = (sections.pop(name, {}) for name in ("parameters", "buffers", "best"))
        if weights.keys() != parameters.keys() or stored.keys() != buffers.keys() or place["total"] != total:
            raise ValueError(
                f"{folder} belongs to another training: it has {place['total']} steps over {sorted(weights)}, this "
                f"one {total} over {sorted(parameters)}. Choose another output_dir"
            )
        state = optimizer.state_dict()
        with torch.no_grad():
            for index, (name, parameter) in enumerate(parameters.items()):
                parameter.copy_(weights[name])
                moments = {key: each[name] for key, each in sections.items() if name in each}
                if moments:
                    state["state"][index] = moments
            for name, buffer in buffers.items():
                buffer.copy_(stored[name])
        for group, rate in zip(state["param_groups"], place["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        optimizer.load_state_dict(state)
        return place, best
