"""restnet-hf cache lists what this package keeps on disk, and removes nothing that is not its own or in use."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import cached_assets_path
from typer.testing import CliRunner

from restnet_hf import caching
from restnet_hf.caches import beyond_size, filter_caches, parse_size, scan_caches, sort_caches
from restnet_hf.cli import app
from restnet_hf.selection.cache import read_similarity, write_similarity
from restnet_hf.selection.ranking import Similarity
from restnet_hf.training.feature_cache import FeatureCache


DAY = 86400
SPECS = {"front-a-1": ((2, 3), torch.float16), "labels": ((), torch.int64)}
KEY = "ab" * 32


def run(*words, **options):
    result = CliRunner().invoke(app, ["cache", *map(str, words)], **options)
    return result.exit_code, " ".join(result.output.split())


def age(path, days, read_days=None):
    """Set when a cache was written and, if given, last used."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix]
    for file in files:
        os.utime(file, (time.time() - DAY * days,) * 2)
    if path.is_file():
        os.utime(path, (time.time() - DAY * (read_days or days), time.time() - DAY * days))
    else:
        (path / caching.USED).touch()
        os.utime(path / caching.USED, (time.time() - DAY * (read_days or days),) * 2)


def fill(folder, identity, images=4):
    cache = FeatureCache(folder, {"network": identity}, images)
    with cache.write(SPECS) as rows:
        rows.put(0, {"front-a-1": torch.ones(images, 2, 3), "labels": torch.zeros(images, dtype=torch.int64)})
    return cache


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Two feature caches of a recorded folder, a similarity, and cuts; names and paths."""
    monkeypatch.setattr(caching, "cached_assets_path", partial(cached_assets_path, assets_dir=tmp_path / "assets"))
    found = {name: fill(tmp_path / "features", name).folder for name in ("old", "new")}
    gc.collect()
    caching.record_folder(tmp_path / "features")
    found["similarity"] = caching.assets_folder(caching.SIMILARITIES) / f"{KEY}.npz"
    values = np.ma.masked_array(np.ones((2, 2)), np.zeros((2, 2), bool))
    write_similarity(Similarity("a", "b", values, {"method": "cka"}), found["similarity"])
    age(found["old"], 40), age(found["new"], 40, 3), age(found["similarity"], 20)
    return found


def test_list(caches):
    code, text = run("list")
    assert code == 0 and text.startswith("3 caches, ")
    assert "front-a-1, labels; 4" in text and "a, b; cka" in text and "40 d" in text and "20 d" in text
    code, text = run("list", "--quiet", "--sort", "accessed:asc")
    assert text.split() == [str(caches[name]) for name in ("old", "similarity", "new")]
    code, text = run("list", "--json", "-f", "type=features", "--limit", 1)
    (row,) = json.loads(text)
    size = sum(file.stat().st_size for file in caches["old"].iterdir())
    assert row["size"] == size and row["type"] == "features" and row["complete"] and not row["in_use"]


def test_listing_is_no_use(caches):
    """Each look at the files would else make them young."""
    before = {entry.path: entry.accessed for entry in scan_caches()}
    run("list"), run("list")
    assert {entry.path: entry.accessed for entry in scan_caches()} == before
    assert read_similarity(caches["similarity"], "a", "b") is not None
    (used,) = filter_caches(scan_caches(), ["type=similarities"])
    assert time.time() - used.accessed < 60 and time.time() - used.modified > 19 * DAY


FILTERS = {
    "accessed>30d": ["old"],
    "accessed<1w": ["new"],
    "modified>30d": ["new", "old"],
    "size<1KB": [],
    "size>=1KB": ["new", "old", "similarity"],
    "type!=features": ["similarity"],
    "type = features": ["new", "old"],
}


@pytest.mark.parametrize("text", FILTERS)
def test_filters(caches, text):
    names = {path: name for name, path in caches.items()}
    found = sorted(names[entry.path] for entry in filter_caches(scan_caches(), [text]))
    if text.startswith("size"):
        sizes = {entry.path: entry.size for entry in scan_caches()}
        compare = (lambda size: size < 1000) if "<" in text else (lambda size: size >= 1000)
        assert found == sorted(names[path] for path, size in sizes.items() if compare(size)) != []
    else:
        assert found == FILTERS[text]


@pytest.mark.parametrize(
    "text", ["size>", "size>1XB", "size>big", "age>1d", "accessed>1", "type>features", "type=models", "size"]
)
def test_wrong_filters(caches, text):
    code, printed = run("list", "-f", text)
    assert code == 1 and "error:" in printed and ("such as" in printed or "can be" in printed)
    code, printed = run("prune", "-f", text, "--yes")
    assert code == 1 and all(path.exists() for path in caches.values())


def test_sizes_and_orders():
    assert [parse_size(text) for text in ("10", "1KB", "1.5 mb".replace(" ", ""), "2G", "1TB")] == [
        10, 1e3, 1.5e6, 2e9, 1e12,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="sort='age' is not one of"):
        sort_caches([], "age")
    with pytest.raises(ValueError, match="sort='size:up' is not one of"):
        sort_caches([], "size:up")


def test_prune_by_age(caches):
    assert run("prune", "-f", "accessed>30d", "--dry-run")[1].endswith("nothing was removed")
    assert run("prune", "-f", "accessed>30d", input="n\n")[1].endswith("nothing was removed")
    assert caches["old"].exists()
    code, text = run("prune", "-f", "accessed>30d", "--yes")
    assert code == 0 and "removed 1 of 1" in text
    assert not caches["old"].exists() and caches["new"].exists() and caches["similarity"].exists()
    FeatureCache(caches["new"].parent, {"network": "new"}, 4).verify()


def test_prune_by_size(caches):
    """The longest unused go first, and only as many as must."""
    sizes = {entry.path: entry.size for entry in scan_caches()}
    gone = beyond_size(scan_caches(), f"{sizes[caches['new']] + sizes[caches['similarity']]}")
    assert [entry.path for entry in gone] == [caches["old"]]
    run("prune", "--max-size", "0", "--filter", "type=features", "--yes")
    assert not caches["old"].exists() and not caches["new"].exists() and caches["similarity"].exists()
    assert not any(caches["old"].parent.iterdir())
    assert run("list", "-q")[1] == str(caches["similarity"])


def test_prune_alone_removes_no_cache(caches):
    assert run("prune", "--yes") == (0, "nothing to remove")


def test_what_a_job_uses_stays(caches):
    reader = FeatureCache(caches["old"].parent, {"network": "old"}, 4)
    reader[0]
    code, text = run("prune", "-f", "size>0B", "--yes")
    assert code == 0 and f"a job uses {caches['old']}, so it stays".replace(" ", "") in text.replace(" ", "")
    assert not caches["new"].exists() and not caches["similarity"].exists()
    reader.verify()
    assert "(in use)" in run("list")[1]
    del reader
    gc.collect()
    run("prune", "-f", "size>0B", "--yes")
    assert not caches["old"].exists()


def test_what_is_being_written_stays(caches):
    cache = FeatureCache(caches["old"].parent, {"network": "next"}, 4)
    with cache.write(SPECS) as rows:
        run("prune", "-f", "size>0B", "--yes")
        rows.put(0, {"front-a-1": torch.ones(4, 2, 3), "labels": torch.zeros(4, dtype=torch.int64)})
    cache.verify()
    assert not caches["old"].exists()


KILLED = """
import os, sys, torch
from restnet_hf.training.feature_cache import FeatureCache
cache = FeatureCache(sys.argv[1], {"network": sys.argv[2]}, 4)
with cache.write({"more": ((5,), torch.float32)}) as rows:
    rows.put(0, {"more": torch.ones(2, 5)})
    os._exit(9)
"""


@pytest.mark.parametrize("identity", ["old", "another"])
def test_what_a_killed_job_left_is_removed(caches, identity):
    folder = caches["old"].parent
    assert subprocess.run([sys.executable, "-c", KILLED, folder, identity]).returncode == 9
    left = [entry for entry in scan_caches() if not entry.complete]
    assert [entry.size for entry in left] == [4 * 5 * 4 + 4] and left[0].of == "left by a job that was killed"
    code, text = run("prune", "--yes")
    assert code == 0 and "removed 1 of 1" in text
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {caches["old"].name, caches["new"].name}
    assert not [*folder.rglob("more.bin")] and all(entry.complete for entry in scan_caches())
    FeatureCache(folder, {"network": "old"}, 4).verify()


def test_files_of_others_stay(caches, tmp_path):
    """Notes in our folder, folders that look like ours, links, and a description of another identity."""
    folder = caches["old"].parent
    (caches["old"] / "notes.txt").write_text("mine")
    shutil.copytree(caches["old"], folder / "0123456789ab")  # its identity has another hash
    (folder / "0123456789ab" / caching.PUT).unlink(missing_ok=True)
    (folder / "fedcba987654").mkdir()
    (folder / "fedcba987654" / "weights.bin").write_text("theirs")
    (folder / "fedcba987654" / caching.WRITING).write_text("")
    (folder / "photos").mkdir()
    elsewhere = tmp_path / "elsewhere"
    caches["new"].rename(elsewhere)
    caches["new"].symlink_to(elsewhere)
    assets = caches["similarity"].parent
    (assets / "mine.npz").write_text("mine")
    run("prune", "-f", "size>=0B", "--yes")
    assert [file.name for file in caches["old"].iterdir()] == ["notes.txt"]
    kept = ["0123456789ab/front-a-1.bin", "fedcba987654/weights.bin", "photos", caches["new"].name]
    assert all((folder / name).exists() for name in kept) and (elsewhere / "labels.bin").exists()
    assert [file.name for file in assets.iterdir()] == ["mine.npz"]


def test_a_folder_that_nothing_recorded(caches, tmp_path):
    other = fill(tmp_path / "disk", "far").folder
    assert str(other) not in run("list", "-q")[1]
    assert str(other) in run("list", "-q", "--cache-dir", tmp_path / "disk")[1].split()
    code, text = run("list", "--cache-dir", tmp_path / "none")
    assert code == 1 and "give the cache_dir of a training" in text


def test_temporary_files_of_killed_jobs(caches):
    assets = caches["similarity"].parent
    for name, seconds in ((f".{KEY}.npz.0a0a0a0a.tmp.npz", 2 * 3600), (f".{KEY}.npz.0b0b0b0b.tmp.npz", 10)):
        (assets / name).write_text("half")
        os.utime(assets / name, (time.time() - seconds,) * 2)
    run("prune", "--yes")
    assert {file.name for file in assets.iterdir()} == {caches["similarity"].name, f".{KEY}.npz.0b0b0b0b.tmp.npz"}


def test_where_it_is_home(caches, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: caches["old"].parents[1])
    assert f"~/features/{caches['old'].name}" in run("list")[1].replace(" ", "")


def test_no_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "cached_assets_path", partial(cached_assets_path, assets_dir=tmp_path))
    assert run("list") == (0, "no caches") and run("prune", "-f", "size>1MB") == (0, "nothing to remove")
