"""What a cache holds is computed again when any code that it depends on changes, or the version of a library."""

import shutil

import pytest

from restnet_hf import hashing
from restnet_hf.anchors import cut_cache
from restnet_hf.selection import cache as similarity_cache


CACHES = {
    "cuts": (cut_cache, {"anchors", "data"}),
    "similarities": (similarity_cache, {"anchors", "data", "stitches", "selection", "steps.py"}),
}


@pytest.fixture
def key(monkeypatch):
    """The key of a cache's software, computed anew."""

    def compute(cache):
        hashing.software_sha256.cache_clear()
        return hashing.software_sha256(cache.LIBRARIES, cache.CODE)

    yield compute
    hashing.software_sha256.cache_clear()


@pytest.mark.parametrize("name", CACHES)
def test_every_file_that_matters_changes_the_key(package, tmp_path, monkeypatch, key, name):
    copy = tmp_path / "restnet_hf"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    monkeypatch.setattr(hashing, "__file__", str(copy / "hashing.py"))
    cache, rooms = CACHES[name]
    keys, changed = [key(cache)], 0
    for file in sorted(copy.rglob("*.py")):
        file.write_text(file.read_text() + "# changed\n")
        keys.append(key(cache))
        matters = file.relative_to(copy).parts[0] in rooms
        assert (keys[-1] != keys[-2]) == matters, file
        changed += matters
    assert len({*keys}) == changed + 1 > 10


@pytest.mark.parametrize("library", ["torch", "transformers", "timm"])
@pytest.mark.parametrize("name", CACHES)
def test_every_library_changes_the_key(monkeypatch, key, name, library):
    cache, _ = CACHES[name]
    before, real = key(cache), hashing.version
    monkeypatch.setattr(hashing, "version", lambda name: "0.0" if name == library else real(name))
    assert key(cache) != before
