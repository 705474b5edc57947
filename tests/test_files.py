"""Files are written whole or not at all."""

import pytest

from restnet_hf.files import folder_written_whole, written_whole


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
    with pytest.raises(RuntimeError), folder_written_whole(tmp_path / "out") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_folder_replaces_files_and_keeps_others(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with folder_written_whole(out) as folder:
            (folder / "a").write_text(text)
            (folder / text).write_text("")
    assert (out / "a").read_text() == "two"
    assert sorted(path.name for path in out.iterdir()) == ["a", "one", "two"]
