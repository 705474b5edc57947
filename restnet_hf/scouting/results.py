"""ScoutResult: pairs of classifiers in the order of what they are predicted to give, as a plot, a recipe and files."""

import csv
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from restnet_hf.errors import BudgetError
from restnet_hf.files import atomic_file
from restnet_hf.profiling.plots import plot_tradeoff
from restnet_hf.routes.fronts import front_rows
from restnet_hf.routes.profile import (
    MEANS,
    AnyProfiled,
    Budget,
    BudgetLike,
    Profile,
    ProfiledCascade,
    ProfiledRoute,
    describe_cheapest,
)
from restnet_hf.routes.route import Route
from restnet_hf.sources import local_path


RESULT, TABLE, PLOT, RECIPE = "scout.json", "pairs.csv", "tradeoff.png", "recipe.yaml"


@dataclass(frozen=True)
class ScoutedPair:
    """Two anchors, and what they are predicted to give before any training.

    Args:
        front: name of the anchor whose early blocks run.
        end: name of the anchor whose late blocks run.
        profile: costs and predicted accuracies of the anchors alone, of the stitched routes that no cheaper one beats
            significantly, and of cascades of the two anchors.
        near_best: whether its best within the budget is not significantly worse than that of the winner, at 5 %
            divided by the number of other pairs; None where that was not tested for the budget.
    """

    front: str
    end: str
    profile: Profile
    near_best: bool | None = None

    @property
    def rows(self) -> tuple[AnyProfiled, ...]:
        """The rows of the profile, those of routes with the costs that cascades have too."""
        return (*(row.with_means() for row in self.profile.routes), *self.profile.cascades)

    @property
    def gap_closed(self) -> float | None:
        """Predicted share of the gap between the two anchors that is closed; see `Profile.gap_closed`."""
        return self.profile.gap_closed()

    def front_rows(self) -> tuple[AnyProfiled, ...]:
        """The rows that no other beats in mean MACs and predicted accuracy, the cheapest first."""
        return tuple(front_rows(self.rows, "mean_macs", "accuracy"))

    def with_accuracy(self, route: Route, accuracy: float, images: int) -> "ScoutedPair":
        """The pair with another predicted accuracy of a route; the profile's metadata records on how many images.

        Args:
            route: route of the profile.
            accuracy: accuracy, from 0 to 1.
            images: number of images that it is of, which ``images_of`` in the metadata has by route.
        """
        routes = (
            replace(row, scores={**row.scores, "accuracy": accuracy}) if row.route == route else row
            for row in self.profile.routes
        )
        metadata = dict(self.profile.metadata)
        metadata["images_of"] = {**metadata.get("images_of", {}), str(route): images}
        return replace(self, profile=replace(self.profile, routes=tuple(routes), metadata=metadata))

    def alone(self, anchor: str) -> ProfiledRoute:
        """The row of one of the anchors alone: its costs, and its accuracy on the held-out images.

        Args:
            anchor: name of the anchor.
        """
        return self.profile[Route.alone(anchor)]

    def best(self, budget: BudgetLike) -> AnyProfiled | None:
        """The route or cascade with the highest predicted accuracy within a budget; None where nothing fits.

        A limit on ``macs`` holds for the most that an image can take, also in a cascade; one on ``mean_macs`` for the
        mean. Of equals the one that takes less of the budget is returned.

        Args:
            budget: limits on costs that the profile has.
        """
        limits = Budget.of(budget)
        fitting = [row for row in self.rows if limits.allows(row.costs)]
        return max(fitting, key=lambda row: (row.scores["accuracy"], -limits.usage(row.costs)), default=None)


@dataclass(frozen=True)
class Check:
    """What the winner gives on images that took no part in calibrating or ranking; thresholds stay as chosen.

    Args:
        images: number of the images.
        accuracy: accuracy of the best route or cascade within the budget, from 0 to 1.
        standard_error: standard error of the accuracy, by (successes + 2) / (images + 4) as in the interval of Agresti
            and Coull, so that it is not 0 where all are right.
        mean_macs: MACs that it takes on these images, as a mean.
        gap_closed: share of the gap between the two anchors that is closed by the entries that no other beats in
            prediction, each for the budgets that it is chosen for by prediction, see `Profile.gap_closed`; None where
            the dearer anchor is not better in at least 95 % of the draws of the bootstrap.
        gap_error: standard error of the gap closed, half the width of the middle 68 % of 200 draws of the bootstrap
            over images; None where the gap closed is.
    """

    images: int
    accuracy: float
    standard_error: float
    mean_macs: float
    gap_closed: float | None = None
    gap_error: float | None = None


@dataclass(frozen=True)
class Review:
    """What a whole run found about its winner, kept while pairs are ranked for another budget.

    Args:
        budget: budget of the run.
        near: front and end of each pair that is not significantly worse than the winner.
        check: score of the winner on images that chose nothing; None where they were too few.
    """

    budget: Budget
    near: tuple[tuple[str, str], ...]
    check: Check | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> "Review | None":
        """Read what `to_dict` of a result wrote.

        Args:
            data: the review as JSON values; None for none.
        """
        if data is None:
            return None
        check = None if data["check"] is None else Check(**data["check"])
        return cls(Budget.of(data["budget"]), tuple((front, end) for front, end in data["near"]), check)


@dataclass(frozen=True)
class ScoutResult:
    """Pairs of classifiers, the best for a budget first; `scout` returns it.

    Args:
        pairs: pairs of anchors, in the order of the accuracy of their best route or cascade within the budget.
        budget: limits on costs that decide the order.
        sources: Hub id or folder of each anchor, by name.
        left_out: reason of each candidate that cannot be an anchor here, by Hub id or folder.
        job: arguments of the comparison.
        seconds: seconds that each part took.
        passes: number of anchors that ran over the images, each of them once.
        images: number of images, half of which stitches were fitted on and half held out.
        new_head: whether the anchors got new heads, for the classes of the data set.
        eval_images: number of images of the split that was held out on which anchors ran, those that check the winner
            among them; 0 in results of earlier versions.
        check: score of the winner on images that chose nothing. The predicted one is of the luckiest of many, and so
            too high. None where the images were too few, or the pairs were ranked for another budget later.
        review: check and near equals of the budget of the run, where the pairs were ranked for another one later.
    """

    pairs: tuple[ScoutedPair, ...]
    budget: Budget
    sources: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    passes: int = 0
    images: int = 0
    new_head: bool = False
    eval_images: int = 0
    check: Check | None = None
    review: Review | None = None

    @property
    def near(self) -> tuple[ScoutedPair, ...]:
        """The winner and the pairs that are not significantly worse; with 95 % probability the best is among them."""
        return tuple(pair for pair in self.pairs if pair.near_best)

    @property
    def winner(self) -> ScoutedPair:
        """The best pair."""
        return self.pairs[0]

    def ranked(self, budget: BudgetLike) -> "ScoutResult":
        """The same pairs in the order of what they give within a budget.

        The pair whose best route or cascade within the budget has the highest predicted accuracy is first; of equals
        the one that takes less of the budget for it, then the one that closes more of the gap between its anchors. For
        another budget than that of the run nothing is checked, and no near equals are marked: `scout` does that. What
        it found is kept, and is there again for the budget of the run.

        Args:
            budget: limits on costs that the profiles have.

        Raises:
            BudgetError: nothing of any pair fits the budget, or its costs are not known.
        """
        limits = Budget.of(budget)
        rows = [row for pair in self.pairs for row in pair.rows]
        limits.check_costs(rows[0].costs)

        def order(pair: ScoutedPair) -> tuple[Any, ...]:
            best, gap = pair.best(limits), pair.gap_closed
            last = -math.inf if gap is None else gap
            if best is None:
                return (1, 0.0, 0.0, -last, pair.front, pair.end)
            return (0, -best.scores["accuracy"], limits.usage(best.costs), -last, pair.front, pair.end)

        pairs = tuple(sorted(self.pairs, key=order))
        if pairs[0].best(limits) is None:
            raise BudgetError(f"nothing of any pair fits {limits}; {describe_cheapest(rows, limits)}")
        if limits == self.budget:
            return replace(self, pairs=pairs)
        review = self.review
        if self.near:
            review = Review(self.budget, tuple((pair.front, pair.end) for pair in self.near), self.check)
        if review is None or review.budget != limits:
            pairs, check = tuple(replace(pair, near_best=None) for pair in pairs), None
        else:
            pairs = tuple(replace(pair, near_best=(pair.front, pair.end) in review.near) for pair in pairs)
            check, review = review.check, None
        return replace(self, pairs=pairs, budget=limits, check=check, review=review)

    def recipe(self) -> dict[str, Any]:
        """The recipe that stitches the best pair, as `load_recipe` reads it."""
        best, job = self.winner, self.job
        recipe: dict[str, Any] = {"front": self.sources[best.front], "end": self.sources[best.end]}
        recipe |= {"dataset": job["dataset"], "train_split": job["split"], "eval_split": job["eval_split"]}
        recipe |= {} if job["image_size"] is None else {"image_size": job["image_size"]}
        recipe |= {"new_head": self.new_head, "method": "fitted_accuracy", "max_routes": 4, "per_part": 2}
        return {
            key: _whole_path(value) if key in ("front", "end", "dataset") else value for key, value in recipe.items()
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plot the anchors, the best of each pair within the budget, and all that nothing beats of the best pair.

        Args:
            path: file of the picture; None for none.

        Returns:
            Figure of matplotlib.
        """
        anchors = (row for pair in self.pairs for row in pair.profile.routes if row.route.is_anchor)
        chosen = (pair.best(self.budget) for pair in self.pairs)
        rows: list[AnyProfiled | None] = [*anchors, *chosen, *self.winner.profile.front()]
        once = {row.route: row for row in rows if row is not None}.values()
        routes = tuple(row for row in once if isinstance(row, ProfiledRoute))
        cascades = tuple(row for row in once if isinstance(row, ProfiledCascade))
        best = self.winner.best(self.budget)
        return plot_tradeoff(Profile(routes, {}, cascades), path, active=None if best is None else best.route)

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Headings, and a row for each pair: anchors, best within the budget, gap closed, near the winner."""
        columns = ["front", "end", "front_macs", "end_macs", "front_accuracy", "end_accuracy", "best", "accuracy"]
        columns += ["macs", "mean_macs", "gap_closed", "near_best"]
        rows = []
        for pair in self.pairs:
            names, best = (pair.front, pair.end), pair.best(self.budget)
            row: list[Any] = [*names, *(pair.alone(name).costs["macs"] for name in names)]
            row += [pair.alone(name).scores["accuracy"] for name in names]
            row += ["", "", "", ""] if best is None else [
                str(best.route), best.scores["accuracy"], best.costs["macs"], best.costs["mean_macs"]
            ]  # fmt: skip
            rows.append([*row, *("" if each is None else each for each in (pair.gap_closed, pair.near_best))])
        return columns, rows

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``scout.json``, ``pairs.csv``, ``tradeoff.png`` and ``recipe.yaml`` to a folder.

        Args:
            folder: folder for the files.

        Raises:
            OSError: a file cannot be written.
        """
        place, (columns, rows) = Path(folder), self.table()
        place.mkdir(parents=True, exist_ok=True)
        with atomic_file(place / TABLE) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        self.plot(place / PLOT)
        best = self.winner.best(self.budget)
        assert best is not None
        head = (
            f"# The best of {len(self.pairs)} pairs within {self.budget}: {best.scores['accuracy']:.1%} predicted\n"
            f"# for {best.route}\n"
        )
        if (check := self.check) is not None:
            error = f"standard error {check.standard_error:.1%}"
            head += f"# {check.accuracy:.1%} ({error}) on {check.images} images that chose nothing,\n"
            head += f"# where it takes {check.mean_macs:.4g} mean MACs\n"
        head += f"# restnet-hf train {RECIPE} --out DIR\n"
        with atomic_file(place / RECIPE) as temporary:
            temporary.write_text(head + yaml.safe_dump(self.recipe(), sort_keys=False))
        with atomic_file(place / RESULT) as temporary:  # last: a run with this file has finished
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        pairs = [
            {"front": p.front, "end": p.end, "near_best": p.near_best, "profile": p.profile.to_dict()}
            for p in self.pairs
        ]
        return {
            "pairs": pairs, "budget": self.budget.limits, "sources": dict(self.sources),
            "left_out": dict(self.left_out), "job": dict(self.job), "seconds": dict(self.seconds),
            "passes": self.passes, "images": self.images, "new_head": self.new_head, "eval_images": self.eval_images,
            "check": None if self.check is None else asdict(self.check),
            "review": None if self.review is None else {**asdict(self.review), "budget": self.review.budget.limits},
        }  # fmt: skip

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ScoutResult":
        """Read what `save` wrote.

        Args:
            folder: folder of the run.

        Raises:
            OSError: there is no result.
            ValueError: the file is not a result.
        """
        file = Path(folder) / RESULT
        try:
            data = json.loads(file.read_text())
            pairs = (
                ScoutedPair(p["front"], p["end"], Profile.from_dict(p["profile"]), p.get("near_best"))
                for p in data["pairs"]
            )
            rest = {
                key: data[key] for key in ("sources", "left_out", "job", "seconds", "passes", "images", "new_head")
            }
            rest["eval_images"] = data.get("eval_images", 0)  # as "check" not in files of earlier versions
            rest["check"] = None if data.get("check") is None else Check(**data["check"])
            rest["review"] = Review.from_dict(data.get("review"))
            return cls(tuple(pairs), Budget.of(data["budget"]), **rest)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is not the result of a run: {error!r}; choose another folder") from error

    def __repr__(self) -> str:
        best = self.winner.best(self.budget)
        what = "" if best is None else f", {best.route} {best.scores['accuracy']:.1%}"
        return f"ScoutResult({len(self.pairs)} pairs, {self.budget}: {self.winner.front} + {self.winner.end}{what})"


def _whole_path(source: str) -> str:
    """The absolute path of a local folder; a Hub id unchanged."""
    path = local_path(source)
    return str(path.resolve()) if path.exists() else source


def plain_costs(budget: Budget) -> list[str]:
    """The costs of single routes that a budget limits, in order: ``macs`` for ``mean_macs``.

    Args:
        budget: limits on the costs of an entry.
    """
    return sorted({"macs", *(MEANS.get(cost, cost) for cost in budget.limits)})
