"""The app that commands are added to, and what is the same for all of them: errors, bars and --version."""

import inspect
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer

from restnet_hf.cli.flags import in_flags
from restnet_hf.cli.tables import errors, say
from restnet_hf.sources import check_paths, note_missing


QUIET = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
HUB = "huggingface.co"  # in errors of transformers that do not name what they could not load
SOURCES = (
    "adapter",
    "candidates",
    "front",
    "between",
    "end",
    "dataset",
    "data",
)  # options that take a Hub id or a folder
app = typer.Typer(
    help="One network out of two pre-trained image classifiers.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"restnet-hf {version('restnet-hf')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """One network out of two pre-trained image classifiers, cut to the size of any device."""
    if not sys.stderr.isatty():  # before the libraries are imported, which read these then
        for name in QUIET:
            os.environ.setdefault(name, "1")


def command(example: str, group: typer.Typer | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command to the app; its documented errors end the process with status 1 and a line on standard error.

    Args:
        example: arguments of a call, for the help of the command.
        group: group of commands that it belongs to; by default the app itself.
    """
    to, path = (app, "") if group is None else (group, f"{group.info.name} ")

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(**options: Any) -> None:
            sources = _sources(options)
            try:
                check_paths(sources)
                function(**options)
            except (typer.Exit, typer.Abort):  # RuntimeErrors, too
                raise
            except (ValueError, OSError, RuntimeError, ImportError) as error:
                _fail(error, inspect.signature(function).parameters, sources)

        name = function.__name__.removesuffix("_")  # list_, as list is a name of Python's
        to.command(name, epilog=f"Example: restnet-hf {path}{name} {example}".rstrip())(run)
        return run

    return add


def _sources(options: dict[str, Any]) -> list[str]:
    """The Hub ids and folders among the options of a command."""
    given = [options.get(name) or [] for name in SOURCES]
    return [source for each in given for source in ([each] if isinstance(each, str) else each)]


def _fail(error: Exception, options: Any, sources: list[str]) -> NoReturn:
    if os.environ.get("RESTNET_HF_DEBUG"):
        raise error
    text = in_flags(str(error), options)
    if isinstance(error, OSError | ValueError) and not isinstance(error, FileExistsError | FileNotFoundError):
        text += note_missing(source for source in sources if source in text or HUB in text)
    errors.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1) from error
