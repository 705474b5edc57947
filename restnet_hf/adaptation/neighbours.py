"""Routes as genomes, which list their stitches, and the routes that differ by one change of a stitch. No torch."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from restnet_hf.routes.route import TUNED, Route, StitchPoint


Genome = tuple[str, str, tuple[StitchPoint, ...]]
"""The adapter of a route's stitches, the anchor that it begins with, ``tuned a`` for a tuned one, and its stitches."""


def genome(route: Route) -> Genome:
    """The genome of a route.

    That of ``a[:2] + b[3:5] + a[6:]`` is ``("", "a", (stitch from a 2 to b 3, stitch from b 5 to a 6))``.
    """
    first = route.segments[0].anchor
    return route.adapter, f"{TUNED} {first}" if route.tuned else first, route.stitch_points


class Neighbours:
    """The candidates that differ from a candidate by one change: a stitch more, one fewer, or a similar one instead.

    An anchor alone and the same one with tuned weights are neighbours too.

    A skip, which leaves an anchor and enters it again, is a stitch too. New stitches are taken from other candidates,
    so that changes lead to candidates: where every stitch joins cuts of the same depth, so does every new one.

    Args:
        routes: routes that are candidates.
        reach: largest number of cuts by which each end of a stitch may move.
    """

    def __init__(self, routes: Sequence[Route], reach: int = 2) -> None:
        self._genomes = [genome(route) for route in routes]
        self._numbers = {each: number for number, each in enumerate(self._genomes)}
        self._from: dict[tuple[str, str], list[StitchPoint]] = defaultdict(list)
        for stitch in dict.fromkeys(stitch for *_, stitches in self._genomes for stitch in stitches):
            self._from[stitch.adapter, stitch.source].append(stitch)
        self._reach = reach
        self.of = lru_cache(maxsize=8192)(self._of)  # a search often asks for the same few routes

    def _of(self, number: int) -> np.ndarray:
        """Indices of the neighbours of the candidate with an index, (neighbours,)."""
        numbers = dict.fromkeys(self._numbers.get(changed) for changed in self._changed(self._genomes[number]))
        return np.array([other for other in numbers if other is not None and other != number], dtype=int)

    def _changed(self, original: Genome) -> Iterator[Genome]:
        """Genomes that differ by one change; some belong to no route."""
        adapter, first, stitches = original
        if not stitches:
            own = first.removeprefix(f"{TUNED} ")
            yield adapter, f"{TUNED} {own}" if own == first else own, ()
        for place in range(len(stitches) + 1):
            before, after = stitches[:place], stitches[place:]
            anchor, cut = (before[-1].target, before[-1].target_cut) if before else (first, 0)
            yield adapter, first, before
            if after:
                yield adapter, first if before else after[0].target, (*before, *after[1:])
            for stitch in self._from[adapter, anchor]:
                if stitch.source_cut >= cut:
                    yield adapter, first, (*before, stitch, *after)
                    if after and self._near(stitch, after[0]):
                        yield adapter, first, (*before, stitch, *after[1:])

    def _near(self, one: StitchPoint, other: StitchPoint) -> bool:
        moved = abs(one.source_cut - other.source_cut), abs(one.target_cut - other.target_cut)
        return one.target == other.target and max(moved) <= self._reach
