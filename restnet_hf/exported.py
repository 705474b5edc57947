"""ExportedModel: the routes of an exported folder, prepared for, run and switched without torch."""

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from restnet_hf.profiles import Budget, Profile
from restnet_hf.routes import Route
from restnet_hf.runners import RUNNERS, Run


PROFILE, LABELS, PREPROCESSING = "profile.json", "labels.json", "preprocessing.json"


def prepare_image(image: Image.Image, how: Mapping[str, Any]) -> np.ndarray:
    """One picture as a network wants it, (3, H, W) in float32.

    Args:
        image: of any mode and size.
        how: ``resize`` (pixels of the shorter edge, or height and width), ``crop`` (height and width of the middle
            that is kept, or null), ``resample`` (a name of Pillow's), and ``mean`` and ``std`` of values from 0 to 1.
    """
    image, resize = image.convert("RGB"), how["resize"]
    if isinstance(resize, int):
        short = min(image.size)
        resize = [int(resize * edge / short) for edge in (image.height, image.width)]
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

    Args:
        folder: that was written.
        threads: of the processor; as the runtime has it by default.
        keep: how many routes stay loaded, the last ones used.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not what it should be.
        MissingRuntime: the runtime is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None, keep: int = 1) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: the active route is always loaded")
        self.folder, self.threads, self.keep = Path(folder), threads, keep
        self.profiled = Profile.load(self.folder / PROFILE)
        self.labels: list[str] = self._read(LABELS, list)
        self.preprocessing: dict[str, Any] = self._read(PREPROCESSING, dict)
        about = self.profiled.metadata
        self.runtime, self.precision = str(about.get("runtime")), str(about.get("precision"))
        self.batch_size: int | None = about.get("batch_size")
        if self.runtime not in RUNNERS:
            raise ValueError(f"{self.folder / PROFILE} names runtime '{self.runtime}', not one of {sorted(RUNNERS)}")
        self._entries = {Route.parse(name): self._entry(entry) for name, entry in dict(about.get("files", {})).items()}
        if {row.route for row in self.profiled.routes} != {*self._entries}:
            raise ValueError(f"{self.folder / PROFILE} does not name a file for each of its routes; export them again")
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
    ) -> "ExportedModel":
        """Load a folder, and make a route active: the first, a given one, or the best within a budget.

        Raises:
            BudgetError: no route fits; otherwise as the class.
        """
        model = cls(folder, threads, keep)
        if route is not None:
            model.set_route(route)
        if budget is not None:
            model.set_budget(**budget)
        return model

    def _read(self, name: str, kind: type) -> Any:
        try:
            found = json.loads((self.folder / name).read_text())
        except ValueError as error:
            raise ValueError(f"{self.folder / name}: {error}") from error
        if not isinstance(found, kind):
            raise ValueError(f"{self.folder / name} must hold a {kind.__name__}, not a {type(found).__name__}")
        return found

    def _entry(self, entry: Mapping[str, str]) -> Mapping[str, str]:
        for key in ("file", "weights"):
            name = entry.get(key, "")
            if Path(name).name != name:  # a file of a stranger must not lead elsewhere
                raise ValueError(f"{self.folder / PROFILE} names the file {name!r}, which is not in the folder")
        return entry

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
            raise ValueError(
                f"there is no route '{route}' in {self.folder}; the routes are {list(map(str, self.routes))}"
            )
        if route not in self._loaded:
            while len(self._loaded) >= self.keep:
                self._loaded.popitem(last=False)  # before another takes memory
            self._loaded[route] = RUNNERS[self.runtime](self.folder, self._entries[route], self.threads)
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
        """Logits (N, classes) of the active route, for images (N, 3, H, W) that `prepare` made."""
        run, images = self._loaded[self.active_route], np.ascontiguousarray(pixel_values, np.float32)
        return run(images) if self.batch_size is None else in_batches(run, images, self.batch_size)

    def classify(self, image: Image.Image, top_k: int = 5) -> list[dict[str, Any]]:
        """The likeliest classes of one picture, as transformers' pipeline gives them: ``label`` and ``score``."""
        logits = self(self.prepare(image))[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        return [{"label": self.labels[i], "score": float(shares[i])} for i in np.argsort(-shares)[:top_k]]
