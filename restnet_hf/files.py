"""Write a file or a folder completely or not at all; read a folder so that all files are of the same save."""

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError


T = TypeVar("T")
SHA256 = "sha256"  # key of a folder's first file that holds the checksums of the others
PENDING = ".pending"  # suffix of a folder inside another that holds an unfinished save
COMMIT = re.compile(r"[0-9a-f]{40}")  # name of a commit, and of its folder in the Hub's cache
NEW = ".new"  # suffix of a temporary folder beside one that does not exist yet
LOCK_SECONDS = 600.0  # no save takes this long: a process that holds the lock longer has hung
WAITS_S = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # before each attempt to read a folder that may change
MAX_FIRST_BYTES = 2**26  # of a first file
PLAIN_NAME = re.compile(r"[^./\\:\0][^/\\:\0]*(/[^./\\:\0][^/\\:\0]*){0,7}")  # of a file that lies in its folder


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written there replaces ``path`` if the block succeeds."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        with _disk_errors(target):
            yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], first: str, ours: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder; its files are moved into ``path`` when the block ends without error.

    A new folder appears in one rename. In an existing one, all files lie in a pending folder inside it before
    ``first`` is replaced, which commits the save; then the others are. `read_folder` reads the old files before that
    moment and the new ones after it, also where the process is killed, and the next save finishes an interrupted one.
    Processes that write to the same folder wait for one another.

    Args:
        path: path of the folder to write.
        first: name of a JSON file that is always written; the checksums of the others are added to it.
        ours: names of files to remove where they are not written again; all others stay.

    Raises:
        OSError: a file cannot be written, or another process holds the folder.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give the name of a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_writer(target):
        new = not target.exists()
        if not new:
            _finish(target, first, ours, only=ours)
        prefix, suffix, place = (f".{target.name}.", NEW, target.parent) if new else (".", PENDING, target)
        _remove_leftovers(place, prefix, suffix)
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=prefix, suffix=suffix))
        try:
            with _disk_errors(target):
                yield temporary
            _seal(temporary, first)
            if new:
                os.rename(temporary, target)
            else:
                _put(temporary / first, target / first)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if not new:
            _finish(target, first, ours)


def read_folder(path: str | os.PathLike[str], first: str, read: Callable[[Path], T]) -> T:
    """Read a folder that `atomic_folder` wrote, so that all files are of the same save; write nothing.

    Args:
        path: path of the folder to read.
        first: name of the file that commits a save; see `atomic_folder`.
        read: function that takes the folder in which the files lie. It is called again where another process wrote
            to the folder meanwhile.

    Raises:
        OSError: the folder changed during every attempt.
        Exception: whatever ``read`` raises for a folder that did not change.
    """
    target = Path(path)
    for wait_s in WAITS_S:
        time.sleep(wait_s)
        before = _stamp(target / first)
        folder = complete_folder(target, first)
        try:
            result = read(folder)
        except Exception:
            if _stamp(target / first) == before and _still_counts(folder, first, target):
                raise
        else:
            if _stamp(target / first) == before and _still_counts(folder, first, target):
                return result
    raise OSError(f"{target} was written to by other processes during all of {len(WAITS_S)} attempts to read it; wait")


def complete_folder(path: str | os.PathLike[str], first: str) -> Path:
    """The folder itself, or the pending one inside it if a committed save was interrupted.

    Such a pending folder holds a copy of ``first``, and every file that ``first`` names, with its checksum.
    """
    target = Path(path)
    with suppress(OSError):
        first_bytes = _read_regular(target / first)
        for folder in sorted(target.glob(f".*{PENDING}")):
            if _is_folder(folder) and _is_complete(folder, first, first_bytes):
                return folder
    return target


def checksums(first_bytes: bytes) -> Mapping[str, str]:
    """SHA-256 of the other files by name, from the content of a first file; empty where there are no valid ones.

    The name of a file in a folder inside is its path from the folder, with ``/``.
    """
    try:
        digests = json.loads(first_bytes)[SHA256]
        valid = all(isinstance(v, str) and PLAIN_NAME.fullmatch(k) for k, v in digests.items())
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return {}
    return digests if valid else {}


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _one_writer(target: Path) -> Iterator[None]:
    """Hold the lock of a folder. Its file lies beside the folder where possible, and is removed on release."""
    beside = target.with_name(f".{target.name}.lock")
    path = beside if os.access(target.parent, os.W_OK) else target / ".lock"
    lock = _lock(path)
    while not _is_locked(path):  # the previous owner has removed the file that this lock is on
        lock.release()
        lock = _lock(path)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove a file that is open
            path.unlink()
        lock.release()


def _lock(path: Path) -> FileLock:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise BlockingIOError(
            f"another process has held {path} for {LOCK_SECONDS:g} s; end it, or save to another folder"
        ) from None
    return lock


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Raise OSError where safetensors cannot write a file, on a full disk for example."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}. Nothing was changed; free some disk space") from error


def _seal(folder: Path, first: str) -> None:
    """Add the checksums of all files to the first one, and make all files readable for others."""
    folder.chmod(0o755)
    paths = sorted(folder.rglob("*"))
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)
    files = {path.relative_to(folder).as_posix(): path for path in paths if not path.is_dir()}
    data = json.loads((folder / first).read_text(encoding="utf-8"))
    data[SHA256] = {name: sha256_of(file) for name, file in files.items() if name != first}
    (folder / first).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _finish(target: Path, first: str, ours: Collection[str], only: Collection[str] = ()) -> None:
    """Move the files of a committed save into the folder; do nothing where there is no such save.

    With ``only``, for a save that another process left unfinished, no existing file of another name is replaced.
    """
    folder = complete_folder(target, first)
    if folder == target or not _is_own(folder):
        return
    names = checksums((folder / first).read_bytes())
    for name in names:
        if not only or name in only or not _is_taken(target, name):
            _make_folders(target, name)
            _put(folder / name, target / name)
    for name in {*ours} - {*names, first}:
        (target / name).unlink(missing_ok=True)
    (folder / first).unlink()  # from here on readers take the folder itself
    shutil.rmtree(folder, ignore_errors=True)


def _is_taken(target: Path, name: str) -> bool:
    """Whether there is something in a folder that a file of that name would replace."""
    folders = (target / parent for parent in Path(name).parents)
    return os.path.lexists(target / name) or any(os.path.lexists(each) and not _is_folder(each) for each in folders)


def _make_folders(target: Path, name: str) -> None:
    """Make the folders that a file inside a folder needs, in place of links and files of their names."""
    for parent in reversed(Path(name).parents[:-1]):
        folder = target / parent
        if os.path.lexists(folder) and not _is_folder(folder):
            folder.unlink()
        folder.mkdir(exist_ok=True)


def _put(source: Path, target: Path) -> None:
    """Link or copy a file to another path, replacing what is there in one step."""
    aside = source.with_name(f".{source.name}.put")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:  # a file system without links
        shutil.copyfile(source, aside)
    os.replace(aside, target)
    aside.unlink(missing_ok=True)  # os.replace leaves it where both were the same file already


def _remove_leftovers(place: Path, prefix: str, suffix: str) -> None:
    """Remove temporary folders of saves that were killed. The caller holds the lock."""
    for folder in place.glob(f"{glob.escape(prefix)}*{suffix}"):
        if _is_own(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_complete(folder: Path, first: str, first_bytes: bytes) -> bool:
    """Whether a pending folder holds the same first file, and every file that it names, as regular files."""
    names = checksums(first_bytes)
    if not names or not all(_is_file(folder / name) for name in (first, *names)):
        return False
    if not all(_is_folder(folder / parent) for name in names for parent in Path(name).parents):
        return False
    with suppress(OSError):
        copy = folder / first
        same = copy.stat().st_size == len(first_bytes) and _read_regular(copy) == first_bytes
        return same and all(sha256_of(folder / name) == digest for name, digest in names.items())
    return False


def _read_regular(file: Path) -> bytes:
    """The bytes of a regular file that is not too long; none of other files, such as pipes, which may not end."""
    info = file.stat()
    return file.read_bytes() if stat.S_ISREG(info.st_mode) and info.st_size <= MAX_FIRST_BYTES else b""


def _still_counts(folder: Path, first: str, target: Path) -> bool:
    """Whether a folder was still valid after it was read: pending ones lose their first file before the others."""
    return folder == target or (folder / first).exists()


def _stamp(file: Path) -> Any:
    """A value that changes whenever the file is replaced; None where there is no file."""
    try:
        info = file.stat()
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def _is_file(path: Path) -> bool:
    """Whether a path is a regular file and not a link."""
    return stat.S_ISREG(path.lstat().st_mode) if os.path.lexists(path) else False


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder and not a link."""
    return stat.S_ISDIR(path.lstat().st_mode) if os.path.lexists(path) else False


def _is_own(folder: Path) -> bool:
    """Whether a path is a folder, not a link, that belongs to the user of this process."""
    return _is_folder(folder) and (not hasattr(os, "getuid") or folder.lstat().st_uid == os.getuid())
