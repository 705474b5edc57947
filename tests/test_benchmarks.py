"""The arithmetic by which benchmarks judge; the benchmarks themselves are run by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "recipes" / "benchmarks"


@pytest.fixture
def selectors(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark", FOLDER / "selectors.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # it takes its own folder off
    spec.loader.exec_module(module)
    return module


def result(values):
    """Four routes in two halves of the range of costs; the dearer of each half is the better one by two points."""
    routes = {"a[:1] + b[1:]": [10e6, 0.70], "a[:2] + b[1:]": [19e6, 0.72], "a[:3] + b[1:]": [21e6, 0.80]}
    routes |= {"a[:4] + b[1:]": [30e6, 0.82]}
    named = {name: dict(zip(routes, each, strict=True)) for name, each in values.items()}
    anchors = {"a[:]": [40e6, 0.9], "b[:]": [5e6, 0.6]}
    return {"routes": routes, "anchors": anchors, "values": named, "seconds": dict.fromkeys(named, 1.0),
            "least_squares": dict.fromkeys(routes, 0.5)}  # fmt: skip


def test_verdicts(selectors):
    found = selectors.judge(result({"right": [1, 2, 3, 4], "wrong": [4, 3, 2, 1], "half": [1, 2, 4, 3]}), buckets=2)
    assert found["right"]["spearman"] == pytest.approx(1) and found["wrong"]["spearman"] == pytest.approx(-1)
    assert [found[name]["recovered"] for name in ("right", "wrong", "half", "oracle")] == [1.0, 0.0, 0.5, 1.0]
    assert found["random"]["recovered"] == pytest.approx(0.5, abs=0.05)
    assert found["random"]["spearman"] == pytest.approx(0, abs=0.05)
    # budgets from 5 to 40 million: 0.6 to 19, then 0.72 to 30, 0.82 to 40, where the larger anchor begins
    assert found["right"]["area"] == pytest.approx((14 * 0.6 + 11 * 0.72 + 10 * 0.82) / 35, abs=2e-3)
    assert found["oracle"]["area"] == pytest.approx(
        (5 * 0.6 + 9 * 0.70 + 2 * 0.72 + 9 * 0.80 + 10 * 0.82) / 35, abs=2e-3
    )
    assert found["oracle"]["area"] > found["right"]["area"] > found["wrong"]["area"] - 0.1


def test_half_a_point_is_as_good(selectors):
    near = result({"other": [2, 1, 4, 3]})
    near["routes"]["a[:1] + b[1:]"][1] = 0.7151
    near["routes"]["a[:3] + b[1:]"][1] = 0.8149
    assert selectors.judge(near, buckets=2)["other"]["recovered"] == 0.5
