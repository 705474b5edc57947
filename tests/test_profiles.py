"""Budgets choose; profiles survive JSON and refuse what is none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restnet_hf.profiles import Budget, BudgetError, Profile, ProfiledRoute
from restnet_hf.routes import Route


def row(cut, macs, accuracy=None, **costs):
    scores = {} if accuracy is None else {"accuracy": accuracy}
    return ProfiledRoute(Route.parse(f"a[:{cut}] + b[1:]"), {"macs": macs, **costs}, scores)


PROFILE = Profile((row(1, 10, 0.5), row(2, 20, 0.7), row(3, 30, 0.6), row(4, 40, 0.9)), {"device": "cpu"})


@pytest.mark.parametrize(("macs", "cut"), [(10, 1), (25, 2), (39, 2), (40, 4), (1e9, 4)])
def test_best(macs, cut):
    assert str(PROFILE.best(Budget(macs=macs)).route) == f"a[:{cut}] + b[1:]"


def test_nothing_fits_names_the_cheapest():
    with pytest.raises(BudgetError, match=r"no route fits macs<=9; the cheapest is 'a\[:1\] \+ b\[1:\]' with macs=10"):
        PROFILE.best(Budget(macs=9))


def test_unmeasured_cost():
    with pytest.raises(BudgetError, match=r"no latency_ms for its routes, only \['macs'\]"):
        PROFILE.best(Budget(latency_ms=3))


def test_without_scores_the_largest_that_fits():
    assert Profile((row(1, 10), row(2, 20))).best(Budget(macs=50)).costs["macs"] == 20


@pytest.mark.parametrize("limits", [{}, {"macs": 0}, {"params": -1}, {"latency_ms": float("nan")}, {"macs": "1"}])
def test_bad_budget(limits):
    with pytest.raises(ValueError, match="budget"):
        Budget(**limits)


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=12))
def test_pareto_is_what_no_other_beats(points):
    rows = tuple(row(i + 1, macs, accuracy) for i, (macs, accuracy) in enumerate(points))
    front = Profile(rows).pareto()

    def beaten(a):
        x = a.costs["macs"], a.scores["accuracy"]
        others = [(b.costs["macs"], b.scores["accuracy"]) for b in rows]
        return any(m <= x[0] and s >= x[1] and (m, s) != x for m, s in others)

    assert {(r.costs["macs"], r.scores["accuracy"]) for r in front} == {
        (r.costs["macs"], r.scores["accuracy"]) for r in rows if not beaten(r)
    }


def test_json_round_trip(tmp_path):
    PROFILE.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == PROFILE
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"routes": 3, "metadata": {}}', '{"routes": [{"route": "a", "costs": {}, "scores": {}}]}']
    + ['{"routes": [{"route": "a[:]", "costs": {"macs": "many"}, "scores": {}}], "metadata": {}}'],
)
def test_not_a_profile(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=r"p\.json"):
        Profile.load(tmp_path / "p.json")


def test_dict_is_json():
    assert Profile.from_dict(json.loads(json.dumps(PROFILE.to_dict()))) == PROFILE
