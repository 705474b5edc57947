"""adapt: measure the device, search the routes of a model on private images, and keep the best one under a budget."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from datasets import Dataset

from restnet_hf.comparing import class_names_of
from restnet_hf.costs import MacsTable
from restnet_hf.data import Batch, batches, load_images, subset, with_pixel_values
from restnet_hf.evaluation import Raced, race_routes
from restnet_hf.families import spread
from restnet_hf.files import written_whole
from restnet_hf.labels import label_order
from restnet_hf.latency import LatencyCheck, LatencyTable
from restnet_hf.measuring import check_latency, measure_latency
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiles import Budget, Profile, ProfiledRoute
from restnet_hf.routes import Route, Segment
from restnet_hf.search import SEARCHES, Rejected, Search
from restnet_hf.steps import run_steps


ALL = 256  # so many candidates are all evaluated; of more, a tenth
FINALISTS = 3
CHECKED = 6  # routes that run from end to end while pieces are timed
LABELS = {True: "accuracy", False: "agreement"}  # the score, by whether the images have labels


@dataclass(frozen=True)
class Adapted:
    """What `adapt` found.

    Args:
        best: the route that was chosen, with its costs; ``latency_ms`` is measured from end to end.
        score: what it was chosen by: ``accuracy``, or ``agreement`` with the largest anchor.
        rejected: the other candidates, with the reason.
        checks: predicted and measured latency of those that ran from end to end.
        finished: False where the search was interrupted.
    """

    best: ProfiledRoute
    score: str
    rejected: list[Rejected]
    checks: Mapping[Route, LatencyCheck]
    finished: bool


def adapt(
    model: StitchedModelForImageClassification,
    data: Any,
    budget: Budget,
    *,
    candidates: Iterable[Route | str] | None = None,
    latency: LatencyTable | None = None,
    search: str | None = None,
    max_evaluations: int | None = None,
    exact: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
) -> Adapted:
    """Find the best route of a model within a budget on this device, make it active and keep the device's profile.

    The images are read and nothing else is: nothing leaves the device. KeyboardInterrupt ends the search with the best
    found so far. After AdaptiveNet (arXiv 2303.07129, section 5).

    Args:
        model: with stitches.
        data: images of this device, with labels or without; see `restnet_hf.data.batches`. Without labels routes are
            scored by how often they agree with the largest anchor.
        budget: limits.
        candidates: routes to choose from; all and the anchors alone by default.
        latency: what `measure_latency` found here before; measured now if the budget limits latency and it is None.
        search: a key of `SEARCHES`; by default all are evaluated if they are few, else ``evolution`` does a tenth.
        max_evaluations: how many routes are evaluated at most.
        exact: evaluate routes on all images even where they cannot win any more.
        batch_size: for a tensor or a data set; smaller where memory runs out.
        seed: of the search.
        state: a file from which an interrupted search goes on, and into which it is written.

    Raises:
        BudgetError: no route fits, or none that was run from end to end (the message names the cheapest).
        ValueError: there are no images, or an option is out of range.
    """
    routes = [model.route(route) for route in (model.all_routes if candidates is None else candidates)]
    if latency is None and budget.latency_ms is not None:
        latency = measure(model, routes)
    costs = _corrected_costs(model, latency)
    judge = _Judge(model, data, batch_size, exact)
    kind = search or ("exhaustive" if len(routes) <= ALL else "evolution")
    if kind not in SEARCHES or kind == "ranked":
        raise ValueError(f"search={kind!r} is not one of {sorted({*SEARCHES} - {'ranked'})}")
    most = max_evaluations if max_evaluations or kind == "exhaustive" else max(1, len(routes) // 10)
    options: dict[str, Any] = {"batch_size": len(routes)} if kind == "exhaustive" else {}
    job = SEARCHES[kind](routes, costs, judge, budget, max_evaluations=most, seed=seed, score=judge.score, **options)
    judge.fits = [route for route in routes if all(job.costs[route][c] <= most for c, most in budget.limits.items())]
    _go_on(job, judge, state)
    found = job.run(lambda rows: _keep(job, judge, state))
    exactly = [judge.as_measured(row) for row in found.rows]
    best, rows, checks = _confirmed(model, exactly, budget, latency, judge.score)
    about = {"images": judge.images, "score": judge.score}
    if latency is not None:
        about["latency"] = {"device": latency.device, "runtime": latency.runtime, **latency.facts}
    model.keep_profile(rows, **about)
    model.set_route(best.route)
    result = replace(found, best={budget: best}, rows=tuple(rows))
    return Adapted(best, judge.score, judge.reasons(result.rejected(budget)), checks, found.finished)


def adapt_to(
    model: StitchedModelForImageClassification,
    data: Any,
    budget: Budget,
    out: str | os.PathLike[str],
    resume: bool = False,
    **options: Any,
) -> Adapted:
    """`adapt`, and write the adapter with this device's profile and the latency table to a folder.

    Args:
        model, data, budget, **options: of `adapt`.
        out: folder; ``latency.json`` of an earlier call on this device is used again.
        resume: go on with a search that was stopped.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    state, file = folder / "search.json", folder / "latency.json"
    if not resume:
        state.unlink(missing_ok=True)
    latency = None
    if budget.latency_ms is not None:
        latency = measure(model, model.all_routes)
        latency.save(file)
    found = adapt(model, data, budget, latency=latency, state=state, **options)
    model.save_pretrained(folder)
    if found.finished:
        state.unlink(missing_ok=True)
    return found


def device_images(model: StitchedModelForImageClassification, source: str, split: str, images: int) -> Dataset:
    """Images of a device, with their labels in the model's order if they have any.

    Raises:
        ValueError: their classes are not the model's, or they cannot be read.
    """
    rows = subset(load_images(source, split), images)
    order = None
    if "label" in rows.column_names:
        names, mine = class_names_of(rows), list(model.config.id2label.values())
        order = label_order(names, mine)
        if order is None:
            raise ValueError(f"the images have {len(names)} classes, which are not the model's {len(mine)}")
    return with_pixel_values(rows, model.image_processor, order)


def parse_budget(texts: Iterable[str]) -> Budget:
    """A budget from texts like ``latency_ms=20``; ValueError where one is not a known cost and a number."""
    limits = dict(text.partition("=")[::2] for text in texts)
    try:
        return Budget(**{cost.strip(): float(limit) for cost, limit in limits.items()})
    except (TypeError, ValueError) as error:
        known = [field.name for field in fields(Budget)]
        raise ValueError(f"budget {[*texts]} must be of the form COST=NUMBER, COST one of {known}: {error}") from error


def measure(
    model: StitchedModelForImageClassification, routes: Sequence[Route], batch_size: int = 1, seconds: float = 40.0
) -> LatencyTable:
    """What every piece of some routes takes on this device, with a few routes, and the anchors, run from end to end.

    Args:
        model: whose routes they are.
        routes: of which every piece is timed.
        batch_size, seconds: see `measure_latency`.
    """
    alone = [Route((Segment(name),)) for name in model.anchors]
    walks = [(route, model.steps(route)) for route in dict.fromkeys((*alone, *routes))]
    table = MacsTable()
    few = spread({route: table.macs(steps) for route, steps in walks}, CHECKED)
    return measure_latency(walks, batch_size, seconds=seconds, check=[walk for walk in walks if walk[0] in few])


def _corrected_costs(
    model: StitchedModelForImageClassification, latency: LatencyTable | None
) -> Callable[[Route], dict[str, float]]:
    """The costs of routes; latencies by as much longer as the table's own checks were."""
    costs, off = model.costs_here(latency), 1.0 if latency is None else _off(latency.checks.values())

    def corrected(route: Route) -> dict[str, float]:
        found = costs(route)
        return found | ({"latency_ms": off * found["latency_ms"]} if "latency_ms" in found else {})

    return corrected


def _off(checks: Iterable[LatencyCheck]) -> float:
    """How many times longer routes take than the sum of their pieces; 1 where none was run."""
    return statistics.median([check.measured.ms / check.predicted_ms for check in checks] or [1.0])


class _Judge:
    """Scores routes on the device's images, and remembers which it did not see through to the end."""

    def __init__(self, model: StitchedModelForImageClassification, data: Any, batch_size: int, exact: bool) -> None:
        self.model, self.data, self.batch_size = model, data, batch_size
        self.error = 0.0 if exact else 0.01
        self.fits: list[Route] = []
        self.images = 0
        self.stopped: dict[Route, tuple[float, int]] = {}
        first = next(iter(self._batches()))
        self.score = LABELS["labels" in first]
        self.teacher = None if "labels" in first else torch.cat(list(self._taught()))

    def _batches(self) -> Iterator[Batch]:
        for batch in batches(self.data, self.batch_size, "private images"):
            self.model.preprocessing.check(batch["pixel_values"])
            yield {**batch, "pixel_values": batch["pixel_values"].to(self.model.dtype)}

    @torch.no_grad()
    def _taught(self) -> Iterator[torch.Tensor]:
        """What the largest anchor says, batch by batch."""
        anchors = self.model.anchors
        largest = max(anchors, key=lambda name: anchors[name].num_parameters())
        steps = self.model.steps(Route((Segment(largest),)))
        for batch in self._batches():
            yield run_steps(batch["pixel_values"].to(self.model.device), steps).argmax(-1).cpu()

    def _labelled(self) -> Iterator[Batch]:
        start = 0
        for batch in self._batches():
            stop = start + len(batch["pixel_values"])
            yield batch if self.teacher is None else {**batch, "labels": self.teacher[start:stop]}
            start = stop

    def __call__(self, routes: Sequence[Route]) -> dict[Route, float]:
        walks = [(route, self.model.steps(route)) for route in routes]

        def race(batch_size: int) -> Raced:
            self.batch_size = batch_size
            return race_routes(walks, self._labelled(), self.model.device, [set(routes) & {*self.fits}], self.error)

        found = find_executable_batch_size(race, starting_batch_size=self.batch_size)()
        self.images = found.images
        self.stopped |= found.stopped
        return {**found.scores, **{route: score for route, (score, _) in found.stopped.items()}}

    def as_measured(self, row: ProfiledRoute) -> ProfiledRoute:
        """A row without a score that is of some images only."""
        return replace(row, scores={}) if row.route in self.stopped else row

    def reasons(self, rejected: Iterable[Rejected]) -> list[Rejected]:
        """The reasons, with those that were stopped early named."""
        found = []
        for each in rejected:
            if each.why == "not evaluated" and each.route in self.stopped:
                score, images = self.stopped[each.route]
                detail = f"stopped after {images} of {self.images} images with {self.score}={score:g}: it cannot win"
                each = Rejected(each.route, "worse", detail)
            found.append(each)
        return found


def _keep(job: Search, judge: _Judge, state: str | os.PathLike[str] | None) -> None:
    """Write the state of a search."""
    if state is not None:
        stopped = {str(route): found for route, found in judge.stopped.items()}
        with written_whole(state) as temporary:
            temporary.write_text(json.dumps({"search": job.state_dict(), "stopped": stopped, "images": judge.images}))


def _go_on(job: Search, judge: _Judge, state: str | os.PathLike[str] | None) -> None:
    """Take up the state of an earlier search, if there is one."""
    if state is None or not Path(state).exists():
        return
    try:
        known = json.loads(Path(state).read_text())
        job.load_state_dict(known["search"])
        judge.images = int(known["images"])
        judge.stopped = {Route.parse(name): (score, images) for name, (score, images) in known["stopped"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(state)}: {error}; remove it to begin anew") from error


def _confirmed(
    model: StitchedModelForImageClassification,
    rows: Sequence[ProfiledRoute],
    budget: Budget,
    latency: LatencyTable | None,
    score: str,
) -> tuple[ProfiledRoute, list[ProfiledRoute], dict[Route, LatencyCheck]]:
    """The best row whose latency was measured from end to end and is within the budget, and all rows corrected.

    What was measured takes the place of what was foretold, and what the two differ by in the median corrects the
    others: a device that is busy, or sums that are off.
    """
    checks: dict[Route, LatencyCheck] = {}
    while True:
        corrected = [_corrected(row, checks, latency) for row in rows]
        scored = [row for row in corrected if score in row.scores]
        best = Profile(tuple(scored)).best(budget, score)
        if latency is None or best.route in checks:
            return best, corrected, checks
        fitting = [row for row in scored if all(row.costs[c] <= most for c, most in budget.limits.items())]
        ahead = sorted(fitting, key=lambda row: -row.scores[score])[:FINALISTS]
        routes = dict.fromkeys([best.route, *(row.route for row in ahead)])
        checks |= check_latency(latency, [(route, model.steps(route)) for route in routes])


def _corrected(
    row: ProfiledRoute, checks: Mapping[Route, LatencyCheck], latency: LatencyTable | None
) -> ProfiledRoute:
    if latency is None or not checks:
        return row
    known = checks.get(row.route)
    if known is not None:
        return replace(row, costs={**row.costs, "latency_ms": known.measured.ms / latency.batch_size})
    change = _off(checks.values()) / _off(latency.checks.values())
    return replace(row, costs={**row.costs, "latency_ms": change * row.costs["latency_ms"]})
