"""Which network it is: SHA-256 of its weights, piece by piece between cuts; and whether they have changed since."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


PACKAGES = ("restnet-hf", "torch", "transformers", "timm")  # whose versions results are recorded with
FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = 1 << 24  # bytes: hashing them takes longer than starting threads
SHARE = 1 << 19  # bytes of a tensor that is worth a thread's while


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
    """SHA-256 of names, types, shapes and values; tensors of large pieces are hashed side by side.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    hashes = _each(tensors, lambda values: hashlib.sha256(values).hexdigest())
    if None in hashes.values():
        raise ValueError("weights on the meta device have no values; load them, or build the model on another device")
    lines = (f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashes[name]}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _each(tensors: Mapping[str, Tensor], digest: Callable[[Any], Any]) -> dict[str, Any]:
    """A digest of the values of each tensor, None on the meta device."""

    def one(tensor: Tensor) -> Any:
        if tensor.is_meta:
            return None
        return digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    if sum(tensor.nbytes for tensor in tensors.values()) < LARGE:
        return {name: one(tensor) for name, tensor in tensors.items()}
    with ThreadPoolExecutor() as pool:
        large = {name: pool.submit(one, tensor) for name, tensor in tensors.items() if tensor.nbytes > SHARE}
        small = {name: one(tensor) for name, tensor in tensors.items() if name not in large}
        return small | {name: job.result() for name, job in large.items()}


def fingerprint(model: nn.Module, pieces: Iterable[Piece], weights: Mapping[str, Tensor] | None = None) -> str:
    """Types of a network's weights and a SHA-256 of its class and pieces, such as ``float32:5f70bf18...``."""
    tensors = (model.state_dict() if weights is None else weights).values()
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
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


@dataclass(frozen=True)
class Mark:
    """What a tensor was.

    Args:
        dtype: its type.
        shape: its shape.
        checksum: of its values; None where they were not read.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: bytes | None = None

    @classmethod
    def all(cls, tensors: Mapping[str, Tensor], read: bool = True) -> "dict[str, Mark]":
        """Of each tensor by name; ``read`` the values, too."""
        checksums = _each(tensors, xxhash.xxh3_128_digest) if read else {}
        return {name: cls(t.dtype, tuple(t.shape), checksums.get(name)) for name, t in tensors.items()}

    def fits(self, now: "Mark | None") -> bool:
        """Whether a tensor is still the same, as far as its values were read and are there."""
        if now is None or self.checksum is None or now.checksum is None:
            return now is None or now.shape == self.shape
        return self == now


class Seal:
    """What a network's weights were at one time, to tell which have changed since; ten times as fast as SHA-256.

    All values are read for it, since nothing else would do: version counters do not count what is written through
    ``tensor.data``, as PEFT does when it merges LoRA.
    """

    def __init__(self) -> None:
        self.marks: dict[str, Mark] = {}
        self.lost: set[str] = set()  # weights that had changed when they were cast, or went to files
        self.cast = False

    def add(self, tensors: Mapping[str, Tensor], read: bool = True) -> None:
        """Take weights as they are now; without ``read`` they are read later."""
        self.marks |= Mark.all(tensors, read)

    def match(self, now: Mapping[str, Tensor | None]) -> dict[str, str | None]:
        """By its name, the name that each weight has now; None where it is gone or has other values.

        Weights that are only of another type count as the same. Modules that were put into the network, such as
        LoRA's, make names longer: ``fc.base_layer.weight`` is ``fc.weight``.

        Args:
            now: the weights by name; None for one that is not in memory, and counts as the same.
        """
        read = {k: t for k, t in now.items() if t is not None and (k not in self.marks or self.marks[k].checksum)}
        found, more = Mark.all(read), now.keys() - self.marks.keys()
        names: dict[str, str | None] = {}
        for name, mark in self.marks.items():
            keys = [name] if name in now else [key for key in more if _is_longer(key, name)]
            same = [key for key in keys if mark.fits(found.get(key))]
            if not same:
                same = [k for k in keys if found[k].dtype != mark.dtype and found[k].shape == mark.shape]
                self.cast = self.cast or bool(same)
            names[name] = same[0] if same and name not in self.lost else None
        return names

    def renew(self, now: Mapping[str, Tensor | None], names: Mapping[str, str | None]) -> None:
        """Take the weights as they are after a cast, under the names that `match` found before it."""
        self.lost |= {name for name, key in names.items() if key is None}
        there = {name: now[key] for name, key in names.items() if key is not None}
        self.add({name: tensor for name, tensor in there.items() if tensor is not None})
        self.marks |= {name: replace(self.marks[name], checksum=None) for name, t in there.items() if t is None}
        self.cast = True


def _is_longer(key: str, name: str) -> bool:
    """Whether a path is another with modules in between."""
    parts = iter(key.split("."))
    return all(part in parts for part in name.split("."))


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {package: version(package) for package in packages}


@cache
def software_sha256(libraries: Sequence[str], code: Sequence[str]) -> str:
    """SHA-256 of the software that computes a result, for caches: other software computes it again.

    Args:
        libraries: names of installed packages, whose versions count.
        code: rooms, as folders, and files of this package, whose content counts.
    """
    digest = hashlib.sha256(repr(package_versions(libraries)).encode())
    package = Path(__file__).parent
    for place in code:
        for file in sorted((package / place).rglob("*.py")) or [package / place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
