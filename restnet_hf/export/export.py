"""export_routes: routes of a model as a folder that a runtime loads without torch, verified and measured."""

import datetime
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers.utils import logging

from restnet_hf.data.datasets import batches
from restnet_hf.export.device_files import plain_preprocessing, run_script
from restnet_hf.export.exporter import (
    QUANTIZED,
    Exporter,
    Quantization,
    UnsupportedExportError,
    load_exporter,
)
from restnet_hf.export.parts import Part, RouteOrPart, cascade_routes, plan_parts
from restnet_hf.export.programs import Program, numpy_batches, trace_route
from restnet_hf.export.sensitivity import most_sensitive
from restnet_hf.export.verification import (
    BATCH_SIZE,
    MAX_LOGIT_ERROR,
    Acceptance,
    Comparison,
    DisagreementError,
    check_pixels,
    choose_way,
    compute_reference,
)
from restnet_hf.files import atomic_folder
from restnet_hf.hashing import package_versions
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.cascades import StageCosts
from restnet_hf.profiling.macs import MacsTable, ParamsTable
from restnet_hf.progress import progress_bar
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import Profile, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import Route, Routes, each_route
from restnet_hf.runtime.exported_cascades import run_stages, script_lines
from restnet_hf.runtime.exported_files import EXAMPLE, LABELS, PREPROCESSING, PROFILE
from restnet_hf.runtime.exported_model import ExportedModel
from restnet_hf.runtime.golden import CHECK, golden
from restnet_hf.runtime.measuring import part_inputs, time_parts, with_latencies
from restnet_hf.runtime.pixels import INPUT, PIXELS, load_run, normalise
from restnet_hf.runtime.processor import processor_name
from restnet_hf.runtime.runners import RUNTIMES, Run, installed_version
from restnet_hf.runtime.targets import AUTO, TARGETS, resolve_target


logger = logging.get_logger(__name__)
NOISE_IMAGES = 64  # images of noise, used where no data is given


def export_routes(
    model: StitchedModelForImageClassification,
    out: str | os.PathLike[str],
    routes: Routes | None = None,
    *,
    runtime: str = "onnx",
    precision: str = "fp32",
    data: Any = None,
    min_agreement: float | None = None,
    max_accuracy_drop: float | None = None,
    target: str = AUTO,
    calibration_images: int = 128,
    batch_size: int | None = None,
    threads: int | None = None,
    cascades: Cascade | str | Sequence[Cascade | str] = (),
    with_preprocessing: bool = False,
    on_error: str = "raise",
) -> ExportedModel:
    """Export routes and cascades for a runtime: bake, convert, quantise, verify and measure them.

    The folder holds the model, with every weight once where the runtime allows it, labels, preprocessing, profile and
    ``run.py``, which needs numpy, Pillow and the runtime alone. What is active, or else the first, is active in it.
    What routes of a cascade share is a file of its own, but for quantised ones (`choose_way` on how they are made).

    Args:
        model: model of the routes.
        out: folder for the exported files.
        routes: one route or several to export; by default the active one, or those of the active cascade.
        runtime: a key of `RUNTIMES`.
        precision: a precision of the runtime: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int8_dynamic``.
        data: images as ``model.prepare_data`` takes them: the first calibrate, others verify. None for noise, in fp32.
        min_agreement: lowest share of images, from 0 to 1, with the route's own class; 0.98 without another limit.
        max_accuracy_drop: most percentage points of accuracy to lose, with 95 % confidence (`drop_bound`).
        target: kind of processor for eight bits, a key of `TARGETS` or ``auto`` for this one.
        calibration_images: number of images that calibrate low precision.
        batch_size: number of images in a run; None for any number where the runtime allows it, else 1.
        threads: number of threads of the processor for latencies; None for the runtime's own default.
        cascades: one cascade or several, with thresholds; by default the active one, where no routes are given.
        with_preprocessing: whether files take pixels (N, H, W, 3) in uint8 and return probabilities (N, classes).
        on_error: ``raise``, or ``skip`` to leave out broken pictures; see ``model.prepare_data``.

    Returns:
        The folder, loaded.

    Raises:
        DisagreementError: an exported route disagrees with the route; nothing is written.
        MissingRuntimeError: the runtime, or a package that exports to it, is not installed.
        UnsupportedExportError: the runtime does not support the precision or an operation.
        ValueError: an option is invalid, or images or labels are needed and not given.
    """
    exporter, target = _checked_exporter(runtime, precision, data, with_preprocessing), resolve_target(target)
    accept = Acceptance.of(min_agreement, max_accuracy_drop)
    chosen, chains = _chosen(model, routes, cascades)
    _check_options(calibration_images, batch_size, chains, with_preprocessing)
    data = None if data is None else model.prepare_data(data, on_error=on_error)
    options = data, calibration_images, accept, target, batch_size, threads, with_preprocessing
    with atomic_folder(out, PROFILE) as folder:
        profile = _Job(model, chosen, chains, exporter, precision, *options).write(folder)
    _record(model, profile)
    return ExportedModel(out, threads, trust_remote_code=True)  # the code is ours


def _check_options(
    calibration_images: int, batch_size: int | None, cascades: Sequence[Cascade], with_preprocessing: bool
) -> None:
    """Raise ValueError where an option is out of range, or two do not go together."""
    if calibration_images < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"{calibration_images=} and {batch_size=} must be at least 1")
    if cascades and with_preprocessing:
        raise ValueError("with_preprocessing is for routes; the parts of a cascade take what earlier parts return")


def _record(model: StitchedModelForImageClassification, profile: Profile) -> None:
    """Add what was measured to the model's own profile; nothing where the runtime does not run on this system."""
    if all("latency_ms" in row.costs for row in profile.rows):
        model.record_runtime(profile)


def _chosen(
    model: StitchedModelForImageClassification,
    routes: Routes | None,
    cascades: Cascade | str | Sequence[Cascade | str],
) -> tuple[list[Route], list[Cascade]]:
    """The routes and cascades to export; those that are active where none are given."""
    given = [cascades] if isinstance(cascades, Cascade | str) else [*cascades]
    if routes is None and not given:
        given = [] if model.active_cascade is None else [model.active_cascade]
        routes = None if given else model.active_route
    chains = list(dict.fromkeys(map(model.runnable_cascade, given)))
    alone = [] if routes is None else [model.route(route) for route in each_route(routes)]
    chosen = list(dict.fromkeys([*alone, *cascade_routes(chains)]))
    if not chosen:
        raise ValueError("there are no routes to export")
    return chosen, chains


def _checked_exporter(runtime: str, precision: str, data: Any, with_preprocessing: bool) -> Exporter:
    """The exporter of a runtime, after a check of the precision and of what it needs."""
    exporter = load_exporter(runtime)
    exporter.check(precision)
    if with_preprocessing and not exporter.takes_pixels:
        able = [name for name in RUNTIMES if load_exporter(name).takes_pixels]
        raise UnsupportedExportError(f"with_preprocessing is for runtimes {able}, not '{runtime}'")
    if data is None and precision != "fp32":
        raise ValueError(f"precision='{precision}' needs images to calibrate and verify with: give data (--data DIR)")
    return exporter


def pareto_routes(model: StitchedModelForImageClassification) -> list[Route]:
    """The routes of the model's profile that no other beats in MACs and accuracy.

    Raises:
        ValueError: the profile has no accuracies.
    """
    rows = [] if model.profiled is None else model.profiled.routes
    if not rows or not all("accuracy" in row.scores for row in rows):
        raise ValueError("the routes have no accuracies to compare; profile the model with labelled images first")
    return [row.route for row in Profile(tuple(rows)).pareto()]


class _Job:
    """One call of `export_routes`: its options, the calibration images and the reference logits."""

    def __init__(
        self,
        model: StitchedModelForImageClassification,
        routes: list[Route],
        cascades: list[Cascade],
        exporter: Exporter,
        precision: str,
        data: Any,
        calibration_images: int,
        accept: Acceptance,
        target: str,
        batch_size: int | None,
        threads: int | None,
        with_preprocessing: bool,
    ) -> None:
        self.model, self.routes, self.exporter, self.precision = model, routes, exporter, precision
        self.accept, self.target, self.threads = accept, target, threads
        self.batch_size = batch_size if exporter.any_batch else batch_size or 1
        self.preprocessing = plain_preprocessing(model.image_processor, model.preprocessing)
        self.with_preprocessing = with_preprocessing
        self.real_images = data is not None
        if data is None:
            data = _noise(model.preprocessing.image_size, self.preprocessing if with_preprocessing else None)
        quantized = precision.startswith(QUANTIZED)
        self.calibration = _first_images(data, calibration_images) if quantized else None
        self.reference = compute_reference(model, routes, cascades, data, calibration_images if quantized else 0)
        if with_preprocessing:
            check_pixels(self.reference.images, self.preprocessing)
            self.reference = self.reference.of_probabilities()
        if accept.max_accuracy_drop is not None and self.reference.labels is None:
            raise ValueError("max_accuracy_drop needs labelled images; give labelled data, or min_agreement instead")
        self.parts, self.stages = plan_parts(model, cascades, shared=not quantized)
        exported: Sequence[Route | Cascade] = cascades or routes
        active = model.active_cascade if cascades else model.active_route
        self.active: Route | Cascade = exported[0] if active is None or active not in exported else active
        names = model.config.id2label
        self.labels = [names[index] for index in range(len(names))]
        self.folded = 0
        self.same_route = dict[str, float]()  # share of images that the route of each cascade answers as in PyTorch

    def write(self, folder: Path) -> Profile:
        """Fill a folder.

        Returns:
            The profile that the folder holds.

        Raises:
            DisagreementError: an exported route disagrees with the route.
        """
        entries, kept = self._write_models(folder)
        for name, content in ((LABELS, self.labels), (PREPROCESSING, self.preprocessing)):
            (folder / name).write_text(json.dumps(content) + "\n")
        (folder / EXAMPLE).write_text(self._script(entries))
        profile = self._profile(folder, entries, kept)
        profile.save(folder / PROFILE)
        model = ExportedModel(folder, self.threads, trust_remote_code=True)
        (folder / CHECK).write_text(json.dumps(golden(model.made_logits(), self.precision)) + "\n")
        return profile

    def _script(self, entries: Mapping[RouteOrPart, Mapping[str, str]]) -> str:
        """The script that runs what is active."""
        runtime, expression = self.exporter.runtime, RUNTIMES[self.exporter.runtime].script_logits
        name = PIXELS if self.with_preprocessing else "pixel_values"
        if isinstance(self.active, Route):
            lines = [f"logits = {expression.format(**entries[self.active], input=name)}"]
        else:
            named = {str(key): expression.format(**entry, input=name) for key, entry in entries.items()}
            lines = script_lines(self.stages[self.active], self.active, named)
        options = self.preprocessing, self.batch_size, self.with_preprocessing
        return run_script(runtime, str(self.active), lines, *options)

    def _write_models(self, folder: Path) -> tuple[Mapping[RouteOrPart, Mapping[str, str]], dict[str, list[str]]]:
        """Write routes and parts; returns the entry of each, and its layers that are kept in full precision."""
        dtype, kept = self.exporter.dtypes.get(self.precision), dict[str, list[str]]()
        models = dict[RouteOrPart, Any]()
        for route in self.routes:
            program = trace_route(route, self.model.steps(route), self.batch_size, dtype)
            program = replace(program, metadata=self._describe(route))
            self.folded += program.folded
            converted = self.exporter.convert(program, self.precision)
            if self.calibration is None:
                models[route] = self._finish(converted)
            else:
                with tempfile.TemporaryDirectory() as name:
                    models[route], place, entry, layers = self._quantize(converted, program, Path(name))
                    if layers:
                        kept[str(route)] = layers
                    if len(self.routes) == 1:  # already written as it must be
                        for file in place.iterdir():
                            shutil.move(file, folder)
                        return {route: entry}, kept
        for part, steps in self.parts.items():
            program = replace(trace_route(part, steps, self.batch_size, dtype), metadata=self._describe(part))
            self.folded += program.folded
            models[part] = self.exporter.convert(program, self.precision)
        return self.exporter.save(models, folder), kept

    def _finish(self, model: Any) -> Any:
        """A converted or quantised route as it is saved: with its preprocessing if that is asked for."""
        return self.exporter.add_preprocessing(model, self.preprocessing) if self.with_preprocessing else model

    def _describe(self, route: RouteOrPart) -> dict[str, str]:
        """The metadata of a route's file, in formats that have metadata: the route, and other values as JSON."""
        if self.with_preprocessing:
            return {"route": str(route), "labels": json.dumps(self.labels), INPUT: PIXELS}
        values = {"labels": self.labels, **{key: self.preprocessing[key] for key in ("mean", "std")}}
        return {"route": str(route), **{key: json.dumps(value) for key, value in values.items()}}

    def _quantize(
        self, converted: Any, program: Program, folder: Path
    ) -> tuple[Any, Path, Mapping[str, str], list[str]]:
        """Quantise a route; returns the model, its folder and entry, and the layers kept in full precision."""
        images, route = cast(torch.Tensor, self.calibration), cast(Route, program.route)
        made = dict[Quantization, tuple[Any, Path, Mapping[str, str]]]()

        def compare(how: Quantization) -> Comparison:
            model = self._finish(self.exporter.quantize(converted, numpy_batches(images), how))
            place = Path(tempfile.mkdtemp(dir=folder))  # files of an earlier attempt may still be mapped
            entry = self.exporter.save({route: model}, place)[route]
            result = self._compare(route, self._load(place, entry))
            logger.info("%s, %s: %s", route, how, self.accept.explain(result))
            if self.accept.accepts(result):
                made.clear()
                made[how] = model, place, entry
            return result

        ways: Iterable[Quantization] = progress_bar(self._attempts(program, images), f"{self.precision} {route}")
        found = choose_way(ways, compare, self.accept)
        how, result = found
        if how is None:
            raise DisagreementError(
                f"'{route}' in {self.precision} {self.accept.explain(result)}; that is the best of all ways to "
                "quantise it that were tried. More calibration_images may help, another precision, or a weaker limit"
            )
        return *made[how], list(how.keep)

    def _attempts(self, program: Program, images: torch.Tensor) -> Iterator[Quantization]:
        """Ways to quantise, with more and more layers in full precision.

        First none, then the stitches, then the head, then up to half of the layers. Where a few layers are the most
        sensitive, these are kept. Where all layers lose a little, the last ones are kept: they are small, and nothing
        after them corrects their errors.
        """
        how = Quantization(self.precision, full_range=TARGETS[self.target].full_range)
        yield how
        if self.exporter.careful:
            yield (how := replace(how, careful=True))
        for keep in program.first_kept:
            yield replace(how, keep=keep)
        first, layers = program.first_kept[-1], list(program.layers)
        worst = [layer for layer in most_sensitive(program, images[:BATCH_SIZE]) if layer not in first]
        count = 1
        while count <= len(layers) // 2:
            yield replace(how, keep=(*first, *worst[:count]))
            yield replace(how, keep=tuple(dict.fromkeys((*first, *layers[-count - 1 :]))))
            count *= 2

    def _compare(self, route: Route | Cascade, run: Run) -> Comparison:
        """Compare an export with the original; UnsupportedExportError where what verifies it lacks an operation."""
        try:
            return self.reference.compare(route, run)
        except NotImplementedError as error:
            raise UnsupportedExportError(f"'{route}' cannot run in {self.exporter.runtime} here: {error}") from error

    def _load(self, folder: Path, entry: Mapping[str, str]) -> Run:
        """Load an exported route in its runtime."""
        try:
            how = self.preprocessing if self.with_preprocessing else None
            return load_run(self.exporter.runtime, folder, entry, self.threads, True, how, self.batch_size)
        except RuntimeError as error:  # errors of OpenVINO and ONNX Runtime derive from it, and from nothing narrower
            raise UnsupportedExportError(
                f"{self.exporter.runtime} cannot load what was exported to it: {error}"
            ) from error

    def _profile(
        self, folder: Path, entries: Mapping[RouteOrPart, Mapping[str, str]], kept: Mapping[str, list[str]]
    ) -> Profile:
        """Verify and measure the routes and cascades of a folder."""
        runs = {str(key): self._load(folder, entry) for key, entry in entries.items()}
        results = {route: self._verify(route, runs[str(route)]) for route in self.routes}
        image = next(self.reference.images())[:1].repeat(self.batch_size or 1, 0)
        inputs = part_inputs(runs, map(str, self.routes), self.stages, image)
        cascades = [self._cascade_row(each, runs) for each in self.stages]
        macs, params = MacsTable(), ParamsTable()
        rows = []
        for route in self.routes:
            steps = self.model.steps(route)
            costs = {"macs": macs.macs(steps), "params": params.params(steps)}
            rows.append(ProfiledRoute(route, costs, dict(results[route].scores) if self.real_images else {}))
        profile = Profile(tuple(rows), self._metadata(folder, entries, kept, results), tuple(cascades))
        if not RUNTIMES[self.exporter.runtime].runs_here:  # what evaluates the files here is not what runs them
            return profile
        return with_latencies(profile, time_parts(runs, inputs), self.stages)

    def _metadata(
        self,
        folder: Path,
        entries: Mapping[RouteOrPart, Mapping[str, str]],
        kept: Mapping[str, list[str]],
        results: Mapping[Route, Comparison],
    ) -> dict[str, Any]:
        """How a folder was made and verified, and what its files are."""
        packages = ("restnet-hf", *(package.partition(".")[0] for package in self.exporter.packages))
        metadata: dict[str, Any] = {
            "runtime": self.exporter.runtime,
            "precision": self.precision,
            "threads": self.threads or torch.get_num_threads(),
            "device": processor_name(),
            "machine": platform.machine(),
            "runtime_version": installed_version(self.exporter.runtime),
            "adapter": self.model.adapter_identity(),
            "batch_size": self.batch_size,
            "images": len(self.reference.logits[self.routes[0]]) if self.real_images else 0,
            "kept_in_full_precision": dict(kept),
            "logit_error": {str(route): result.logit_error for route, result in results.items()},
            "folded_stitches": self.folded,
            "files": {str(key): dict(entry) for key, entry in entries.items() if isinstance(key, Route)},
            "active": str(self.active),
            "size_mb": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20,
            "date": datetime.date.today().isoformat(),
            "versions": package_versions(dict.fromkeys(packages)),
        }
        if not RUNTIMES[self.exporter.runtime].runs_here:
            metadata["verified_by"] = "evaluator"
        if self.calibration is not None:
            metadata["target"] = self.target
        if self.with_preprocessing:
            metadata[INPUT] = PIXELS
        if any(result.labelled for result in results.values()):
            metadata["accuracy_drop"] = {
                str(route): {"points": each.accuracy_drop, "at_most": each.max_drop} for route, each in results.items()
            }
        if self.stages:
            metadata["parts"] = {str(key): dict(entry) for key, entry in entries.items() if isinstance(key, Part)}
            metadata["stages"] = {str(c): [stage.to_dict() for stage in each] for c, each in self.stages.items()}
            metadata["same_route"] = dict(self.same_route)
        return metadata

    def _cascade_row(self, cascade: Cascade, runs: Mapping[str, Run]) -> ProfiledCascade:
        """Verify a cascade, and count what it costs."""
        scores, shares = self._verify_cascade(cascade, runs)
        calibrated = () if self.model.profiled is None else self.model.profiled.cascades
        shares = next((row.shares for row in calibrated if row.route == cascade and row.shares), shares)
        walks = [(route, self.model.steps(route)) for route in cascade.routes]
        added = tuple(StageCosts.of(walks, MacsTable().macs).added_costs(range(len(walks))))
        costs: dict[str, float] = {"params": ParamsTable().params([step for _, steps in walks for step in steps])}
        costs["macs"] = sum(added)
        costs["mean_macs"] = sum(share * macs for share, macs in zip(shares, added, strict=True))
        return ProfiledCascade(cascade, costs, scores if self.real_images else {}, shares, None, {"macs": added})

    def _verify_cascade(self, cascade: Cascade, runs: Mapping[str, Run]) -> tuple[dict[str, float], tuple[float, ...]]:
        """Scores of an exported cascade and the shares of images that reach its routes; or DisagreementError."""
        answered: list[np.ndarray] = []

        def run(images: np.ndarray) -> np.ndarray:
            logits, numbers = run_stages(lambda part, x: runs[part](x), images, self.stages[cascade], cascade)
            answered.append(numbers)
            return logits

        result = self._compare(cascade, run)
        if not self.accept.accepts(result):
            raise DisagreementError(
                f"'{cascade}' for {self.exporter.runtime} in {self.precision} {self.accept.explain(result)}; nothing "
                "was written"
            )
        numbers = np.concatenate(answered)
        self.same_route[str(cascade)] = float((numbers == self.reference.answered_by[cascade]).mean())
        return dict(result.scores), tuple(float((numbers >= at).mean()) for at in range(len(cascade.routes)))

    def _verify(self, route: Route, run: Run) -> Comparison:
        """Compare an exported route with the route; DisagreementError where limits do not hold."""
        result = self._compare(route, run)
        off = self.precision == "fp32" and result.logit_error > MAX_LOGIT_ERROR
        if off or not self.accept.accepts(result):
            raise DisagreementError(
                f"'{route}' for {self.exporter.runtime} in {self.precision} {self.accept.explain(result)}; "
                f"its logits are off by up to {result.logit_error:.2g} standard deviations; nothing was written"
            )
        return result


def _noise(size: Sequence[int], how: Mapping[str, Any] | None) -> torch.Tensor:
    """Images (N, 3, H, W) of noise; where ``how`` is given, of pixels that are normalised so."""
    generator = torch.Generator().manual_seed(0)
    if how is None:
        return torch.randn(NOISE_IMAGES, 3, *size, generator=generator)
    pixels = torch.randint(256, (NOISE_IMAGES, *size, 3), generator=generator, dtype=torch.uint8)
    return torch.from_numpy(normalise(pixels.numpy(), how))


def _first_images(source: Any, count: int) -> torch.Tensor:
    """The first images of a source, (count, 3, H, W) in float32."""
    images: list[torch.Tensor] = []
    for batch in batches(source, BATCH_SIZE, "calibrate"):
        images.append(batch["pixel_values"].float())
        if sum(map(len, images)) >= count:
            break
    return torch.cat(images)[:count]
