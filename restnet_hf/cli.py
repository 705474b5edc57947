"""The command restnet-hf."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from restnet_hf.embedded import DATA, END, FRONT, RECIPE
from restnet_hf.recipe import Recipe, load_recipe, run_recipe


app = typer.Typer(help="One network out of two pre-trained image classifiers.", no_args_is_help=True)
console = Console()

Front = Annotated[str | None, typer.Option(help="Anchor whose early blocks run: Hub id or local folder.")]
End = Annotated[str | None, typer.Option(help="Anchor whose late blocks run: Hub id or local folder.")]
Data = Annotated[str | None, typer.Option("--dataset", help="Labelled images: Hub id or local folder.")]
Out = Annotated[Path, typer.Option(help="Folder for the adapter, the report and the pictures.")]
Resume = Annotated[bool, typer.Option(help="Go on from the checkpoints of an earlier run.")]


@app.callback()
def main() -> None:
    """One network out of two pre-trained image classifiers, cut to the size of any device."""


@app.command()
def demo(
    out: Out = Path("restnet-demo"), front: Front = None, end: End = None, dataset: Data = None, resume: Resume = False
) -> None:
    """Stitch two small anchors that come with the package (or yours), on real images, and show what came out."""
    if any((front, end, dataset)) and not all((front, end, dataset)):
        raise typer.BadParameter("give --front, --end and --dataset together, or none of them for the embedded demo")
    chosen = (front, end, dataset) if front else (str(FRONT), str(END), str(DATA))
    _do(lambda: load_recipe(RECIPE, **dict(zip(("front", "end", "dataset"), chosen, strict=True))), out, resume)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe.")],
    out: Out,
    front: Front = None,
    end: End = None,
    dataset: Data = None,
    resume: Resume = False,
) -> None:
    """Run a recipe: choose, fit, train and profile stitches, and save the adapter."""
    _do(lambda: load_recipe(recipe, front=front, end=end, dataset=dataset), out, resume)


def _do(make: Any, out: Path, resume: bool) -> None:
    try:
        recipe: Recipe = make()
        report = run_recipe(recipe, out, resume)
    except (ValueError, OSError) as error:
        if os.environ.get("RESTNET_HF_DEBUG"):
            raise
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    console.width = max(console.width, 75 + max(len(row["route"]) for row in report["routes"]))  # no name is cut
    table = Table(title="routes, cheapest first")
    for column in ("route", "MACs, M", "params, K", "CKA", "R²", "fitted, %", "trained, %"):
        table.add_column(column, justify="left" if column == "route" else "right", no_wrap=True)
    for row in report["routes"]:
        stitched = "similarity" in row
        table.add_row(
            row["route"],
            f"{row['macs'] / 1e6:.1f}",
            f"{row['params'] / 1e3:.0f}",
            f"{row['similarity']:.2f}" if stitched else "",
            f"{row['r2']:.2f}" if stitched else "",
            f"{100 * row['accuracy_least_squares']:.1f}" if stitched else "",
            f"{100 * row['accuracy']:.1f}",
            style=None if stitched else "bold",
        )
    console.print(table)
    checks = ", ".join(f"{name.replace('_', ' ')}: {'yes' if ok else 'NO'}" for name, ok in report["checks"].items())
    seconds = ", ".join(f"{name} {spent:.0f} s" for name, spent in report["seconds"].items())
    console.print(f"{checks}\n{seconds}\nwritten to {out}: adapter/, report.json, similarity.png, tradeoff.png")
