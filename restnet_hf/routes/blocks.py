"""Where the blocks of an anchor end, stage by stage. No torch."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from restnet_hf.routes.route import Route


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
        return Route.alone(self.anchor)

    def before(self, stage: int, block: int) -> int:
        """The cut that a block takes, both counted from 0; 0 where there is none."""
        if block:
            return self.stages[stage][block - 1]
        return 0 if stage else self.entry  # between stages the activation changes its shape
