"""Local paths and ids on the Hub are told apart."""

from pathlib import Path

import pytest

from restnet_hf.sources import check_paths, is_path, note_missing


@pytest.mark.parametrize("source", ["/a", "./a", "../a", ".", "~/a", "a/b/c", "a\\b", "local-dir:a", Path("a")])
def test_only_a_path(source):
    assert is_path(source)


@pytest.mark.parametrize("source", ["a", "me/a", "timm/resnet50.a1_in1k", "hf_hub:timm/resnet50", "hf-hub:a/b"])
def test_may_be_an_id(source):
    assert not is_path(source)


def test_all_missing_paths_are_named(tmp_path):
    check_paths([tmp_path, "me/a", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"no such folder: \./no, .*/none"):
        check_paths(["./no", tmp_path, tmp_path / "none"])


def test_note(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert note_missing(["runs/a", "nobody/b", "runs"]) == f" There is no folder 'runs/a' in {tmp_path} either."
    assert note_missing(["nobody/b"]) == ""
