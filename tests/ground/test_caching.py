"""Marks on caches: every process sees that a job uses one, and what a killed job leaves is no mark."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import cached_assets_path

from restnet_hf import caching
from restnet_hf.caching import USE, USED, Use, is_used, note_use, record_folder, recorded_folders, unused


JOB = """
import sys
from pathlib import Path
from restnet_hf.caching import Use
use = Use(Path(sys.argv[1]))
print("uses", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache_dir" / "0123456789ab"


def test_a_mark_lasts_as_long_as_its_object(cache):
    first, second = Use(cache), Use(cache)
    assert is_used(cache)
    del first
    gc.collect()
    assert is_used(cache)
    del second
    gc.collect()
    assert not is_used(cache) and [file.name for file in cache.iterdir()] == [USED]


def test_nobody_begins_to_use_what_is_deleted(cache):
    use = Use(cache)
    with unused(cache) as free:
        assert not free
    del use
    gc.collect()
    with unused(cache) as free:
        assert free
        began = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caching, "GATE_SECONDS", 0.2)
            late = Use(cache)
            assert not is_used(cache) and time.monotonic() - began < 10
            with unused(cache) as twice:
                assert not twice
    del late


@pytest.fixture
def job(cache):
    with subprocess.Popen(
        [sys.executable, "-c", JOB, cache], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "uses\n"
        yield process
        process.kill()


@pytest.mark.parametrize("end", ["quits", "is killed"])
def test_another_process(cache, job, end):
    assert is_used(cache)
    if end == "quits":
        job.stdin.close()
    else:
        job.send_signal(signal.SIGKILL)
    job.wait(60)
    assert len([*cache.glob(f"{USE}*")]) == (end == "is killed")
    assert not is_used(cache) and not [*cache.glob(f"{USE}*")], "a mark that nobody holds is removed"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_does_not_take_the_mark_away(cache):
    use = Use(cache)
    child = os.fork()
    if not child:
        del use
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert is_used(cache)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="all may write everywhere")
def test_a_folder_to_read_from_has_no_mark(cache):
    cache.mkdir(parents=True)
    cache.parent.chmod(0o500)
    try:
        assert not is_used(cache) and Use(cache)
    finally:
        cache.parent.chmod(0o700)


def test_a_file_in_the_way_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert Use(tmp_path / "file" / "0123456789ab")


@pytest.fixture
def assets(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "cached_assets_path", partial(cached_assets_path, assets_dir=tmp_path / "assets"))
    return tmp_path / "assets"


def test_folders_are_remembered(tmp_path, assets):
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        record_folder(tmp_path / name)
    record_folder(Path("/a-disk-that-is-detached/features"))
    assert {*recorded_folders()} == {tmp_path / "a", tmp_path / "b"}
    (tmp_path / "b").rmdir()
    next(caching.assets_folder(caching.FEATURES).glob("*.json")).with_name("broken.json").write_text("[")
    assert recorded_folders() == [tmp_path / "a"]
    names = [file.read_text() for file in caching.assets_folder(caching.FEATURES).glob("*.json")]
    assert len(names) == 3 and any("detached" in name for name in names), "a, the detached one, and the broken file"


def test_a_list_that_cannot_be_written_is_no_error(tmp_path, assets):
    assets.write_text("a file in the way")
    record_folder(tmp_path)


def test_the_time_of_use_is_apart_from_that_of_writing(tmp_path):
    file = tmp_path / "x"
    file.write_text("")
    os.utime(file, (1e9, 1e9))
    note_use(file)
    assert file.stat().st_mtime == 1e9 and abs(file.stat().st_atime - time.time()) < 60
    note_use(tmp_path / "absent")


def test_marks_do_not_travel(cache):
    from restnet_hf.training.feature_cache import FeatureCache

    features = FeatureCache(cache.parent, {}, 1)
    features._mark_used()
    assert is_used(features.folder) and pickle.loads(pickle.dumps(features))._use is None
