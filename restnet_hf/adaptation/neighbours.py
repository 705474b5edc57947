"""Routes as genomes: the stitches they take in turn, and which routes are one change of a stitch away. No torch."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from restnet_hf.routes.route import Route, StitchPoint


Genome = tuple[str, str, tuple[StitchPoint, ...]]
"""Whose stitches a route takes, the anchor that it begins with, and its stitches from the image on."""


def genome(route: Route) -> Genome:
    """Of ``a[:2] + b[3:5] + a[6:]``: ``("", "a", (stitch from a 2 to b 3, stitch from b 5 to a 6))``."""
    return route.adapter, route.segments[0].anchor, route.stitch_points


class Neighbours:
    """Which candidates are one change away from a candidate: a stitch more, one fewer, or another one nearby.

    A skip, which leaves an anchor and enters it again, is a stitch as well. All stitches are those of candidates, so
    that a change leads to what there is: where every stitch joins cuts of the same depth, so does every new one.

    Args:
        routes: the candidates.
        reach: by how many cuts each end of a stitch may move.
    """

    def __init__(self, routes: Sequence[Route], reach: int = 2) -> None:
        self._genomes = [genome(route) for route in routes]
        self._numbers = {found: number for number, found in enumerate(self._genomes)}
        self._from: dict[tuple[str, str], list[StitchPoint]] = defaultdict(list)
        for stitch in dict.fromkeys(stitch for *_, stitches in self._genomes for stitch in stitches):
            self._from[stitch.adapter, stitch.source].append(stitch)
        self._reach = reach
        self.of = lru_cache(maxsize=8192)(self._of)  # a search asks for those of its few best routes again and again

    def _of(self, number: int) -> np.ndarray:
        """The numbers of the neighbours of the candidate of that number, (neighbours,)."""
        found = dict.fromkeys(self._numbers.get(changed) for changed in self._changed(self._genomes[number]))
        return np.array([other for other in found if other is not None and other != number], dtype=int)

    def _changed(self, of: Genome) -> Iterator[Genome]:
        """What it may become; some are of no route."""
        adapter, first, stitches = of
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
