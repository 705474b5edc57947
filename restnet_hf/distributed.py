"""The processes of a distributed run: the state of this one, and an orderly stop on SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """The state of this process. On CPUs, Accelerate sees a single process unless ``cpu`` is set."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextmanager
def catch_sigterm() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether any process got SIGTERM; all processes must call it together.

    Within the block the signal has no other effect. Outside the main thread signals cannot be caught.
    """
    received = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before: Any = signal.signal(signal.SIGTERM, lambda *_: received.set()) if main else None
    state = this_process()

    def stop_requested() -> bool:
        if state.num_processes == 1:
            return received.is_set()
        flag = torch.tensor(float(received.is_set()), device=state.device)
        torch.distributed.all_reduce(flag)
        return flag.item() > 0

    try:
        yield stop_requested
    finally:
        if main:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
