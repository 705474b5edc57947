"""Write a file or a folder whole, or leave what was there before."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; the file written there takes its place if the block succeeds."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: str | os.PathLike[str], ours: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; its files move over when the block ends without error.

    A folder that did not exist appears in one rename. In one that did, each file is replaced by a rename of its own
    and files that were not written again stay, except those named in ``ours``, which would be stale.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give the name of a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target if target.exists() else target.parent  # on the same file system, also where a folder is a mount
    temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if not target.exists():
            os.rename(temporary, target)
        else:
            written = {file.name for file in temporary.iterdir()}
            for file in sorted(temporary.iterdir()):
                os.replace(file, target / file.name)
            for name in ours:
                if name not in written:
                    (target / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
