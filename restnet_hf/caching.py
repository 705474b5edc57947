"""Where this package keeps caches on disk, when they were last used, and which of them a job uses now."""

import hashlib
import json
import logging
import os
import secrets
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path

from restnet_hf.files import atomic_file


CUTS, SIMILARITIES, FEATURES = "cuts", "similarities", "features"
GATE = ".restnet_hf.lock"  # in a folder of feature caches; held while one of them is marked as used, or deleted
USE = ".use-"  # prefix of the files that jobs hold locked in the caches that they use
USED = ".used"  # file in a feature cache whose time of modification is that of the last use
TURN, WRITING, PUT = ".turn", ".lock", ".put"  # locks of `FeatureCache.turn` and `.write`, and the images put so far
FORKED: list[FileLock] = []  # of `Use` objects that a fork copied
GATE_SECONDS = 60.0  # a mark takes no time, and a deletion seconds
logger = logging.getLogger(__name__)


def assets_folder(kind: str) -> Path:
    """Folder of one kind of cache in ``HF_HOME/assets/restnet_hf``; of feature caches, the list of their folders.

    Args:
        kind: `CUTS`, `SIMILARITIES` or `FEATURES`.

    Raises:
        OSError, ValueError: the folder cannot be made, because a file is in the way for example.
    """
    return cached_assets_path("restnet_hf", kind)


def note_use(path: Path) -> None:
    """Set the time at which a cached file was last read to now, which many systems do not record."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def record_folder(folder: Path) -> None:
    """Add a folder of feature caches to the list that `recorded_folders` reads.

    Args:
        folder: absolute path of the folder, the ``cache_dir`` of a training.
    """
    try:
        file = assets_folder(FEATURES) / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
        if not file.exists():
            with atomic_file(file) as temporary:
                temporary.write_text(json.dumps({"folder": str(folder)}))
    except (OSError, ValueError) as error:
        logger.info("%s is not listed among the caches: %s", folder, error)


def recorded_folders() -> list[Path]:
    """Folders of feature caches that `record_folder` was given and that still exist; others are forgotten."""
    folders: list[Path] = []
    for file in sorted(assets_folder(FEATURES).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            folder = Path(json.loads(file.read_text())["folder"])
            if folder.is_dir():
                folders.append(folder)
            elif folder.parent.is_dir():  # else its disk may only be detached
                file.unlink()
    return folders


class Use:
    """A mark on a feature cache that a job uses it, until the object is deleted or the process ends.

    Args:
        folder: folder of the cache, which is made if there is none. Where nothing can be written there is no mark, and
            nothing can be deleted either.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / f"{USE}{secrets.token_hex(4)}"
        lock = FileLock(file, thread_local=False)
        weakref.finalize(self, _release, lock, file, os.getpid())
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / GATE, timeout=GATE_SECONDS):
                folder.mkdir(exist_ok=True)
                lock.acquire(timeout=0)
                (folder / USED).touch()
        except (OSError, NotImplementedError) as error:  # a folder to read from, or a system without locks
            logger.info("%s cannot be marked as used: %s", folder, error)


def _release(lock: FileLock, file: Path, process: int) -> None:
    if process != os.getpid():  # a forked process has the object, but not the lock
        FORKED.append(lock)  # its end would release the lock of the other process, with filelock below 4
    elif lock.is_locked:
        with suppress(OSError):
            file.unlink()
        lock.release()


def is_used(folder: Path) -> bool:
    """Whether a job uses or writes a feature cache; marks that killed jobs left are removed.

    Args:
        folder: folder of the cache.
    """
    return any([_is_locked(file, stale=file.name.startswith(USE)) for file in _locks(folder)])


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Yield whether no job uses or writes a feature cache; within the block no other job can begin to.

    Args:
        folder: folder of the cache.
    """
    gate = FileLock(folder.parent / GATE, timeout=GATE_SECONDS)
    try:
        gate.acquire()
    except (OSError, Timeout):  # OSError where nothing can be written
        yield False
        return
    try:
        yield not is_used(folder)
    finally:
        gate.release()


def _locks(folder: Path) -> list[Path]:
    return [file for name in (f"{USE}*", TURN, WRITING) for file in folder.glob(name)]


def _is_locked(file: Path, stale: bool) -> bool:
    """Whether a process holds a lock; removes its file if none does and it is stale then."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except FileNotFoundError:
        return False
    if stale:
        file.unlink(missing_ok=True)
    lock.release()
    return False
