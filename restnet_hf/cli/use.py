"""Commands that use an adapter: predict and profile."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restnet_hf.cli.base import command
from restnet_hf.cli.options import Adapter, BudgetTexts, Threads, is_exported, load_here, parse_budget
from restnet_hf.cli.outputs import check_output
from restnet_hf.cli.tables import say, show_profile, warn_of_few


if TYPE_CHECKING:
    from restnet_hf.modeling_restnet import StitchedModelForImageClassification
    from restnet_hf.routes.profile import Profile


@command("me/r50-mbv2 photo.jpg --budget macs=100e6")
def predict(
    adapter: Annotated[str, typer.Argument(help="Adapter, Hub id or local folder, or a folder of exported routes.")],
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE", help="Pictures to classify.")],
    route: Annotated[str | None, typer.Option(help="Route to run; by default the active one.")] = None,
    cascade: Annotated[str | None, typer.Option(help="Cascade with thresholds to run in place of a route.")] = None,
    budget: BudgetTexts = None,
    top_k: Annotated[int, typer.Option(help="Number of classes for each picture.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a line for each picture.")] = False,
    threads: Threads = None,
) -> None:
    """Classify pictures, by one route or the best one within a budget. A folder of exported routes needs no torch."""
    if sum(map(bool, (route, cascade, budget))) > 1:
        raise typer.BadParameter("give --route, --cascade or --budget, not several of them")
    if missing := [str(path) for path in pictures if not path.is_file()]:
        raise typer.BadParameter(f"no such picture: {', '.join(missing)}")
    limits = parse_budget(budget).limits if budget else None

    model: Any
    if is_exported(adapter):
        from restnet_hf.runtime.exported_model import ExportedModel

        model = ExportedModel(adapter, threads)
    else:
        model = load_here(adapter, threads)
    paths = [str(path) for path in pictures]
    answers = model.predict(paths, route=route, cascade=cascade, budget=limits, top_k=top_k)
    if as_json:
        rows = [{"picture": str(path), "classes": each} for path, each in zip(pictures, answers, strict=True)]
        typer.echo(json.dumps(rows, indent=2))
        return
    for path, classes in zip(pictures, answers, strict=True):
        say(f"{path}: " + ", ".join(f"{each['label']} {each['score']:.1%}" for each in classes))


@command("me/r50-mbv2 --data photos --cascades --overwrite")
def profile(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help="Labelled images: Hub id or local folder.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "test",
    images: Annotated[int | None, typer.Option(help="Number of images, chosen at random; by default all.")] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Measure the latency on this device too.")] = False,
    cascades: Annotated[bool, typer.Option("--cascades", help="Calibrate cascades of the routes too.")] = False,
    batch_size: Annotated[int, typer.Option(help="Number of images in a run.", min=1)] = 64,
    out: Annotated[
        Path | None, typer.Option(help="JSON file of the profile; by default profile.json of a local adapter.")
    ] = None,
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the profile that is there.")] = False,
) -> None:
    """Measure the costs and the accuracy of every route of an adapter, from which budgets are then met."""
    from restnet_hf.runtime.exported_files import PROFILE

    file = out or (Path(adapter) / PROFILE if Path(adapter).is_dir() else None)
    if file is not None:
        check_output(file, overwrite)

    from restnet_hf.adaptation.adapt import device_images

    model = load_here(adapter, threads)
    rows = device_images(model, data, split, images)
    warn_of_few(len(rows), "the accuracy of a route")
    table = model.measure_latency() if latency else None
    measured = _named(model, model.profile(rows, batch_size=batch_size, latency=table, cascades=cascades), data)
    if file is not None:
        measured.save(file)
    show_profile(measured)
    say("not saved: give --out to save the profile of an adapter on the Hub" if file is None else f"written to {file}")


def _named(model: "StitchedModelForImageClassification", measured: "Profile", data: str) -> "Profile":
    """A profile with the name of its data; profiles are shared, and paths of this machine are private."""
    name = Path(data).name if Path(data).is_dir() else data
    model.profiled = replace(measured, metadata={**measured.metadata, "dataset": name})
    return model.profiled
