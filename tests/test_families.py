"""Families hold exactly the routes that their papers list, cost what the papers say, and are enumerated lazily."""

import tracemalloc
from itertools import islice, product

import pytest
import timm

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.anchors import Anchor
from restnet_hf.families import (
    FAMILIES,
    Blocks,
    family,
    nearest,
    one_cut,
    paired,
    two_way,
    unpaired,
    within_budget,
)
from restnet_hf.preprocessing import Preprocessing
from restnet_hf.profiles import Budget
from restnet_hf.routes import Route


DEIT = [
    Blocks.of(name, 12, entry=2) for name in ("ti", "s", "b")
]  # cut 2 is the embedding, block k from 0 ends at k + 3
SWIN = [Blocks.of("ti", 2, 2, 6), Blocks.of("s", 2, 2, 18), Blocks.of("b", 2, 2, 18)]  # the last stage is not joined
DEIT3 = [Blocks.of("s", 12), Blocks.of("l", 24)]
SHALLOW, DEEP = Blocks.of("a", 2), Blocks.of("b", 4)


def names(routes):
    return [str(route) for route in routes]


def test_paired_deit():
    """SN-Net lists every (j, k) of windows of two blocks, j >= k too: 34 of a pair, and 3 anchors."""
    cells = [(j, k) for j, k in product(range(12), range(12)) if abs(j - k) < 2]
    listed = [f"{a}[:{j + 3}] + {b}[{k + 2}:]" for a, b in (("ti", "s"), ("s", "b")) for j, k in cells]
    found = names(family(DEIT, "paired"))
    assert found == ["ti[:]", "s[:]", "b[:]", *listed]
    assert len(found) == len({*found}) == 71 and found == names(family(DEIT))


def test_swin():
    """SN-Net's released list: (last block of the front, first of the end) of each stage, counted from 0."""
    third = "0,1 0,2 1,3 1,4 1,5 2,6 2,7 2,8 3,9 3,10 3,11 4,12 4,13 4,14 5,15 5,16 5,17"
    cells = [[int(number) for number in cell.split(",")] for cell in third.split()]
    listed = {"ti[:]", "s[:]", "b[:]", "ti[:1] + s[1:]", "s[:1] + b[1:]", "ti[:3] + s[3:]", "s[:3] + b[3:]"}
    listed |= {f"ti[:{4 + j + 1}] + s[{4 + k}:]" for j, k in cells}
    listed |= {f"s[:{4 + j + 1}] + b[{4 + j + 1}:]" for j in range(17)}
    found = names(family(SWIN, overlap=False))
    assert set(found) == listed and len(found) == 41


def test_two_way_deit3():
    """SN-Netv2: small block i leads to large block 2(i + 1), large block 2i + 1 to small block i + 1, from 0."""
    up, down = [(i, 2 * (i + 1)) for i in range(11)], [(i, i // 2 + 1) for i in range(1, 23, 2)]
    listed = {"s[:]", "l[:]", *(f"s[:{i + 1}] + l[{j}:]" for i, j in up), *(f"l[:{i + 1}] + s[{j}:]" for i, j in down)}
    listed |= {f"s[:{i + 1}] + l[{j}:{m + 1}] + s[{n}:]" for (i, j), (m, n) in product(up, down) if j < m}
    listed |= {f"l[:{m + 1}] + s[{n}:{i + 1}] + l[{j}:]" for (m, n), (i, j) in product(down, up) if n <= i}
    found = names(family(DEIT3, "two_way", directions="both"))
    assert set(found) == listed and len(found) == 134


def test_no_way_in_before_the_first_block():
    """Without a cut at the embedding the routes that enter before block 0 are left out: (0, 0) and (1, 0)."""
    assert len(list(family([Blocks.of(name, 12) for name in "abc"]))) == 71 - 2 * 2
    assert names(paired(Blocks.of("a", 2), Blocks.of("b", 2))) == ["a[:1] + b[1:]", "a[:2] + b[1:]"]


@pytest.mark.parametrize(
    ("depth", "kernel", "stride"), [(7, 3, 2), (6, 2, 2), (5, 4, 1), (3, 9, 1), (8, 2, 3), (1, 2, 1)]
)
def test_windows(depth, kernel, stride):
    windows = [range(s, min(s + kernel, depth)) for s in range(0, depth, stride)]
    cells = {cell for window in windows for cell in product(window, window)}
    listed = [f"a[:{j + 2}] + b[{k + 1}:]" for j, k in cells]
    found = names(paired(Blocks.of("a", depth, entry=1), Blocks.of("b", depth, entry=1), kernel, stride))
    assert sorted(found) == sorted(listed)
    fewer = paired(Blocks.of("a", depth, entry=1), Blocks.of("b", depth, entry=1), kernel, stride, overlap=False)
    assert sorted(names(fewer)) == sorted(f"a[:{j + 2}] + b[{k + 1}:]" for j, k in cells if j < k)


def test_unpaired():
    """Blocks 0 and 1 of four belong to block 0 of two, 2 and 3 to block 1."""
    assert names(unpaired(SHALLOW, DEEP)) == ["a[:1] + b[1:]", "a[:2] + b[2:]", "a[:2] + b[3:]"]
    assert names(unpaired(DEEP, SHALLOW)) == ["b[:3] + a[1:]", "b[:4] + a[1:]"]
    assert names(unpaired(SHALLOW, Blocks.of("b", 4, entry=1)))[0] == "a[:1] + b[1:]", "before block 0"


def test_two_way_of_stages():
    """Places to change: a1-b1, a2-b3 and a3-b4; where both end there is none."""
    a, b = Blocks.of("a", 1, 3), Blocks.of("b", 1, 4)
    assert names(two_way(a, b, stitches=1)) == ["a[:1] + b[1:]", "a[:2] + b[2:]", "a[:3] + b[3:]"]
    assert names(two_way(b, a, stitches=3))[-1] == "b[:1] + a[1:2] + b[2:3] + a[3:]"
    assert len(names(two_way(a, b, stitches=9))) == 3 + 3 + 1
    with pytest.raises(ValueError, match="stitches=0"):
        next(two_way(a, b, stitches=0))


def test_pairs_and_directions():
    assert names(family([SHALLOW, DEEP], directions="down"))[2:] == names(unpaired(DEEP, SHALLOW))
    both = names(family([SHALLOW, DEEP], "one_cut", directions="both"))
    assert both[2:] == names(one_cut(SHALLOW, DEEP)) + names(one_cut(DEEP, SHALLOW)) and len(both) == 2 + 16
    for pairs, joined in {"adjacent": ["ab", "bc"], "any": ["ab", "ac", "bc"]}.items():
        routes = family([Blocks.of(name, 3) for name in "abc"], "one_cut", pairs)
        ends = [[segment.anchor for segment in route.segments] for route in routes]
        assert list(dict.fromkeys(map("".join, ends))) == ["a", "b", "c", *joined]


def test_cuts_that_are_not_in_a_row():
    """As where a block's output is no cut, or a search inside blocks finds more."""
    a, b = Blocks("a", ((2, 3), (7,))), Blocks("b", ((1, 4), (5, 6, 9)))
    assert names(nearest(a, b)) == ["a[:2] + b[1:]", "a[:3] + b[1:]", "a[:7] + b[5:]", "a[:7] + b[6:]"]


def test_stages_from_layouts(anchors):
    """The tiny Swin has stages of 1, 1, 2 and 1 blocks."""
    layouts = [cut.layout for cut in anchors["swin_nhwc"].cuts]
    assert Blocks.alike("swin", layouts).stages == ((1,), (2,), (3, 4), (5,))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("depths", [(5,), (1, 2, 3), (2, 1)])
def test_contract(kind, depths):
    """Every kind: routes that fit, start in the front, end in one of the two, and no route twice."""
    front, end = Blocks.of("a", *depths, entry=1), Blocks.of("b", *depths)
    routes = list(FAMILIES[kind](front, end))
    assert routes and len({*routes}) == len(routes)
    assert {route.segments[0].anchor for route in routes} == {"a"}
    for route in routes:
        assert {segment.anchor for segment in route.segments} == {"a", "b"}
        route.check({"a": sum(depths) + 1, "b": sum(depths)})


@pytest.mark.parametrize("kind", FAMILIES)
def test_lazy(kind):
    """The first routes of more than anyone could list come at once and take no memory."""
    depth, options = (100, {"stitches": 99}) if kind == "two_way" else (10**12, {})
    tracemalloc.start()
    anchors = [Blocks.of(str(number), depth, entry=1) for number in range(4)]
    first = list(islice(family(anchors, kind, "any", "both", **options), 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({*first}) == 1000 and peak < 2**21


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "random"}, "kind='random' is not one of"),
        ({"pairs": "all"}, "pairs='all' is not one of"),
        ({"directions": "left"}, "directions='left' is not one of"),
        ({"anchors": [SHALLOW, SHALLOW]}, "names of their own"),
    ],
)
def test_refused_at_once(given, message):
    with pytest.raises(ValueError, match=message):
        family(**{"anchors": [SHALLOW, DEEP], **given})


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="stage 1 has 2 blocks in 'a' and 4 in 'b'; use unpaired"):
        next(paired(SHALLOW, DEEP))
    for rule in (paired, unpaired, nearest, two_way):
        with pytest.raises(ValueError, match="'a' has 1 stages and 'swin' 2"):
            next(rule(SHALLOW, Blocks.of("swin", 2, 2)))
    for kernel, stride in ((0, 1), (2, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            next(paired(SHALLOW, SHALLOW, kernel, stride))


@pytest.mark.parametrize(
    ("stages", "entry"),
    [((), 0), (((),), 0), (((1, 1),), 0), (((3, 2),), 0), (((1, 2), (2, 3)), 0), (((2, 3),), 2), (((1,),), -1)]
    + [((range(3, 0, -1),), 0), ((range(0),), 0)],
)
def test_blocks_that_go_nowhere(stages, entry):
    with pytest.raises(ValueError, match="'a'"):
        Blocks("a", stages, entry)


def test_budget():
    """A block of the large anchor costs five, of the small one: two are kept, and costs are asked for as they come."""
    asked = []

    def costs(route):
        asked.append(route)
        first, last = route.segments[0], route.segments[-1]
        if len(route.segments) == 1:
            return {"macs": {"a": 4.0, "b": 20.0}[first.anchor]}
        return {"macs": first.stop + 5.0 * (4 - last.start)}

    routes = family([Blocks.of("a", 4), Blocks.of("b", 4)], "one_cut")
    fitting = within_budget(routes, costs, Budget(macs=6))
    assert str(next(fitting)) == "a[:]" and len(asked) == 1
    assert names(fitting) == ["a[:1] + b[3:]", "a[:1] + b[4:]", "a[:2] + b[4:]", "a[:3] + b[4:]", "a[:4] + b[4:]"]


NETWORKS = {"ti": (192, 12), "s": (384, 12), "b": (768, 12), "l": (1024, 24)}  # width and depth of DeiT and DeiT3


def by_hand(route, networks, tokens, patch, classes):
    """Of a route of DeiT: MACs, parameters, elements that norms give, and parameters of the front's embeddings."""
    front, end = networks[route.segments[0].anchor][0], networks[route.segments[-1].anchor][0]
    embeddings = (tokens + 1) * front
    macs = (tokens - 1) * patch * front + end * classes
    params, norms = embeddings + (patch + 1) * front + 2 * end + (end + 1) * classes, tokens * end
    for segment in route.segments:
        d, depth = networks[segment.anchor]
        blocks = (depth if segment.stop is None else segment.stop) - segment.start
        macs += blocks * (12 * tokens * d * d + 2 * tokens * tokens * d)
        params += blocks * (12 * d * d + 13 * d)
        norms += blocks * 2 * tokens * d
    for point in route.stitch_points:
        source, target = networks[point.source][0], networks[point.target][0]
        macs, params = macs + tokens * source * target, params + (source + 1) * target
    return macs, params, norms, embeddings


@pytest.mark.parametrize(
    ("route", "gmacs", "params"),
    [
        ("ti[:]", 1.26, 5.72),
        ("s[:]", 4.61, 22.05),
        ("b[:]", 17.58, 86.57),
        ("ti[:1] + s[1:]", 4.32, 20.57),
        ("ti[:6] + s[6:]", 2.93, 13.92),
        ("ti[:12] + s[11:]", 1.65, 7.72),
        ("s[:4] + b[4:]", 13.28, 65.16),
        ("s[:11] + b[11:]", 5.74, 27.97),
        ("s[:1] + l[2:]", 56.84, None),
        ("l[:6] + s[3:8] + l[16:]", 38.05, None),
        ("s[:1] + l[2:4] + s[2:]", 9.50, None),
    ],
)
def test_formula_gives_what_is_published(route, gmacs, params):
    """To the last digit, as SN-Net counts: five operations for an element of a norm, no embeddings once stitched."""
    route = Route.parse(route)
    macs, found, norms, embeddings = by_hand(route, NETWORKS, tokens=197, patch=768, classes=1000)
    assert (macs + 5 * norms) / 1e9 == pytest.approx(gmacs, abs=0.00501)
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.0051)
    if params is not None:
        assert (found - (len(route.segments) > 1) * embeddings) / 1e6 == pytest.approx(params, abs=0.00501)
        assert found / 1e6 == pytest.approx(params, rel=0.005)


def test_costs_are_those_of_the_formula():
    """Routes of two small DeiT cost what the formula says; a baked end may keep embeddings that it does not use."""
    networks = {"s": (24, 3), "l": (48, 6)}
    anchors = [
        Anchor(
            timm.create_model(
                "deit_tiny_patch16_224", img_size=64, embed_dim=width, depth=depth, num_heads=2, num_classes=5
            ).eval(),
            name,
            Preprocessing((64, 64)),
        )
        for name, (width, depth) in networks.items()
    ]
    costs = StitchedModelForImageClassification.from_anchors(*anchors, order="given").route_costs()
    blocks = [Blocks.alike(anchor.name, [cut.layout for cut in anchor.cuts]) for anchor in anchors]
    assert [len(stage) for each in blocks for stage in each.stages] == [3, 6]
    routes = {*family(blocks), *family(blocks, "two_way", directions="both")}
    assert len(routes) == 2 + 5 + (2 + 2) + (1 + 1), "alone, unpaired, SL and LS, SLS and LSL"
    for route in routes:
        macs, params, *_ = by_hand(route, networks, tokens=17, patch=768, classes=5)
        found = costs(route)
        others = {segment.anchor for segment in route.segments} - {route.segments[0].anchor}
        unused = sum(18 * networks[name][0] for name in others)
        assert found["macs"] == macs and found["params"] in (params, params + unused)
