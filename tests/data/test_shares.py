"""Batches that processes share: each image once over all of them, whatever form the data has, in its place."""

from io import BytesIO
from itertools import chain
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from several_processes import run_in_processes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from transformers import ViTImageProcessor

from restnet_hf.data import pixel_values
from restnet_hf.data.datasets import batches
from restnet_hf.data.pixel_values import PixelValues, with_pixel_values
from restnet_hf.data.prepare import Pictures
from restnet_hf.data.shares import SeededItems, is_repeatable, own_batches, shared_batches
from restnet_hf.distributed import Own, divide_jobs
from restnet_hf.errors import PictureError


COUNT = 23
PIXELS = torch.arange(COUNT).view(COUNT, 1, 1, 1).expand(COUNT, 3, 2, 2).float()
LABELS = torch.arange(COUNT)


class Noisy(Dataset):
    """Rows that are other each time."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": PIXELS[index] + 0.4 * torch.rand(()), "labels": LABELS[index]}


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        yield from ({"pixel_values": x, "labels": y} for x, y in zip(PIXELS, LABELS, strict=True))


def rows(labels: Tensor = LABELS) -> TensorDataset:
    return TensorDataset(PIXELS, labels)


def pictures(broken: int | None = None, filtered: bool = False, **options: str) -> datasets.IterableDataset:
    """The same rows as a stream of pictures, each of one grey, of which one may be broken."""
    greys = [{"bytes": png(index) if index != broken else b"none", "path": None} for index in range(COUNT)]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=COUNT)})
    rows = datasets.Dataset.from_dict({"image": greys, "label": [*range(COUNT)]}, features=columns)
    processor = ViTImageProcessor(size={"height": 2, "width": 2}, do_normalize=False, rescale_factor=1.0)
    stream = rows.to_iterable_dataset(num_shards=3)
    return with_pixel_values(stream.filter(drawn) if filtered else stream, processor, **options)


def drawn(row: dict) -> bool:
    """True for two thirds of all rows, at random."""
    return torch.rand(()).item() < 0.67


def skipping(broken: int) -> datasets.IterableDataset:
    return pictures(broken, on_error="skip")


def png(grey: int) -> bytes:
    file = BytesIO()
    Image.new("L", (4, 4), grey).save(file, "PNG")
    return file.getvalue()


PICTURES = {
    "pictures": pictures,
    "loader of pictures": lambda: DataLoader(pictures(), batch_size=5),
    "loader of pictures without its end": lambda: DataLoader(pictures(), batch_size=5, drop_last=True),
}
SOURCES = PICTURES | {
    "pictures mixed afterwards": lambda: pictures().shuffle(seed=1, buffer_size=8),
    "some at random": lambda: pictures(filtered=True),
    "broken ones left out": lambda: skipping(7),
    "some of the pictures": lambda: pictures().skip(2).take(17),
    "tensor": lambda: PIXELS,
    "tensors": rows,
    "noisy": Noisy,
    "subset": lambda: Subset(rows(), range(COUNT)),
    "loader": lambda: DataLoader(rows(), batch_size=5),
    "loader without its end": lambda: DataLoader(rows(), batch_size=5, drop_last=True),
    "loader of few": lambda: DataLoader(rows(), batch_size=COUNT),
    "shuffled": lambda: DataLoader(rows(), batch_size=5, shuffle=True),
    "generator": lambda: DataLoader(rows(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "workers": lambda: DataLoader(rows(), batch_size=5, num_workers=1),
    "noisy loader": lambda: DataLoader(Noisy(), batch_size=5, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=5),
    "iterator": lambda: iter(PIXELS.split(5)),
    "list": lambda: list(PIXELS.split(5)),
    "mapping": lambda: {"pixel_values": PIXELS, "labels": LABELS},
    "no labels in parts": lambda: rows(torch.where((LABELS % 3 == 0) | (LABELS < 10), -100, LABELS)),
}


def read(name: str, **options: object) -> list[list]:
    """What this process gets of a source: number, start and first pixels of each batch."""
    torch.manual_seed(5)
    unlabelled = name != "no labels in parts"
    own = shared_batches(SOURCES[name](), 5, unlabelled=unlabelled, **options)
    return [[number, start, batch["pixel_values"][:, 0, 0, 0].tolist()] for number, start, batch in own]


@pytest.mark.parametrize("name", SOURCES)
def test_one_process_has_all(name):
    found = read(name)
    torch.manual_seed(5)
    expected = [batch["pixel_values"][:, 0, 0, 0].tolist() for batch in batches(SOURCES[name](), 5)]
    images = [*chain.from_iterable(values for *_, values in found)]
    if name == "no labels in parts":
        assert images == [value for value in range(10, COUNT) if value % 3]
        assert [each[1] for each in found] == [10, 15, 20]
    elif name == "noisy":  # other random numbers
        assert [round(value - 0.2) for value in images] == list(range(COUNT))
    else:
        assert [values for *_, values in found] == expected
        sizes = [len(values) for values in expected]
        assert [each[:2] for each in found] == [[n, sum(sizes[:n])] for n in range(len(sizes))]


def test_augmentation_can_be_repeated():
    """By torch.manual_seed, and it is not the same each time."""
    assert read("noisy") == read("noisy")
    again = [batch["pixel_values"] for *_, batch in shared_batches(Noisy(), COUNT)]
    other = [batch["pixel_values"] for *_, batch in shared_batches(Noisy(), COUNT)]
    assert not torch.equal(again[0], other[0])


@pytest.mark.parametrize("name", ["tensors", "noisy", "loader", "stream", "list", "mapping", *PICTURES])
@pytest.mark.parametrize("limit", [1, 10, 12, 99])
def test_a_limit(name, limit):
    images = [*chain.from_iterable(values for *_, values in read(name, limit=limit))]
    assert [int(value) for value in images] == list(range(min(limit, 20 if "without" in name else COUNT)))


def test_a_stream_that_goes_on_in_its_middle():
    data = pictures()
    row = next(iter(data))
    data.load_state_dict(data.state_dict())
    images = torch.cat([batch["pixel_values"][:, 0, 0, 0] for *_, batch in shared_batches(data, 5)])
    assert images.tolist() == list(range(int(row["pixel_values"][0, 0, 0]) + 1, COUNT))


def test_broken_pictures_of_a_stream():
    with pytest.raises(PictureError, match="picture 7 cannot be read"):
        list(shared_batches(pictures(7), 5))
    found = [(number, start, len(batch["pixel_values"])) for number, start, batch in shared_batches(skipping(7), 5)]
    assert found == [(0, 0, 5), (1, 5, 5), (2, 10, 5), (3, 15, 5), (4, 20, 2)]
    few = [*chain.from_iterable(batch["labels"].tolist() for *_, batch in shared_batches(skipping(7), 5, limit=8))]
    assert few == [0, 1, 2, 3, 4, 5, 6, 8], "the limit is of pictures that can be read"
    processor = ViTImageProcessor(size={"height": 2, "width": 2})
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"none", "path": None}] * 2}, features=datasets.Features({"image": datasets.Image()})
    )
    with pytest.raises(ValueError, match="pictures is empty"):
        list(
            shared_batches(with_pixel_values(broken.to_iterable_dataset(), processor, on_error="skip"), 1, "pictures")
        )


def test_what_was_shared_stays(images):
    own = shared_batches(images, 2)
    assert shared_batches(own, 1) is own and isinstance(own, Own)
    assert [len(batch["pixel_values"]) for *_, batch in own_batches(own)] == [2, 2, 2]
    assert [start for _, start, _ in own_batches({"a": part, "b": part} for part in images.split(4))] == [0, 4]


def test_nothing_to_share():
    for empty in (torch.zeros(0, 3, 2, 2), TensorDataset(torch.zeros(0, 3, 2, 2)), [], iter(())):
        with pytest.raises(ValueError, match="pictures is empty"):
            list(shared_batches(empty, 5, "pictures"))
    with pytest.raises(ValueError, match="every image has the label -100"):
        list(shared_batches(rows(torch.full((COUNT,), -100)), 5, unlabelled=False))


def test_repeatable():
    assert is_repeatable(rows()) and is_repeatable(Subset(rows(), [1])) and is_repeatable(SeededItems(Noisy(), 0))
    assert not is_repeatable(Noisy()) and not is_repeatable(Subset(Noisy(), [1]))
    prepared = PixelValues(ViTImageProcessor())
    assert is_repeatable(Pictures([Image.new("RGB", (4, 4))], prepared))
    assert not is_repeatable(Pictures(Noisy(), prepared)), "what a data set of yours does is not known"


def test_one_process_does_all_jobs():
    assert divide_jobs([3.0, 1.0]) == [0, 0]


SHARES = """
import json
import torch
from test_shares import SOURCES, read
from restnet_hf.distributed import divide_jobs, from_main, gather, this_process
from test_shares import PICTURES, counted, pictures
from restnet_hf.data.shares import shared_batches

decoded = {name: gather(counted(PICTURES[name]())) for name in PICTURES}
again = pictures()
again.set_epoch(1)
decoded["a second epoch"] = gather(counted(again))
found = {name: gather([state for state in read(name)]) for name in SOURCES}
found |= {f"limit {name}": gather(read(name, limit=12)) for name in ("tensors", "noisy", "stream")}
jobs = [divide_jobs([5.0, 1.0, 4.0, 2.0, 2.0]), from_main(lambda: this_process().process_index)]
try:
    from_main(lambda: 1 / 0)
except ZeroDivisionError as error:
    jobs.append(str(error))
if this_process().is_main_process:
    print(json.dumps([found, jobs, decoded]))
"""


def counted(data: Any) -> int:
    """The number of pictures that this process decodes for its part of a stream."""
    found, decode = [], pixel_values.open_picture
    pixel_values.open_picture = lambda *args: found.append(args) or decode(*args)
    try:
        list(shared_batches(data, 5))
    finally:
        pixel_values.open_picture = decode
    return len(found)


@pytest.mark.slow
def test_each_image_once(tmp_path):
    """All processes together get the batches of one, in their places; of one batch, one process alone gets any."""
    results = run_in_processes(SHARES, tmp_path)
    for name, (expected,) in results[0][0].items():
        for found, *_ in results[1:]:
            together = sorted(chain.from_iterable(found[name]))
            assert together == expected, name
            sizes = [len(part) for part in found[name]]
            assert max(sizes) - min(sizes) <= (2 if name == "no labels in parts" else 1), name
    for name in ("pictures", "loader of pictures", "a second epoch"):
        assert [decoded[name] for *_, decoded in results] == [[23], [13, 10], [10, 8, 5]], name
    assert [decoded["loader of pictures without its end"] for *_, decoded in results] == [[20], [10, 10], [10, 5, 5]]
    assert [jobs for _, jobs, _ in results] == [
        [[0, 0, 0, 0, 0], 0, "division by zero"],
        [[0, 1, 1, 1, 0], 0, "division by zero"],
        [[0, 1, 1, 2, 2], 0, "division by zero"],
    ]
