"""Folders and files that commands write: none is overwritten unasked, and what was written is listed."""

import shutil
import time
from collections.abc import Collection, Iterable
from pathlib import Path


CLOCK = 0.1  # seconds by which times of files may be behind


def check_output(path: Path, overwrite: bool, advice: str = "") -> None:
    """Raise FileExistsError where a file or a folder with files in it exists and must not be overwritten.

    Args:
        path: file or folder that a command will write.
        overwrite: whether the user asked to overwrite it.
        advice: what else the user may do, in addition to ``--overwrite`` and another ``--out``.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists already; give --overwrite to replace what is in it, {advice}or another --out"
        )


def remove_outputs(folder: Path, names: Iterable[str]) -> None:
    """Remove what an earlier run wrote to a folder, and nothing else in it.

    Args:
        folder: folder of the run.
        names: names of files and folders that such runs write.
    """
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Written:
    """What a command wrote to a folder since this object was made.

    Args:
        folder: folder that is written to.
        hidden: names that need not be listed.
    """

    def __init__(self, folder: Path, hidden: Collection[str] = ()) -> None:
        self.folder, self.hidden, self.began = folder, hidden, time.time() - CLOCK

    def names(self) -> list[str]:
        """Names of the files and, with a ``/``, of the folders that were written to."""
        return [
            path.name + ("/" if path.is_dir() else "")
            for path in sorted(self.folder.iterdir())
            if path.name not in self.hidden and self._is_new(path)
        ]

    def _is_new(self, path: Path) -> bool:
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        return any(file.stat().st_mtime >= self.began for file in files)

    def __str__(self) -> str:
        return f"written to {self.folder}: {', '.join(self.names())}"
