"""Scoring many routes at once gives what scoring each alone gives."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE

from restnet_hf.profiling.accuracy import mean_probabilities, predict_routes, score_routes
from restnet_hf.profiling.macs import MacsTable, count_macs
from restnet_hf.profiling.metric import Accuracy
from restnet_hf.routes.route import Route
from restnet_hf.selection.racing import _sign_test, race_routes
from restnet_hf.steps import Step, run_steps, split_at_shared_cuts, walk_tree


@pytest.fixture
def walks(pair):
    texts = ["resnet[:2] + vit[1:]", "resnet[:3] + vit[2:]", "resnet[:3] + vit[1:]", "resnet[:4] + vit[2:]"]
    texts.append("resnet[:2] + vit[1:2] + resnet[4:]")
    routes = [pair.add_stitch(text) for text in texts]
    return [(route, pair.steps(route)) for route in (*pair.all_routes[:2], *routes)]


def test_tree_equals_one_by_one(walks, images):
    with torch.no_grad():
        together = dict(walk_tree(images, split_at_shared_cuts(walks)))
        assert together.keys() == {route for route, _ in walks}
        for route, steps in walks:
            assert torch.equal(together[route], run_steps(images, steps))


def test_no_block_runs_twice(walks, images):
    """The work of the tree is the front once, up to the deepest cut, and each stitch and end."""
    table = MacsTable()
    stitched = [walk for walk in walks if len(walk[0].segments) == 2]
    ends = sum(table.macs(steps[1:]) for _, steps in stitched)
    front = max(table.macs(steps[:1]) for _, steps in stitched)
    done = count_macs(lambda x: list(walk_tree(x, split_at_shared_cuts(stitched))), images)
    assert done == len(images) * (front + ends)


def test_predictions_and_accuracy(walks, images):
    labels = torch.arange(len(images)) % CLASSES
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images.split(4), labels.split(4), strict=True)]
    predictions, seen = predict_routes(walks, iter(data), torch.device("cpu"))
    assert torch.equal(seen, labels)
    scores, count = score_routes(walks, data, torch.device("cpu"))
    assert count == len(images)
    for route, steps in walks:
        expected = run_steps(images, steps).argmax(-1)
        assert torch.equal(predictions[route], expected)
        assert scores[route] == pytest.approx((expected == labels).double().mean().item())


def test_mean_probabilities(walks, images):
    labels = torch.arange(len(images)) % CLASSES
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images.split(3), labels.split(3), strict=True)]
    found = mean_probabilities(walks, data, torch.device("cpu"))
    with torch.no_grad():
        for route, steps in walks:
            logits = run_steps(images, steps).double().numpy()
            held = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            assert found[route] == pytest.approx(held[np.arange(len(images)), labels].mean(), rel=1e-5)
    assert len({*found.values()}) == len(walks) and mean_probabilities(walks, [], torch.device("cpu")) == {}


def test_labels_are_needed(walks):
    with pytest.raises(ValueError, match="accuracy needs labels"):
        score_routes(walks, [{"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}], torch.device("cpu"))


def test_metric():
    metric = Accuracy(keep_in_memory=True)
    assert metric.compute(predictions=[0, 1, 2, 1], references=[0, 1, 1, 1]) == {"accuracy": 0.75}
    metric.add_batch(predictions=[1], references=[1])
    metric.add_batch(predictions=[1, 0], references=[0, 0])
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)


class Says(torch.nn.Module):
    """A classifier of two classes whose hits are known: its 'image' holds whether each route is right."""

    def __init__(self, column):
        super().__init__()
        self.column = column

    def forward(self, x):
        right = x.flatten(1)[:, self.column]
        return torch.stack([1 - right, right], dim=1)


def race(hits, **options):
    """Routes that are right as the columns of ``hits`` (images, routes) say, the label always 1; and how many ran."""
    ran = []

    def counted(step, column):
        def run(x):
            ran.append((column, len(x)))
            return step(x)

        return run

    walks = []
    for column in range(hits.shape[1]):
        module = Says(column)
        module.forward = counted(module.forward, column)
        walks.append((Route.parse(f"a[:{column + 1}] + b[1:]"), (Step(f"says {column}", module, (1, hits.shape[1])),)))
    data = [
        {"pixel_values": x[:, :, None, None].float(), "labels": torch.ones(len(x), dtype=torch.long)}
        for x in hits.split(25)
    ]
    found = race_routes(walks, data, torch.device("cpu"), **options)
    return [route for route, _ in walks], found, ran


def test_a_race_stops_what_cannot_win():
    rng = torch.Generator().manual_seed(0)
    hits = torch.rand(500, 4, generator=rng) < torch.tensor([0.9, 0.88, 0.5, 0.2])
    (best, near, worse, worst), found, ran = race(hits)
    exact = hits.double().mean(0).tolist()
    assert found.scores == {best: pytest.approx(exact[0]), near: pytest.approx(exact[1])} and found.images == 500
    assert found.stopped.keys() == {worse, worst}
    for column, route in ((2, worse), (3, worst)):
        score, images = found.stopped[route]
        assert score == pytest.approx(hits[:images, column].double().mean().item())
        assert sum(size for which, size in ran if which == column) == images < 250
    _, found, _ = race(hits, error=0.0)
    assert list(found.scores.values()) == pytest.approx(exact) and not found.stopped
    _, found, _ = race(hits, rivals=[[near, worst], [worse]])
    assert found.scores.keys() == {near, worse}, "the best of each group goes on; what is in no group does not"
    with pytest.raises(ValueError, match=r"error=1.5"):
        race(hits, error=1.5)


def test_rivals_of_a_race_may_be_known_and_differ_by_route():
    """A route stops only where one of its own rivals is better, be it one that does not run."""
    rng = torch.Generator().manual_seed(0)
    hits = torch.rand(500, 3, generator=rng) < torch.tensor([0.9, 0.5, 0.2])
    best, worse, worst = (Route.parse(f"a[:{column}] + b[1:]") for column in (1, 2, 3))
    alone = Route.parse("a[:]")
    _, found, _ = race(hits, beaten_by={worse: [worst], worst: []})
    assert found.scores.keys() == {best, worse, worst}, "no rival of any is better"
    _, found, ran = race(hits, beaten_by={worst: [worse], worse: [worst]})
    assert found.stopped.keys() == {worst} and sum(size for column, size in ran if column == 2) < 250
    known = {alone: hits[:, 0].numpy()}
    _, found, ran = race(hits[:, 1:], known=known, beaten_by={best: [alone]})
    assert found.stopped.keys() == {best} and found.scores == {worse: pytest.approx(hits[:, 2].double().mean().item())}
    assert {column for column, _ in ran} == {0, 1}
    with pytest.raises(ValueError, match="rivals or beaten_by"):
        race(hits, rivals=[[best]], beaten_by={})


def test_a_race_hardly_ever_stops_the_best():
    """Two hundred races of ten equal routes: the one that is best in the end was stopped in at most 1 %, by chance."""
    rng = torch.Generator().manual_seed(1)
    lost = 0
    for _ in range(200):
        hits = torch.rand(200, 10, generator=rng) < 0.7
        routes, found, _ = race(hits, error=0.01)
        top = hits.sum(0).max()
        lost += not any(routes[column] in found.scores for column in range(10) if hits[:, column].sum() == top)
    assert lost <= 2


@pytest.mark.parametrize(("more", "less"), [(0, 0), (5, 5), (8, 1), (30, 12), (0, 7), (580, 420), (990, 10)])
def test_sign_test(more, less):
    assert _sign_test(more, less) == pytest.approx(chances(more + less)[more:].sum(), rel=1e-9)


@pytest.mark.parametrize(("more", "less"), [(501, 500), (560, 441), (1100, 900), (1140, 860)])
def test_sign_test_of_many(more, less):
    """By the normal law, which stops no route too early: it is never below, and above by a tenth at most."""
    exact = chances(more + less)[more:].sum()
    assert exact <= _sign_test(more, less) * (1 + 1e-6) and _sign_test(more, less) <= 1.1 * exact


def chances(coins):
    """Probabilities of each number of heads."""
    found = np.ones(1)
    for _ in range(coins):
        found = np.convolve(found, [0.5, 0.5])
    return found


def test_a_race_tells_on_which_images_routes_are_right():
    rng = torch.Generator().manual_seed(0)
    hits = torch.rand(500, 4, generator=rng) < torch.tensor([0.9, 0.88, 0.5, 0.2])
    (best, near, *_), found, _ = race(hits, keep=True)
    assert {route: each.tolist() for route, each in found.right.items()} == {
        best: hits[:, 0].tolist(), near: hits[:, 1].tolist(),
    }  # fmt: skip
    assert not race(hits)[1].right
