"""Routes print, parse and refuse what leads nowhere."""

import pytest

from restnet_hf.routes import Route, Segment, StitchPoint, one_cut_routes


@pytest.mark.parametrize(
    "text",
    ["a[:]", "resnet50[:7] + mobilenetv2[11:]", "a[:3] + b[5:9] + a[10:]", "a-1_x[:2] + a-1_x[4:]"],
)
def test_round_trip(text):
    assert str(Route.parse(text)) == text
    assert Route.parse(text.replace(" ", "")) == Route.parse(text)


def test_parts():
    route = Route.parse("a[:3] + b[5:9] + a[10:]")
    assert route.segments == (Segment("a", 0, 3), Segment("b", 5, 9), Segment("a", 10, None))
    assert route.stitch_points == (StitchPoint("a", 3, "b", 5), StitchPoint("b", 9, "a", 10))
    assert route.stitch_points[0].name == "a_3__b_5"


def test_cuts_by_name():
    numbers = {("a", "layer1.0"): 1, ("b", "blocks.2"): 3}
    route = Route.parse("a[:layer1.0] + b[blocks.2:]", lambda anchor, cut: numbers[anchor, cut])
    assert str(route) == "a[:1] + b[3:]"


@pytest.mark.parametrize(
    "text",
    ["", "a", "a[3]", "a[:3]", "a[3:]", "a[:3] + b[:]", "a[:] + b[2:]", "a[:0] + b[2:]", "a[:-1] + b[2:]"]
    + ["a[:3] + b[5:5] + a[6:]", "a[:3] + b[0:]", "a[:x] + b[1:]", "a[:3] b[1:]", "a.b[:]", "a[:3] + + b[1:]"],
)
def test_refused(text):
    with pytest.raises(ValueError, match=r"route|segment"):
        Route.parse(text)


def test_check():
    route = Route.parse("a[:3] + b[5:]")
    assert route.check({"a": 3, "b": 5}) is route
    with pytest.raises(ValueError, match="cuts 1 to 4, not 5"):
        route.check({"a": 3, "b": 4})
    with pytest.raises(ValueError, match="no anchor named 'b'"):
        route.check({"a": 3})


def test_one_cut_routes():
    routes = list(one_cut_routes("a", 3, "b", 4))
    assert len(set(routes)) == 12
    assert str(routes[0]) == "a[:1] + b[1:]" and str(routes[-1]) == "a[:3] + b[4:]"
