"""What the app can run: the entries of a profile, limits on their costs, and answers for a picture."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, main_thread
from typing import Any

import torch

from restnet_hf.app.svg import as_svg
from restnet_hf.data.datasets import batches
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import AnyProfiled, Budget, Profile, ProfiledCascade


LIMITED = {  # costs that get a slider: name, unit, and the number that costs are divided by
    "mean_macs": ("Mean MACs", "M", 1e6),
    "macs": ("MACs", "M", 1e6),
    "mean_latency_ms": ("Mean latency", "ms", 1.0),
    "latency_ms": ("Latency", "ms", 1.0),
    "memory_mb": ("Memory", "MB", 1.0),
}
DIGITS = 3  # of the ends of a slider
TOP = 5  # classes of an answer


@dataclass(frozen=True)
class CostRange:
    """The range of a cost over the entries of a profile.

    Args:
        cost: name of the cost.
        label: name and unit for people.
        low: lowest value, in the unit.
        high: highest value, in the unit; no limit.
        step: step between values of a slider, in the unit.
        divisor: number that costs are divided by to be in the unit.
    """

    cost: str
    label: str
    low: float
    high: float
    step: float
    divisor: float


@dataclass(frozen=True)
class Answer:
    """The prediction of an entry for a picture.

    Args:
        scores: probability of each of the likeliest classes, the highest first.
        milliseconds: time of this run, without reading the picture.
        answered_by: the route that answered.
    """

    scores: Mapping[str, float]
    milliseconds: float
    answered_by: str


@dataclass
class AppModel:
    """A model as the app shows it. Nothing of a visitor is stored here, so many can use it at once.

    Args:
        model: model with a profile.
        images: images, labelled or not, for comparisons of cuts; None for none.
        examples: paths of pictures to try.
        busy: held while something runs that measures time or takes long.
        folder: folder of exports, of which the last one is kept.
        drawings: drawing of each entry that somebody looked at.
        worker: the thread that runs the model, one picture after the other. A server has many threads, and each would
            bring threads of its own for torch, which then wait for one another.
    """

    model: StitchedModelForImageClassification
    images: Any = None
    examples: Sequence[str] = ()
    busy: Lock = field(default_factory=Lock)
    folder: str = field(default_factory=partial(tempfile.mkdtemp, prefix="restnet-hf-"))
    drawings: dict[str, str] = field(default_factory=dict)
    worker: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1))

    def draw(self, entry: str) -> str:
        """The path of a route or cascade through the networks, as SVG; drawn once.

        Args:
            entry: route or cascade as text.
        """
        if entry not in self.drawings:
            figure = self.model.plot_route(self.profile[entry].route)
            self.drawings[entry] = as_svg(figure, f"The path of {entry} through the networks")
        return self.drawings[entry]

    def draw_ahead(self) -> None:
        """Draw what is offered before somebody asks for it, as long as the program runs.

        A thread that still draws when the interpreter is gone, as a daemon may, takes the process down.
        """
        for entry in offered_entries(self.profile):
            if not main_thread().is_alive():
                return
            self.draw(entry)

    def run(self, path: str, entries: Sequence[str]) -> list["Answer"]:
        """Run entries on a picture, and time them.

        Args:
            path: file of the picture.
            entries: routes or cascades as text.

        Raises:
            PictureError: the picture is broken or too large.
            ValueError: there is no such route or cascade.
        """
        pixel_values = self.worker.submit(read_picture, self.model, path).result()
        return [self.worker.submit(run_entry, self.model, pixel_values, entry).result() for entry in entries]

    @property
    def profile(self) -> Profile:
        """The model's profile."""
        assert self.model.profiled is not None
        return self.model.profiled


def check_model(model: StitchedModelForImageClassification) -> None:
    """Raise ValueError where a model cannot be shown: its routes were not profiled."""
    if model.profiled is None or not model.profiled.routes:
        raise ValueError("the model has no profile to show; call profile(eval_set, cascades=True) first")


def cost_ranges(profile: Profile) -> list[CostRange]:
    """The costs that all routes of a profile have and that differ, each with its range.

    Args:
        profile: profile of a model.
    """
    rows = [row.with_means() for row in profile.routes] if profile.cascades else [*profile.routes]
    every: list[AnyProfiled] = [*rows, *profile.cascades]
    ranges = []
    for cost in LIMITED:
        values = [row.costs[cost] for row in every if cost in row.costs]
        if len(values) < len(rows) or not all(map(math.isfinite, values)) or min(values) >= max(values):
            continue
        name, unit, divisor = LIMITED[cost]
        low, high = min(values) / divisor, max(values) / divisor
        grain = 10.0 ** (math.floor(math.log10(high)) + 1 - DIGITS)
        ends = math.floor(low / grain) * grain, math.ceil(high / grain) * grain
        low, high, step = (round(each, 9) for each in (max(ends[0], grain), ends[1], grain))
        ranges.append(CostRange(cost, f"{name}, {unit}", low, high, step, divisor))
    return ranges


def best_entry(profile: Profile, ranges: Sequence[CostRange], limits: Sequence[float]) -> str:
    """The best route or cascade within limits, as text.

    Args:
        profile: profile of a model.
        ranges: costs that are limited.
        limits: limit of each, in its unit; the end of the range is no limit.

    Raises:
        BudgetError: nothing fits.
    """
    # a slider's number is rounded, and its lowest must still allow the cheapest entry
    chosen = {
        each.cost: (limit + each.step * (limit <= each.low)) * each.divisor
        for each, limit in zip(ranges, limits, strict=True)
        if limit < each.high - each.step / 2
    }
    return str(profile.best(Budget(**chosen) if chosen else Budget(macs=math.inf)).route)


def describe_row(row: AnyProfiled, profile: Profile) -> str:
    """Costs and scores of an entry in a line, with the standard error of an accuracy.

    Args:
        row: row of the profile.
        profile: profile of a model.
    """
    parts, cascade = [], isinstance(row, ProfiledCascade)
    for cost, (name, unit, divisor) in LIMITED.items():
        if cost in row.costs and (cascade or not cost.startswith("mean_")):
            most = "at most " if cascade and f"mean_{cost}" in LIMITED else ""
            parts.append(f"{name.lower().replace('macs', 'MACs')} {most}{_number(row.costs[cost] / divisor)} {unit}")
    for score, value in row.scores.items():
        error = standard_error(row, profile) if score == "accuracy" else None
        parts.append(f"{score} {100 * value:.1f}{'' if error is None else f' ± {100 * error:.1f}'} %")
    return "; ".join(parts)


def _number(value: float) -> str:
    """A number with three digits."""
    return f"{value:.{max(0, DIGITS - 1 - math.floor(math.log10(value)))}f}" if 0 < value < 1e6 else f"{value:.3g}"


def standard_error(row: AnyProfiled, profile: Profile) -> float | None:
    """Standard error of the accuracy of an entry; None where the number of images is not known."""
    if isinstance(row, ProfiledCascade):
        return row.standard_error
    images, share = profile.metadata.get("images"), row.scores.get("accuracy")
    if not isinstance(images, int) or images < 1 or share is None or not 0 <= share <= 1:
        return None
    return math.sqrt(share * (1 - share) / images)


def first_entry(model: StitchedModelForImageClassification) -> str:
    """The entry that a visitor sees first: the active one, as the author of the adapter left it.

    Args:
        model: model with a profile.
    """
    assert model.profiled is not None
    active = str(model.active_cascade or model.active_route)
    return active if active in model.profiled else offered_entries(model.profiled)[0]


def offered_entries(profile: Profile) -> list[str]:
    """The entries that are worth a look: what nothing else beats, and the anchors; all where there are no scores.

    Args:
        profile: profile of a model.
    """
    front = profile.front()
    rows: list[AnyProfiled] = [row for row in profile.routes if row.route.is_anchor or not front]
    rows += [row for row in front if not any(row is each for each in rows)]
    return list(dict.fromkeys(str(row.route) for row in sorted(rows, key=_macs)))


def _macs(row: AnyProfiled) -> float:
    return row.costs.get("mean_macs", row.costs.get("macs", 0.0))


@torch.inference_mode()
def read_picture(model: StitchedModelForImageClassification, path: str) -> torch.Tensor:
    """A picture as the model's input (1, 3, H, W).

    Args:
        model: model that runs it.
        path: file of the picture.

    Raises:
        PictureError: the picture is broken or too large.
    """
    data = model.prepare_data([path], name="picture", labels=False)
    return next(iter(batches(data, 1, "picture", progress=False)))["pixel_values"].to(model.device)


@torch.inference_mode()
def run_entry(model: StitchedModelForImageClassification, pixel_values: torch.Tensor, entry: str) -> Answer:
    """Run a route or cascade on a picture twice, and time the second run.

    Args:
        model: model that has it.
        pixel_values: picture that `read_picture` returned.
        entry: route or cascade as text.

    Raises:
        ValueError: there is no such route or cascade.
    """
    row = model.profiled[entry] if model.profiled is not None else None
    cascade = row is not None and isinstance(row.route, Cascade)
    named: dict[str, Any] = {"cascade" if cascade else "route": entry}
    model(pixel_values, **named)  # warms up: a server's thread may be new, and its weights not read yet
    began = time.perf_counter()
    output = model(pixel_values, **named)
    milliseconds = (time.perf_counter() - began) * 1e3
    scores = output.logits[0].float().softmax(-1)
    best = scores.topk(min(TOP, len(scores)))
    names = model.config.id2label
    answered = row.route.routes[int(output.answered_by[0])] if cascade and row is not None else entry
    found = {str(names[i]): score for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
    return Answer(found, milliseconds, str(answered))
