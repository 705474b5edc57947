# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""What a data set as large as ImageNet-1k costs: where each step is bound, hours and dollars on 1, 8 and 64 GPUs.

    python recipes/cost.py [--images 1281167] [--epochs 10] [--price 3.00] [--cores 14] [--disk GB/S]
        [--utilisation 0.3] [--bandwidth 0.5] [--measure] [--count] [--out FILE.json]

Nothing of that size runs here. Work for one image is counted by this package (``COUNTED``; --count counts it anew, a
minute or two), constants of a processor core and of a disk are measured (``MEASURED``; --measure measures them anew,
half a minute), and those of the accelerator are its maker's (``H100``), of which stated shares are reached. A step
decodes, computes and reads or writes at the same time, so it takes as long as the slowest of these, and then solves.
Work is taken to be shared evenly between processes; disks are one for each node.
"""

import io
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import typer
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image, ImageFilter
from torch import nn

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification, with_pixel_values
from restnet_hf.data.preprocessing import plain_processor
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.runtime.processor import processor_name
from restnet_hf.stitches.least_squares import MAX_POSITIONS, RIDGES


IMAGENET = 1_281_167  # training images
GPUS = (1, 8, 64)
KEPT, TESTED, POSITIONS = 512, 256, 4  # of `select_stitches` with fitted_accuracy: images, and positions of each
CLASSES = 1000
ON_GPU = ("products", "GPU memory", "float64")  # parts that a GPU does one after the other
TRAFFIC = 4  # bytes for each element that a layer returns in bfloat16: it is written, and read by the next
PAIRS = {  # timm's names of front and end
    "ResNet-50 to MobileNetV4-M": ("resnet50", "mobilenetv4_conv_medium"),
    "DeiT-S to DeiT-Ti": ("deit_small_patch16_224", "deit_tiny_patch16_224"),
}
ROUTES = {  # eight of each pair, as ``select_stitches(images, "position", max_routes=8)`` chooses them
    "ResNet-50 to MobileNetV4-M": [(1, 7), (2, 3), (3, 4), (5, 7), (8, 11), (10, 14), (12, 17), (15, 21)],
    "DeiT-S to DeiT-Ti": [(1, 7), (1, 2), (1, 1), (3, 3), (5, 5), (7, 7), (9, 9), (10, 10)],
}


@dataclass(frozen=True)
class Measured:
    """Constants of one core, and of the disk, in SI units a second.

    Args:
        processor: name of the processor.
        decode: images of 500 x 375 px, the usual size of ImageNet's, that are decoded and prepared.
        forward: FLOP that the anchors' forwards do in float32, eager.
        solve32: FLOP of a product in float32.
        solve64: FLOP of a product in float64.
        write: bytes that are written to the disk and are on it.
        read: bytes that are read from it, from outside the cache of the system.
    """

    processor: str
    decode: float
    forward: float
    solve32: float
    solve64: float
    write: float
    read: float


@dataclass(frozen=True)
class Accelerator:
    """Published constants of an accelerator and of its node.

    Args:
        name: name, and where its constants are from.
        bf16: FLOP a second of dense matrix products in bfloat16.
        fp64: FLOP a second of matrix products in float64.
        bandwidth: bytes a second of its memory.
        per_node: accelerators of a node.
        cores: processor cores for each.
    """

    name: str
    bf16: float
    fp64: float
    bandwidth: float
    per_node: int
    cores: int


@dataclass(frozen=True)
class Counted:
    """Work for one image of each anchor, from cut to cut, and the sizes of routes.

    Args:
        macs: multiply-accumulates of the blocks of front and end; the last is from the last cut to the logits.
        elements: elements that the layers of each block return.
        channels: channels of the activation at each cut, the first cut first.
        sizes: elements of the activation at each cut.
    """

    macs: tuple[list[int], list[int]]
    elements: tuple[list[int], list[int]]
    channels: tuple[list[int], list[int]]
    sizes: tuple[list[int], list[int]]


H100 = Accelerator(
    "NVIDIA H100 SXM (its data sheet, half of what it gives with sparsity; cores and drives: that of the DGX H100)",
    989.4e12,
    66.9e12,
    3.35e12,
    8,
    14,
)
MEASURED = Measured("AMD EPYC (Zen 5)", 471, 98.6e9, 108e9, 60.4e9, 1.41e9, 3.15e9)  # on 2026-11-29, by --measure
COUNTED = {  # by --count: timm 1.0.31
    "ResNet-50 to MobileNetV4-M": Counted(
        macs=(
            [349224960, 218365952, 218365952, 372506624, 218365952, 218365952, 218365952, 372506624, 218365952,
             218365952, 218365952, 218365952, 218365952, 372506624, 218365952, 218365952, 2048000],
            [145711104, 46061568, 21763840, 48074880, 41552000, 41552000, 43559040, 41552000, 40423040,
             20070400, 40423040, 44107840, 27258112, 27057408, 27057408, 25690112, 25803008, 13585152, 27258112,
             25690112, 25690112, 13158656, 12042240, 2508800],
        ),
        elements=(
            [8228864, 4014080, 4014080, 3713024, 2007040, 2007040, 2007040, 1856512, 1003520, 1003520, 1003520,
             1003520, 1003520, 928256, 501760, 501760, 5096],
            [3662848, 3173632, 1442560, 1850240, 1160320, 1160320, 1160320, 1160320, 909440, 533120, 909440,
             909440, 464128, 464128, 464128, 338688, 363776, 288512, 464128, 338688, 338688, 238336, 188160,
             9320],
        ),
        channels=(
            [256, 256, 256, 512, 512, 512, 512, 1024, 1024, 1024, 1024, 1024, 1024, 2048, 2048, 2048],
            [48, 80, 80, 160, 160, 160, 160, 160, 160, 160, 160, 256, 256, 256, 256, 256, 256, 256, 256, 256,
             256, 256, 960],
        ),
        sizes=(
            [802816, 802816, 802816, 401408, 401408, 401408, 401408, 200704, 200704, 200704, 200704, 200704,
             200704, 100352, 100352, 100352],
            [150528, 62720, 62720, 31360, 31360, 31360, 31360, 31360, 31360, 31360, 31360, 12544, 12544, 12544,
             12544, 12544, 12544, 12544, 12544, 12544, 12544, 12544, 47040],
        ),
    ),
    "DeiT-S to DeiT-Ti": Counted(
        macs=(
            [436194048, 378391296, 378391296, 378391296, 378391296, 378391296, 378391296, 378391296, 378391296,
             378391296, 378391296, 378391296, 384000],
            [130950528, 102049152, 102049152, 102049152, 102049152, 102049152, 102049152, 102049152, 102049152,
             102049152, 102049152, 102049152, 192000],
        ),
        elements=(
            [2798208, 2420736, 2420736, 2420736, 2420736, 2420736, 2420736, 2420736, 2420736, 2420736, 2420736,
             2420736, 77416],
            [1399104, 1210368, 1210368, 1210368, 1210368, 1210368, 1210368, 1210368, 1210368, 1210368, 1210368,
             1210368, 39208],
        ),
        channels=(
            [384, 384, 384, 384, 384, 384, 384, 384, 384, 384, 384, 384],
            [192, 192, 192, 192, 192, 192, 192, 192, 192, 192, 192, 192],
        ),
        sizes=(
            [75648, 75648, 75648, 75648, 75648, 75648, 75648, 75648, 75648, 75648, 75648, 75648],
            [37824, 37824, 37824, 37824, 37824, 37824, 37824, 37824, 37824, 37824, 37824, 37824],
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is assumed.

    Args:
        measured: constants of a core and a disk.
        accelerator: constants of the accelerator.
        images: images of the data set.
        epochs: epochs of training.
        price: dollars for an hour of one accelerator.
        utilisation: share of the peak of matrix products that is reached.
        bandwidth: share of the bandwidth of the memory that is reached.
    """

    measured: Measured
    accelerator: Accelerator = H100
    images: int = IMAGENET
    epochs: int = 10
    price: float = 3.0
    utilisation: float = 0.3
    bandwidth: float = 0.5


@dataclass(frozen=True)
class Work:
    """Work of a step, all images together.

    Args:
        decoded: images that are decoded.
        flops: FLOP in bfloat16 on accelerators.
        traffic: bytes that layers read and write in the memory of accelerators.
        flops64: FLOP in float64 on accelerators, of moments.
        written: bytes that are written to disks.
        read: bytes that are read from disks.
        solved32: FLOP in float32 on processors, in jobs that processes divide.
        solved64: FLOP in float64 on accelerators, in jobs that processes divide.
        jobs: number of these jobs, which are taken to be equal.
    """

    decoded: float = 0
    flops: float = 0
    traffic: float = 0
    flops64: float = 0
    written: float = 0
    read: float = 0
    solved32: float = 0
    solved64: float = 0
    jobs: int = 1


def seconds(work: Work, gpus: int, setting: Setting) -> dict[str, float]:
    """Seconds of each part of a step; all but ``solve`` run at the same time, except products one after the other."""
    measured, gpu = setting.measured, setting.accelerator
    nodes = -(-gpus // gpu.per_node)
    compute = work.flops / (gpu.bf16 * setting.utilisation * gpus)
    traffic = work.traffic / (gpu.bandwidth * setting.bandwidth * gpus)
    moments = work.flops64 / (gpu.fp64 * setting.utilisation * gpus)
    alone = work.solved32 / (measured.solve32 * gpu.cores) + work.solved64 / (gpu.fp64 * setting.utilisation)
    solve = alone * -(-work.jobs // gpus) / work.jobs  # of the process that has most jobs
    return {
        "decode": work.decoded / (measured.decode * gpu.cores * gpus),
        "products": compute if compute >= traffic else 0.0,
        "GPU memory": traffic if traffic > compute else 0.0,
        "float64": moments,
        "disk": (work.written / measured.write + work.read / measured.read) / nodes,
        "solve": solve,
    }


def elapsed(parts: dict[str, float]) -> float:
    """Seconds of a step."""
    return max(parts["decode"], sum(parts[name] for name in ON_GPU), parts["disk"]) + parts["solve"]


def core_seconds(work: Work, measured: Measured) -> float:
    """Seconds of a step on one core alone, in float32, without the disk."""
    products = work.flops / measured.forward + work.solved32 / measured.solve32
    return work.decoded / measured.decode + products + (work.flops64 + work.solved64) / measured.solve64


def bound(parts: dict[str, float]) -> str:
    """What a step waits for most: the slowest of what runs at the same time, or what is solved then."""
    on_gpu = sum(parts[name] for name in ON_GPU)
    names = ("decode", "disk", "solve") if on_gpu < max(parts["decode"], parts["disk"]) else (*ON_GPU, "solve")
    return max(names, key=lambda name: parts[name])


def tail(values: list[int], start: int, stop: int | None = None) -> int:
    """Sum of a network's blocks from a cut on."""
    return sum(values[start:stop])


def select_work(counted: Counted, routes: list[tuple[int, int]]) -> Work:
    """``select_stitches(images, "fitted_accuracy")``: every pair of cuts is fitted on a sample, and tested."""
    (front, end), (wide, narrow) = counted.macs, counted.elements
    tests = TESTED * len(counted.channels[0])  # of each cut of the end, one run for every cut of the front
    tails = sum(tail(end, j + 1) for j in range(len(counted.channels[1])))
    tails_elements = sum(tail(narrow, j + 1) for j in range(len(counted.channels[1])))
    macs = KEPT * (sum(front) + sum(end)) + TESTED * sum(front) + tests * tails
    elements = KEPT * (sum(wide) + sum(narrow)) + TESTED * sum(wide) + tests * tails_elements
    rows, outputs = (KEPT - TESTED) * POSITIONS, sum(counted.channels[1])
    solved = 0.0
    for inputs in counted.channels[0]:  # by the smaller of the two systems, see `restnet_hf.selection.samples`
        small, large = sorted((rows, inputs))
        solved += 2 * large * small**2 + small**3 / 3 + 2 * small**2 * outputs + 2 * rows * inputs * outputs
    jobs = len(counted.channels[0])  # one for each cut of the front
    return Work(decoded=KEPT, flops=2 * macs, traffic=TRAFFIC * elements, solved32=solved, jobs=jobs)


def fit_work(counted: Counted, routes: list[tuple[int, int]], images: int) -> Work:
    """``fit_stitches(images)``: both anchors to their deepest cut, moments of each stitch, and a solution a ridge."""
    deepest = [max(cuts) for cuts in zip(*routes, strict=True)]
    macs = sum(tail(each, 0, stop) for each, stop in zip(counted.macs, deepest, strict=True))
    elements = sum(tail(each, 0, stop) for each, stop in zip(counted.elements, deepest, strict=True))
    moments = solved = 0.0
    for i, j in routes:
        inputs, outputs = counted.channels[0][i - 1], counted.channels[1][j - 1]
        rows = min(MAX_POSITIONS, counted.sizes[1][j - 1] // outputs)
        moments += 2 * rows * inputs * (inputs + outputs)
        solved += (len(RIDGES) + 1) * (inputs**3 / 3 + 2 * inputs**2 * outputs)
    traffic = TRAFFIC * elements * images
    return Work(images, 2 * macs * images, traffic, flops64=moments * images, solved64=solved, jobs=len(routes))


def cache_work(counted: Counted, routes: list[tuple[int, int]], images: int) -> Work:
    """Filling ``cache_dir``: the front once, which teaches too, and its activations at the cuts, in float16."""
    stored = 2 * sum(counted.sizes[0][i - 1] for i in {i for i, _ in routes}) + 4 * CLASSES
    macs, elements = sum(counted.macs[0]), sum(counted.elements[0])
    return Work(images, 2 * macs * images, TRAFFIC * elements * images, written=stored * images)


def train_work(counted: Counted, routes: list[tuple[int, int]], images: int) -> Work:
    """An epoch from the cache: each stitch, and the end behind it, forwards and backwards."""
    stored = cache_work(counted, routes, 1).written
    flops = elements = 0.0
    for i, j in routes:
        inputs, outputs = counted.channels[0][i - 1], counted.channels[1][j - 1]
        stitch = inputs * counted.sizes[1][j - 1]
        flops += 2 * (2 * tail(counted.macs[1], j) + 3 * stitch)  # no gradients of the end's own weights
        elements += 3 * (tail(counted.elements[1], j) + stitch // inputs + outputs)
    return Work(flops=flops * images, traffic=TRAFFIC * elements * images, read=stored * images)


def uncached_work(counted: Counted, routes: list[tuple[int, int]], images: int) -> Work:
    """An epoch without a cache: decoding, the front, and all that an epoch from the cache does but reading."""
    cached, front = train_work(counted, routes, images), cache_work(counted, routes, images)
    return Work(images, cached.flops + front.flops, cached.traffic + front.traffic)


def times(work: Work, factor: float) -> Work:
    """So many times the work."""
    return Work(**{name: factor * value for name, value in asdict(work).items() if name != "jobs"}, jobs=work.jobs)


def steps_of(pair: str, counted: Counted, setting: Setting) -> dict[str, Work]:
    """The steps of a pair."""
    routes, images, epochs = ROUTES[pair], setting.images, setting.epochs
    return {
        f"select, {KEPT} images": select_work(counted, routes),
        "fit": fit_work(counted, routes, images),
        "cache": cache_work(counted, routes, images),
        f"train, {epochs} epochs, cached": times(train_work(counted, routes, images), epochs),
        f"train, {epochs} epochs, not cached": times(uncached_work(counted, routes, images), epochs),
    }


def duration(value: float) -> str:
    """Seconds, minutes or hours, to two figures."""
    for unit, size in (("h", 3600), ("min", 60)):
        if value >= 0.995 * size:
            return f"{float(f'{value / size:.2g}'):g} {unit}"
    return f"{float(f'{value:.2g}'):g} s"


def dollars(value: float) -> str:
    """Dollars, to two figures."""
    return f"{value:.2f}" if value < 10 else f"{float(f'{value:.2g}'):.0f}"


def table(setting: Setting, counted: dict[str, Counted]) -> list[str]:
    """The lines of the table."""
    heads = [f"{gpus} GPU{'s' * (gpus > 1)}: bound by | time | $" for gpus in GPUS]
    lines = [f"| pair | step | {' | '.join(heads)} |", f"|---|---|{'---|---:|---:|' * len(GPUS)}"]
    for pair, counts in counted.items():
        for step, work in steps_of(pair, counts, setting).items():
            cells = []
            for gpus in GPUS:
                parts = seconds(work, gpus, setting)
                took = elapsed(parts)
                cells.append(f"{bound(parts)} | {duration(took)} | {dollars(took / 3600 * gpus * setting.price)}")
            lines.append(f"| {pair} | {step} | {' | '.join(cells)} |")
    return lines


def parts_table(setting: Setting, counted: dict[str, Counted]) -> list[str]:
    """The parts of each step on one GPU, and what is on the disk."""
    names = ["decode", "products", "GPU memory", "float64", "disk", "solve"]
    lines = [f"| pair | step | {' | '.join(names)} | on disk, GB | one core alone, h |"]
    lines.append(f"|---|---|{'---:|' * (len(names) + 2)}")
    for pair, counts in counted.items():
        for step, work in steps_of(pair, counts, setting).items():
            parts = seconds(work, 1, setting)
            cells = [duration(parts[name]) if parts[name] else "" for name in names]
            hours = f"{float(f'{core_seconds(work, setting.measured) / 3600:.2g}'):g}"
            stored = f"{work.written / 1e9:.0f}" if work.written else ""
            lines.append(f"| {pair} | {step} | {' | '.join(cells)} | {stored} | {hours} |")
    return lines


def anchors_of(pair: str) -> list[Anchor]:
    """The anchors of a pair, with random weights."""
    return [Anchor(timm.create_model(name).eval(), name, Preprocessing((224, 224))) for name in PAIRS[pair]]


def count_pair(pair: str) -> Counted:
    """Count the work of a pair."""
    anchors = anchors_of(pair)
    StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    layouts = [[anchor.layout(cut) for cut in range(1, anchor.depth + 1)] for anchor in anchors]
    macs = MacsTable()
    return Counted(
        (macs.blocks(anchors[0]), macs.blocks(anchors[1])),
        (elements_of(anchors[0]), elements_of(anchors[1])),
        ([each.channels for each in layouts[0]], [each.channels for each in layouts[1]]),
        ([math.prod(each.shape(1)) for each in layouts[0]], [math.prod(each.shape(1)) for each in layouts[1]]),
    )


def elements_of(anchor: Anchor) -> list[int]:
    """Elements that the layers of each block return for one image."""
    counts, handles = [0], []

    def add(module: nn.Module, args: object, output: Any) -> None:
        counts[-1] += output.numel() if isinstance(output, torch.Tensor) else 0

    def begin(*_: object) -> None:
        counts.append(0)

    for module in anchor.model.modules():
        if not any(module.children()):
            handles.append(module.register_forward_hook(add))
    for cut in anchor.cuts:
        handles += [anchor.model.get_submodule(path).register_forward_hook(begin) for path in cut.paths[:1]]
    with torch.no_grad():
        anchor(torch.zeros(1, 3, *anchor.preprocessing.image_size))
    for handle in handles:
        handle.remove()
    return counts


def picture_bytes(size: tuple[int, int] = (500, 375), seed: int = 0) -> bytes:
    """A JPEG of about ImageNet's mean size, 110 kB: smooth shapes and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    buffer = io.BytesIO()
    Image.blend(coarse, noise, 0.5).save(buffer, "JPEG", quality=97)
    return buffer.getvalue()


def rate(run: Callable[[], object], amount: float, repeats: int = 5) -> float:
    """Amount that a function does in a second of the processor, which other work moves less; the best of some runs."""
    took = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        took.append(time.process_time() - began)
    return amount / min(took)


def measure_decode(images: int = 64) -> float:
    """Images a second that one core decodes, resizes and normalises, as the package does."""
    rows = [{"bytes": picture_bytes(seed=seed), "path": None} for seed in range(images)]
    data = Dataset.from_dict({"image": rows}).cast_column("image", ImageColumn())
    prepared = with_pixel_values(data, plain_processor(Preprocessing((224, 224))))
    return rate(lambda: prepared[:images], images)


@torch.no_grad()
def measure_forward() -> float:
    """FLOP a second of one core, the fronts' forwards in turn."""
    models = [timm.create_model(PAIRS[pair][0]).eval() for pair in PAIRS]
    flops = 2 * 8 * sum(sum(COUNTED[pair].macs[0]) for pair in PAIRS)
    x = torch.randn(8, 3, 224, 224)
    return rate(lambda: [model(x) for model in models], flops, 3)


def measure_product(dtype: torch.dtype, size: int = 1536) -> float:
    """FLOP a second of one core, a square product."""
    x = torch.randn(size, size, dtype=dtype)
    return rate(lambda: x @ x, 2 * size**3)


def measure_disk(folder: Path, size: int = 2**28, repeats: int = 3) -> tuple[float, float]:
    """Bytes a second to write and to read, the best of some runs; the system's cache of the file is dropped first."""
    path, block, best = folder / "restnet-hf-cost.bin", np.random.default_rng(0).bytes(2**24), [0.0, 0.0]
    for _ in range(repeats):
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        best[0] = max(best[0], size / (time.perf_counter() - began))
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while file.read(2**24):
                pass
            best[1] = max(best[1], size / (time.perf_counter() - began))
        path.unlink()
    return best[0], best[1]


def measure_machine() -> Measured:
    """Measure the constants of one core of this machine and of its disk, where temporary files are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        written, read = measure_disk(Path(folder))
    products = [measure_product(dtype) for dtype in (torch.float32, torch.float64)]
    found = Measured(processor_name(), measure_decode(), measure_forward(), *products, written, read)
    torch.set_num_threads(threads)
    return found


def describe(setting: Setting) -> list[str]:
    """What the tables rest on."""
    measured, gpu = setting.measured, setting.accelerator
    return [
        f"- Measured, one core of {measured.processor} and its disk: {measured.decode:.0f} images/s decoded and "
        f"prepared, forwards at {measured.forward / 1e9:.0f} GFLOP/s in float32, products at "
        f"{measured.solve32 / 1e9:.0f} (float32) and {measured.solve64 / 1e9:.0f} (float64) GFLOP/s, "
        f"{measured.write / 1e9:.2f} GB/s written, {measured.read / 1e9:.2f} GB/s read.",
        f"- One core decodes all {setting.images:,} images in {duration(setting.images / measured.decode)}.",
        f"- Published, {gpu.name}: {gpu.bf16 / 1e12:.0f} TFLOP/s in bfloat16, {gpu.fp64 / 1e12:.0f} in float64, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.per_node} to a node, {gpu.cores} cores for each.",
        f"- Stated: {setting.utilisation:.0%} of the products' peak and {setting.bandwidth:.0%} of the bandwidth are "
        f"reached; ${setting.price:.2f} for an hour of a GPU.",
    ]


def write_json(path: Path, setting: Setting, counted: dict[str, Counted]) -> None:
    """Write the constants, and seconds and dollars of each step."""
    rows = []
    for pair, counts in counted.items():
        for step, work in steps_of(pair, counts, setting).items():
            for gpus in GPUS:
                parts = seconds(work, gpus, setting)
                took = elapsed(parts)
                row = {"pair": pair, "step": step, "gpus": gpus, "bound": bound(parts), "seconds": took}
                rows.append({**row, "dollars": took / 3600 * gpus * setting.price, "parts": parts})
    content = {"setting": asdict(setting), "machine": platform.machine(), "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(
    images: int = IMAGENET,
    epochs: int = 10,
    price: float = 3.0,
    cores: int = H100.cores,
    disk: float | None = None,
    utilisation: float = 0.3,
    bandwidth: float = 0.5,
    measure: bool = False,
    count: bool = False,
    out: Path | None = None,
) -> None:
    """Print the tables, and write them to OUT."""
    positive = (images, epochs, price, cores, 1 if disk is None else disk)
    if min(positive) <= 0 or not 0 < utilisation <= 1 or not 0 < bandwidth <= 1:
        raise typer.BadParameter(
            "images, epochs, price, cores and disk must be above 0, utilisation and bandwidth above 0 and at most 1"
        )
    counted = {pair: count_pair(pair) for pair in PAIRS} if count else COUNTED
    if count:
        print({pair: asdict(each) for pair, each in counted.items()})
    measured = measure_machine() if measure else MEASURED
    if measure:
        print(measured)
    if disk is not None:
        measured = replace(measured, write=disk * 1e9, read=disk * 1e9)
    gpu = replace(H100, cores=cores)
    setting = Setting(measured, gpu, images, epochs, price, utilisation, bandwidth)
    print("\n".join([*describe(setting), "", *table(setting, counted), "", *parts_table(setting, counted)]))
    if out is not None:
        write_json(out, setting, counted)


if __name__ == "__main__":
    typer.run(main)
