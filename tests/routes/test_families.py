"""Families hold exactly the routes that their papers list, cost what the papers say, and are enumerated lazily."""

import tracemalloc
from dataclasses import replace
from itertools import islice, pairwise, product

import pytest
import timm

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.routes.blocks import Blocks
from restnet_hf.routes.families import (
    FAMILIES,
    WITHIN,
    family,
    nearest,
    one_cut,
    paired,
    pruned_share,
    skip,
    two_way,
    unpaired,
    within_budget,
)
from restnet_hf.routes.profile import Budget
from restnet_hf.routes.route import Route
from restnet_hf.selection.ranking import spread


DEIT = [
    Blocks.from_depths(name, 12, entry=2) for name in ("ti", "s", "b")
]  # cut 2 is the embedding, block k from 0 ends at k + 3
SWIN = [
    Blocks.from_depths("ti", 2, 2, 6),
    Blocks.from_depths("s", 2, 2, 18),
    Blocks.from_depths("b", 2, 2, 18),
]  # the last stage is not joined
DEIT3 = [Blocks.from_depths("s", 12), Blocks.from_depths("l", 24)]
SHALLOW, DEEP = Blocks.from_depths("a", 2), Blocks.from_depths("b", 4)


def names(routes):
    return [str(route) for route in routes]


def bare(routes):
    """Without the names of stitches that are shared."""
    return names(replace(route, via=()) for route in routes)


def stitches(routes):
    return {point.name for route in routes for point in route.stitch_points}


def test_paired_deit():
    """SN-Net lists every (j, k) of windows of two blocks, j >= k too: 34 of a pair, and 3 anchors."""
    cells = [(j, k) for j, k in product(range(12), range(12)) if abs(j - k) < 2]
    listed = [f"{a}[:{j + 3}] + {b}[{k + 2}:]" for a, b in (("ti", "s"), ("s", "b")) for j, k in cells]
    found = names(family(DEIT, "paired", share=False))
    assert found == ["ti[:]", "s[:]", "b[:]", *listed]
    assert len(found) == len({*found}) == 71 and found == bare(family(DEIT))


def test_stitches_shared_by_deit():
    """SN-Net has 11 stitches for the windows of a pair; the two routes into the first block have one each."""
    routes = list(family(DEIT))
    for front, end in (("ti", "s"), ("s", "b")):
        mine = [r for r in routes if [segment.anchor for segment in r.segments] == [front, end]]
        windows = {f"{front}__{end}~w{start + 3}" for start in range(11)}
        assert stitches(mine) == windows | {f"{front}_3__{end}_2", f"{front}_4__{end}_2"}
        for route in mine:  # a pair of blocks belongs to the first window that holds it
            j, k = route.segments[0].stop - 3, route.segments[1].start - 2
            assert route.via == (() if k == 0 else (f"w{max(0, max(j, k) - 1) + 3}",))
    assert len(routes) == len({*routes}) == 71 and len(stitches(routes)) == 2 * (11 + 2)
    assert len(stitches(family(DEIT, share=False))) == 68


def test_swin():
    """SN-Net's released list: (last block of the front, first of the end) of each stage, counted from 0."""
    third = "0,1 0,2 1,3 1,4 1,5 2,6 2,7 2,8 3,9 3,10 3,11 4,12 4,13 4,14 5,15 5,16 5,17"
    cells = [[int(number) for number in cell.split(",")] for cell in third.split()]
    listed = {"ti[:]", "s[:]", "b[:]", "ti[:1] + s[1:]", "s[:1] + b[1:]", "ti[:3] + s[3:]", "s[:3] + b[3:]"}
    listed |= {f"ti[:{4 + j + 1}] + s[{4 + k}:]" for j, k in cells}
    listed |= {f"s[:{4 + j + 1}] + b[{4 + j + 1}:]" for j in range(17)}
    found = names(family(SWIN, overlap=False, share=False))
    assert set(found) == listed and len(found) == 41
    assert found == bare(family(SWIN, overlap=False))


def test_stitches_shared_by_swin():
    """By hand, and as many as SN-Net released: 1 + 1 + 6 blocks of Ti for 17 routes, 1 + 1 + 17 windows of S."""
    routes = list(family(SWIN, overlap=False))
    small = {f"ti__s~w{cut}" for cut in (1, 3, 5, 6, 7, 8, 9, 10)}
    large = {f"s__b~w{cut}" for cut in (1, 3, *range(5, 22))}
    assert stitches(routes) == small | large and (len(small), len(large)) == (8, 19)
    assert [str(r) for r in routes if r.via == ("w6",) and r.segments[0].anchor == "ti"] == [
        f"ti[:6] +w6 s[{start}:]" for start in (7, 8, 9)
    ]


@pytest.mark.parametrize("kind", ["paired", "unpaired", "nearest"])
def test_shared_stitches_join_equal_layouts(kind):
    """Whatever one of them joins lies in one stage of each anchor."""
    front, end = Blocks.from_depths("a", 2, 3, 4, entry=1), Blocks.from_depths("b", 2, 3, 4, entry=1)
    stage_of = {cut: index for index, stage in enumerate(front.stages) for cut in stage} | {1: -1}
    joined = {}
    for route in FAMILIES[kind](front, end):
        (point,) = route.stitch_points
        joined.setdefault(point.name, set()).add((stage_of[point.source_cut], stage_of[point.target_cut]))
    assert all(len(stages) == 1 for stages in joined.values())
    assert {stages for each in joined.values() for stages in each} >= {(0, 0), (1, 1), (2, 2)}


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
    assert len(list(family([Blocks.from_depths(name, 12) for name in "abc"]))) == 71 - 2 * 2
    assert names(paired(Blocks.from_depths("a", 2), Blocks.from_depths("b", 2))) == [
        "a[:1] +w1 b[1:]",
        "a[:2] +w1 b[1:]",
    ]


@pytest.mark.parametrize(
    ("depth", "kernel", "stride"), [(7, 3, 2), (6, 2, 2), (5, 4, 1), (3, 9, 1), (8, 2, 3), (1, 2, 1)]
)
def test_windows(depth, kernel, stride):
    windows = [range(s, min(s + kernel, depth)) for s in range(0, depth, stride)]
    cells = {cell for window in windows for cell in product(window, window)}
    listed = [f"a[:{j + 2}] + b[{k + 1}:]" for j, k in cells]
    anchors = Blocks.from_depths("a", depth, entry=1), Blocks.from_depths("b", depth, entry=1)
    found = list(paired(*anchors, kernel, stride))
    assert sorted(bare(found)) == sorted(listed)
    assert sorted(names(paired(*anchors, kernel, stride, share=False))) == sorted(listed)
    fewer = paired(*anchors, kernel, stride, overlap=False)
    assert sorted(bare(fewer)) == sorted(f"a[:{j + 2}] + b[{k + 1}:]" for j, k in cells if j < k)
    for route in found:  # of the first window that holds both
        j, k = route.segments[0].stop - 2, route.segments[1].start - 1
        first = next(window.start for window in windows if j in window and k in window)
        assert route.via == ((f"w{first + 2}",) if k else ())


def test_unpaired():
    """Blocks 0 and 1 of four belong to block 0 of two, 2 and 3 to block 1."""
    assert names(unpaired(SHALLOW, DEEP)) == ["a[:1] +w1 b[1:]", "a[:2] +w2 b[2:]", "a[:2] +w2 b[3:]"]
    assert names(unpaired(SHALLOW, DEEP, share=False)) == ["a[:1] + b[1:]", "a[:2] + b[2:]", "a[:2] + b[3:]"]
    assert bare(unpaired(DEEP, SHALLOW)) == ["b[:3] + a[1:]", "b[:4] + a[1:]"]
    assert names(unpaired(SHALLOW, Blocks.from_depths("b", 4, entry=1)))[0] == "a[:1] + b[1:]", "before block 0"


def test_two_way_of_stages():
    """Places to change: a1-b1, a2-b3 and a3-b4; where both end there is none."""
    a, b = Blocks.from_depths("a", 1, 3), Blocks.from_depths("b", 1, 4)
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
        routes = family([Blocks.from_depths(name, 3) for name in "abc"], "one_cut", pairs)
        ends = [[segment.anchor for segment in route.segments] for route in routes]
        assert list(dict.fromkeys(map("".join, ends))) == ["a", "b", "c", *joined]


def test_cuts_that_are_not_in_a_row():
    """As where a block's output is no cut, or a search inside blocks finds more."""
    a, b = Blocks("a", ((2, 3), (7,))), Blocks("b", ((1, 4), (5, 6, 9)))
    assert bare(nearest(a, b)) == ["a[:2] + b[1:]", "a[:3] + b[1:]", "a[:7] + b[5:]", "a[:7] + b[6:]"]
    assert stitches(nearest(a, b)) == {"a__b~w2", "a__b~w7"}


def ways(blocks, widths, free):
    """How many ways there are through so many blocks, by the recurrence; ``free`` of width one."""
    counts = [1]
    for n in range(1, blocks + 1):
        counts.append(free * counts[n - 1] + sum(counts[n - width] for width in widths if width <= n))
    return counts[blocks]


def compositions(blocks, widths):
    """Every list of parts that add up, by brute force."""
    if not blocks:
        return [()]
    return [(w, *rest) for w in widths if w <= blocks for rest in compositions(blocks - w, widths)]


@pytest.mark.parametrize(
    ("depth", "widths"), [(1, (2, 3)), (5, (2, 3)), (9, (2, 3)), (7, (2,)), (8, (4, 2)), (4, (9,))]
)
def test_skip_gives_the_compositions(depth, widths):
    """A part of one is a block that runs, any other a stitch; all ones are the anchor alone."""
    listed = set()
    for parts in compositions(depth, (1, *widths)):
        ends = [1 + sum(parts[:index]) for index in range(len(parts) + 1)]  # the entry is cut 1
        jumps = [(start, stop) for start, stop in pairwise(ends) if stop - start > 1]
        inner = [f"a[{'' if index == 0 else left[1]}:{right[0]}]" for index, (left, right) in
                 enumerate(pairwise([(0, 0), *jumps]))]  # fmt: skip
        listed.add(" + ".join([*inner, f"a[{jumps[-1][1]}:]"]) if jumps else "a[:]")
    found = names(skip(Blocks.from_depths("a", depth, entry=1), widths))
    assert len(found) == len({*found}) and {*found, "a[:]"} == listed


def test_as_many_as_adaptivenet():
    """Its ResNet-50 of 16 blocks has 10,609 subnets: the compositions into 1, 2 and 3. Stages change nothing."""
    routes = list(family([Blocks.from_depths("r50", 3, 4, 6, 3, entry=1)], "skip"))
    assert len(routes) == len({*routes}) == ways(16, (2, 3), 1) == 10_609
    assert len(stitches(routes)) == 15 + 14, "a stitch for each pair and each three of neighbours"
    assert str(routes[0]) == "r50[:]"
    without_entry = sum(1 for _ in family([Blocks.from_depths("r50", 10)], "skip"))
    assert without_entry == ways(9, (2, 3), 1) == 149, "nothing takes the place of the first block"


@pytest.mark.parametrize("prune", [(0.5,), (0.25, 0.5), (0.2, 0.4, 0.29)])
def test_pruned_copies_of_blocks(prune):
    """Each block has so many ways more; where some cannot be pruned, only those that can."""
    anchor = Blocks.from_depths("a", 4, entry=2)
    routes = list(skip(anchor, prune=prune))
    assert len(routes) == len({*routes}) == ways(4, (2, 3), 1 + len(prune)) - 1
    assert stitches(routes) >= {f"a__a~prune{100 * share:.0f}_{cut}" for share in prune for cut in range(2, 6)}
    for route in routes:
        for point in route.stitch_points:
            assert point.target_cut - point.source_cut == 1 if point.via else point.target_cut - point.source_cut > 1
            assert pruned_share(point.via) in (prune if point.via else (0.0,))
    some = list(skip(anchor, merge=(), prune=prune, prunable={anchor.anchor: (2, 5)}))
    assert len(some) == (1 + len(prune)) ** 2 - 1
    assert {point.source_cut for route in some for point in route.stitch_points} == {2, 5}


def test_shares_in_names():
    named = {
        "prune25_3": 0.25,
        "prune9_12": 0.09,
        "w3": 0.0,
        "": 0.0,
        "pruned": 0.0,
        "prune_1": 0.0,
        "prune100_1": 0.0,
    }
    assert {via: pruned_share(via) for via in named} == named


def test_nothing_comes_twice():
    """Widths and shares that are given twice count once."""
    anchor = Blocks.from_depths("a", 5, entry=1)
    assert names(skip(anchor, (2, 2, 3), (0.5, 0.5))) == names(skip(anchor, (2, 3), (0.5,)))
    assert {*skip(anchor, {2, 3})} == {*skip(anchor, (3, 2))}


@pytest.mark.parametrize(
    "options",
    [{"merge": (0,)}, {"merge": (2, -1)}, {"merge": (2.0,)}, {"merge": (True,)}]
    + [{"prune": (share,)} for share in (0, 1, -0.5, 1.5, 0.001, 0.333, 0.999, float("nan"), float("inf"))],
)
def test_what_cannot_be_skipped(options):
    with pytest.raises(ValueError, match=r"merge=.* must be whole numbers above 0, and prune=.* whole percents"):
        next(skip(Blocks.from_depths("a", 5), **options))


def test_skips_of_every_anchor():
    """Each anchor alone, then the routes of each; no route joins two."""
    routes = list(family([Blocks.from_depths("a", 3), Blocks.from_depths("b", 4)], "skip"))
    assert names(routes) == ["a[:]", "b[:]", "a[:1] + a[3:]", "b[:2] + b[4:]", "b[:1] + b[3:]", "b[:1] + b[4:]"]


def test_spread_by_hand():
    """Four parts of the range from 0 to 40; the stitches that others have not trained come first."""
    macs = {
        "a[:1] + a[3:]": 0.0,  # the cheapest is the first part's only one
        "a[:2] + a[4:]": 12.0,  # new, one stitch
        "a[:1] + a[3:3] + a[5:]": 13.0,  # half of it is known
        "a[:4] + a[6:]": 31.0,
        "a[:4] + a[6:6] + a[8:]": 33.0,  # all new too, but two stitches
        "a[:2] + a[4:7]+ a[9:]": 40.0,
    }
    routes = {Route.parse(text): cost for text, cost in macs.items()}
    assert names(spread(routes, 4))[:2] == ["a[:1] + a[3:]", "a[:2] + a[4:]"]
    assert "a[:4] + a[6:]" in names(spread(routes, 4)) and len(spread(routes, 4)) == 4, "in turn, until there are four"
    assert names(spread(routes, 1)) == ["a[:1] + a[3:]"]
    assert {*spread(routes, 6)} == {*spread(routes, 99)} == {*routes}
    assert spread({}, 3) == [] and len(spread(dict.fromkeys(routes, 7.0), 3)) == 3
    costs = [routes[route] for route in spread(routes, 5)]
    assert costs == sorted(costs)
    with pytest.raises(ValueError, match="max_routes=0 must be at least 1"):
        spread(routes, 0)


def test_spread_uses_many_stitches():
    """Of the 926 routes of twelve blocks sixteen hold all 21 stitches, and cover the range."""
    costs = {route: sum(1.0 for _ in blocks_of(route)) for route in skip(Blocks.from_depths("a", 12, entry=1))}
    chosen = spread(costs, 16)
    assert len({*chosen}) == 16 and stitches(chosen) == stitches(costs)
    assert {costs[route] for route in chosen} >= {min(costs.values()), max(costs.values())}


def blocks_of(route):
    """The blocks that run, and one for each stitch."""
    for segment in route.segments:
        yield from range(segment.start, 13 if segment.stop is None else segment.stop)
    yield from route.stitch_points


def test_stages_from_layouts(anchors):
    """The tiny Swin has stages of 1, 1, 2 and 1 blocks."""
    layouts = [cut.layout for cut in anchors["swin_nhwc"].cuts]
    assert Blocks.from_layouts("swin", layouts).stages == ((1,), (2,), (3, 4), (5,))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("depths", [(5,), (1, 2, 3), (2, 1)])
def test_contract(kind, depths):
    """Every kind: routes that fit, start in the front, end in one of the two, and no route twice."""
    front, end = Blocks.from_depths("a", *depths, entry=1), Blocks.from_depths("b", *depths)
    routes = list(FAMILIES[kind](front, end))
    assert routes and len({*routes}) == len(routes)
    assert {route.segments[0].anchor for route in routes} == {"a"}
    for route in routes:
        assert {segment.anchor for segment in route.segments} == {"a", "b"}
        route.check({"a": sum(depths) + 1, "b": sum(depths)})
        assert Route.parse(str(route)) == route


@pytest.mark.parametrize("kind", WITHIN)
@pytest.mark.parametrize("depths", [(5,), (1, 2, 3), (60, 60)])
def test_contract_within(kind, depths):
    """Every kind: the anchor itself, left and entered later, routes that fit, none twice, the first at once."""
    routes = list(islice(WITHIN[kind](Blocks.from_depths("a", *depths, entry=1)), 1000))
    assert routes and len({*routes}) == len(routes)
    for route in routes:
        assert {segment.anchor for segment in route.segments} == {"a"} and route.stitch_points
        assert all(point.target_cut > point.source_cut > 0 for point in route.stitch_points)
        route.check({"a": sum(depths) + 1})
        assert Route.parse(str(route)) == route


@pytest.mark.parametrize("kind", FAMILIES)
def test_lazy(kind):
    """The first routes of more than anyone could list come at once and take no memory."""
    depth, options = (100, {"stitches": 99}) if kind == "two_way" else (10**12, {})
    tracemalloc.start()
    anchors = [Blocks.from_depths(str(number), depth, entry=1) for number in range(4)]
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
        ({"anchors": [SHALLOW, SHALLOW]}, "must have different names"),
        ({"kind": "skip", "kernel": 2}, r"family 'skip' has no options \['kernel'\]; it takes \['merge', 'prune'"),
        (
            {"kind": "paired", "front": 2},
            r"no options \['front'\]; it takes \['kernel', 'stride', 'overlap', 'share'\]",
        ),
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
            next(rule(SHALLOW, Blocks.from_depths("swin", 2, 2)))
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

    routes = family([Blocks.from_depths("a", 4), Blocks.from_depths("b", 4)], "one_cut")
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
    blocks = [Blocks.from_layouts(anchor.name, [cut.layout for cut in anchor.cuts]) for anchor in anchors]
    assert [len(stage) for each in blocks for stage in each.stages] == [3, 6]
    routes = {*family(blocks), *family(blocks, "two_way", directions="both")}
    assert len(routes) == 2 + 5 + (2 + 2) + (1 + 1), "alone, unpaired, SL and LS, SLS and LSL"
    for route in routes:
        macs, params, *_ = by_hand(route, networks, tokens=17, patch=768, classes=5)
        found = costs(route)
        others = {segment.anchor for segment in route.segments} - {route.segments[0].anchor}
        unused = sum(18 * networks[name][0] for name in others)
        assert found["macs"] == macs and found["params"] in (params, params + unused)


def test_some_of_too_many():
    """Drawn at random: each once, all of them sooner or later, the same for a seed; nothing is listed before."""
    anchor, options = Blocks.from_depths("a", 4, entry=1), {"merge": (2, 3), "prune": (0.5,)}
    every = set(skip(anchor, **options))
    drawn = list(skip(anchor, **options, seed=3))
    assert len(drawn) == len({*drawn}) and {*drawn} == every
    assert drawn == list(skip(anchor, **options, seed=3)) != list(skip(anchor, **options, seed=4))
    many = skip(Blocks.from_depths("a", 60, entry=1), prune=(0.25, 0.5), seed=0)
    assert len({*islice(many, 500)}) == 500
