"""adapt: measure the device, search the routes of a model on private images, and keep the best one under a budget."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from restnet_hf.adaptation.scorer import FEW, PREDICTORS, Judge
from restnet_hf.adaptation.search import SEARCHES, Rejected, Search
from restnet_hf.data.datasets import load_images, subset, with_pixel_values
from restnet_hf.data.labels import class_names_of, label_order
from restnet_hf.errors import BudgetError
from restnet_hf.files import written_whole
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.latency import LatencyCheck, LatencyTable
from restnet_hf.profiling.timing import check_latency
from restnet_hf.routes.profile import Budget, Profile, ProfiledRoute
from restnet_hf.routes.route import Route


ALL = 256  # so many candidates are all evaluated; of more, a tenth
FINALISTS = 3


@dataclass(frozen=True)
class Adapted:
    """What `adapt` found.

    Args:
        best: the route that was chosen, with its costs; ``latency_ms`` and, where the system counts it, ``energy_j``
            are measured from end to end.
        score: what it was chosen by: ``accuracy``, or ``agreement`` with the largest anchor.
        rejected: the other candidates, with the reason.
        checks: predicted and measured latency, and joules, of those that ran from end to end.
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
    predictor: str | None = FEW,
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
        latency: what `measure_latency` found here before; measured now if it is None and the budget limits latency or
            energy.
        search: a key of `SEARCHES`; by default all are evaluated if they are few, else ``evolution`` does a tenth.
        predictor: what tells the evolution of all routes before it begins: ``few_images``, for which a quarter of the
            evaluations is spent, a key of `SELECTORS`, or None.
        max_evaluations: how many routes are evaluated at most, or as much work for the predictor.
        exact: evaluate routes on all images even where they cannot win any more.
        batch_size: for a tensor or a data set; smaller where memory runs out.
        seed: of the search.
        state: a file from which an interrupted search goes on, and into which it is written.

    Raises:
        BudgetError: no route fits, or none that was run from end to end (the message names the cheapest), or energy is
            limited and not counted.
        ValueError: there are no images, or an option is out of range.
    """
    _check_names(search, predictor)
    routes = [model.route(route) for route in (model.all_routes if candidates is None else candidates)]
    if latency is None and _is_measured(budget):
        latency = model.measure_latency(routes)
    _check_energy(budget, latency)
    known = dict(zip(routes, map(_corrected_costs(model, latency), routes), strict=True))
    judge = Judge(model, data, batch_size, exact)
    judge.fits = [route for route, costs in known.items() if budget.allows(costs)]
    job = _search(judge, known, budget, search, predictor, max_evaluations, seed)
    _go_on(job, judge, state)
    found = job.run(lambda rows: _keep(job, judge, state))
    exactly = [judge.as_measured(row) for row in found.rows]
    best, rows, checks = _confirmed(model, exactly, budget, latency, judge.score)
    where = {} if latency is None else {"latency": latency.metadata()}
    model.record_profile(rows, images=judge.images, score=judge.score, **where)
    model.set_route(best.route)
    result = replace(found, best={budget: best}, rows=tuple(rows))
    return Adapted(best, judge.score, judge.reasons(result.rejected(budget)), checks, found.finished)


def _check_names(search: str | None, predictor: str | None) -> None:
    """Raise before anything is measured."""
    searches = sorted({*SEARCHES} - {"ranked"})
    if search not in (None, *searches):
        raise ValueError(f"search={search!r} is not one of {searches}")
    if predictor not in (None, *PREDICTORS):
        raise ValueError(f"predictor={predictor!r} is not one of {PREDICTORS}, or None")


def _check_energy(budget: Budget, latency: LatencyTable | None) -> None:
    if budget.energy_j is not None and latency is not None and latency.watts is None:
        raise BudgetError(
            "energy_j is not known: no energy counter of the processor could be read (on many systems only root may "
            "read /sys/class/powercap); limit latency_ms instead"
        )


def _search(
    judge: Judge,
    known: Mapping[Route, Mapping[str, float]],
    budget: Budget,
    kind: str | None,
    predictor: str | None,
    max_evaluations: int | None,
    seed: int,
) -> Search:
    """A search of routes whose costs are known; see `adapt`."""
    routes = list(known)
    kind = kind or ("exhaustive" if len(routes) <= ALL else "evolution")
    share = 1 if kind == "exhaustive" else 10
    most = max(1, len(routes) // share) if max_evaluations is None else max_evaluations
    options: dict[str, Any] = {"batch_size": len(routes)} if kind == "exhaustive" else {}
    if kind == "evolution" and predictor and 1 < most < len(judge.fits):
        options["predictor"], taken = judge.predictor(predictor, most)
        most = max(1, most - taken)
    options |= {"max_evaluations": most, "seed": seed, "score": judge.score}
    return SEARCHES[kind](routes, known.__getitem__, judge, budget, **options)


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
    _check_names(options.get("search"), options.get("predictor"))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    state, file = folder / "search.json", folder / "latency.json"
    if not resume:
        state.unlink(missing_ok=True)
    latency = None
    if _is_measured(budget):
        latency = model.measure_latency()
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


def _is_measured(budget: Budget) -> bool:
    """Whether it limits what a device must be measured for."""
    return budget.latency_ms is not None or budget.energy_j is not None


def _corrected_costs(
    model: StitchedModelForImageClassification, latency: LatencyTable | None
) -> Callable[[Route], dict[str, float]]:
    """The costs of routes; latencies, and energies, by as much more as the table's own checks were."""
    costs, off = (
        model.route_costs(latency=latency, memory=True),
        1.0 if latency is None else _off(latency.checks.values()),
    )

    def corrected(route: Route) -> dict[str, float]:
        return _times(off, costs(route))

    return corrected


def _times(change: float, costs: Mapping[str, float]) -> dict[str, float]:
    """Costs with what was measured changed."""
    return {cost: change * value if cost in ("latency_ms", "energy_j") else value for cost, value in costs.items()}


def _off(checks: Iterable[LatencyCheck]) -> float:
    """How many times longer routes take than the sum of their pieces; 1 where none was run."""
    return statistics.median([check.measured.ms / check.predicted_ms for check in checks] or [1.0])


def _keep(job: Search, judge: Judge, state: str | os.PathLike[str] | None) -> None:
    """Write the state of a search."""
    if state is not None:
        stopped = {str(route): found for route, found in judge.stopped.items()}
        with written_whole(state) as temporary:
            temporary.write_text(json.dumps({"search": job.state_dict(), "stopped": stopped, "images": judge.images}))


def _go_on(job: Search, judge: Judge, state: str | os.PathLike[str] | None) -> None:
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
        fitting = [row for row in scored if budget.allows(row.costs)]
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
        joules = {} if known.joules is None else {"energy_j": known.joules / latency.batch_size}
        return replace(row, costs={**row.costs, "latency_ms": known.measured.ms / latency.batch_size, **joules})
    return replace(row, costs=_times(_off(checks.values()) / _off(latency.checks.values()), row.costs))
