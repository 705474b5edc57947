"""What a stream of pictures costs beside its parts: images a second over the limit, and memory that grows.

    python recipes/benchmarks/data.py [--quick] [--images 50000] [--formats parquet ...] [--out FILE.json]

JPEGs of coloured 1/f noise, whose spectrum is that of photographs, as an imagefolder, as parquet files and as a
webdataset, streamed through `profile`, `compare`, `fit_stitches`, cascades, `adapt` and `train` of two small networks
of timm with random weights on one thread; `--height` makes the networks slower. The limit of a step is the smaller of
two rates: pictures decoded and prepared by hand, by as many threads as there are processors, and images of a tensor in
memory through the same step. Where both need the same processors no reader can reach it, so the processor time of the
two by hand over that of the stream is reported besides, which other work on the machine changes less. Each format runs
in a process of its own. Memory is of data, without mapped files: the peak over all images less the peak over the first
2,000.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import os


os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, for all threads and processes

import gc
import io
import json
import multiprocessing
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import timm
import torch
import typer
from datasets import IterableDataset, load_dataset
from PIL import Image
from pyarrow import parquet
from torch.utils.data import TensorDataset

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification, TrainArgs, adapt, load_images, train


CLASSES, BATCH, SHARD = 10, 64, 1000
FEW = 2000  # images, after which memory must not grow
FEWER = 500  # images of a second run from memory, which tells what each image takes, without the start
NETWORKS = "test_resnet", "test_vit"  # of timm; the front and the end
STEPS: dict[str, Callable[[StitchedModelForImageClassification, Any, int], Any]] = {
    "profile": lambda model, data, _: model.profile(data, batch_size=BATCH),
    "select": lambda model, data, _: model.compare(data, ["cka"], batch_size=BATCH, max_images=None),
    "fit": lambda model, data, _: model.fit_stitches(data, batch_size=BATCH),
    "cascades": lambda model, data, _: model.profile(data, batch_size=BATCH, cascades=True),
    "adapt": lambda model, data, _: adapt(model, data, {"macs": 1e15}, batch_size=BATCH, exact=True),
    "train": lambda model, data, images: train(
        model, data, TrainArgs(max_steps=images // BATCH, num_train_epochs=1, keep="last", distillation=0.0)
    ),
}


def noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """A picture (size, size, 3) whose amplitudes fall with frequency as those of photographs do."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    spectrum = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
    planes = np.fft.irfft2(spectrum / frequency, (size, size))
    planes = planes / planes.std((1, 2), keepdims=True)
    mixed = np.tensordot([[1, 0.3, 0.1], [1, -0.1, -0.2], [1, -0.2, 0.2]], planes, 1)  # brightness, and little colour
    return np.clip(128 + 55 * mixed, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def jpegs(images: int, size: int) -> Iterator[tuple[bytes, int]]:
    """JPEGs and their classes, always the same ones: parts of a few large pictures, again after `FEW` of them."""
    rng, made = np.random.default_rng(0), list[bytes]()
    large = [noise(4 * size, rng) for _ in range(16)]
    for index in range(images):
        if index < FEW:
            top, left = rng.integers(0, 3 * size, 2)
            part = large[index % len(large)][top : top + size, left : left + size]
            file = io.BytesIO()
            Image.fromarray(part).save(file, "JPEG", quality=90)
            made.append(file.getvalue())
        yield made[index % FEW], index % CLASSES


def write_imagefolder(folder: Path, pictures: Iterator[tuple[bytes, int]]) -> None:
    for index, (data, label) in enumerate(pictures):
        file = folder / "train" / str(label) / f"{index:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def write_parquet(folder: Path, pictures: Iterator[tuple[bytes, int]]) -> None:
    names = {"names": [str(label) for label in range(CLASSES)], "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    for number, rows in enumerate(iter(lambda: list(islice(pictures, SHARD)), [])):
        images = pyarrow.array(
            [{"bytes": data, "path": None} for data, _ in rows],
            pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
        )
        table = pyarrow.table({"image": images, "label": pyarrow.array([label for _, label in rows], pyarrow.int64())})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, folder / f"train-{number:05}.parquet", row_group_size=100)


def write_webdataset(folder: Path, pictures: Iterator[tuple[bytes, int]]) -> None:
    for number, rows in enumerate(iter(lambda: list(islice(pictures, SHARD)), [])):
        with tarfile.open(folder / f"train-{number:05}.tar", "w") as shard:
            for index, (data, label) in enumerate(rows):
                for ending, content in (("jpg", data), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{number:05}{index:05}.{ending}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))


def stream_webdataset(folder: Path) -> IterableDataset:
    files = sorted(map(str, folder.glob("*.tar")))
    return load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)


FORMATS: dict[str, tuple[Callable[[Path, Iterator[tuple[bytes, int]]], None], Callable[[Path], IterableDataset]]] = {
    "imagefolder": (write_imagefolder, lambda folder: load_images(folder, "train", streaming=True)),
    "parquet": (write_parquet, lambda folder: load_images(folder, "train", streaming=True)),
    "webdataset": (write_webdataset, stream_webdataset),
}


def build(height: int) -> StitchedModelForImageClassification:
    """Two tiny networks for square images of some height, with one stitch between them."""
    anchors = []
    for name in NETWORKS:
        options = {"img_size": height} if "vit" in name else {}
        network = timm.create_model(name, num_classes=CLASSES, **options).eval()
        anchors.append(Anchor(network, name, Preprocessing((height, height))))
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    front, end = anchors
    model.add_stitch(f"{front.name}[:{front.depth // 2}] + {end.name}[{end.depth // 2}:]")
    return model


def decode_by_hand(data: list[bytes], processor: Any) -> torch.Tensor:
    """Pictures as pixel values, by threads, without this package and `datasets`."""

    def decode(each: bytes) -> Image.Image:
        return Image.open(io.BytesIO(each)).convert("RGB")

    with ThreadPoolExecutor(processors()) as pool:
        parts = [
            processor(list(pool.map(decode, data[start : start + BATCH])), return_tensors="pt")["pixel_values"]
            for start in range(0, len(data), BATCH)
        ]
    return torch.cat(parts)


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def peak_mb() -> Iterator[list[float]]:
    """The peak of this process's memory within the block, without mapped files; appended when it ends."""
    process, peaks, stop = psutil.Process(), list[float](), threading.Event()
    seen = [0.0]

    def watch() -> None:
        while not stop.wait(0.05):
            info = process.memory_info()
            seen[0] = max(seen[0], (info.rss - getattr(info, "shared", 0)) / 1e6)

    gc.collect()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()
        peaks.append(seen[0])


def timed(act: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that a call takes, on the clock and of processors."""
    began, used = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began, time.process_time() - used


def limits(size: int, height: int, steps: list[str], repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of an image by hand: decoded, and through each step from memory; the best of some repeats."""
    data = [data for data, _ in jpegs(FEW, size)]
    processor = build(height).image_processor
    images, labels = decode_by_hand(data, processor), torch.arange(FEW) % CLASSES
    taken = [timed(lambda: decode_by_hand(data, processor)) for _ in range(repeats)]
    seconds = {"decode": (min(taken)[0] / FEW, min(taken)[1] / FEW)}
    for step in steps:

        def run(count: int, step: str = step) -> tuple[float, float]:
            model = build(height)  # which remembers no comparison
            return timed(lambda: STEPS[step](model, TensorDataset(images[:count], labels[:count]), count))

        run(FEWER)
        few, fewer = (min(run(count) for _ in range(repeats)) for count in (FEW, FEWER))
        seconds[step] = (few[0] - fewer[0]) / (FEW - FEWER), (few[1] - fewer[1]) / (FEW - FEWER)
    return seconds


def stream(
    folder: Path, kind: str, height: int, steps: list[str], images: int, few: int, repeats: int
) -> dict[str, Any]:
    """Images a second of a stream through each step, and the growth of memory; in a process of its own."""
    model, source = build(height), FORMATS[kind][1](folder)
    first: dict[str, float] = {}
    for step in steps:  # also warms up
        with peak_mb() as peak:
            STEPS[step](model, model.prepare_data(source.take(few)), few)
        first[step] = peak[0]
    found: dict[str, Any] = {}
    for step in steps:
        taken = list[tuple[float, float]]()
        with peak_mb() as peak:
            for _ in range(repeats):
                taken.append(timed(lambda: STEPS[step](model, model.prepare_data(source), images)))  # noqa: B023
        clock, used = min(taken)
        found[step] = {"clock": clock / images, "used": used / images, "growth_mb": peak[0] - max(first.values())}
    return found


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function that is called in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(
    quick: bool = False,
    images: int = 50_000,
    size: int = 400,
    height: int = 96,
    formats: list[str] = list(FORMATS),  # noqa: B006  typer reads it
    steps: list[str] = list(STEPS),  # noqa: B006
    repeats: int = 1,
    out: Path | None = None,
) -> None:
    """Measure, print and write ratios.

    Args:
        quick: whether to take few and small images.
        images: number of images.
        size: height and width of a picture.
        height: height and width of the images that the networks take.
        formats: formats of the files.
        steps: steps to stream through.
        repeats: number of runs, the best of which counts.
        out: file for the result.
    """
    few = FEWER if quick else FEW
    images, size, height = (2 * FEWER, 160, 32) if quick else (images, size, height)
    limit = apart(limits, size, height, steps, 1 if quick else max(repeats, 2))
    rates, ratios = {f"limit of {step}": 1 / clock for step, (clock, _) in limit.items()}, dict[str, float]()
    for kind in formats:
        with tempfile.TemporaryDirectory() as folder:
            FORMATS[kind][0](Path(folder), jpegs(images, size))
            found = apart(stream, Path(folder), kind, height, steps, images, few, repeats)
        for step, each in found.items():
            name, (clock, used), (decode, decode_used) = f"{kind}, {step}", limit[step], limit["decode"]
            rates[name] = 1 / each["clock"]
            ratios[f"{name}: images/s over min(decode, {step})"] = max(decode, clock) / each["clock"]
            ratios[f"{name}: processor time by hand over streamed"] = (decode_used + used) / each["used"]
            ratios[f"{name}: growth of memory, MB"] = each["growth_mb"]
        every = rates | ratios
        shown = {name: round(value, 2) for name, value in every.items() if name.startswith((kind, "limit"))}
        print(json.dumps(shown, indent=1), flush=True)
    if out is not None:
        settings = {
            "images": images,
            "size": size,
            "height": height,
            "processors": processors(),
            "threads": torch.get_num_threads(),
        }
        out.write_text(json.dumps({"settings": settings, "rates": rates, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
