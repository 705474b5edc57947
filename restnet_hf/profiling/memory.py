"""Memory of routes: weights, and the peak of live tensors while a route runs, from one count of each piece."""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.segments import remaining_modules, unused_paths
from restnet_hf.routes.route import Segment
from restnet_hf.steps import Step, run_steps


MB = 2**20


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within the context, ``live`` now and at the ``peak``.

    Tensors are counted by storage, views once, for as long as anything refers to them. Memory that an operator
    allocates and frees itself is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


@dataclass(frozen=True)
class StepMemory:
    """Memory of a step beside its input.

    Args:
        peak: most bytes alive at once.
        left: bytes alive after the step, those of its output.
        passes_on: whether the output lies in the memory of the input.
    """

    peak: int
    left: int
    passes_on: bool = False


class MemoryTable:
    """Peak memory of routes, with each piece counted once.

    An anchor runs once from each cut at which a route enters it; that run gives the memory up to every later cut.
    Only storages of tensors count, not the workspace that an operator frees again.

    Args:
        batch_size: number of images in a run.
    """

    def __init__(self, batch_size: int = 1) -> None:
        self.batch_size = batch_size
        self._segments: dict[tuple[Anchor, int], dict[int | None, StepMemory]] = {}
        self._steps: dict[str, StepMemory] = {}

    def memory_mb(self, steps: Sequence[Step]) -> float:
        """Megabytes (2**20 bytes) of a route: its weights, the images, and the peak of all other live tensors.

        Args:
            steps: steps of the route.
        """
        return (weight_bytes(steps) + self.activation_bytes(steps)) / MB

    def activation_bytes(self, steps: Sequence[Step]) -> int:
        """Peak bytes of the images and of all tensors made while the route runs.

        Args:
            steps: steps of the route.
        """
        like = _like(steps)
        images = self.batch_size * math.prod(steps[0].shape) * like.element_size()
        before = peak = 0  # bytes of the step's input, beside the images
        for step in steps:
            memory = self._memory(step, like)
            peak = max(peak, before + memory.peak)
            before = memory.left + (before if memory.passes_on else 0)
        return images + peak

    def _memory(self, step: Step, like: Tensor) -> StepMemory:
        segment, anchor = step.segment, step.module
        if segment is None or step.tuned or segment == Segment(segment.anchor):  # a whole anchor needs no cuts
            if step.name not in self._steps:
                device = next(
                    (p.device for p in step.parameters()), like.device
                )  # a stitch that does not exist yet is on meta
                self._steps[step.name] = _count(step, _zeros(step.shape, self.batch_size, like).to(device))
            return self._steps[step.name]
        assert isinstance(anchor, Anchor)
        if (anchor, segment.start) not in self._segments:
            x = _zeros(step.shape, self.batch_size, like)
            self._segments[anchor, segment.start] = _count_segments(anchor, segment.start, x)
        return self._segments[anchor, segment.start][segment.stop]


@torch.no_grad()
def _count(step: Step, x: Tensor) -> StepMemory:
    with LiveBytes() as counted:
        y = step(x)
        return StepMemory(counted.peak, counted.live, _same_memory(y, x))


@torch.no_grad()
def _count_segments(anchor: Anchor, start: int, x: Tensor) -> dict[int | None, StepMemory]:
    """Memory of each segment from a cut, by the cut where it stops, from one run to the logits."""
    segments: dict[int | None, StepMemory] = {}

    def record(stop: int, y: Tensor) -> None:
        cut = anchor.cuts[stop - 1]
        left = y.untyped_storage().nbytes()
        if len(cut.tensors) == 1 and cut.tensors[0].modified:  # a segment that stops here returns a copy
            segments[stop] = StepMemory(max(counted.peak, counted.live + y.nbytes), y.nbytes)
        else:
            segments[stop] = StepMemory(counted.peak, left, _same_memory(y, x))

    with LiveBytes() as counted:
        logits = anchor.capture(x, [*range(start + 1, anchor.depth + 1), None], start, record)[None]
        segments[None] = StepMemory(counted.peak, counted.live, _same_memory(logits, x))
    return segments


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _like(steps: Iterable[Step]) -> Tensor:
    """A weight of an anchor, for the dtype and device of the route."""
    anchor = next(step.module for step in steps if isinstance(step.module, Anchor))
    return next(p for p in anchor.parameters() if p.is_floating_point())


def _zeros(shape: tuple[int, ...], batch_size: int, like: Tensor) -> Tensor:
    return torch.zeros((batch_size, *shape[1:]), dtype=like.dtype, device=like.device)


def weight_bytes(steps: Iterable[Step]) -> int:
    """Bytes of the parameters and buffers that a route uses, each once, and of the tensors that replace them.

    Args:
        steps: steps of the route.
    """
    tensors = {id(tensor): tensor for step in steps for tensor in _tensors(step)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(step: Step) -> Iterator[Tensor]:
    yield from step.parameters()
    modules: Iterable[nn.Module] = step.module.modules()
    if step.segment is not None:
        assert isinstance(step.module, Anchor)
        anchor, stop = step.module, step.segment.stop
        last = None if stop is None else anchor.cut(stop)
        start = anchor.cut(step.segment.start) if step.segment.start else None
        modules = remaining_modules(anchor.model, unused_paths(start, last, anchor.classifier))
    for module in modules:
        yield from module.buffers(recurse=False)
    for tuned in step.tuned:
        yield from (*tuned.parameters(), *tuned.buffers())


@torch.no_grad()
def measure_memory(steps: Sequence[Step], batch_size: int = 1) -> float:
    """Megabytes (2**20 bytes) of a route, from one run from end to end.

    An accelerator's allocator reports its own peak, with workspace and rounding. On a processor the tensors are
    counted: the resident size of a process includes libraries and cached memory, and varies by more than a route
    takes.

    Args:
        steps: steps of the route.
        batch_size: number of images in the run.
    """
    like = _like(steps)
    x = _zeros(steps[0].shape, batch_size, like)
    if like.device.type == "cpu":
        with LiveBytes() as counted:
            run_steps(x, steps)
        peak = counted.peak
    else:
        before = torch.accelerator.memory_allocated(like.device)
        torch.accelerator.reset_peak_memory_stats(like.device)
        run_steps(x, steps)
        torch.accelerator.synchronize(like.device)
        peak = torch.accelerator.max_memory_allocated(like.device) - before
    return (weight_bytes(steps) + x.nbytes + peak) / MB
