"""Whatever a user has becomes pixel_values and labels in the model's order, the same for every form."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
from transformers import ViTImageProcessor

from restnet_hf import PictureError
from restnet_hf.data.datasets import batches, data_fingerprint, load_images, with_pixel_values
from restnet_hf.data.prepare import is_one_image, prepare_data, task_classes
from restnet_hf.demo.paths import DATA


MODEL = {0: "T-shirt/top", 1: "ankle_boot", 2: "Bag"}
OTHER = ["Bag", "T-shirt/top", "Ankle boot"]  # the same in another order: 2, 0, 1 in the model
PICTURES = [Image.new("RGB", (6, 6), (i, 2 * i, 3 * i)) for i in range(10, 70, 10)]
LABELS = [0, 1, 2, 2, 1, 0]
IN_MODEL = [2, 0, 1, 1, 0, 2]
TEXTS = Features({"image": ImageColumn(), "label": Value("string")})
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})


class Torchvision(torch.utils.data.Dataset):
    """Pairs of a PIL image and a label, and names of the classes, as torchvision's data sets."""

    classes = OTHER

    def __len__(self):
        return len(PICTURES)

    def __getitem__(self, index):
        return PICTURES[index], LABELS[index]


class Numbered(Torchvision):
    classes = None

    def __getitem__(self, index):
        return PICTURES[index], IN_MODEL[index]


def rows(image="image", label="label", names=OTHER, **more):
    features = {image: ImageColumn(), label: ClassLabel(names=names)} | {name: Value("int64") for name in more}
    return Dataset.from_dict({image: PICTURES, label: LABELS, **more}, features=Features(features))


def prepare(data, **options):
    return prepare_data(data, PROCESSOR, MODEL, **options)


def read(data):
    found = list(batches(data, 4, progress=False))
    return {key: torch.cat([batch[key] for batch in found]) for key in found[0]}


def folder(path):
    for index, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        place = path / OTHER[label].replace("/", "-")
        place.mkdir(exist_ok=True, parents=True)
        picture.save(place / f"{index}.png")
    return path


LABELLED = {
    "data set": rows,
    "other names": lambda: rows("img", "fine_label", id=list(range(6))),
    "odd names": lambda: rows("photo", "kind"),
    "labels": lambda: rows("img", "labels"),
    "stream": lambda: rows("photo", "kind").to_iterable_dataset(),
    "torch": lambda: rows().with_format("torch"),
    "loader": lambda: DataLoader(rows(), batch_size=4),
    "loader of a stream": lambda: DataLoader(rows().to_iterable_dataset(), batch_size=4),
    "torchvision": Torchvision,
    "part of torchvision": lambda: Subset(Torchvision(), range(6)),
    "loader of torchvision": lambda: DataLoader(Torchvision(), batch_size=4),
    "numbered": Numbered,
    "pairs": lambda: list(zip(PICTURES, IN_MODEL, strict=True)),
    "dicts": lambda: [{"image": p, "label": i} for p, i in zip(PICTURES, IN_MODEL, strict=True)],
    "prepared": lambda: with_pixel_values(rows(), PROCESSOR, [2, 0, 1]),
}


@pytest.mark.parametrize("form", LABELLED)
def test_labelled(form):
    expected = read(with_pixel_values(rows(), PROCESSOR))["pixel_values"]
    ready = prepare(LABELLED[form]())
    for data in (ready, prepare(ready)):  # what is prepared stays as it is
        found = read(data)
        assert torch.equal(found["pixel_values"], expected) and found["labels"].tolist() == IN_MODEL
    plain = read(prepare(LABELLED[form](), labels=False))
    assert torch.equal(plain["pixel_values"], expected)


UNLABELLED = {
    "pictures": lambda path: PICTURES,
    "paths": lambda path: sorted(path.glob("*.png")),
    "texts": lambda path: tuple(map(str, sorted(path.glob("*.png")))),
    "folder": lambda path: path,
    "name of a folder": str,
    "arrays": lambda path: [np.asarray(picture) for picture in PICTURES],
    "one array": lambda path: np.stack([np.asarray(picture) for picture in PICTURES]),
    "tensor of bytes": lambda path: torch.stack([torch.from_numpy(np.array(picture)) for picture in PICTURES]),
    "column": lambda path: rows().select_columns("image"),
    "prepared tensor": lambda path: read(with_pixel_values(rows(), PROCESSOR))["pixel_values"],
    "prepared array": lambda path: read(with_pixel_values(rows(), PROCESSOR))["pixel_values"].numpy(),
    "prepared images": lambda path: list(read(with_pixel_values(rows(), PROCESSOR))["pixel_values"]),
}


@pytest.mark.parametrize("form", UNLABELLED)
def test_unlabelled(form, tmp_path):
    for index, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{index}.png")
    found = read(prepare(UNLABELLED[form](tmp_path)))
    assert found.keys() == {"pixel_values"}
    assert torch.equal(found["pixel_values"], read(with_pixel_values(rows(), PROCESSOR))["pixel_values"])


def test_single_images(tmp_path):
    PICTURES[1].save(tmp_path / "a.png")
    tensor = with_pixel_values(rows(), PROCESSOR)[1]["pixel_values"]
    for one in (PICTURES[1], tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(PICTURES[1]), tensor):
        assert is_one_image(one) and torch.equal(read(prepare(one))["pixel_values"], tensor[None])
    for several in (PICTURES, tmp_path, tensor[None], rows()):
        assert not is_one_image(several)


def test_pairs_of_tensors_and_batches():
    images = torch.randn(4, 3, 8, 8)
    assert read(prepare(list(zip(images, [3, 2, 1, 0], strict=True))))["labels"].tolist() == [3, 2, 1, 0]
    for kept in (images, [images], [(images, torch.arange(4))], {"pixel_values": images}, TensorDataset(images)):
        assert prepare(kept) is kept
    stream = iter([images])
    assert prepare(stream) is stream


def test_the_same_data_has_the_same_fingerprint(tmp_path):
    """So that what was computed from it is found in caches."""
    first = prepare(rows())
    assert data_fingerprint(first) == data_fingerprint(prepare(rows())) is not None
    assert data_fingerprint(first) == data_fingerprint(prepare(first))
    plain = rows(names=list(MODEL.values()))
    assert data_fingerprint(prepare(plain)) == data_fingerprint(with_pixel_values(plain, PROCESSOR))
    path = folder(tmp_path)
    assert data_fingerprint(prepare(path, labels=False)) == data_fingerprint(prepare(path, labels=False)) is not None


# Columns and classes


def test_several_columns_are_not_guessed():
    both = rows(label="label", labels=[0] * 6)
    with pytest.raises(ValueError, match=r"columns of labels, \['label', 'labels'\]; .*label_column='label'"):
        prepare(both)
    assert read(prepare(both, label_column="label"))["labels"].tolist() == IN_MODEL
    assert "labels" not in read(prepare(both, labels=False))
    features = Features({"image": ImageColumn(), "mask": ImageColumn()})
    pictures = Dataset.from_dict({"image": PICTURES, "mask": PICTURES}, features=features)
    with pytest.raises(ValueError, match=r"several columns of images, \['image', 'mask'\]"):
        prepare(pictures)
    with pytest.raises(ValueError, match=r"label_column='kind' is not a column of the data set, which has \['image'"):
        prepare(rows(), label_column="kind")


def test_other_columns_of_labels_are_loaded(tmp_path):
    """They were dropped."""
    rows("photo", "kind").to_parquet(tmp_path / "train.parquet")
    loaded = load_images(tmp_path, "train")
    assert sorted(loaded.column_names) == ["image", "label"] and loaded["label"][:] == LABELS
    features = Features({"image": ImageColumn(), "fine": ClassLabel(names=OTHER), "coarse": ClassLabel(names=["a"])})
    columns = {"image": PICTURES, "fine": LABELS, "coarse": [0] * 6}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "test.parquet")
    assert {*load_images(tmp_path, "test").column_names} == {"image", "fine", "coarse"}
    assert load_images(tmp_path, "test", label_column="fine")["label"][:] == LABELS
    with pytest.raises(ValueError, match="several columns of labels"):
        with_pixel_values(load_images(tmp_path, "test"), PROCESSOR)


def test_classes_of_another_task():
    others = rows(names=["Bag", "Coat", "Sandal"])
    for data in (others, others.to_iterable_dataset(), with_pixel_values(others, PROCESSOR)):
        with pytest.raises(ValueError, match="their names differ; build the model with .*labels_from="):
            prepare(data)
    assert "labels" not in read(prepare(others, labels=False)), "classes have no part in what needs no labels"
    with pytest.raises(ValueError, match="the same in another order"):
        prepare(with_pixel_values(rows(), PROCESSOR))

    class Wrong(Torchvision):
        classes = [*OTHER, "Coat"]  # noqa: RUF012

    for data in (Wrong(), Subset(Wrong(), [0, 1]), DataLoader(Wrong(), batch_size=2)):
        with pytest.raises(ValueError, match="has 4 classes .*, the model 3"):
            prepare(data)


def test_a_torch_data_set_of_prepared_images_is_checked():
    class Ready(Torchvision):
        def __getitem__(self, index):
            return torch.zeros(3, 8, 8), LABELS[index]

    with pytest.raises(ValueError, match="the same in another order"):
        prepare(Ready())
    with pytest.raises(ValueError, match="the same in another order"):
        prepare(DataLoader(Ready(), batch_size=2))


def test_what_is_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"calibration: there is no file or folder 'me/data'; .*load_images"):
        prepare("me/data", name="calibration")
    with pytest.raises(
        ValueError, match=r"has the splits \['train', 'test'\]; pass one of them, such as data\['train'"
    ):
        prepare(DatasetDict({"train": rows(), "test": rows()}))
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]; pass load_images\("):
        prepare(DATA)
    with pytest.raises(ValueError, match=r"on_error='ignore' is not one of \('raise', 'skip'\)"):
        prepare(PICTURES, on_error="ignore")
    with pytest.raises(TypeError, match=r"labels are text, such as 'a'; .*class_encode_column"):
        read(
            prepare(
                Dataset.from_dict({"image": PICTURES, "label": list("abcabc")}).cast_column("image", ImageColumn())
            )
        )
    with pytest.raises(TypeError, match=r"data is a data set of raw pictures; .*model\.prepare_data"):
        next(batches(rows(), 4))


def test_parquet_files_of_one_split(tmp_path):
    rows().to_parquet(tmp_path / "train-0-of-1.parquet")
    assert read(prepare(tmp_path))["labels"].tolist() == IN_MODEL


# Broken pictures


def broken(picture_column="image"):
    """The third picture is truncated, the fifth no picture."""
    plain = rows(picture_column).cast_column(picture_column, ImageColumn(decode=False))
    data = [row[picture_column]["bytes"] for row in plain]
    data[2], data[4] = data[2][:50], b"nothing"
    columns = {picture_column: [{"bytes": each, "path": None} for each in data], "label": LABELS}
    return Dataset.from_dict(columns, features=rows(picture_column).features)


class BrokenTorchvision(Torchvision):
    def __getitem__(self, index):
        if index in (2, 4):
            return b"nothing", LABELS[index]
        return super().__getitem__(index)


DAMAGED = {
    "data set": broken,
    "odd names": lambda: broken("photo"),
    "stream": lambda: broken().to_iterable_dataset(),
    "torch": BrokenTorchvision,
    "list": lambda: [b"nothing" if i in (2, 4) else p for i, p in enumerate(PICTURES)],
    "prepared": lambda: with_pixel_values(broken(), PROCESSOR, [2, 0, 1]),
}


@pytest.mark.parametrize("form", DAMAGED)
def test_broken_pictures(form):
    with pytest.raises(PictureError, match="picture 2 cannot be read: .*on_error='skip'"):
        read(prepare(DAMAGED[form]()))
    found = read(prepare(DAMAGED[form](), on_error="skip"))
    expected = read(with_pixel_values(rows(), PROCESSOR))["pixel_values"]
    assert torch.equal(found["pixel_values"], expected[[0, 1, 3, 5]])
    assert form == "list" or found["labels"].tolist() == [IN_MODEL[index] for index in (0, 1, 3, 5)]


def test_skipped_pictures_are_counted(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("restnet_hf.data.pixel_values.logger.warning", lines.append)
    prepare(broken(), on_error="skip")
    path = folder(tmp_path)
    (path / "Bag" / "0.png").write_bytes(b"nothing")
    assert len(prepare(path, labels=False, on_error="skip")) == 5
    assert [line[:30] for line in lines] == [
        "skipped 2 of 6 pictures: pictu",
        "skipped 1 of 6 pictures: " + str(path)[:5],
    ]
    assert "0.png cannot be read" in lines[1]
    with pytest.raises(ValueError, match="skipped 2 of 2 pictures.* No picture is left"):
        prepare([b"a", b"b"], on_error="skip")
    with pytest.raises(ValueError, match="for on_error='skip' pass its data set instead"):
        prepare(DataLoader(rows(), batch_size=2), on_error="skip")
    with pytest.raises(ValueError, match="pass on_error='skip' to with_pixel_values"):
        prepare(with_pixel_values(broken().to_iterable_dataset(), PROCESSOR, [2, 0, 1]), on_error="skip")


def test_a_broken_file_is_named(tmp_path):
    path = folder(tmp_path)
    (path / "Ankle boot" / "2.png").write_bytes(b"nothing")
    with pytest.raises(PictureError, match=r"Ankle boot/2\.png cannot be read"):
        list(DataLoader(prepare(path, labels=False), batch_size=2))


# The classes of a new task


def test_names_of_a_new_task(tmp_path):
    place = folder(tmp_path)
    names = sorted(name.replace("/", "-") for name in OTHER)
    assert task_classes(place) == task_classes(str(place)) == names
    ready = with_pixel_values(rows(), PROCESSOR)
    forms = [rows("photo", "kind"), rows().to_iterable_dataset(), Torchvision(), Subset(Torchvision(), [1]), ready]
    for data in [*forms, DatasetDict({"train": rows()}), DataLoader(ready, batch_size=2)]:
        assert task_classes(data) == OTHER
    plain = Dataset.from_dict({"image": PICTURES, "label": LABELS}).cast_column("image", ImageColumn())
    for data in (
        plain,
        TensorDataset(torch.zeros(6, 1), torch.tensor(LABELS)),
        list(zip(PICTURES, LABELS, strict=True)),
    ):
        assert task_classes(data) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    for nothing in (PICTURES, torch.zeros(1), rows().select_columns("image"), Numbered()):
        with pytest.raises(ValueError, match="labels_from names no classes: it must be a folder"):
            task_classes(nothing)
