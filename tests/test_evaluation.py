"""Scoring many routes at once gives what scoring each alone gives."""

import pytest
import torch
from conftest import CLASSES, SIZE

from restnet_hf.costs import MacsTable, count_macs
from restnet_hf.evaluation import Accuracy, predict_routes, score_routes
from restnet_hf.steps import run_steps, split_at_shared_cuts, walk_tree


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


def test_labels_are_needed(walks):
    with pytest.raises(ValueError, match="accuracy needs labels"):
        score_routes(walks, [{"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}], torch.device("cpu"))


def test_metric():
    metric = Accuracy(keep_in_memory=True)
    assert metric.compute(predictions=[0, 1, 2, 1], references=[0, 1, 1, 1]) == {"accuracy": 0.75}
    metric.add_batch(predictions=[1], references=[1])
    metric.add_batch(predictions=[1, 0], references=[0, 0])
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)
