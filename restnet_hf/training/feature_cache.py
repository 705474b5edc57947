"""FeatureCache: tensors per image, such as activations of a frozen network, on disk and mapped into memory."""

import copy
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from torch import Tensor
from torch.utils.data import Dataset

from restnet_hf.caching import PUT, TURN, WRITING, Use
from restnet_hf.files import atomic_file


Spec = tuple[tuple[int, ...], torch.dtype]  # shape of a row, and the type in which it is stored
DTYPES = {
    str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.int8)
}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
logger = logging.getLogger(__name__)
MARGIN = 1.05  # free space that is required, in multiples of the size of the files
LARGE = 1e9  # bytes from which on the size of a cache is shown to every user, and not only logged


class FeatureCache(Dataset[dict[str, Tensor]]):
    """Rows of named tensors on disk, one file per name, memory-mapped; item i is ``{name: tensor}``.

    ``folder/<12 hex digits of the SHA-256 of the identity>`` holds ``NAME.bin``, the rows one after another, and
    ``NAME.json``, which is written last: rows without it are incomplete. Items are copies in the stored type. The type
    int8 is for floats: each entry along the first axis of a row, a channel of a map or a token, is stored as whole
    numbers from -127 to 127 with a scale in float32 of its own, and comes back in float32; the scales of a row lie
    before its numbers. From the first turn, write or read on, the cache is marked as used, so that ``restnet-hf cache
    prune`` leaves it alone.

    Args:
        folder: folder of the caches of all identities.
        identity: values that identify the rows, as JSON can hold them: the network's fingerprint, its preprocessing
            and all else that the rows depend on.
        images: number of images, each of which is a row.

    Raises:
        ValueError: there are no images.
        TypeError: JSON cannot hold the identity.
    """

    repeatable = True  # see `restnet_hf.data.shares.is_repeatable`

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], images: int) -> None:
        if images < 1:
            raise ValueError(f"images={images} must be at least 1")
        self.identity, self.images = dict(identity), images
        self.folder = Path(folder).absolute() / hashlib.sha256(_text(identity).encode()).hexdigest()[:12]
        self._selected: tuple[str, ...] | None = None
        self._maps: dict[str, tuple[np.ndarray, Spec]] = {}
        self._use: Use | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors of an item: the selected ones, or all that are complete on disk."""
        if self._selected is not None:
            return self._selected
        return tuple(name for name in self._named() if self._about(name))

    def missing(self, names: Iterable[str] | Mapping[str, Spec]) -> list[str]:
        """The names that are not complete on disk, or not of the expected shape and type.

        Contents are not read; see `verify`.

        Args:
            names: names of tensors, or a mapping from names to the expected shape of a row and type.

        Raises:
            ValueError: a name has other characters than letters, digits, ``_``, ``-`` and ``.``.
        """
        specs = names if isinstance(names, Mapping) else dict.fromkeys(names)
        return [name for name, spec in specs.items() if self._about(name, spec) is None]

    def select(self, names: Iterable[str]) -> "FeatureCache":
        """The same rows, with some of the tensors only.

        Args:
            names: names of the tensors.

        Raises:
            ValueError: a tensor is not complete on disk.
        """
        view = copy.copy(self)
        view._selected, view._maps, view._use = tuple(names), {}, self._use
        if missing := self.missing(view._selected):
            raise ValueError(
                f"{self.folder} has no complete {missing}; there are {list(self.names)}. Write them first"
            )
        return view

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Many items at once, read in the order in which they lie on disk."""
        items: list[dict[str, Tensor]] = [{} for _ in indices]
        places = np.asarray(indices, np.intp)
        order = places.argsort()
        for name, (rows, (shape, dtype)) in self._open().items():
            read = _unpack(torch.from_numpy(rows[places[order]]), shape, dtype)
            for place, row in zip(order.tolist(), read.unbind(), strict=True):
                items[place][name] = row
        return items

    def rows(self, name: str) -> Tensor:
        """All rows (images, *shape) of one tensor, in the stored type, or in float32 where that is int8.

        Args:
            name: name of the tensor.

        Raises:
            ValueError: the tensor is not complete on disk.
        """
        self._mark_used()
        rows, (shape, dtype) = self.select([name])._open()[name]
        return _unpack(torch.from_numpy(rows.copy()), shape, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}, "_use": None}  # another process maps the files itself

    def verify(self) -> None:
        """Read all rows and compare checksums.

        Raises:
            ValueError: a file is damaged.
        """
        for name in self._named() if self._selected is None else self._selected:
            about = self._about(name)
            if about is None or _sha256(self._bin(name)) != about["sha256"]:
                raise ValueError(
                    f"{self._bin(name)} is damaged: it does not match {self._json(name).name} beside it; delete it, "
                    "and it will be written again"
                )

    @contextmanager
    def turn(
        self, specs: Mapping[str, Spec], main: bool = True, barrier: Callable[[], object] = lambda: None
    ) -> Iterator[list[str]]:
        """Wait until no other run writes here; yield the names that are then `missing`, which only this run may write.

        Args:
            specs: shape of a row and type, one of `DTYPES`, for each name.
            main: whether this process waits for other runs; exactly one process of a run does.
            barrier: function that waits for all processes of this run; each calls it twice, whatever happens.

        Raises:
            OSError: something is missing, and nothing can be written into the folder.
        """
        lock = self.folder / TURN
        self._mark_used()
        with ExitStack() as stack, _then(barrier):
            with _then(barrier):
                if main and self.missing(specs):  # a complete folder may be read-only
                    self.folder.mkdir(parents=True, exist_ok=True)
                    try:
                        stack.enter_context(WeakFileLock(lock, timeout=0.5))
                    except TimeoutError:
                        logger.warning("another run is writing into %s; this one goes on when it is done", self.folder)
                        stack.enter_context(WeakFileLock(lock))
            missing = self.missing(specs)
            if missing and not lock.exists():
                raise RuntimeError(f"{self.folder} cannot be filled; see the error of the main process")
            yield missing

    @contextmanager
    def write(
        self, specs: Mapping[str, Spec], main: bool = True, barrier: Callable[[], object] = lambda: None
    ) -> Iterator["RowWriter"]:
        """Write the files of `missing` names; they are complete once the block ends and every image was put.

        Several processes of one machine can fill the files together: all enter with the same ``specs``, and each puts
        rows of its own. After an error, or where images were left out, the files are removed.

        Args:
            specs: shape of a row and type, one of `DTYPES`, for each name.
            main: whether this process makes, checks and removes the files; exactly one process does.
            barrier: function that waits for all processes; each calls it three times, whatever happens.

        Raises:
            OSError: the disk is too small (``ENOSPC``), which is checked before anything is written.
            BlockingIOError: another run is writing here.
            FileExistsError: a name is already complete.
            ValueError: a name, shape or type is not allowed; at the end: images were not put.
        """
        self.nbytes(specs)
        self._mark_used()
        with _then(barrier), ExitStack() as owner, _then(barrier):
            with _then(barrier):
                if main:
                    owner.enter_context(self._own(specs))
            if not self._put.exists() or self.missing(specs) != list(specs):
                raise RuntimeError(f"{self.folder} has no files to fill; see the error of the main process")
            with ExitStack() as stack:
                files = {name: stack.enter_context(self._bin(name).open("r+b")) for name in specs}
                yield RowWriter(files, stack.enter_context(self._put.open("r+b")), specs, self.images)
        self._maps.clear()
        if missing := self.missing(specs):
            raise RuntimeError(f"{missing} are not complete; see the error of the main process")

    def nbytes(self, specs: Mapping[str, Spec]) -> int:
        """Size of the files of some names, in bytes.

        Args:
            specs: shape of a row and type, one of `DTYPES`, for each name.

        Raises:
            ValueError: a name, shape or type is not allowed.
        """
        total = 0
        for name, (shape, dtype) in specs.items():
            self._bin(name)
            if dtype not in DTYPES.values() or any(size < 1 for size in shape):
                raise ValueError(
                    f"rows of '{name}' cannot be stored with shape {tuple(shape)} and {dtype}; sizes must be at least "
                    f"1, types one of {sorted(DTYPES)}"
                )
            total += self.images * _row_bytes(shape, dtype)
        return total

    def _mark_used(self) -> None:
        if self._use is None:
            self._use = Use(self.folder)

    @contextmanager
    def _own(self, specs: Mapping[str, Spec]) -> Iterator[None]:
        """Make the files before they are filled, and check them afterwards, while no other run may write here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(self.folder / WRITING, timeout=0.5))
            except TimeoutError:
                raise BlockingIOError(
                    errno.EAGAIN,
                    f"another run is writing into {self.folder}; wait until it is done, or give another cache_dir",
                ) from None
            if complete := specs.keys() - set(self.missing(specs)):
                raise FileExistsError(
                    f"{sorted(complete)} are complete in {self.folder}; write what missing() returns"
                )
            try:
                self._reserve(specs)
                yield
                self._finish(specs)
            except BaseException:
                for name in specs:
                    self._bin(name).unlink(missing_ok=True)
                raise
            finally:
                self._put.unlink(missing_ok=True)

    def _reserve(self, specs: Mapping[str, Spec]) -> None:
        for name in specs:
            self._json(name).unlink(missing_ok=True)
        for file in self.folder.glob("*.bin"):  # files of a run that was killed
            if not self._json(file.name.removesuffix(".bin")).exists():
                file.unlink()
        needed, free = self.nbytes(specs), shutil.disk_usage(self.folder).free
        sizes = f"{self.images} images take {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free in {self.folder}"
        advice = (
            f"{sizes}; give another cache_dir, take fewer cuts or images, remove caches that are not used any more "
            "(restnet-hf cache prune), or work without a cache"
        )
        if needed * MARGIN > free:
            raise OSError(errno.ENOSPC, advice)
        logger.log(logging.WARNING if needed >= LARGE else logging.INFO, "writing %s: %s", list(specs), sizes)
        try:
            for name, (shape, dtype) in specs.items():
                _allocate(self._bin(name), self.images * _row_bytes(shape, dtype))
            _allocate(self._put, self.images)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {advice}") from error

    def _finish(self, specs: Mapping[str, Spec]) -> None:
        left = self.images - np.count_nonzero(np.fromfile(self._put, np.uint8))
        if left:
            raise ValueError(
                f"{left} of {self.images} images were not put; if no process failed, see that the loader leaves none "
                "out (drop_last=False)"
            )
        for name, (shape, dtype) in specs.items():
            with self._bin(name).open("r+b") as file:
                os.fsync(file.fileno())  # otherwise the json could survive a power cut that its rows do not
            about = {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "images": self.images,
                "sha256": _sha256(self._bin(name)),
                "identity": self.identity,
            }
            with atomic_file(self._json(name)) as temporary:
                temporary.write_text(_text(about))

    def _about(self, name: str, spec: Spec | None = None) -> dict[str, Any] | None:
        """The json of a name; None where the json or the size of the rows is not as expected."""
        file = self._bin(name)
        try:
            about = json.loads(self._json(name).read_text())
            shape, dtype = tuple(about["shape"]), DTYPES[about["dtype"]]
            complete = (
                (about["images"], _text(about["identity"])) == (self.images, _text(self.identity))
                and file.stat().st_size == self.images * _row_bytes(shape, dtype)
                and min(shape, default=1) > 0
                and len(about["sha256"]) == 64
            )
        except (OSError, KeyError, TypeError, ValueError):
            return None
        matches = spec is None or (tuple(spec[0]), spec[1]) == (shape, dtype)
        return about if complete and matches else None

    def _open(self) -> dict[str, tuple[np.ndarray, Spec]]:
        """The rows of each name as bytes, with their shape and type.

        They are mapped by numpy, read-only: `torch.from_file` maps for writing, which a file larger than the memory
        does not allow.
        """
        if not self._maps:
            if self.names:
                self._mark_used()
            for name in self.names:
                about = self._about(name)
                if about is None:
                    raise ValueError(f"{self._bin(name)} is not complete any more; write it again")
                shape, dtype = tuple(about["shape"]), DTYPES[about["dtype"]]
                rows = np.memmap(self._bin(name), np.uint8, "r", shape=(self.images, _row_bytes(shape, dtype)))
                self._maps[name] = np.asarray(rows), (shape, dtype)
            if not self._maps:
                raise ValueError(f"{self.folder} holds no complete tensor; fill it with write()")
        return self._maps

    def _bin(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot be the name of a file here; take letters, digits, '_', and after the first also "
                "'-' and '.'"
            )
        return self.folder / f"{name}.bin"

    @property
    def _put(self) -> Path:  # a byte for each image, 1 once it was put
        return self.folder / PUT

    def _named(self) -> list[str]:
        names = (file.name.removesuffix(".json") for file in sorted(self.folder.glob("*.json")))
        return [name for name in names if NAME.fullmatch(name)]

    def _json(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class RowWriter:
    """Puts rows into the files of `FeatureCache.write`."""

    def __init__(self, files: Mapping[str, BinaryIO], put: BinaryIO, specs: Mapping[str, Spec], images: int) -> None:
        self._files, self._put, self._specs, self._images = dict(files), put, dict(specs), images

    def put(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Store images ``start`` to ``start + n`` of every name; putting an image again replaces it.

        Args:
            start: index of the first image, from 0.
            rows: a tensor (n, *shape) for each name, on any device, which is cast to the stored type.

        Raises:
            ValueError: names, shapes or images are not those of `FeatureCache.write`, or values do not fit the type.
        """
        if rows.keys() != self._specs.keys():
            raise ValueError(f"rows of {sorted(rows)} came, but all of {sorted(self._specs)} must be put together")
        counts = sorted({len(tensor) for tensor in rows.values()})
        if len(counts) != 1 or start < 0 or start + counts[0] > self._images:
            raise ValueError(f"rows of {counts} images came for place {start} of {self._images}; they must fit")
        packed = {name: _pack(name, tensor, *self._specs[name]) for name, tensor in rows.items()}
        for name, tensor in packed.items():
            self._files[name].seek(start * _row_bytes(*self._specs[name]))
            self._files[name].write(tensor.numpy().data)
            self._files[name].flush()
        self._put.seek(start)
        self._put.write(b"\1" * counts[0])
        self._put.flush()


def _pack(name: str, rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows (n, *shape) as the bytes (n, m) that are stored."""
    floats = dtype.is_floating_point or dtype == torch.int8
    if tuple(rows.shape[1:]) != tuple(shape) or rows.is_floating_point() != floats:
        raise ValueError(f"rows of '{name}' are {tuple(rows.shape[1:])} {rows.dtype}, not {tuple(shape)} {dtype}")
    kept = rows.detach().to(torch.float32 if dtype == torch.int8 else dtype)
    if floats and not kept.isfinite().all():
        raise ValueError(
            f"'{name}' has values that are not finite in {kept.dtype}: the largest is {rows.abs().max():g}, and that "
            f"type ends at {torch.finfo(kept.dtype).max:g}. Store it as bfloat16; if it is inf or nan already, check "
            "the network"
        )
    if dtype != torch.int8:
        return _bytes(kept.cpu())
    parts = kept.reshape(len(kept), _scales(shape), -1)
    scales = parts.abs().amax(-1, keepdim=True) / 127
    numbers = (parts / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return torch.cat([_bytes(scales.cpu()), _bytes(numbers.cpu())], dim=1)


def _unpack(data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows (n, *shape) of the bytes (n, m) that are stored."""
    if dtype != torch.int8:
        return data.view(dtype).view(len(data), *shape)
    count = _scales(shape)
    scales = data[:, : 4 * count].reshape(-1).view(torch.float32).view(len(data), count, 1)
    numbers = data[:, 4 * count :].view(torch.int8).view(len(data), count, -1)
    return (numbers * scales).view(len(data), *shape)


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(len(rows), -1).view(torch.uint8)


def _scales(shape: tuple[int, ...]) -> int:
    """Number of scales of a row in int8."""
    return shape[0] if len(shape) > 1 else 1


def _allocate(file: Path, size: int) -> None:
    """Write a file of zeros, with its space on disk reserved where the system can do that."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize + (4 * _scales(shape) if dtype == torch.int8 else 0)


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


@contextmanager
def _then(act: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    finally:
        act()
