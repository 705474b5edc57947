"""What edge runtimes make of a route: time beside eager PyTorch, its anchors and its parts, and what a bundle takes.

    python recipes/benchmarks/runtimes.py [--adapter DIR --dataset DIR] [--runtime onnx ...] [--batch 1 ...]
        [--threads 1] [--quick] [--out FILE.json]

Time: pairs of timm at 224 px with random weights, batch 1 and 8. Every runtime and precision of a route, the same
route compiled by torch, each anchor exported alone, its parts exported one by one, and as limit its MACs at the
rate of a large matrix product of float32 in eager PyTorch; all timed in turn, repeat by repeat, each after a pause in
which threads of the one before stop waiting for work. A ratio is of minima and, in brackets, the median of the ratios
of each repeat. With --quick one pair, batch 1, two runtimes.

Bundle: up to ten routes of an adapter (the embedded anchors with fitted stitches by default) as ONNX in one folder,
over the bytes of the weights that they use, each once; and a switch between them, in a process that has no torch.

With --adapter and --dataset, labelled images of its classes: size, agreement with the route in eager float32 and
accuracy of its best route within 0.85 of the most costly, in every runtime and precision. What `export_routes` refuses
is printed, and its first attempt measured.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import typer

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification, export_routes
from restnet_hf.adaptation.adapt import device_images
from restnet_hf.data import load_images, with_pixel_values
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.export.export import DisagreementError
from restnet_hf.export.exporter import load_exporter
from restnet_hf.export.programs import trace_route
from restnet_hf.profiling.macs import count_macs
from restnet_hf.routes.route import Route
from restnet_hf.runtime.runners import RUNTIMES, MissingRuntimeError


PAIRS = [  # front, its cut, end, its cut
    ("resnet50", 7, "resnet18", 4),
    ("deit_small_patch16_224", 6, "deit_tiny_patch16_224", 6),
    ("resnet50", 7, "deit_tiny_patch16_224", 6),
]
QUICK = [("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32")]
CASES = [
    (name, precision)
    for name, row in RUNTIMES.items()
    if row.runs_here
    for precision in load_exporter(name).precisions
]
Cases = list[tuple[str, str]]  # runtimes and precisions
CALIBRATION = 16
PAUSE = 0.05  # seconds, longer than threads of a runtime wait for work
SWITCH = """
import statistics, sys, time
class Absent:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in ('torch', 'transformers', 'timm'): raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from restnet_hf import ExportedModel
taken = []
for keep in (1, 100):
    model = ExportedModel({folder!r}, threads=1, keep=keep)
    for _ in range(3):
        for route in model.routes:
            began = time.perf_counter()
            model.set_route(route)
            taken.append((keep, (time.perf_counter() - began) * 1e3))
loads = [ms for keep, ms in taken if keep == 1][1:]  # the first route was active
last = [ms for keep, ms in taken if keep > 1][-len(model.routes):]
print(statistics.median(loads), statistics.median(last))
"""


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of several functions, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            time.sleep(PAUSE)
            began = time.perf_counter()
            run()
            if repeat >= 2:  # the first two warm up
                taken[name].append(time.perf_counter() - began)
    return taken


def exported(
    model: StitchedModelForImageClassification, route: Route, case: tuple[str, str], batch: int, folder: Path
) -> Callable[[], object] | None:
    """A route in a runtime, as a function that runs it; None where the processor lacks the precision."""
    runtime, precision = case
    size = None if load_exporter(runtime).any_batch else batch
    x = torch.randn(batch, 3, 224, 224)
    data = torch.randn(CALIBRATION + 2 * batch, 3, 224, 224)
    options = {"data": data, "min_agreement": 0, "calibration_images": CALIBRATION, "batch_size": size}
    options["threads"] = torch.get_num_threads()
    try:
        found = export_routes(model, folder, [route], runtime=runtime, precision=precision, **options)
    except (ValueError, MissingRuntimeError) as error:
        print(f"{runtime} {precision}: {error}")
        return None
    return partial(found, x.numpy())


def parts(model: StitchedModelForImageClassification, route: Route, batch: int, folder: Path) -> list[Callable]:
    """The steps of a route as ONNX files of their own."""
    runs = []
    for index, step in enumerate(model.steps(route)):
        exporter, place = load_exporter("onnx"), folder / str(index)
        place.mkdir(parents=True)
        entry = exporter.save({route: exporter.convert(trace_route(route, [step]), "fp32")}, place)[route]
        x = torch.randn(batch, *step.shape[1:]).numpy()
        runs.append(partial(RUNTIMES["onnx"].run(place, entry, torch.get_num_threads()), x))
    return runs


@torch.no_grad()
def bench_pair(front: str, i: int, end: str, j: int, batch: int, cases: Cases, folder: Path) -> dict[str, float]:
    """Ratios of one pair, over the route in eager PyTorch."""
    torch.manual_seed(0)
    anchors = [Anchor(timm.create_model(name).eval(), name, Preprocessing((224, 224))) for name in (front, end)]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    route = model.set_route(model.add_stitch(f"{front}[:{i}] + {end}[{j}:]"))
    x, baked = torch.randn(batch, 3, 224, 224), model.bake()
    runs: dict[str, Callable[[], object]] = {"eager": partial(baked, x)}
    if cases is not QUICK:
        runs["compiled"] = partial(torch.compile(model.bake()), x)
    for case in cases:
        if run := exported(model, route, case, batch, folder / "-".join(case)):
            runs[" ".join(case)] = run
    for name in (front, end):
        if run := exported(model, Route.alone(name), ("onnx", "fp32"), batch, folder / name):
            runs[f"onnx fp32 of {name}"] = run
    pieces = parts(model, route, batch, folder / "parts")
    runs |= {f"part {index}": run for index, run in enumerate(pieces)}
    square = torch.randn(1024, 1024)
    runs["product"] = partial(torch.mm, square, square)
    taken = seconds(runs, 5 if cases is QUICK else 15)
    taken["onnx fp32, sum of parts"] = [
        sum(each) for each in zip(*(taken.pop(f"part {n}") for n in range(len(pieces))), strict=True)
    ]
    share = count_macs(baked, x) / 1024**3
    taken["limit of float32"] = [share * each for each in taken.pop("product")]
    eager, label = taken.pop("eager"), f"{front} -> {end}, batch {batch}"
    print(f"{label}: eager {min(eager) * 1e3:.1f} ms")
    ratios = {}
    for name, times in taken.items():
        ratios[f"{label}: {name} over eager"] = min(times) / min(eager)
        pairs = zip(times, eager, strict=True)
        ratios[f"{label}: {name} over eager (median)"] = statistics.median(a / b for a, b in pairs)
    return ratios


def embedded_pair() -> StitchedModelForImageClassification:
    """The embedded anchors with stitches at every cut of the front, fitted."""
    model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32")
    for cut in range(1, 9):
        model.add_stitch(f"resnet_fashion[:{cut}] + vit_fashion[6:]")
    rows = with_pixel_values(load_images(DATA, "train"), model.image_processor)
    model.fit_stitches(rows.select(range(200)))
    return model


def bench_bundle(model: StitchedModelForImageClassification, quick: bool, folder: Path) -> dict[str, float]:
    """Size of several routes in one folder, and milliseconds of a switch without torch."""
    routes = model.routes[:3] if quick else model.all_routes[:10]
    export_routes(model, folder, routes, threads=1)
    used = {p for route in routes for step in model.steps(route) for p in step.parameters()}
    union = sum(p.numel() * 4 for p in used)
    apart = sum(p.numel() * 4 for route in routes for p in {p for s in model.steps(route) for p in s.parameters()})
    size = sum(file.stat().st_size for file in folder.iterdir())
    code = SWITCH.format(folder=str(folder))
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return {
        f"bundle of {len(routes)} routes, {size / 2**20:.1f} MB, over the weights that they use": size / union,
        "its routes as files of their own over the bundle": apart / size,
        "a switch to a route that is not loaded, ms": float(printed[-2]),
        "a switch to a route that is loaded, ms": float(printed[-1]),
    }


def bench_quality(model: StitchedModelForImageClassification, dataset: str, cases: Cases, folder: Path) -> dict:
    """Size, agreement and accuracy of one route in every runtime and precision, on real images."""
    assert model.profiled is not None
    largest = max(row.costs["macs"] for row in model.profiled.routes)
    stitched = [row for row in model.profiled.routes if len(row.route.segments) > 1]
    within = [row for row in stitched if row.costs["macs"] <= 0.85 * largest]
    route = max(within, key=lambda row: row.scores["accuracy"]).route
    rows = device_images(model, dataset, "test", 628)
    found: dict[str, float] = {}
    for runtime, precision in cases:
        place = folder / f"{runtime}-{precision}"
        options = {"data": rows, "threads": torch.get_num_threads()}
        export = partial(export_routes, model, place, [route], runtime=runtime, precision=precision, **options)
        try:
            profile = export().profiled
        except (ValueError, MissingRuntimeError) as error:
            print(f"{runtime} {precision}: {error}")
            if not isinstance(error, DisagreementError):
                continue
            profile = export(min_agreement=0).profiled
        label, scores = f"{route} in {runtime} {precision}", profile.routes[0].scores
        found |= {f"{label}: {score}": value for score, value in scores.items()}
        found[f"{label}: ms"] = profile.routes[0].costs["latency_ms"]
        found[f"{label}: MB"] = profile.metadata["size_mb"]
        found[f"{label}: layers kept"] = sum(map(len, profile.metadata["kept_in_full_precision"].values()))
    return found


def shown(found: dict[str, float], ratios: dict[str, float]) -> None:
    """Print what was found, and keep it."""
    for name, ratio in found.items():
        if not name.endswith("(median)"):
            median = found.get(f"{name} (median)")
            print(f"{name}: {ratio:.3f}" + (f" ({median:.3f})" if median else ""), flush=True)
    ratios.update(found)


def main(
    adapter: str | None = None,
    dataset: str | None = None,
    runtime: list[str] | None = None,
    batch: list[int] | None = None,
    threads: int = 1,
    quick: bool = False,
    out: Path | None = None,
) -> None:
    """Print the ratios, and write them to OUT."""
    torch.set_num_threads(threads)
    ratios: dict[str, float] = {}
    cases = QUICK if quick else [case for case in CASES if not runtime or case[0] in runtime]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = None if adapter is None else StitchedModelForImageClassification.from_pretrained(adapter)
        shown(bench_bundle(real or embedded_pair(), quick, folder / "bundle"), ratios)
        if real is not None and dataset is not None:
            shown(bench_quality(real, dataset, cases, folder / "quality"), ratios)
        for pair in PAIRS[:1] if quick else PAIRS:
            for size in batch or ((1,) if quick else (1, 8)):
                shown(bench_pair(*pair, size, cases, folder / f"{pair[0]}-{pair[2]}-{size}"), ratios)
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
