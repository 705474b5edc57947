"""FAMILIES: the routes that published methods join anchors by, enumerated one at a time; no torch."""

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
    """Every route from the end of a block to the end of a block (ReStNet, arXiv 2506.09066)."""
    for stop in chain.from_iterable(front.stages):
        for start in chain.from_iterable(end.stages):
            yield _joined(front, stop, end, start)


def paired(
    front: Blocks, end: Blocks, kernel: int = 2, stride: int = 1, overlap: bool = True, share: bool = True
) -> Iterator[Route]:
    """A window slides over both anchors, and its blocks are joined in every way (SN-Net, arXiv 2302.06586, section 3).

    Blocks 0 to j of ``front`` and k to the last of ``end`` run, for all j and k in a window.

    Args:
        front: where routes start.
        end: where they end; its stages are as deep.
        kernel: blocks in a window.
        stride: how far it moves.
        overlap: also where j >= k, so that ``end`` starts at a depth that ``front`` has run. SN-Net keeps these for
            DeiT and leaves them out for Swin.
        share: one stitch for each window, as in the paper; else one for each pair of cuts. Routes into the first
            block of all have their own in any case, since its input may have another layout.

    Raises:
        ValueError: the stages are not equally deep, or ``kernel`` or ``stride`` is below 1.
    """
    if kernel < 1 or stride < 1:
        raise ValueError(f"kernel={kernel} and stride={stride} must be at least 1")
    for stage, depth, other in _stages(front, end):
        if depth != other:
            raise ValueError(
                f"paired: stage {stage + 1} has {depth} blocks in '{front.anchor}' and {other} in '{end.anchor}'; "
                "use unpaired, or nearest, which takes whichever fits"
            )
        yield from _entered(front, end, stage, _windows(depth, kernel, stride, overlap), share)


def unpaired(front: Blocks, end: Blocks, share: bool = True) -> Iterator[Route]:
    """Each block of the deeper anchor is joined to the one at its place in the other (SN-Net, nearest interpolation).

    Of stages of a and b blocks, a <= b, block i of the deeper belongs to floor(i * a / b) of the other. Blocks 0 to j
    of ``front`` and k to the last of ``end`` run. Where k is the first of its stage the route is left out, unless it
    is the first of all and ``end`` has an entry. With ``share``, a block of ``front`` has one stitch, as in the paper.

    Raises:
        ValueError: the anchors have not equally many stages.
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
        one, two = (Blocks(b.anchor, (b.stages[stage],), b.before(stage, 0)) for b in (front, end))
        yield from paired(one, two, kernel, stride, overlap, share) if depth == other else unpaired(one, two, share)


def two_way(front: Blocks, end: Blocks, stitches: int = 2) -> Iterator[Route]:
    """Routes that start in ``front`` and change anchors at places of equal depth (SN-Netv2, arXiv 2307.00154).

    With a small anchor S in front of a large one L these are SL and SLS, the other way round LS and LSL; `family` with
    ``directions="both"`` gives all four. Of stages of a and b blocks, a <= b, the end of block i of the shallower
    meets that of block floor(i * b / a) of the deeper, counted from 1. Where the last stages end no route changes:
    only a head would follow.

    Args:
        front: where routes start.
        end: the other anchor.
        stitches: how many at most; routes with few come first.

    Raises:
        ValueError: the anchors have not equally many stages, or ``stitches`` is below 1.
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

    Each block runs as it is, or so many neighbours are left out together and a stitch takes their place, or the stitch
    takes the place of one block alone and is a pruned copy of it. Of n blocks and ``merge=(2, 3)`` these are the
    compositions of n into parts of 1, 2 and 3: 10,609 of 16. Nothing takes the place of the first block where the
    anchor has no entry.

    Args:
        anchor: whose blocks they are.
        merge: how many neighbours a stitch may stand for, in the order in which routes come.
        prune: shares of the hidden channels that copies go without, in whole percents; their stitches are called
            ``prune25_3`` and so on, with the cut before the block.
        prunable: the cuts before the blocks that can be pruned, by anchor; all by default.
        seed: draw routes at random, each once, in place of all in order, of which there may be too many.

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
    ways: dict[int, list[tuple[int, str]]] = {}  # of each place, where a stitch may lead and its name
    for index, cut in enumerate(cuts):
        pruned = (
            percents if index + 1 < len(cuts) and (prunable is None or cut in prunable.get(anchor.anchor, ())) else ()
        )
        ways[cut] = [(cuts[index + width], "") for width in dict.fromkeys(merge) if index + width < len(cuts)]
        ways[cut] += [(cuts[index + 1], f"{PRUNED}{percent}_{cut}") for percent in dict.fromkeys(pruned)]
    for taken in _jumps(cuts, ways, 0) if seed is None else _drawn(cuts, ways, seed):
        if taken:
            starts = [0, *(target for _, target, _ in taken)]
            stops = [*(source for source, _, _ in taken), None]
            segments = tuple(Segment(anchor.anchor, *both) for both in zip(starts, stops, strict=True))
            yield Route(segments, via=tuple(via for *_, via in taken))


def pruned_share(via: str) -> float:
    """The share of hidden channels that a stitch of that name goes without, from 0 to 1."""
    said = PRUNED_BY.fullmatch(via)
    return int(said[1]) / 100 if said else 0.0


def _jumps(cuts: Sequence[int], ways: Mapping[int, list[tuple[int, str]]], index: int) -> Iterator[list[Any]]:
    """Every way on from a place, as its jumps (source, target, name); the one without any comes first."""
    if index == len(cuts):
        yield []
        return
    yield from _jumps(cuts, ways, index + 1)
    for target, via in ways[cuts[index]]:
        for rest in _jumps(cuts, ways, cuts.index(target)):
            yield [(cuts[index], target, via), *rest]


def _drawn(cuts: Sequence[int], ways: Mapping[int, list[tuple[int, str]]], seed: int) -> Iterator[list[Any]]:
    """Some of these at random, each once, until a thousand draws in a row bring nothing new."""
    dice, known, old = random.Random(seed), set[tuple[Any, ...]](), 0
    while old < 1000:
        index, taken = 0, []
        while index < len(cuts):
            target, via = dice.choice([(0, ""), *ways[cuts[index]]])
            taken += [(cuts[index], target, via)] if target else []
            index = cuts.index(target) if target else index + 1
        old = old + 1 if tuple(taken) in known else 0
        if not old:
            known.add(tuple(taken))
            yield taken


PRUNED = "prune"
PRUNED_BY = re.compile(rf"{PRUNED}(\d\d?)_\d+")
Rule = Callable[..., Iterator[Route]]  # of a front, an end and options, or of one anchor and options

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
    """Every anchor alone, then the routes that join two of them or skip blocks of one; each is made when asked for.

    Args:
        anchors: from the cheapest to the dearest.
        kind: a key of `FAMILIES`: how two anchors are joined; or of `WITHIN`: what is left out of each.
        pairs: a key of `PAIRS`: ``adjacent`` joins neighbours in cost alone (SN-Net's nearest stitching).
        directions: a key of `DIRECTIONS`: ``up`` starts in the cheaper of two anchors, ``down`` in the dearer.
        **options: of that kind.

    Raises:
        ValueError: a key or an option is unknown, or two anchors have the same name.
    """
    known: dict[str, tuple[str, Mapping[str, object]]] = {
        "kind": (kind, {**FAMILIES, **WITHIN}),
        "pairs": (pairs, PAIRS),
        "directions": (directions, DIRECTIONS),
    }
    for name, (given, table) in known.items():
        if given not in table:
            raise ValueError(f"{name}={given!r} is not one of {sorted(table)}")
    rule = {**FAMILIES, **WITHIN}[kind]
    taken = [name for name in signature(rule).parameters if name not in ("front", "end", "anchor")]
    strange = sorted(options.keys() - {*taken})
    if strange:
        raise ValueError(f"family {kind!r} has no options {strange}; it takes {taken}")
    members = tuple(anchors)
    names = [blocks.anchor for blocks in members]
    if len({*names}) < len(names):
        raise ValueError(f"the anchors {names} must have names of their own")
    alone = (blocks.alone() for blocks in members)
    if kind in WITHIN:
        return chain(alone, *(rule(blocks, **options) for blocks in members))
    joined = (both for pair in PAIRS[pairs](members) for both in DIRECTIONS[directions](*pair))
    routes = chain.from_iterable(rule(front, end, **options) for front, end in joined)
    return chain(alone, routes)


def within_budget(
    routes: Iterable[Route], costs: Callable[[Route], Mapping[str, float]], budget: Budget
) -> Iterator[Route]:
    """Those routes that fit, one at a time.

    Args:
        routes: such as from `family`.
        costs: of a route; a model's ``route_costs()``.
        budget: limits on those costs.
    """
    for route in routes:
        found = costs(route)
        if all(found[cost] <= limit for cost, limit in budget.limits.items()):
            yield route


def _joined(front: Blocks, stop: int, end: Blocks, start: int, via: str = "") -> Route:
    return Route((Segment(front.anchor, 0, stop), Segment(end.anchor, start)), via=(via,))


def _stages(front: Blocks, end: Blocks) -> Iterator[tuple[int, int, int]]:
    """Number of each stage, and how many blocks it has in both anchors."""
    if len(front.stages) != len(end.stages):
        raise ValueError(
            f"'{front.anchor}' has {len(front.stages)} stages and '{end.anchor}' {len(end.stages)}; give as many of "
            "both, the ones that belong together in the same order"
        )
    for stage, (one, two) in enumerate(zip(front.stages, end.stages, strict=True)):
        yield stage, len(one), len(two)


def _windows(depth: int, kernel: int, stride: int, overlap: bool) -> Iterator[tuple[int, int, int]]:
    """Every pair of blocks that a window holds, each once, with the window's first; the last may be cut short."""
    known = 0  # blocks below it that are in this window were together in the one before
    for start in range(0, depth, stride):
        window = range(start, min(start + kernel, depth))
        for j in window:
            for k in window:
                if max(j, k) >= known and (overlap or j < k):
                    yield j, k, start
        known = window.stop


def _entered(
    front: Blocks, end: Blocks, stage: int, places: Iterable[tuple[int, int, int]], share: bool
) -> Iterator[Route]:
    """A route for every last block of ``front`` and first block of ``end``, if there is a cut before it.

    The third number is a block of ``front`` by which stitches that are shared are called.
    """
    for j, k, group in places:
        start = end.before(stage, k)
        if start:
            shared = f"w{front.stages[stage][group]}" if share and k else ""
            yield _joined(front, front.stages[stage][j], end, start, shared)
