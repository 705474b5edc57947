"""FAMILIES: the routes by which published methods join anchors, enumerated one at a time. No torch."""

import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import chain, combinations, pairwise
from typing import Any

from restnet_hf.routes.blocks import Blocks
from restnet_hf.routes.profile import Budget
from restnet_hf.routes.route import Route, Segment


def one_cut(front: Blocks, end: Blocks) -> Iterator[Route]:
    """Every route from the end of a block in ``front`` to that of one in ``end`` (ReStNet, arXiv 2506.09066)."""
    for stop in chain.from_iterable(front.stages):
        for start in chain.from_iterable(end.stages):
            yield _joined(front, stop, end, start)


def paired(
    front: Blocks, end: Blocks, kernel: int = 2, stride: int = 1, overlap: bool = True, share: bool = True
) -> Iterator[Route]:
    """A window slides over both anchors, and its blocks are joined in every way (SN-Net, arXiv 2302.06586, section 3).

    Blocks 0 to j of ``front`` and k to the last of ``end`` run, for all j and k in a window.

    Args:
        front: blocks of the anchor in which routes start.
        end: blocks of the anchor in which routes end, with stages as deep as those of ``front``.
        kernel: number of blocks in a window.
        stride: number of blocks that the window moves each time.
        overlap: whether to include routes with j >= k, so that ``end`` starts at a depth that ``front`` has run.
            SN-Net keeps these for DeiT and leaves them out for Swin.
        share: whether to use one stitch for each window, as in the paper, and not one for each pair of cuts. Routes
            into the very first block always have their own, since its input may have another layout.

    Raises:
        ValueError: the stages are not equally deep, or ``kernel`` or ``stride`` is below 1.
    """
    if kernel < 1 or stride < 1:
        raise ValueError(f"kernel={kernel} and stride={stride} must be at least 1")
    for stage, depth, other in _stages(front, end):
        if depth != other:
            raise ValueError(
                f"paired: stage {stage + 1} has {depth} blocks in '{front.anchor}' and {other} in '{end.anchor}'; "
                "use unpaired, or nearest, which chooses the one that fits"
            )
        yield from _entered(front, end, stage, _windows(depth, kernel, stride, overlap), share)


def unpaired(front: Blocks, end: Blocks, share: bool = True) -> Iterator[Route]:
    """Each block of the deeper anchor is joined to one of the other by nearest interpolation (SN-Net).

    For stages of a and b blocks, a <= b, block i of the deeper is joined to block floor(i * a / b) of the other.
    Blocks 0 to j of ``front`` and k to the last of ``end`` run. Where k is the first of its stage the route is left
    out, unless it is the very first and ``end`` has an entry. With ``share``, a block of ``front`` has one stitch, as
    in the paper.

    Raises:
        ValueError: the anchors have different numbers of stages.
    """
    for stage, depth, other in _stages(front, end):
        deeper = range(max(depth, other))
        places = ((i, i * other // depth) if depth > other else (i * depth // other, i) for i in deeper)
        yield from _entered(front, end, stage, ((j, k, j) for j, k in places), share)


def nearest(
    front: Blocks, end: Blocks, kernel: int = 2, stride: int = 1, overlap: bool = True, share: bool = True
) -> Iterator[Route]:
    """Stage by stage `paired` where both are equally deep and `unpaired` where not: all of SN-Net's rules in one."""
    for stage, depth, other in _stages(front, end):
        one, two = (Blocks(b.anchor, (b.stages[stage],), b.cut_before(stage, 0)) for b in (front, end))
        yield from paired(one, two, kernel, stride, overlap, share) if depth == other else unpaired(one, two, share)


def two_way(front: Blocks, end: Blocks, stitches: int = 2) -> Iterator[Route]:
    """Routes that start in ``front`` and change anchors at places of equal depth (SN-Netv2, arXiv 2307.00154).

    With a small anchor S in front of a large one L these are SL and SLS, the other way round LS and LSL; `family` with
    ``directions="both"`` gives all four. For stages of a and b blocks, a <= b, the end of block i of the shallower is
    joined to that of block floor(i * b / a) of the deeper, counted from 1. No route changes anchors at the end of the
    last stages, where only a head would follow.

    Args:
        front: blocks of the anchor in which routes start.
        end: blocks of the other anchor.
        stitches: most stitches in a route; routes with few come first.

    Raises:
        ValueError: the anchors have different numbers of stages, or ``stitches`` is below 1.
    """
    if stitches < 1:
        raise ValueError(f"stitches={stitches} must be at least 1")
    places = [
        (
            front.stages[stage][i * depth // min(depth, other) - 1],
            end.stages[stage][i * other // min(depth, other) - 1],
        )
        for stage, depth, other in _stages(front, end)
        for i in range(1, min(depth, other) + 1)
    ]
    names = (front.anchor, end.anchor)
    for count in range(1, stitches + 1):
        for chosen in combinations(places[:-1], count):
            segments, start = [], 0
            for turn, place in enumerate(chosen):
                segments.append(Segment(names[turn % 2], start, place[turn % 2]))
                start = place[1 - turn % 2]
            yield Route((*segments, Segment(names[count % 2], start)))


def skip(
    anchor: Blocks,
    merge: Collection[int] = (2, 3),
    prune: Collection[float] = (),
    prunable: Mapping[str, Collection[int]] | None = None,
    seed: int | None = None,
) -> Iterator[Route]:
    """Routes that leave an anchor and enter it again later (AdaptiveNet, arXiv 2303.07129).

    Each block runs as it is, or is replaced together with its neighbours by one stitch, or alone by a stitch that is a
    pruned copy of it. For n blocks and ``merge=(2, 3)`` these are the compositions of n into parts of 1, 2 and 3:
    10,609 for 16 blocks. The first block is never replaced where the anchor has no entry.

    Args:
        anchor: blocks of the anchor.
        merge: numbers of neighbouring blocks that a stitch may replace, in the order of the routes.
        prune: shares of the hidden channels to remove from copies, in whole percents; their stitches are called
            ``prune25_3`` and so on, with the cut before the block.
        prunable: cuts before the blocks that can be pruned, by anchor; all by default.
        seed: seed to draw routes at random, each once; None for all routes in order, which may be too many.

    Raises:
        ValueError: a number is out of range.
    """
    percents = [round(100 * share) if 0 < share < 1 else 0 for share in prune]
    whole = all(0 < n < 100 and abs(100 * share - n) < 1e-6 for n, share in zip(percents, prune, strict=True))
    if not whole or not all(type(width) is int and width > 0 for width in merge):
        raise ValueError(
            f"merge={merge} must be whole numbers above 0, and prune={prune} whole percents between 0 and 1, as 0.25"
        )
    cuts = [*([anchor.entry] if anchor.entry else []), *chain.from_iterable(anchor.stages)]
    jumps: dict[int, list[tuple[int, str]]] = {}  # for each cut, where a stitch may lead and its name
    for index, cut in enumerate(cuts):
        pruned = (
            percents if index + 1 < len(cuts) and (prunable is None or cut in prunable.get(anchor.anchor, ())) else ()
        )
        jumps[cut] = [(cuts[index + width], "") for width in dict.fromkeys(merge) if index + width < len(cuts)]
        jumps[cut] += [(cuts[index + 1], f"{PRUNED}{percent}_{cut}") for percent in dict.fromkeys(pruned)]
    for taken in _all_paths(cuts, jumps, 0) if seed is None else _random_paths(cuts, jumps, seed):
        if taken:
            starts = [0, *(target for _, target, _ in taken)]
            stops = [*(source for source, _, _ in taken), None]
            segments = tuple(Segment(anchor.anchor, *both) for both in zip(starts, stops, strict=True))
            yield Route(segments, via=tuple(via for *_, via in taken))


def pruned_share(via: str) -> float:
    """The share of hidden channels, from 0 to 1, that a stitch of that name removes."""
    match = PRUNED_BY.fullmatch(via)
    return int(match[1]) / 100 if match else 0.0


def _all_paths(cuts: Sequence[int], jumps: Mapping[int, list[tuple[int, str]]], index: int) -> Iterator[list[Any]]:
    """Every path from a cut to the end, as its jumps (source, target, name); the one without any comes first."""
    if index == len(cuts):
        yield []
        return
    yield from _all_paths(cuts, jumps, index + 1)
    for target, via in jumps[cuts[index]]:
        for rest in _all_paths(cuts, jumps, cuts.index(target)):
            yield [(cuts[index], target, via), *rest]


def _random_paths(cuts: Sequence[int], jumps: Mapping[int, list[tuple[int, str]]], seed: int) -> Iterator[list[Any]]:
    """Paths at random, each once, until a thousand draws in a row are repeats."""
    rng, drawn, repeats = random.Random(seed), set[tuple[Any, ...]](), 0
    while repeats < 1000:
        index, taken = 0, []
        while index < len(cuts):
            target, via = rng.choice([(0, ""), *jumps[cuts[index]]])
            taken += [(cuts[index], target, via)] if target else []
            index = cuts.index(target) if target else index + 1
        repeats = repeats + 1 if tuple(taken) in drawn else 0
        if not repeats:
            drawn.add(tuple(taken))
            yield taken


PRUNED = "prune"
PRUNED_BY = re.compile(rf"{PRUNED}(\d\d?)_\d+")
Rule = Callable[..., Iterator[Route]]  # takes a front, an end and options, or one anchor and options

FAMILIES: dict[str, Rule] = {
    "one_cut": one_cut,
    "paired": paired,
    "unpaired": unpaired,
    "nearest": nearest,
    "two_way": two_way,
}
WITHIN: dict[str, Rule] = {"skip": skip}  # the families of one anchor
PAIRS: dict[str, Callable[[Sequence[Blocks]], Iterator[tuple[Blocks, Blocks]]]] = {
    "adjacent": pairwise,
    "any": lambda anchors: combinations(anchors, 2),
}
DIRECTIONS: dict[str, Callable[[Blocks, Blocks], tuple[tuple[Blocks, Blocks], ...]]] = {
    "up": lambda small, large: ((small, large),),
    "down": lambda small, large: ((large, small),),
    "both": lambda small, large: ((small, large), (large, small)),
}


def family(
    anchors: Iterable[Blocks], kind: str = "nearest", pairs: str = "adjacent", directions: str = "up", **options: Any
) -> Iterator[Route]:
    """Every anchor alone, then the routes that join two of them or skip blocks of one, generated lazily.

    Args:
        anchors: blocks of each anchor, from the cheapest to the most expensive.
        kind: key of `FAMILIES`, which join two anchors, or of `WITHIN`, which skip blocks of one.
        pairs: key of `PAIRS`; ``adjacent`` joins only neighbours in cost (SN-Net's nearest stitching).
        directions: key of `DIRECTIONS`; ``up`` starts in the cheaper of two anchors, ``down`` in the other.
        **options: options of that kind of family.

    Raises:
        ValueError: a key or an option is unknown, or two anchors have the same name.
    """
    choices: dict[str, tuple[str, Mapping[str, object]]] = {
        "kind": (kind, {**FAMILIES, **WITHIN}),
        "pairs": (pairs, PAIRS),
        "directions": (directions, DIRECTIONS),
    }
    for name, (choice, table) in choices.items():
        if choice not in table:
            raise ValueError(f"{name}={choice!r} is not one of {sorted(table)}")
    rule = {**FAMILIES, **WITHIN}[kind]
    allowed = [name for name in signature(rule).parameters if name not in ("front", "end", "anchor")]
    unknown = sorted(options.keys() - {*allowed})
    if unknown:
        raise ValueError(f"family {kind!r} has no options {unknown}; it takes {allowed}")
    members = tuple(anchors)
    names = [blocks.anchor for blocks in members]
    if len({*names}) < len(names):
        raise ValueError(f"the anchors {names} must have different names")
    alone = (blocks.alone() for blocks in members)
    if kind in WITHIN:
        return chain(alone, *(rule(blocks, **options) for blocks in members))
    joined = (both for pair in PAIRS[pairs](members) for both in DIRECTIONS[directions](*pair))
    routes = chain.from_iterable(rule(front, end, **options) for front, end in joined)
    return chain(alone, routes)


def within_budget(
    routes: Iterable[Route], costs: Callable[[Route], Mapping[str, float]], budget: Budget
) -> Iterator[Route]:
    """Yield the routes that a budget allows, one at a time.

    Args:
        routes: routes to filter, such as those of `family`.
        costs: function that returns the costs of a route, such as a model's ``route_costs()``.
        budget: limits on those costs.

    Raises:
        BudgetError: a cost that is limited is not among those costs.
    """
    for route in routes:
        found = costs(route)
        budget.check_costs(found)
        if budget.allows(found):
            yield route


def _joined(front: Blocks, stop: int, end: Blocks, start: int, via: str = "") -> Route:
    return Route((Segment(front.anchor, 0, stop), Segment(end.anchor, start)), via=(via,))


def _stages(front: Blocks, end: Blocks) -> Iterator[tuple[int, int, int]]:
    """Yield the index of each stage and the number of blocks it has in both anchors."""
    if len(front.stages) != len(end.stages):
        raise ValueError(
            f"'{front.anchor}' has {len(front.stages)} stages and '{end.anchor}' {len(end.stages)}; give equally many "
            "of both, with stages that belong together in the same order"
        )
    for stage, (one, two) in enumerate(zip(front.stages, end.stages, strict=True)):
        yield stage, len(one), len(two)


def _windows(depth: int, kernel: int, stride: int, overlap: bool) -> Iterator[tuple[int, int, int]]:
    """Yield every pair of blocks in a window once, with the window's first block; the last window may be shorter."""
    done = 0  # pairs of blocks below this number were in the window before
    for start in range(0, depth, stride):
        window = range(start, min(start + kernel, depth))
        for j in window:
            for k in window:
                if max(j, k) >= done and (overlap or j < k):
                    yield j, k, start
        done = window.stop


def _entered(
    front: Blocks, end: Blocks, stage: int, places: Iterable[tuple[int, int, int]], share: bool
) -> Iterator[Route]:
    """Yield a route for each last block of ``front`` and first block of ``end``, if there is a cut before the latter.

    The third number of a place is a block of ``front`` that names the stitch that routes share.
    """
    for j, k, group in places:
        start = end.cut_before(stage, k)
        if start:
            shared = f"w{front.stages[stage][group]}" if share and k else ""
            yield _joined(front, front.stages[stage][j], end, start, shared)
