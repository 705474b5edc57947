"""What commands print: tables that fit the terminal without cutting anything, and lines."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segments
from rich.table import Table

from restnet_hf.routes.fronts import describe_gap


if TYPE_CHECKING:
    from restnet_hf.adaptation.adapt import AdaptResult
    from restnet_hf.caches import CacheEntry
    from restnet_hf.hub.repository import FoundAdapter
    from restnet_hf.profiling.latency import LatencyTable
    from restnet_hf.routes.profile import AnyProfiled, Budget, Profile
    from restnet_hf.routes.route import Route
    from restnet_hf.runtime.exported_model import ExportedModel
    from restnet_hf.runtime.sustained import Period, SustainedLatency
    from restnet_hf.scouting.results import ScoutResult
    from restnet_hf.selection.ranking import RankedRoute

console = Console()
errors = Console(stderr=True)
TEXTS = (  # columns of text, which continue in the next line
    *("adapter", "because", "best within the budget", "candidate", "of", "pair", "rejected", "route", "where"),
)
LEAST_TEXT = 16  # characters of a column of text, however narrow the terminal is
MOST_PAIRS = 12  # that are printed
NEAR = {True: "~", False: "", None: ""}  # mark of a pair as good as the first
FEW = 100  # images, below which a comparison is mostly chance
STAR = "*: nothing else beats it"
COSTS = {  # of a profile: heading, and the number that it is divided by
    "macs": ("MACs, M", 1e6),
    "mean_macs": ("mean MACs, M", 1e6),
    "params": ("params, K", 1e3),
    "memory_mb": ("memory, MB", 1.0),
    "latency_ms": ("latency, ms", 1.0),
    "mean_latency_ms": ("mean latency, ms", 1.0),
    "energy_j": ("energy, J", 1.0),
}


def say(text: str, style: str | None = None) -> None:
    """Print a line as it is, however long."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning on standard error."""
    errors.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def warn_of_few(images: int, purpose: str) -> None:
    """Warn where images are too few for what is asked.

    Args:
        images: number of images that are given.
        purpose: what they are for, such as "accuracy".
    """
    if images < FEW:
        noun = "image is" if images == 1 else "images are"
        points = 50 / max(1, images) ** 0.5  # standard error of a share near one half, in per cent
        warn(f"{images} {noun} too few for {purpose}: {points:.0f} points are chance; give some hundreds")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], bold: Collection[int] = ()) -> None:
    """Print a table as wide as the terminal, or 80 characters where there is none.

    Routes and other texts continue in the next line; numbers and headings are never cut or broken.

    Args:
        title: line above the table.
        columns: headings; those of `TEXTS` are texts, all others numbers.
        rows: text of each cell, by row.
        bold: numbers of the rows to print in bold.
    """
    say(title, style="italic")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    widths = 0
    for number, column in enumerate(columns):
        if column in TEXTS:
            table.add_column(column, overflow="fold")
            continue
        width = max(map(len, [*column.split(), *(row[number] for row in rows)]), default=1)
        table.add_column(column, justify="right", width=width)
        widths += width
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number in bold else None)
    texts = sum(column in TEXTS for column in columns)
    least = widths + 3 * len(columns) + LEAST_TEXT * texts
    options = console.options.update_width(max(least, console.width))
    console.print(Segments(console.render(table, options)), crop=False, end="")


def number(value: float | None, digits: int = 1, factor: float = 1.0) -> str:
    """A number with some digits after the point; nothing for None."""
    return "" if value is None else f"{factor * value:.{digits}f}"


def show_report(report: Mapping[str, Any]) -> None:
    """Print the report of a recipe: its routes, the checks and the seconds of its parts."""
    compared = report["similarity"] is not None
    method = report["recipe"]["method"]
    rows = []
    for row in report["routes"]:
        stitched = "r2" in row  # branches are not fitted
        value = [number(row["similarity"] if stitched else None, 2)] if compared else []
        fitted = number(row["accuracy_least_squares"] if stitched else None, 1, 100)
        costs = number(row["macs"], 1, 1e-6), number(row["params"], 0, 1e-3)
        trained, star = number(row["accuracy"], 1, 100), "*" if row.get("front") else ""
        rows.append([row["route"], *costs, *value, number(row.get("r2"), 2), fitted, trained, star])
    accuracies = ("fitted, %", "trained, %")
    columns = ["route", "MACs, M", "params, K", *(["value"] if compared else []), "R²", *accuracies, ""]
    title = f"routes, cheapest first{f'; value: {method}' if compared else ''}; {STAR}"
    show_table(title, columns, rows, [index for index, row in enumerate(report["routes"]) if "r2" not in row])
    _show_cascades(report.get("cascades", ()))
    _say_what_is_offered(report)
    say(", ".join(f"{name.replace('_', ' ')}: {'yes' if ok else 'NO'}" for name, ok in report["checks"].items()))
    say(", ".join(f"{name} {spent:.0f} s" for name, spent in report["seconds"].items()))


def _show_cascades(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the cascades of a report."""
    cells = [
        [row["cascade"], number(row["mean_macs"], 1, 1e-6), number(row["macs"], 1, 1e-6),
         f"{number(row['accuracy'], 1, 100)} ± {number(row['standard_error'], 1, 100)}", "*" if row["front"] else ""]
        for row in rows
    ]  # fmt: skip
    if cells:
        columns = ("route", "mean MACs, M", "at most", "accuracy, %", "")
        show_table(f"cascades: unsure images go on; by cross-validation; {STAR}", columns, cells)


def _say_what_is_offered(report: Mapping[str, Any]) -> None:
    """Print the gap closed, and the routes that the adapter leaves out."""
    closed, dropped = report.get("gap_closed"), report.get("dropped", {})
    if closed is not None:
        mean = " over mean MACs" if report.get("cascades") else ""
        say(f"gap closed{mean}: {closed:.2f} ({report['gap_closed_stitched']:.2f} by stitched routes alone)")
    if dropped:
        say("\n  ".join(["not in the adapter, since another route is as good at no more MACs:", *dropped]))
        if not any("r2" in row and row["route"] not in dropped for row in report["routes"]):
            say("no stitched route is left: an anchor alone is as good at every budget", "yellow")


def show_compared(name: str, rows: "Sequence[RankedRoute]") -> None:
    """Print the routes that a selector chose."""
    cells = [
        [str(row.route), number(row.score, 3), number(row.costs["macs"], 1, 1e-6),
         number(row.costs["params"], 2, 1e-6), "dominated" if row.dominated else ""]
        for row in rows
    ]  # fmt: skip
    columns = ("route", "value", "MACs, M", "params, M", "")
    show_table(f"{name}: the best of each part of the range of costs", columns, cells)


def show_scouted(result: "ScoutResult") -> None:
    """Print the best pairs of anchors for a budget, and the candidates that were left out."""
    rows = []
    for pair in result.pairs[:MOST_PAIRS]:
        best, anchors = pair.best(result.budget), [pair.alone(name) for name in (pair.front, pair.end)]
        both = (" ".join(number(row.costs["macs"], 1, 1e-6) for row in anchors),
                " ".join(number(row.scores["accuracy"], 1, 100) for row in anchors))  # fmt: skip
        found = ["", "", ""] if best is None else [
            str(best.route), number(best.costs["mean_macs"], 1, 1e-6), number(best.scores["accuracy"], 1, 100)
        ]  # fmt: skip
        rows.append([f"{pair.front} + {pair.end}", *both, *found, number(pair.gap_closed, 2), NEAR[pair.near_best]])
    more = "" if len(result.pairs) <= MOST_PAIRS else f", the first {MOST_PAIRS}"
    columns = ("pair", "MACs, M", "accuracies, %", "best within the budget", "mean MACs, M", "predicted, %", "gap", "")
    show_table(f"{len(result.pairs)} pairs, best first within {result.budget}{more}", columns, rows, [0])
    _say_checked(result)
    if result.left_out:
        show_table("left out", ("candidate", "because"), [[*each] for each in result.left_out.items()])
    if result.new_head:
        say("all candidates got new heads, trained on the data set's classes")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    asked = result.job.get("images", result.images) // 2 * 2
    if result.images < asked:
        say(f"stitched routes were fitted and tested on {result.images} images, not {asked}: the splits have no more")
    images = result.images if not result.eval_images else result.images // 2 + result.eval_images
    say(f"{result.passes} anchors, one pass over {images} images each; {spent}")


def _say_checked(result: "ScoutResult") -> None:
    """Print how many pairs are as good as the first, and its score on images that chose nothing."""
    check, best = result.check, result.winner.best(result.budget)
    if result.winner.near_best is None:
        say("near equals are not known, and the first pair is not checked: only a whole run for this budget does that")
        return
    near = f"~: {len(result.near)} of {len(result.pairs)} pairs are not significantly worse than the first"
    say(f"{near}; the best is among them (95 %)")
    if check is None or best is None:
        say(
            f"the first pair is not checked: {result.eval_images} held-out images are too few to set a third of them "
            "aside, so its predicted accuracy is too high; give 300 or more, better thousands"
        )
        return
    gap = "" if check.gap_closed is None else f", gap closed {number(check.gap_closed, 2)}"
    gap += "" if check.gap_error is None else f" ± {number(check.gap_error, 2)}"
    say(
        f"the first pair on {check.images} images that chose nothing: {number(check.accuracy, 1, 100)} ± "
        f"{number(check.standard_error, 1, 100)} %{gap} ({number(best.scores['accuracy'], 1, 100)} % predicted); "
        f"it takes {number(check.mean_macs, 1, 1e-6)} M mean MACs there (budget {result.budget})"
    )


def show_found(adapters: "Sequence[FoundAdapter]") -> None:
    """Print adapters of the Hub with their best routes."""
    published = any(adapter.table is not None for adapter in adapters)
    rows = []
    for adapter in adapters:
        macs = adapter.best.costs.get("mean_macs", adapter.best.costs.get("macs"))  # of a cascade the mean
        costs = [number(value, 1, 1e-6) for value in (macs, adapter.best.costs.get("params"))]
        costs += [number(adapter.best.costs.get("latency_ms"), 2)] if published else []
        accuracy = number(adapter.best.scores.get("accuracy"), 1, 100)
        rows.append([adapter.repo_id, str(adapter.best.route), *costs, accuracy])
    latency = ["latency, ms"] if published else []
    columns = ("adapter", "route", "MACs, M", "params, M", *latency, "accuracy, %")
    show_table(f"{len(adapters)} adapter{'' if len(adapters) == 1 else 's'}", columns, rows)
    for table in {adapter.table.name: adapter.table for adapter in adapters if adapter.table is not None}.values():
        say(f"latencies: {table.name} ({table.runtime} {table.version}, {table.date})")


def show_latency(table: "LatencyTable", predicted: "Mapping[Route, float]") -> None:
    """Print the latency of routes, predicted and, for some, measured."""
    rows = []
    for route in sorted(predicted, key=predicted.__getitem__):
        check = table.checks.get(str(route))
        measured = "" if check is None else f"{check.measured.ms:.2f} ± {check.measured.spread_ms / 2:.2f}"
        rows.append([str(route), number(predicted[route], 2), measured])
    show_table(f"{table.device}, {table.runtime}", ("route", "predicted, ms", "measured, ms"), rows)


@contextmanager
def minutes_bar(minutes: float) -> "Iterator[Callable[[Period], None]]":
    """A bar of the minutes of a measurement, on terminals only; yields the function that moves it.

    Args:
        minutes: minutes that the measurement takes.
    """
    columns = BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=60 * minutes)
        yield lambda period: progress.update(
            task, completed=period.at_s, description=f"{period.latency_ms:.2f} ms; Ctrl-C ends it"
        )


def show_sustained(result: "SustainedLatency") -> None:
    """Print the latency of a route at the beginning and end of minutes, with clock rate and temperature."""
    last = result.periods[-1]
    marks = sorted({round(k * (len(result.periods) - 1) / 9) for k in range(10)})
    rows = [
        [number(p.at_s / 60), number(p.latency_ms, 2), number(p.clock_mhz, 0), number(p.temperature_c, 0)]
        for p in (result.periods[mark] for mark in marks)
    ]
    columns = ("minutes", "latency, ms", "clock, MHz", "temperature, °C")
    show_table(f"{result.route} for {last.at_s / 60:.1f} minutes", columns, rows)
    say(
        f"median of the first {result.window_s:.0f} s {result.first_ms:.2f} ms, of the last {result.last_ms:.2f} ms: "
        f"{result.slowdown:.2f} times"
    )


def show_caches(entries: "Sequence[CacheEntry]") -> None:
    """Print caches: what they are of, their size, the time since the last use, and where they lie."""
    now, rows = time.time(), list[list[str]]()
    for entry in entries:
        of = f"{entry.of} (in use)" if entry.in_use else entry.of
        home, where = str(Path.home()), str(entry.path)
        where = f"~{where.removeprefix(home)}" if where.startswith(f"{home}{os.sep}") else where
        rows.append([entry.type, size_text(entry.size), _span(now - entry.accessed), of, where])
    total = size_text(sum(entry.size for entry in entries))
    title = f"{len(entries)} cache{'' if len(entries) == 1 else 's'}, {total}"
    show_table(title, ("type", "size", "unused for", "of", "where"), rows)


def size_text(size: float) -> str:
    """A size in bytes as text, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _span(seconds: float) -> str:
    """A time span in its largest whole unit."""
    for unit, length_s in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def show_memory(memory: Mapping[str, Mapping[str, float]]) -> None:
    """Print the peak memory of a process for each route."""
    rows = [[route, number(each["resident_mb"]), number(each["loaded_mb"])] for route, each in memory.items()]
    show_table("peak resident memory of a process", ("route", "all, MB", "of the route, MB"), rows)


def show_profile(profile: "Profile") -> None:
    """Print the costs and scores of routes, the cheapest first, then those of cascades."""
    rows: list[AnyProfiled] = sorted(profile.routes, key=lambda row: row.costs.get("macs", 0.0))
    rows += sorted(profile.cascades, key=lambda row: row.costs.get("mean_macs", 0.0))
    costs = [name for name in COSTS if any(name in row.costs for row in rows)]
    scores = [*dict.fromkeys(name for row in rows for name in row.scores)]
    cells = []
    for row in rows:
        spent = (number(row.costs.get(name), 4 if name == "energy_j" else 1, 1 / COSTS[name][1]) for name in costs)
        cells.append([str(row.route), *spent, *(number(row.scores.get(name), 1, 100) for name in scores)])
    columns = ["route", *(COSTS[name][0] for name in costs), *(f"{name}, %" for name in scores)]
    cascades = f" and {len(profile.cascades)} cascades" if profile.cascades else ""
    _show_front(f"{len(profile)} routes{cascades}, cheapest first", columns, cells, rows, profile)


def _show_front(
    title: str,
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: "Sequence[AnyProfiled]",
    profile: "Profile",
    bold: Collection[int] = (),
) -> None:
    """Print a table with a star for the rows that no other of the profile beats, and the gap closed.

    Args:
        title: line above the table.
        columns: heading of each column.
        cells: text of each cell, by row.
        rows: the row of the profile for each row of the table.
        profile: profile that has the rows.
        bold: numbers of the rows to print in bold.
    """
    front = profile.front()
    if not front:
        show_table(title, columns, cells, bold)
        return
    stars = ["*" if any(row is each for each in front) else "" for row in rows]
    starred = [[*cell, star] for cell, star in zip(cells, stars, strict=True)]
    show_table(f"{title}; {STAR}", [*columns, ""], starred, bold)
    gap = describe_gap(profile.rows, profile.default_cost, profile.find_score() or "")
    if gap:
        say(gap)


def show_exported(exported: "ExportedModel") -> None:
    """Print the latency and the scores of exported routes."""
    metadata = exported.profiled.metadata
    rows = []
    for row in exported.profiled.rows:
        scores = (number(row.scores.get(score), 1, 100) for score in ("agreement", "accuracy"))
        kept = len(metadata["kept_in_full_precision"].get(str(row.route), ()))
        ms = row.costs.get("mean_latency_ms", row.costs.get("latency_ms"))  # of a cascade the mean
        rows.append([str(row.route), number(ms, 2), *scores, f"{kept} layers" if kept else ""])
    title = f"{exported.runtime}, {exported.precision}: {metadata['device']}, {metadata['threads']} threads"
    show_table(title, ("route", "latency, ms", "agreement, %", "accuracy, %", "in full precision"), rows)


def show_adapted(result: "AdaptResult", budget: "Budget") -> None:
    """Print the route that was chosen for a device, and why the others were not."""
    best, score = result.best, result.best.scores.get(result.score, 0)
    title = f"within {budget}: {best.route}, {result.score} {score:.1%}"
    show_table(title, ("rejected", "because"), [[str(r.route), f"{r.why}: {r.detail}"] for r in result.rejected])
    costs = ", ".join(f"{cost} {value:.4g}" for cost, value in best.costs.items())
    say(f"chosen: {best.route} ({costs})", style="bold")
    for route, check in result.checks.items():
        say(f"{route}: {check.predicted_ms:.2f} ms predicted, {check.measured.ms:.2f} ms measured from end to end")
