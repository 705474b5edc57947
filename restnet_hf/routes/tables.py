"""A profile as text: a table that fits a terminal. No torch."""

import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol


COSTS = {  # with headings
    "macs": "MACs",
    "mean_macs": "mean MACs",
    "params": "params",
    "memory_mb": "MB",
    "latency_ms": "ms",
    "mean_latency_ms": "mean ms",
    "energy_j": "J",
}
MIN_ROUTE = 24  # characters of the column of routes, where the terminal has them
MAX_NAME = 20  # characters of a cost or score in the heading, which a file may have named
FRONT = "front"  # heading of the column with a star for the routes that no other beats
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


class Row(Protocol):
    """A row of a profile."""

    @property
    def route(self) -> object:
        """The route."""

    @property
    def costs(self) -> Mapping[str, float]:
        """Costs by name."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Scores by name."""


def short_number(value: float) -> str:
    """A number with a unit and at most five digits: ``14.7M``."""
    for unit, letter in UNITS:
        if abs(value) >= unit:
            return f"{value / unit:.1f}{letter}" if abs(value) < 1e15 else f"{value:.1e}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.3g}"


def profile_table(rows: Sequence[Row], width: int | None = None, front: Collection[Row] = ()) -> str:
    """Rows of a profile as a table, scores in per cent; long routes continue in the next line.

    Args:
        rows: rows of the profile.
        width: characters of a line; by default those of the terminal, or 80 where there is none.
        front: rows that no other beats, which get a star; there is no column of stars without any.
    """
    width = width or shutil.get_terminal_size().columns
    costs = {name: None for row in rows for name in row.costs}
    costs = dict.fromkeys([*(name for name in COSTS if name in costs), *costs])
    scores = dict.fromkeys(name for row in rows for name in row.scores)
    columns = [_column(COSTS.get(name, name), [_number(row.costs, name) for row in rows]) for name in costs]
    columns += [_column(f"{name}, %", [_number(row.scores, name, 100) for row in rows]) for name in scores]
    if front:
        columns.append(_column(FRONT, ["*" if any(row is each for each in front) else "" for row in rows]))
    longest = max([len("route"), *(len(str(row.route)) for row in rows)])
    left = min(longest, max(MIN_ROUTE, width - sum(2 + len(cells[0]) for cells in columns)))
    lines = []
    for index, text in enumerate(["route", *(str(row.route) for row in rows)]):
        first, *others = textwrap.wrap(text, left)
        lines.append("  ".join([first.ljust(left), *(cells[index] for cells in columns)]).rstrip())
        lines += others
    return "\n".join(lines)


def _number(values: Mapping[str, float], name: str, factor: float | None = None) -> str:
    if name not in values:
        return ""
    return short_number(values[name]) if factor is None else f"{factor * values[name]:.1f}"


def _column(heading: str, cells: Sequence[str]) -> list[str]:
    """A heading and its cells, right-aligned."""
    heading = "".join(letter if letter.isprintable() else "?" for letter in heading[:MAX_NAME])
    width = max(map(len, [heading, *cells]))
    return [cell.rjust(width) for cell in (heading, *cells)]
