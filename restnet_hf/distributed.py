"""The processes of a distributed run: what each of them does, what they tell one another, and a stop on SIGTERM."""

import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor


T = TypeVar("T")


class _AloneState:
    """What `this_process` returns in a block of `alone`."""

    process_index, num_processes, is_main_process = 0, 1, True
    is_local_main_process = False  # no bars of its own

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_for_everyone(self) -> None:
        """Do nothing."""


ALONE: ContextVar[_AloneState | None] = ContextVar("restnet_hf_alone", default=None)


def this_process() -> Any:
    """The ``PartialState`` of this process. On CPUs, Accelerate sees a single process unless ``cpu`` is set."""
    return ALONE.get() or PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextmanager
def alone() -> Iterator[None]:
    """Do a whole job in this process while others do theirs: the block shares nothing, and shows no bars."""
    token = ALONE.set(_AloneState(this_process().device))
    try:
        yield
    finally:
        ALONE.reset(token)


class Own(Generic[T]):
    """Items that belong to this process alone, which `own_items` passes on: others have the rest.

    Args:
        items: items of this process.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)

    def __iter__(self) -> Iterator[T]:
        return self._items

    def __next__(self) -> T:
        return next(self._items)


def own_items(items: Iterable[T] | Own[T]) -> Iterator[T]:
    """The items of this process: every n-th one of n processes, unless they are its own already.

    Args:
        items: items, the same ones on every process, or `Own` ones.
    """
    state = this_process()
    return iter(items) if isinstance(items, Own) else islice(items, state.process_index, None, state.num_processes)


def own_rows(rows: Tensor) -> tuple[Tensor, bool]:
    """This process's part of a tensor, one of n equal parts, and whether it has one: else it gets a row of others'.

    Args:
        rows: tensor (N, ...), the same on every process.
    """
    state = this_process()
    part = rows.tensor_split(state.num_processes)[state.process_index]
    return (part, True) if len(part) else (rows[:1], False)


def divide_jobs(costs: Sequence[float]) -> list[int]:
    """The process that does each job, so that all have about the same to do; every process gets the same answer.

    The largest jobs are given out first, each to the process that has least to do.

    Args:
        costs: cost of each job, in any unit.
    """
    loads, owners = [0.0] * this_process().num_processes, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    return [value] if this_process().num_processes == 1 else gather_object([value])


def share_jobs(function: Callable[[int], T], count: int) -> list[T]:
    """The results of a function for 0, 1, ... , each of which one process computes; every process gets all.

    Args:
        function: function of the number of a job, whose result can be pickled.
        count: number of jobs in all.
    """
    own = {number: function(number) for number in own_items(range(count))}
    every = {number: result for each in gather(own) for number, result in each.items()}
    return [every[number] for number in range(count)]


def from_main(function: Callable[[], T]) -> T:
    """The result of a function that the main process alone calls; an error there is raised by all.

    Args:
        function: function whose result can be pickled.
    """
    state = this_process()
    if state.num_processes == 1:
        return function()
    result: Any = None
    error: Exception | None = None
    if state.is_main_process:
        try:
            result = function()
        except Exception as raised:
            error = _portable(raised)
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


def _portable(error: Exception) -> Exception:
    """An error that other processes can read, which is the same one where it can be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # arguments of its own, or what it holds
        return RuntimeError(f"{type(error).__name__}: {error}")


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes of tensors of equal shapes, on each of them.

    Args:
        tensor: tensor of this process, on any device.
    """
    state = this_process()
    if state.num_processes == 1:
        return tensor
    total = tensor.to(state.device, copy=True)
    torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def send_sum_to(process: int, tensor: Tensor) -> None:
    """Add up tensors of equal shapes in place, in one process alone; in the others the values are then undefined.

    Args:
        process: index of the process that gets the sum.
        tensor: tensor of this process, on any device.
    """
    if tensor.numel():
        moved = tensor.to(this_process().device)
        torch.distributed.reduce(moved, process)
        tensor.copy_(moved)


def send_from(process: int, tensor: Tensor) -> Tensor:
    """The tensor of one process, on all of them.

    Args:
        process: index of the process that sends.
        tensor: tensor to send, on any device; on the other processes one of the same shape, which is overwritten.
    """
    if tensor.numel():
        moved = tensor.to(this_process().device)
        torch.distributed.broadcast(moved, process)
        tensor.copy_(moved)
    return tensor


@contextmanager
def catch_sigterm() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether any process got SIGTERM; all processes must call it together.

    Within the block the signal has no other effect. Outside the main thread signals cannot be caught.
    """
    received = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before: Any = signal.signal(signal.SIGTERM, lambda *_: received.set()) if main else None

    def stop_requested() -> bool:
        return add_up(torch.tensor(float(received.is_set()))).item() > 0

    try:
        yield stop_requested
    finally:
        if main:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
