"""The cuts at which an anchor's blocks end, stage by stage. No torch."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from restnet_hf.routes.route import Route


@dataclass(frozen=True)
class Blocks:
    """The cuts at which an anchor's blocks end, stage by stage.

    Args:
        anchor: name of the anchor.
        stages: numbers of the cuts at which the blocks of each stage end, in order; a network without stages has one.
            Last stages that are not joined at all may be left out.
        entry: cut at the input of the first block, such as a transformer's embedding; 0 where that is the image,
            which no stitch can make, so that routes that would enter there are left out.

    Raises:
        ValueError: a stage is empty, or cuts do not increase from ``entry`` on.
    """

    anchor: str
    stages: tuple[Sequence[int], ...]
    entry: int = 0

    def __post_init__(self) -> None:
        before = self.entry
        for stage in self.stages:
            # a range of positive step increases, and may be too long to walk
            increases = stage.step > 0 if isinstance(stage, range) else all(a < b for a, b in pairwise(stage))
            if not stage or not increases or stage[0] <= before:
                raise ValueError(
                    f"'{self.anchor}': the stages {self.stages} must hold numbers of cuts that increase from {before}"
                )
            before = stage[-1]
        if not self.stages or self.entry < 0:
            raise ValueError(f"'{self.anchor}' needs at least one stage, and an entry of at least 0, not {self.entry}")

    @classmethod
    def from_depths(cls, anchor: str, *depths: int, entry: int = 0) -> "Blocks":
        """Make blocks from the depth of each stage; they end in the cuts after ``entry``.

        Args:
            anchor: name of the anchor.
            *depths: number of blocks in each stage, such as ``2, 2, 6, 2`` for Swin-T.
            entry: cut at the input of the first block.
        """
        ends = [entry + sum(depths[:index]) for index in range(len(depths) + 1)]
        return cls(anchor, tuple(range(start + 1, stop + 1) for start, stop in pairwise(ends)), entry)

    @classmethod
    def from_layouts(cls, anchor: str, layouts: Iterable[Hashable]) -> "Blocks":
        """Make blocks that end at every cut; neighbouring cuts with equal layouts are a stage.

        Args:
            anchor: name of the anchor.
            layouts: layout of each cut, cut 1 first: ``[cut.layout for cut in anchor.cuts]``.
        """
        stages = groupby(enumerate(layouts, 1), key=lambda cut: cut[1])
        return cls(anchor, tuple(tuple(number for number, _ in stage) for _, stage in stages))

    def alone(self) -> Route:
        """The route of the anchor alone."""
        return Route.alone(self.anchor)

    def cut_before(self, stage: int, block: int) -> int:
        """The cut at the input of a block, both counted from 0; 0 where there is none."""
        if block:
            return self.stages[stage][block - 1]
        return 0 if stage else self.entry  # between stages the activation changes its shape
