"""Commands that fit an adapter to a device: measure, adapt and export."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restnet_hf.cli.base import command
from restnet_hf.cli.options import (
    Adapter,
    BudgetTexts,
    Device,
    MaxAccuracyDrop,
    MinAgreement,
    Overwrite,
    Split,
    Target,
    Threads,
    WithPreprocessing,
    is_exported,
    load_here,
    parse_budget,
)
from restnet_hf.cli.outputs import Written, check_output
from restnet_hf.cli.tables import (
    minutes_bar,
    say,
    show_adapted,
    show_exported,
    show_latency,
    show_memory,
    show_profile,
    show_sustained,
    warn_of_few,
)


if TYPE_CHECKING:
    from restnet_hf.modeling_restnet import StitchedModelForImageClassification
    from restnet_hf.profiling.latency import LatencyTable
    from restnet_hf.routes.device_table import DeviceTable
    from restnet_hf.routes.profile import Budget


@command("me/r50-mbv2 --out latency.json")
def measure(
    adapter: Annotated[str, typer.Argument(help="Adapter, Hub id or local folder, or a folder of exported routes.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of latency tables, by device and runtime; by default latency.json. Exported routes are "
            "measured into their own folder."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of images in a run, of an adapter.", min=1)] = 1,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="Seconds after which no round of measurements begins.")] = 40.0,
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes for which the active route runs besides, as a warm device slows down."),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure the peak memory of a process for each exported route too.")
    ] = False,
    push: Annotated[
        bool,
        typer.Option(
            "--push",
            help="Publish the latencies in the adapter's repository, as a pull request where you may not write.",
        ),
    ] = False,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository to publish in; by default that of the adapter.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request in place of a commit, with --push.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace this device's table in --out; those of others stay.")
    ] = False,
) -> None:
    """Measure the latency of an adapter's routes, or of exported ones, on this device. The latter needs no torch."""
    if (repo_id is not None or create_pr) and not push:
        raise typer.BadParameter("--repo-id and --create-pr are for --push")
    publisher = _Publisher(push, repo_id, create_pr or None)
    if is_exported(adapter):
        if out is not None or batch_size != 1 or overwrite:
            raise typer.BadParameter("--out, --batch-size and --overwrite are for adapters, not for exported routes")
        _measure_exported(adapter, threads, seconds, minutes, memory, publisher)
        return
    if memory:
        raise typer.BadParameter("--memory is for exported routes; export the adapter first")
    if push and repo_id is None and Path(adapter).is_dir():
        raise typer.BadParameter(f"{adapter} is a local folder: name the repository of the adapter with --repo-id")
    file = out or Path("latency.json")
    check_output(file, overwrite, "which keeps the tables of other devices and runtimes, ")
    model = load_here(adapter, threads)
    if push:
        publisher.check(model.all_routes, model.adapter_identity())
    table = _measure_adapter(model, adapter, file, batch_size, seconds, minutes)
    publisher.push(lambda: model.device_table(table))


@dataclass(frozen=True)
class _Publisher:
    """Publishes a table of latencies where that is asked for.

    Args:
        wanted: whether to publish it.
        repo_id: repository of the adapter; None for the one that the table names.
        create_pr: whether to open a pull request in place of a commit; None where the user may not write.
    """

    wanted: bool
    repo_id: str | None
    create_pr: bool | None

    def check(self, routes: Iterable[object], adapter: Mapping[str, Any]) -> None:
        """Raise an error, before a long measurement, where its table could not be published.

        Args:
            routes: routes to measure.
            adapter: ``weights`` and ``repo_id`` of the adapter, as `adapter_identity` returns them.
        """
        from restnet_hf.hub.latency_tables import check_latency

        check_latency(map(str, routes), adapter["weights"], self.repo_id or adapter["repo_id"])

    def push(self, make: "Callable[[], DeviceTable]") -> None:
        """Publish the table, and print where."""
        if self.wanted:
            from restnet_hf.hub.latency_tables import push_latency

            table = make()
            commit = push_latency(table, self.repo_id, create_pr=self.create_pr)
            say(f"'{table.name}' is published: {commit.pr_url or commit.commit_url}")


def _measure_adapter(
    model: "StitchedModelForImageClassification",
    adapter: str,
    file: Path,
    batch_size: int,
    seconds: float,
    minutes: float | None,
) -> "LatencyTable":
    """Measure an adapter on this device; the result is kept in a file, and in the profile of a local adapter."""
    from restnet_hf.runtime.exported_files import PROFILE

    table = model.measure_latency(batch_size=batch_size, seconds=seconds)
    if minutes is not None:
        with minutes_bar(minutes) as report:
            sustained = model.measure_sustained(minutes=minutes, batch_size=batch_size, report=report)
        show_sustained(sustained)
        table = replace(table, facts={**table.facts, "sustained": sustained.to_dict()})
    table.save(file)
    show_latency(table, {route: table.latency_ms(model.steps(route)) for route in model.all_routes})
    written = str(file)
    if Path(adapter).is_dir() and model.profiled is not None:  # budgets of the adapter follow this device from now on
        model.record_latency(table if minutes is None else table.sustained).save(Path(adapter) / PROFILE)
        written += f" and {Path(adapter) / PROFILE}"
    say(f"written to {written}")
    return table


def _measure_exported(
    folder: str,
    threads: int | None,
    seconds: float,
    minutes: float | None,
    memory: bool,
    publisher: _Publisher,
) -> None:
    """Measure exported routes on this device, and keep the result in their folder."""
    from restnet_hf.routes.device_table import DeviceTable, exported_adapter
    from restnet_hf.runtime.exported_model import ExportedModel

    model = ExportedModel(folder, threads)
    if publisher.wanted:
        publisher.check((row.route for row in model.profiled.routes), exported_adapter(model.profiled))
    show_profile(model.measure_latency(seconds=seconds, save=True))
    if minutes is not None:
        with minutes_bar(minutes) as report:
            show_sustained(model.measure_sustained(minutes, report=report, save=True))
    if memory:
        show_memory(model.measure_memory(save=True))
    say(f"written to {folder}, for `restnet-hf predict --budget latency_ms=...`")
    publisher.push(lambda: DeviceTable.of_export(model.profiled))


@command("me/r50-mbv2 --data photos --budget latency_ms=20")
def adapt(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help="Images of this device, labelled or not: local folder.")],
    budget: Annotated[list[str], typer.Option(help="Limit on a cost, as latency_ms=20; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the measured latencies.")] = Path("adapted"),
    split: Split = "train",
    images: Annotated[int, typer.Option(help="Number of images, chosen at random.", min=1)] = 500,
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
    cascades: Annotated[
        bool,
        typer.Option("--cascades", help="Calibrate cascades too; limits such as mean_latency_ms=10 may choose one."),
    ] = False,
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume a search that was stopped.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Find the best route of an adapter on this device, with its own images, which never leave it."""
    limits, written = parse_budget(budget), Written(out)
    if not resume:
        stopped = (out / "search.json").exists()
        check_output(out, overwrite, "--resume to go on with the search in it, " if stopped else "")

    from restnet_hf.adaptation.adapt import adapt_to, device_images

    model = load_here(adapter, threads)
    rows = device_images(model, data, split, images)
    warn_of_few(len(rows), "the score of a route")
    chosen = None if predictor == "none" else predictor
    result = adapt_to(
        model, rows, limits, out, search=search, predictor=chosen, exact=exact, cascades=cascades, resume=resume
    )
    show_adapted(result, limits)
    say(str(written))


@command("me/r50-mbv2 --out board --runtime onnx")
def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="Folder for the exported files.")],
    route: Annotated[
        list[str] | None,
        typer.Option(help="Route to export; may be given several times, and the routes then share their weights."),
    ] = None,
    cascade: Annotated[list[str] | None, typer.Option(help="Cascade to export; may be given several times.")] = None,
    budget: BudgetTexts = None,
    device: Device = None,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Export all routes that no other beats in MACs and accuracy, not --route."),
    ] = False,
    runtime: Annotated[
        str, typer.Option(help="Runtime: onnx, openvino, executorch, litert, coreml or torch.")
    ] = "onnx",
    precision: Annotated[
        str, typer.Option(help="Precision that the runtime supports: fp32, fp16, bf16, int8 or int8_dynamic.")
    ] = "fp32",
    data: Annotated[
        str | None, typer.Option(help="Images to calibrate and verify with: Hub id or local folder.")
    ] = None,
    split: Split = "train",
    images: Annotated[int, typer.Option(help="Number of images, chosen at random.", min=1)] = 628,
    calibration_images: Annotated[
        int, typer.Option(help="Number of the images that calibrate low precision; the others verify.")
    ] = 128,
    min_agreement: MinAgreement = None,
    max_accuracy_drop: MaxAccuracyDrop = None,
    target: Target = "auto",
    with_preprocessing: WithPreprocessing = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Number of images in a run; by default any number, where the runtime allows it.")
    ] = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Export what is active or others for a runtime, verified against the adapter, with a script that runs them."""
    limits = _one_choice([*(route or ()), *(cascade or ())], budget, pareto, device)
    check_output(out, overwrite)

    from restnet_hf.adaptation.adapt import device_images
    from restnet_hf.export.export import export_routes, pareto_routes
    from restnet_hf.runtime.exported_files import PROFILE

    model = load_here(adapter, threads, device, limits)
    rows = None if data is None else _few(device_images(model, data, split, images))
    exported = export_routes(
        model, out, pareto_routes(model) if pareto else route, runtime=runtime, precision=precision, data=rows,
        min_agreement=min_agreement, max_accuracy_drop=max_accuracy_drop, target=target, batch_size=batch_size,
        calibration_images=calibration_images, threads=threads, cascades=cascade or (),
        with_preprocessing=with_preprocessing,
    )  # fmt: skip
    if Path(adapter).is_dir() and model.profiled is not None and device is None:  # the adapter keeps its own latencies
        model.profiled.save(Path(adapter) / PROFILE)
    show_exported(exported)
    size = f"{exported.profiled.metadata['size_mb']:.1f} MB"
    say(f"written to {out}: {size}; try: python {out}/run.py PICTURE, or restnet-hf predict {out} PICTURE")


def _one_choice(
    route: list[str] | None, budget: list[str] | None, pareto: bool, device: str | None
) -> "Budget | None":
    """The budget of a command that takes a route, a budget or the front; raises BadParameter for several of them."""
    if bool(route) + bool(budget) + pareto > 1:
        raise typer.BadParameter("give --route and --cascade, --budget or --pareto, not several of them")
    if device is not None and not budget:
        raise typer.BadParameter("--device is for --budget: the latencies of that device")
    return parse_budget(budget) if budget else None


def _few(rows: Any) -> Any:
    """Images for the export; warns where they are few."""
    warn_of_few(len(rows), "the agreement of a route")
    return rows
