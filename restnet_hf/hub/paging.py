"""Paging: only the weights that some routes use are in memory; the others are on disk until needed, or deleted."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.files import atomic_file
from restnet_hf.steps import Step
from restnet_hf.stitches.branches import BranchStitch


Read = Callable[[Iterable[str]], Mapping[str, Tensor]]


def keep_weights(anchor: Anchor, steps: Iterable[Step], read: Read | None = None) -> int:
    """Keep in memory only the weights of an anchor that some steps use; returns the number of bytes read.

    Args:
        anchor: anchor whose weights are read or freed; its buffers stay.
        steps: steps of the routes that will run.
        read: function that reads weights by name; without it freed weights cannot come back.

    Raises:
        ValueError: a needed weight is not in memory and cannot be read.
    """
    spans = {(step.segment.start, step.segment.stop) for step in steps if step.segment and step.module is anchor}
    spans |= {span for step in steps for span in _blocks(step.module, anchor)}
    used = {p for start, stop in spans for p in anchor.own_parameters(start, stop).values()}
    named = dict(anchor.model.named_parameters())
    missing = [name for name, parameter in named.items() if parameter in used and name in anchor.absent]
    if missing and read is None:
        raise ValueError(
            f"weights of anchor '{anchor.name}' are not in memory: {missing[0]} and {len(missing) - 1} more"
        )
    loaded = read(missing) if read and missing else {}
    for name, tensor in loaded.items():
        named[name].data = tensor.to(named[name].device, named[name].dtype)
    anchor.absent = {name for name, parameter in named.items() if parameter not in used}
    for name in anchor.absent:
        named[name].data = named[name].new_empty(0)
    return sum(tensor.nbytes for tensor in loaded.values())


def _blocks(module: nn.Module, anchor: Anchor) -> Iterable[tuple[int, int]]:
    """The blocks of an anchor that a branch runs with its own tensors, and with the anchor's for the rest."""
    return [(module.block - 1, module.block)] if isinstance(module, BranchStitch) and module.anchor is anchor else []


class WeightFiles:
    """A memory-mapped safetensors file for each anchor, from which weights are read as routes need them.

    Args:
        folder: folder of the files, created if there is none.
        anchors: anchors by name, whose weights are checked and written now.

    Raises:
        OSError: a file cannot be written.
        ValueError: weights have another hash than expected, or are not all in memory.
    """

    def __init__(self, folder: str | os.PathLike[str], anchors: Mapping[str, Anchor]) -> None:
        self.paths = {name: Path(folder) / f"{name}.safetensors" for name in anchors}
        for name, anchor in anchors.items():
            anchor.check_in_memory()
            anchor.verify()  # the files are read without another check
            anchor.snapshot.lost.update(anchor.changed_weights())
            self.paths[name].parent.mkdir(parents=True, exist_ok=True)
            weights = {key: p.detach().contiguous() for key, p in anchor.model.named_parameters()}
            with atomic_file(self.paths[name]) as temporary:
                save_file(weights, temporary)

    def load(self, anchors: Mapping[str, Anchor], steps: Iterable[Step]) -> int:
        """Load the weights that some steps use, and free all others; returns the number of bytes read.

        Args:
            anchors: mapping from names to anchors.
            steps: steps of the routes that will run.

        Raises:
            OSError: a file is missing or damaged.
        """
        steps = tuple(steps)
        return sum(keep_weights(anchor, steps, self._reader(name)) for name, anchor in anchors.items())

    def _reader(self, anchor: str) -> Read:
        def read(names: Iterable[str]) -> dict[str, Tensor]:
            try:
                with safe_open(self.paths[anchor], "pt") as file:
                    return {name: file.get_tensor(name) for name in names}
            except (SafetensorError, FileNotFoundError) as error:
                raise OSError(
                    f"{self.paths[anchor]}, which holds weights of '{anchor}', cannot be read: {error}"
                ) from error

        return read
