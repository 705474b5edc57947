"""Batches of pictures read ahead in a thread, so that they are decoded while a network runs."""

import atexit
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, IterableDataset
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, default_collate

from restnet_hf.data.pixel_values import PixelValues, layers_of, prepared_by


T = TypeVar("T")
Ready = queue.Queue[tuple[Any, BaseException | None]]
AHEAD = 2  # items, beside the one in use and the one that is being read
END = object()
PATIENCE_S = 5.0  # for a thread at the end of the program


def read_ahead(items: Iterable[T], count: int = AHEAD) -> Iterator[T]:
    """The same items, read by a thread that is up to ``count`` of them ahead.

    The first item is read by the caller, with whatever random numbers its reader draws when it begins. An error of
    the reader is raised where its item would come. The thread ends when the iterator is closed or deleted.

    Args:
        items: items that the thread reads.
        count: number of items that wait at most.
    """
    source = iter(items)
    for first in source:
        yield first
        break
    ready: Ready = queue.Queue(count)
    stop = threading.Event()
    thread = threading.Thread(target=_read, args=(source, ready, stop), daemon=True)
    thread.start()
    close = partial(_close, ready, stop, thread)
    atexit.register(close, PATIENCE_S)  # a thread that still decodes without an interpreter takes the process down
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is END:
                return
            yield item
    finally:
        atexit.unregister(close)
        close()
        end = getattr(source, "close", None)
        if end is not None:
            end()


def _close(ready: Ready, stop: threading.Event, thread: threading.Thread, patience_s: float = math.inf) -> None:
    """Wait until the thread ends; a source that does not answer, such as a server, is given up in the end."""
    stop.set()
    deadline = time.monotonic() + patience_s
    while thread.is_alive() and time.monotonic() < deadline:  # it may wait for room
        with suppress(queue.Empty):
            ready.get(timeout=0.05)


def _read(source: Iterator[Any], ready: Ready, stop: threading.Event) -> None:
    try:
        for item in source:
            if stop.is_set():
                return
            ready.put((item, None))
            if stop.is_set():
                return
        ready.put((END, None))
    except BaseException as error:  # whatever it is, it belongs to the caller
        ready.put((None, error))


def can_read_ahead(data: Any) -> bool:
    """Whether data are pictures that are decoded in this process, and draw no random numbers when they are read.

    Those of a data set of yours may be augmented by torch's global generator, from which training draws too.

    Args:
        data: data set, stream, or a loader of one.
    """
    if isinstance(data, DataLoader):
        if data.num_workers or data.collate_fn is not default_collate or not has_known_order(data):
            return False
        data = data.dataset
    while isinstance(data, Subset):
        data = data.dataset
    if isinstance(data, Dataset):
        prepared = prepared_by(data)
        return prepared is not None and prepared.augment is None
    return isinstance(data, IterableDataset) and _is_steady(data)


def has_known_order(loader: DataLoader) -> bool:
    """Whether the order of a loader draws random numbers only when it begins."""
    batches: Any = loader.batch_sampler
    if batches is None or isinstance(batches, list) or isinstance(loader.dataset, IterableDataset):
        return True
    kinds = SequentialSampler, RandomSampler, SeedableRandomSampler
    return type(batches) is BatchSampler and (isinstance(batches.sampler, list) or type(batches.sampler) in kinds)


def _is_steady(stream: IterableDataset) -> bool:
    """Whether pictures are decoded by us, and nothing else computes anything in a stream."""
    layers = [*layers_of(stream)]
    if any(
        hasattr(layer, "ex_iterables") for layer in layers
    ):  # several streams in one, each with functions of its own
        return False
    functions = [each for layer in layers if (each := getattr(layer, "function", None)) is not None]
    return len(functions) == 1 and isinstance(functions[0], PixelValues) and functions[0].augment is None
