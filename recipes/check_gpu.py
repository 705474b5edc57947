# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Compare an accelerator with the processor of its machine: whether results are equal, and how much faster it is.

    python recipes/check_gpu.py [--device cuda] [--quick] [--out FILE.json]

At most five minutes, without a network. On the embedded demo the accelerator must give what the processor gives in
float32, within ``TOLERANCES``: logits of all routes, values of a selector, fitted stitches, routes after some steps of
training, the classes of a cascade, and profiled accuracies; in float32 without TF32, under bfloat16 autocast, and from
two processes where there are two devices. Each of these is a process of its own, since Accelerate fixes device and
precision for a process. Then ResNet-50 and DeiT-S with random weights are timed over the processor, over the bare
anchors, compiled, and as a CUDA graph. With --quick there are fewer images, one thread, and the demo's anchors are
timed. With ``--device cpu`` the processor is compared with itself; without that and an accelerator the script ends
with status 2. The status is 1 where something differs.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import typer
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification, TrainArgs, load_images, train
from restnet_hf.data import batches, subset
from restnet_hf.demo import DATA, END, FRONT, load_demo
from restnet_hf.hashing import package_versions
from restnet_hf.profiling.device import device_name


IMAGES, FEW, STEPS, BATCH = 512, 128, 6, 32  # images to fit and to test on, and with --quick; steps of training
TOLERANCES = {  # largest differences from the processor's float32: in float32, and under bfloat16 autocast
    "forward: logits, of the largest": (1e-3, 0.1),
    "forward: share of other classes": (0.01, 0.05),
    "select: accuracies of pairs of cuts": (0.02, 0.08),
    "fit: R² of stitches": (1e-4, 0.02),
    "fit: share of other classes": (0.01, 0.08),
    "train: logits, of the largest": (0.01, 0.2),
    "train: share of other classes": (0.01, 0.08),
    "cascade: share of other classes": (0.01, 0.05),
    "profile: accuracies": (0.01, 0.03),
}
ROUTES = ("resnet50[:3] + deit_small_patch16_224[2:]", "resnet50[:7] + deit_small_patch16_224[6:]")
DEMO_ROUTES = ("resnet_fashion[:3] + vit_fashion[5:]", "resnet_fashion[:5] + vit_fashion[6:]")
LIMIT = 600  # seconds after which a process of this script counts as hung
SPEED = "speed"  # the job that times; the others are precisions of Accelerate


def demo_images(model: StitchedModelForImageClassification, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images of the demo in the model's preprocessing, and their labels."""
    every = list(batches(model.prepare_data(subset(load_images(DATA, split), count)), count))
    return torch.cat([each["pixel_values"] for each in every]), torch.cat([each["labels"] for each in every])


def in_precision(device: torch.device, precision: str) -> AbstractContextManager:
    """The context of a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def results(device: torch.device, precision: str, images: int) -> dict[str, Tensor]:
    """What a device gives in one precision, by the names of `TOLERANCES` before the colon and a number or a word."""
    torch.backends.cudnn.allow_tf32 = False  # else convolutions would be less precise
    model = load_demo().to(device)
    data, tests = demo_images(model, "train", images), demo_images(model, "test", images)
    routes, cascade = model.routes[:3], model.profiled.cascades[0].route
    found: dict[str, Tensor] = {}
    with torch.no_grad(), in_precision(device, precision):
        found |= {f"forward {i}": logits_of(model, tests[0], route) for i, route in enumerate(model.all_routes)}
        found["cascade"] = model(tests[0].to(device), cascade=cascade).logits
        rows = [{"pixel_values": x, "labels": y} for x, y in zip(*(each.split(64) for each in tests), strict=True)]
        found["profile"] = torch.tensor([row.scores["accuracy"] for row in model.profile(rows).routes])
        fresh = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32").to(device)
        rows = [{"pixel_values": x, "labels": y} for x, y in zip(*(each.split(64) for each in data), strict=True)]
        found["select"] = torch.tensor(fresh.compare(rows, ["fitted_accuracy"])["fitted_accuracy"][0].values)
        found["fit r2"] = torch.tensor([*model.fit_stitches(data[0], routes).values()])
        found |= {f"fit {i}": logits_of(model, tests[0], route) for i, route in enumerate(routes)}
    options: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": BATCH, "keep": "last", "warmup_ratio": 0.0}
    train(model, TensorDataset(*data), TrainArgs(max_steps=STEPS, mixed_precision=precision, **options), routes)
    with torch.no_grad(), in_precision(device, precision):
        found |= {f"train {i}": logits_of(model, tests[0], route) for i, route in enumerate(routes)}
    return {name: value.float().cpu().contiguous() for name, value in found.items()}


def logits_of(model: StitchedModelForImageClassification, images: Tensor, route: object) -> Tensor:
    """Logits of a route for images on the processor."""
    return torch.cat([model(x.to(model.device), route=route).logits for x in images.split(64)])


def differences(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of each kind of `TOLERANCES`."""
    found: dict[str, float] = {}

    def add(kind: str, value: Tensor) -> None:
        number = value.item()
        found[kind] = max(found.get(kind, 0.0), number if number == number else float("inf"))  # NaN is no equality

    for name, expected in reference.items():
        part, value = name.split()[0], other[name]
        if name in ("select", "profile", "fit r2"):
            kinds = {"select": "accuracies of pairs of cuts", "profile": "accuracies", "fit": "R² of stitches"}
            add(f"{part}: {kinds[part]}", (value - expected).abs().max())
            continue
        if f"{part}: logits, of the largest" in TOLERANCES:
            add(f"{part}: logits, of the largest", (value - expected).abs().max() / expected.abs().max())
        add(f"{part}: share of other classes", (value.argmax(-1) != expected.argmax(-1)).double().mean())
    return found


def wait(device: torch.device) -> None:
    """Wait until a device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a function, all work of the device included."""
    taken = []
    for _ in range(repeats + 2):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def speed_model(quick: bool) -> tuple[StitchedModelForImageClassification, list[nn.Module]]:
    """A model with two stitches, and its bare anchors."""
    torch.manual_seed(0)
    if quick:
        model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32")
    else:
        names = ("resnet50", "deit_small_patch16_224")
        anchors = [Anchor(timm.create_model(name).eval(), name, Preprocessing((224, 224))) for name in names]
        model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    model.add_stitches(DEMO_ROUTES if quick else ROUTES)
    return model, [anchor.model for anchor in model.anchors.values()]


@torch.no_grad()
def forward_ratios(device: torch.device, quick: bool) -> Iterator[tuple[str, float]]:
    """Ratios of forwards, of a fit and of a profile."""
    model, bare = speed_model(quick)
    route, size = model.routes[-1], model.preprocessing.image_size
    few, many, repeats = (4, 16, 3) if quick else (8, 128, 10)
    images = torch.randn(many, 3, *size)
    slow = seconds(lambda: model(images[:few], route=route), torch.device("cpu"), 3) / few
    model, x = model.to(device), images.to(device)
    time_of = partial(seconds, device=device, repeats=repeats)
    fast = time_of(lambda: model(x, route=route))
    yield "stitched route: the processor's time over the device's, for each image", slow / (fast / many)
    alone = [time_of(lambda each=each: each(x)) for each in bare]
    yield "stitched route over both bare anchors: time", fast / sum(alone)
    anchored = [time_of(lambda name=name: model(x, route=f"{name}[:]")) for name in model.anchors]
    yield "anchors as routes over bare anchors: time", sum(anchored) / sum(alone)
    with torch.autocast(device.type, torch.bfloat16):
        yield "stitched route, bfloat16 autocast over float32: time", time_of(lambda: model(x, route=route)) / fast
    everything = sum(time_of(lambda route=route: model(x, route=route)) for route in model.all_routes)
    rows = [{"pixel_values": x, "labels": torch.zeros(many, dtype=torch.int64)}]
    yield "profile of all routes over each alone: time", time_of(lambda: model.profile(rows)) / everything
    fit = seconds(lambda: model.fit_stitches(x), device, 2)
    yield "least squares of two stitches over both bare anchors: time", fit / sum(alone)


@torch.no_grad()
def baked_ratios(device: torch.device, quick: bool) -> Iterator[tuple[str, float]]:
    """Ratios of a baked route for one image: compiled, and as a graph; the results are checked."""
    model, _ = speed_model(quick)
    model = model.to(device)
    x = torch.randn(1, 3, *model.preprocessing.image_size, device=device)
    baked = model.bake(model.routes[-1])
    time_of = partial(seconds, device=device, repeats=20)
    expected, eager = baked(x), time_of(lambda: baked(x))
    compiled = torch.compile(baked)
    check_equal("compiled", compiled(x), expected)
    yield "baked route, one image, compiled over eager: time", time_of(lambda: compiled(x)) / eager
    if device.type == "cuda":
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warms up: libraries choose their kernels before the graph is recorded
            for _ in range(3):
                baked(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            output = baked(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        check_equal("CUDA graph", output, baked(x))
        yield "baked route, one image, CUDA graph over eager: time", time_of(graph.replay) / eager


def check_equal(name: str, found: Tensor, expected: Tensor) -> None:
    """Raise ValueError where logits differ by more than a hundredth of the largest; TF32 is allowed here."""
    off = ((found - expected).abs().max() / expected.abs().max()).item()
    if not off < 0.01:
        raise ValueError(f"the {name} route's logits differ from the eager one's by {off:.1e} of the largest")


def training_ratios(device: torch.device, quick: bool) -> Iterator[tuple[str, float]]:
    """A step of training a stitch over the bare front's forward and the bare end's forward and backward."""
    model, (front, end) = speed_model(quick)
    model, route, many = model.to(device), model.routes[-1], 16 if quick else 64
    x = torch.randn(many, 3, *model.preprocessing.image_size)
    labels, on_device = torch.zeros(many, dtype=torch.int64), x.to(device)

    def bare() -> None:
        with torch.no_grad():
            front(on_device)
        image = on_device.clone().requires_grad_()
        logits = end(image)
        cross_entropy(getattr(logits, "logits", logits), labels.to(device)).backward()

    data, few = TensorDataset(x.repeat(4, 1, 1, 1), labels.repeat(4)), 4 if quick else 20

    def run(steps: int) -> float:
        epochs = -(-steps // 4)
        options = TrainArgs(max_steps=steps, num_train_epochs=epochs, batch_size=many, keep="last", distillation=0.0)
        began = time.perf_counter()
        train(model, data, options, [route])
        wait(device)
        return time.perf_counter() - began

    run(few)  # warms up
    step = (run(3 * few) - run(few)) / (2 * few)  # without what is done once
    yield "step of training a stitch over bare front and end, backwards too: time", step / seconds(bare, device, 5)


def ratios(device: torch.device, quick: bool) -> dict[str, Tensor]:
    """All ratios of speed."""
    parts = (forward_ratios, baked_ratios, training_ratios)
    return {name: torch.tensor(ratio) for part in parts for name, ratio in part(device, quick)}


def run_worker(job: str, device: str, quick: bool, file: Path, processes: int = 1) -> dict[str, Tensor]:
    """Run a job in a process of its own, or in two; returns what it wrote.

    Raises:
        RuntimeError: the job failed; with the last lines that it printed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else ()), __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": str(device == "cpu").lower()}
    done = subprocess.run(
        [*command, "--job", job, "--device", device, "--out", str(file), *(["--quick"] if quick else [])],
        env=environment, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{job} on {device} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return load_file(file)


def work(job: str, device: str, quick: bool, out: Path) -> None:
    """Do a job in this process, and write its numbers."""
    state = PartialState(cpu=device == "cpu")  # in several processes the device is this one's
    if quick:
        torch.set_num_threads(1)
    found = ratios(state.device, quick) if job == SPEED else results(state.device, job, FEW if quick else IMAGES)
    if state.is_main_process:
        save_file(found, out)
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()


def compare(device: str, quick: bool) -> dict[str, dict[str, float]]:
    """Differences from the processor's float32 results, by what is compared."""
    count = 2 if device == "cpu" else torch.accelerator.device_count()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = run_worker("no", "cpu", quick, folder / "reference")
        found = {
            "float32": differences(reference, run_worker("no", device, quick, folder / "float32")),
            "bfloat16 autocast": differences(reference, run_worker("bf16", device, quick, folder / "bf16")),
        }
        if count > 1:
            two = run_worker("no", device, quick, folder / "two", processes=2)
            found["float32, two processes"] = differences(reference, two)
    return found


def show(found: Mapping[str, Mapping[str, float]], speed: Mapping[str, float]) -> bool:
    """Print all of it; returns whether everything is within the tolerances."""
    table, equal = Table("over the processor", "difference", "allowed", title="Results"), True
    for how, kinds in found.items():
        for kind, value in kinds.items():
            allowed = TOLERANCES[kind]["bfloat16" in how]
            equal &= value <= allowed
            table.add_row(f"{how}, {kind}", f"{value:.1e}{'' if value <= allowed else ' !'}", f"{allowed:g}")
    ratio = Table("ratio", "", title="Speed")
    for name, value in speed.items():
        ratio.add_row(name, f"{value:.3g}")
    for each in (table, ratio):
        Console(width=120).print(each)
    return equal


def main(device: str | None = None, quick: bool = False, out: Path | None = None, job: str = "") -> None:
    """Print differences and ratios, and write them to OUT; JOB is for this script's own processes."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or (there.type if there else "")
    if not device or (device != "cpu" and (there is None or there.type != torch.device(device).type)):
        asked = f"no {device}" if device else "no accelerator"
        print(f"there is {asked} here: --device cpu compares the processor with itself", file=sys.stderr)
        raise typer.Exit(2)
    if job:
        return work(job, device, quick, out or Path(job))
    began = time.perf_counter()
    found = compare(device, quick)
    with tempfile.TemporaryDirectory() as folder:
        speed = run_worker(SPEED, device, quick, Path(folder) / "speed")
    speed = {name: value.item() for name, value in speed.items()}
    equal = show(found, speed)
    name = device_name(torch.device(device))
    print(f"{name}: {'equal' if equal else 'DIFFERENT'} within the tolerances, {time.perf_counter() - began:.0f} s")
    if out is not None:
        about = {"device": name, "machine": platform.machine(), "versions": package_versions(), "equal": equal}
        out.write_text(json.dumps({"ratios": speed, "differences": found, **about}, indent=2) + "\n")
    raise typer.Exit(0 if equal else 1)


if __name__ == "__main__":
    typer.run(main)
