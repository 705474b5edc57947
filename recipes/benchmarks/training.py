"""What a step of training a stitch costs beside its parts run by hand, beside the naive way and full fine-tuning.

    python recipes/benchmarks/training.py [--quick] [--pair NAME] [--threads 1] [--cpu-time] [--out FILE.json]

Networks of timm with random weights, batches of 32 at 224 px that are in memory, one route at a middle cut. A step is
forward, cross-entropy, backward and AdamW; ours is that of `restnet_hf.train` itself, with clipping, read from the
cache for "cached". The limits are what cannot be left out: the front's own blocks without gradients, then the end's
forward and backward to its input, frozen, as plain modules without this package; with a cache the end alone. The naive
way has gradients everywhere and trains the stitch; full fine-tuning trains all weights of front, stitch and end. All
are timed in turn, in another order each repeat; a ratio is the median of the ratios of each repeat, and that of the
minima beside it. Ten epochs are not run but derived: so many measured steps and, for the cache, the measured time of
filling it once. Peak memory is the highest that a process holds in two steps beyond what it held before, each in a
process of its own. With --cpu-time seconds are the processor's, which other work on the machine moves less.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import copy
import ctypes
import gc
import json
import multiprocessing
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.utils import logging

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification, TrainArgs
from restnet_hf.data.datasets import Batch
from restnet_hf.training.learner import Learner
from restnet_hf.training.loaders import cache_features
from restnet_hf.training.loop import Training, start_accelerator
from restnet_hf.training.validation import Split


PAIRS = {  # front, its cut, end, its cut
    "ResNet-50 to ResNet-18": ("resnet50", 7, "resnet18", 4),
    "DeiT-S to DeiT-Ti": ("deit_small_patch16_224", 6, "deit_tiny_patch16_224", 6),
}
FRONT_AND_END, END, OURS, CACHED = "front + end", "end alone", "stitch-only", "cached"
NAIVE, FULL, FILL = "naive", "full fine-tuning", "filling the cache"
COMPARED = [(OURS, FRONT_AND_END), (CACHED, END), (NAIVE, OURS), (FULL, OURS), (FULL, CACHED)]
EPOCHS, IMAGES = 10, 1000  # of what is derived
FILLED = 4  # batches in the cache
LIMITS = {  # what is hoped for
    "stitch-only over front + end: time": "<= 1.10",
    "cached over end alone: time": "<= 1.15",
    "DeiT-S to DeiT-Ti, 10 epochs, full fine-tuning over cached: time": ">= 4.00",
}


class Tokens(nn.Module):
    """A ViT of timm before its first block."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (N, 1 + L, C) of images (N, 3, H, W)."""
        patches = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed


class First(nn.Module):
    """The first token (N, C) of a sequence (N, L, C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Choose it."""
        return tokens[:, 0]


def halves(model: Any, cut: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A timm ResNet or ViT up to a block and from it on, as plain modules without this package."""
    if hasattr(model, "layer1"):
        blocks = [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
        first, last = [model.conv1, model.bn1, model.act1, model.maxpool], [model.global_pool, model.fc]
    else:
        blocks, first, last = [*model.blocks], [Tokens(model)], [model.norm, First(), model.head]
    return nn.Sequential(*first, *blocks[:cut]), nn.Sequential(*blocks[cut:], *last)


class Case:
    """One route, a batch, and a step of each kind on them.

    Args:
        pair: front, its cut, end, its cut.
        batch: images in a step.
        size: of images, in pixels.
        stack: what was opened is closed with it.
    """

    def __init__(self, pair: tuple[str, int, str, int], batch: int, size: int, stack: ExitStack) -> None:
        torch.manual_seed(0)
        front, i, end, j = pair
        fitting = {name: {"img_size": size} if "patch" in name else {} for name in (front, end)}
        networks = {name: timm.create_model(name, **options).eval() for name, options in fitting.items()}
        anchors = [Anchor(network, name, Preprocessing((size, size))) for name, network in networks.items()]
        self.model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
        self.route = self.model.set_route(self.model.add_stitch(f"{front}[:{i}] + {end}[{j}:]"))
        self.stitch = self.model.stitches[self.route.stitch_points[0].name]
        self.early, self.late = halves(networks[front], i)[0], halves(networks[end], j)[1]
        self.batch, self.stack = batch, stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images, labels = torch.randn(FILLED * batch, 3, size, size), torch.randint(1000, (FILLED * batch,))
        self.images, self.labels = images[:batch], labels[:batch]

        def rows(chosen: Mapping[str, list[int]]) -> Batch:
            return {"pixel_values": images[chosen["index"]], "labels": labels[chosen["index"]]}

        self.data = Dataset.from_dict({"index": [*range(len(images))]}).with_transform(rows)
        with torch.no_grad():
            self.carried = self.stitch(self.early(self.images))  # what comes to the end
            assert torch.allclose(self.late(self.carried), self.model(self.images).logits, atol=1e-4)

    def front_and_end(self) -> Callable[[], None]:
        """The front without gradients, the end forth and back; the stitch is left out."""

        def step() -> None:
            with torch.no_grad():
                self.early(self.images)
            end()

        end = self.end_alone()
        return step

    def end_alone(self) -> Callable[[], None]:
        """The end forth, and back to its input."""
        x = self.carried.clone().requires_grad_()

        def step() -> None:
            torch.autograd.grad(cross_entropy(self.late(x), self.labels), x)

        return step

    def args(self, **options: Any) -> TrainArgs:
        """Of our own training, without a teacher and without end."""
        return TrainArgs(num_train_epochs=10_000, batch_size=self.batch, distillation=0.0, **options)

    def _training(self, args: TrainArgs) -> Training:
        """The training that `restnet_hf.train` runs, at the point where its loop begins."""
        accelerator = start_accelerator(self.model, args)
        training = Training(self.model, Split(self.data), args, [self.route], accelerator)
        self.stack.enter_context(training.training_mode())
        training.losses = {self.route: []}
        return training

    def ours(self) -> Callable[[], None]:
        """A step of `restnet_hf.train` on a batch in memory."""
        training = self._training(self.args())
        batch = {"pixel_values": self.images, "labels": self.labels}

        def step() -> None:
            training.update(training.check_batch(batch))
            training.step += 1

        return step

    def cached(self) -> Callable[[], None]:
        """A step of `restnet_hf.train` on a batch that the loader reads from the cache."""
        training = self._training(self.args(cache_dir=str(self.folder / "cache")))
        assert training.learner.frozen.front(self.route) in training.loader.dataset.names

        def batches() -> Iterator[Batch]:
            while True:
                yield from training.epoch_batches()
                training.epoch += 1

        def step() -> None:
            training.update(next(each))
            training.step += 1

        each = batches()
        return step

    def fill(self) -> Callable[[], None]:
        """Fill a new cache with `FILLED` batches."""
        place = self.folder / "filled"
        args = self.args(cache_dir=str(place))
        learner = Learner(self.model, [self.route], args)

        def run() -> None:
            shutil.rmtree(place, ignore_errors=True)
            cache_features(self.model, learner.frozen, self.data, args)

        return run

    def naive(self) -> Callable[[], None]:
        """Gradients of everything; the stitch is stepped."""
        whole = self._whole()
        return self._plain_step(whole, whole[1])

    def full(self) -> Callable[[], None]:
        """Everything trains."""
        whole = self._whole().train()
        return self._plain_step(whole, whole)

    def _whole(self) -> nn.Sequential:
        parts = (self.early, self.stitch, self.late)
        return nn.Sequential(*map(copy.deepcopy, parts)).requires_grad_()

    def _plain_step(self, whole: nn.Module, learns: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(learns.parameters(), lr=1e-5)

        def step() -> None:
            cross_entropy(whole(self.images), self.labels).backward()
            optimizer.step()
            whole.zero_grad()

        return step


STEPS: dict[str, Callable[[Case], Callable[[], None]]] = {
    FRONT_AND_END: Case.front_and_end,
    END: Case.end_alone,
    OURS: Case.ours,
    CACHED: Case.cached,
    NAIVE: Case.naive,
    FULL: Case.full,
}


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks: else their page faults, by the order of earlier calls, move times."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: none goes back


def seconds(
    runs: Mapping[str, Callable[[], None]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Times of several functions, interleaved in a random order, after one call of each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    rng = random.Random(0)
    for repeat in range(repeats + 1):
        for name in rng.sample([*runs], len(runs)):
            began = clock()
            runs[name]()
            if repeat:
                taken[name].append(clock() - began)
    return taken


def ten_epochs(taken: Mapping[str, Sequence[float]], batch: int) -> dict[str, list[float]]:
    """Seconds for `EPOCHS` over `IMAGES` images, for each repeat: derived from steps and from filling a cache.

    Args:
        taken: seconds of each step, and of filling a cache with `FILLED` batches.
        batch: images in a step.
    """
    steps = EPOCHS * IMAGES / batch
    fill = [seconds * IMAGES / (FILLED * batch) for seconds in taken[FILL]]
    found = {name: [steps * seconds for seconds in taken[name]] for name in (OURS, CACHED, NAIVE, FULL)}
    found[CACHED] = [once + rest for once, rest in zip(fill, found[CACHED], strict=True)]
    return found


def time_ratios(label: str, taken: Mapping[str, Sequence[float]], batch: int) -> dict[str, float]:
    """Ratios of times by what they are of: of each repeat the median, and of the minima.

    Args:
        label: name of the pair, for the ratios.
        taken: seconds of each way, as `ten_epochs` takes them.
        batch: images in a step.
    """
    epochs = ten_epochs(taken, batch)
    compared = [(f"{a} over {b}", taken[a], taken[b]) for a, b in COMPARED]
    compared += [(f"{EPOCHS} epochs, {FULL} over {b}", epochs[FULL], epochs[b]) for b in (CACHED, OURS)]
    found = {}
    for name, ours, other in compared:
        found[f"{label}, {name}: time"] = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        found[f"{label}, {name}: time (of minima)"] = min(ours) / min(other)
    return found


def peak(pair: tuple[str, int, str, int], batch: int, size: int, threads: int, name: str) -> float:
    """Megabytes that two steps hold at most, beyond what was held before; in a process of its own."""
    quiet(threads)
    process, done, highest = psutil.Process(), threading.Event(), 0

    def held() -> int:
        memory = process.memory_info()
        return memory.rss - memory.shared  # pages of mapped files, the cache's for one, are the system's to take back

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, held())

    with ExitStack() as stack:
        case = Case(pair, batch, size, stack)
        step = STEPS[name](case)
        cross_entropy(case.late(case.carried[:2].clone().requires_grad_()), case.labels[:2]).backward()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back
        before = held()
        thread = threading.Thread(target=watch)
        thread.start()
        step()
        step()
        done.set()
        thread.join()
    return (highest - before) / 2**20


def quiet(threads: int) -> None:
    """So many threads, and no bars."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()


def peaks_of(label: str, batch: int, size: int, threads: int) -> dict[str, float]:
    """Megabytes of each step of a pair."""
    found, context = {}, multiprocessing.get_context("forkserver")  # whose children need not import all of it again
    for name in STEPS:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[name] = pool.submit(peak, PAIRS[label], batch, size, threads, name).result()
    return found


def show(ratios: Mapping[str, float], peaks: Mapping[str, float], medians: Mapping[str, float]) -> None:
    """Print all of it."""
    table = Table("ratio", "median", "of minima", "hoped for", title="Steps of training")
    for name, ratio in ratios.items():
        if not name.endswith("(of minima)"):
            limit = next((limit for part, limit in LIMITS.items() if name.endswith(part)), "")
            minima = ratios.get(f"{name} (of minima)")
            told = f"{name} (derived)" if f"{EPOCHS} epochs" in name else name
            table.add_row(told, f"{ratio:.3f}", "" if minima is None else f"{minima:.3f}", limit)
    held = Table("step", "seconds", "peak MB", title="Medians")
    for name, median in medians.items():
        held.add_row(name, f"{median:.3f}", f"{peaks[name]:.0f}" if name in peaks else "")
    for each in (table, held):
        Console(width=120).print(each)
    print(f"{EPOCHS} epochs are derived from measured steps; {FILLED} batches fill the cache.")


def main(
    quick: bool = False, pair: str | None = None, threads: int = 1, cpu_time: bool = False, out: Path | None = None
) -> None:
    """Print the ratios, and write them to OUT."""
    quiet(threads)
    keep_freed_memory()
    batch, size, repeats = (8, 96, 2) if quick else (32, 224, 7)
    ratios, peaks, medians = dict[str, float](), dict[str, float](), dict[str, float]()
    for label in PAIRS if pair is None else (pair,):
        with ExitStack() as stack:
            case = Case(PAIRS[label], batch, size, stack)
            runs = {name: make(case) for name, make in (STEPS | {FILL: Case.fill}).items()}
            taken = seconds(runs, repeats, time.process_time if cpu_time else time.perf_counter)
        held = peaks_of(label, batch, size, threads)
        ratios |= time_ratios(label, taken, batch)
        ratios |= {f"{label}, {a} over {b}: memory": held[a] / held[b] for a, b in COMPARED}
        medians |= {f"{label}, {name}": statistics.median(times) for name, times in taken.items()}
        peaks |= {f"{label}, {name}": megabytes for name, megabytes in held.items()}
    show(ratios, peaks, medians)
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios, "peaks_mb": peaks, "seconds": medians}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
