"""Routes print, parse and refuse what leads nowhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restnet_hf.routes.route import ANCHOR_NAME, HeadKey, Route, Segment, StitchPoint, TunedKey, one_cut_routes


@pytest.mark.parametrize(
    "text",
    ["a[:]", "resnet50[:7] + mobilenetv2[11:]", "a[:3] + b[5:9] + a[10:]", "a-1_x[:2] + a-1_x[4:]"]
    + ["a[:2] + a[4:4] + a[6:]", "a[:1] + b[2:2] + a[1:1] + b[3:]", "night: a[:3] + b[5:5] + a[6:]"]
    + ["tuned a[:]", "night: tuned a[:]", "tuned[:]", "tuned tuned[:]", "tuned: tuned a[:]", "a[:1] +tuned b[2:]"],
)
def test_round_trip(text):
    assert str(Route.parse(text)) == text
    bare = text if "tuned " in text else text.replace(" ", "")  # the word needs its space
    assert Route.parse(bare) == Route.parse(f" {text} ") == Route.parse(text)


def test_tuned_anchors():
    """Beside the anchor alone; an anchor or a stitch that has the word for a name is what it was."""
    tuned = Route.alone("a", "night", tuned=True)
    assert Route.parse("night:tuned  a[:]") == tuned != Route.alone("a", "night") and str(tuned) == "night: tuned a[:]"
    assert (tuned.tuned, tuned.is_anchor, tuned.stitch_points) == (True, False, ())
    assert tuned.head == str(HeadKey("a", "night", tuned=True)) == "night:tuned~a"
    assert Route.parse("tuned[:]") == Route.alone("tuned") and Route.parse("tuned[:]").is_anchor
    assert Route.parse("a[:1] +tuned b[2:]").via == ("tuned",) and not Route.parse("a[:1] +tuned b[2:]").tuned
    assert sorted([tuned, Route.alone("a"), Route.alone("a", "night")])[-1] == tuned
    for text in ("tuned a[:1] + b[2:]", "night: tuned a[:1] +x b[2:]"):
        with pytest.raises(ValueError, match=r"only an anchor alone may be tuned, as in 'tuned b\[:\]'"):
            Route.parse(text)


@given(st.from_regex(ANCHOR_NAME, fullmatch=True), st.from_regex(ANCHOR_NAME, fullmatch=True) | st.just(""))
def test_no_tuned_anchor_has_the_key_of_anything_else(name, adapter):
    """Whatever anchors are called: neither that of another head, nor that of a route's stitches."""
    own = Route.alone(name, adapter, tuned=True).head
    assert HeadKey.parse(own) == HeadKey(name, adapter, True)
    for via in ("", name, "tuned"):
        point = StitchPoint("tuned", 1, name, 2, adapter, via).name
        assert own not in (point, f"{point}+{point}", name, str(HeadKey(name, adapter)))


@pytest.mark.parametrize(
    ("text", "via"),
    [
        ("small[:3] +shared large[3:]", ("shared",)),
        ("a[:2] +prune25_2 a[3:3] + a[6:6] +w-1 a[7:]", ("prune25_2", "", "w-1")),
        ("night: a[:3] + b[5:9] +x a[10:]", ("", "x")),
    ],
)
def test_names_of_stitches(text, via):
    route = Route.parse(text)
    assert str(route) == text and route.via == via
    assert Route.parse(f"  {text.replace('+', '  + ').replace(' a', '   a')} ") == route
    assert Route(route.segments, route.adapter, via) == route != Route(route.segments, route.adapter)
    assert [point.via for point in route.stitch_points] == list(via)


def test_no_names_are_no_names():
    """However it is said that no stitch has a name, the route is the same, and so is its key."""
    bare = Route.parse("a[:1] + b[2:2] + a[3:]")
    assert {bare, Route(bare.segments, via=("", "")), Route(bare.segments, via=())} == {bare}
    assert bare.via == ()


def test_names_of_shared_stitches():
    """A name of its own replaces the cuts; which anchors it joins, and whose set it is of, stay in it."""
    one, two = (Route.parse(f"small[:{cut}] +both large[{cut + 1}:]").stitch_points[0] for cut in (2, 3))
    assert one.name == two.name == "small__large~both" and one != two
    assert Route.parse("night: small[:2] +both large[3:]").stitch_points[0].name == "night:small__large~both"
    assert Route.parse("large[:2] +both small[3:]").stitch_points[0].name == "large__small~both"
    assert "." not in one.name, "or it could not be the key of a module"


@pytest.mark.parametrize(
    ("segments", "via"),
    [
        ((Segment("a", 0, 2), Segment("a", 4)), ("x", "y")),
        ((Segment("a", 0, 2), Segment("a", 4, 4), Segment("a", 5)), ("x",)),
        ((Segment("a"),), ("x",)),
        ((Segment("a", 0, 2), Segment("a", 4)), ("two words",)),
        ((Segment("a", 0, 2), Segment("a", 4)), ("dotted.name",)),
        ((Segment("a", 0, 2), Segment("a", 4)), ("a:b",)),
    ],
)
def test_names_that_do_not_fit(segments, via):
    with pytest.raises(ValueError, match="the stitches' names"):
        Route(segments, via=via)


@pytest.mark.parametrize("text", ["a[:2] + a[4:3] + a[6:]", "a[:2] + a[4:4]", "a[:2] + a[0:0] + a[6:]"])
def test_segments_that_hold_nothing(text):
    with pytest.raises(ValueError, match=r"holds no block|must start at an image|must name a cut"):
        Route.parse(text)


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
    + ["a[:3] + b[5:4] + a[6:]", "a[:3] + b[0:]", "a[:x] + b[1:]", "a[:3] b[1:]", "a.b[:]", "a[:3] + + b[1:]"]
    + ["tuneda[:", "Tuned a[:]", "tuned", "tuned a", "tuned tuned a[:]", "tuned a[:2]", "tuned + a[:]", "tuned: a"]
    + ["x a[:3] + b[1:]", "a[:3] +x + b[1:]", "a[:3] +x.y b[1:]", "a[:3] +x y b[1:]", "a[:3] +x: b[1:]"],
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


NAMES = st.from_regex(ANCHOR_NAME, fullmatch=True)
KINDS, OWNERS = st.from_regex(r"[a-z]+", fullmatch=True), st.from_regex(r"[A-Za-z0-9_+:~-]+", fullmatch=True)


@given(st.builds(HeadKey, NAMES, NAMES | st.just(""), st.booleans()))
def test_keys_of_heads_round_trip(key):
    assert HeadKey.parse(str(key)) == key
    route = Route.alone(key.anchor, key.adapter, key.tuned)
    assert str(key) == route.head and Route.parse(str(route)) == route


@given(st.builds(TunedKey, KINDS, OWNERS))
def test_keys_of_tuned_tensors_round_trip(key):
    assert TunedKey.parse(str(key)) == key


@given(st.text(alphabet="ab-:+~_. [\n0Zé"))
def test_a_key_that_parses_prints_as_it_was(text):
    for kind, message in ((HeadKey, "is not the key of a head"), (TunedKey, "is not a key of tuned tensors")):
        try:
            assert str(kind.parse(text)) == text
        except ValueError as error:
            assert message in str(error) and "write it" in str(error)


def test_keys():
    assert HeadKey.parse("night:tuned~vit") == HeadKey("vit", "night", tuned=True)
    assert HeadKey.parse("vit") == HeadKey("vit") and HeadKey.parse("night:a-1_x") == HeadKey("a-1_x", "night")
    assert TunedKey.parse("lora-night:a-1_x") == TunedKey("lora", "night:a-1_x")
    assert TunedKey.parse("norm-night:a_2__b_1+night:b__a~w") == TunedKey("norm", "night:a_2__b_1+night:b__a~w")
    for text in ("", ":", ":vit", "night:", "a:b:c", "a.b", "a b", "vit\n", "tuned~", "a~b", "tuned~tuned~a"):
        with pytest.raises(ValueError, match="is not the key of a head; write it 'anchor' or 'adapter:anchor'"):
            HeadKey.parse(text)
    for text in ("", "lora", "lora-", "-vit", "Lora-vit", "lora2-vit", "lora-a.b", "lora-a b", "lora-vit\n"):
        with pytest.raises(ValueError, match="is not a key of tuned tensors; write it 'kind-owner'"):
            TunedKey.parse(text)
