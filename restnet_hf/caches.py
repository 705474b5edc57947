"""All caches of this package on disk, as entries that can be listed, filtered, sorted and deleted."""

import hashlib
import json
import operator
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restnet_hf.caching import (
    CUTS,
    FEATURES,
    GATE,
    PUT,
    SIMILARITIES,
    TURN,
    USED,
    WRITING,
    assets_folder,
    is_used,
    recorded_folders,
    unused,
)


IDENTITY = re.compile(r"[0-9a-f]{12}")  # name of a feature cache
KEY = re.compile(r"[0-9a-f]{64}")  # name of a file of cuts or similarities, without its ending
TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.\w+\.[0-9a-f]{8}\.tmp\.\w+")  # name of a file of `atomic_file`
ENDINGS = {CUTS: ".safetensors", SIMILARITIES: ".npz"}
TEMPORARY_SECONDS = 3600.0  # no file of cuts or similarities takes this long to write
SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}  # as huggingface_hub reads sizes
SPANS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "mo": 30 * 86400, "y": 365 * 86400}
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, ">": operator.gt, "<": operator.lt, "=": operator.eq,
}  # fmt: skip
FILTER = re.compile(r"\s*(accessed|modified|size|type)\s*(>=|<=|!=|>|<|=)\s*(\S+)\s*")
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([a-zA-Z]*)")
SORTED_BY: dict[str, Callable[["CacheEntry"], Any]] = {
    "accessed": lambda entry: entry.accessed,
    "modified": lambda entry: entry.modified,
    "name": lambda entry: str(entry.path),
    "size": lambda entry: entry.size,
}


@dataclass(frozen=True)
class CacheEntry:
    """A cache on disk, or what a job that was killed has left of one.

    Args:
        type: ``features``, ``similarities`` or ``cuts``.
        path: folder of feature caches of one identity, or file.
        files: files of ours that it consists of.
        size: size of the files in bytes.
        accessed: time of the last use, in seconds since the epoch.
        modified: time at which it was written, in seconds since the epoch.
        of: networks, tensors and images that it is of, for people.
        complete: whether it can be used; if not, a job was killed while it wrote.
        in_use: whether a job uses or writes it now.
    """

    type: str
    path: Path
    files: tuple[Path, ...]
    size: int
    accessed: float
    modified: float
    of: str
    complete: bool = True
    in_use: bool = False


def scan_caches(cache_dirs: Iterable[str | os.PathLike[str]] = ()) -> list[CacheEntry]:
    """Find all caches: cuts, similarities, and the feature caches in every ``cache_dir`` of an earlier training.

    Only files that this package wrote, and that belong to the user of this process, are part of an entry.

    Args:
        cache_dirs: further folders of feature caches, such as those of another machine.

    Raises:
        NotADirectoryError: one of ``cache_dirs`` is no folder.
    """
    entries = [entry for kind in ENDINGS for entry in _files(kind)]
    given = [Path(folder).resolve() for folder in cache_dirs]
    for folder in given:
        if not folder.is_dir():
            raise NotADirectoryError(f"there is no folder {folder}; give the cache_dir of a training")
    for folder in dict.fromkeys([*given, *(each.resolve() for each in recorded_folders())]):
        for place in sorted(folder.iterdir()):
            if IDENTITY.fullmatch(place.name) and _is_own(place, stat.S_ISDIR):
                entries += _features(place)
    return entries


def delete_caches(entries: Iterable[CacheEntry]) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Delete caches, except those that a job uses.

    Args:
        entries: caches that `scan_caches` returned.

    Returns:
        The entries that were deleted, and those that were not.
    """
    deleted, left = list[CacheEntry](), list[CacheEntry]()
    for entry in entries:
        gone = _delete_features(entry) if entry.type == FEATURES else all(map(_unlink, entry.files))
        (deleted if gone else left).append(entry)
    return deleted, left


def filter_caches(entries: Iterable[CacheEntry], filters: Iterable[str]) -> list[CacheEntry]:
    """The entries that pass all filters, written as those of ``hf cache list``.

    Args:
        entries: caches that `scan_caches` returned.
        filters: texts such as ``size>1GB``, ``accessed>30d`` (not used for 30 days), ``modified<2h`` and
            ``type=features``.

    Raises:
        ValueError: a filter has another form.
    """
    now, kept = time.time(), list(entries)
    for text in filters:
        passes = _parse_filter(text, now)
        kept = [entry for entry in kept if passes(entry)]
    return kept


def sort_caches(entries: Iterable[CacheEntry], sort: str = "size") -> list[CacheEntry]:
    """The entries in an order, written as those of ``hf cache list``.

    Args:
        entries: caches that `scan_caches` returned.
        sort: ``accessed``, ``modified`` or ``size``, the newest or largest first, or ``name``; ``:asc`` or ``:desc``
            behind it sets the direction.

    Raises:
        ValueError: there is no such order.
    """
    key, _, direction = sort.partition(":")
    if key not in SORTED_BY or direction not in ("", "asc", "desc"):
        raise ValueError(f"sort={sort!r} is not one of {sorted(SORTED_BY)}, with :asc or :desc where wanted")
    return sorted(entries, key=SORTED_BY[key], reverse=(direction or ("asc" if key == "name" else "desc")) == "desc")


def beyond_size(entries: Iterable[CacheEntry], limit: str) -> list[CacheEntry]:
    """The entries to delete so that all others together take at most ``limit``, the longest unused ones first.

    Args:
        entries: caches that `scan_caches` returned.
        limit: size such as ``50GB``.

    Raises:
        ValueError: the size has another form.
    """
    left, most = sort_caches(entries, "accessed:asc"), parse_size(limit)
    total, gone = sum(entry.size for entry in left), list[CacheEntry]()
    for entry in left:
        if total <= most:
            break
        if not entry.in_use:
            gone.append(entry)
            total -= entry.size
    return gone


def parse_size(text: str) -> float:
    """Bytes of a size such as ``10GB``, in powers of 1000.

    Raises:
        ValueError: the size has another form.
    """
    match = AMOUNT.fullmatch(text.strip())
    unit = match[2].upper().removesuffix("B") if match else None
    if match is None or unit not in SIZES:
        raise ValueError(f"{text!r} is not a size; give a number and one of KB, MB, GB and TB, such as 10GB")
    return float(match[1]) * SIZES[unit]


def _parse_span_s(text: str) -> float:
    match = AMOUNT.fullmatch(text)
    if match is None or match[2].lower() not in SPANS_S:
        raise ValueError(f"{text!r} is not a time; give a number and one of {', '.join(SPANS_S)}, such as 30d")
    return float(match[1]) * SPANS_S[match[2].lower()]


def _parse_filter(text: str, now: float) -> Callable[[CacheEntry], bool]:
    match = FILTER.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a filter; give size, accessed, modified or type, one of {' '.join(COMPARISONS)}, and a "
            "value, such as 'size>1GB', 'accessed>30d' or 'type=features'"
        )
    key, compare, value = match[1], COMPARISONS[match[2]], match[3]
    if key == "type":
        kinds = CUTS, FEATURES, SIMILARITIES
        if match[2] not in ("=", "!=") or value not in kinds:
            raise ValueError(f"{text!r}: type can be = or != one of {', '.join(kinds)}")
        return lambda entry: compare(entry.type, value)
    if key == "size":
        size = parse_size(value)
        return lambda entry: compare(entry.size, size)
    span_s = _parse_span_s(value)
    return lambda entry: compare(now - getattr(entry, key), span_s)


def _files(kind: str) -> Iterator[CacheEntry]:
    """The files of cuts or similarities, and the temporary ones of jobs that were killed."""
    ending = ENDINGS[kind]
    for file in sorted(assets_folder(kind).iterdir()):
        if not _is_own(file, stat.S_ISREG):
            continue
        times = file.stat()
        if KEY.fullmatch(file.name.removesuffix(ending)) and file.name.endswith(ending):
            used = max(times.st_atime, times.st_mtime)
            yield CacheEntry(kind, file, (file,), times.st_size, used, times.st_mtime, _subject(file))
        elif TEMPORARY.fullmatch(file.name) and times.st_mtime < time.time() - TEMPORARY_SECONDS:
            yield _left_over(kind, file, [file])


def _features(folder: Path) -> Iterator[CacheEntry]:
    """What is complete in a folder of `FeatureCache`, and what killed jobs have left there."""
    abouts = {file: about for file in sorted(folder.glob("*.json")) if (about := _about(file)) is not None}
    busy = is_used(folder)
    if abouts:
        images = next(iter(abouts.values()))["images"]
        rows = [file.with_name(f"{file.stem}.bin") for file in abouts]
        times = max(file.stat().st_mtime for file in rows)
        used = max([times, *(file.stat().st_mtime for file in folder.glob(USED))])
        of = f"{', '.join(file.stem for file in abouts)}; {images} images"
        yield CacheEntry(FEATURES, folder, (*abouts, *rows), _size([*abouts, *rows]), used, times, of, in_use=busy)
    left = _left_in(folder, bool(abouts))
    if not busy and (left or (not abouts and (folder / USED).exists())):
        yield _left_over(FEATURES, folder, left)


def _left_in(folder: Path, ours: bool) -> list[Path]:
    """Files that a killed job has left in a folder of `FeatureCache`: the images put, and rows without a description.

    Args:
        folder: folder of the cache.
        ours: whether other files show that this is such a folder; if not, the images put do.
    """
    put = folder / PUT
    images = put.stat().st_size if _is_own(put, stat.S_ISREG) else int(ours)
    if not images:
        return []
    rows = [file for file in sorted(folder.glob("*.bin")) if not file.with_name(f"{file.stem}.json").exists()]
    rows = [file for file in rows if _is_own(file, stat.S_ISREG) and file.stat().st_size % images == 0]
    return [file for file in (put, *rows, *folder.glob(".*.tmp.json")) if _is_own(file, stat.S_ISREG)]


def _about(file: Path) -> dict[str, Any] | None:
    """The description of a feature's rows; None where it is of another identity than the folder, or has no rows."""
    rows = file.with_name(f"{file.stem}.bin")
    try:
        about = json.loads(file.read_text())
        identity = json.dumps(about["identity"], sort_keys=True)
        ours = hashlib.sha256(identity.encode()).hexdigest()[:12] == file.parent.name
        return about if ours and about["images"] and all(_is_own(f, stat.S_ISREG) for f in (file, rows)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _left_over(kind: str, path: Path, files: Sequence[Path]) -> CacheEntry:
    times = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
    return CacheEntry(kind, path, tuple(files), _size(files), times, times, "left by a job that was killed", False)


def _delete_features(entry: CacheEntry) -> bool:
    """Delete files of a feature cache, and its folder where nothing else is left; False where a job uses it."""
    with unused(entry.path) as free:
        if not free:
            return False
        order = sorted(entry.files, key=lambda file: file.suffix != ".json")  # rows without one are incomplete
        done = all([_unlink(file) for file in order])
        if not any(file.suffix in (".json", ".bin") for file in entry.path.iterdir()):
            for name in (USED, TURN, WRITING, PUT):
                _unlink(entry.path / name)
        with suppress(OSError):  # files that are not ours
            entry.path.rmdir()
    with suppress(OSError):
        if [file.name for file in entry.path.parent.iterdir()] == [GATE]:
            (entry.path.parent / GATE).unlink()
    return done


def _unlink(file: Path) -> bool:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _subject(file: Path) -> str:
    """What a file of cuts or similarities is of; files of earlier versions do not tell. Its times stay as they are."""
    times = file.stat()
    try:
        if file.suffix == ENDINGS[SIMILARITIES]:
            import numpy as np

            with np.load(file, allow_pickle=False) as data:
                return f"{data['of']}; {json.loads(str(data['settings'])).get('method', '')}".rstrip("; ")
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            return opened.metadata().get("of", "")
    except Exception:  # a damaged file, which its reader replaces, may fail in any way
        return ""
    finally:
        with suppress(OSError):
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _is_own(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is a file or folder, not a link, of the user of this process."""
    try:
        info = path.lstat()
    except OSError:
        return False
    return kind(info.st_mode) and (not hasattr(os, "getuid") or info.st_uid == os.getuid())
