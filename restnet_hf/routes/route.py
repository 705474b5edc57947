"""Routes: which part of which anchor runs, in which order. Written and parsed as Python slices. No torch."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, repeat, zip_longest


ANCHOR_NAME = re.compile(r"[A-Za-z0-9_-]+")
ADAPTER = re.compile(rf"\s*({ANCHOR_NAME.pattern}):(.*)", re.S)
SEGMENT = re.compile(rf"(?:({ANCHOR_NAME.pattern})\s+)?({ANCHOR_NAME.pattern})\[([^:\[\]]*):([^:\[\]]*)\]")
MAX_LENGTH = 10_000  # characters; thirty segments take about 1,000
TUNED = "tuned"  # the word before an anchor alone whose weights are tuned
EXAMPLE = (
    "write it like 'resnet50[:7] + mobilenetv2[11:]', or 'resnet50[:]' for an anchor alone, 'tuned resnet50[:]' for "
    "one with tuned weights"
)


@dataclass(frozen=True, order=True)
class Segment:
    """The part of ``anchor`` from cut ``start`` (0 is the image) to cut ``stop`` (None is the logits)."""

    anchor: str
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return f"{self.anchor}[{self.start or ''}:{'' if self.stop is None else self.stop}]"

    def __repr__(self) -> str:
        return f"Segment('{self}')"


@dataclass(frozen=True, order=True)
class StitchPoint:
    """The place of a stitch: it reads the activation at cut ``source_cut`` and replaces the one at ``target_cut``.

    Stitches of several adapters may be at the same place; ``adapter`` names the adapter, and is empty for the first. A
    stitch with a name of its own, ``via``, may serve several places, and there may be several at one place.
    """

    source: str
    source_cut: int
    target: str
    target_cut: int
    adapter: str = ""
    via: str = ""

    @property
    def name(self) -> str:
        """A name without dots, fit for a module key: ``resnet50_7__mobilenetv2_11``, or ``small__large~shared``."""
        if self.via:
            return prefix_key(self.adapter, f"{self.source}__{self.target}~{self.via}")
        return prefix_key(self.adapter, f"{self.source}_{self.source_cut}__{self.target}_{self.target_cut}")


def prefix_key(adapter: str, key: str) -> str:
    """The key of a module of a named adapter, with a colon, which no anchor's name holds."""
    return f"{adapter}:{key}" if adapter else key


@dataclass(frozen=True, order=True)
class Route:
    """A path from image to logits: segments with a stitch between neighbours; an anchor alone is one segment.

    ``adapter`` names the adapter whose stitches and head the route uses where a model holds several on the same
    anchors. It is written in front, ``night: resnet50[:7] + mobilenetv2[11:]``, and is empty for the first adapter. A
    stitch belongs to the two cuts that it joins, unless it has a name of its own, ``small[:3] +shared large[3:]``:
    routes that name the same one share it, whatever cuts they join.

    ``tuned resnet50[:]`` is the anchor alone with tuned weights in place of some of its own, and a head of its own.
    Beside it ``resnet50[:]`` stays as it is.

    Args:
        segments: segments of the route, from the image on.
        adapter: name of the adapter whose stitches and head the route uses.
        via: name of each stitch, empty for those without; an empty tuple where no stitch has one.
        tuned: whether the route is an anchor alone with tuned weights.

    Raises:
        ValueError: the segments do not lead from an image to logits, the numbers of names and stitches differ, or a
            route with stitches is to be tuned.
    """

    segments: tuple[Segment, ...]
    adapter: str = ""
    via: tuple[str, ...] = ()
    tuned: bool = False

    def __post_init__(self) -> None:
        if not any(self.via):
            object.__setattr__(self, "via", ())  # equal routes have equal names
        if not self.segments:
            raise ValueError(f"a route needs at least one segment: {EXAMPLE}")
        if self.segments[0].start != 0 or self.segments[-1].stop is not None:
            raise ValueError(f"route '{self}' must start at an image, 'front[:i]', and end in logits, 'end[j:]'")
        for left, right in pairwise(self.segments):
            if left.stop is None or right.start == 0:
                raise ValueError(
                    f"route '{self}': between '{left}' and '{right}' both must name a cut, 'a[:i] + b[j:]'"
                )
        for index, segment in enumerate(self.segments):
            least = segment.start if 0 < index < len(self.segments) - 1 else segment.start + 1
            if segment.start < 0 or (segment.stop is not None and segment.stop < least):
                raise ValueError(
                    f"route '{self}': segment '{segment}' holds no block; its stop must be above its start. They "
                    "may be equal only between two consecutive stitches, 'a[:2] + a[4:4] + a[6:]'"
                )
        names = [via for via in self.via if via]
        if self.via and (len(self.via) != len(self.segments) - 1 or not all(map(ANCHOR_NAME.fullmatch, names))):
            raise ValueError(
                f"route '{self}': the stitches' names {self.via} must be one for each of its {len(self.segments) - 1} "
                "stitches, of letters, digits, '_' and '-'"
            )
        if self.tuned and len(self.segments) > 1:
            raise ValueError(
                f"route '{self}': only an anchor alone may be tuned, as in '{TUNED} {self.segments[-1].anchor}[:]'. "
                "What trains of a route with stitches is an option of train: leave the word out"
            )

    @classmethod
    def alone(cls, anchor: str, adapter: str = "", tuned: bool = False) -> "Route":
        """The route of an anchor alone.

        Args:
            anchor: name of the anchor.
            adapter: name of the adapter whose head the route uses.
            tuned: whether the route runs with tuned weights.
        """
        return cls((Segment(anchor),), adapter, tuned=tuned)

    @classmethod
    def parse(cls, text: str, cut_number: Callable[[str, str], int] | None = None) -> "Route":
        """Parse a route from its string form.

        Args:
            text: string form of a route, such as ``resnet50[:7] + mobilenetv2[11:]``.
            cut_number: function that takes the names of an anchor and a cut and returns the number of the cut; None
                where cuts may be given only by number.

        Raises:
            ValueError: the text does not parse, is longer than ``MAX_LENGTH``, or names an unknown cut.
        """
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{len(text):,} characters are no route, the longest has {MAX_LENGTH:,}; {EXAMPLE}")

        def parse_cut(anchor: str, cut: str) -> int:
            if cut.isdecimal():
                return int(cut)
            if cut_number is None:
                raise ValueError(f"{text!r} is not a route: {cut!r} is not the number of a cut; {EXAMPLE}")
            return cut_number(anchor, cut)

        named = ADAPTER.fullmatch(text)
        adapter, rest = (named[1], named[2]) if named else ("", text)
        segments: list[Segment] = []
        via: list[str] = []
        for part in rest.split("+"):
            match = SEGMENT.fullmatch(part.strip())
            if match is None or (match[1] not in (None, TUNED) and not segments):
                raise ValueError(f"{text!r} is not a route; {EXAMPLE}")
            anchor, start, stop = match[2], match[3].strip(), match[4].strip()
            via.append(match[1] or "")
            segments.append(
                Segment(anchor, parse_cut(anchor, start) if start else 0, parse_cut(anchor, stop) if stop else None)
            )
        return cls(tuple(segments), adapter, tuple(via[1:]), tuned=via[0] == TUNED)

    def __str__(self) -> str:
        first, *others = self.segments
        joints = zip_longest(self.via[: len(others)], others, fillvalue="")
        mark = f"{TUNED} " if self.tuned else ""
        text = "".join([mark, str(first), *(f" +{via or ''} {segment}" for via, segment in joints)])
        return f"{self.adapter}: {text}" if self.adapter else text

    def __repr__(self) -> str:
        return f"Route('{self}')"

    @property
    def head(self) -> str:
        """The key of the new head that the route ends in, where the model has new heads."""
        return str(HeadKey(self.segments[-1].anchor, self.adapter, self.tuned))

    @property
    def is_anchor(self) -> bool:
        """Whether the route is an anchor alone with its own weights."""
        return len(self.segments) == 1 and not self.tuned

    @property
    def stitch_points(self) -> tuple[StitchPoint, ...]:
        """The stitches the route needs, from the image on."""
        return tuple(
            StitchPoint(left.anchor, left.stop, right.anchor, right.start, self.adapter, via)
            for left, right, via in zip(self.segments, self.segments[1:], self.via or repeat(""), strict=False)
            if left.stop is not None
        )

    def check(self, depths: Mapping[str, int]) -> "Route":
        """Return the route if it fits anchors; raise ValueError, which names what does not fit.

        Args:
            depths: number of cuts of each anchor, by name.
        """
        for segment in self.segments:
            if segment.anchor not in depths:
                raise ValueError(f"route '{self}': no anchor named '{segment.anchor}'; there are {sorted(depths)}")
            depth = depths[segment.anchor]
            for cut in (segment.start, segment.stop):
                if cut is not None and cut > depth:
                    raise ValueError(f"route '{self}': '{segment.anchor}' has cuts 1 to {depth}, not {cut}")
        return self


def each_route(routes: "Routes") -> "Iterable[Route | str]":
    """One route or several, as several."""
    return [routes] if isinstance(routes, Route | str) else routes


def one_cut_routes(front: str, front_cuts: int, end: str, end_cuts: int) -> Iterator[Route]:
    """Every route that runs ``front`` up to one of its cuts and ``end`` from one of its cuts (ReStNet's space)."""
    for i in range(1, front_cuts + 1):
        for j in range(1, end_cuts + 1):
            yield Route((Segment(front, 0, i), Segment(end, j)))


Routes = Route | str | Iterable[Route | str]
"""One route or several, as every function that works on routes takes them."""

TUNED_KEY = re.compile(r"([a-z]+)-([A-Za-z0-9_+:~-]+)")


@dataclass(frozen=True, order=True)
class HeadKey:
    """The key of a new head, ``resnet50``, or ``night:resnet50`` where a named adapter has its own.

    Args:
        anchor: name of the anchor whose features the head classifies.
        adapter: name of the adapter that uses the head; empty for the first.
        tuned: whether the head is that of the tuned anchor, ``tuned~resnet50``, which no other route uses.
    """

    anchor: str
    adapter: str = ""
    tuned: bool = False

    @classmethod
    def parse(cls, text: str) -> "HeadKey":
        """Read a key from its string form.

        Args:
            text: ``anchor`` or ``adapter:anchor``, with ``tuned~`` before the anchor where the head is a tuned one's.

        Raises:
            ValueError: the text is not the key of a head.
        """
        adapter, colon, name = text.rpartition(":")
        anchor = name.removeprefix(f"{TUNED}~")
        if not all(map(ANCHOR_NAME.fullmatch, [adapter, anchor] if colon else [anchor])):
            raise ValueError(
                f"{text!r} is not the key of a head; write it 'anchor' or 'adapter:anchor', with names of letters, "
                "digits, '_' and '-'"
            )
        return cls(anchor, adapter, name != anchor)

    def __str__(self) -> str:
        return prefix_key(self.adapter, f"{TUNED}~{self.anchor}" if self.tuned else self.anchor)


@dataclass(frozen=True, order=True)
class TunedKey:
    """The key of tensors that replace an anchor's own: ``lora-resnet50`` or ``norm-vit_2__resnet50_7``.

    Args:
        kind: kind of the replacement, a key of ``TUNINGS``, in lower-case letters.
        owner: the anchor, with its adapter in front, or what names the route that uses the tensors: its stitches, or
            ``tuned~resnet50`` for an anchor alone.
    """

    kind: str
    owner: str

    @classmethod
    def parse(cls, text: str) -> "TunedKey":
        """Read a key from its string form.

        Args:
            text: key of the form ``kind-owner``.

        Raises:
            ValueError: the text is not a key of tuned tensors.
        """
        match = TUNED_KEY.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a key of tuned tensors; write it 'kind-owner', the kind in lower-case letters, the "
                "owner in letters, digits and any of '_+:~-'"
            )
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return f"{self.kind}-{self.owner}"
