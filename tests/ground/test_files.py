"""Files and folders are written whole or not at all, and read as one save left them."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from versions import needs_safe_locks

from restnet_hf.files import SHA256, atomic_file, atomic_folder, checksums, complete_folder, read_folder


OURS = ("a", "b.json", "c")


def test_failed_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "sub" / "a.json"
    with atomic_file(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def save(out, text, names="ac", ours=OURS):
    with atomic_folder(out, "b.json", ours) as folder:
        (folder / "b.json").write_text(json.dumps({"text": text}))
        for name in names:
            (folder / name).write_text(text)


def contents(folder):
    """The files of a folder, without hidden folders in it; of the first one what was given."""
    found = {path.name: path.read_text() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}
    return found | {"b.json": json.loads(found["b.json"])["text"]} if "b.json" in found else found


def read(out):
    return read_folder(out, "b.json", contents)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_failed_folder_leaves_nothing(tmp_path, there):
    out = tmp_path / "out"
    if there:
        save(out, "old")
    with pytest.raises(RuntimeError), atomic_folder(out, "b.json") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert listing(tmp_path) == (["out"] if there else [])
    assert not there or contents(out) == {"a": "old", "b.json": "old", "c": "old"}


def test_folder_replaces_files_and_keeps_others(tmp_path):
    out = tmp_path / "out"
    save(out, "old")
    (out / "other").write_text("mine")
    save(out, "new", names="ad")
    assert contents(out) == {"a": "new", "b.json": "new", "d": "new", "other": "mine"}
    assert listing(out) == ["a", "b.json", "d", "other"] and listing(tmp_path) == ["out"]
    digests = json.loads((out / "b.json").read_text())[SHA256]
    assert digests == {name: hashlib.sha256(b"new").hexdigest() for name in "ad"}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file; give the name of a folder"):
        save(tmp_path / "out", "new")


def test_changed_by_hand(tmp_path):
    """Checksums decide only where a save was left half way: people may edit their files."""
    save(tmp_path, "old")
    (tmp_path / "a").write_text("edited")
    assert read(tmp_path)["a"] == "edited"


KILLED = """
import json, os, signal, sys
from pathlib import Path
from restnet_hf.files import atomic_folder

def write(target, last):
    writes = 0
    def count(event, arguments):
        nonlocal writes
        wrote = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if wrote or event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"):
            writes += 1
            if writes > last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    with atomic_folder(target, "b.json", ours=("a", "b.json", "c")) as folder:
        for name in ("d", "a"):
            (folder / name).write_text("new")
        (folder / "b.json").write_text('{"text": "new"}')

codes = []
while not codes or codes[-1]:
    child = os.fork()
    if not child:
        write(Path(sys.argv[1]) / f"out{len(codes)}", len(codes))
        os._exit(0)
    codes.append(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""
OLD = {"a": "old", "b.json": "old", "c": "old", "other": "mine"}
NEW = {"a": "new", "b.json": "new", "d": "new", "other": "mine"}


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_every_step(tmp_path, earlier):
    """Wherever the process dies, readers find all old files or all new ones, and the next save clears up.

    Args:
        earlier: the old files are of a version that wrote no checksums.
    """
    for step in range(80):
        out = tmp_path / f"out{step}"
        save(out, "old")
        (out / "other").write_text("mine")
        if earlier:
            (out / "b.json").write_text('{"text": "old"}')
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, capture_output=True, text=True)
    codes, seen = json.loads(done.stdout), []
    assert codes == [signal.SIGKILL] * (len(codes) - 1) + [0]
    for step in range(len(codes)):
        out = tmp_path / f"out{step}"
        before = snapshot(out)
        found, bare = read(out) | {"other": "mine"}, contents(out)
        assert found in (OLD, NEW)
        assert snapshot(out) == before, "reading has changed something"
        seen.append((found == NEW, bare in (OLD, NEW)))
        if step % 2:
            with pytest.raises(RuntimeError), atomic_folder(out, "b.json", OURS):
                raise RuntimeError  # a save that fails has still finished the one before
            assert contents(out) == found and listing(out) == sorted(found)
        save(out, "newest", names="ad")
        assert contents(out) == {"a": "newest", "b.json": "newest", "d": "newest", "other": "mine"}
        assert listing(out) == ["a", "b.json", "d", "other"] and f".{out.name}.lock" not in listing(tmp_path)
    assert seen[0] == (False, True) and seen[-1] == (True, True)
    assert (True, False) in seen, "nothing was ever left half way, so this shows nothing"
    assert sum(not new for new, _ in seen) > 5


def test_killed_before_the_folder_was_there(tmp_path):
    """The temporary folder of a first save goes with the next one to the same place, and no other."""
    for name in (".out.abc.new", ".other.abc.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("half")
    save(tmp_path / "out", "new")
    assert listing(tmp_path) == [".other.abc.new", "out"]


def write_many(out, number, stop):
    turn = 0
    while not stop.is_set():
        save(out, f"{number}-{turn}" * 2000, names="a" if turn % 3 else "ac")
        turn += 1
    return turn


def read_many(out, stop):
    """How often files of two saves came together, of how many reads."""
    mixed = total = 0
    while not stop.is_set():
        found = read(out)
        mixed += len(set(found.values())) != 1 or not {"a", "b.json"} <= found.keys()
        total += 1
    return mixed, total


@needs_safe_locks
def test_two_writers_and_two_readers(tmp_path):
    """In processes of their own: no save fails, no read fails, none is of two saves."""
    out = tmp_path / "out"
    save(out, "0-0")
    with (
        multiprocessing.get_context("spawn").Manager() as manager,
        multiprocessing.get_context("fork").Pool(4) as pool,
    ):
        stop = manager.Event()
        writers = [pool.apply_async(write_many, (out, number, stop)) for number in range(2)]
        readers = [pool.apply_async(read_many, (out, stop)) for _ in range(2)]
        time.sleep(3)
        stop.set()
        turns = [writer.get(60) for writer in writers]
        counts = [reader.get(60) for reader in readers]
    assert min(turns) > 5 and min(total for _, total in counts) > 5
    assert [mixed for mixed, _ in counts] == [0, 0]
    assert listing(tmp_path) == ["out"] and not [name for name in listing(out) if name[0] == "."]


def test_a_folder_that_never_rests(tmp_path, monkeypatch):
    monkeypatch.setattr("restnet_hf.files.WAITS_S", (0.0, 0.0))
    save(tmp_path, "old")

    def interrupted(folder):
        save(tmp_path, "other")
        return contents(folder)

    with pytest.raises(OSError, match="was written to by other processes during all of 2 attempts"):
        read_folder(tmp_path, "b.json", interrupted)


def test_errors_of_a_folder_that_rests_come_out(tmp_path):
    save(tmp_path, "old")
    calls = []

    def broken(folder):
        calls.append(folder)
        raise KeyError("damaged")

    with pytest.raises(KeyError, match="damaged"):
        read_folder(tmp_path, "b.json", broken)
    assert calls == [tmp_path]


def test_a_read_only_folder_that_is_half_way(tmp_path):
    half_way(tmp_path)
    for path in (*tmp_path.rglob("*"), tmp_path):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert read(tmp_path) == {"a": "new", "b.json": "new"}


def half_way(out):
    """A folder whose save was killed right after it counted."""
    save(out, "old")
    save(out.with_name(f"{out.name}-new"), "new", names="a")
    pending = out / ".x.pending"
    shutil.move(out.with_name(f"{out.name}-new"), pending)
    shutil.copy(pending / "b.json", out / "b.json")
    return pending


def save_inside(out, text, name="model/data/x"):
    """A save with a file in a folder inside the folder."""
    with atomic_folder(out, "b.json") as folder:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        (folder / "b.json").write_text("{}")


def read_inside(folder):
    return (folder / "model/data/x").read_text()


def test_files_in_folders_inside(tmp_path):
    """They have checksums by their path, are replaced with the others, and other files beside them stay."""
    out = tmp_path / "out"
    save_inside(out, "old")
    (out / "model" / "mine").write_text("mine")
    save_inside(out, "new")
    assert read_folder(out, "b.json", read_inside) == "new" and (out / "model" / "mine").read_text() == "mine"
    digests = checksums((out / "b.json").read_bytes())
    assert digests == {"model/data/x": hashlib.sha256(b"new").hexdigest()}
    assert (out / "model").stat().st_mode & 0o777 == 0o755 and listing(out) == ["b.json", "model"]


def test_a_save_of_folders_inside_that_was_killed(tmp_path):
    """Readers take the new files at once, and the next save finishes it."""
    out = tmp_path / "out"
    save_inside(out, "old")
    save_inside(tmp_path / "new", "new")
    pending = out / ".x.pending"
    shutil.move(tmp_path / "new", pending)
    shutil.copy(pending / "b.json", out / "b.json")
    assert read_inside(out) == "old" and read_folder(out, "b.json", read_inside) == "new"
    (pending / "model/data/x").write_text("evil")
    assert complete_folder(out, "b.json") == out
    (pending / "model/data/x").write_text("new")
    shutil.move(pending / "model", tmp_path / "model")
    (pending / "model").symlink_to(tmp_path / "model")
    assert complete_folder(out, "b.json") == out
    (pending / "model").unlink()
    shutil.move(tmp_path / "model", pending / "model")
    save(out, "newer", ours=())
    assert read_inside(out) == "new" and listing(out) == ["a", "b.json", "c", "model"]


def test_a_link_in_the_place_of_a_folder_inside(tmp_path):
    """It is replaced, and what it leads to stays as it is."""
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    out.mkdir()
    (out / "model").symlink_to(home)
    save_inside(out, "new")
    assert not (out / "model").is_symlink() and read_inside(out) == "new" and not listing(home)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//x", "./x", "a/./x", "a/.b", "a/", "", "a\\b", "c:/x"])
def test_names_that_lead_out_of_the_folder(name):
    assert not checksums(json.dumps({SHA256: {name: "0"}}).encode())
    assert checksums(json.dumps({SHA256: {"a/b.c/d": "0"}}).encode())


def test_another_process_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("restnet_hf.files.LOCK_SECONDS", 0.1)
    with atomic_folder(tmp_path / "out", "b.json") as folder:
        (folder / "b.json").write_text("{}")
        with pytest.raises(BlockingIOError, match="another process has held .*; end it, or save to another folder"):
            save(tmp_path / "out", "new")
    assert listing(tmp_path) == ["out"]


def snapshot(folder):
    """Everything in a folder: kind, content, and when it was changed."""
    return {
        path.relative_to(folder).as_posix(): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
        for path in folder.rglob("*")
    }


INSIDE = ("other/x", "linked/mine", "linked/x", "sub/x")  # where `other` is a file and `linked` a link
NAMES = st.sampled_from(
    [
        "a",
        "c",
        "../precious",
        "/etc/precious",
        "other",
        ".hidden",
        "",
        "b.json",
        "x/y",
        ".",
        "x/../../precious",
        *INSIDE,
    ]
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_pending_folders(tmp_path_factory, data):
    """Whatever lies hidden in a folder, reading changes nothing, and saving nothing that is not ours."""
    root = tmp_path_factory.mktemp("hostile")
    out, home = root / "out", root / "home"
    home.mkdir()
    (home / "mine").write_text("precious")
    (root / "precious").write_text("precious")
    save(out, "old")
    (out / "other").write_text("mine")
    (out / "linked").symlink_to(home)
    name = data.draw(st.sampled_from([".x.pending", ".x.whole", ".pending", ".out.y.new", ".x.tmp"]))
    hidden = out / name
    if data.draw(st.booleans()):
        hidden.symlink_to(home)
    else:
        hidden.mkdir()
        for stale in (".stale", "b.json"):
            (hidden / stale).write_text("\n".join(data.draw(st.lists(NAMES, max_size=3))))
        listed = data.draw(st.dictionaries(NAMES, st.just(hashlib.sha256(b"evil").hexdigest()), max_size=3))
        if data.draw(st.booleans()):  # the visible file says the same as the hidden one
            for place in (out, hidden):
                (place / "b.json").write_text(json.dumps({"text": "evil", SHA256: listed}))
        for each in listed:
            if each in ("a", "c", "other", ".hidden"):
                place = hidden / each
                place.symlink_to(home / "mine") if data.draw(st.booleans()) else place.write_text("evil")
            elif each in INSIDE and not os.path.lexists((hidden / each).parent):
                if data.draw(st.booleans()):
                    (hidden / each).parent.symlink_to(home)
                else:
                    (hidden / each).parent.mkdir()
                    (hidden / each).write_text("evil")
    outside, before = (snapshot(home), (root / "precious").read_text()), snapshot(root)
    read(out)
    assert snapshot(root) == before
    save(out, "new")
    assert (snapshot(home), (root / "precious").read_text()) == outside
    assert os.readlink(out / "linked") == str(home)
    assert contents(out) == {"a": "new", "b.json": "new", "c": "new", "other": "mine"}


@pytest.mark.parametrize(
    "change", ["link to the folder", "link to a file", "other content", "file missing", "no names"]
)
def test_what_a_pending_folder_must_be(tmp_path, change):
    pending = half_way(tmp_path / "out")
    out = pending.parent
    assert complete_folder(out, "b.json") == pending
    if change == "link to the folder":
        shutil.move(pending, tmp_path / "elsewhere")
        pending.symlink_to(tmp_path / "elsewhere")
    elif change == "link to a file":
        (tmp_path / "a").write_text("new")
        (pending / "a").unlink()
        (pending / "a").symlink_to(tmp_path / "a")
    elif change == "other content":
        (pending / "a").write_text("evil")
    elif change == "file missing":
        (pending / "a").unlink()
    else:
        for place in (out, pending):
            (place / "b.json").write_text('{"text": "new"}')
    assert complete_folder(out, "b.json") == out


FULL = """
import json, resource, sys
from pathlib import Path
import torch
from conftest import make_anchor
from safetensors.torch import save_file
from restnet_hf import StitchedModelForImageClassification
from restnet_hf.files import atomic_file

def model():
    return StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), make_anchor("vit"), order="given")

folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # no file can be larger, as on a disk with no more room
full = model()  # found cuts cannot be kept, which does not matter
full.add_stitch("resnet[:2] + vit[1:]")
images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
full.select_stitches(images, max_routes=1)
said = []
for act in (
    lambda: full.save_pretrained(folder / "adapter"),
    lambda: save(folder / "one.safetensors"),
):
    def save(path):
        with atomic_file(path) as temporary:
            save_file({"x": torch.zeros(1000)}, temporary)
    try:
        act()
    except OSError as error:
        said.append(str(error))
print(json.dumps([said, sorted(path.name for path in folder.iterdir())]))
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """What was to be saved is an OSError and leaves nothing; what was only to be cached is left out."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_ASSETS_CACHE": str(tmp_path / "assets")}
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path / "out")],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (adapter, one), left = json.loads(done.stdout.splitlines()[-1])
    assert "File too large" in adapter
    assert "one.safetensors cannot be written" in one and "free some disk space" in one
    assert left == []
    assert not [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]
