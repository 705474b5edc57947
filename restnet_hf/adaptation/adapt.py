"""adapt: measure the device, search the routes of a model on private images, and keep the best one under a budget."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from restnet_hf.adaptation.calibration import as_profile, calibrate, limit_routes, routes_of
from restnet_hf.adaptation.scorer import FEW_IMAGES, PREDICTORS, Scorer
from restnet_hf.adaptation.search import SEARCHES, Rejected, Search
from restnet_hf.data.datasets import load_images, subset
from restnet_hf.errors import BudgetError
from restnet_hf.files import atomic_file
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.profiling.cascades import check_images
from restnet_hf.profiling.latency import LatencyCheck, LatencyTable
from restnet_hf.profiling.mixin import known_number
from restnet_hf.profiling.timing import check_latency
from restnet_hf.routes.profile import AnyProfiled, Budget, BudgetLike, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import Route, Routes, each_route


EXHAUSTIVE = 256  # largest number of candidates that are all evaluated; of more, a tenth is
FINALISTS = 3  # routes or cascades whose routes are run from end to end at a time
MEASURED = {"latency_ms", "mean_latency_ms", "latency_p99_ms", "energy_j"}  # costs that depend on the device's speed


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` returns.

    Args:
        best: the chosen route or cascade, with its costs; ``latency_ms`` and, where the system counts energy,
            ``energy_j`` of a route are measured from end to end, and those of a cascade corrected by its routes'.
        score: score that it was chosen by: ``accuracy``, or ``agreement`` with the largest anchor.
        rejected: the other candidates, with the reasons.
        checks: predicted and measured latency, and joules, of the routes that ran from end to end.
        finished: whether the search ended by itself; False after an interrupt.
    """

    best: AnyProfiled
    score: str
    rejected: list[Rejected]
    checks: Mapping[Route, LatencyCheck]
    finished: bool


def adapt(
    model: StitchedModelForImageClassification,
    data: Any,
    budget: BudgetLike,
    *,
    candidates: Routes | None = None,
    latency: LatencyTable | None = None,
    search: str | None = None,
    predictor: str | None = FEW_IMAGES,
    max_evaluations: int | None = None,
    exact: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    cascades: bool = False,
    on_error: str = "raise",
) -> AdaptResult:
    """Find the best route of a model within a budget on this device, make it active and store the device's profile.

    Only the images are read, and nothing leaves the device. KeyboardInterrupt ends the search with the best route so
    far. After AdaptiveNet (arXiv 2303.07129, section 5).

    Args:
        model: model with stitches, on this device.
        data: images of this device, with labels or without, in any form that ``model.prepare_data`` takes. Without
            labels routes are scored by how often they agree with the largest anchor.
        budget: limits on the costs of the route: a `Budget`, or a dict such as ``{"latency_ms": 20}``.
        candidates: one route or several to choose from; by default all routes and the anchors alone.
        latency: latency table of this device; by default measured where the budget limits latency or energy.
        search: a key of `SEARCHES`; by default all of few routes are evaluated, and of many a tenth by ``evolution``.
        predictor: predictions of all scores for the evolution: ``few_images``, which takes a quarter of the
            evaluations, a key of `SELECTORS`, or None.
        max_evaluations: largest number of evaluations, including the work of the predictor.
        exact: whether routes are evaluated on all images even where they cannot win any more.
        batch_size: number of images in a batch, for a tensor or a data set; it is reduced where memory runs out.
        seed: seed of the search.
        state: file to which the state of the search is written, and from which an interrupted search resumes.
        cascades: whether to calibrate cascades too, on at least 100 images; one of them may be the best where the
            budget limits a mean, such as ``mean_latency_ms``, and other limits hold for the most an image can take.
        on_error: ``raise``, or ``skip`` to leave out broken pictures; see ``model.prepare_data``.

    Raises:
        BudgetError: no route fits (the message names the cheapest), or energy is limited and not counted.
        ValueError: there are no images, too few for cascades, or an option is out of range.
    """
    budget = Budget.of(budget)
    alone = limit_routes(budget)
    _check_names(search, predictor)
    routes = _candidates(model, candidates)
    data = _prepared(model, data, cascades, on_error)
    latency = _measured(model, routes, alone, latency)
    costs = dict(zip(routes, map(_corrected_costs(model, latency), routes), strict=True))
    scorer = Scorer(model, data, batch_size, exact)
    job = _make_search(scorer, costs, alone, search, predictor, max_evaluations, seed, state)
    result = job.run(lambda rows: _save_state(job, scorer, state))
    measured = _measured_rows(scorer, result.rows, budget, latency, cascades)
    best, rows, checks = _confirm_latency(model, measured, budget, latency, scorer.score)
    _make_best(model, best, rows, latency, {"images": scorer.images, "score": scorer.score})
    rejected = replace(result, rows=as_profile(rows).routes).rejected(alone, best)
    return AdaptResult(best, scorer.score, scorer.reasons(rejected), checks, result.finished)


def _prepared(model: StitchedModelForImageClassification, data: Any, cascades: bool, on_error: str) -> Any:
    """Images ready for the model; where their number is known, after a check that they are enough for cascades."""
    data = model.prepare_data(data, on_error=on_error)
    count = known_number(data)
    if cascades and count is not None:
        check_images(count)
    return data


def _measured_rows(
    scorer: Scorer, rows: Sequence[ProfiledRoute], budget: Budget, latency: LatencyTable | None, cascades: bool
) -> list[AnyProfiled]:
    """Rows without the scores of a few images, and with ``cascades`` those of cascades, whose latency is corrected."""
    exact = [scorer.as_measured(row) for row in rows]
    if not cascades:
        return [*exact]
    ratio = 1.0 if latency is None else _latency_ratio(latency.checks.values())
    found = calibrate(scorer, rows, budget, latency)
    return [*exact, *(_scale_row(row, ratio) for row in found)]


def _make_best(
    model: StitchedModelForImageClassification,
    best: AnyProfiled,
    rows: Sequence[AnyProfiled],
    latency: LatencyTable | None,
    metadata: Mapping[str, Any],
) -> None:
    """Make rows the model's profile, and the best route or cascade the active one."""
    found = as_profile(rows)
    routes = [row.with_means() for row in found.routes] if found.cascades else found.routes
    model.record_profile(routes, latency, metadata, found.cascades)
    if isinstance(best, ProfiledCascade):
        model.set_cascade(best.route)
    else:
        model.set_route(best.route)


def _measured(
    model: StitchedModelForImageClassification, routes: list[Route], budget: Budget, latency: LatencyTable | None
) -> LatencyTable | None:
    """The latency table that was given, or one that is measured if the budget needs one."""
    if latency is None and _is_measured(budget):
        latency = model.measure_latency(routes)
    _check_energy(budget, latency)
    return latency


def _candidates(model: StitchedModelForImageClassification, candidates: Routes | None) -> list[Route]:
    """The routes to choose from; ValueError, before anything is measured, where one has no stitch."""
    routes = [model.route(route) for route in each_route(model.all_routes if candidates is None else candidates)]
    for route in routes:
        model.steps(route)
    return routes


def _check_names(search: str | None, predictor: str | None) -> None:
    """Raise ValueError for names that do not exist, before anything is measured."""
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


def _make_search(
    scorer: Scorer,
    costs: Mapping[Route, Mapping[str, float]],
    budget: Budget,
    kind: str | None,
    predictor: str | None,
    max_evaluations: int | None,
    seed: int,
    state: str | os.PathLike[str] | None,
) -> Search:
    """A search of routes of known costs, with the options of `adapt`, where it was if it goes on."""
    routes = list(costs)
    scorer.fits = [route for route in routes if budget.allows(costs[route])]
    kind = kind or ("exhaustive" if len(routes) <= EXHAUSTIVE else "evolution")
    share = 1 if kind == "exhaustive" else 10
    most = max(1, len(routes) // share) if max_evaluations is None else max_evaluations
    options: dict[str, Any] = {"batch_size": len(routes)} if kind == "exhaustive" else {}
    if kind == "evolution" and predictor and 1 < most < len(scorer.fits):
        options["predictor"], taken = scorer.make_predictor(predictor, most)
        most = max(1, most - taken)
    options |= {"max_evaluations": most, "seed": seed, "score": scorer.score}
    job = SEARCHES[kind](routes, costs.__getitem__, scorer, budget, **options)
    _load_state(job, scorer, state)
    return job


def adapt_to(
    model: StitchedModelForImageClassification,
    data: Any,
    budget: BudgetLike,
    out: str | os.PathLike[str],
    resume: bool = False,
    **options: Any,
) -> AdaptResult:
    """`adapt` a model, and write the adapter with this device's profile and latency table to a folder.

    Args:
        model: model with stitches, on this device.
        data: images of this device, with labels or without, in any form that ``model.prepare_data`` takes.
        budget: limits on the costs of the route.
        out: folder for the adapter, ``latency.json`` and the state of the search.
        resume: whether to resume a search that was stopped.
        **options: other options of `adapt`.
    """
    budget = Budget.of(budget)
    _check_names(options.get("search"), options.get("predictor"))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    state, file = folder / "search.json", folder / "latency.json"
    if not resume:
        state.unlink(missing_ok=True)
    latency = None
    if _is_measured(limit_routes(budget)):
        latency = model.measure_latency()
        latency.save(file)
    result = adapt(model, data, budget, latency=latency, state=state, **options)
    model.save_pretrained(folder)
    if result.finished:
        state.unlink(missing_ok=True)
    return result


def device_images(model: StitchedModelForImageClassification, source: str, split: str, images: int | None) -> Dataset:
    """Images of a device, with their labels in the model's order if they have any.

    Args:
        model: model with an image processor.
        source: images: a Hub id or a local folder.
        split: split of the data set.
        images: number of images, chosen at random; None for all.

    Raises:
        ValueError: the classes of the images are not the model's, or the images cannot be read.
    """
    return model.prepare_data(subset(load_images(source, split), images))


def _is_measured(budget: Budget) -> bool:
    """Whether a budget limits costs that are measured on the device."""
    return budget.latency_ms is not None or budget.energy_j is not None


def _corrected_costs(
    model: StitchedModelForImageClassification, latency: LatencyTable | None
) -> Callable[[Route], dict[str, float]]:
    """A function that returns the costs of a route, with latency and energy corrected by the checks of the table."""
    costs = model.route_costs(latency=latency, memory=True)
    ratio = 1.0 if latency is None else _latency_ratio(latency.checks.values())

    def corrected(route: Route) -> dict[str, float]:
        return _scale_measured(costs(route), ratio)

    return corrected


def _scale_measured(costs: Mapping[str, float], ratio: float) -> dict[str, float]:
    """Costs with latency and energy multiplied by a ratio."""
    return {cost: ratio * value if cost in MEASURED else value for cost, value in costs.items()}


def _latency_ratio(checks: Iterable[LatencyCheck]) -> float:
    """Median ratio of measured to predicted latency; 1 where no route was run from end to end."""
    return statistics.median([check.measured.ms / check.predicted_ms for check in checks] or [1.0])


def _save_state(job: Search, scorer: Scorer, state: str | os.PathLike[str] | None) -> None:
    """Write the state of a search."""
    if state is not None:
        stopped = {str(route): scored for route, scored in scorer.stopped.items()}
        with atomic_file(state) as temporary:
            temporary.write_text(json.dumps({"search": job.state_dict(), "stopped": stopped, "images": scorer.images}))


def _load_state(job: Search, scorer: Scorer, state: str | os.PathLike[str] | None) -> None:
    """Load the state of an earlier search, if there is one."""
    if state is None or not Path(state).exists():
        return
    try:
        saved = json.loads(Path(state).read_text())
        job.load_state_dict(saved["search"])
        scorer.images = int(saved["images"])
        scorer.stopped = {Route.parse(name): (score, images) for name, (score, images) in saved["stopped"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(state)}: {error}; remove it to begin anew") from error


def _confirm_latency(
    model: StitchedModelForImageClassification,
    rows: Sequence[AnyProfiled],
    budget: Budget,
    latency: LatencyTable | None,
    score: str,
) -> tuple[AnyProfiled, list[AnyProfiled], dict[Route, LatencyCheck]]:
    """The best row whose latency was measured from end to end and is within the budget, and all rows corrected.

    Measured latencies replace the predicted ones, and the median of their ratios corrects the other predictions, which
    are off where the device is busy or where the sums of pieces are. Of a cascade all routes are measured.
    """
    checks: dict[Route, LatencyCheck] = {}
    while True:
        corrected = [_correct_row(row, checks, latency) for row in rows]
        scored = as_profile([row for row in corrected if score in row.scores])
        best = scored.best(budget, score)
        if latency is None or checks.keys() >= {*routes_of(best)}:
            return best, corrected, checks
        fitting = [row for row in scored.rows_for(budget) if budget.allows(row.costs)]
        ahead = sorted(fitting, key=lambda row: -row.scores[score])[:FINALISTS]
        routes = dict.fromkeys(route for row in (best, *ahead) for route in routes_of(row))
        checks |= check_latency(latency, [(route, model.steps(route)) for route in routes])


def _correct_row(row: AnyProfiled, checks: Mapping[Route, LatencyCheck], latency: LatencyTable | None) -> AnyProfiled:
    """A row with the latency that was measured, or the predicted one corrected by those that were."""
    if latency is None or not checks:
        return row
    own = [checks[route] for route in routes_of(row) if route in checks]
    if own and isinstance(row, ProfiledRoute):
        joules = {} if own[0].joules is None else {"energy_j": own[0].joules / latency.batch_size}
        return replace(row, costs={**row.costs, "latency_ms": own[0].measured.ms / latency.batch_size, **joules})
    return _scale_row(row, _latency_ratio(own or checks.values()) / _latency_ratio(latency.checks.values()))


def _scale_row(row: AnyProfiled, ratio: float) -> AnyProfiled:
    """A row with latency and energy multiplied by a ratio, those of a cascade's stages too."""
    costs = _scale_measured(row.costs, ratio)
    if isinstance(row, ProfiledRoute):
        return replace(row, costs=costs)
    stages = {
        cost: tuple(ratio * value for value in values) if cost in MEASURED else values
        for cost, values in row.stage_costs.items()
    }
    return replace(row, costs=costs, stage_costs=stages)
