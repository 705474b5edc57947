"""ExportedModel: the routes of an exported folder, prepared for, run and switched without torch."""

import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from restnet_hf.errors import quote
from restnet_hf.files import read_whole
from restnet_hf.routes.profile import Budget
from restnet_hf.routes.route import Route
from restnet_hf.runtime.exported_files import (
    LABELS,
    MAX_MESSAGE,
    MAX_SIDE,
    PREPROCESSING,
    PROFILE,
    documented_errors,
    image_size,
    known_checksums,
    read_labels,
    read_preprocessing,
    read_profile,
    verify,
)
from restnet_hf.runtime.runners import RUNTIMES, Run


def prepare_image(image: Image.Image, how: Mapping[str, Any]) -> np.ndarray:
    """One picture as a network wants it, (3, H, W) in float32.

    Args:
        image: of any mode and size.
        how: ``resize`` (pixels of the shorter edge, or height and width), ``crop`` (height and width of the middle
            that is kept, or null), ``resample`` (a name of Pillow's), and ``mean`` and ``std`` of values from 0 to 1.

    Raises:
        ValueError: the picture has no pixels, or is so narrow that it would be larger than `MAX_SIDE` squared.
    """
    image, resize = image.convert("RGB"), how["resize"]
    if isinstance(resize, int):
        edge = max(1, min(image.size))
        resize = [int(resize * each / edge) for each in (image.height, image.width)]
    if not all(image.size) or resize[0] * resize[1] > MAX_SIDE**2:
        raise ValueError(f"a picture of {image.width}x{image.height} pixels would be resized to {resize[::-1]}")
    image = image.resize((resize[1], resize[0]), Image.Resampling[how["resample"].upper()])
    if how["crop"] is not None:
        height, width = how["crop"]
        top, left = (image.height - height) // 2, (image.width - width) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(how["mean"])) / np.float32(how["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def in_batches(run: Run, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Logits (N, classes) from a function that takes so many images and no others; the last batch is filled up."""
    filled = np.concatenate([images, images[-1:].repeat(-len(images) % batch_size, 0)])
    pieces = [run(filled[start : start + batch_size]) for start in range(0, len(filled), batch_size)]
    return np.concatenate(pieces)[: len(images)]


class ExportedModel:
    """The routes that `export_routes` or ``restnet-hf export`` wrote, on a device without torch.

    One route is active and in memory; others are loaded when they are switched to, and their files are mapped where
    the runtime does that. ``profiled`` is what was measured at the export, for `Controller` and `set_budget`.

    The files are checked before they are used, as the folder may be untrusted: nothing of it is run as Python, and
    no file outside of it is opened. What a model computes is its runtime's affair: it may take long, or much memory,
    and ExecuTorch's runtime does not check all of a program, so that a malicious one may crash it. ``runtimes`` leaves
    out those that are not to be trusted with the folder.

    Args:
        folder: that was written.
        threads: of the processor; as the runtime has it by default.
        keep: how many routes stay loaded, the last ones used.
        runtimes: names of those that may run the folder; all by default.
        trust_remote_code: whether to load what may run code of the folder's author, which only a program of the
            ``torch`` runtime with custom operators or objects needs.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what it should be, or of a runtime that may not run it.
        MissingRuntimeError: the runtime is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        threads: int | None = None,
        keep: int = 1,
        *,
        runtimes: Collection[str] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: the active route is always loaded")
        allowed = {runtimes} if isinstance(runtimes, str) else {*(RUNTIMES if runtimes is None else runtimes)}
        if not allowed or not allowed <= RUNTIMES.keys():
            raise ValueError(f"runtimes={runtimes!r} must be some of {sorted(RUNTIMES)}")
        self.folder, self.threads, self.keep = Path(folder), threads, keep
        self._trust_remote_code = trust_remote_code
        read_whole(self.folder, PROFILE, partial(self._open, allowed))

    def _open(self, allowed: Collection[str], folder: Path) -> None:
        """Read all but the routes' files from a folder that holds them, and load the first route."""
        self.profiled = read_profile(folder)
        about = self.profiled.metadata
        self.runtime: str = about["runtime"]
        self.precision: str = about["precision"]
        self.batch_size: int | None = about.get("batch_size")
        if self.runtime not in allowed:
            raise ValueError(
                f"{self.folder} was exported for runtime '{self.runtime}', and only {sorted(allowed)} may run it; add "
                "it to runtimes, or export the routes again"
            )
        self._entries: dict[Route, dict[str, str]] = {Route.parse(name): each for name, each in about["files"].items()}
        self._decides = (folder / PROFILE).read_bytes()
        self._unverified = known_checksums(self._decides)
        self.labels = read_labels(folder)
        self.preprocessing = read_preprocessing(folder)
        self._verify(folder, LABELS, PREPROCESSING)
        self._loaded: OrderedDict[Route, Run] = OrderedDict()
        self.active_route = self.set_route(next(iter(self._entries)))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        route: Route | str | None = None,
        budget: Mapping[str, Any] | None = None,
        threads: int | None = None,
        keep: int = 1,
        runtimes: Collection[str] | None = None,
        trust_remote_code: bool = False,
    ) -> "ExportedModel":
        """Load a folder, and make a route active: the first, a given one, or the best within a budget.

        Raises:
            BudgetError: no route fits; otherwise as the class.
        """
        model = cls(folder, threads, keep, runtimes=runtimes, trust_remote_code=trust_remote_code)
        if route is not None:
            model.set_route(route)
        if budget is not None:
            model.set_budget(**budget)
        return model

    def _verify(self, folder: Path, *names: str) -> None:
        """Compare files with their checksums, each once."""
        verify(folder, names, self._unverified)
        for name in names:
            self._unverified.pop(name, None)

    def _check_same(self, folder: Path) -> None:
        """Raise OSError where a folder is not what it was when it was loaded."""
        if (folder / PROFILE).read_bytes() != self._decides:
            raise OSError(f"{self.folder} was exported to again since it was loaded; load it anew")

    def _load(self, route: Route, folder: Path) -> Run:
        """A route in its runtime, which takes the images that are prepared for it."""
        self._check_same(folder)
        entry = self._entries[route]
        alone = {each["file"] for each in self._entries.values()} - {entry["file"]}
        self._verify(folder, *(name for name in self._unverified if name not in alone))
        with documented_errors(f"route {quote(str(route))} of {self.folder} cannot be loaded by {self.runtime}"):
            run = RUNTIMES[self.runtime].run(folder, entry, self.threads, self._trust_remote_code)
            shape = getattr(run, "input_shape", None)
            if shape is not None:
                self._check_shape(shape)
        return run

    def _check_shape(self, shape: tuple[int | None, ...]) -> None:
        """Raise ValueError where a model takes other images than profile.json and preprocessing.json say."""
        size = image_size(self.preprocessing) or (None, None)
        expected = (self.batch_size, 3, *size)
        fits = len(shape) == 4 and all(a is None or b is None or a == b for a, b in zip(shape, expected, strict=True))
        if not fits or (self.batch_size is None and shape[0] is not None):
            raise ValueError(f"it takes images of shape {shape}, and the folder prepares {expected}, None being free")

    def _run(self, images: np.ndarray) -> np.ndarray:
        """Logits of the active route for as many images as it takes."""
        with documented_errors(f"route {quote(str(self.active_route))} of {self.folder} cannot run {images.shape}"):
            logits = np.asarray(self._loaded[self.active_route](images))
            if logits.shape != (len(images), len(self.labels)) or logits.dtype.kind != "f":
                raise ValueError(
                    f"it gives {logits.dtype} of shape {logits.shape}, and {LABELS} has {len(self.labels)} labels"
                )
        return logits

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes of the folder."""
        return tuple(self._entries)

    def set_route(self, route: Route | str) -> Route:
        """Make a route active; it is loaded if it is not any more.

        Raises:
            ValueError: there is no such route.
        """
        route = Route.parse(route) if isinstance(route, str) else route
        if route not in self._entries:
            known = quote(list(map(str, self.routes)), MAX_MESSAGE)
            raise ValueError(f"there is no route {quote(str(route))} in {self.folder}; the routes are {known}")
        if route not in self._loaded:
            read_whole(self.folder, PROFILE, self._check_same)  # while there is something that runs
            while len(self._loaded) >= self.keep:
                self._loaded.popitem(last=False)  # before another takes memory
            self._loaded[route] = read_whole(self.folder, PROFILE, partial(self._load, route))
        self._loaded.move_to_end(route)
        self.active_route = route
        return route

    def set_budget(self, *, score: str | None = None, **limits: Any) -> Route:
        """Make the best route within limits active, and return it.

        Args:
            score: of the profile; by default ``accuracy`` where it was measured, else ``agreement``.
            **limits: of `Budget`, ``latency_ms=`` for one.

        Raises:
            BudgetError: nothing fits; the message names the cheapest route.
        """
        scored = all("accuracy" in row.scores for row in self.profiled.routes)
        best = self.profiled.best(Budget(**limits), score or ("accuracy" if scored else "agreement"))
        return self.set_route(best.route)

    def prepare(self, images: Image.Image | Iterable[Image.Image]) -> np.ndarray:
        """Pictures as ``pixel_values`` (N, 3, H, W)."""
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        return np.stack([prepare_image(picture, self.preprocessing) for picture in pictures])

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of the active route, for images (N, 3, H, W) that `prepare` made.

        Raises:
            ValueError: the route does not take the images, or gives no logits for the labels.
        """
        images = np.ascontiguousarray(pixel_values, np.float32)
        self.set_route(self.active_route)  # a switch that failed may have taken it from memory
        return self._run(images) if self.batch_size is None else in_batches(self._run, images, self.batch_size)

    def classify(self, image: Image.Image, top_k: int = 5) -> list[dict[str, Any]]:
        """The likeliest classes of one picture, as transformers' pipeline gives them: ``label`` and ``score``."""
        logits = self(self.prepare(image))[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        return [{"label": self.labels[i], "score": float(shares[i])} for i in np.argsort(-shares)[:top_k]]
