"""Budgets choose; profiles survive JSON and refuse what is none."""

import contextlib
import copy
import json
import sys
import traceback
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import HUGE, JSON, places, put

from restnet_hf.errors import BudgetError
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import Budget, Profile, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import Route


def row(cut, macs, accuracy=None, **costs):
    scores = {} if accuracy is None else {"accuracy": accuracy}
    return ProfiledRoute(Route.parse(f"a[:{cut}] + b[1:]"), {"macs": macs, **costs}, scores)


CASCADE = Cascade.parse("a[:2] + b[1:] >0.75@1.5 a[:4] + b[1:]")
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


RUNTIME = {
    "device": "cpu",
    "runtime": "onnx",
    "precision": "int8",
    "threads": 2,
    "routes": {"a[:]": {"latency_ms": 3}},
}


def whole():
    cascade = ProfiledCascade(CASCADE, {"macs": 60, "mean_macs": 20}, {"accuracy": 0.8}, (1.0, 0.25), 0.01)
    profile = replace(PROFILE, cascades=(cascade,))
    return {**profile.to_dict(), "metadata": {"device": "cpu", "runtimes": [copy.deepcopy(RUNTIME)]}}


@given(st.data())
def test_any_json_is_a_profile_or_a_value_error(data):
    """Anything in any place; the message is short whatever came, and what is read can be used and written again."""
    value = data.draw(JSON)
    place = data.draw(st.sampled_from([(), *places(whole())]))
    changed = put(whole(), place, value) if place else value
    try:
        profile = Profile.from_dict(changed)
    except ValueError as error:
        assert len(str(error)) < 500
        return
    json.dumps(profile.to_dict())
    for budget in (Budget(macs=1e300), Budget(latency_ms=1e-300), Budget(macs=3, energy_j=1)):
        with contextlib.suppress(BudgetError):
            profile.best(budget)


@pytest.mark.parametrize(
    "value", [HUGE, -HUGE, float("nan"), float("inf"), True, None, "1", [1]], ids=lambda value: repr(value)[:9]
)
def test_costs_are_finite_numbers(value):
    for rows, key in product(("routes", "cascades"), ("costs", "scores")):
        data = whole()
        data[rows][-1][key]["macs"] = value
        with pytest.raises(ValueError, match="not a profile.*'macs' is"):
            Profile.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": [1.0]}, "are no shares"),
        ({"shares": [1.0, 2.0]}, "are no shares"),
        ({"shares": [1.0, "x"]}, "not a number"),
        ({"standard_error": "x"}, "not a number"),
        ({"route": "a[:] > b[:]"}, "has no thresholds"),
        ({"route": "a[:]"}, "from 2 to 16 routes"),
    ],
)
def test_cascades_that_are_none(change, message):
    data = whole()
    data["cascades"][0] |= change
    with pytest.raises(ValueError, match=f"not a profile.*{message}"):
        Profile.from_dict(data)


def test_cascades_count_where_a_mean_is_limited():
    profile = Profile.from_dict(whole())
    profile = replace(profile, routes=tuple(row.with_means() for row in profile))
    assert profile.best({"mean_macs": 20}).route == CASCADE  # 0.8, where the best route has 0.7
    assert profile.best({"mean_macs": 20, "macs": 59}).route == row(2, 20).route  # no image may take 60
    assert profile.best({"macs": 60}).route == profile.best_route({"mean_macs": 60}).route == row(4, 40).route
    assert [str(each.route) for each in profile.front()] == [
        "a[:1] + b[1:]", str(CASCADE), "a[:4] + b[1:]",
    ]  # fmt: skip


@pytest.mark.parametrize("nested", [33, 900, 100_000])
def test_nested_deeply(tmp_path, nested):
    """In the file, and in what YAML or the Hub's API have read already."""
    (tmp_path / "p.json").write_text('{"routes": [], "metadata": {"x": ' + "[" * nested + "]" * nested + "}}")
    with pytest.raises(ValueError, match=r"p\.json: .*(deeper than 32 levels|recursion)"):
        Profile.load(tmp_path / "p.json")
    value: list = []
    for _ in range(nested):
        value = [value]
    for data in ({"routes": [], "metadata": {"x": value}}, {"routes": [{"route": "a[:]", "costs": {"macs": value}}]}):
        with pytest.raises(ValueError, match="not a profile"):
            Profile.from_dict(data)
    bottom = value
    while bottom:  # unwound one by one, or the interpreter recurses when it is freed
        bottom = bottom.pop()


def test_a_message_is_short(tmp_path):
    long = {**whole(), "routes": [{"route": "a" * 5_000_000, "costs": {}, "scores": {}}]}
    for data in (long, {**whole(), "routes": [{"route": "a[:]", "costs": {"macs": "x" * 5_000_000}, "scores": {}}]}):
        (tmp_path / "p.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"p\.json") as caught:
            Profile.load(tmp_path / "p.json")
        assert len("".join(traceback.format_exception(caught.value))) < 20_000


def test_a_file_that_is_too_large(tmp_path):
    """It is not read to its end, nor is a device that has none."""
    with open(tmp_path / "p.json", "wb") as file:
        file.truncate(2**34)
    for path in (tmp_path / "p.json", "/dev/zero"):
        with pytest.raises(ValueError, match="more than 16,777,216 bytes"):
            Profile.load(path)
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "none.json")


def test_thousands_of_routes_fit(tmp_path):
    many = Profile(tuple(row(cut, cut, cut / 1e5, params=cut, latency_ms=cut) for cut in range(1, 20_001)))
    many.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == many


@pytest.mark.parametrize("limit", [HUGE, Fraction(HUGE)], ids=["int", "fraction"])
def test_a_budget_is_a_float(limit):
    with pytest.raises(ValueError, match="budget macs must be at most"):
        Budget(macs=limit)
    assert PROFILE.best(Budget(macs=float("inf"))).costs["macs"] == 40


def test_a_front_needs_both_numbers():
    with pytest.raises(ValueError, match=r"'a\[:2\] \+ b\[1:\]' has no macs or no accuracy"):
        Profile((row(1, 10, 0.5), row(2, 20))).pareto()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"threads": None}, "'threads' is None"), ({"device": 3}, "must be text"), ({}, "'latency_ms' is None")],
)
def test_what_an_exported_folder_must_say(changed, message):
    about = {key: RUNTIME[key] for key in ("device", "runtime", "precision", "threads")} | changed
    exported = Profile((row(1, 10, **({"latency_ms": 3.0} if changed else {})),), about)
    with pytest.raises(ValueError, match=message):
        PROFILE.with_runtime(exported)


@pytest.mark.parametrize("value", [Budget(macs=25), {"macs": 25}])
def test_a_budget_in_any_form(value):
    assert Budget.of(value) == Budget.of(macs=25, params=None) == Budget(macs=25)
    assert PROFILE.best(value) == PROFILE.best(Budget(macs=25))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Budget.of({"mac": 1}), ValueError, r"limits \['mac'\], which are no costs; the costs are \['macs'"),
        (lambda: Budget.of(mac=1), ValueError, r"limits \['mac'\]"),
        (lambda: Budget.of(25), TypeError, "budget 25 must be a Budget, or a dict"),
        (lambda: Budget.of({"macs": 1}, params=3), TypeError, "not both"),
        (lambda: Budget.of(), ValueError, "needs at least one of"),
        (lambda: Budget.of({}), ValueError, "needs at least one of"),
    ],
)
def test_what_is_no_budget(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_scores_are_named():
    """One that is not there is an error where there are others; the default is the accuracy, or what there is."""
    with pytest.raises(
        BudgetError, match=r"the profile has the scores \['accuracy'\]; score='acc' is not one of them"
    ):
        PROFILE.best({"macs": 50}, "acc")
    unscored = Profile((row(1, 10), row(2, 20)))
    assert unscored.find_score("acc") is None and unscored.best({"macs": 50}, "acc").costs["macs"] == 20
    other = Profile(tuple(ProfiledRoute(r.route, r.costs, {"f1": 1 - r.scores["accuracy"]}) for r in PROFILE))
    assert other.find_score() == "f1" and other.best({"macs": 50}).costs["macs"] == 10
    several = Profile(tuple(ProfiledRoute(r.route, r.costs, {"f1": 1, "auc": 0.5}) for r in PROFILE))
    with pytest.raises(BudgetError, match=r"\['f1', 'auc'\]; choose one of them, score="):
        several.best({"macs": 50})
    both = Profile(tuple(ProfiledRoute(r.route, r.costs, {"agreement": 1, "accuracy": 0.5}) for r in PROFILE))
    assert both.find_score() == "accuracy"


def test_a_profile_is_a_table_of_its_rows():
    assert len(PROFILE) == 4 and [*PROFILE] == [*PROFILE.routes] and not len(Profile(())) and Profile(())
    assert PROFILE["a[:2] + b[1:]"] is PROFILE[Route.parse("a[:2] + b[1:]")] is PROFILE.routes[1]
    assert "a[:2] + b[1:]" in PROFILE and PROFILE.routes[1].route in PROFILE and "a[:]" not in PROFILE
    with pytest.raises(KeyError, match=r"no route 'a\[:\]' in the profile; its routes are \['a\[:1\]"):
        PROFILE["a[:]"]


def test_short_reprs():
    assert repr(Route.parse("night: a[:2] + b[1:]")) == "Route('night: a[:2] + b[1:]')"
    assert repr(Route.parse("a[:2] + b[1:]").segments) == "(Segment('a[:2]'), Segment('b[1:]'))"
    assert repr(Budget(macs=1e9, latency_ms=20)) == "Budget(macs=1e+09, latency_ms=20)"
    assert repr(PROFILE.routes[0]) == "ProfiledRoute('a[:1] + b[1:]', macs=10, accuracy=0.5)"
    assert repr(PROFILE) == "Profile(4 routes, costs=['macs'], scores=['accuracy'])"


def test_a_printed_profile(monkeypatch):
    """Long routes continue in the next line, so that it fits the terminal."""
    long = Route.parse("resnet_of_some_name[:1] + vit_of_another_name[4:9] + resnet_of_some_name[12:]")
    costs = {"latency_ms": 0.345, "macs": 14.7e6, "memory_mb": 10.5, "params": 1069e3}
    profile = Profile((ProfiledRoute(long, costs, {"accuracy": 0.8234}), row(1, 5)))
    monkeypatch.setenv("COLUMNS", "80")
    assert str(profile).splitlines() == [
        "route                                     MACs  params    MB     ms  accuracy, %",
        "resnet_of_some_name[:1] +                14.7M    1.1M  10.5  0.345         82.3",
        "vit_of_another_name[4:9] +",
        "resnet_of_some_name[12:]",
        "a[:1] + b[1:]                              5.0",
    ]
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, str(profile).splitlines())) <= 60 + 5  # the column of routes has a least width


def whole_profile(*stitched, small=(10, 0.8), large=(30, 0.9)):
    anchors = (("b[:]", *small), ("a[:]", *large))
    rows = (*anchors, *((f"a[:{i + 1}] + b[1:]", *point) for i, point in enumerate(stitched)))
    return Profile(tuple(ProfiledRoute(Route.parse(r), {"macs": m}, {"accuracy": s}) for r, m, s in rows))


@pytest.mark.parametrize(
    ("stitched", "closed"),
    [
        ((), 0.0),
        (((20, 0.85),), 0.25),  # half the gap for half of the budgets
        (((20, 0.79), (12, 0.7)), 0.0),
        (((10, 0.9),), 1.0),
        (((5, 0.95),), 1.5),  # cheaper than both
        (((15, 0.82), (25, 0.88), (25, 0.86), (40, 0.99)), 0.5 * 0.2 + 0.25 * 0.8),
    ],
)
def test_gap_closed(stitched, closed):
    """By hand, and as the mean over many budgets."""
    profile = whole_profile(*stitched)
    assert profile.gap_closed() == profile.gap_closed(stitched_only=True) == pytest.approx(closed)
    budgets = [10 + 20 * (i + 0.5) / 5000 for i in range(5000)]
    gains = [(profile.best({"macs": budget}).scores["accuracy"] - 0.8) / 0.1 for budget in budgets]
    assert sum(gains) / len(gains) == pytest.approx(closed, abs=1e-3)


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (whole_profile((20, 0.85), large=(30, 0.8)), "no better than the cheapest, 'b[:]' (80.0 % accuracy)"),
        (
            whole_profile((20, 0.85), large=(10, 0.9)),
            "the most expensive anchor 'b[:]' (80.0 % accuracy) is no better",
        ),
        (whole_profile(large=(1e308, 1e308), small=(-1e308, -1e308)), "out of range"),
    ],
)
def test_no_gap_to_close(profile, reason):
    assert profile.gap_closed() is None
    assert reason in str(profile).splitlines()[-1] or "b[:]" in reason


def test_a_gap_needs_two_anchors_and_scores():
    assert PROFILE.gap_closed() is None and "gap" not in str(PROFILE)
    assert Profile((row(1, 10), row(2, 20))).gap_closed() is None and Profile(()).gap_closed() is None
    assert Profile(()).dominated() == ()
    for name in ("gap_closed", "dominated"):
        with pytest.raises(BudgetError, match=r"no route of the profile has 'latency_ms'; its costs are \['macs'\]"):
            getattr(PROFILE, name)("latency_ms")
        with pytest.raises(BudgetError, match="score='acc' is not one of them"):
            getattr(PROFILE, name)(score="acc")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=9))
def test_dominated_and_front_are_the_whole(points):
    profile = whole_profile(*points)
    dominated, front = profile.dominated(), profile.front()
    assert len(dominated) + len(front) == len(profile) and not {id(r) for r in front} & {id(r) for r in dominated}
    for beaten in dominated:
        assert any(
            r.costs["macs"] <= beaten.costs["macs"] and r.scores["accuracy"] >= beaten.scores["accuracy"]
            for r in front
        )
    assert all(a.scores["accuracy"] < b.scores["accuracy"] for a, b in pairwise(front))


def test_of_equals_the_anchor_stays():
    profile = whole_profile((10, 0.8), (30, 0.9))
    assert [str(row.route) for row in profile.front()] == ["b[:]", "a[:]"]
    other = Profile(profile.routes[::-1])
    assert [str(row.route) for row in other.dominated()] == ["a[:2] + b[1:]", "a[:1] + b[1:]"]


def test_a_printed_front(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert str(whole_profile((20, 0.85), (25, 0.84))).splitlines() == [
        "route          MACs  accuracy, %  front",
        "b[:]           10.0         80.0      *",
        "a[:]           30.0         90.0      *",
        "a[:1] + b[1:]  20.0         85.0      *",
        "a[:2] + b[1:]  25.0         84.0",
        "gap closed: 0.25",
    ]


def test_as_data_frame(monkeypatch):
    frame = PROFILE.to_pandas()
    assert [*frame.columns] == ["route", "macs", "accuracy"] and frame.accuracy.tolist() == [0.5, 0.7, 0.6, 0.9]
    assert frame.route.tolist() == [str(row.route) for row in PROFILE]
    assert Profile(()).to_pandas().empty
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas, which is not installed; pip install pandas"):
        PROFILE.to_pandas()
