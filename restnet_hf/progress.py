"""Progress bars of long steps, shown on terminals and in notebooks only, and by one process only."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from restnet_hf.distributed import this_process


def shows_bars() -> bool:
    """Whether somebody watches: standard error is a terminal or belongs to a notebook, and this process speaks.

    A bar that is written to a file or a pipe is thousands of lines that nobody reads.
    """
    return _is_watched() and this_process().is_local_main_process


def _is_watched() -> bool:
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


@contextmanager
def library_bars() -> Iterator[None]:
    """Hide the bars of transformers and datasets in the block where standard error is a file or a pipe."""
    if _is_watched():
        yield
        return
    datasets: Any = sys.modules.get("datasets")
    shown = logging.is_progress_bar_enabled()
    tables_shown = datasets is not None and not datasets.are_progress_bars_disabled()
    try:
        if shown:
            logging.disable_progress_bar()
        if tables_shown:
            datasets.disable_progress_bars()
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if tables_shown:
            datasets.enable_progress_bars()


def progress_bar(
    items: Iterable[Any] | None = None,
    desc: str = "",
    total: float | None = None,
    *,
    shown: bool = True,
    **options: Any,
) -> Any:
    """A bar over items, or one that is updated by hand; ``transformers.utils.logging`` can disable all of them.

    Args:
        items: items to loop over; None for a bar that ``update`` moves.
        desc: what the step does, in a word or two.
        total: number of items, where they do not know it.
        shown: whether to show it where somebody watches, see `shows_bars`.
        **options: further options of ``tqdm``.
    """
    return logging.tqdm(items, desc=desc, total=total, disable=not (shown and shows_bars()), **options)
