"""Batches that a thread reads ahead: the same ones, in order, with errors in their place, and no thread that stays."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, interleave_datasets
from datasets import Image as ImageColumn
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler
from transformers import ViTImageProcessor

from restnet_hf.data import pixel_values
from restnet_hf.data.ahead import AHEAD, can_read_ahead, read_ahead
from restnet_hf.data.datasets import batches
from restnet_hf.data.pixel_values import _decoders, with_pixel_values
from restnet_hf.errors import PictureError


def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8})


def greys(count):
    rows = {"image": [Image.new("L", (6, 6), i) for i in range(count)], "label": list(range(count))}
    return Dataset.from_dict(rows, features=Features({"image": ImageColumn(), "label": ClassLabel(num_classes=250)}))


def test_the_same_items_in_order():
    assert [*read_ahead(range(100))] == [*range(100)]
    assert [*read_ahead([])] == [] and [*read_ahead([1])] == [1]


def test_it_is_ahead_but_not_far():
    """While the caller works, as many items wait as may, beside one in the reader's hand."""
    read = []
    items = read_ahead(map(lambda item: read.append(item) or item, range(50)))
    assert next(items) == 0 and read == [0], "the first item is read by the caller, and no thread runs yet"
    assert next(items) == 1
    deadline = time.monotonic() + 30
    while len(read) < 3 + AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(read) == 3 + AHEAD
    assert [*items] == [*range(2, 50)]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_errors_come_where_their_item_would(error):
    def broken():
        yield from range(3)
        raise error("three")

    seen = []
    with pytest.raises(error, match="three"):
        seen.extend(read_ahead(broken()))
    with pytest.raises(error, match="three"):
        for item in read_ahead(broken()):
            seen.append(item)
    assert seen[-3:] == [0, 1, 2]


def test_no_thread_stays():
    before, closed = threading.active_count(), []

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    items = read_ahead(endless())
    assert [next(items) for _ in range(5)] == [1] * 5 and threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before and closed == [True]


def test_what_draws_random_numbers_is_not_read_by_a_thread():
    rows = with_pixel_values(greys(4), processor())
    augmented = with_pixel_values(greys(4), processor(), augment="flip")
    stream = with_pixel_values(greys(4).to_iterable_dataset(), processor())
    loader = DataLoader(stream, batch_size=2)
    assert all(map(can_read_ahead, (rows, stream, loader, stream.take(2), stream.skip(1), Subset(rows, [1]))))
    theirs = greys(4).to_iterable_dataset().map(lambda row: row, features=greys(4).features)
    others = [
        with_pixel_values(greys(4).to_iterable_dataset(), processor(), augment="flip"),
        with_pixel_values(theirs, processor()),
        DataLoader(stream, batch_size=2, num_workers=1),
        DataLoader(rows, batch_size=2, collate_fn=lambda items: items),
        DataLoader(rows, batch_size=2, sampler=WeightedRandomSampler([1.0] * 4, 4)),
        with_pixel_values(interleave_datasets([greys(4).to_iterable_dataset(), theirs]), processor()),
        TensorDataset(torch.zeros(2, 3, 8, 8)),
        greys(4),
    ]
    assert not any(map(can_read_ahead, (augmented, *others)))


LEFT_OPEN = """
import torch
from restnet_hf.data.ahead import read_ahead
items = read_ahead((torch.randn(300, 300) @ torch.randn(300, 300) for _ in iter(int, 1)), 10**6)
next(items), next(items)
"""


def test_a_program_may_end_while_items_are_read():
    """A thread inside of torch, when the interpreter is gone, would end it by SIGABRT."""
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


STALLED = """
import time
from restnet_hf.data import ahead
ahead.PATIENCE_S = 0.5
def numbers():
    yield 0
    yield 1
    time.sleep(3600)
items = ahead.read_ahead(numbers())
next(items), next(items)
"""


def test_a_program_ends_though_a_source_does_not_answer():
    done = subprocess.run([sys.executable, "-c", STALLED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_are_the_same(streaming):
    data = greys(20).to_iterable_dataset() if streaming else greys(20)
    found = [*batches(with_pixel_values(data, processor()), 6)]
    assert torch.cat([batch["labels"] for batch in found]).tolist() == [*range(20)]
    assert [len(batch["pixel_values"]) for batch in found] == [6, 6, 6, 2]
    for batch in found:
        assert torch.allclose(batch["pixel_values"][:, 0, 0, 0], batch["labels"] / 127.5 - 1, atol=1e-6)


def test_pictures_are_decoded_by_several_threads(tmp_path, monkeypatch):
    """Each in its place, and a broken one is named."""
    monkeypatch.setattr(pixel_values, "_processors", lambda: 3)
    files = []
    for index in range(9):
        files.append(str(tmp_path / f"{index}.png"))
        Image.new("L", (6, 6), index).save(files[-1])
    threads = set()
    opened = pixel_values.open_picture

    def watched(picture, name):
        threads.add(threading.current_thread().name)
        time.sleep(0.02)
        return opened(picture, name)

    monkeypatch.setattr(pixel_values, "open_picture", watched)
    names = [f"picture {index}" for index in range(9)]
    assert [decode().getpixel((0, 0))[0] for decode in _decoders(files, names)] == [*range(9)]
    assert len(threads) == 3 and threading.current_thread().name not in threads
    (tmp_path / "4.png").write_bytes(b"none")
    decoders = [*_decoders(files, names)]
    assert decoders[3]().getpixel((0, 0)) == (3, 3, 3)
    with pytest.raises(PictureError, match=r"4\.png cannot be read"):
        decoders[4]()
    same = Image.open(files[1])  # a lazy picture cannot be loaded by two threads
    threads.clear()
    assert [decode().getpixel((0, 0))[0] for decode in _decoders([same] * 4, names[:4])] == [1] * 4
    assert threads == {threading.current_thread().name}
