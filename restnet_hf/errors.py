"""Our own errors, and messages of documented length and content."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


MAX_QUOTE = 200  # characters of a value in an error
MAX_ERROR = 3000  # characters of an error


class BudgetError(ValueError):
    """No route fits a budget, or the profile does not hold what the budget asks for."""


class PictureError(ValueError):
    """A picture is broken, truncated or too large to decode."""


def quote(value: Any, most: int = MAX_QUOTE) -> str:
    """The ``repr`` of a value with its middle left out where it is long; its type where it has none."""
    try:
        text = repr(value[: 2 * most] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # it holds an integer of too many digits, or is nested too deeply
        text = type(value).__name__
    return shorten(text, most)


def shorten(text: str, most: int = MAX_ERROR) -> str:
    """A text with its middle left out where it is longer than ``most``."""
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


@contextmanager
def short_errors() -> Iterator[None]:
    """Shorten the messages of documented errors, which may quote megabytes of an untrusted file."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        text = str(error)
        if len(text) <= MAX_ERROR:
            raise
        kind = next(kind for kind in (BudgetError, OSError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(shorten(text)) from None  # a cause would be shown at full length


@cache
def http_error() -> type[Exception]:
    """The ``HTTPError`` of the httpx that huggingface_hub uses: the base of its errors and of a connection's."""
    from huggingface_hub.errors import HfHubHTTPError  # not installed on a device that only follows budgets

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@contextmanager
def hub_errors() -> Iterator[None]:
    """Raise OSError, with what to do next, where the Hub cannot be reached or the connection breaks off."""
    try:
        yield
    except http_error() as error:
        if isinstance(error, OSError):
            raise
        raise OSError(
            f"the Hub could not be reached, or the connection broke off: {error}. Try again, or set HF_HUB_OFFLINE=1 "
            "to use the cache"
        ) from error
