"""Images come in batches from anywhere, and empty or wrong data says so."""

import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, config
from datasets import Image as ImageColumn
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import ViTImageProcessor
from versions import needs_mixed_streams, needs_tensor_format, older

from restnet_hf.data.augment import AUGMENTATIONS
from restnet_hf.data.datasets import batches, check_classes, data_fingerprint, load_images, subset, with_pixel_values
from restnet_hf.demo.paths import DATA


PICTURES = Features({"image": ImageColumn(), "label": Value("int64")})
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


@pytest.mark.parametrize(
    "source", [pytest.param(name, marks=needs_tensor_format) if "dicts" in name else name for name in SOURCES]
)
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


# Streams


def small(height=8):
    return ViTImageProcessor(size={"height": height, "width": height})


def numbered(count, start=0):
    """Images of one grey each, its value and label the row's number."""
    rows = {"image": [Image.new("L", (6, 6), i) for i in range(start, start + count)]}
    features = Features({"image": ImageColumn(), "label": ClassLabel(num_classes=250)})
    return Dataset.from_dict({**rows, "label": list(range(start, start + count))}, features=features)


@pytest.fixture
def four_files(tmp_path):
    """Parquet files of 10 images each, labels 0 to 39."""
    for index in range(4):
        numbered(10, 10 * index).to_parquet(tmp_path / f"train-{index}-of-4.parquet")
    return tmp_path


def all_labels(loader):
    return torch.cat([batch["labels"] for batch in loader]).tolist()


def test_streamed_images_are_the_same():
    rows, stream = (load_images(DATA, "test", streaming=streaming) for streaming in (False, True))
    assert isinstance(stream, IterableDataset) and stream.column_names == ["image", "label"]
    assert stream.features["label"].names == rows.features["label"].names
    expected = with_pixel_values(rows, small())[:40]
    found = next(iter(DataLoader(with_pixel_values(stream, small()), batch_size=40)))
    assert sorted(found) == ["labels", "pixel_values"]
    for key, values in found.items():
        assert values.dtype == expected[key].dtype and torch.equal(values, expected[key])


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_in_loaders(four_files, workers):
    """Every image once, with its own label, in batches; also where several processes read."""
    stream = with_pixel_values(load_images(four_files, "train", streaming=True), small())
    loader = DataLoader(stream, batch_size=6, num_workers=workers)
    seen = list(loader)
    assert {tuple(batch["pixel_values"].shape[1:]) for batch in seen} == {(3, 8, 8)}
    assert max(len(batch["labels"]) for batch in seen) == 6 and sorted(all_labels(seen)) == list(range(40))
    for batch in seen:  # the processor makes -1..1 of 0..255
        assert torch.allclose(batch["pixel_values"][:, 0, 0, 0], batch["labels"] / 127.5 - 1, atol=1e-6)
    assert torch.equal(next(batches(pickle.loads(pickle.dumps(stream)), 6))["labels"], torch.arange(6))


def test_a_stream_cannot_be_repeated_from_a_key(four_files):
    assert data_fingerprint(with_pixel_values(load_images(four_files, "train", streaming=True), small())) is None


@needs_mixed_streams
def test_subset_of_a_stream(four_files, monkeypatch):
    monkeypatch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # else 5 seconds at the end of each pass
    stream = load_images(four_files, "train", streaming=True)
    found = subset(stream, 12)
    first = sorted(row["label"] for row in found)
    assert first == [10 * file + row for file in range(4) for row in range(3)], "three of each file"
    order = [row["label"] for row in found]
    assert order != sorted(order) and order != [row["label"] for row in subset(stream, 12, seed=1)]
    ready = with_pixel_values(found, small())
    for epoch in (0, 1):
        ready.set_epoch(epoch)
        for workers in (0, 2):
            assert sorted(all_labels(DataLoader(ready, batch_size=5, num_workers=workers))) == first
    assert subset(stream, None) is stream and len(list(subset(stream, 99))) == 40


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["train.parquet", "train/0.parquet", "data/train-00000-of-00001.parquet"])
def test_parquet_layouts(tmp_path, layout, streaming):
    (tmp_path / layout).parent.mkdir(exist_ok=True)
    numbered(3).rename_column("image", "img").to_parquet(tmp_path / layout)
    numbered(5).to_parquet(tmp_path / layout.replace("train", "test"))
    found = load_images(tmp_path, "train", streaming=streaming)
    assert [row["label"] for row in found] == [0, 1, 2] and sorted(found.column_names) == ["image", "label"]


@needs_mixed_streams
def test_streamed_imagefolder_is_mixed(tmp_path):
    for name in ("cat", "dog"):
        for index in range(20):
            folder = tmp_path / "train" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (5, 5), (index, 0, 0)).save(folder / f"{index}.png")
    stream = load_images(tmp_path, "train", streaming=True)
    assert stream.features["label"].names == ["cat", "dog"]
    labels = [row["label"] for row in stream]
    assert labels != sorted(labels) == [0] * 20 + [1] * 20, "as it lies there, a class at a time"
    assert [row["label"] for row in load_images(tmp_path, "train", streaming=True)] == labels
    assert 2 < sum(row["label"] for row in subset(stream, 12)) < 10
    loader = DataLoader(with_pixel_values(stream, small()), batch_size=8, num_workers=2)
    assert sorted(all_labels(loader)) == sorted(labels)


@pytest.mark.parametrize("streaming", [False, True])
def test_not_on_the_hub(streaming):
    with pytest.raises(ValueError, match="data set 'me/nothing' cannot be loaded: .* or an id on the Hub"):
        load_images("me/nothing", "train", streaming=streaming)


# Augmentation


MODES = ["L", "RGB", "RGBA", "P", "1", "LA"]


def photo(mode="RGB", size=(24, 16)):
    """Noise in colour."""
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).convert(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations(name, mode):
    """Each changes images of any mode, draws anew every time, and the same again from the same seed."""
    rows = Dataset.from_dict({"image": [photo(mode)] * 4, "label": [0] * 4}, features=PICTURES)
    augmented, plain = with_pixel_values(rows, small(), augment=name), with_pixel_values(rows, small())[0]
    torch.manual_seed(3)
    first, second = (torch.stack([augmented[i]["pixel_values"] for i in range(4)]) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(augmented[:]["pixel_values"], first) and not torch.equal(first, second)
    assert first.shape == (4, 3, 8, 8) and first.isfinite().all()
    assert any(not torch.equal(image, plain["pixel_values"]) for image in torch.cat([first, second]))


def test_flip_is_a_mirror():
    """Half of the images are mirrored, left to right; the others are as they were."""
    rows = Dataset.from_dict({"image": [photo()] * 200, "label": [0] * 200}, features=PICTURES)
    plain = with_pixel_values(rows, small())[0]["pixel_values"]
    mirrored = with_pixel_values(rows, small(), augment=ImageOps.mirror)[0]["pixel_values"]
    torch.manual_seed(0)
    found = with_pixel_values(rows, small(), augment="flip")[:]["pixel_values"]
    is_plain, is_mirrored = ((found == each).flatten(1).all(1) for each in (plain, mirrored))
    assert not torch.equal(plain, mirrored) and (is_plain ^ is_mirrored).all() and 70 < is_mirrored.sum() < 130


def test_crops_are_parts_of_the_image():
    """0.6 to 1 of the area, from 3:4 to 4:3 in shape, up to rounding; each pixel comes from the image as it was."""
    ramp = torch.arange(60 * 80).view(60, 80)  # a number for each pixel, over two channels
    image = Image.fromarray(torch.stack([ramp // 256, ramp % 256, ramp * 0], -1).to(torch.uint8).numpy())
    areas, crop = [], AUGMENTATIONS["crop"]()
    torch.manual_seed(0)
    for _ in range(50):
        values = torch.from_numpy(np.array(crop(image))).long()
        numbers = values[..., 0] * 256 + values[..., 1]
        numbers = numbers if numbers[0, 0] < numbers[0, -1] else numbers.flip(1)
        height, width = numbers.shape
        top, left = divmod(int(numbers[0, 0]), 80)
        assert torch.equal(numbers, ramp[top : top + height, left : left + width])
        assert 0.73 < width / height < 1.36
        areas.append(height * width / (60 * 80))
    assert 0.58 < min(areas) < 0.7 and 0.85 < max(areas) <= 1.0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=needs_mixed_streams)])
def test_a_seed_is_an_epoch(streaming, workers):
    """A loop that seeds each epoch gets the same images again, also where other processes read them."""
    rows = load_images(DATA, "test", streaming=streaming)
    loader = DataLoader(
        with_pixel_values(subset(rows, 12), small(), augment="trivial"), batch_size=6, num_workers=workers
    )
    epochs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        epochs.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])


def test_an_augmentation_of_ones_own():
    rows = numbered(3)
    negative = with_pixel_values(rows, small(), augment=ImageOps.invert)[:]["pixel_values"]
    assert torch.allclose(negative, -with_pixel_values(rows, small())[:]["pixel_values"], atol=1e-6)
    with pytest.raises(TypeError, match="augment returns Tensor; it must return a PIL image"):
        with_pixel_values(rows, small(), augment=lambda image: torch.zeros(3, 8, 8))[0]


@pytest.mark.parametrize("unknown", ["mixup", 3])
def test_unknown_augmentation(unknown):
    with pytest.raises(ValueError, match=r"is not one of \['crop', 'flip', 'randaugment', 'trivial'\]"):
        with_pixel_values(numbered(1), small(), augment=unknown)


def test_augmented_images_have_no_fingerprint():
    """They are others each time; what was chosen from them is still augmented."""
    rows = numbered(9)
    plain, augmented = with_pixel_values(rows, small()), with_pixel_values(rows, small(), augment="flip")
    assert data_fingerprint(plain) == data_fingerprint(with_pixel_values(rows, small())) is not None
    assert data_fingerprint(with_pixel_values(rows, small(9))) != data_fingerprint(plain)
    for data in (augmented, subset(augmented, 4), augmented.select(range(3)), augmented.train_test_split(3)["test"]):
        assert data_fingerprint(data) is None
    assert data_fingerprint(subset(plain, 4)) is not None


# Classes


NAMES = ["T-shirt/top", "ankle_boot", "Bag"]
MODEL = dict(enumerate(NAMES))


def named(names, column="label"):
    rows = {"image": [photo()] * 3, column: [0, 1, 2]}
    return Dataset.from_dict(rows, features=Features({"image": ImageColumn(), column: ClassLabel(names=names)}))


def forms(rows):
    """A data set in every form that tells its classes."""
    ready = with_pixel_values(rows, small(), augment="flip")
    stream = with_pixel_values(rows.to_iterable_dataset(), small())
    shuffled = {} if older(datasets="5.0") else {"shuffled stream": subset(stream.shuffle(seed=0, buffer_size=2), 2)}
    return {
        "rows": rows,
        "labels": rows.rename_column("label", "labels"),
        "prepared": ready,
        "chosen": subset(ready, 2),
        "loader": DataLoader(ready, batch_size=2),
        "part": DataLoader(Subset(ready, [0, 1]), batch_size=2),
        "stream": rows.to_iterable_dataset(),
        "prepared stream": stream,
        "loader of a stream": DataLoader(stream, batch_size=2),
        **shuffled,
    }


@pytest.mark.parametrize("form", forms(named(NAMES)))
def test_classes_of_another_task(form):
    check_classes(forms(named(NAMES))[form], MODEL)
    check_classes(forms(named(NAMES))[form], dict(reversed(MODEL.items())))
    check_classes(forms(named(["t-shirt/top", "Ankle boot", "BAG "]))[form], MODEL)
    others = forms(named(["T-shirt/top", "sandal", "Bag"]))[form]
    with pytest.raises(
        ValueError, match=r"has 3 classes \(T-shirt/top, sandal, Bag\), the model 3 \(T-shirt/top, ank"
    ):
        check_classes(others, MODEL)
    check_classes(others, {i: f"LABEL_{i}" for i in range(3)})


@pytest.mark.parametrize("names", [[*NAMES, "Coat"], ["Bag", "Coat", "Sandal", "Dress"], list("0123")])
@pytest.mark.parametrize("model", [MODEL, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}])
def test_classes_of_another_number(names, model):
    with pytest.raises(ValueError, match=r"has 4 classes \(.*, \.\.\.\), the model 3 \(.*\); build .* num_labels=4"):
        check_classes(named(names), model)
    with pytest.raises(ValueError, match="the data set has 3 classes .* the model 4"):
        check_classes(named(NAMES), dict(enumerate("abcd")))


def test_classes_in_another_order():
    rows, order = named(["Bag", "T-shirt/top", "Ankle boot"]), [2, 0, 1]
    with pytest.raises(ValueError, match=r"the same in another order; pass with_pixel_values\(..., order\)"):
        check_classes(with_pixel_values(rows, small()), MODEL)
    for data in (rows, rows.to_iterable_dataset()):
        ready = with_pixel_values(data, small(), order=order)
        check_classes(ready, MODEL)
        assert next(iter(DataLoader(ready, batch_size=3)))["labels"].tolist() == order
    check_classes(with_pixel_values(named(["Bag", "Dress", "Boot", "Sandal"]), small(), order=[2, 0, 1, 1]), MODEL)


def test_numbered_classes_are_counted():
    check_classes(numbered(2), dict(enumerate(map(chr, range(300, 550)))))
    check_classes(named(NAMES), {i: str(i) for i in range(3)})


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_to_check(source):
    check_classes(SOURCES[source], {0: "cat"})
    check_classes(DataLoader(TensorDataset(X, Y), batch_size=2), {0: "cat"})


def test_labels_below_zero_stay():
    """A test split's -1, for unknown, is not the last class."""
    rows = Dataset.from_dict({"image": [photo()] * 2, "label": [-1, 1]}, features=PICTURES)
    assert with_pixel_values(rows, small(), order=[5, 4])[:]["labels"].tolist() == [-1, 4]
