"""Images come in batches from anywhere, and empty or wrong data says so."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTImageProcessor

from restnet_hf.data import batches, load_images, subset, with_pixel_values
from restnet_hf.embedded import DATA


X, Y = torch.randn(10, 3, 4, 4), torch.arange(10)
DICTS = [{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)]
SOURCES = {
    "tensor": X,
    "dataset of pairs": TensorDataset(X, Y),
    "dataset of dicts": Dataset.from_dict({"pixel_values": X.tolist(), "labels": Y.tolist()}).with_format("torch"),
    "loader": DataLoader(DICTS, batch_size=4),
    "list of batches": [(X[:6], Y[:6]), (X[6:], Y[6:])],
    "one batch": {"pixel_values": X, "labels": Y},
    "generator": ({"pixel_values": x, "label": y} for x, y in zip(X.split(3), Y.split(3), strict=True)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources(source):
    found = list(batches(SOURCES[source], 4))
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in found]), X)
    if source != "tensor":
        assert torch.equal(torch.cat([batch["labels"] for batch in found]), Y)


@pytest.mark.parametrize("empty", [X[:0], [], iter(()), TensorDataset(X[:0], Y[:0])])
def test_empty(empty):
    with pytest.raises(ValueError, match="calibration is empty"):
        list(batches(empty, 4, "calibration"))


@pytest.mark.parametrize("wrong", [["a.png"], [{"image": 1}], [3]])
def test_wrong(wrong):
    with pytest.raises(TypeError, match="each batch must be"):
        list(batches(wrong, 4))


def test_embedded_images():
    train, test = (load_images(DATA, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (3000, 1500)
    assert train.features["label"].names[-1] == "Ankle boot"
    row = with_pixel_values(test, ViTImageProcessor(size={"height": 56, "width": 56}))[3]
    assert row["pixel_values"].shape == (3, 56, 56) and row["labels"] == test[3]["label"]


def test_imagefolder(tmp_path):
    for index, name in enumerate(("cat", "dog", "cat")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5), (index, 0, 0)).save(folder / f"{index}.png")
    found = load_images(tmp_path, "train")
    assert sorted(found["label"]) == [0, 0, 1] and found.features["label"].names == ["cat", "dog"]
    ordered = with_pixel_values(found, ViTImageProcessor(size={"height": 8, "width": 8}), order=[4, 2])
    assert sorted(ordered[:]["labels"].tolist()) == [2, 4, 4]


def test_subset_is_always_the_same():
    rows = Dataset.from_dict({"label": list(range(100))})
    assert subset(rows, 7)["label"][:] == subset(rows, 7)["label"][:] != list(range(7))
    assert subset(rows, None) is rows and subset(rows, 500) is rows


def test_not_a_data_set(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded: it must be a folder with train.parquet"):
        load_images(tmp_path, "train")
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"has columns \['text'\]; one must be called 'image'"):
        load_images(tmp_path, "train")
