"""Cascades: routes in order of cost, each of which answers the images that it is sure of. No torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from restnet_hf.routes.confidences import CONFIDENCES, LEAST_TEMPERATURE, MOST_TEMPERATURE
from restnet_hf.routes.route import MAX_LENGTH, Route, StitchPoint


MAX_ROUTES = 16  # in one cascade; more than three rarely pay
MAX_NUMBERS = 60  # characters of a threshold with its temperature
NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
EXAMPLE = (
    "write it like 'small[:] > large[:7] + small[6:]', or with thresholds from 0 to 1, 'small[:] >0.8 large[:7] + "
    "small[6:]'"
)


@dataclass(frozen=True)
class Cascade:
    """Routes in order of cost: an image is answered by the first one that is sure enough, or by the last.

    Written with ``>`` between routes and the threshold behind it: ``small[:] >0.8 large[:]`` is answered by the small
    one where its confidence is at least 0.8. ``>margin 0.4`` names another confidence than the highest probability,
    ``>0.8@1.5`` divides the logits of the route before it by a temperature of 1.5 first. A cascade without thresholds
    has still to be calibrated.

    Args:
        routes: routes, the cheapest first.
        thresholds: least confidence, from 0 to 1, at which each route but the last answers; empty before calibration.
        confidence: key of `CONFIDENCES` that thresholds are compared with.
        temperatures: number by which the logits of each route but the last are divided before confidence is measured;
            empty where none are.

    Raises:
        ValueError: there are fewer than two routes, one occurs twice, they are of several adapters, the number of
            thresholds or temperatures is not one less than that of routes, one is out of range, or the whole is
            longer than a route may be.
    """

    routes: tuple[Route, ...]
    thresholds: tuple[float, ...] = ()
    confidence: str = "probability"
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if set(self.temperatures) == {1.0}:
            object.__setattr__(self, "temperatures", ())  # equal cascades are equal values
        count = len(self.routes)
        if not 2 <= count <= MAX_ROUTES:
            raise ValueError(f"a cascade has from 2 to {MAX_ROUTES} routes, not {count}; {EXAMPLE}")
        if len(set(self.routes)) < count:
            raise ValueError(f"cascade '{self}' holds a route twice; the second would repeat the first one's answer")
        adapters = sorted({route.adapter for route in self.routes if route.adapter or not route.is_anchor})
        if len(adapters) > 1:
            raise ValueError(f"cascade '{self}' has routes of several adapters, {adapters}; take them from one")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence={self.confidence!r} is not one of {sorted(CONFIDENCES)}")
        if self.temperatures and not self.thresholds:
            raise ValueError(f"temperatures {self.temperatures} belong to thresholds, and there are none")
        for name, numbers in (("thresholds", self.thresholds), ("temperatures", self.temperatures)):
            if numbers and len(numbers) != count - 1:
                raise ValueError(
                    f"{count} routes need {count - 1} {name}, one behind each route but the last, not {len(numbers)}"
                )
        if not all(0 <= threshold <= 1 for threshold in self.thresholds):
            raise ValueError(f"thresholds {self.thresholds} must be from 0 to 1")
        if not all(LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE for temperature in self.temperatures):
            raise ValueError(
                f"temperatures {self.temperatures} must be from {LEAST_TEMPERATURE} to {MOST_TEMPERATURE}"
            )
        if len(str(self)) > MAX_LENGTH:
            raise ValueError(
                f"a cascade of {len(str(self)):,} characters cannot be read again; at most {MAX_LENGTH:,}"
            )

    @classmethod
    def parse(cls, text: str, parse_route: Callable[[str], Route] = Route.parse) -> "Cascade":
        """Parse a cascade from its string form.

        Args:
            text: string form of a cascade.
            parse_route: function that parses a route.

        Raises:
            ValueError: the text does not parse, or is longer than ``MAX_LENGTH``.
        """
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{len(text):,} characters are no cascade, the longest has {MAX_LENGTH:,}; {EXAMPLE}")
        first, *others = text.split(">")
        steps = list(map(_read_step, others))
        named = {name for name, *_ in steps if name}
        thresholds = [numbers[0] for _, numbers, _ in steps if numbers]
        if len(named) > 1 or (thresholds and len(thresholds) != len(steps)):
            raise ValueError(f"{text!r} is not a cascade: all its thresholds are given, of one confidence; {EXAMPLE}")
        temperatures = [numbers[1] if len(numbers) > 1 else 1.0 for _, numbers, _ in steps]
        routes = tuple(parse_route(part.strip()) for part in (first, *(rest for *_, rest in steps)))
        return cls(routes, tuple(thresholds), next(iter(named), "probability"), tuple(temperatures))

    def __str__(self) -> str:
        name = f"{self.confidence} " if self.confidence != "probability" else ""
        parts = [str(self.routes[0])]
        for index, route in enumerate(self.routes[1:]):
            at = f"@{self.temperatures[index]!r}" if self.temperatures else ""
            number = f"{self.thresholds[index]!r}{at} " if self.thresholds else ""
            parts.append(f">{name}{number}{route}" if name or number else f"> {route}")
        return " ".join(parts)

    def __repr__(self) -> str:
        return f"Cascade('{self}')"

    @property
    def adapter(self) -> str:
        """Name of the adapter whose stitches and heads the routes use; anchors alone may be of the first one."""
        return max(route.adapter for route in self.routes)

    @property
    def is_anchor(self) -> bool:
        """False, as for any route that is not an anchor alone."""
        return False

    @property
    def tuned(self) -> bool:
        """False, as for any route that is not a tuned anchor."""
        return False

    @property
    def stitch_points(self) -> tuple[StitchPoint, ...]:
        """The stitches that the routes need, each once."""
        return tuple(dict.fromkeys(point for route in self.routes for point in route.stitch_points))


def _read_step(text: str) -> tuple[str | None, list[float], str]:
    """The confidence's name, threshold and temperature where they are given, and the route, of a part after ``>``."""
    name, numbers = None, list[float]()
    word, _, rest = text.strip().partition(" ")
    if word in CONFIDENCES and rest:
        name, text = word, rest
        word, _, rest = text.strip().partition(" ")
    parts = word.split("@")
    if rest and len(word) <= MAX_NUMBERS and len(parts) <= 2 and all(map(NUMBER.fullmatch, parts)):
        numbers, text = list(map(float, parts)), rest
    return name, numbers, text


def is_cascade(text: str) -> bool:
    """Whether a text is the string form of a cascade, which a ``>`` tells from that of a route."""
    return ">" in text
