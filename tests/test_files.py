"""Files are written whole or not at all."""

import json
import signal
import subprocess
import sys

import pytest

from restnet_hf.files import finish_folder, folder_written_whole, written_whole


def test_failed_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "sub" / "a.json"
    with written_whole(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), folder_written_whole(tmp_path / "out", "a") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_folder_replaces_files_and_keeps_others(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with folder_written_whole(out, "a", ours=("a", "one")) as folder:
            (folder / "a").write_text(text)
            (folder / text).write_text("")
    assert (out / "a").read_text() == "two"
    (out / "other").write_text("")
    assert sorted(path.name for path in out.iterdir()) == ["a", "other", "two"]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from restnet_hf.files import folder_written_whole

def write(target, last):
    writes = 0
    def count(event, arguments):
        nonlocal writes
        wrote = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if wrote or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            writes += 1
            if writes > last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    with folder_written_whole(target, "b", ours=("a", "b", "c")) as folder:
        for name in "bad":
            (folder / name).write_text("new")

codes = []
while not codes or codes[-1]:
    child = os.fork()
    if not child:
        write(Path(sys.argv[1]) / f"out{len(codes)}", len(codes))
        os._exit(0)
    codes.append(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""
OLD = {"a": "old", "b": "old", "c": "old", "other": "mine"}
NEW = {"a": "new", "b": "new", "d": "new", "other": "mine"}


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_killed_at_every_step(tmp_path):
    """Wherever the process dies, the reader finds all old files or all new ones, and goes by the first file."""
    for step in range(60):
        (tmp_path / f"out{step}").mkdir()
        for name, text in OLD.items():
            (tmp_path / f"out{step}" / name).write_text(text)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, capture_output=True, text=True)
    codes, seen = json.loads(done.stdout), []
    assert codes == [signal.SIGKILL] * (len(codes) - 1) + [0]
    for step in range(len(codes)):
        out = tmp_path / f"out{step}"
        first, half = (out / "b").read_text(), contents(out)
        finish_folder(out, "b")
        assert contents(out) == (NEW if first == "new" else OLD)
        seen.append((first, half in (OLD, NEW)))
        with folder_written_whole(out, "b", ours=("a", "b", "c")) as folder:  # the next save works
            for name in "bad":
                (folder / name).write_text("newest")
        assert contents(out) == {"a": "newest", "b": "newest", "d": "newest", "other": "mine"}
    assert seen[0] == ("old", True) and seen[-1] == ("new", True)
    assert ("new", False) in seen, "nothing was ever left half way, so this shows nothing"
    assert sum(first == "old" for first, _ in seen) > 5
