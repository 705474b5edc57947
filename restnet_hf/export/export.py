"""export_routes: routes of a model as a folder that a runtime loads without torch, verified and measured."""

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers.utils import logging

from restnet_hf.data.datasets import IGNORED, batches
from restnet_hf.export.device_files import plain_preprocessing, run_script
from restnet_hf.export.exporter import QUANTIZED, Exporter, Quantization, UnsupportedExportError
from restnet_hf.export.exporters import EXPORTERS
from restnet_hf.export.programs import Program, numpy_batches, trace_route
from restnet_hf.export.sensitivity import most_sensitive
from restnet_hf.files import folder_written_whole
from restnet_hf.hashing import package_versions
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.device import processor_name
from restnet_hf.profiling.macs import MacsTable, ParamsTable
from restnet_hf.profiling.timing import time_runs
from restnet_hf.routes.profile import Profile, ProfiledRoute
from restnet_hf.routes.route import Route
from restnet_hf.runtime.exported_files import EXAMPLE, LABELS, PREPROCESSING, PROFILE
from restnet_hf.runtime.exported_model import ExportedModel, in_batches
from restnet_hf.runtime.runners import RUNNERS, TRUSTING, Run
from restnet_hf.steps import split_at_shared_cuts, walk_tree


logger = logging.get_logger(__name__)
BATCH = 16  # images in a run while results are compared
NOISE = 64  # images of noise, where there are no others
EXACT = 0.02  # standard deviations of the logits by which those in fp32 may be off


class DisagreementError(ValueError):
    """What was exported does not say what the route says."""


@dataclass(frozen=True)
class _Truth:
    """What routes say of the images that exports are verified on.

    Args:
        images: gives them anew, batch by batch, (N, 3, H, W) in float32.
        logits: of each route, (images, classes).
        labels: (images,), where there are any.
    """

    images: Any
    logits: Mapping[Route, np.ndarray]
    labels: np.ndarray | None

    def judge(self, route: Route, run: Run) -> tuple[dict[str, float], float]:
        """``agreement`` of the likeliest classes, and ``accuracy``, and by how much logits are off, in deviations."""
        found, right = np.concatenate([run(batch) for batch in self.images()]), self.logits[route]
        said = found.argmax(1)
        scores = {"agreement": float((said == right.argmax(1)).mean())}
        known = None if self.labels is None else self.labels != IGNORED
        if known is not None and known.any():
            scores["accuracy"] = float((said == self.labels)[known].mean())
        return scores, float(np.abs(found - right).max() / right.std())


def export_routes(
    model: StitchedModelForImageClassification,
    out: str | os.PathLike[str],
    routes: Iterable[Route | str] | None = None,
    *,
    runtime: str = "onnx",
    precision: str = "fp32",
    data: Any = None,
    min_agreement: float = 0.98,
    calibration_images: int = 128,
    batch_size: int | None = None,
    threads: int | None = None,
) -> ExportedModel:
    """Write routes for a runtime: bake, export, quantise, verify and measure them here.

    The folder holds the model, with every weight once where the runtime allows it, ``labels.json``,
    ``preprocessing.json``, ``profile.json`` and ``run.py``, a script that needs numpy, Pillow and the runtime alone.
    It appears when all is verified. In low precision, where a route's agreement with itself in float32 falls short,
    the runtime's more careful way is tried if it has one; then the stitch is kept in full precision, then the head
    too, then one, two, four and more of the layers that eight bits change the most, or of the last ones.

    The measured latencies also join the model's own profile, for its card.

    Args:
        model: with stitches.
        out: the folder.
        routes: of the model; the active one by default.
        runtime: a key of `EXPORTERS`.
        precision: of the runtime: ``fp32``, ``bf16``, ``int8``, ``int8_dynamic``.
        data: images, labelled or not; see `restnet_hf.data.batches`. The first ones calibrate low precision, the
            others verify. Without them, which fp32 alone allows, noise does.
        min_agreement: on how many images, from 0 to 1, the exported route must name the class that the route names.
        calibration_images: how many calibrate.
        batch_size: images in a run; None for any number where the runtime allows it, else 1.
        threads: of the processor, for latencies; as the runtime has it by default.

    Returns:
        The folder, loaded.

    Raises:
        DisagreementError: an exported route is not what it should be; nothing is written.
        MissingRuntimeError: the runtime, or what exports to it, is not installed.
        UnsupportedExportError: the runtime has no such precision, or an operation has no counterpart in it.
        ValueError: there is no such runtime or route, or images are needed that are not there.
    """
    exporter = _exporter(runtime, precision, data)
    if not 0 <= min_agreement <= 1 or calibration_images < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"{min_agreement=} must be from 0 to 1, {calibration_images=} and {batch_size=} at least 1")
    chosen = list(dict.fromkeys(model.route(r) for r in ([model.active_route] if routes is None else routes)))
    if not chosen:
        raise ValueError("there are no routes to export")
    job = _Job(model, exporter, precision, batch_size if exporter.any_batch else batch_size or 1, threads)
    job.look_at(data, chosen, calibration_images if precision.startswith(QUANTIZED) else 0)
    with folder_written_whole(out, PROFILE) as folder:
        profile = job.write(folder, chosen, min_agreement)
    model.record_runtime(profile)
    return ExportedModel(out, threads, trust_remote_code=True)  # the code is ours


def _exporter(runtime: str, precision: str, data: Any) -> Exporter:
    """The row of a runtime, which has the precision and what it takes."""
    if runtime not in EXPORTERS:
        raise ValueError(f"runtime={runtime!r} is not one of {sorted(EXPORTERS)}")
    EXPORTERS[runtime].check(precision)
    if data is None and precision != "fp32":
        raise ValueError(f"precision='{precision}' needs images to calibrate and verify with: give data (--data DIR)")
    return EXPORTERS[runtime]


def pareto_routes(model: StitchedModelForImageClassification) -> list[Route]:
    """The routes of the model's profile that no other beats in MACs and accuracy.

    Raises:
        ValueError: they were not scored.
    """
    rows = [] if model.profiled is None else model.profiled.routes
    if not rows or not all("accuracy" in row.scores for row in rows):
        raise ValueError("the routes have no accuracies to compare; profile the model with labelled images first")
    return [row.route for row in Profile(tuple(rows)).pareto()]


class _Job:
    """One export."""

    def __init__(
        self,
        model: StitchedModelForImageClassification,
        exporter: Exporter,
        precision: str,
        batch_size: int | None,
        threads: int | None,
    ) -> None:
        self.model, self.exporter, self.precision = model, exporter, precision
        self.batch_size, self.threads = batch_size, threads
        self.prepared = plain_preprocessing(model.image_processor, model.preprocessing)
        self.calibration: torch.Tensor | None = None
        self.measured = False  # on real images
        self.folded = 0

    @torch.no_grad()
    def look_at(self, data: Any, routes: list[Route], calibration_images: int) -> None:
        """Take the images to calibrate with, and see what the routes say of the others."""
        self.measured = data is not None
        size = self.model.preprocessing.image_size
        noise = torch.randn(NOISE, 3, *size, generator=torch.Generator().manual_seed(0))
        source = noise if data is None else data

        def images() -> Iterator[dict[str, torch.Tensor]]:
            seen = 0
            for batch in batches(source, BATCH, "verify"):
                self.model.preprocessing.check(batch["pixel_values"])
                first, seen = max(0, calibration_images - seen), seen + len(batch["pixel_values"])
                if first < len(batch["pixel_values"]):
                    yield {key: value[first:] for key, value in batch.items()}

        if calibration_images:
            self.calibration = _first(source, calibration_images)
        walks = split_at_shared_cuts([(route, self.model.steps(route)) for route in routes])
        logits: dict[Route, list[np.ndarray]] = {route: [] for route in routes}
        labels: list[np.ndarray] = []
        for batch in images():
            x = batch["pixel_values"].to(self.model.device, self.model.dtype)
            for route, found in walk_tree(x, walks):
                logits[route].append(found.float().cpu().numpy())
            labels += [batch["labels"].numpy()] if "labels" in batch else []
        if not logits[routes[0]]:
            raise ValueError(
                f"the first {calibration_images} images calibrate, and there are no others to verify with; give more "
                "images, or a smaller calibration_images"
            )
        self.truth = _Truth(
            lambda: (batch["pixel_values"].float().numpy() for batch in images()),
            {route: np.concatenate(found) for route, found in logits.items()},
            np.concatenate(labels) if labels else None,
        )

    def write(self, folder: Path, routes: list[Route], least: float) -> Profile:
        """Fill a folder; returns what is said in it of the routes.

        Raises:
            DisagreementError: one does not do what it should.
        """
        entries, kept = self._models(folder, routes, least)
        names = self.model.config.id2label
        labels = [names[index] for index in range(len(names))]
        for name, content in ((LABELS, labels), (PREPROCESSING, self.prepared)):
            (folder / name).write_text(json.dumps(content) + "\n")
        script = run_script(self.exporter.runtime, entries[routes[0]], self.prepared, self.batch_size)
        (folder / EXAMPLE).write_text(script)
        profile = self._profile(folder, entries, kept, least)
        profile.save(folder / PROFILE)
        return profile

    def _models(
        self, folder: Path, routes: list[Route], least: float
    ) -> tuple[Mapping[Route, Mapping[str, str]], dict[str, list[str]]]:
        """Write the routes; returns where each is, and its layers that had to stay in full precision."""
        dtype, models, kept = self.exporter.dtypes.get(self.precision), {}, {}
        for route in routes:
            program = trace_route(route, self.model.steps(route), self.batch_size, dtype)
            self.folded += program.folded
            models[route] = self.exporter.convert(program, self.precision)
            if self.calibration is not None:
                with tempfile.TemporaryDirectory() as name:
                    models[route], place, entry, layers = self._quantized(models[route], program, Path(name), least)
                    if layers:
                        kept[str(route)] = layers
                    if len(routes) == 1:  # written as it is to be
                        for file in place.iterdir():
                            shutil.move(file, folder)
                        return {route: entry}, kept
        return self.exporter.save(models, folder), kept

    def _quantized(
        self, converted: Any, program: Program, folder: Path, least: float
    ) -> tuple[Any, Path, Mapping[str, str], list[str]]:
        """A route in low precision, where and what was written of it, and its layers that had to stay as they were."""
        best, images, route = 0.0, cast(torch.Tensor, self.calibration), program.route
        for how in logging.tqdm(self._attempts(program, images), desc=f"{self.precision} {route}"):
            model = self.exporter.quantize(converted, numpy_batches(images), how)
            place = Path(tempfile.mkdtemp(dir=folder))  # an earlier one may still be mapped
            entry = self.exporter.save({route: model}, place)[route]
            agreement = self.truth.judge(route, self._runner(place, entry))[0]["agreement"]
            logger.info("%s, %s: agreement %.4f", route, how, agreement)
            if agreement >= least:
                return model, place, entry, list(how.keep)
            best = max(best, agreement)
        raise DisagreementError(
            f"'{route}' in {self.precision} agrees with itself in float32 on {best:.1%} of the images at best, and "
            f"{least:.1%} are asked for; more calibration_images may help, another precision, or a lower min_agreement"
        )

    def _attempts(self, program: Program, images: torch.Tensor) -> Iterator[Quantization]:
        """Ever more in full precision: nothing, the stitches, the head, then up to half of the layers.

        Where a few layers lose the most these are found by themselves. Where all lose a little, those next to the
        logits do: they are small, and what they lose nothing mends.
        """
        how = Quantization(self.precision)
        yield how
        if self.exporter.careful:
            yield (how := replace(how, careful=True))
        for keep in program.first_kept:
            yield replace(how, keep=keep)
        first, layers = program.first_kept[-1], list(program.layers)
        worst = [layer for layer in most_sensitive(program, images[:BATCH]) if layer not in first]
        count = 1
        while count <= len(layers) // 2:
            yield replace(how, keep=(*first, *worst[:count]))
            yield replace(how, keep=tuple(dict.fromkeys((*first, *layers[-count - 1 :]))))
            count *= 2

    def _runner(self, folder: Path, entry: Mapping[str, str]) -> Run:
        try:
            run = {**RUNNERS, **TRUSTING}[self.exporter.runtime](folder, entry, self.threads)
        except RuntimeError as error:  # also those of OpenVINO and ONNX Runtime, which are of no common kind
            raise UnsupportedExportError(
                f"{self.exporter.runtime} cannot load what was exported to it: {error}"
            ) from error
        return run if self.batch_size is None else partial(in_batches, run, batch_size=self.batch_size)

    def _profile(
        self, folder: Path, entries: Mapping[Route, Mapping[str, str]], kept: Mapping[str, list[str]], least: float
    ) -> Profile:
        """What the routes of a folder cost and give here."""
        runs = {route: self._runner(folder, entry) for route, entry in entries.items()}
        judged = {route: self._judged(route, run, least) for route, run in runs.items()}
        image = next(self.truth.images())[:1].repeat(self.batch_size or 1, 0)
        timings = time_runs({str(route): partial(run, image) for route, run in runs.items()})
        macs, params = MacsTable(), ParamsTable()
        rows = []
        for route in entries:
            steps = self.model.steps(route)
            costs = {
                "macs": macs.macs(steps),
                "params": params.params(steps),
                "latency_ms": timings[str(route)].ms / len(image),
            }
            rows.append(ProfiledRoute(route, costs, judged[route][0] if self.measured else {}))
        packages = ("restnet-hf", *(each.partition(".")[0] for each in self.exporter.packages))
        about = {
            "runtime": self.exporter.runtime,
            "precision": self.precision,
            "threads": self.threads or torch.get_num_threads(),
            "device": processor_name(),
            "batch_size": self.batch_size,
            "images": len(self.truth.logits[next(iter(entries))]) if self.measured else 0,
            "kept_in_full_precision": dict(kept),
            "logit_error": {str(route): off for route, (_, off) in judged.items()},
            "folded_stitches": self.folded,
            "files": {str(route): dict(entry) for route, entry in entries.items()},
            "size_mb": sum(file.stat().st_size for file in folder.iterdir()) / 2**20,
            "date": datetime.date.today().isoformat(),
            "versions": package_versions(dict.fromkeys(packages)),
        }
        return Profile(tuple(rows), about)

    def _judged(self, route: Route, run: Run, least: float) -> tuple[dict[str, float], float]:
        scores, off = self.truth.judge(route, run)
        if scores["agreement"] < least or (self.precision == "fp32" and off > EXACT):
            raise DisagreementError(
                f"'{route}' for {self.exporter.runtime} in {self.precision} agrees with the route on "
                f"{scores['agreement']:.1%} of the images, its logits being off by up to {off:.2g} standard "
                f"deviations; {least:.1%} are asked for (min_agreement), so nothing was written"
            )
        return scores, off


def _first(source: Any, count: int) -> torch.Tensor:
    """The first images."""
    found: list[torch.Tensor] = []
    for batch in batches(source, BATCH, "calibrate"):
        found.append(batch["pixel_values"].float())
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]
