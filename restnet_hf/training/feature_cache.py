"""Tensors computed per image, such as activations of a frozen network: kept on disk, mapped into memory, checked."""

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

from restnet_hf.files import written_whole


Spec = tuple[tuple[int, ...], torch.dtype]  # the shape of a row, and the type in which it is kept
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.int64)}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
logger = logging.getLogger(__name__)
MARGIN = 1.05  # times what the files take must be free


class FeatureCache(Dataset[dict[str, Tensor]]):
    """Rows of named tensors on disk, one file per name, memory-mapped; item i is ``{name: tensor}``.

    ``folder/<12 hex digits of the SHA-256 of the identity>`` holds ``NAME.bin``, the rows one after another, and
    ``NAME.json``, which is written last: a file without it does not count. Items are copies in the type that is kept.

    Args:
        folder: where the caches of all identities lie.
        identity: all that the values depend on, as JSON can hold it: the network's fingerprint, preprocessing, ....
        images: number of rows.

    Raises:
        ValueError: there are no images.
        TypeError: JSON cannot hold the identity.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], images: int) -> None:
        if images < 1:
            raise ValueError(f"images={images} must be at least 1")
        self.identity, self.images = dict(identity), images
        self.folder = Path(folder).absolute() / hashlib.sha256(_text(identity).encode()).hexdigest()[:12]
        self._selected: tuple[str, ...] | None = None
        self._maps: dict[str, tuple[np.ndarray, Spec]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of an item: those selected, or else all that are whole on disk."""
        if self._selected is not None:
            return self._selected
        return tuple(name for name in self._named() if self._about(name))

    def missing(self, names: Iterable[str] | Mapping[str, Spec]) -> list[str]:
        """Those that are not whole on disk, or not of that shape and type where these are given.

        Contents are not looked at, see `verify`.

        Raises:
            ValueError: a name has other characters than letters, digits, ``_``, ``-`` and ``.``.
        """
        specs = names if isinstance(names, Mapping) else dict.fromkeys(names)
        return [name for name, spec in specs.items() if self._about(name, spec) is None]

    def select(self, names: Iterable[str]) -> "FeatureCache":
        """The same rows with these names only.

        Raises:
            ValueError: one is not whole on disk.
        """
        view = copy.copy(self)
        view._selected, view._maps = tuple(names), {}
        if missing := self.missing(view._selected):
            raise ValueError(f"{self.folder} has no whole {missing}; there are {list(self.names)}. Write them first")
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
            read = torch.from_numpy(rows[places[order]]).view(dtype).view(len(items), *shape)
            for place, row in zip(order.tolist(), read.unbind(), strict=True):
                items[place][name] = row
        return items

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}}  # another process maps the files itself

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            ValueError: a file is damaged.
        """
        for name in self._named() if self._selected is None else self._selected:
            about = self._about(name)
            if about is None or _sha256(self._bin(name)) != about["sha256"]:
                raise ValueError(
                    f"{self._bin(name)} is damaged: it is not what {self._json(name).name} beside it says; delete it, "
                    "and it will be written again"
                )

    @contextmanager
    def turn(
        self, specs: Mapping[str, Spec], main: bool = True, barrier: Callable[[], object] = lambda: None
    ) -> Iterator[list[str]]:
        """Wait until no other run is writing here; yield what is `missing` then, which this run may write alone.

        Args:
            specs: as of `write`.
            main: whether this process waits for other runs; exactly one of a run does.
            barrier: waits for all processes of this run. Each calls it twice, whatever happens.

        Raises:
            OSError: something is missing, and nothing can be written into the folder.
        """
        lock = self.folder / ".turn"
        with ExitStack() as stack, _then(barrier):
            with _then(barrier):
                if main and self.missing(specs):  # a folder that is whole may be read-only
                    self.folder.mkdir(parents=True, exist_ok=True)
                    try:
                        stack.enter_context(WeakFileLock(lock, timeout=0.5))
                    except TimeoutError:
                        logger.warning("another run is writing into %s; this one goes on when it is done", self.folder)
                        stack.enter_context(WeakFileLock(lock))
            missing = self.missing(specs)
            if missing and not lock.exists():
                raise RuntimeError(f"{self.folder} cannot be filled; the error of the main process says why")
            yield missing

    @contextmanager
    def write(
        self, specs: Mapping[str, Spec], main: bool = True, barrier: Callable[[], object] = lambda: None
    ) -> Iterator["RowWriter"]:
        """Make files for `missing` names; they count once the block ends without error and every image was put.

        Several processes of one machine can fill them together: all enter with the same ``specs``, and each puts
        rows of its own. After an error, or where images were left out, the files are removed.

        Args:
            specs: for each name the shape of a row and one of `DTYPES`.
            main: whether this process makes, checks and removes the files; exactly one does.
            barrier: waits for all processes. Each calls it three times, whatever happens.

        Raises:
            OSError: the disk is too small, which is found out before anything is written (``ENOSPC``).
            BlockingIOError: another run is writing there.
            FileExistsError: a name is whole already.
            ValueError: a name, shape or type cannot be; at the end: images were not put.
        """
        self.nbytes(specs)
        with _then(barrier), ExitStack() as owner, _then(barrier):
            with _then(barrier):
                if main:
                    owner.enter_context(self._own(specs))
            if not self._put.exists() or self.missing(specs) != list(specs):
                raise RuntimeError(f"{self.folder} has no files to fill; the error of the main process says why")
            with ExitStack() as stack:
                files = {name: stack.enter_context(self._bin(name).open("r+b")) for name in specs}
                yield RowWriter(files, stack.enter_context(self._put.open("r+b")), specs, self.images)
        self._maps.clear()
        if missing := self.missing(specs):
            raise RuntimeError(f"{missing} are not whole; the error of the main process says why")

    def nbytes(self, specs: Mapping[str, Spec]) -> int:
        """How large the files of these names are in bytes; ValueError for what cannot be kept."""
        total = 0
        for name, (shape, dtype) in specs.items():
            self._bin(name)
            if dtype not in DTYPES.values() or any(size < 1 for size in shape):
                raise ValueError(
                    f"rows of '{name}' cannot be kept with shape {tuple(shape)} and {dtype}; sizes must be at least "
                    f"1, types one of {sorted(DTYPES)}"
                )
            total += self.images * _row_bytes(shape, dtype)
        return total

    @contextmanager
    def _own(self, specs: Mapping[str, Spec]) -> Iterator[None]:
        """What the main process does before and after the files are filled; nobody else writes here meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(self.folder / ".lock", timeout=0.5))
            except TimeoutError:
                raise BlockingIOError(
                    errno.EAGAIN,
                    f"another run is writing into {self.folder}; wait until it is done, or give another cache_dir",
                ) from None
            if whole := specs.keys() - set(self.missing(specs)):
                raise FileExistsError(f"{sorted(whole)} are whole in {self.folder}; write what missing() returns")
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
        for file in self.folder.glob("*.bin"):  # of a run that was killed
            if not self._json(file.name.removesuffix(".bin")).exists():
                file.unlink()
        needed, free = self.nbytes(specs), shutil.disk_usage(self.folder).free
        advice = (
            f"{self.images} images take {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free in {self.folder}; give "
            "another cache_dir, take fewer cuts or images, or work without a cache"
        )
        if needed * MARGIN > free:
            raise OSError(errno.ENOSPC, advice)
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
                os.fsync(file.fileno())  # or a json could outlive a power cut that its rows do not
            about = {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "images": self.images,
                "sha256": _sha256(self._bin(name)),
                "identity": self.identity,
            }
            with written_whole(self._json(name)) as temporary:
                temporary.write_text(_text(about))

    def _about(self, name: str, spec: Spec | None = None) -> dict[str, Any] | None:
        """What the json of a name says; None where that, or the size of the file, is not as it must be."""
        file = self._bin(name)
        try:
            about = json.loads(self._json(name).read_text())
            shape, dtype = tuple(about["shape"]), DTYPES[about["dtype"]]
            whole = (
                (about["images"], _text(about["identity"])) == (self.images, _text(self.identity))
                and file.stat().st_size == self.images * _row_bytes(shape, dtype)
                and min(shape, default=1) > 0
                and len(about["sha256"]) == 64
            )
        except (OSError, KeyError, TypeError, ValueError):
            return None
        asked = spec is None or (tuple(spec[0]), spec[1]) == (shape, dtype)
        return about if whole and asked else None

    def _open(self) -> dict[str, tuple[np.ndarray, Spec]]:
        """The rows of each name as bytes, and what they mean.

        Mapped by numpy, read-only: `torch.from_file` maps for writing, and for that a file must not be larger than
        the memory.
        """
        if not self._maps:
            for name in self.names:
                about = self._about(name)
                if about is None:
                    raise ValueError(f"{self._bin(name)} is not whole any more; write it again")
                shape, dtype = tuple(about["shape"]), DTYPES[about["dtype"]]
                rows = np.memmap(self._bin(name), np.uint8, "r", shape=(self.images, _row_bytes(shape, dtype)))
                self._maps[name] = np.asarray(rows), (shape, dtype)
            if not self._maps:
                raise ValueError(f"{self.folder} holds nothing that is whole; fill it with write()")
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
        return self.folder / ".put"

    def _named(self) -> list[str]:
        found = (file.name.removesuffix(".json") for file in sorted(self.folder.glob("*.json")))
        return [name for name in found if NAME.fullmatch(name)]

    def _json(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class RowWriter:
    """Puts rows into the files of `FeatureCache.write`."""

    def __init__(self, files: Mapping[str, BinaryIO], put: BinaryIO, specs: Mapping[str, Spec], images: int) -> None:
        self._files, self._put, self._specs, self._images = dict(files), put, dict(specs), images

    def put(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Store images ``start`` to ``start + n`` of every name; putting an image again replaces it.

        Args:
            start: the first image, from 0.
            rows: for each name a tensor (n, *shape), on any device; it is cast.

        Raises:
            ValueError: names, shapes or images are others than were said, or values do not fit the type.
        """
        if rows.keys() != self._specs.keys():
            raise ValueError(f"rows of {sorted(rows)} came, all of {sorted(self._specs)} are to be put together")
        counts = sorted({len(tensor) for tensor in rows.values()})
        if len(counts) != 1 or start < 0 or start + counts[0] > self._images:
            raise ValueError(f"rows of {counts} images came for place {start} of {self._images}; they must fit")
        kept = {name: _cast(name, tensor, *self._specs[name]) for name, tensor in rows.items()}
        for name, tensor in kept.items():
            self._files[name].seek(start * _row_bytes(*self._specs[name]))
            self._files[name].write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            self._files[name].flush()
        self._put.seek(start)
        self._put.write(b"\1" * counts[0])
        self._put.flush()


def _cast(name: str, rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tuple(rows.shape[1:]) != tuple(shape) or rows.is_floating_point() != dtype.is_floating_point:
        raise ValueError(f"rows of '{name}' are {tuple(rows.shape[1:])} {rows.dtype}, not {tuple(shape)} {dtype}")
    kept = rows.detach().to(dtype)
    if dtype.is_floating_point and not kept.isfinite().all():
        raise ValueError(
            f"'{name}' has values that are not finite in {dtype}: the largest is {rows.abs().max():g}, and that type "
            f"ends at {torch.finfo(dtype).max:g}. Keep it as bfloat16; if it is inf or nan already, see to the network"
        )
    return kept.cpu().contiguous()


def _allocate(file: Path, size: int) -> None:
    """A file of zeros whose place on disk is taken, where the system can do that."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


@contextmanager
def _then(act: Callable[[], object]) -> Iterator[None]:
    try:
        yield
    finally:
        act()
