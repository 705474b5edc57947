"""Which network it is: SHA-256 of its weights, piece by piece between cuts, and a fingerprint of them all."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = 1 << 24  # bytes: hashing them takes longer than starting threads


@dataclass(frozen=True)
class Piece:
    """The part of a network from one cut to the next.

    Args:
        cut: name of the cut that it ends at; None for the logits.
        shape: of the activation there, for one image.
        sha256: of the weights.
    """

    cut: str | None
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Piece":
        """The inverse of ``dataclasses.asdict``, also after JSON made a list of the shape."""
        return cls(data["cut"], tuple(data["shape"]), data["sha256"])


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values; tensors of large pieces are hashed side by side."""
    if sum(tensor.nbytes for tensor in tensors.values()) < LARGE:
        lines = list(map(_line, tensors.items()))
    else:
        with ThreadPoolExecutor() as pool:
            lines = list(pool.map(_line, tensors.items()))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _line(item: tuple[str, Tensor]) -> str:
    name, tensor = item
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}"


def fingerprint(model: nn.Module, pieces: Iterable[Piece]) -> str:
    """Types of a network's weights and a SHA-256 of its class and pieces, such as ``float32:5f70bf18...``."""
    dtypes = {str(t.dtype).removeprefix("torch.") for t in model.state_dict().values() if t.is_floating_point()}
    text = json.dumps([type(model).__name__, [asdict(piece) for piece in pieces]])
    return f"{'+'.join(sorted(dtypes))}:{hashlib.sha256(text.encode()).hexdigest()}"


def stored_dtype(text: str) -> torch.dtype | None:
    """The type of weights that a fingerprint names; None where they are of several types.

    Raises:
        ValueError: no network of such weights runs.
    """
    found = [FLOATS.get(name) for name in text.split(":")[0].split("+")]
    if None in found:
        raise ValueError(f"the fingerprint must begin with types of weights, of {list(FLOATS)}, as float32:5f70bf18")
    return found[0] if len(found) == 1 else None
