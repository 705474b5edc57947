"""Budgets and routes in any form, wherever they are taken; options that do not exist are errors."""

import pytest
import torch
from conftest import CLASSES
from torch.utils.data import TensorDataset

from restnet_hf import Budget, BudgetError, Controller, TrainArgs, adapt, train
from restnet_hf.profiling import timing


def test_one_route_or_several(pair, images, monkeypatch):
    """Wherever routes are taken; a text is one route and not its letters."""
    monkeypatch.setattr(timing, "MAX_SPREAD", float("inf"))  # other tests run beside this one
    (route,) = pair.routes
    for one in (route, str(route)):
        assert [row.route for row in pair.profile(routes=one)] == [route]
        assert [*pair.fit_stitches(images, one)] == ["resnet_3__vit_2"]
        assert pair.add_stitches(one) == [route]
        assert pair.measure_latency(one, seconds=0.0)
        result = train(pair, TensorDataset(images, torch.arange(len(images)) % CLASSES), TrainArgs(max_steps=1), one)
        assert [*result.losses] == [str(route)]
        assert adapt(pair, images, {"macs": 1e12}, candidates=one).best.route == route
    pair.add_stitch("resnet[:1] + vit[1:]")
    pair.prune_to(str(route))
    assert pair.routes == (route,)


def test_one_idea_of_a_budget(pair, images):
    """Keywords, a dict or a Budget, wherever one is taken."""
    pair.profile([(images, torch.arange(len(images)) % CLASSES)])
    limit = {"macs": max(row.costs["macs"] for row in pair.profiled), "memory_mb": 1e6}
    expected = pair.set_budget(**limit)
    for budget in (limit, Budget(**limit)):
        assert pair.set_budget(budget) == expected
    for budget in (limit, Budget(**limit)):
        assert Controller(pair.profiled, budget).route is not None
        assert "memory_mb" in pair.route_costs(budget=budget)(expected)
        assert adapt(pair, images, budget).best.costs["macs"] <= limit["macs"]
        assert pair.select_stitches(images, "position", 1, budget=budget)
        assert pair.add_family("skip", budget=budget)
    assert "memory_mb" not in pair.route_costs(budget={"macs": 1})(expected)
    for wrong in (lambda: pair.set_budget({"mac": 1}), lambda: pair.select_stitches(images, budget={"mac": 1})):
        with pytest.raises(ValueError, match=r"limits \['mac'\], which are no costs"):
            wrong()
    with pytest.raises(TypeError, match="unexpected keyword argument 'mac'"):
        pair.set_budget(mac=1)
    with pytest.raises(TypeError, match="not both"):
        pair.set_budget({"macs": 1}, params=3)


def test_unknown_options_are_errors(pair, images):
    """They were stored as metadata, or ignored."""
    for call in (lambda: pair.profile(bacth_size=8), lambda: pair.record_profile([], batch=8)):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            call()
    for name, value in (("rotue", "vit[:]"), ("label", torch.zeros(6, dtype=torch.long))):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            pair(images, **{name: value})
    profile = pair.profile([(images, torch.arange(len(images)) % CLASSES)], metadata={"dataset": "noise"})
    assert profile.metadata["dataset"] == "noise" and profile.metadata["images"] == len(images)
    with pytest.raises(BudgetError, match=r"has the scores \['accuracy'\]; score='acc'"):
        pair.set_budget(macs=1e12, score="acc")


def test_the_default_score_is_what_was_measured(pair, images):
    """After an adaptation without labels, which measures agreement, too."""
    adapt(pair, images, {"macs": 1e12}, exact=True)
    best = max(pair.profiled, key=lambda row: (row.scores["agreement"], -row.costs["macs"]))
    assert pair.set_budget(macs=1e12) == best.route
