"""ProfilingMixin: measure the routes of a model, and run them as cascades."""

from __future__ import annotations  # matplotlib takes long to import, and is imported only to draw

import datetime
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.utils import logging

from restnet_hf.cascading import Stage, plan_stages, run_cascade
from restnet_hf.data.datasets import MULTI_LABEL
from restnet_hf.data.prepare import Pictures
from restnet_hf.data.shares import OwnBatch
from restnet_hf.distributed import Own
from restnet_hf.profiling.cascade_rows import add_latency, fits_adapter
from restnet_hf.profiling.cascades import (
    LEAST_IMAGES,
    MOST_ROUTES,
    Observations,
    StageCosts,
    as_cascade,
    certify_cascade,
    check_images,
    check_promise,
    observe_routes,
)
from restnet_hf.profiling.costs import describe_measurement
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.profiling.plots import plot_tradeoff
from restnet_hf.profiling.route_plots import plot_route
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.confidences import CONFIDENCES
from restnet_hf.routes.profile import Profile, ProfiledCascade, ProfiledRoute, parse_entry
from restnet_hf.routes.route import Route, Routes
from restnet_hf.routes.tables import short_number
from restnet_hf.runtime.sustained import Period, SustainedLatency, measure_sustained
from restnet_hf.steps import Step, Walk, run_steps
from restnet_hf.stitches.adding import warn_unfitted
from restnet_hf.stitches.layers import Stitch
from restnet_hf.stitches.precision import weight_dtype
from restnet_hf.stitches.tuning import Tuned


if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)
MOST_STAGED = 15  # cascades besides the latest whose stages are kept


def known_number(data: Any) -> int | None:
    """Number of images of prepared data; None where it is known only once all are read."""
    return len(data) if isinstance(data, Dataset | Pictures) else None


class ProfilingMixin:
    """Methods of a stitched model that measure its routes and run them as cascades."""

    # Attributes of the model
    config: Any
    device: torch.device
    dtype: torch.dtype
    anchors: Mapping[str, Any]
    all_routes: Any  # of routes, a property
    active_route: Route
    active_cascade: Cascade | None
    profiled: Profile | None
    stitches: MutableMapping[str, Stitch]
    heads: MutableMapping[str, nn.Linear]
    tuned: MutableMapping[str, Tuned]
    staged: dict[Cascade, tuple[list[tuple[int, torch.dtype | None]], list[Stage]]]  # see `plan_cascade`
    weight_files: Any
    route: Callable[[Route | str], Route]
    steps: Callable[[Route], Sequence[Step]]
    set_route: Callable[[Route], Route]
    prepare_data: Callable[..., Any]
    profile: Callable[..., Profile]
    weights_sha256: Callable[..., dict[str, str]]
    _checked: Callable[..., Own[OwnBatch]]
    _parse_routes: Callable[[Routes], list[Route]]

    def cascade(self, cascade: Cascade | str) -> Cascade:
        """Parse and check a cascade of this model's routes.

        Args:
            cascade: cascade or its string form, in which cuts may be given by name.

        Returns:
            The cascade.

        Raises:
            ValueError: the cascade does not parse, its routes do not fit the anchors, or the labels of an image are
                several.
        """
        self.check_one_label()
        if isinstance(cascade, str):
            return Cascade.parse(cascade, self.route)
        for route in cascade.routes:
            self.route(route)
        return cascade

    def runnable_cascade(self, cascade: Cascade | str) -> Cascade:
        """Parse and check a cascade that is to run.

        Args:
            cascade: cascade or its string form.

        Returns:
            The cascade.

        Raises:
            ValueError: as `cascade`, or it has no thresholds.
        """
        cascade = self.cascade(cascade)
        if not cascade.thresholds:
            rows = () if self.profiled is None else self.profiled.cascades
            calibrated = [str(row.route) for row in rows if row.route.routes == cascade.routes]
            hint = f"the profile has {calibrated}" if calibrated else "profile(data, cascades=True) calibrates some"
            raise ValueError(
                f"cascade '{cascade}' has no thresholds; {hint}, or "
                "set_cascade(..., images=images, agreement=0.99) finds some on images without labels"
            )
        return cascade

    def set_cascade(
        self,
        cascade: Cascade | str | None = None,
        *,
        images: Any = None,
        agreement: float | None = None,
        certainty: float = 0.95,
        reference: Route | str | None = None,
        confidence: str = "probability",
        batch_size: int = 64,
    ) -> Cascade | Route:
        """Make a cascade active, so that ``forward`` runs it; or find one that answers as a reference route does.

        With ``agreement`` the cheapest cascade is set whose answers are those of the reference on at least that share
        of images like the given ones, with the probability ``certainty`` over draws of such images (Learn then Test,
        arXiv 2110.01052). It needs no labels, and accuracy is lower by at most the share on which they disagree. The
        adapter's config and card record the promise.

        Args:
            cascade: cascade with thresholds to set; or routes to find thresholds for, all of the model's by default.
            images: images without labels, in any form that `prepare_data` takes.
            agreement: share of images, below 1, to answer as the reference does.
            certainty: probability, below 1, with which the agreement holds.
            reference: route to agree with; by default the best of the profile, else the last of the cascade, else the
                anchor with the most MACs.
            confidence: key of `CONFIDENCES`, where thresholds are found.
            batch_size: images in a batch, if the images are a tensor or a data set.

        Returns:
            The cascade; or a route, where one alone is the cheapest that agrees as often.

        Raises:
            ValueError: the cascade has no thresholds or does not fit the model, or there are too few images for the
                agreement; the error gives the number needed.
        """
        self.check_one_label()
        if agreement is None:
            if cascade is None or images is not None or reference is not None:
                raise ValueError("give a cascade with thresholds, or images and agreement, such as 0.99")
            found: Cascade | Route = self.runnable_cascade(cascade)
        elif images is None:
            raise ValueError(f"agreement={agreement} is measured on images: give images=, no labels are needed")
        else:
            found = self._certified(cascade, images, agreement, certainty, reference, confidence, batch_size)
        if isinstance(found, Route):
            return self.set_route(found)
        steps = [step for route in found.routes for step in self.steps(route)]
        if self.weight_files is not None:
            self.weight_files.load(self.anchors, steps)
        self.make_active(found.routes[-1], found)
        return found

    def only_route(self) -> Route:
        """The active route; raises ValueError where a cascade is active, whose routes are several."""
        if self.active_cascade is not None:
            raise ValueError(f"cascade '{self.active_cascade}' is active, and one route is needed: give it")
        return self.active_route

    def make_active(self, route: Route, cascade: Cascade | None) -> None:
        """Set what ``forward`` runs, here and in the config.

        Args:
            route: active route; the last one of a cascade.
            cascade: active cascade, or None.
        """
        self.active_route, self.active_cascade = route, cascade
        self.config.active_route, self.config.active_cascade = str(route), None if cascade is None else str(cascade)

    def check_one_label(self) -> None:
        """Raise ValueError where no class is the only one of an image, so that cascades have nothing to be sure of."""
        if self.config.problem_type == MULTI_LABEL or self.config.num_labels < 2:
            several = f"{MULTI_LABEL} has several" if self.config.num_labels > 1 else "there is one class"
            raise ValueError(f"cascades choose by how sure one class of many is, and {several}: set a route")

    def _certified(
        self,
        cascade: Cascade | str | None,
        images: Any,
        agreement: float,
        certainty: float,
        reference: Route | str | None,
        confidence: str,
        batch_size: int,
    ) -> Cascade | Route:
        """The cheapest cascade, or route, that agrees with a reference; see `set_cascade`."""
        check_promise(agreement, certainty)
        if confidence not in CONFIDENCES:
            raise ValueError(f"confidence={confidence!r} is not one of {sorted(CONFIDENCES)}")
        own = [route for route in self.all_routes if fits_adapter(route, self.active_route.adapter)]
        routes = own if cascade is None else list(self.cascade(cascade).routes)
        target = self.route(reference) if reference is not None else self._reference(routes, cascade is not None)
        walks = self._walks(routes if target in routes else [*routes, target])
        if len(walks) < 2:
            raise ValueError("a cascade has at least two routes, and the model has one; add another")
        data = self.prepare_data(images, name="images", labels=False)
        check_promise(agreement, certainty, known_number(data))
        # temperatures would be fitted on images that test the promise
        observed = observe_routes(
            walks, self._checked(data, batch_size), self.device, confidence, target, scaled=False
        )
        costs, number = StageCosts.of(walks, MacsTable().macs), observed.routes.index(target)
        chain, measured = certify_cascade(observed, costs, number, agreement, certainty)
        found = as_cascade(observed, chain)
        if found == target:
            logger.warning(f"nothing cheaper agrees with '{target}' on {agreement:.2%} of images: it runs alone")
        else:
            logger.info(f"'{found}' agrees with '{target}' on {measured:.2%} of {len(observed) // 2} images")
            promise = {"stage": "promise", "cascade": str(found), "reference": str(target), "images": len(observed)}
            promise |= {"agreement": agreement, "certainty": certainty, "date": datetime.date.today().isoformat()}
            self.config.training = [*self.config.training, promise]  # entries behind it changed weights since
        return found

    def _reference(self, routes: Sequence[Route], ordered: bool) -> Route:
        """The route to agree with: the best of the profile, the last of a cascade, or the anchor with most MACs."""
        scored = [] if self.profiled is None else [row for row in self.profiled if row.route in routes and row.scores]
        if ordered:
            return routes[-1]
        if scored and self.profiled is not None:
            score = self.profiled.find_score()
            return max((row for row in scored if score in row.scores), key=lambda row: row.scores[str(score)]).route
        table = MacsTable()
        return max(map(Route.alone, self.anchors), key=lambda route: table.macs(self.steps(route)))

    def _walks(self, routes: Sequence[Route]) -> list[Walk]:
        """Routes with their steps, the cheapest first; after a check that they are few enough and fitted."""
        if len(routes) > MOST_ROUTES:
            raise ValueError(
                f"cascades are searched among at most {MOST_ROUTES} routes, not {len(routes)}; give those to combine"
            )
        warn_unfitted(self, routes)
        table = MacsTable()
        return sorted(((route, self.steps(route)) for route in routes), key=lambda walk: table.macs(walk[1]))

    def _observe(self, walks: Sequence[Walk], data: Any, batch_size: int) -> Observations:
        """What routes answer on labelled images, after a check that these are enough for cascades."""
        self.check_one_label()
        check_images(LEAST_IMAGES if (number := known_number(data)) is None else number)
        return observe_routes(walks, self._checked(data, batch_size), self.device)

    def run_cascade(self, x: Tensor, cascade: Cascade) -> tuple[Tensor, Tensor]:
        """Run a cascade on images (N, 3, H, W) in the model's preprocessing and dtype.

        Args:
            x: images (N, 3, H, W).
            cascade: cascade of this model's routes, with thresholds.

        Returns:
            Logits (N, classes), and for each image the number of the route that answered (N,), from 0.

        Raises:
            ValueError: the model lacks a stitch or head of a route.
        """
        self.check_one_label()
        return run_cascade(x, self.plan_cascade(cascade), cascade)

    def plan_cascade(self, cascade: Cascade) -> list[Stage]:
        """What each route of a cascade runs for the images that reach it; kept until parts of the model are replaced.

        Args:
            cascade: cascade of this model's routes.

        Raises:
            ValueError: the model lacks a stitch or head of a route.
        """
        parts: list[nn.Module] = [
            self.stitches[point.name] for point in cascade.stitch_points if point.name in self.stitches
        ]
        parts += [*self.tuned.values(), *self.heads.values(), *self.anchors.values()]
        state = [(id(part), weight_dtype(part)) for part in parts]  # the stages hold the parts, so no id comes again
        known = self.staged.get(cascade)
        if known is None or known[0] != state:
            known = state, plan_stages([(route, self.steps(route)) for route in cascade.routes])
            self.staged = {**dict(list(self.staged.items())[-MOST_STAGED:]), cascade: known}
        return known[1]

    def forget_profile(self) -> None:
        """Drop what was measured with other weights: the profile, and the active cascade, whose last route stays."""
        self.profiled = None
        if self.active_cascade is not None:
            logger.warning(
                f"cascade '{self.active_cascade}' was calibrated with other weights: '{self.active_route}' is active "
                "now; call profile(data, cascades=True) again"
            )
            self.make_active(self.active_route, None)

    def plot_route(
        self, route: Route | Cascade | str | None = None, path: str | os.PathLike[str] | None = None
    ) -> Figure:
        """Plot a route as a path through its networks; the routes of a cascade one below the other.

        Args:
            route: route or cascade; by default what is active.
            path: file of the picture; None for none.

        Returns:
            Figure of matplotlib.

        Raises:
            ValueError: there is no such route.
        """
        active = self.active_cascade or self.active_route
        chosen = parse_entry(route) if isinstance(route, str) else route or active
        routes = chosen.routes if isinstance(chosen, Cascade) else (chosen,)
        rows = () if self.profiled is None else self.profiled.cascades
        shares = next((row.shares for row in rows if row.route == chosen and row.shares), (None,) * len(routes))
        table, walks = MacsTable(), []
        for each, share in zip(map(self.route, routes), shares, strict=True):
            steps = self.steps(each)
            reached = "" if share is None else f", {share:.0%} of the images"
            walks.append((f"{each}: {short_number(table.macs(steps))} MACs{reached}", steps))
        return plot_route(walks, path, table)

    def plot_tradeoff(self, path: str | os.PathLike[str] | None = None, *, cost: str | None = None) -> Figure:
        """Plot the accuracy of all profiled routes and cascades against a cost.

        Args:
            path: file of the picture; None for none.
            cost: name of the cost; by default MACs, those of cascades as means over images.

        Returns:
            Figure of matplotlib.

        Raises:
            ValueError: the model was not profiled with labelled images, or not for the cost.
        """
        if self.profiled is None:
            raise ValueError("there is nothing to plot; call profile(eval_set) with labelled images first")
        return plot_tradeoff(self.profiled, path, cost=cost, active=self.active_cascade or self.active_route)

    @torch.inference_mode()
    def measure_sustained(
        self,
        route: Route | str | None = None,
        minutes: float = 10.0,
        *,
        batch_size: int = 1,
        report: Callable[[Period], object] | None = None,
    ) -> SustainedLatency:
        """Run a route for minutes, to see whether this device slows down as it gets warm.

        ``replace(table, facts={**table.facts, "sustained": result.to_dict()}).sustained`` is a `LatencyTable` of the
        warm device, which `profile` takes, and then budgets and the controller follow.

        Args:
            route: route to run; the active one by default.
            minutes: minutes to run for; Ctrl-C ends it before.
            batch_size: number of images in a run.
            report: function that is called every few seconds with a `Period`.

        Raises:
            ValueError: there is no such route, or ``minutes`` is out of range.
        """
        steps = self.steps(self.route(self.active_route if route is None else route))
        image = torch.randn(batch_size, *steps[0].shape[1:], generator=torch.Generator().manual_seed(0))
        x = image.to(self.device, self.dtype)

        def run() -> None:
            run_steps(x, steps)
            if x.device.type != "cpu":
                torch.accelerator.synchronize(x.device)

        return measure_sustained(run, str(self.active_route if route is None else route), minutes, report=report)

    def record_profile(
        self,
        rows: Iterable[ProfiledRoute],
        latency: LatencyTable | None = None,
        metadata: Mapping[str, Any] | None = None,
        cascades: Iterable[ProfiledCascade] = (),
    ) -> Profile:
        """Make rows the model's profile, with device, weights and versions in its metadata.

        Args:
            rows: routes with costs and scores.
            cascades: cascades of these routes, with costs and scores.
            latency: table that latencies in the costs are from, whose device and runtime are recorded.
            metadata: further metadata of the profile.
        """
        measured = describe_measurement(str(self.device), latency, self.profiled)
        known = {**(metadata or {}), **measured, "weights": self.weights_sha256()}
        self.profiled = Profile(tuple(rows), known, tuple(cascades))
        return self.profiled

    def record_latency(self, latency: LatencyTable) -> Profile:
        """Put the latencies of this device into the model's profile, for budgets in milliseconds; the scores stay.

        Args:
            latency: result of `measure_latency`, or its ``sustained`` table.

        Raises:
            ValueError: the model has no profile, or a piece of a route was not measured.
        """
        if self.profiled is None:
            raise ValueError("the model has no profile to add latencies to; call profile(data, latency=table)")
        self.profiled = add_latency(self.profiled, self.steps, latency)
        return self.profiled

    def record_runtime(self, exported: Profile) -> Profile:
        """Add the profile of exported routes to the model's own.

        Args:
            exported: profile of the folder with exported routes.
        """
        self.profiled = (self.profile() if self.profiled is None else self.profiled).with_runtime(exported)
        return self.profiled
