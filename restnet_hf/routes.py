"""Routes: which part of which anchor runs, in which order. Written and parsed the way Python slices; no torch."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise


ANCHOR_NAME = re.compile(r"[A-Za-z0-9_-]+")
ADAPTER = re.compile(rf"\s*({ANCHOR_NAME.pattern}):(.*)", re.S)
SEGMENT = re.compile(rf"({ANCHOR_NAME.pattern})\[([^:\[\]]*):([^:\[\]]*)\]")
EXAMPLE = "write it like 'resnet50[:7] + mobilenetv2[11:]', or 'resnet50[:]' for an anchor alone"


@dataclass(frozen=True, order=True)
class Segment:
    """The part of ``anchor`` from cut ``start`` (0 is the image) to cut ``stop`` (None is the logits)."""

    anchor: str
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return f"{self.anchor}[{self.start or ''}:{'' if self.stop is None else self.stop}]"


@dataclass(frozen=True, order=True)
class StitchPoint:
    """Where a stitch sits: it reads the activation at cut ``source_cut`` and replaces the one at ``target_cut``.

    Stitches of several adapters may sit at the same place; ``adapter`` names the set, and is empty for the first.
    """

    source: str
    source_cut: int
    target: str
    target_cut: int
    adapter: str = ""

    @property
    def name(self) -> str:
        """A name without dots, fit for a module key, such as ``resnet50_7__mobilenetv2_11``."""
        return of_adapter(self.adapter, f"{self.source}_{self.source_cut}__{self.target}_{self.target_cut}")


def of_adapter(adapter: str, key: str) -> str:
    """The key of a module of a named adapter; no anchor's name holds a colon."""
    return f"{adapter}:{key}" if adapter else key


@dataclass(frozen=True, order=True)
class Route:
    """A way from image to logits: segments with a stitch between neighbours; an anchor alone is one segment.

    ``adapter`` names whose stitches and head it uses where a model holds several sets on the same anchors. It stands
    in front, ``night: resnet50[:7] + mobilenetv2[11:]``, and is empty for the first set.

    Raises ValueError when the segments do not lead from an image to logits.
    """

    segments: tuple[Segment, ...]
    adapter: str = ""

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError(f"a route needs at least one segment: {EXAMPLE}")
        if self.segments[0].start != 0 or self.segments[-1].stop is not None:
            raise ValueError(f"route '{self}' must start at an image, 'front[:i]', and end in logits, 'end[j:]'")
        for left, right in pairwise(self.segments):
            if left.stop is None or right.start == 0:
                raise ValueError(
                    f"route '{self}': between '{left}' and '{right}' both must name a cut, 'a[:i] + b[j:]'"
                )
        for segment in self.segments:
            if segment.start < 0 or (segment.stop is not None and segment.stop <= segment.start):
                raise ValueError(
                    f"route '{self}': segment '{segment}' holds no block; its stop must be above its start"
                )

    @classmethod
    def parse(cls, text: str, cut_number: Callable[[str, str], int] | None = None) -> "Route":
        """Read a route from its string form.

        Args:
            text: such as ``resnet50[:7] + mobilenetv2[11:]``.
            cut_number: of an anchor's name and a cut's name, the number of that cut; with it, a cut may be given by
                name.

        Raises:
            ValueError: the text does not parse, or names a cut that is not there.
        """

        def number(anchor: str, cut: str) -> int:
            if cut.isdecimal():
                return int(cut)
            if cut_number is None:
                raise ValueError(f"{text!r} is not a route: {cut!r} is not the number of a cut; {EXAMPLE}")
            return cut_number(anchor, cut)

        named = ADAPTER.fullmatch(text)
        adapter, rest = (named[1], named[2]) if named else ("", text)
        segments = []
        for part in rest.split("+"):
            match = SEGMENT.fullmatch(part.strip())
            if match is None:
                raise ValueError(f"{text!r} is not a route; {EXAMPLE}")
            anchor, start, stop = match[1], match[2].strip(), match[3].strip()
            segments.append(
                Segment(anchor, number(anchor, start) if start else 0, number(anchor, stop) if stop else None)
            )
        return cls(tuple(segments), adapter)

    def __str__(self) -> str:
        said = " + ".join(map(str, self.segments))
        return f"{self.adapter}: {said}" if self.adapter else said

    @property
    def head(self) -> str:
        """The key of the new head that it ends in, where the model has new heads."""
        return of_adapter(self.adapter, self.segments[-1].anchor)

    @property
    def stitch_points(self) -> tuple[StitchPoint, ...]:
        """The stitches the route needs, from the image on."""
        return tuple(
            StitchPoint(left.anchor, left.stop, right.anchor, right.start, self.adapter)
            for left, right in pairwise(self.segments)
            if left.stop is not None
        )

    def check(self, depths: Mapping[str, int]) -> "Route":
        """Return the route if it fits anchors with so many cuts; raise ValueError that says what does not."""
        for segment in self.segments:
            if segment.anchor not in depths:
                raise ValueError(f"route '{self}': no anchor named '{segment.anchor}'; there are {sorted(depths)}")
            depth = depths[segment.anchor]
            for cut in (segment.start, segment.stop):
                if cut is not None and cut > depth:
                    raise ValueError(f"route '{self}': '{segment.anchor}' has cuts 1 to {depth}, not {cut}")
        return self


def one_cut_routes(front: str, front_cuts: int, end: str, end_cuts: int) -> Iterator[Route]:
    """Every route that runs ``front`` up to one of its cuts and ``end`` from one of its own (ReStNet's space)."""
    for i in range(1, front_cuts + 1):
        for j in range(1, end_cuts + 1):
            yield Route((Segment(front, 0, i), Segment(end, j)))
