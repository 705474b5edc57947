"""FAMILIES: the routes that published methods join anchors by, enumerated one at a time; no torch."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, groupby, pairwise

from restnet_hf.profiles import Budget
from restnet_hf.routes import Route, Segment


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of an anchor end, stage by stage.

    Args:
        anchor: its name.
        stages: the numbers of the cuts at which the blocks end, in order; a network without stages is one stage.
            Stages that are not joined at all may be left out at the end.
        entry: the cut that the first block takes, such as a transformer's embedding; 0 where there is none, since a
            stitch cannot make an image, and routes that would enter there are left out.

    Raises:
        ValueError: a stage is empty, or cuts do not go up from ``entry``.
    """

    anchor: str
    stages: tuple[Sequence[int], ...]
    entry: int = 0

    def __post_init__(self) -> None:
        before = self.entry
        for stage in self.stages:
            # a range goes up by itself, and may be too long to look at
            rises = stage.step > 0 if isinstance(stage, range) else all(a < b for a, b in pairwise(stage))
            if not stage or not rises or stage[0] <= before:
                raise ValueError(
                    f"'{self.anchor}': the stages {self.stages} must hold numbers of cuts that go up from {before}"
                )
            before = stage[-1]
        if not self.stages or self.entry < 0:
            raise ValueError(f"'{self.anchor}' needs at least one stage, and an entry of at least 0, not {self.entry}")

    @classmethod
    def of(cls, anchor: str, *depths: int, entry: int = 0) -> "Blocks":
        """Of stages with so many blocks, which end in the cuts after ``entry``: ``Blocks.of("swin", 2, 2, 6, 2)``."""
        ends = [entry + sum(depths[:index]) for index in range(len(depths) + 1)]
        return cls(anchor, tuple(range(start + 1, stop + 1) for start, stop in pairwise(ends)), entry)

    @classmethod
    def alike(cls, anchor: str, layouts: Iterable[Hashable]) -> "Blocks":
        """Of a network all of whose cuts end blocks; neighbours with equal layouts are a stage.

        Args:
            anchor: its name.
            layouts: of its cuts, cut 1 first: ``[cut.layout for cut in anchor.cuts]``.
        """
        stages = groupby(enumerate(layouts, 1), key=lambda cut: cut[1])
        return cls(anchor, tuple(tuple(number for number, _ in stage) for _, stage in stages))

    def alone(self) -> Route:
        """The anchor by itself."""
        return Route((Segment(self.anchor),))

    def before(self, stage: int, block: int) -> int:
        """The cut that a block takes, both counted from 0; 0 where there is none."""
        if block:
            return self.stages[stage][block - 1]
        return 0 if stage else self.entry  # between stages the activation changes its shape


def one_cut(front: Blocks, end: Blocks) -> Iterator[Route]:
    """Every route from the end of a block to the end of a block (ReStNet, arXiv 2506.09066)."""
    for stop in chain.from_iterable(front.stages):
        for start in chain.from_iterable(end.stages):
            yield _joined(front, stop, end, start)


def paired(front: Blocks, end: Blocks, kernel: int = 2, stride: int = 1, overlap: bool = True) -> Iterator[Route]:
    """A window slides over both anchors, and its blocks are joined in every way (SN-Net, arXiv 2302.06586, section 3).

    Blocks 0 to j of ``front`` and k to the last of ``end`` run, for all j and k in a window.

    Args:
        front: where routes start.
        end: where they end; its stages are as deep.
        kernel: blocks in a window.
        stride: how far it moves.
        overlap: also where j >= k, so that ``end`` starts at a depth that ``front`` has run. SN-Net keeps these for
            DeiT and leaves them out for Swin.

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
        yield from _entered(front, end, stage, _windows(depth, kernel, stride, overlap))


def unpaired(front: Blocks, end: Blocks) -> Iterator[Route]:
    """Each block of the deeper anchor is joined to the one at its place in the other (SN-Net, nearest interpolation).

    Of stages of a and b blocks, a <= b, block i of the deeper belongs to floor(i * a / b) of the other. Blocks 0 to j
    of ``front`` and k to the last of ``end`` run. Where k is the first of its stage the route is left out, unless it
    is the first of all and ``end`` has an entry.

    Raises:
        ValueError: the anchors have not equally many stages.
    """
    for stage, depth, other in _stages(front, end):
        deeper = range(max(depth, other))
        places = ((i, i * other // depth) if depth > other else (i * depth // other, i) for i in deeper)
        yield from _entered(front, end, stage, places)


def nearest(front: Blocks, end: Blocks, kernel: int = 2, stride: int = 1, overlap: bool = True) -> Iterator[Route]:
    """Stage by stage `paired` where both are equally deep and `unpaired` where not: all of SN-Net's rules in one."""
    for stage, depth, other in _stages(front, end):
        one, two = (Blocks(b.anchor, (b.stages[stage],), b.before(stage, 0)) for b in (front, end))
        yield from paired(one, two, kernel, stride, overlap) if depth == other else unpaired(one, two)


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


Rule = Callable[..., Iterator[Route]]  # of a front, an end and options

FAMILIES: dict[str, Rule] = {
    "one_cut": one_cut,
    "paired": paired,
    "unpaired": unpaired,
    "nearest": nearest,
    "two_way": two_way,
}
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
    anchors: Iterable[Blocks], kind: str = "nearest", pairs: str = "adjacent", directions: str = "up", **options: int
) -> Iterator[Route]:
    """Every anchor alone, then the routes that join two of them; each is made when it is asked for.

    Args:
        anchors: from the cheapest to the dearest.
        kind: a key of `FAMILIES`: how two anchors are joined.
        pairs: a key of `PAIRS`: ``adjacent`` joins neighbours in cost alone (SN-Net's nearest stitching).
        directions: a key of `DIRECTIONS`: ``up`` starts in the cheaper of two anchors, ``down`` in the dearer.
        **options: of that kind.

    Raises:
        ValueError: a key is unknown, or two anchors have the same name.
    """
    known: dict[str, tuple[str, Mapping[str, object]]] = {
        "kind": (kind, FAMILIES),
        "pairs": (pairs, PAIRS),
        "directions": (directions, DIRECTIONS),
    }
    for name, (given, table) in known.items():
        if given not in table:
            raise ValueError(f"{name}={given!r} is not one of {sorted(table)}")
    members = tuple(anchors)
    names = [blocks.anchor for blocks in members]
    if len({*names}) < len(names):
        raise ValueError(f"the anchors {names} must have names of their own")
    joined = (both for pair in PAIRS[pairs](members) for both in DIRECTIONS[directions](*pair))
    routes = chain.from_iterable(FAMILIES[kind](front, end, **options) for front, end in joined)
    return chain((blocks.alone() for blocks in members), routes)


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


def _joined(front: Blocks, stop: int, end: Blocks, start: int) -> Route:
    return Route((Segment(front.anchor, 0, stop), Segment(end.anchor, start)))


def _stages(front: Blocks, end: Blocks) -> Iterator[tuple[int, int, int]]:
    """Number of each stage, and how many blocks it has in both anchors."""
    if len(front.stages) != len(end.stages):
        raise ValueError(
            f"'{front.anchor}' has {len(front.stages)} stages and '{end.anchor}' {len(end.stages)}; give as many of "
            "both, the ones that belong together in the same order"
        )
    for stage, (one, two) in enumerate(zip(front.stages, end.stages, strict=True)):
        yield stage, len(one), len(two)


def _windows(depth: int, kernel: int, stride: int, overlap: bool) -> Iterator[tuple[int, int]]:
    """Every pair of blocks that a window holds, each once; the last windows may be cut short."""
    known = 0  # blocks below it that are in this window were together in the one before
    for start in range(0, depth, stride):
        window = range(start, min(start + kernel, depth))
        for j in window:
            for k in window:
                if max(j, k) >= known and (overlap or j < k):
                    yield j, k
        known = window.stop


def _entered(front: Blocks, end: Blocks, stage: int, places: Iterable[tuple[int, int]]) -> Iterator[Route]:
    """A route for every last block of ``front`` and first block of ``end``, if there is a cut before it."""
    for j, k in places:
        start = end.before(stage, k)
        if start:
            yield _joined(front, front.stages[stage][j], end, start)
