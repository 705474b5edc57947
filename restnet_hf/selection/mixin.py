"""SelectionMixin: compare the anchors of a model, and choose the cuts at which to join them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.config_entry import current_entry
from restnet_hf.data.datasets import check_labels, data_fingerprint
from restnet_hf.data.shares import OwnBatch, shared_batches
from restnet_hf.distributed import Own, from_main, this_process
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.routes.blocks import Blocks
from restnet_hf.routes.families import WITHIN, family, within_budget
from restnet_hf.routes.profile import Budget, BudgetLike
from restnet_hf.routes.route import Route
from restnet_hf.selection.cache import cache_file, cache_similarity, read_similarity
from restnet_hf.selection.dropping import drop_beaten
from restnet_hf.selection.pairs import choose_pairs, draw_images
from restnet_hf.selection.ranking import RankedRoute, Similarity, anchor_points, divide_routes, rank_routes, spread
from restnet_hf.selection.samples import Pair, SelectionBatch
from restnet_hf.selection.selectors import SELECTORS, Method, compare, find_selector, method_key
from restnet_hf.steps import Step
from restnet_hf.stitches.adding import add_stitches
from restnet_hf.stitches.layers import BRANCH, Stitch, StitchConfig
from restnet_hf.stitches.precision import autocast_dtype
from restnet_hf.stitches.pruning import prunable


MAX_COMPARED = 50_000  # routes of a family whose costs are compared
DRAWN_PER_ROUTE = 20  # routes that are drawn at random for each one that is wanted


class SelectionMixin:
    """Methods of a stitched model that compare anchors and choose stitches."""

    # Attributes of the model
    config: Any
    anchors: Mapping[str, Anchor]
    stitches: MutableMapping[str, Stitch]
    dtype: torch.dtype
    device: torch.device
    images_for: Callable[[str, Tensor], Tensor]
    finish: Callable[[str], nn.Module]
    steps: Callable[[Route], Sequence[Step]]
    route_costs: Callable[..., Callable[[Route], dict[str, float]]]
    route: Callable[[Route | str], Route]
    add_stitches: Callable[..., list[Route]]
    set_route: Callable[[Route], Route]
    weights_sha256: Callable[..., dict[str, str]]
    preprocessing: Any  # a `Preprocessing`, of which the model has a property
    prepare_data: Callable[..., Any]

    similarities: list[Similarity]
    ranking: list[RankedRoute]

    def selection_batches(
        self, data: Any, batch_size: int, names: Iterable[str], max_images: int | None
    ) -> Own[SelectionBatch]:
        """This process's batches of images for the selectors of some anchors.

        Args:
            data: images, in any form that `batches` takes.
            batch_size: number of images in a batch, if the images are a tensor or a data set.
            names: names of the anchors that run.
            max_images: largest number of images; None for all.
        """
        anchors = {name: self.anchors[name] for name in self.anchors if name in names}
        finish = {name: self.finish(name) for name in anchors}

        def read(start: int, batch: Mapping[str, Tensor]) -> SelectionBatch:
            images = batch["pixel_values"].to(self.device, non_blocking=True)
            inputs = {name: self.images_for(name, images) for name in anchors}
            return SelectionBatch(start, inputs, anchors, finish, batch.get("labels"))

        own = self._checked(data, batch_size, "calibration", max_images)
        return Own(read(start, batch) for _, start, batch in own)

    def compare(
        self,
        calibration: Any,
        methods: Iterable[Method] | Mapping[Method, Mapping[str, Any]] = ("cka",),
        order: str = "given",
        config: StitchConfig | None = None,
        batch_size: int = 64,
        kept_images: int = 512,
        *,
        pairs: str = "any",
        max_images: int | None = 2048,
        on_error: str = "raise",
    ) -> dict[Any, list[Similarity]]:
        """Rate each pair of cuts of any two anchors by one or more selectors.

        All selectors and all pairs of anchors share one pass over each anchor, which costs one forward of each for
        every image: with selectors that fit something alone no more than ``kept_images`` run.

        Args:
            calibration: images, in any form that `prepare_data` takes; some selectors use labels if there are any.
            methods: keys of `SELECTORS` or classes of selectors, or a mapping from these to options.
            order: directions to rate: ``given`` for the earlier anchor in front of the later one, ``auto`` for both.
            config: options of the stitches; by default those of `StitchConfig`.
            batch_size: images in a batch, if the images are a tensor or a data set.
            kept_images: number of images that selectors which fit something keep samples of; half are for tests.
            pairs: pairs of anchors to join, where there are more than two: ``any`` two, ``adjacent`` ones in the
                order of the model, or ``ends`` for the first and the last.
            max_images: largest number of images to run, drawn at random (of a stream, the first); None for all.
            on_error: ``raise``, or ``skip`` to leave out broken pictures; see `prepare_data`.

        Returns:
            A list with a `Similarity` for each pair and direction, by method: by key for those of `SELECTORS`, else by
            class.

        Raises:
            ValueError: an option is unknown, images are too few or labels are wrong, an activation is not finite
                (named), or a selector needs heads that are not trained yet.
        """
        if max_images is not None and max_images < 1:
            raise ValueError(f"max_images={max_images} must be at least 1, or None for all")
        given = methods if isinstance(methods, Mapping) else dict[Method, Mapping[str, Any]].fromkeys(methods, {})
        options = {method_key(name): values for name, values in given.items()}
        chosen = self._pairs(order, options, config or StitchConfig(), pairs)
        labels = any(find_selector(name).labels for name in options)
        calibration = self.prepare_data(calibration, name="calibration", on_error=on_error, labels=labels)
        settings = {"batch_size": batch_size, "kept_images": kept_images, "max_images": max_images}
        files, cached = from_main(lambda: self._cached(calibration, config, settings, options, chosen))
        missing = {name: options[name] for name in options if None in cached[name]}
        drawn = draw_images(calibration, kept_images, max_images) if missing else None
        names = {name for pair in chosen for name in pair.names}
        computed: dict[Method, list[Similarity]] = {}
        if missing:
            images = partial(self.selection_batches, drawn, batch_size, names, max_images)
            computed = compare(chosen, images, missing, kept_images)
        for name, each in computed.items():
            _cache({files[name, (similarity.front, similarity.end)]: similarity for similarity in each})
        return {name: computed.get(name) or [each for each in cached[name] if each is not None] for name in options}

    def _pairs(self, order: str, methods: Iterable[Method], config: StitchConfig, pairs: str = "any") -> list[Pair]:
        """The pairs of anchors in the wanted directions; raises ValueError if a selector lacks heads."""
        names = choose_pairs([*self.anchors], pairs, order)
        used = {name for pair in names for name in pair}
        untrained = sorted(used - {*self.config.trained_heads}) if self.config.new_head else []
        if untrained and {*methods} & {"kl_probe", "fitted_accuracy"}:
            raise ValueError(f"{[*methods]}: the new heads of {untrained} are not trained yet; call train_heads")
        return [Pair(self.anchors[front], self.anchors[end], self.finish(end), config) for front, end in names]

    def _cached(
        self,
        data: Any,
        config: StitchConfig | None,
        settings: Mapping[str, Any],
        options: Mapping[Method, Mapping[str, Any]],
        pairs: Sequence[Pair],
    ) -> tuple[dict[tuple[Method, tuple[str, str]], Path | None], dict[Method, list[Similarity | None]]]:
        """Files of similarities by method and names of the pair, None without a cache; and what they hold, by method.

        One process looks for all of them, whose caches may differ.
        """
        about = self._dependencies(data, config, settings)
        files = {(name, p.names): self._file(about, name, options[name], p) for name in options for p in pairs}
        cached = {name: [read_similarity(files[name, p.names], *p.names) for p in pairs] for name in options}
        return files, cached

    def _file(
        self, dependencies: Mapping[str, Any] | None, method: Method, options: Mapping[str, Any], pair: Pair
    ) -> Path | None:
        """Path of a cached similarity; None where there is no cache."""
        kind = SELECTORS.get(method) if isinstance(method, str) else None
        ours = getattr(kind, "__module__", "").startswith(f"{__package__}.")  # others may change
        if dependencies is None or not ours:
            return None
        return cache_file({**dependencies, "pair": pair.names, "method": method, "options": dict(options)})

    @property
    def similarity(self) -> Similarity | None:
        """The values of the last selection for the first pair of anchors; `similarities` has those of all pairs."""
        return next(iter(self.similarities), None)

    def _dependencies(
        self, data: Any, config: StitchConfig | None, settings: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Everything that similarities depend on besides the selector, fit for JSON; None without a fingerprint."""
        images = data_fingerprint(data)
        if images is None:
            return None
        return {**self.identity(), "images": images, "config": asdict(config or StitchConfig()), **settings}

    def identity(self) -> dict[str, Any]:
        """Everything that the anchors' activations and logits depend on besides the images, fit for JSON."""
        entries = [current_entry(*pair) for pair in zip(self.config.anchors, self.anchors.values(), strict=True)]
        keys = ("name", "fingerprint", "preprocessing", "granularity")
        anchors = [{key: entry[key] for key in keys} for entry in entries]
        heads = {key: value for key, value in self.weights_sha256(entries).items() if key.startswith("heads.")}
        autocast = autocast_dtype(self.device)
        precision = {} if autocast is None else {"autocast": str(autocast)}
        return {"anchors": anchors, "heads": heads, "dtype": str(self.dtype), **precision}

    def family(
        self, kind: str = "nearest", pairs: str = "adjacent", directions: str = "up", **options: Any
    ) -> Iterator[Route]:
        """Generate the routes by which a published method joins these anchors, after each anchor alone.

        Stages are runs of cuts of equal layout. Anchors are in order of their MACs, the cheapest first.

        Args:
            kind: kind of the family: a key of `FAMILIES`, or of `WITHIN` for routes that skip blocks of one anchor.
            pairs: pairs of anchors to join, as in `restnet_hf.routes.families.family`.
            directions: directions in which to join them, as in `restnet_hf.routes.families.family`.
            **options: options of the kind.

        Raises:
            ValueError: an option is unknown, or the anchors' stages do not fit each other.
        """
        table = MacsTable()
        alone = {name: table.macs(self.steps(Route.alone(name))) for name in self.anchors}
        blocks = [
            Blocks.from_layouts(name, [cut.layout for cut in self.anchors[name].cuts])
            for name in sorted(self.anchors, key=alone.__getitem__)
        ]
        if kind in WITHIN and options.get("prune"):
            options = {"prunable": {name: self._prunable(name) for name in self.anchors}, **options}
        return family(blocks, kind, pairs, directions, **options)

    def _prunable(self, name: str) -> list[int]:
        """The cuts before the blocks of an anchor that can be pruned."""
        anchor = self.anchors[name]
        return [cut - 1 for cut in range(2, anchor.depth + 1) if prunable(anchor, cut)]

    def add_family(
        self,
        kind: str = "nearest",
        config: StitchConfig | None = None,
        *,
        budget: BudgetLike | None = None,
        max_routes: int | None = None,
        **options: Any,
    ) -> list[Route]:
        """Add the routes of a family, and the stitches that they need; routes that share a stitch share its memory.

        Args:
            kind: kind of the family; see `family`.
            config: options of the stitches; by default ``branch`` within an anchor, else ``linear``.
            budget: limits, a `Budget` or such as ``{"macs": 1e9}``; routes over them are left out.
            max_routes: number of routes, spread evenly over the range of MACs; all by default.
            **options: further arguments of `family`.

        Returns:
            The routes with stitches.

        Raises:
            ValueError: see `family`; or no route is left.
        """
        options_of_new = config or StitchConfig(BRANCH if kind in WITHIN else "linear")
        if options.get("prune") and options_of_new.kind != BRANCH:
            raise ValueError(f"prune makes copies of blocks, stitches of kind {BRANCH!r}, not {options_of_new.kind!r}")
        routes: Iterator[Route] = (route for route in self.family(kind, **options) if route.stitch_points)
        if budget is not None or max_routes is not None:
            costs = self.route_costs(options_of_new, budget=budget)
            if budget is not None:
                routes = within_budget(routes, costs, Budget.of(budget))
            if max_routes is not None:
                some = dict.fromkeys(
                    islice(routes, MAX_COMPARED + 1 if options.get("seed") is None else DRAWN_PER_ROUTE * max_routes)
                )
                if len(some) > MAX_COMPARED:
                    raise ValueError(
                        f"the family has more than {MAX_COMPARED} routes; with seed= skip draws some at random"
                    )
                routes = iter(spread({route: costs(route)["macs"] for route in some}, max_routes))
        added = add_stitches(self, map(self.route, routes), config, options_of_new)
        if not added:
            raise ValueError(
                f"no route of family {kind!r} with {options} is within {budget}; allow more, or other options"
            )
        return added

    def select_stitches(
        self,
        calibration: Any,
        method: Method = "cka",
        max_routes: int = 8,
        config: StitchConfig | None = None,
        batch_size: int = 64,
        *,
        order: str = "given",
        budget: BudgetLike | None = None,
        kept_images: int = 512,
        per_part: int = 1,
        pairs: str = "any",
        max_images: int | None = 2048,
        on_error: str = "raise",
        **options: Any,
    ) -> list[Route]:
        """Choose cuts at which to join any two of the anchors, from a few hundred images, and add the stitches.

        The range of MACs is divided into ``max_routes`` parts, and the best route of each is taken; routes that cost
        more than all anchors are left out if there are others. Then `similarities` has all values, `ranking` all
        routes, and the best route is active. With ``fitted_accuracy``, whose values are accuracies, the best route of
        a part is the one furthest above the line between the anchors, and those that an anchor beats come last.

        Args:
            calibration: images, in any form that `prepare_data` takes.
            method: selector, a key of `SELECTORS` or a class.
            max_routes: number of parts that the range of MACs is divided into.
            config: options of the stitches; by default those of `StitchConfig`.
            batch_size: images in a batch, if the images are a tensor or a data set.
            order: directions to consider: ``given`` joins an earlier anchor to a later one, ``auto`` both ways.
            budget: limits, a `Budget` or such as ``{"macs": 1e9}``; routes over them are left out.
            kept_images: number of images that selectors which fit something keep samples of.
            per_part: number of routes to add from each part.
            pairs: pairs of anchors to join, as in `compare`.
            max_images: largest number of images to run, as in `compare`.
            on_error: ``raise``, or ``skip`` to leave out broken pictures; see `prepare_data`.
            **options: options of the selector.

        Raises:
            ValueError: see `compare`; or no route fits the budget.
        """
        limits = None if budget is None else Budget.of(budget)  # checked before anything runs
        (similarities,) = self.compare(
            calibration, {method: options}, order, config, batch_size, kept_images,
            pairs=pairs, max_images=max_images, on_error=on_error,
        ).values()  # fmt: skip
        ranking, parts = self._rank(similarities, config, limits, max_routes, per_part)
        chosen = list(chain.from_iterable(parts))
        self.add_stitches((row.route for row in chosen), config)
        self.similarities, self.ranking = similarities, ranking
        self.set_route(max(chosen, key=lambda row: row.score).route)
        return [row.route for row in chosen]

    def _rank(
        self,
        similarities: Sequence[Similarity],
        config: StitchConfig | None,
        limits: Budget | None,
        max_routes: int,
        per_part: int,
    ) -> tuple[list[RankedRoute], list[list[RankedRoute]]]:
        """All routes, ranked, and the best of each part of the range of MACs."""
        costs = self.route_costs(config, budget=limits)
        points = anchor_points(similarities, lambda route: costs(route)["macs"])
        ranking = rank_routes(similarities, costs, limits, points)
        most = max(costs(Route.alone(name))["macs"] for name in self.anchors)
        worth = [row for row in ranking if row.costs["macs"] <= most] or ranking
        return ranking, divide_routes(worth, max_routes, "macs", per_part, points)

    def drop_dominated(self, cost: str = "macs", score: str | None = None) -> list[Route]:
        """Remove the stitched routes that another route of the profile beats; returns them.

        A route is beaten where another one, the anchors alone among them, costs as much or less and scores as high or
        higher, on the images that the model was profiled with; with few images that is partly chance. Stitches that
        other routes share stay, and so do routes that were not profiled or that a cascade of the profile, or the
        active one, runs. Where the active route is removed, the best one that costs no more becomes active.

        Args:
            cost: cost to compare: ``macs``, ``params``, ``memory_mb``, ``latency_ms`` or ``energy_j``.
            score: score to compare; by default that of `Profile.find_score`.

        Raises:
            BudgetError: the model was not profiled with labelled images, or has no such cost or score.
            ValueError: budgets have no such cost.
        """
        return drop_beaten(self, cost, score)

    def _images(self, data: Any, batch_size: int, name: str) -> Own[OwnBatch]:
        """This process's batches of images by anchor name, each anchor's in its own preprocessing."""

        def converted(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.preprocessing.check(batch["pixel_values"])
            images = batch["pixel_values"].to(self.device, self.dtype, non_blocking=True)
            return {name: self.images_for(name, images) for name in self.anchors}

        own = shared_batches(data, batch_size, name)
        return Own(each._replace(batch=converted(each.batch)) for each in own)

    def _checked(self, data: Any, batch_size: int, name: str = "data", limit: int | None = None) -> Own[OwnBatch]:
        """This process's batches of images and labels, checked to fit the model."""

        def checked(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.preprocessing.check(batch["pixel_values"])
            if "labels" in batch:
                check_labels(batch["labels"], self.config.num_labels)
            return {**batch, "pixel_values": batch["pixel_values"].to(self.dtype)}

        own = shared_batches(data, batch_size, name, limit=limit, unlabelled=False)
        return Own(each._replace(batch=checked(each.batch)) for each in own)


def _cache(similarities: Mapping[Path | None, Similarity]) -> None:
    """Write similarities into their files; those without one are not cached."""
    for file, similarity in similarities.items():
        if file is not None and this_process().is_main_process:
            cache_similarity(similarity, file)
