"""What an export may lose: the bound of a paired difference against simulation, and limits that hold or refuse."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE
from versions import needs_export

from restnet_hf import ExportedModel, export_routes
from restnet_hf.export.verification import (
    MIN_AGREEMENT,
    Acceptance,
    Comparison,
    DisagreementError,
    choose_way,
    drop_bound,
)


ROUTE = "resnet[:3] + vit[2:]"


def noise(count, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("images", "lost", "won"), [(200, 0.03, 0.02), (500, 0.05, 0.05), (2000, 0.02, 0.01)])
def test_the_bound_holds_as_often_as_it_claims(images, lost, won):
    """The loss of the population is above the bound in about 2.5 % of 20,000 samples at most."""
    counts = np.random.default_rng(0).multinomial(images, [lost, won, 1 - lost - won], 20_000)
    bounds = {pair: drop_bound(*pair, images) for pair in {*map(tuple, counts[:, :2])}}
    broken = np.mean([bounds[a, b] < 100 * (lost - won) for a, b, _ in counts])
    assert broken < 1.25 * 0.025


def test_the_bound_by_hand():
    """Lost 30, won 20 of 998 images: a difference of 10 / 1000 with the variance (51 - 0.1) / 1000 ** 2."""
    assert drop_bound(30, 20, 998) == pytest.approx(100 * (0.01 + 1.959964 * np.sqrt(51 - 0.1) / 1000), abs=1e-6)
    assert drop_bound(30, 20, 998, 0.05) == pytest.approx(100 * (0.01 + 1.644854 * np.sqrt(51 - 0.1) / 1000), abs=1e-6)
    assert drop_bound(0, 0, 10) > 0 and drop_bound(3, 0, 3) == 100


def outcome(agreement, lost=0, won=0):
    return Comparison({"agreement": agreement}, 0.0, 4000, 4000, lost, won)


@pytest.mark.parametrize(
    ("limit", "losses", "tried", "chosen"),
    [
        ({"min_agreement": 0.9}, [500, 450, 300, 100], [0, 1, 2], 2),
        ({"min_agreement": 0.9}, [100, 50, 30, 10], [0], 0),
        ({"min_agreement": 0.99}, [500, 450, 300, 100], [0, 1, 2, 3], None),
        ({"max_accuracy_drop": 2}, [10, 900, 900, 900], [0], 0),
        ({"max_accuracy_drop": 2}, [500, 450, 30, 10], [0, 3, 2, 1], 2),
        ({"max_accuracy_drop": 2}, [500, 20, 30, 10], [0, 3, 2, 1], 1),
        ({"max_accuracy_drop": 2}, [500, 20, 30, 400], [0, 3], None),  # a hit behind a miss would be one by chance
    ],
)
def test_the_order_of_ways(limit, losses, tried, chosen):
    seen = []

    def compare(way):
        seen.append(way)
        return outcome(1 - losses[way] / 4000, losses[way])

    found, result = choose_way(iter(range(4)), compare, Acceptance(**limit))
    assert (seen, found) == (tried, chosen)
    best = min(losses[way] for way in tried) if chosen is None else losses[chosen]
    assert result.lost == best


def test_a_search_is_seldom_wrong():
    """Twelve ways that all lose a point more than is allowed: 4,000 searches accept one in at most 5 %."""
    rng, accept = np.random.default_rng(0), Acceptance.of(None, 1.0)

    def compare(way):  # the loss is the limit itself
        return outcome(0.9, *map(int, rng.multinomial(4000, [0.03, 0.02, 0.95])[:2]))

    wrong = sum(choose_way(range(12), compare, accept)[0] is not None for _ in range(4000))
    assert wrong / 4000 < 0.06


def test_limits():
    good = Comparison({"agreement": 0.97, "accuracy": 0.9}, 0.1, 4000, 4000, 20, 24)
    assert Acceptance.of(None, None).min_agreement == MIN_AGREEMENT and not Acceptance.of(None, None).accepts(good)
    assert good.accuracy_drop == pytest.approx(-0.1)
    only = Acceptance.of(None, 0.5)
    assert only.min_agreement is None and only.accepts(good) and not Acceptance.of(0.98, 0.5).accepts(good)
    assert not Acceptance.of(None, 0.1).accepts(good)  # too few images to be sure of that
    assert "0.1 are allowed" in Acceptance.of(None, 0.1).explain(good)
    assert "more images would make the bound tighter" in Acceptance.of(None, 0.1).explain(good)
    assert not only.accepts(Comparison({"agreement": 1.0}, 0.0, 4000))  # no labels


@needs_export
@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_accuracy_decides(pair, tmp_path, precision):
    """An export whose loss is bounded is written, with what it lost; one whose bound is too high is not."""
    pair.fit_stitches(noise(40, 5))
    images = noise(316, 6)
    with torch.no_grad():
        labels = pair(images, route=ROUTE).logits.argmax(1)
    labels[::10] = (labels[::10] + 1) % CLASSES  # wrong on a tenth
    options = {"data": [(images, labels)], "calibration_images": 16, "precision": precision}
    exported = export_routes(pair, tmp_path / "out", ROUTE, max_accuracy_drop=20, **options)
    ((name, drop),) = exported.profiled.metadata["accuracy_drop"].items()
    logits = exported(images[-300:].numpy()) if precision == "int8" else exported(images.numpy())
    right = (logits.argmax(1) == labels.numpy()[-len(logits) :]).mean()
    assert name == ROUTE and drop["points"] == pytest.approx(100 * (0.9 - right), abs=0.2)
    assert drop["points"] < drop["at_most"] <= 20
    with pytest.raises(DisagreementError, match=r"with 95 % confidence, and 0.1 are allowed"):
        export_routes(pair, tmp_path / "none", ROUTE, max_accuracy_drop=0.1, **options)
    assert not (tmp_path / "none").exists() and ExportedModel(tmp_path / "out").routes == exported.routes
