"""Errors: those of our own, and messages of documented length and content."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


MAX_QUOTE = 200  # characters of a value in an error
MAX_ERROR = 3000  # characters of an error


class BudgetError(ValueError):
    """No route fits a budget, or the profile does not hold what the budget asks for."""


def quote(value: Any, most: int = MAX_QUOTE) -> str:
    """A value as ``repr`` gives it, its middle left out where it is long."""
    return shorten(repr(value[: 2 * most] if isinstance(value, str | bytes) else value), most)


def shorten(text: str, most: int = MAX_ERROR) -> str:
    """A text with its middle left out where it is longer than ``most``."""
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


@contextmanager
def short_errors() -> Iterator[None]:
    """Shorten the messages of documented errors: they quote files, which may hold megabytes in one value."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        text = str(error)
        if len(text) <= MAX_ERROR:
            raise
        kind = next(kind for kind in (BudgetError, OSError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(shorten(text)) from None  # else the long one is shown too


@contextmanager
def hub_errors() -> Iterator[None]:
    """Make a Hub that cannot be reached, or whose answer breaks off, an OSError that says what to do."""
    from huggingface_hub.utils import httpx  # a device that follows budgets has none

    try:
        yield
    except httpx.HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(
            f"the Hub could not be reached, or broke off: {error}. Try again, or set HF_HUB_OFFLINE=1 to use the cache"
        ) from error
