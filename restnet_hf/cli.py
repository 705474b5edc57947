"""The command line: restnet-hf."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

from restnet_hf.adaptation.adapt import AdaptResult, adapt_to, device_images, parse_budget
from restnet_hf.comparing import compare_anchors
from restnet_hf.demo.paths import DATA, END, FRONT, RECIPE
from restnet_hf.distributed import this_process
from restnet_hf.export.export import export_routes, pareto_routes
from restnet_hf.hub.repository import PROFILE, find_adapters
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.recipe import Recipe, load_recipe, run_recipe
from restnet_hf.routes.profile import Budget
from restnet_hf.runtime.exported_model import ExportedModel
from restnet_hf.runtime.runners import RUNTIMES


app = typer.Typer(help="One network out of two pre-trained image classifiers.", no_args_is_help=True)
console = Console()

Front = Annotated[str | None, typer.Option(help="Anchor whose early blocks run: Hub id or local folder.")]
End = Annotated[str | None, typer.Option(help="Anchor whose late blocks run: Hub id or local folder.")]
Data = Annotated[str | None, typer.Option("--dataset", help="Labelled images: Hub id or local folder.")]
Out = Annotated[Path, typer.Option(help="Folder for the adapter, the report and the pictures.")]
Adapter = Annotated[str, typer.Argument(help="Adapter: Hub id or local folder.")]
Threads = Annotated[
    int | None, typer.Option(help="Number of threads of the processor; by default as many as torch uses.")
]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
Resume = Annotated[bool, typer.Option(help="Resume from the checkpoints of an earlier run.")]


@app.callback()
def main() -> None:
    """One network out of two pre-trained image classifiers, cut to the size of any device."""


@app.command()
def demo(
    out: Out = Path("restnet-demo"), front: Front = None, end: End = None, dataset: Data = None, resume: Resume = False
) -> None:
    """Stitch two small anchors that come with the package (or your own), on real images, and show the result."""
    if any((front, end, dataset)) and not all((front, end, dataset)):
        raise typer.BadParameter("give --front, --end and --dataset together, or none of them for the embedded demo")
    chosen = (front, end, dataset) if front else (str(FRONT), str(END), str(DATA))
    _run_job(lambda: load_recipe(RECIPE, **dict(zip(("front", "end", "dataset"), chosen, strict=True))), out, resume)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of a recipe.")],
    out: Out,
    front: Front = None,
    between: Annotated[
        list[str] | None,
        typer.Option(help="Another anchor of a family, between front and end; may be given several times, in order."),
    ] = None,
    end: End = None,
    dataset: Data = None,
    resume: Resume = False,
) -> None:
    """Run a recipe: choose, fit, train and profile stitches, and save the adapter."""
    overrides = {"front": front, "between": between or None, "end": end, "dataset": dataset}
    _run_job(lambda: load_recipe(recipe, **overrides), out, resume)


@app.command()
def find(
    base_model: Annotated[
        list[str] | None, typer.Option(help="Hub id of an anchor that adapters must have; may be given several times.")
    ] = None,
    macs: Annotated[float | None, typer.Option(help="Limit on multiply-accumulates for one image.")] = None,
    params: Annotated[float | None, typer.Option(help="Limit on the parameters of a route.")] = None,
    memory_mb: Annotated[float | None, typer.Option(help="Limit on the memory of a route in megabytes.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Limit on milliseconds for one image.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Lowest accuracy of a route, from 0 to 1.")] = None,
    device: Annotated[str | None, typer.Option(help="Device that the costs were measured on.")] = None,
) -> None:
    """Find adapters on the Hub with a route within limits, the most accurate first."""
    limits: dict[str, Any] = {"macs": macs, "params": params, "memory_mb": memory_mb, "latency_ms": latency_ms}
    try:
        adapters = find_adapters(base_model, **limits, min_accuracy=min_accuracy, device=device)
    except (ValueError, OSError) as error:
        _fail(error)
    table = Table(title=f"{len(adapters)} adapters")
    for column in ("adapter", "route", "MACs, M", "params, M", "accuracy, %"):
        table.add_column(column, justify="left" if column in ("adapter", "route") else "right", overflow="fold")
    for adapter in adapters:
        costs = [adapter.best.costs.get(name) for name in ("macs", "params")]
        accuracy = adapter.best.scores.get("accuracy")
        numbers = [*(None if cost is None else cost / 1e6 for cost in costs), accuracy and 100 * accuracy]
        printed = ["" if number is None else f"{number:.1f}" for number in numbers]
        table.add_row(adapter.repo_id, str(adapter.best.route), *printed)
    console.print(table)


@app.command()
def similarity(
    front: Annotated[str, typer.Argument(help="Anchor whose early blocks run: Hub id or local folder.")],
    end: Annotated[str, typer.Argument(help="Anchor whose late blocks run: Hub id or local folder.")],
    dataset: Annotated[str, typer.Option(help="Images, labelled or not: Hub id or local folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the matrices and pictures.")] = Path("similarity"),
    method: Annotated[
        list[str] | None, typer.Option(help="Selector that compares cuts; may be given several times.")
    ] = None,
    split: Split = "train",
    images: Annotated[int, typer.Option(help="Number of images, chosen at random.")] = 512,
    image_size: Annotated[
        int | None, typer.Option(help="Height and width of images in pixels; by default the anchors' own.")
    ] = None,
    max_routes: Annotated[int, typer.Option(help="Largest number of routes to choose.")] = 8,
    macs: Annotated[float | None, typer.Option(help="Limit on the multiply-accumulates of a route.")] = None,
    params: Annotated[float | None, typer.Option(help="Limit on the parameters of a route.")] = None,
    order: Annotated[str, typer.Option(help="Directions to compare: given, or auto for both.")] = "given",
) -> None:
    """Compare two classifiers: print the routes on which they are best joined, write all values and a heat map."""
    limits = {cost: limit for cost, limit in (("macs", macs), ("params", params)) if limit is not None}
    try:
        chosen = compare_anchors(
            front, end, dataset, out, method or ["cka"], split=split, images=images, image_size=image_size,
            max_routes=max_routes, budget=limits or None, order=order,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        _fail(error)
    for name, rows in chosen.items():
        table = Table(title=f"{name}: the best of each part of the range of costs")
        for column in ("route", "value", "MACs, M", "params, M", ""):
            table.add_column(column, justify="left" if column in ("route", "") else "right", no_wrap=True)
        for row in rows:
            numbers = (f"{row.score:.3f}", f"{row.costs['macs'] / 1e6:.1f}", f"{row.costs['params'] / 1e6:.2f}")
            table.add_row(str(row.route), *numbers, "dominated" if row.dominated else "")
        console.width = max(console.width, 60 + max(len(str(row.route)) for row in rows))
        console.print(table)
    console.print(f"written to {out}: for each selector .npz, .csv and .png", markup=False, highlight=False)


@app.command()
def measure(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="JSON file of latency tables, by device and runtime.")] = Path(
        "latency.json"
    ),
    batch_size: Annotated[int, typer.Option(help="Number of images in a run.")] = 1,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="Seconds after which no round of measurements begins.")] = 40.0,
) -> None:
    """Measure the latency of every piece of an adapter's routes on this device, and predict that of each route."""
    try:
        model = _load_here(adapter, threads)
        table = model.measure_latency(batch_size=batch_size, seconds=seconds)
        table.save(out)
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)
    shown = Table(title=f"{table.device}, {table.runtime}")
    for column in ("route", "predicted, ms", "measured, ms"):
        shown.add_column(column, justify="left" if column == "route" else "right", no_wrap=True)
    for route in sorted(model.all_routes, key=lambda route: table.latency_ms(model.steps(route))):
        check = table.checks.get(str(route))
        measured = "" if check is None else f"{check.measured.ms:.2f} ± {check.measured.spread_ms / 2:.2f}"
        shown.add_row(str(route), f"{table.latency_ms(model.steps(route)):.2f}", measured)
    console.width = max(console.width, 45 + max(len(str(route)) for route in model.all_routes))
    console.print(shown)
    console.print(f"written to {out}", markup=False, highlight=False)


@app.command("adapt")
def adapt_command(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help="Images of this device, labelled or not: local folder.")],
    budget: Annotated[list[str], typer.Option(help="Limit on a cost, as latency_ms=20; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the measured latencies.")] = Path("adapted"),
    split: Split = "train",
    images: Annotated[int, typer.Option(help="Number of images, chosen at random.")] = 500,
    search: Annotated[
        str | None,
        typer.Option(help="Search: exhaustive or evolution; by default exhaustive where there are few routes."),
    ] = None,
    predictor: Annotated[
        str,
        typer.Option(help="Predictor of scores for the evolution: few_images, a selector such as lstsq, or none."),
    ] = "few_images",
    exact: Annotated[
        bool, typer.Option(help="Evaluate routes on all images, even those that cannot win any more.")
    ] = False,
    threads: Threads = None,
    resume: Annotated[bool, typer.Option(help="Resume a search that was stopped.")] = False,
) -> None:
    """Find the best route of an adapter on this device, with its own images, which never leave it."""
    try:
        limits = parse_budget(budget)
        model = _load_here(adapter, threads)
        rows = device_images(model, data, split, images)
        chosen = None if predictor == "none" else predictor
        result = adapt_to(model, rows, limits, out, search=search, predictor=chosen, exact=exact, resume=resume)
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)
    _show_adapted(result, limits)
    console.print(f"written to {out}: the adapter with this device's profile, latency.json", highlight=False)


@app.command()
def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="Folder for the exported files.")],
    route: Annotated[
        list[str] | None,
        typer.Option(help="Route to export; may be given several times, and the routes then share their weights."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Limit on a cost, as macs=1e9, to export the best route within it instead of --route."),
    ] = None,
    pareto: Annotated[
        bool, typer.Option(help="Export all routes that no other beats in MACs and accuracy, instead of --route.")
    ] = False,
    runtime: Annotated[str, typer.Option(help=f"Runtime: {', '.join(RUNTIMES)}.")] = "onnx",
    precision: Annotated[
        str, typer.Option(help="Precision that the runtime supports: fp32, bf16, int8 or int8_dynamic.")
    ] = "fp32",
    data: Annotated[
        str | None, typer.Option(help="Images to calibrate and verify with: Hub id or local folder.")
    ] = None,
    split: Split = "train",
    images: Annotated[int, typer.Option(help="Number of images, chosen at random.")] = 628,
    calibration_images: Annotated[
        int, typer.Option(help="Number of the images that calibrate low precision; the others verify.")
    ] = 128,
    min_agreement: Annotated[
        float,
        typer.Option(
            help="Lowest share of images, from 0 to 1, on which an exported route must predict the same class."
        ),
    ] = 0.98,
    batch_size: Annotated[
        int | None, typer.Option(help="Number of images in a run; by default any number, where the runtime allows it.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Export routes for an edge runtime, verified against the adapter's own, with a script that runs them."""
    try:
        if bool(route) + bool(budget) + pareto > 1:
            raise ValueError("give --route, --budget or --pareto, not several of them")
        model = _load_here(adapter, threads)
        if budget:
            limits: dict[str, Any] = parse_budget(budget).limits
            model.set_budget(**limits)
        routes = pareto_routes(model) if pareto else route
        rows = None if data is None else device_images(model, data, split, images)
        exported = export_routes(
            model, out, routes, runtime=runtime, precision=precision, data=rows, min_agreement=min_agreement,
            calibration_images=calibration_images, batch_size=batch_size, threads=threads,
        )  # fmt: skip
        if Path(adapter).is_dir() and model.profiled is not None:
            model.profiled.save(Path(adapter) / PROFILE)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        _fail(error)
    _show_exported(exported)
    size = f"{exported.profiled.metadata['size_mb']:.1f} MB"
    console.print(f"written to {out}: {size}; try: python {out}/run.py PICTURE", markup=False, highlight=False)


def _show_exported(exported: ExportedModel) -> None:
    metadata = exported.profiled.metadata
    title = f"{exported.runtime}, {exported.precision}: {metadata['device']}, {metadata['threads']} threads"
    table = Table(title=title)
    for column in ("route", "latency, ms", "agreement, %", "accuracy, %", "in full precision"):
        table.add_column(column, justify="left" if column == "route" else "right", overflow="fold")
    for row in exported.profiled.routes:
        scores = [row.scores.get(score) for score in ("agreement", "accuracy")]
        kept = len(metadata["kept_in_full_precision"].get(str(row.route), ()))
        printed = ["" if score is None else f"{100 * score:.1f}" for score in scores]
        table.add_row(str(row.route), f"{row.costs['latency_ms']:.2f}", *printed, f"{kept} layers" if kept else "")
    console.width = max(console.width, 75 + max(len(str(route)) for route in exported.routes))
    console.print(table)


def _load_here(adapter: str, threads: int | None) -> StitchedModelForImageClassification:
    if threads is not None:
        torch.set_num_threads(threads)
    return StitchedModelForImageClassification.from_pretrained(adapter).to(this_process().device)


def _show_adapted(result: AdaptResult, budget: Budget) -> None:
    best, score = result.best, result.best.scores.get(result.score, 0)
    table = Table(title=f"within {budget}: {best.route}, {result.score} {score:.1%}")
    for column in ("rejected", "because"):
        table.add_column(column, overflow="fold")
    for each in result.rejected:
        table.add_row(str(each.route), f"{each.why}: {each.detail}")
    console.width = max(console.width, 140)
    console.print(table)
    costs = ", ".join(f"{cost} {value:.4g}" for cost, value in best.costs.items())
    console.print(f"chosen: {best.route} ({costs})", style="bold", markup=False, highlight=False)
    for route, check in result.checks.items():
        latencies = f"{check.predicted_ms:.2f} ms predicted, {check.measured.ms:.2f} ms measured from end to end"
        console.print(f"{route}: {latencies}", markup=False, highlight=False)


def _fail(error: Exception) -> NoReturn:
    if os.environ.get("RESTNET_HF_DEBUG"):
        raise error
    console.print(f"error: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(1) from error


def _run_job(load: Callable[[], Recipe], out: Path, resume: bool) -> None:
    try:
        recipe = load()
        report = run_recipe(recipe, out, resume)
    except (ValueError, OSError) as error:
        _fail(error)
    state = this_process()
    if state.is_main_process:
        _show_report(report, out)
    if state.num_processes > 1:
        state.destroy_process_group()


def _show_report(report: dict[str, Any], out: Path) -> None:
    console.width = max(console.width, 75 + max(len(row["route"]) for row in report["routes"]))  # no name is cut
    compared = report["similarity"] is not None
    table = Table(title="routes, cheapest first")
    method = [report["recipe"]["method"]] if compared else []
    for column in ("route", "MACs, M", "params, K", *method, "R²", "fitted, %", "trained, %"):
        table.add_column(column, justify="left" if column == "route" else "right", no_wrap=True)
    for row in report["routes"]:
        stitched, r2 = "r2" in row, row.get("r2")  # branches are not fitted
        value = [f"{row['similarity']:.2f}" if stitched else ""] if compared else []
        table.add_row(
            row["route"],
            f"{row['macs'] / 1e6:.1f}",
            f"{row['params'] / 1e3:.0f}",
            *value,
            "" if r2 is None else f"{r2:.2f}",
            f"{100 * row['accuracy_least_squares']:.1f}" if stitched else "",
            f"{100 * row['accuracy']:.1f}",
            style=None if stitched else "bold",
        )
    console.print(table)
    checks = ", ".join(f"{name.replace('_', ' ')}: {'yes' if ok else 'NO'}" for name, ok in report["checks"].items())
    seconds = ", ".join(f"{name} {spent:.0f} s" for name, spent in report["seconds"].items())
    pictures = "similarity.png, tradeoff.png" if compared else "tradeoff.png"
    console.print(f"{checks}\n{seconds}\nwritten to {out}: adapter/, report.json, {pictures}")


if __name__ == "__main__":
    app()
