"""ExportedModel: prepares images for the routes of an exported folder, runs and switches them without torch."""

import datetime
import json
import os
import platform
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from PIL import Image

from restnet_hf.errors import quote
from restnet_hf.files import SHA256, atomic_file, checksums, complete_folder, read_folder
from restnet_hf.limits import MAX_SIDE
from restnet_hf.routes.cascade import Cascade, is_cascade
from restnet_hf.routes.profile import Budget, BudgetLike, Profile
from restnet_hf.routes.route import Route
from restnet_hf.runtime.exported_cascades import ExportedStage, read_stages, run_stages
from restnet_hf.runtime.exported_files import (
    LABELS,
    MAX_MESSAGE,
    PREPROCESSING,
    PROFILE,
    documented_errors,
    exported_checksums,
    image_size,
    read_labels,
    read_preprocessing,
    read_profile,
    verify_files,
)
from restnet_hf.runtime.golden import CHECK, difference, made_images, read_golden
from restnet_hf.runtime.measuring import measure_memory, part_inputs, time_parts, with_latencies
from restnet_hf.runtime.pictures import is_one_picture, open_pictures
from restnet_hf.runtime.pixels import INPUT, PIXELS, load_run, normalise, run_in_batches
from restnet_hf.runtime.processor import processor_name
from restnet_hf.runtime.runners import RUNTIMES, Run, installed_version
from restnet_hf.runtime.sustained import Period, SustainedLatency, measure_sustained
from restnet_hf.runtime.targets import warn_of_saturation


AT_ONCE = 32  # pictures that `predict` prepares and runs at a time
USED: ContextVar[Mapping[int, Route | Cascade]] = ContextVar("restnet_hf_exported_routes")  # of `using`, by model's id


def prepare_image(image: Image.Image, how: Mapping[str, Any]) -> np.ndarray:
    """Prepare an image for a network, (3, H, W) in float32.

    Args:
        image: image of any mode and size.
        how: ``resize`` (pixels of the shorter edge, or height and width), ``crop`` (height and width of the centre
            crop, or null), ``resample`` (a filter of Pillow), and ``mean`` and ``std`` of values from 0 to 1.

    Raises:
        ValueError: the image has no pixels, or is so narrow that it would be larger than `MAX_SIDE` squared.
    """
    image, resize = image.convert("RGB"), how["resize"]
    if isinstance(resize, int):
        edge = max(1, min(image.size))
        resize = [int(resize * each / edge) for each in (image.height, image.width)]
    if not all(image.size) or resize[0] * resize[1] > MAX_SIDE**2:
        raise ValueError(f"an image of {image.width}x{image.height} pixels would be resized to {resize[::-1]}")
    image = image.resize((resize[1], resize[0]), Image.Resampling[how["resample"].upper()])
    if how["crop"] is not None:
        height, width = how["crop"]
        top, left = (image.height - height) // 2, (image.width - width) // 2
        image = image.crop((left, top, left + width, top + height))
    return normalise(np.asarray(image)[None], how)[0]


class ExportedModel:
    """The routes and cascades that `export_routes` or ``restnet-hf export`` wrote, on a device without torch.

    One route is active and in memory; others are loaded when they are switched to, memory-mapped where the runtime
    does that. ``profiled`` is the profile measured at export, for `Controller` and `set_budget`.

    Threads can share the model: each passes ``route=`` in its calls, or runs in a block of `using`. Routes are loaded
    one at a time, and run side by side, but for ExecuTorch's, which run one after the other. ``keep`` should be the
    number of routes that are in use at the same time, since one that was dropped is loaded again. What a cascade runs
    stays loaded while it is active.

    The files are checked before they are used, since the folder may be untrusted: none of it is run as Python, and no
    file outside of it is opened. What a model computes is left to its runtime: it may take long, or much memory, and
    ExecuTorch's runtime does not check all of a program, so that a malicious one may crash it. ``runtimes`` can leave
    out runtimes that should not run an untrusted folder.

    Args:
        folder: folder that the export wrote.
        threads: number of processor threads; the runtime's own default if None.
        keep: number of routes that stay loaded, the last ones used.
        route: route or cascade to make active; by default the one that was active at the export.
        budget: limits such as ``{"latency_ms": 20}``; the best route or cascade within them is made active.
        runtimes: names of the runtimes that may run the folder; all by default.
        trust_remote_code: whether to load what may run code of the folder's author, which only a program of the
            ``torch`` runtime with custom operators or objects needs.

    Raises:
        BudgetError: no route fits the budget.
        OSError: a file is missing.
        ValueError: a file is invalid, or of a runtime that may not run the folder.
        MissingRuntimeError: the runtime is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        threads: int | None = None,
        keep: int = 1,
        *,
        route: Route | Cascade | str | None = None,
        budget: BudgetLike | None = None,
        runtimes: Collection[str] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if route is not None and budget is not None:
            raise ValueError("give either route or budget")
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: the active route is always loaded")
        allowed = {runtimes} if isinstance(runtimes, str) else {*(RUNTIMES if runtimes is None else runtimes)}
        if not allowed or not allowed <= RUNTIMES.keys():
            raise ValueError(f"runtimes={runtimes!r} must be some of {sorted(RUNTIMES)}")
        self.folder, self.threads, self.keep = Path(folder), threads, keep
        self._trust_remote_code = trust_remote_code
        read_folder(self.folder, PROFILE, partial(self._open, allowed, route, budget))

    def _open(
        self,
        allowed: Collection[str],
        route: Route | Cascade | str | None,
        budget: BudgetLike | None,
        folder: Path,
    ) -> None:
        """Read all files but those of routes, and load the given route or the one that was active at the export."""
        self.profiled = read_profile(folder)
        metadata = self.profiled.metadata
        self.runtime: str = metadata["runtime"]
        self.precision: str = metadata["precision"]
        self.batch_size: int | None = metadata.get("batch_size")
        self.takes_pixels = metadata.get(INPUT) == PIXELS
        if self.runtime not in allowed:
            raise ValueError(
                f"{self.folder} was exported for runtime '{self.runtime}', and only {sorted(allowed)} may run it; add "
                "it to runtimes, or export the routes again"
            )
        warn_of_saturation(metadata.get("target"))
        self._entries: dict[Route | str, dict[str, str]] = {
            Route.parse(name): entry for name, entry in metadata["files"].items()
        }
        names = {*metadata["files"], *metadata.get("parts", {})}
        self._stages = {
            Cascade.parse(text): read_stages(stages, names, Cascade.parse(text))
            for text, stages in metadata.get("stages", {}).items()
        }
        self._entries |= metadata.get("parts", {})
        self._profile_bytes = (folder / PROFILE).read_bytes()
        self._unverified = exported_checksums(self._profile_bytes)
        self.labels = read_labels(folder)
        self.preprocessing = read_preprocessing(folder)
        self._verify(folder, LABELS, PREPROCESSING)
        self._loaded: OrderedDict[Route | str, Run] = OrderedDict()
        self._lock, self._loading = RLock(), RLock()  # of `_loaded`, and for one load at a time
        self._most_loaded = self.keep
        self.active_route: Route
        self.active_cascade: Cascade | None
        if budget is not None:
            route = self.profiled.best(Budget.of(budget)).route
        self._make_active(route or metadata.get("active") or next(iter(metadata["files"])))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        route: Route | Cascade | str | None = None,
        budget: BudgetLike | None = None,
        threads: int | None = None,
        keep: int = 1,
        runtimes: Collection[str] | None = None,
        trust_remote_code: bool = False,
    ) -> "ExportedModel":
        """Load a folder, and make a route active: the one that was active at the export unless another is asked for.

        Args:
            folder: folder that the export wrote.
            route: route or cascade to make active.
            budget: limits such as ``{"latency_ms": 20}``; the best route or cascade within them is made active.
            threads: number of processor threads; the runtime's own default if None.
            keep: number of routes that stay loaded, the last ones used.
            runtimes: names of the runtimes that may run the folder; all by default.
            trust_remote_code: whether to load what may run code of the folder's author.

        Raises:
            BudgetError: no route fits the budget.
            OSError: a file is missing.
            ValueError: a file is invalid, there is no such route, or both route and budget are given.
            MissingRuntimeError: the runtime is not installed.
        """
        options: dict[str, Any] = {"runtimes": runtimes, "trust_remote_code": trust_remote_code}
        return cls(folder, threads, keep, route=route, budget=budget, **options)

    def made_logits(self) -> dict[str, np.ndarray]:
        """Logits (N, classes) of made images, by route and cascade; `check` compares them with those at the export."""
        images = made_images(self.preprocessing)
        logits = {str(route): self(images, route=route) for route in self.routes}
        return logits | {str(cascade): self.run_cascade(images, cascade)[0] for cascade in self.cascades}

    def check(self) -> dict[str, float]:
        """Compare all files with their checksums, and what the runtime computes with what it computed at the export.

        Returns:
            The largest difference of a logit by route and cascade, in standard deviations of the logits.

        Raises:
            OSError: the folder has no ``check.json``, as earlier versions wrote none.
            ValueError: a file has changed, or logits differ more than the export allows for its precision.
        """
        digests = exported_checksums(self._profile_bytes)
        verify_files(self.folder, digests, digests)
        tolerance, expected = read_golden(self.folder)
        now = self.made_logits()
        if missing := sorted(expected.keys() ^ now.keys()):
            raise ValueError(f"{self.folder / CHECK} does not fit the routes of the folder: {quote(missing)}")
        differences = {name: difference(now[name], each) for name, each in expected.items()}
        if wrong := {name: off for name, off in differences.items() if not off <= tolerance}:
            raise ValueError(
                f"{self.runtime} computes other logits here than at the export: off by {quote(wrong)} standard "
                f"deviations, where {tolerance} is allowed; export on this device, or choose another precision"
            )
        return differences

    def measure_latency(self, *, seconds: float = 20.0, repeats: int = 20, save: bool = False) -> Profile:
        """Measure all routes and cascades on this device, for `set_budget` and `Controller`; the scores stay.

        Args:
            seconds: time after which no further round begins, except for the first 5.
            repeats: number of rounds, from 5 to 200.
            save: whether the folder's ``profile.json`` is replaced by the result, for the next process.

        Returns:
            The profile with this device's latencies, which ``profiled`` is from now on.

        Raises:
            ValueError: ``repeats`` is out of range, a file is invalid, or the runtime does not run on this system.
            OSError: the folder cannot be read or written, or was written to since it was loaded.
        """
        self._check_runs_here()
        image = made_images(self.preprocessing)[:1].repeat(self.batch_size or 1, 0)
        with self._all_loaded() as runs:
            inputs = part_inputs(runs, map(str, self.routes), self._stages, image)
            latencies = time_parts(runs, inputs, seconds, repeats)
        threads = self.threads or os.cpu_count() or 1
        here = {"device": processor_name(), "threads": threads, "date": datetime.date.today().isoformat()}
        here |= {"machine": platform.machine(), "runtime_version": installed_version(self.runtime)}
        measured = with_latencies(self.profiled, latencies, self._stages)
        others = {"sustained", "memory"}  # of an earlier measurement, perhaps on another device
        kept = {key: value for key, value in measured.metadata.items() if key not in others}
        return self._record(replace(measured, metadata={**kept, **here}), save)

    def measure_sustained(
        self,
        minutes: float = 10.0,
        *,
        report: Callable[[Period], object] | None = None,
        save: bool = False,
    ) -> SustainedLatency:
        """Run the active route or cascade for minutes, to see whether this device slows down as it gets warm.

        Args:
            minutes: minutes to run for; Ctrl-C ends it before.
            report: function that is called every few seconds with a `Period`.
            save: whether the result is kept in the metadata of the folder's ``profile.json``.

        Raises:
            ValueError: ``minutes`` is out of range, or the runtime does not run on this system.
            OSError: the folder cannot be written, or was written to since it was loaded.
        """
        self._check_runs_here()
        image, active = made_images(self.preprocessing)[:1], self.active_cascade or self.active_route
        result = measure_sustained(partial(self, image), str(active), minutes, report=report)
        self._record(replace(self.profiled, metadata={**self.profiled.metadata, "sustained": result.to_dict()}), save)
        return result

    def measure_memory(self, *, save: bool = False) -> dict[str, dict[str, float]]:
        """Measure the peak memory of each route, in a process of its own that loads it and runs it.

        Args:
            save: whether the result is kept in the metadata of the folder's ``profile.json``.

        Returns:
            By route ``resident_mb``, the peak, and ``loaded_mb``, by how much it is above the peak of a process that
            has imported the runtime alone; see `restnet_hf.runtime.measuring.measure_memory`.

        Raises:
            OSError: the system does not count the memory of processes, or the folder cannot be written.
            RuntimeError: a process ended without a result.
            ValueError: the runtime does not run on this system.
        """
        self._check_runs_here()
        result = {str(route): measure_memory(self.folder, str(route), self.threads) for route in self.routes}
        self._record(replace(self.profiled, metadata={**self.profiled.metadata, "memory": result}), save)
        return result

    def _check_runs_here(self) -> None:
        """Raise ValueError where the files are evaluated by other means than their runtime."""
        runtime = RUNTIMES[self.runtime]
        if not runtime.runs_here:
            raise ValueError(
                f"runtime '{self.runtime}' runs on {' and '.join(runtime.platforms)} alone; here its files are "
                "evaluated by other means, whose latency and memory are not the runtime's: measure the folder there"
            )

    @contextmanager
    def _all_loaded(self) -> Iterator[dict[str, Run]]:
        """All routes and parts, loaded as long as the block runs."""
        before, self._most_loaded = self._most_loaded, max(self._most_loaded, len(self._entries))
        try:
            yield {str(name): self._get(name) for name in self._entries}
        finally:
            self._most_loaded = before

    def _record(self, profile: Profile, save: bool) -> Profile:
        """Make a profile the model's own, and that of the folder where it is saved."""
        if save:
            folder = complete_folder(self.folder, PROFILE)
            self._check_same(folder)
            content = json.dumps({**profile.to_dict(), SHA256: dict(checksums(self._profile_bytes))}, indent=2) + "\n"
            with atomic_file(folder / PROFILE) as file:
                file.write_text(content)
            self._profile_bytes = content.encode()
        self.profiled = profile
        return profile

    def _verify(self, folder: Path, *names: str) -> None:
        """Compare files with their checksums, each file once."""
        verify_files(folder, names, self._unverified)
        for name in names:
            self._unverified.pop(name, None)

    def _check_same(self, folder: Path) -> None:
        """Raise OSError where the folder was written to since it was loaded."""
        if (folder / PROFILE).read_bytes() != self._profile_bytes:
            raise OSError(f"{self.folder} was exported to again since it was loaded; load it anew")

    def _load(self, route: Route | str, folder: Path) -> Run:
        """Load a route or part in its runtime, and check that a route takes images as they are prepared."""
        self._check_same(folder)
        entry = self._entries[route]
        others = {name for other in self._entries.values() for name in other.values()} - {*entry.values()}
        self._verify(folder, *(name for name in self._unverified if name not in others))
        with documented_errors(f"route {quote(str(route))} of {self.folder} cannot be loaded by {self.runtime}"):
            how = self.preprocessing if self.takes_pixels and isinstance(route, Route) else None
            run = load_run(self.runtime, folder, entry, self.threads, self._trust_remote_code, how)
            shape = getattr(run, "input_shape", None)
            if shape is not None and isinstance(route, Route):
                self._check_shape(shape)
        return run

    def _check_shape(self, shape: tuple[int | None, ...]) -> None:
        """Raise ValueError where a model takes images of another shape than the folder prepares."""
        size = image_size(self.preprocessing) or (None, None)
        expected = (self.batch_size, 3, *size)
        fits = len(shape) == 4 and all(a is None or b is None or a == b for a, b in zip(shape, expected, strict=True))
        if not fits or (self.batch_size is None and shape[0] is not None):
            raise ValueError(f"it takes images of shape {shape}, the folder prepares {expected} (None: any size)")

    def _run(self, route: Route, run: Run, images: np.ndarray) -> np.ndarray:
        """Logits of a route for one batch of images."""
        with documented_errors(f"route {quote(str(route))} of {self.folder} cannot run {images.shape}"):
            logits = np.asarray(run(images))
            self._check_logits(logits, len(images))
        return logits

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes of the folder."""
        return tuple(route for route in self._entries if isinstance(route, Route))

    @property
    def cascades(self) -> tuple[Cascade, ...]:
        """The cascades of the folder, with the thresholds that they were exported with."""
        return tuple(self._stages)

    def route(self, route: Route | str) -> Route:
        """Parse a route, and check that the folder has it.

        Raises:
            ValueError: the route does not parse, or there is no such route.
        """
        route = Route.parse(route) if isinstance(route, str) else route
        if route not in self._entries:
            names = quote(list(map(str, self.routes)), MAX_MESSAGE)
            raise ValueError(f"there is no route {quote(str(route))} in {self.folder}; the routes are {names}")
        return route

    def cascade(self, cascade: Cascade | str) -> Cascade:
        """Parse a cascade, and check that the folder can run it: other thresholds are allowed.

        Args:
            cascade: cascade with thresholds, or its string form.

        Raises:
            ValueError: the cascade does not parse or has no thresholds, or the folder has none of these routes.
        """
        cascade = Cascade.parse(cascade) if isinstance(cascade, str) else cascade
        if cascade not in self._stages and (not cascade.thresholds or self._stages_of(cascade) is None):
            names = quote(list(map(str, self.cascades)), MAX_MESSAGE)
            raise ValueError(
                f"there is no cascade {quote(str(cascade))} in {self.folder}; the cascades are {names}, which may run "
                "with other thresholds; export_routes(..., cascades=) exports others"
            )
        return cascade

    def _stages_of(self, cascade: Cascade) -> tuple[ExportedStage, ...] | None:
        """The stages of a cascade, whatever its thresholds; None where the folder has none of these routes."""
        found = (stages for known, stages in self._stages.items() if known.routes == cascade.routes)
        return self._stages.get(cascade) or next(found, None)

    def _loaded_run(self, route: Route | str) -> Run | None:
        """A route that is loaded, as the last one used; None if it is not."""
        with self._lock:
            if route in self._loaded:
                self._loaded.move_to_end(route)
            return self._loaded.get(route)

    def _part(self, name: str) -> Run:
        """The function of a part by name: of a route, or of what stages of cascades run."""
        return self._get(name if name in self._entries else Route.parse(name))

    def _get(self, route: Route | str) -> Run:
        """The function of a route, loaded unless it still is; threads that run a dropped one keep it until then."""
        run = self._loaded_run(route)
        if run is not None:
            return run
        with self._loading:
            run = self._loaded_run(route)  # another thread may have loaded it meanwhile
            if run is None:
                read_folder(self.folder, PROFILE, self._check_same)  # while the others can still run
                with self._lock:
                    while len(self._loaded) >= self._most_loaded:
                        self._loaded.popitem(last=False)  # before another takes memory
                run = read_folder(self.folder, PROFILE, partial(self._load, route))
                with self._lock:
                    self._loaded[route] = run
        return run

    def set_route(self, route: Route | str) -> Route:
        """Make a route active; it is loaded unless it still is.

        Raises:
            ValueError: there is no such route.
            OSError: the folder was written to since it was loaded.
        """
        route = self.route(route)
        self._most_loaded = self.keep
        self._get(route)
        self.active_route, self.active_cascade = route, None
        return route

    def set_cascade(self, cascade: Cascade | str) -> Cascade:
        """Make a cascade active; all that it runs is loaded unless it still is.

        Args:
            cascade: cascade of the folder, also with other thresholds than it was exported with.

        Raises:
            ValueError: there is no such cascade.
            OSError: the folder was written to since it was loaded.
        """
        cascade = self.cascade(cascade)
        self._load_parts(cascade)
        self.active_route, self.active_cascade = cascade.routes[-1], cascade
        return cascade

    def _make_active(self, route: Route | Cascade | str) -> Route | Cascade:
        """Make a route or cascade active, and return it."""
        chosen = self._parse(route)
        return self.set_cascade(chosen) if isinstance(chosen, Cascade) else self.set_route(chosen)

    def _parse(self, route: Route | Cascade | str) -> Route | Cascade:
        """Parse a route or cascade, and check that the folder has it."""
        if isinstance(route, Route) or (isinstance(route, str) and not is_cascade(route)):
            return self.route(route)
        return self.cascade(route)

    def _load_parts(self, cascade: Cascade) -> None:
        """Load all that a cascade runs, and keep it as long as no route is set."""
        names = dict.fromkeys(part for stage in self._stages_of(cascade) or () for part in stage.parts)
        self._most_loaded = max(self._most_loaded, len(names))
        for name in names:
            self._part(name)

    @contextmanager
    def using(self, route: Route | Cascade | str) -> Iterator[Route | Cascade]:
        """Run a route or cascade in the block, in this thread or task only, whatever other threads make active.

        Args:
            route: route or cascade, or its string form.

        Raises:
            ValueError: there is no such route or cascade.
            OSError: the folder was written to since it was loaded.
        """
        chosen = self._parse(route)
        if isinstance(chosen, Cascade):
            self._load_parts(chosen)
        else:
            self._get(chosen)
        token = USED.set({**USED.get({}), id(self): chosen})
        try:
            yield chosen
        finally:
            USED.reset(token)

    def set_budget(
        self, budget: BudgetLike | None = None, *, score: str | None = None, **limits: Any
    ) -> Route | Cascade:
        """Make the best route within limits active, and return it; where a mean is limited also a cascade.

        Args:
            budget: limits as a `Budget` or a dict such as ``{"latency_ms": 20}``.
            score: score of the profile that decides; by default ``accuracy`` where it was measured, else
                ``agreement``.
            **limits: limits by cost, such as ``latency_ms=20``, in place of ``budget``.

        Raises:
            BudgetError: no route fits (the message names the cheapest), or the profile has no such cost or score.
        """
        return self._make_active(self.profiled.best(Budget.of(budget, **limits), score).route)

    def prepare(self, images: Any) -> np.ndarray:
        """Prepare images as ``pixel_values`` (N, 3, H, W).

        Args:
            images: PIL images, paths or arrays (H, W, 3) in uint8, one or several.

        Raises:
            OSError: a file cannot be opened; the message names it.
            PictureError: an image is broken or too large; the message names it.
            ValueError: the prepared images differ in size.
        """
        batch = [prepare_image(image, self.preprocessing) for image in open_pictures(images)]
        if len({image.shape for image in batch}) != 1:
            raise ValueError(
                f"prepared images must have one size, not {sorted({image.shape[1:] for image in batch})}; prepare "
                "them one by one, or call predict"
            )
        return np.stack(batch)

    def __call__(
        self,
        pixel_values: np.ndarray,
        *,
        route: Route | str | None = None,
        cascade: Cascade | str | None = None,
    ) -> np.ndarray:
        """Logits (N, classes) for images (N, 3, H, W) that `prepare` made.

        Args:
            pixel_values: images that `prepare` returned, one or several.
            route: route to run; by default that of `using` in this thread, else the active one.
            cascade: cascade to run in place of a route; `run_cascade` also returns which route answered.

        Raises:
            ValueError: there is no such route or cascade, or it does not take the images, or does not return one logit
                for each label.
        """
        chosen = self._chosen(route, cascade)
        if isinstance(chosen, Cascade):
            return self.run_cascade(pixel_values, chosen)[0]
        images = np.ascontiguousarray(pixel_values, np.float32)
        run = partial(self._run, chosen, self._get(chosen))
        return run(images) if self.batch_size is None else run_in_batches(run, images, self.batch_size)

    def _chosen(self, route: Route | str | None, cascade: Cascade | str | None) -> Route | Cascade:
        """The route or cascade of a call."""
        if route is not None and cascade is not None:
            raise ValueError("give a route or a cascade, not both")
        if cascade is not None:
            return self.cascade(cascade)
        active = self.active_cascade or self.active_route  # read once: another thread may change it
        return USED.get({}).get(id(self), active) if route is None else self.route(route)

    def run_cascade(
        self, pixel_values: np.ndarray, cascade: Cascade | str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a cascade on images (N, 3, H, W) that `prepare` made.

        Args:
            pixel_values: images that `prepare` returned, one or several.
            cascade: cascade of the folder; by default the active one.

        Returns:
            Logits (N, classes), and for each image the number of the route that answered (N,), from 0.

        Raises:
            ValueError: there is no such cascade, or none is active, or a part of it cannot run.
        """
        chosen = self.active_cascade if cascade is None else self.cascade(cascade)
        stages = None if chosen is None else self._stages_of(chosen)
        if chosen is None or stages is None:
            raise ValueError(f"no cascade is active; give one of {quote(list(map(str, self.cascades)), MAX_MESSAGE)}")
        images = np.ascontiguousarray(pixel_values, np.float32)
        logits, answered_by = run_stages(self._run_part, images, stages, chosen)
        self._check_logits(logits, len(images))
        return logits, answered_by

    def _run_part(self, name: str, x: np.ndarray) -> np.ndarray:
        """The output (N, ...) of a part of a cascade for its input (N, ...)."""
        run = self._part(name)
        with documented_errors(f"{quote(name)} of {self.folder} cannot run {x.shape}"):
            y = np.asarray(run(x) if self.batch_size is None else run_in_batches(run, x, self.batch_size))
            if y.ndim < 2 or len(y) != len(x) or y.dtype.kind != "f":
                raise ValueError(f"it returns {y.dtype} of shape {y.shape}, not an activation for each of {len(x)}")
        return np.ascontiguousarray(y, np.float32)

    def _check_logits(self, logits: np.ndarray, images: int) -> None:
        """Raise ValueError unless there is a logit of each label for each image."""
        if logits.shape != (images, len(self.labels)) or logits.dtype.kind != "f":
            raise ValueError(
                f"it returns {logits.dtype} of shape {logits.shape}, but {LABELS} has {len(self.labels)} labels"
            )

    def predict(
        self,
        images: Any,
        *,
        route: Route | str | None = None,
        cascade: Cascade | str | None = None,
        budget: BudgetLike | None = None,
        top_k: int | None = 5,
    ) -> list[Any]:
        """The most likely classes of images, as a pipeline of transformers returns them.

        Args:
            images: PIL images, paths or arrays (H, W, 3) in uint8, one or several.
            route: route to run; by default that of `using` in this thread, else the active one.
            cascade: cascade to run in place of a route.
            budget: limits such as ``{"latency_ms": 20}``; the best route within them runs, in this call only, or the
                best cascade where a mean is limited.
            top_k: number of classes for each image; all if None.

        Returns:
            For one image a list of ``{"label": ..., "score": ...}``, the most likely first; for several a list of such
            lists.

        Raises:
            BudgetError: no route fits the budget.
            OSError: a file cannot be opened; the message names it.
            PictureError: an image is broken or too large; the message names it.
            TypeError: an image is of another type.
            ValueError: there is no such route or cascade, or several of route, cascade and budget are given.
        """
        if sum(each is not None for each in (route, cascade, budget)) > 1:
            raise ValueError("give either route or budget or cascade, not several of them")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k={top_k!r} must be a whole number of at least 1, or None for all classes")
        best = None if budget is None else self.profiled.best(budget).route
        chosen = self._chosen(route, cascade) if best is None else best
        named: dict[str, Any] = {"cascade" if isinstance(chosen, Cascade) else "route": chosen}
        prepared = (prepare_image(image, self.preprocessing) for image in open_pictures(images))
        answers: list[list[dict[str, Any]]] = []
        for _, group in groupby(prepared, np.shape):  # where the size depends on the image
            while batch := list(islice(group, AT_ONCE)):
                answers += [self._most_likely(row, top_k) for row in self(np.stack(batch), **named)]
        return answers[0] if is_one_picture(images) else answers

    def _most_likely(self, logits: np.ndarray, top_k: int | None) -> list[dict[str, Any]]:
        """The most likely classes of one image from its logits (classes,)."""
        scores = np.exp(logits.astype(np.float64) - float(logits.max()))
        scores /= scores.sum()
        return [{"label": self.labels[i], "score": float(scores[i])} for i in np.argsort(-scores)[:top_k]]

    def classify(self, images: Any, top_k: int = 5) -> list[Any]:
        """`predict` by the active route."""
        return self.predict(images, top_k=top_k)
