"""Routes are ranked by score, kept within budgets, spread over costs, and marked where a cheaper one is as good."""

import numpy as np
import pytest

from restnet_hf.routes.profile import Budget
from restnet_hf.routes.route import Route
from restnet_hf.selection.ranking import Similarity, anchor_points, choose_routes, line_between, rank_routes


VALUES = np.ma.masked_array([[0.9, 0.2], [0.5, 0.8], [0.7, 0.1]], [[0, 0], [0, 0], [0, 1]])
FORTH, BACK = Similarity("a", "b", VALUES, {}), Similarity("b", "a", np.ma.masked_array([[0.85, 0.3, 0.6]]), {})


def costs(route):
    """Ten for each block of the front, and what is left of the end."""
    first, last = route.segments
    return {"macs": 10.0 * first.stop + (4 - last.start), "params": 1.0}


def names(rows):
    return [str(row.route) for row in rows]


def test_best_first():
    ranked = rank_routes([FORTH], costs)
    assert names(ranked) == ["a[:1] + b[1:]", "a[:2] + b[2:]", "a[:3] + b[1:]", "a[:2] + b[1:]", "a[:1] + b[2:]"]
    assert [row.score for row in ranked] == [0.9, 0.8, 0.7, 0.5, 0.2]
    assert ranked[0].costs == {"macs": 13.0, "params": 1.0}
    assert [row.dominated for row in ranked] == [False, True, True, True, False]  # the last one is the cheapest


def test_equals_go_by_cost():
    ranked = rank_routes([Similarity("a", "b", np.ma.masked_array(np.ones((2, 2))), {})], costs)
    assert names(ranked)[0] == "a[:1] + b[2:]" and [row.dominated for row in ranked] == [False, True, True, True]


def test_both_directions():
    assert names(rank_routes([FORTH, BACK], costs))[:3] == ["a[:1] + b[1:]", "b[:1] + a[1:]", "a[:2] + b[2:]"]


def test_budget():
    assert names(rank_routes([FORTH], costs, Budget(macs=22))) == ["a[:1] + b[1:]", "a[:2] + b[2:]", "a[:1] + b[2:]"]
    with pytest.raises(ValueError, match=r"no stitched route fits macs<=5; the cheapest is 'a\[:1\] \+ b\[2:\]'"):
        rank_routes([FORTH], costs, Budget(macs=5))


def test_buckets():
    """Costs run from 12 to 33: of two halves the best of each, the cheapest first; of many, all that are there."""
    ranked = rank_routes([FORTH], costs)
    assert names(choose_routes(ranked, 2)) == ["a[:1] + b[1:]", "a[:3] + b[1:]"]
    assert names(choose_routes(ranked, 1)) == ["a[:1] + b[1:]"]
    assert len(choose_routes(ranked, 1000)) == 5
    with pytest.raises(ValueError, match="max_routes=0"):
        choose_routes(ranked, 0)


def test_several_of_a_bucket():
    """The best two of each half, 12 to 22 and 23 to 33."""
    ranked = rank_routes([FORTH], costs)
    chosen = choose_routes(ranked, 2, per_part=2)
    assert names(chosen) == ["a[:1] + b[1:]", "a[:2] + b[2:]", "a[:3] + b[1:]", "a[:2] + b[1:]"]
    with pytest.raises(ValueError, match="per_part=0 must be at least 1"):
        choose_routes(ranked, 2, per_part=0)


def test_one_route():
    ranked = rank_routes([Similarity("a", "b", np.ma.masked_array([[0.5]]), {})], costs)
    assert names(choose_routes(ranked, 8)) == ["a[:1] + b[1:]"]


def test_nothing_is_defined():
    with pytest.raises(ValueError, match="no pair of cuts has a defined score"):
        rank_routes([Similarity("a", "b", np.ma.masked_all((2, 2)), {})], costs)


def test_value_of_a_route():
    assert FORTH.value(Route.parse("a[:2] + b[2:]")) == 0.8
    assert FORTH.value(Route.parse("a[:3] + b[2:]")) is None, "masked"
    assert FORTH.value(Route.parse("b[:1] + a[2:]")) is None and FORTH.value(Route.parse("a[:]")) is None


def test_gain_over_the_anchors():
    """In each part the route furthest above the line between the anchors, and those that an anchor beats last."""
    points = [(10.0, 0.4), (34.0, 0.88)]  # 0.02 for each of the MACs
    ranked = rank_routes([FORTH], costs, anchors=points)
    gains = {str(row.route): row.gain for row in ranked}
    assert gains["a[:1] + b[1:]"] == pytest.approx(0.9 - 0.46) and gains["a[:3] + b[1:]"] == pytest.approx(0.7 - 0.86)
    assert names(row for row in ranked if not row.dominated) == ["a[:1] + b[1:]"], "an anchor beats the cheapest, 0.2"
    assert names(choose_routes(ranked, 1, per_part=9, anchors=points)) == [
        *("a[:1] + b[1:]", "a[:2] + b[2:]", "a[:2] + b[1:]", "a[:3] + b[1:]", "a[:1] + b[2:]")
    ]
    assert rank_routes([FORTH], costs)[0].gain is None


def test_line_between_several_anchors():
    """Through those that no other beats; level beyond them."""
    line = line_between([(20, 0.7), (10, 0.5), (15, 0.4), (30, 0.6)])
    assert [line(macs) for macs in (5, 10, 15, 20, 30)] == pytest.approx([0.5, 0.5, 0.6, 0.7, 0.7])


def test_anchors_of_values_that_are_accuracies():
    settings = {"anchors": {"a": 0.9, "b": 0.8}}
    macs = {"a[:]": 30.0, "b[:]": 10.0}
    both = [Similarity("a", "b", VALUES, settings), Similarity("b", "a", VALUES.T, settings)]
    assert anchor_points(both, lambda route: macs[str(route)]) == [(10.0, 0.8), (30.0, 0.9)]
    assert anchor_points([FORTH], lambda route: 1.0) == []
