"""Write a file or a folder whole, or leave what was there before."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


WHOLE = ".whole"  # the end of the name of a folder inside another whose files are complete and move over
STALE = ".stale"  # a file in it: which names of the old folder go


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
def folder_written_whole(path: str | os.PathLike[str], first: str, ours: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder; its files take their places in ``path`` when the block ends without error.

    A folder that did not exist appears in one rename. In one that did, the files move over one by one, ``first``
    before the others. A process that is killed before that leaves the old files; one that is killed after it leaves
    the rest to `finish_folder`, so that readers who call it see all old files or all new ones.

    Args:
        path: the folder.
        first: a file that is always written, and read before the others.
        ours: files that would be stale if they are not written again; all others stay.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give the name of a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    finish_folder(target, first)
    new = not target.exists()
    place = target.parent if new else target  # on the same file system, also where a folder is a mount
    temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if new:
            os.rename(temporary, target)
            return
        (temporary / STALE).write_text("\n".join(name for name in ours if not (temporary / name).exists()))
        os.rename(temporary, temporary := temporary.with_name(temporary.name + WHOLE))
        os.replace(temporary / first, target / first)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finish_folder(target, first)


def finish_folder(path: str | os.PathLike[str], first: str) -> None:
    """Move over what a process that was killed in `folder_written_whole` has left, if ``first`` had moved already."""
    target = Path(path)
    for folder in sorted(target.glob(f".*{WHOLE}")):
        if (folder / first).exists():  # the old files are all there
            continue
        for file in sorted(folder.iterdir()):
            with suppress(FileNotFoundError):  # another process is at it too
                if file.name == STALE:
                    for name in file.read_text().splitlines():
                        (target / name).unlink(missing_ok=True)
                    file.unlink()
                else:
                    os.replace(file, target / file.name)
        shutil.rmtree(folder, ignore_errors=True)
