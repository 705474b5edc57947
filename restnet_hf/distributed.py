"""The processes of a run: which one this is, and an orderly stop when the system asks for it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """Which of the run's processes this is. On CPUs Accelerate's own state sees one alone unless it is told."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM has come to any process; all processes must call it together.

    The signal does nothing else while this is open. In a thread other than the main one signals cannot be caught.
    """
    came = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    before: Any = signal.signal(signal.SIGTERM, lambda *_: came.set()) if main else None
    state = this_process()

    def asked() -> bool:
        if state.num_processes == 1:
            return came.is_set()
        flag = torch.tensor(float(came.is_set()), device=state.device)
        torch.distributed.all_reduce(flag)
        return flag.item() > 0

    try:
        yield asked
    finally:
        if main:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
