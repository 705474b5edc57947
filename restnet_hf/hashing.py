"""SHA-256 of a network's weights, piece by piece between cuts, and whether weights have changed since."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


PACKAGES = ("restnet-hf", "torch", "transformers", "timm")  # their versions are recorded with results
FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = 1 << 24  # bytes of all tensors, from which on hashing takes longer than starting threads
SHARE = 1 << 19  # bytes of a tensor that is worth a thread of its own


@dataclass(frozen=True)
class Piece:
    """The part of a network from one cut to the next.

    Args:
        cut: name of the cut at the end of the piece; None for the logits.
        shape: shape of the activation at that cut, for one image.
        sha256: SHA-256 of the piece's weights.
        unnamed: SHA-256 of the piece's weights without their names, which libraries may change; None in what earlier
            versions wrote.
    """

    cut: str | None
    shape: tuple[int, ...]
    sha256: str
    unnamed: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Piece":
        """The inverse of ``dataclasses.asdict``, also after JSON made a list of the shape."""
        return cls(data["cut"], tuple(data["shape"]), data["sha256"], data.get("unnamed"))

    @classmethod
    def of(cls, cut: str | None, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> "Piece":
        """The piece of these weights."""
        return cls(cut, shape, *_sha256s(tensors))

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether weights are those of the piece, whatever their names are where it knows their SHA-256 without."""
        named, unnamed = _sha256s(tensors)
        return named == self.sha256 or unnamed == self.unnamed


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values; tensors of large pieces are hashed in parallel.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    return _sha256s(tensors)[0]


def _sha256s(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """SHA-256 of types, shapes and values, with names and without."""
    hashes = _digests(tensors, lambda values: hashlib.sha256(values).hexdigest())
    if None in hashes.values():
        raise ValueError("weights on the meta device have no values; load them, or build the model on another device")
    lines = {name: f"{tensor.dtype} {tuple(tensor.shape)} {hashes[name]}" for name, tensor in tensors.items()}
    named = sorted(f"{name} {line}" for name, line in lines.items())
    return _sha256("\n".join(named)), _sha256("\n".join(sorted(lines.values())))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digests(tensors: Mapping[str, Tensor], digest: Callable[[Any], Any]) -> dict[str, Any]:
    """Digest of the values of each tensor by name; None for tensors on the meta device."""

    def hash_one(tensor: Tensor) -> Any:
        if tensor.is_meta:
            return None
        return digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    if sum(tensor.nbytes for tensor in tensors.values()) < LARGE:
        return {name: hash_one(tensor) for name, tensor in tensors.items()}
    with ThreadPoolExecutor() as pool:
        large = {name: pool.submit(hash_one, tensor) for name, tensor in tensors.items() if tensor.nbytes > SHARE}
        small = {name: hash_one(tensor) for name, tensor in tensors.items() if name not in large}
        return small | {name: job.result() for name, job in large.items()}


def fingerprint(model: nn.Module, pieces: Iterable[Piece], weights: Mapping[str, Tensor] | None = None) -> str:
    """Types of a network's weights and a SHA-256 of its class and pieces, such as ``float32:5f70bf18...``."""
    tensors = (model.state_dict() if weights is None else weights).values()
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    named = [{"cut": piece.cut, "shape": piece.shape, "sha256": piece.sha256} for piece in pieces]
    text = json.dumps([type(model).__name__, named])
    return f"{'+'.join(sorted(dtypes))}:{_sha256(text)}"


def stored_dtype(text: str) -> torch.dtype | None:
    """The type of the weights that a fingerprint names; None where there are several types.

    Raises:
        ValueError: the fingerprint names a type that is not a float, or no type.
    """
    dtypes = [FLOATS.get(name) for name in text.split(":")[0].split("+")]
    if None in dtypes:
        raise ValueError(
            f"the fingerprint must begin with types of weights, from {list(FLOATS)}, such as float32:5f70bf18"
        )
    return dtypes[0] if len(dtypes) == 1 else None


@dataclass(frozen=True)
class TensorRecord:
    """Type, shape and checksum of a tensor at one time.

    Args:
        dtype: type of the tensor.
        shape: shape of the tensor.
        checksum: checksum of the values; None where they were not read.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: bytes | None = None

    @classmethod
    def of_all(cls, tensors: Mapping[str, Tensor], read: bool = True) -> "dict[str, TensorRecord]":
        """A record of each tensor by name, with checksums of the values if ``read``."""
        checksums = _digests(tensors, xxhash.xxh3_128_digest) if read else {}
        return {name: cls(t.dtype, tuple(t.shape), checksums.get(name)) for name, t in tensors.items()}

    def matches(self, now: "TensorRecord | None") -> bool:
        """Whether a tensor is still the same, compared by shape where values were not read or are not in memory."""
        if now is None or self.checksum is None or now.checksum is None:
            return now is None or now.shape == self.shape
        return self == now


class WeightsSnapshot:
    """Records of a network's weights at one time, to find which have changed since; ten times as fast as SHA-256.

    All values are read, since nothing less would do: version counters do not count what is written through
    ``tensor.data``, as PEFT does when it merges LoRA.
    """

    def __init__(self) -> None:
        self.records: dict[str, TensorRecord] = {}
        self.lost: set[str] = set()  # weights that had changed when they were cast, or moved to files
        self.cast = False

    def add(self, tensors: Mapping[str, Tensor], read: bool = True) -> None:
        """Record weights as they are now; without ``read`` their values are read later."""
        self.records |= TensorRecord.of_all(tensors, read)

    def match(self, now: Mapping[str, Tensor | None]) -> dict[str, str | None]:
        """The present name of each recorded weight, by its recorded name; None where it is gone or has other values.

        Weights that only have another type count as the same. Modules that were put into the network, such as
        LoRA's, make names longer: ``fc.base_layer.weight`` is ``fc.weight``.

        Args:
            now: the present weights by name; None for a weight that is not in memory, which counts as the same.
        """
        known = self.records
        read = {k: t for k, t in now.items() if t is not None and (k not in known or known[k].checksum)}
        present, added = TensorRecord.of_all(read), now.keys() - known.keys()
        names: dict[str, str | None] = {}
        for name, record in known.items():
            keys = [name] if name in now else [key for key in added if _is_longer(key, name)]
            same = [key for key in keys if record.matches(present.get(key))]
            if not same:
                same = [k for k in keys if present[k].dtype != record.dtype and present[k].shape == record.shape]
                self.cast = self.cast or bool(same)
            names[name] = same[0] if same and name not in self.lost else None
        return names

    def renew(self, now: Mapping[str, Tensor | None], names: Mapping[str, str | None]) -> None:
        """Record the weights as they are after a cast, under the names that `match` returned before it."""
        self.lost |= {name for name, key in names.items() if key is None}
        kept = {name: now[key] for name, key in names.items() if key is not None}
        self.add({name: tensor for name, tensor in kept.items() if tensor is not None})
        self.records |= {name: replace(self.records[name], checksum=None) for name, t in kept.items() if t is None}
        self.cast = True


def _is_longer(key: str, name: str) -> bool:
    """Whether a module path is another path with modules in between."""
    parts = iter(key.split("."))
    return all(part in parts for part in name.split("."))


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {package: version(package) for package in packages}


@cache
def software_sha256(libraries: Sequence[str], code: Sequence[str]) -> str:
    """SHA-256 of the software that computes a result, so that caches recompute it after a change.

    Args:
        libraries: names of installed packages, whose versions are hashed.
        code: folders and files of this package, whose content is hashed.
    """
    digest = hashlib.sha256(repr(package_versions(libraries)).encode())
    package = Path(__file__).parent
    for place in code:
        for file in sorted((package / place).rglob("*.py")) or [package / place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
