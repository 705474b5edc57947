"""Successive halving: the candidates of each part of the range of costs train a little, and the worse half stops.

Jamieson and Talwalkar, Non-stochastic best arm identification (arXiv 1502.07943).
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from restnet_hf.anchors.anchor import Anchor, largest_anchor
from restnet_hf.progress import progress_bar
from restnet_hf.routes.route import Route
from restnet_hf.selection.race_images import BATCH, RaceImages
from restnet_hf.selection.race_state import RaceState
from restnet_hf.selection.ranking import RankedRoute
from restnet_hf.steps import Step, run_steps
from restnet_hf.stitches.branches import stitch_at
from restnet_hf.stitches.layers import Stitch, StitchConfig
from restnet_hf.stitches.least_squares import AUTO, fit_stitches


RACE = "race"  # the method of `select_stitches`
LOSSES = ("match", "task")
TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # by which logits are divided


@dataclass(frozen=True)
class RaceConfig:
    """Options of the method ``race`` of `select_stitches`.

    The best few routes of each part by ``fitted_accuracy`` are fitted and trained together for a few steps, and the
    worse half stops until ``per_part`` are left. Winners keep the stitches that they trained; `ranking` begins with
    all that started, whose scores are accuracies on held-out images. It needs one or two thousand images.

    Args:
        candidates: number of routes of each part of the range of MACs that start, the best by ``fitted_accuracy``.
        train_images: number of images that stitches train on.
        held_out_images: number of other images that decide; of fewer images than both numbers a third is held out.
        epochs: passes over the training images in the first round; each later round, with half the routes, has twice
            as many.
        learning_rate: learning rate of AdamW on the stitches.
        loss: ``match`` for the final features of the end itself, which needs no labels, or ``task`` for the labels
            (without any, the predictions of the largest anchor).
        max_minutes: minutes after which the race ends, the front runners winning; None for no limit.
        max_gb: gigabytes (2**30 bytes) of activations to keep in memory; more are computed again at each step.
        folder: folder for the state after each round, from which an interrupted race goes on; None for no state.

    Raises:
        ValueError: an option is out of range.
    """

    candidates: int = 4
    train_images: int = 1024
    held_out_images: int = 1024
    epochs: int = 1
    learning_rate: float = 1e-3
    loss: str = "match"
    max_minutes: float | None = None
    max_gb: float = 1.0
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is not one of {LOSSES}")
        for name in ("candidates", "train_images", "held_out_images", "epochs"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        for name in ("learning_rate", "max_minutes", "max_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number above 0")

    @property
    def images(self) -> int:
        """Number of images that the race uses."""
        return self.train_images + self.held_out_images

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "RaceConfig":
        """The config of options; raises ValueError for one that is unknown."""
        known = [each.name for each in fields(cls)]
        unknown = sorted(options.keys() - {*known})
        if unknown:
            raise ValueError(f"method {RACE!r} has no options {unknown}; it takes {known}")
        return cls(**options)


@dataclass
class Racer:
    """One route of a race.

    Args:
        row: route with its costs.
        part: number of the part of the range of costs.
        stitch: stitch of the route, which trains.
        rest: steps of the route after its first segment.
        accuracy: accuracy on the held-out images, when it was last measured.
        score: what decides, the higher the better; see `score_logits`.
        epochs: number of epochs that it has trained.
    """

    row: RankedRoute
    part: int
    stitch: Stitch
    rest: Sequence[Step]
    accuracy: float = 0.0
    score: float = 0.0
    epochs: int = 0
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)

    @property
    def route(self) -> Route:
        """The route."""
        return self.row.route

    @property
    def place(self) -> tuple[str, int]:
        """The front anchor and the cut at which the route leaves it."""
        point = self.route.stitch_points[0]
        return point.source, point.source_cut

    @property
    def end(self) -> tuple[str, int]:
        """The end anchor and the cut at which the route enters it."""
        point = self.route.stitch_points[0]
        return point.target, point.target_cut


@dataclass
class Race:
    """Candidates that train together and are halved; see `race_candidates`.

    Args:
        racers: candidates that are left.
        train: images to train on.
        held_out: images that decide which routes stay.
        config: options of the race.
        deadline: time of `time.monotonic` at which training ends.
    """

    racers: list[Racer]
    train: RaceImages
    held_out: RaceImages
    config: RaceConfig
    deadline: float = math.inf
    finished: list[Racer] = field(default_factory=list)

    def run_round(self, number: int, until: float) -> None:
        """Train all that are left.

        Args:
            number: number of the round, from 0.
            until: time at which the round ends, however far it is.
        """
        epochs = self.config.epochs * 2**number
        for racer in self.racers:  # a round that is resumed is the same
            racer.optimizer = torch.optim.AdamW(racer.stitch.parameters(), self.config.learning_rate)
        steps = epochs * math.ceil(len(self.train.images) / BATCH)
        with progress_bar(desc=f"race of {len(self.racers)}", total=steps * len(self.racers)) as bar:
            for epoch in range(epochs):
                rng = torch.Generator().manual_seed(1000 * number + epoch)
                order = torch.randperm(len(self.train.images), generator=rng)
                for activations, indices in self.train.batches({racer.place for racer in self.racers}, order):
                    if time.monotonic() > until:
                        return
                    for racer in self.racers:
                        self._step(racer, activations[racer.place], indices)
                        bar.update()
                for racer in self.racers:
                    racer.epochs += 1

    @torch.enable_grad()
    def _step(self, racer: Racer, x: Tensor, indices: Tensor) -> None:
        """One step of one route."""
        assert racer.optimizer is not None
        racer.optimizer.zero_grad()
        if self.config.loss == "task":
            loss = cross_entropy(run_steps(x, racer.rest).float(), self.train.right[indices])
        else:
            name, cut = racer.end
            first, second = racer.rest[:2]  # the stitch and the end
            assert isinstance(second.module, Anchor)
            final = second.module.capture(first(x), {None}, cut, features=True)[None]
            loss = mse_loss(final.float(), self.train.goals[name][indices]) / self.train.scales[name]
        if loss.isfinite():
            loss.backward()
            racer.optimizer.step()

    @torch.no_grad()
    def measure(self) -> None:
        """Measure all that are left on the held-out images."""
        logits: list[list[Tensor]] = [[] for _ in self.racers]
        order = torch.arange(len(self.held_out.images))
        for activations, _ in self.held_out.batches({racer.place for racer in self.racers}, order):
            for racer, parts in zip(self.racers, logits, strict=True):
                parts.append(run_steps(activations[racer.place], racer.rest).float())
        for racer, parts in zip(self.racers, logits, strict=True):
            racer.accuracy, racer.score = score_logits(torch.cat(parts), self.held_out.right)

    def halve(self, least: int) -> None:
        """Stop the worse half of each part.

        Args:
            least: number of routes of a part that are left at the end.
        """
        kept: list[Racer] = []
        for part in sorted({racer.part for racer in self.racers}):
            mine = [racer for racer in self.racers if racer.part == part]
            mine.sort(key=lambda racer: racer.score, reverse=True)
            kept += mine[: max(least, len(mine) // 2)]
        self.finished += [racer for racer in self.racers if racer not in kept]
        self.racers = kept

    def rounds(self, least: int) -> int:
        """Number of rounds until no more than ``least`` routes of a part are left."""
        most = max(sum(racer.part == part for racer in self.racers) for part in {r.part for r in self.racers})
        count = 0
        while most > least:
            most, count = max(least, most // 2), count + 1
        return count


def score_logits(logits: Tensor, right: Tensor) -> tuple[float, float]:
    """Accuracy, and the mean log-likelihood of the right class at the temperature at which it is highest.

    The likelihood is less noisy than the accuracy of a few hundred images and, unlike that at temperature 1, does not
    favour routes for being sure: those that enter the end at its last cuts are less so, whatever their accuracy.

    Args:
        logits: logits (N, classes) of a route.
        right: class (N,) that is right for each image.
    """
    likelihood = max(-cross_entropy(logits / temperature, right).item() for temperature in TEMPERATURES)
    return (logits.argmax(-1) == right).double().mean().item(), likelihood


def race_candidates(
    model: Any,
    parts: Sequence[Sequence[RankedRoute]],
    batches: Iterable[Mapping[str, Tensor]],
    config: RaceConfig,
    stitch_config: StitchConfig | None = None,
    winners: int = 1,
) -> tuple[list[Racer], list[Racer]]:
    """Race the candidates of each part of the range of costs until a few of each are left.

    All are fitted by least squares first. A round trains those that are left, measures them on held-out images, and
    stops the worse half of each part.

    Args:
        model: model whose anchors the routes join.
        parts: candidates of each part, with their costs.
        batches: batches of images in the model's preprocessing, with labels or without.
        config: options of the race.
        stitch_config: options of the stitches; by default those of `StitchConfig`.
        winners: number of routes of a part that are left at the end.

    Returns:
        The routes that are left, and those that were stopped, the last one first.

    Raises:
        ValueError: there are fewer than four images.
    """
    began = time.monotonic()
    racers = _make_racers(model, parts, stitch_config or StitchConfig())
    train, held_out = _read_images(model, racers, batches, config)
    race = Race(racers, train, held_out, config)
    saved = RaceState(config.folder, model, race, winners)
    number = saved.load()
    if number is None:
        number = 0
        _fit(model, racers, train.images, config.max_gb * 2**30)
    fitted = time.monotonic()
    race.measure()
    last = time.monotonic()
    measuring = last - fitted
    while left := race.rounds(winners):
        limit = math.inf if config.max_minutes is None else began + 60 * config.max_minutes - last
        race.run_round(number, last + (limit / left - measuring))
        trained = time.monotonic()
        race.measure()
        race.halve(winners)
        number, last = number + 1, time.monotonic()
        measuring = last - trained
        saved.write(number)
    return race.racers, race.finished[::-1]


def _make_racers(model: Any, parts: Sequence[Sequence[RankedRoute]], config: StitchConfig) -> list[Racer]:
    """The candidates, with stitches of their own."""
    racers = []
    for part, rows in enumerate(parts):
        for row in rows:
            (point,) = row.route.stitch_points
            stitch = stitch_at(point, model.anchors, config)
            steps = model.steps(row.route, {point.name: stitch})
            first = next(index for index, step in enumerate(steps) if step.segment is not None)
            racers.append(Racer(row, part, stitch, steps[first + 1 :]))
    return racers


def _fit(model: Any, racers: Sequence[Racer], images: Tensor, most: float) -> None:
    """Fit stitches by least squares, some at a time, so that their moments take no more than ``most`` bytes."""
    groups, size = list[list[Racer]](), math.inf
    for racer in racers:
        channels = model.anchors[racer.place[0]].layout(racer.place[1]).channels
        needed = 3 * 8 * channels**2  # of images to fit on, held out, and of both
        if size + needed > most:
            groups, size = [*groups, []], 0.0
        groups[-1].append(racer)
        size += needed
    for group in groups:
        stitches = {racer.route.stitch_points[0]: racer.stitch for racer in group}
        names = {name for racer in group for name in (racer.place[0], racer.end[0])}
        parts = ({name: model.images_for(name, part) for name in names} for part in images.split(BATCH))
        fit_stitches(stitches, model.anchors, parts, AUTO)


def _read_images(
    model: Any, racers: Sequence[Racer], batches: Iterable[Mapping[str, Tensor]], config: RaceConfig
) -> tuple[RaceImages, RaceImages]:
    """Images to train on, and held-out ones."""
    wanted, count, parts = config.images, 0, list[Mapping[str, Tensor]]()
    for batch in batches:
        parts.append({key: values[: wanted - count] for key, values in batch.items()})
        count += len(parts[-1]["pixel_values"])
        if count >= wanted:
            break
    if count < 4:
        raise ValueError(f"a race needs images to train on and others to decide, and {count} came; give some hundreds")
    images = torch.cat([part["pixel_values"] for part in parts]).to(model.device, model.dtype)
    if all("labels" in part for part in parts):
        right = torch.cat([part["labels"] for part in parts]).to(model.device)
    else:
        right = _predicted(model, {name for racer in racers for name in (racer.place[0], racer.end[0])}, images)
    held = config.held_out_images if count == wanted else max(1, count // 3)
    places, ends = {racer.place for racer in racers}, {racer.end[0] for racer in racers}
    most = config.max_gb * 2**30 / 2
    train = RaceImages(model, images[held:], right[held:], places, ends if config.loss == "match" else set(), most)
    return train, RaceImages(model, images[:held], right[:held], places, set(), most)


@torch.no_grad()
def _predicted(model: Any, names: Iterable[str], images: Tensor) -> Tensor:
    """The classes that the largest anchor predicts."""
    steps = model.steps(Route.alone(largest_anchor(model.anchors[name] for name in sorted(names)).name))
    return torch.cat([run_steps(part, steps).argmax(-1) for part in images.split(BATCH)])


def select_by_race(
    model: Any,
    parts: Sequence[Sequence[RankedRoute]],
    ranking: Sequence[RankedRoute],
    batches: Iterable[Mapping[str, Tensor]],
    config: RaceConfig,
    stitch_config: StitchConfig | None,
    winners: int,
) -> tuple[list[RankedRoute], list[RankedRoute]]:
    """Race candidates, and add the winners to a model with the stitches that they have trained.

    With several processes all run the race, and the first one decides. See `race_candidates` for the arguments;
    ``ranking`` has all routes, the candidates among them.

    Returns:
        The winners, the cheapest first; and the ranking, which begins with the candidates, whose scores are accuracies
        on the held-out images.
    """
    left, stopped = race_candidates(model, parts, batches, config, stitch_config, winners)
    chosen = gather_object([[str(racer.route) for racer in left]])
    left, stopped = ([r for r in (*left, *stopped) if (str(r.route) in chosen[0]) is wins] for wins in (True, False))
    known = {*model.stitches}
    model.add_stitches([racer.route for racer in left], stitch_config)
    new = {racer.route.stitch_points[0].name: racer.stitch for racer in left}
    for name in new.keys() - known:
        model.stitches[name].load_state_dict(new[name].state_dict())
        model.unfitted.discard(name)
    winning, losing = ([replace(r.row, score=r.accuracy) for r in racers] for racers in (left, stopped))
    chosen_rows = sorted(winning, key=lambda row: row.costs["macs"])
    raced = {row.route for row in (*winning, *losing)}
    return chosen_rows, [*chosen_rows, *losing, *(row for row in ranking if row.route not in raced)]
