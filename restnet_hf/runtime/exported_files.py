"""The files of an exported folder, which is untrusted: all are checked before they are used."""

import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from restnet_hf.errors import quote, shorten
from restnet_hf.files import PLAIN_NAME, SHA256, checksums, sha256_of
from restnet_hf.limits import MAX_SIDE, MAX_VALUE, MIN_STD, is_mean, is_side, is_std
from restnet_hf.limits import read_json as read_limited
from restnet_hf.routes.profile import Profile
from restnet_hf.routes.route import Route
from restnet_hf.runtime.pixels import INPUT, PIXELS
from restnet_hf.runtime.runners import RUNTIMES, MissingRuntimeError


PROFILE, LABELS, PREPROCESSING, EXAMPLE = "profile.json", "labels.json", "preprocessing.json", "run.py"
MAX_BATCH = 4096  # images in a run; programs for any number of images take up to 1,024
MAX_NAME = 255  # bytes of a file's name on the usual file systems
MAX_MESSAGE = 500  # characters of what a file or a runtime adds to an error


@contextmanager
def documented_errors(what: str) -> Iterator[None]:
    """Raise errors of the block as OSError, ValueError or MissingRuntimeError, with at most `MAX_MESSAGE` characters.

    Args:
        what: file or failed action, for the message.
    """
    try:
        yield
    except (OSError, MissingRuntimeError):
        raise
    except Exception as error:  # runtimes and parsers have errors of no common kind
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{shorten(str(error), MAX_MESSAGE)}") from (
            error if len(str(error)) <= MAX_MESSAGE else None
        )


def checked_path(folder: Path, name: Any) -> Path:
    """The path of a file that lies in the folder, or in a folder inside it.

    Files of a snapshot in the Hub's cache are links into that cache, which are followed; no other links are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name leads out of the folder, or is not that of a file.
    """
    plain = isinstance(name, str) and PLAIN_NAME.fullmatch(name)
    if not plain or any(len(part.encode()) > MAX_NAME for part in name.split("/")):
        raise ValueError(f"{folder} names the file {quote(name)}, which is not in the folder")
    path = folder / name
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would not end
        raise ValueError(f"{path} is not a file")
    blobs = {(each.parent / "blobs").resolve() for each in folder.absolute().parents if each.name == "snapshots"}
    if not path.resolve().is_relative_to(folder.resolve()) and path.resolve().parent not in blobs:
        raise ValueError(f"{path} is a link to {path.resolve()}, which is not in the folder")
    return path


def read_json(folder: Path, name: str, kind: type) -> Any:
    """Read a JSON file of the folder.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON of that kind, or is too large.
    """
    path = checked_path(folder, name)
    try:
        value = read_limited(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a {kind.__name__}, not a {type(value).__name__}")
    return value


def read_profile(folder: Path) -> Profile:
    """Read the folder's profile, whose metadata name how its routes run; all is checked but the files' contents.

    Raises:
        OSError: the profile cannot be read.
        ValueError: the file is not the profile of an exported folder.
    """
    data = read_json(folder, PROFILE, dict)
    with documented_errors(str(folder / PROFILE)):
        profile = Profile.from_dict(data)
        metadata = profile.metadata
        runtime = metadata.get("runtime")
        if not isinstance(runtime, str) or runtime not in RUNTIMES:
            raise ValueError(f"it names runtime {quote(runtime)}, not one of {sorted(RUNTIMES)}")
        if not isinstance(metadata.get("precision"), str):
            raise ValueError(f"precision={metadata.get('precision')!r} must be text")
        if metadata.get(INPUT, PIXELS) != PIXELS:
            raise ValueError(f"{INPUT}={quote(metadata[INPUT])} must be '{PIXELS}', or left out")
        for key, most in (("batch_size", MAX_BATCH), ("threads", 2**16)):
            _check_count(key, metadata.get(key), most)
        entries = metadata.get("files")
        if not isinstance(entries, dict) or not entries:
            raise ValueError("it does not name a file for each of its routes; export them again")
        parts, stages = metadata.get("parts", {}), metadata.get("stages", {})
        if not isinstance(parts, dict) or not isinstance(stages, dict):
            raise ValueError(f"its parts and stages must be named, not {quote(parts)} and {quote(stages)}")
        for name, entry in (*entries.items(), *parts.items()):
            _check_entry(folder, name, entry, runtime)
        if {str(row.route) for row in profile.cascades} != stages.keys() or parts.keys() & entries.keys():
            raise ValueError("it does not name the stages of each of its cascades; export them again")
        if {row.route for row in profile.routes} != set(map(Route.parse, entries)):
            raise ValueError("it does not name a file for each of its routes; export them again")
        active = metadata.get("active")  # folders of earlier versions have none
        if active is not None and (not isinstance(active, str) or active not in {*entries, *stages}):
            raise ValueError(f"its active route {quote(active)} is not one of its routes")
    return profile


def _check_count(name: str, value: Any, most: int) -> None:
    """Raise ValueError where a value is neither None nor a whole number in range."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
        raise ValueError(f"{name}={value!r} must be null or a whole number from 1 to {most}")


def _check_entry(folder: Path, name: str, entry: Any, runtime: str) -> None:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError(f"the entry of route {quote(name)} must hold names and text, not {quote(entry)}")
    for key in sorted({"file", "graph", "weights"} & entry.keys()):
        checked_path(folder, entry[key])
    for key, pattern in RUNTIMES[runtime].fields.items():
        if not re.fullmatch(pattern, entry.get(key, "")):
            raise ValueError(
                f"the entry of route {quote(name)} has {key}={quote(entry.get(key))}, which must be of the "
                f"form {pattern} for runtime '{runtime}'"
            )


def read_labels(folder: Path) -> list[str]:
    """Read the names of the classes.

    Raises:
        OSError: the names cannot be read.
        ValueError: the names are not a list of text.
    """
    labels = read_json(folder, LABELS, list)
    for label in labels:
        if not isinstance(label, str):
            raise ValueError(f"{folder / LABELS} has {quote(label)} among its labels, which must be text")
    if not labels:
        raise ValueError(f"{folder / LABELS} has no labels")
    return labels


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """Read the settings of `prepare_image`.

    Raises:
        OSError: the settings cannot be read.
        ValueError: a field is missing or invalid.
    """
    settings = read_json(folder, PREPROCESSING, dict)
    with documented_errors(str(folder / PREPROCESSING)):
        for name, value in (("resize", settings.get("resize")), ("crop", settings.get("crop"))):
            single = name == "resize" and is_side(value)
            none = name == "crop" and value is None
            pair = isinstance(value, list) and len(value) == 2 and all(map(is_side, value))
            if not (single or none or pair):
                raise ValueError(f"{name}={value!r} must be height and width, each from 1 to {MAX_SIDE} pixels")
        names = [each.name.lower() for each in Image.Resampling]
        resample = settings.get("resample")
        if not isinstance(resample, str) or resample.lower() not in names:
            raise ValueError(f"resample={resample!r} is not one of {names}")
        for name, least, is_valid in (("mean", -MAX_VALUE, is_mean), ("std", MIN_STD, is_std)):
            if not is_valid(settings.get(name)):
                raise ValueError(
                    f"{name}={settings.get(name)!r} must be three numbers from {least:g} to {MAX_VALUE:g}"
                )
    return settings


def image_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of prepared images; None where they depend on the image."""
    size = settings["crop"] if settings["crop"] is not None else settings["resize"]
    return None if isinstance(size, int) else (size[0], size[1])


def exported_checksums(profile: bytes) -> dict[str, str]:
    """SHA-256 by name of each file that `ExportedModel` reads; none for folders of earlier versions.

    Args:
        profile: content of the file `PROFILE`.
    """
    # people change their scripts
    return {name: digest for name, digest in checksums(profile).items() if name != EXAMPLE}


def verify_files(folder: Path, names: Iterable[str], digests: Mapping[str, str]) -> None:
    """Compare files with their checksums.

    Args:
        folder: folder that holds the files.
        names: names of the files to compare; files without a checksum are left out.
        digests: SHA-256 of files by name.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not as it was exported.
    """
    for name in names:
        if name in digests and sha256_of(checked_path(folder, name)) != digests[name]:
            raise ValueError(
                f"{folder / name} is not the file that was exported: it is damaged, or of another export. Export or "
                f"copy the folder again, or if you changed the file yourself, remove its entry in '{SHA256}' of "
                f"{PROFILE}"
            )
