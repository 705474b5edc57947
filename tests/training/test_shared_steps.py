"""Steps that processes share have the mean gradient over their images, and streams go on where they stopped."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CLASSES, SIZE
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageColumn
from PIL import Image
from several_processes import run_in_processes
from torch.utils.data import DataLoader, IterableDataset
from trainings import FAST, build, data, trained
from versions import older

from restnet_hf import TrainArgs, train, with_pixel_values
from restnet_hf.data import pixel_values
from restnet_hf.data.datasets import to_batch
from restnet_hf.data.pixel_values import ROWS
from restnet_hf.training.checkpoints import Checkpoints
from restnet_hf.training.loop import Training
from restnet_hf.training.shared_steps import make_steps


COUNT, BATCH = 96, 8
SLOW_BUFFER = pytest.param("buffer", marks=pytest.mark.slow)  # datasets waits 5 seconds at the end of each pass
CONTINUED = ("imagefolder",) if older(datasets="5.0") else ("parquet", "imagefolder")  # without decoding all again
STREAMED = {**FAST, "batch_size": BATCH, "teacher": "resnet", "save_steps": 1}


def pictures(folder, count=COUNT, classes=CLASSES):
    """A folder of pictures of noise, one folder for each class, and the same ones as two parquet files."""
    rng, rows = np.random.default_rng(0), []
    for index in range(count):
        path = folder / "folder" / f"LABEL_{index % classes}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
        rows.append({"image": str(path), "label": index % classes})
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=[f"LABEL_{i}" for i in range(classes)])})
    for number, part in enumerate((rows[: count // 2], rows[count // 2 :])):
        Dataset.from_list(part, features=features).to_parquet(str(folder / f"{number}.parquet"))
    return folder


def stream_of(folder, kind, model):
    """A prepared stream of `pictures`."""
    if kind == "imagefolder":
        rows = load_dataset("imagefolder", data_dir=str(folder / "folder"), split="train", streaming=True)
    else:
        rows = load_dataset(
            "parquet", data_files=sorted(map(str, folder.glob("*.parquet"))), split="train", streaming=True
        )
    rows = rows.shuffle(seed=0, buffer_size=16) if kind == "buffer" else rows
    augment = "flip" if kind == "augmented" else None
    return with_pixel_values(rows.map(plain) if kind == "mapped" else rows, model.image_processor, augment=augment)


def plain(row):
    return row


class Watch:
    """Counts the pictures that are decoded, and interrupts a training after a checkpoint."""

    def __init__(self, monkeypatch):
        self.decoded, self.stop_after = 0, None
        opened, save = pixel_values.open_picture, Checkpoints.save

        def open_counted(*args):
            self.decoded += 1
            return opened(*args)

        def save_and_stop(checkpoints, step, *args):
            save(checkpoints, step, *args)
            if step == self.stop_after:
                raise KeyboardInterrupt

        monkeypatch.setattr(pixel_values, "open_picture", open_counted)
        monkeypatch.setattr(Checkpoints, "save", save_and_stop)


def stopped_and_resumed(watch, make, out, steps, stop_after, **options):
    """Train as a whole, and again with a stop: weights of both, and the number of pictures that the rest decoded."""
    args, whole, again = {**STREAMED, "max_steps": steps, **options}, build(), build()
    train(whole, make(), TrainArgs(**{**args, "save_steps": None}))
    watch.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        train(build(), make(), TrainArgs(output_dir=out, **args))
    watch.decoded, watch.stop_after = 0, None
    train(again, make(), TrainArgs(output_dir=out, resume_from_checkpoint=True, **args))
    return trained(whole), trained(again), watch.decoded


# 96 pictures in batches of 8: the stop is in the first epoch, at its end, or in the second, which has another order
@pytest.mark.parametrize("stop_after", [9, 12, 21])
@pytest.mark.parametrize("kind", ["parquet", "imagefolder", SLOW_BUFFER, "augmented", "mapped"])
def test_a_stream_goes_on_where_it_stopped(kind, stop_after, tmp_path, monkeypatch):
    """To the last bit, and without decoding what was done, unless a buffer or random augmentation needs it."""
    folder, watch = pictures(tmp_path), Watch(monkeypatch)
    model, steps = build(), stop_after + 3
    whole, again, decoded = stopped_and_resumed(
        watch, lambda: stream_of(folder, kind, model), str(tmp_path / "run"), steps, stop_after
    )
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    left = COUNT - stop_after * BATCH % COUNT + BATCH  # the last batch is read again
    assert decoded <= left + ROWS if kind in CONTINUED else decoded >= COUNT


def test_a_stream_that_changed_is_an_error(tmp_path, monkeypatch):
    """Other images are never taken for those that come next; a checkpoint of an older version has no such check."""
    folder, watch, model = pictures(tmp_path), Watch(monkeypatch), build()
    out, args = str(tmp_path / "run"), {**STREAMED, "max_steps": 8}
    watch.stop_after = 6
    with pytest.raises(KeyboardInterrupt):
        train(build(), stream_of(folder, "parquet", model), TrainArgs(output_dir=out, **args))
    watch.stop_after, resumed = None, TrainArgs(output_dir=out, resume_from_checkpoint=True, **args)
    (folder / "0.parquet").rename(folder / "2.parquet")  # the two files change places
    with pytest.raises(ValueError, match="is not the stream that the checkpoint was written with: its batch 6 has"):
        train(build(), stream_of(folder, "parquet", model), resumed)
    with pytest.raises(ValueError, match="is not the stream that the checkpoint was written with"):
        train(build(), stream_of(folder, "parquet", model).take(40), resumed)
    (folder / "2.parquet").rename(folder / "0.parquet")
    file = tmp_path / "run" / "checkpoint-6" / "training.json"
    place = json.loads(file.read_text())
    for stream in (None, {"sha256": place["stream"]["sha256"], "state": {"epoch": 0, "examples_iterable": [1]}}):
        file.write_text(json.dumps({**place, "stream": stream}))
        watch.decoded, again = 0, build()
        shutil.copytree(out, tmp_path / "copy")
        copied = TrainArgs(output_dir=str(tmp_path / "copy"), resume_from_checkpoint=True, **args)
        train(again, stream_of(folder, "parquet", model), copied)
        shutil.rmtree(tmp_path / "copy")
        assert watch.decoded >= 6 * BATCH, "all was to be read again"
    file.write_text(json.dumps({**place, "stream": {"state": 3}}))
    with pytest.raises(OSError, match="its place in the stream has no SHA-256"):
        train(build(), stream_of(folder, "parquet", model), resumed)


def test_held_out_images_of_a_stream_stay_held_out(tmp_path, monkeypatch):
    """They are its first ones, which a run that goes on does not read as its next ones either."""
    folder, watch, model = pictures(tmp_path, 2 * COUNT), Watch(monkeypatch), build()
    whole, again, decoded = stopped_and_resumed(
        watch, lambda: stream_of(folder, "parquet", model), str(tmp_path / "run"), 9, 7, keep="best", eval_steps=4
    )
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert "parquet" not in CONTINUED or decoded < 2 * COUNT + ROWS  # 100 are held out, and the rest after 48 of 92


class Numbered(IterableDataset):
    """Images that hold their number."""

    def __iter__(self):
        yield from ({"pixel_values": torch.full((3, SIZE, SIZE), float(i)), "labels": i % CLASSES} for i in range(300))


def test_held_out_batches_of_a_loader_of_a_stream_do_not_train(monkeypatch):
    seen, update = [], Training.update

    def record(job, batch, *rest):
        seen.extend(batch["pixel_values"][:, 0, 0, 0].tolist())
        update(job, batch, *rest)

    monkeypatch.setattr(Training, "update", record)
    loader = DataLoader(Numbered(), batch_size=8)
    result = train(build(), loader, TrainArgs(batch_size=8, max_steps=30, teacher="resnet"))
    assert result.held_out_images == 104 and set(seen) == set(map(float, range(104, 300)))


def test_a_loader_without_batches_is_an_error():
    with pytest.raises(ValueError, match="DataLoader with batch_size=None, whose data set has to make the batches"):
        make_steps(DataLoader(data(), batch_size=None), Accelerator(), to_batch)


UNEVEN = """
import json
import torch
from accelerate import PartialState
from conftest import CLASSES
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset
from torch.utils.data import WeightedRandomSampler
from trainings import FAST, build, data, trained
from restnet_hf import TrainArgs, train
from restnet_hf.distributed import gather, this_process


class Lazy:  # batches of indices that are drawn as they come, from numbers that are other ones on each process

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        for _ in range(self.count):
            yield torch.randint(16, (5,)).tolist()
            torch.rand(this_process().process_index)


def own_generator(count, sampler):
    generator = torch.Generator().manual_seed(this_process().process_index)
    return DataLoader(data(count), 5, sampler=sampler(range(count), generator=generator))


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from ({"pixel_values": image, "labels": label} for image, label in self.rows)


def sparse(count):
    images, labels = data(count).tensors
    return TensorDataset(images, torch.where(torch.arange(count) % 3 == 0, -100, labels))


def weighted(count):
    return DataLoader(data(count), 7, sampler=WeightedRandomSampler([1.0] * count, count))


CASES = {
    "indices": (data(25), {}),
    "one image": (data(1), {}),
    "labels that are missing": (sparse(20), {"distillation": 0.3}),
    "matching": (data(10), {"matching_epochs": 1, "num_train_epochs": 1}),
    "parts": (sparse(25), {"gradient_accumulation_steps": 2}),
    "cache": (data(10), {"cache_dir": "cache"}),
    "workers": (data(10), {"dataloader_num_workers": 1}),
    "stream": (Stream(data(10)), {"max_steps": 4}),
    "short stream": (Stream(data(1)), {"max_steps": 4}),
    "own loader": (weighted(16), {}),
    "own batches": (DataLoader(data(16), batch_sampler=[[0, 1, 2], [3], [4, 5, 6, 7], [8, 9]]), {}),
    "own stream": (DataLoader(Stream(data(10)), batch_size=4), {"max_steps": 4}),
    "lazy batches": (DataLoader(data(16), batch_sampler=Lazy(4)), {}),
    "a part with its own numbers": (own_generator(16, SubsetRandomSampler), {}),
    "an order of its own numbers": (own_generator(16, RandomSampler), {}),
    "importance": (data(10), {"sampler": "importance"}),
}
found = {}
for name, (rows, options) in CASES.items():
    model = build()
    options = {**FAST, "batch_size": 7, "learning_rate": 1e-3, **options}
    result = train(model, rows, TrainArgs(**options))
    found[name] = {key: value.double().flatten().tolist() for key, value in trained(model).items()}
    found[name]["losses"] = [*result.losses.values()]
images, labels = data(16).tensors
labels = labels.clone()
labels[15] = 99  # in the part of the last process
try:
    train(build(), Stream(TensorDataset(images, labels)), TrainArgs(**{**FAST, "batch_size": 16, "max_steps": 1}))
except ValueError as error:
    found["errors"] = gather(str(error))
if PartialState().is_main_process:
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_steps_whose_images_do_not_divide(tmp_path):
    """One, two and three processes learn the same, also with a last batch of one image."""
    results = run_in_processes(UNEVEN, tmp_path)
    for count, found in enumerate(results, 1):
        errors = found.pop("errors")
        assert len(errors) == count and all("labels run from 0 to 99" in each for each in errors)
    one, *others = results
    start = trained(build())
    for found in others:
        for name, tensors in one.items():
            for key, values in tensors.items():
                assert np.allclose(found[name][key], values, rtol=0, atol=2e-6), f"{name}: {key}"
                assert key not in start or not np.allclose(start[key].double().flatten(), values, atol=2e-5), name


SHARED_STREAM = """
import json
import os
import signal
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from test_shared_steps import STREAMED, build, stream_of, train, trained, TrainArgs
from restnet_hf.data import pixel_values
from restnet_hf.distributed import gather, this_process
from restnet_hf.training.checkpoints import Checkpoints

decoded, stop = [0], [None]
opened, save = pixel_values.open_picture, Checkpoints.save


def open_counted(*args):
    decoded[0] += 1
    return opened(*args)


def save_and_stop(checkpoints, step, *args):
    save(checkpoints, step, *args)
    if step == stop[0]:
        os.kill(os.getpid(), signal.SIGTERM)  # of the main process: all stop after the next step


pixel_values.open_picture, Checkpoints.save = open_counted, save_and_stop
folder, found = Path(sys.argv[1]), {}
for kind in ("parquet", "imagefolder", "buffer", "augmented"):
    whole, again, model = build(), build(), build()
    args = {**STREAMED, "max_steps": 24}
    train(whole, stream_of(folder, kind, model), TrainArgs(**{**args, "save_steps": None}))
    saved = {**args, "output_dir": f"{kind}{PartialState().num_processes}"}
    stop[0] = 19
    try:
        train(build(), stream_of(folder, kind, model), TrainArgs(**saved))
        raise AssertionError("it was to stop")
    except SystemExit:
        decoded[0], stop[0] = 0, None
    train(again, stream_of(folder, kind, model), TrainArgs(**saved, resume_from_checkpoint=True))
    same = all(torch.equal(value, trained(again)[key]) for key, value in trained(whole).items())
    weights = {key: value.double().flatten().tolist() for key, value in trained(whole).items()}
    found[kind] = [gather([same, decoded[0]]), weights]
if PartialState().is_main_process:
    next(folder.glob("folder/LABEL_3/*.png")).write_bytes(b"broken")
PartialState().wait_for_everyone()
try:
    train(build(), stream_of(folder, "imagefolder", build()), TrainArgs(**{**args, "save_steps": None}))
except Exception as error:
    found["broken"] = gather(type(error).__name__)
if PartialState().is_main_process:
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_processes_go_on_with_a_stream_where_it_stopped(tmp_path):
    """To the last bit; the main process alone decodes, all learn what one learns, and an error there is one of all."""
    results = []
    for count in (1, 2):
        folder = pictures(tmp_path / str(count))
        results += run_in_processes(SHARED_STREAM, folder, (count,), [str(folder)])
    for count, found in enumerate(results, 1):
        assert found.pop("broken") == ["PictureError"] * count
        for kind, (resumed, weights) in found.items():
            same, decoded = zip(*resumed, strict=True)
            assert same == (True,) * count and decoded[1:] == (0,) * (count - 1), kind
            left = 24 * BATCH - 19 * BATCH
            assert decoded[0] <= left + ROWS if kind in CONTINUED else decoded[0] >= COUNT, kind
            expected = results[0][kind][1]
            assert all(np.allclose(values, expected[key], rtol=0, atol=2e-6) for key, values in weights.items()), kind
