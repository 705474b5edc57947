"""Commands of caches on disk: cache list and cache prune, with the options of hf cache."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from restnet_hf.cli.base import app, command
from restnet_hf.cli.tables import say, show_caches, size_text


if TYPE_CHECKING:
    from restnet_hf.caches import CacheEntry

cache = typer.Typer(
    name="cache",
    help="Caches on disk: features of trainings, similarities and cuts of networks.",
    no_args_is_help=True,
)
app.add_typer(cache, name="cache")
CacheDirs = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder of feature caches (cache_dir) that no training on this machine has used; may be given several "
        "times."
    ),
]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        "-f",
        help="Only caches like size>1GB, accessed>30d (unused for 30 days), modified>1w or type=features; all must "
        "hold if several are given.",
    ),
]


@command("--filter 'size>1KB' --sort accessed", cache)
def list_(
    filter: Filters = None,
    sort: Annotated[
        str, typer.Option(help="Order: accessed, modified, name or size, with :asc or :desc behind it.")
    ] = "size",
    limit: Annotated[int | None, typer.Option(min=1, help="Largest number of caches to list.")] = None,
    cache_dir: CacheDirs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print paths alone.")] = False,
) -> None:
    """List all caches of this package: what of, size, time since the last use, and where."""
    from restnet_hf.caches import filter_caches, scan_caches, sort_caches

    entries = sort_caches(filter_caches(scan_caches(cache_dir or ()), filter or ()), sort)[:limit]
    if as_json:
        say(json.dumps([_fields(entry) for entry in entries], indent=2))
    elif quiet:
        for path in dict.fromkeys(str(entry.path) for entry in entries):
            say(path)
    elif entries:
        show_caches(entries)
    else:
        say("no caches")


@command("--filter 'accessed>30d' --yes", cache)
def prune(
    filter: Filters = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            help="Size that all caches, or those of --filter, may have together, such as 50GB; the longest unused are "
            "removed."
        ),
    ] = None,
    cache_dir: CacheDirs = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation prompt.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run/--no-dry-run", help="List what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove caches by age and size, and what killed jobs have left; by default only the latter.

    What a job uses now stays, and so do files of others.
    """
    from restnet_hf.caches import beyond_size, delete_caches, filter_caches, scan_caches

    entries = scan_caches(cache_dir or ())
    chosen = [entry for entry in entries if entry.complete]
    if filter or max_size is None:
        chosen = filter_caches(chosen, filter) if filter else []
    if max_size is not None:
        chosen = beyond_size(chosen, max_size)
    for entry in chosen:
        if entry.in_use:
            say(f"a job uses {entry.path}, so it stays")
    chosen = [entry for entry in entries if not entry.complete or (entry in chosen and not entry.in_use)]
    if not chosen:
        say("nothing to remove")
        return
    show_caches(chosen)
    if dry_run or not (yes or typer.confirm("Remove these?")):
        say("nothing was removed")
        return
    deleted, left = delete_caches(chosen)
    say(f"removed {len(deleted)} of {len(chosen)}, {size_text(sum(entry.size for entry in deleted))}")
    for entry in left:
        say(f"not removed, as a job uses it or its files cannot be deleted: {entry.path}", "yellow")


def _fields(entry: "CacheEntry") -> dict[str, object]:
    """An entry as JSON can hold it."""
    fields = asdict(entry) | {"path": str(entry.path)}
    del fields["files"]
    return fields
