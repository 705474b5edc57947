"""Held-out images of training: which they are, scores of routes on them, and the best state of each route."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset
from transformers.utils import logging

from restnet_hf.data.datasets import Batch, to_batch
from restnet_hf.data.pixel_values import prepared_by
from restnet_hf.data.shares import loader_like, own_of_loader
from restnet_hf.distributed import add_up, gather
from restnet_hf.routes.route import Route
from restnet_hf.training.args import RouteScores, TrainArgs
from restnet_hf.training.learner import Learner
from restnet_hf.training.loaders import Batches, FeatureRows, is_stream


logger = logging.get_logger(__name__)
HELD_OUT, AT_LEAST = 0.1, 100  # share of the images, and number of images where there are twice as many
MOST_STREAMED = 512  # images of a stream that are held out, in memory
MOST_ROUTES = 32  # routes of a component that are scored; more share its weights


class Score(NamedTuple):
    """How a route does on held-out images; the larger tuple is the better.

    Args:
        score: accuracy or agreement, from 0 to 1; 0 where only the loss is known.
        negative_loss: mean loss, times -1.
    """

    score: float
    negative_loss: float


def held_out_indices(count: int, labels: Sequence[int] | None, seed: int) -> list[int]:
    """Indices of the images that are held out: a tenth, at least 100, at most half; in order.

    With labels, each class has its share of them.

    Args:
        count: number of images that there are.
        labels: label of each image; None where they are not known.
        seed: seed of the choice.
    """
    wanted = min(max(AT_LEAST, round(HELD_OUT * count)), count // 2)
    order = np.random.default_rng(seed).permutation(count)
    if labels is not None:
        order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    places = ((np.arange(wanted) + 0.5) * count / max(wanted, 1)).astype(np.intp)
    return sorted(order[places].tolist())


def _labels_of(rows: Any) -> list[int] | None:
    """The label of each image where they can be read without the images, one class for each; else None."""
    labels: Any = None
    if isinstance(rows, Dataset):
        prepared = prepared_by(rows)
        name = prepared.label_column if prepared is not None else None
        labels = rows.with_format(None)[name][:] if name in rows.column_names else None
    elif type(rows) is TensorDataset and len(rows.tensors) > 1:
        labels = rows.tensors[1]
    if labels is None or (isinstance(labels, list) and not all(isinstance(label, int) for label in labels)):
        return None
    labels = torch.as_tensor(labels)
    return labels.tolist() if labels.dim() == 1 and not labels.is_floating_point() else None


@dataclass(frozen=True)
class Split:
    """Images to train on and images that are held out.

    Args:
        train: images to train on.
        held_out: images that are held out, without augmentation; None where there are none.
        whole: the map-style data set that both are part of; None where there is none.
        indices: in that data set, indices of the images to train on and of those held out.
    """

    train: Any
    held_out: Any = None
    whole: Any = None
    indices: tuple[list[int], list[int]] | None = None


def split_held_out(train_set: Any, args: TrainArgs) -> Split:
    """Hold out images of a training set; of a stream the first ones.

    Args:
        train_set: a map-style data set, a DataLoader, or a data set without a length.
        args: options of the training.
    """
    if is_stream(train_set):
        images = min(max(AT_LEAST, round(HELD_OUT * args.batch_size * (args.max_steps or 0))), MOST_STREAMED)
        return _split_stream(train_set, images, args.batch_size)
    rows: Any = train_set.dataset if isinstance(train_set, DataLoader) else train_set
    held = held_out_indices(len(rows), _labels_of(rows), args.seed)
    if not held:
        return Split(train_set)
    indices = sorted(set(range(len(rows))) - set(held)), held
    train, held_out = (select_rows(rows, each) for each in indices)
    if not isinstance(train_set, DataLoader):
        return Split(train, _without_augmentation(held_out), rows, indices)
    sampler = train_set.sampler
    plain = isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(rows)
    if not (plain or isinstance(sampler, SequentialSampler)) or train_set.batch_size is None:
        logger.warning(
            "train_set is a DataLoader with a sampler of its own, so no images can be held out of it, and training "
            "ends with the last state; give validation=, or the data set itself"
        )
        return Split(train_set)
    scored = loader_like(train_set, _without_augmentation(held_out), drop_last=False, generator=None)
    return Split(loader_like(train_set, train, shuffle=plain), scored)


def select_rows(rows: Any, indices: Sequence[int]) -> Any:
    """Some rows of a map-style data set, as the same kind of data set where it has one.

    Args:
        rows: map-style data set of labelled images.
        indices: indices of the rows.
    """
    if isinstance(rows, Dataset | FeatureRows):
        return rows.select(indices)
    if type(rows) is TensorDataset:
        return TensorDataset(*(tensor[torch.as_tensor(indices)] for tensor in rows.tensors))
    if isinstance(rows, Tensor):
        return rows[torch.as_tensor(indices)]
    return Subset(rows, indices)


def _without_augmentation(rows: Any) -> Any:
    prepared = prepared_by(rows) if isinstance(rows, Dataset) else None
    if prepared is None or prepared.augment is None:
        return rows
    return rows.with_transform(replace(prepared, augment=None))


class _Rest(torch.utils.data.IterableDataset):
    """A stream without its first items."""

    def __init__(self, items: Iterable[Any], skipped: int) -> None:
        self.items, self.skipped = items, skipped

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(self.items):
            if index >= self.skipped:
                yield item


def _split_stream(stream: Any, images: int, batch_size: int) -> Split:
    """Hold out about the first images of a stream, in memory."""
    loader, parts = stream if isinstance(stream, DataLoader) else DataLoader(stream, batch_size=1), list[Batch]()
    for item in loader:
        parts.append(to_batch(item, "train_set"))
        if sum(len(part["pixel_values"]) for part in parts) >= images:
            break
    else:  # a short one
        del parts[len(parts) // 2 :]
    if not parts:
        return Split(stream)
    joined = {name: torch.cat([part[name] for part in parts]).split(batch_size) for name in parts[0]}
    held_out = Batches(dict(zip(joined, values, strict=True)) for values in zip(*joined.values(), strict=True))
    if isinstance(stream, DataLoader):
        return Split(skip_first_batches(stream, len(parts)), held_out)
    rest = stream.skip(len(parts)) if isinstance(stream, IterableDataset) else _Rest(stream, len(parts))
    return Split(rest, held_out)


class HeldOut:
    """Scores routes on held-out images.

    Args:
        learner: learner of the routes.
        loader: batches of images, or of the outputs of frozen networks; the same ones at each pass.
        check: function that checks an item of the loader and returns it as a batch.
        accelerator: Accelerate's state; its processes share the batches.
    """

    def __init__(
        self, learner: Learner, loader: Iterable[Any], check: Callable[[Any], Batch], accelerator: Accelerator
    ) -> None:
        self.learner, self.loader, self.check, self.accelerator = learner, loader, check, accelerator
        self.metrics: dict[Route, str] = {}
        self.images = 0  # after the first pass

    def scores(self, routes: Sequence[Route], matching: bool) -> dict[Route, Score]:
        """Score routes in their present state.

        Args:
            routes: routes to score on the held-out images.
            matching: whether the training at hand matches features, whose loss counts where there is no other score.
        """
        sums, images, metrics = torch.zeros(len(routes), 3, dtype=torch.float64), 0, dict[Route, str]()
        with _evaluating(self.learner.model), torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(self.learner.args.seed)  # the training's own numbers stay as they are
            for item in own_of_loader(self.loader):
                batch = self.check(item)
                images += len(next(iter(batch.values())))
                metrics |= {route: self.learner.metric(route, batch.get("labels")) for route in routes}
                sums += self._sums(batch, routes, matching)
        self.images = int(add_up(torch.tensor(images)))
        for each in gather(metrics):
            self.metrics |= each
        sums = add_up(sums)
        return {route: _score(*row) for route, row in zip(routes, sums.tolist(), strict=True)}

    @torch.no_grad()
    def _sums(self, batch: Batch, routes: Sequence[Route], matching: bool) -> Tensor:
        """Number of right images, sum of losses and number of images, for each route (routes, 3)."""
        rows = []
        outputs = self.learner.evaluate(batch, routes, matching, self.accelerator.autocast)
        for _, right, losses in outputs:
            rows.append(torch.stack([right.double().sum(), losses.double().sum(), losses.new_tensor(len(losses))]))
        return torch.stack(rows).double().cpu()


def _score(right: float, loss: float, count: float) -> Score:
    """The score of a route from its sums; a loss that is not finite is the worst."""
    mean = -loss / max(count, 1)
    return Score(right / max(count, 1), mean if math.isfinite(mean) else -math.inf)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


class BestStates:
    """The best state of the weights of each route, and where it was seen.

    Routes that share weights that train have one state together: the one with the best mean score in which none of
    them scores less than at the start.

    Args:
        parts: for each route, the modules that train on it, by name.
    """

    def __init__(self, parts: Mapping[Route, Mapping[str, nn.Module]]) -> None:
        self.groups = [_Group(routes, modules) for routes, modules in _components(parts)]

    @property
    def routes(self) -> list[Route]:
        """The routes to score: all that train, or the first of those that share weights where they are many."""
        return [route for group in self.groups for route in group.scored]

    def update(self, scores: Mapping[Route, Score], step: int, epoch: float, trained: Collection[Route]) -> None:
        """Keep the present state of the routes that are better than they have been.

        Args:
            scores: scores of routes in their present state; of the others the state is as it was.
            step: number of steps done.
            epoch: number of epochs done.
            trained: routes that have trained since they were scored.
        """
        for group in self.groups:
            if all(route in scores for route in group.scored):
                group.update(scores, step, epoch, not group.members.isdisjoint(trained))

    def stalled(self, patience: int) -> set[Route]:
        """The routes that have not gained for so many scores in a row.

        Args:
            patience: number of scores in a row without a gain.
        """
        return {route for group in self.groups if group.waited >= patience for route in group.routes}

    def restore(self) -> None:
        """Give each route its best state."""
        for group in self.groups:
            group.restore()

    def results(self, metrics: Mapping[Route, str]) -> dict[Route, RouteScores]:
        """Scores of each route at the start, in the best state and at the end.

        Args:
            metrics: metric of each route's score.
        """
        return {route: group.result(route, metrics[route]) for group in self.groups for route in group.scored}

    def tensors(self) -> dict[str, Tensor]:
        """The best states, by name of the tensor."""
        return {name: tensor for group in self.groups for name, tensor in group.state.items()}

    def state_dict(self) -> list[dict[str, Any]]:
        """All but the tensors, as JSON can hold it."""
        return [group.state_dict() for group in self.groups]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` and `tensors` returned.

        Args:
            state: dict that `state_dict` returned.
            tensors: tensors that `tensors` returned, by name.
        """
        for group, values in zip(self.groups, state, strict=True):
            group.load_state_dict(values, tensors)


class _Group:
    """Routes that share weights, or one that shares none."""

    def __init__(self, routes: Sequence[Route], modules: Mapping[str, nn.Module]) -> None:
        self.routes, self.modules, self.members = list(routes), dict(modules), frozenset(routes)
        self.scored = self.routes[:: -(-len(self.routes) // MOST_ROUTES)]
        self.start: dict[Route, Score] = {}
        self.best: dict[Route, Score] = {}
        self.last: dict[Route, Score] = {}
        self.state: dict[str, Tensor] = {}
        self.step, self.epoch, self.waited = 0, 0.0, 0

    def update(self, scores: Mapping[Route, Score], step: int, epoch: float, trained: bool) -> None:
        own = {route: scores[route] for route in self.scored}
        self.start, self.last = self.start or own, own
        worse = any(_is_below(own[route], self.start[route]) for route in self.scored)
        if self.best and (worse or _mean(own) <= _mean(self.best)):
            self.waited += trained
            return
        self.best, self.step, self.epoch, self.waited = own, step, epoch, 0
        self.state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for key, module in self.modules.items():
            yield from ((f"{key}.{name}", tensor) for name, tensor in module.state_dict(keep_vars=True).items())

    @torch.no_grad()
    def restore(self) -> None:
        for name, tensor in self._tensors() if self.state else ():
            tensor.copy_(self.state[name])
        torch.clear_autocast_cache()

    def result(self, route: Route, metric: str) -> RouteScores:
        start, best, last = (_value(scores[route], metric) for scores in (self.start, self.best, self.last))
        return RouteScores(metric, start, best, last, self.step, self.epoch)

    def state_dict(self) -> dict[str, Any]:
        scores = {name: [*getattr(self, name).values()] for name in ("start", "best", "last")}
        return {**scores, "step": self.step, "epoch": self.epoch, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name in ("start", "best", "last") if state["start"] else ():
            setattr(self, name, dict(zip(self.scored, (Score(*pair) for pair in state[name]), strict=True)))
        self.step, self.epoch, self.waited = state["step"], state["epoch"], state["waited"]
        self.state = {name: tensors[name].clone() for name, _ in self._tensors()} if state["start"] else {}


def _is_below(score: Score, start: Score) -> bool:
    """Whether a route scores less than at the start; a larger loss alone is not less, unless only that is known."""
    return score < start if score.score == start.score == 0 else score.score < start.score


def _mean(scores: Mapping[Route, Score]) -> tuple[float, float]:
    columns = zip(*scores.values(), strict=True)
    mean, loss = (sum(column) / len(scores) for column in columns)
    return round(mean, 9), loss  # the order of a sum over processes must not decide


def _value(score: Score, metric: str) -> float:
    return -score.negative_loss if metric == "loss" else score.score


def _components(
    parts: Mapping[Route, Mapping[str, nn.Module]],
) -> list[tuple[list[Route], dict[str, nn.Module]]]:
    """Routes that are connected by shared modules, with all of these."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for modules in parts.values():
        for key in modules:
            parent[root(key)] = root(next(iter(modules)))
    groups: dict[str, tuple[list[Route], dict[str, nn.Module]]] = {}
    for route, modules in parts.items():
        routes, joined = groups.setdefault(root(next(iter(modules))) if modules else str(route), ([], {}))
        routes.append(route)
        joined.update(modules)
    return list(groups.values())
