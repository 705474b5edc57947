"""Sources of models and images: tell a local path that does not exist from an id on the Hub."""

import os
from collections.abc import Iterable
from pathlib import Path


PREFIXES = ("hf_hub:", "hf-hub:", "local-dir:")  # of timm


def local_path(source: str | os.PathLike[str]) -> Path:
    """The path that a source is, if it is one, without timm's prefix and with ``~`` expanded."""
    text = os.fspath(source)
    for prefix in PREFIXES:
        text = text.removeprefix(prefix)
    return Path(text).expanduser()


def is_path(source: str | os.PathLike[str]) -> bool:
    """Whether a source can only be a local path: ids on the Hub are ``name`` or ``owner/name``."""
    text = os.fspath(source)
    if not isinstance(source, str) or text.startswith(("/", ".", "~", "local-dir:")) or os.path.isabs(text):
        return True
    return "\\" in text or ("://" not in text and text.count("/") > 1)


def check_paths(sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raise FileNotFoundError where sources can only be local paths and do not exist; all of them are named.

    Args:
        sources: Hub ids or local paths.
    """
    missing = [os.fspath(source) for source in sources if is_path(source) and not local_path(source).exists()]
    if missing:
        raise FileNotFoundError(f"there is no such folder: {', '.join(missing)} (in {Path.cwd()})")


def note_missing(sources: Iterable[str | os.PathLike[str]]) -> str:
    """A sentence for errors of the Hub: which of the sources may have been meant as folders, and are none.

    Args:
        sources: Hub ids or local paths.
    """
    names = [
        repr(os.fspath(source))
        for source in sources
        if not local_path(source).exists() and local_path(source).parent.is_dir()
    ]
    return f" There is no folder {' or '.join(names)} in {Path.cwd()} either." if names else ""
