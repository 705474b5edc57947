"""Folders of pictures: a subfolder for each class, or pictures alone; nothing in them is left out silently."""

import logging

import pytest
from PIL import Image
from versions import needs, older

from restnet_hf.data.datasets import load_images
from restnet_hf.data.folders import files_dataset, folder_dataset


def fill(folder, *names):
    """Pictures of one red each, the number of the name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5), (number, 0, 0)).save(folder / name)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("restnet_hf"), "propagate", True)
    return caplog


def test_classes_are_the_subfolders(tmp_path):
    fill(tmp_path, "dog/1.png", "dog/deep/2.jpg", "cat/0.png", ".hidden/3.png", "dog/.4.png")
    (tmp_path / "bird").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    rows = folder_dataset(tmp_path)
    assert rows.features["label"].names == ["bird", "cat", "dog"] and rows["label"][:] == [1, 2, 2]
    assert rows[0]["image"].getpixel((0, 0)) == (2, 0, 0)


def test_pictures_alone_have_no_labels(tmp_path):
    fill(tmp_path, "a.png", "b.png")
    assert folder_dataset(tmp_path).column_names == ["image"]


def test_a_changed_file_changes_the_fingerprint(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png")
    first, second = (folder_dataset(tmp_path)._fingerprint for _ in range(2))
    Image.new("RGB", (50, 50)).save(tmp_path / "a" / "1.png")
    assert first == second != folder_dataset(tmp_path)._fingerprint


def test_what_is_no_folder_of_pictures(tmp_path):
    with pytest.raises(ValueError, match="has no pictures"):
        folder_dataset(tmp_path)
    fill(tmp_path, "train/cat/1.png", "test/cat/1.png")
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]; give one of them, such as .*test"):
        folder_dataset(tmp_path)
    fill(tmp_path, "val/cat/1.png", "val/2.png")
    with pytest.raises(ValueError, match=r"pictures both in itself, such as 2\.png, and in subfolders, such as cat"):
        folder_dataset(tmp_path / "val")


def test_metadata_does_not_cut_class_folders(tmp_path, warnings):
    """It made one picture without a label of them."""
    fill(tmp_path / "train", "cat/0.png", "cat/1.png", "dog/2.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\ncat/0.png,hello\n")
    for rows in (load_images(tmp_path, "train"), folder_dataset(tmp_path / "train")):
        assert rows["label"][:] == [0, 0, 1] and rows.features["label"].names == ["cat", "dog"]
    assert warnings.text.count("metadata.csv is not read, as the subfolders") == 2


@needs(not older(datasets="4.8"), "older datasets do not read the strings of pandas 3 in a metadata.csv")
def test_metadata_that_lists_some_pictures_only(tmp_path):
    fill(tmp_path / "train", "0.png", "1.png", "2.png")
    file = tmp_path / "train" / "metadata.csv"
    file.write_text("file_name,label\n0.png,4\n")
    for load in (lambda: load_images(tmp_path, "train"), lambda: folder_dataset(tmp_path / "train")):
        with pytest.raises(ValueError, match=r"metadata\.csv lists 1 of the 3 pictures of .*train"):
            load()
    file.write_text("file_name,label\n0.png,4\n1.png,5\n2.png,6\n")
    assert load_images(tmp_path, "train")["label"][:] == folder_dataset(tmp_path / "train")["label"][:] == [4, 5, 6]


def test_files(tmp_path):
    fill(tmp_path, "b.png", "a.png")
    rows = files_dataset([tmp_path / "b.png", tmp_path / "a.png"], [1, 0], ["x", "y"])
    assert [row["image"].getpixel((0, 0))[0] for row in rows] == [0, 1] and rows["label"][:] == [1, 0]
