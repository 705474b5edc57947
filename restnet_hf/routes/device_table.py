"""DeviceTable: latencies of an adapter's routes on one device, as they are published beside the adapter. No torch."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from restnet_hf.errors import quote
from restnet_hf.limits import MAX_ROUTES, is_number
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import MAX_CAUSE, AnyProfiled, Profile
from restnet_hf.routes.route import Route


FORMAT = 1  # of the file
EAGER = "torch eager"  # runtime of an adapter that was not exported
TIMES = ("latency_ms", "mean_latency_ms", "latency_p99_ms", "energy_j")  # costs of one device
PERCENTILE = 0.99  # share of the images that take at most ``latency_p99_ms``
FASTEST_MS, SLOWEST_MS, MOST_WATTS = 1e-6, 1e8, 1e6
MOST_THREADS, MOST_IMAGES, MOST_PARTS = 2**16, 2**16, 2**17
MAX_TEXT, MAX_NAME, MAX_SLUG = 200, 4096, 120  # characters
TEXTS = ("device", "machine", "runtime", "version", "precision", "date")
DIGEST = re.compile(r"(?:[a-z0-9+]{1,64}:)?[0-9a-f]{64}")  # of anchors with the types of their weights
SUSTAINED = ("minutes", "first_ms", "last_ms")


def slug(text: str) -> str:
    """A text in lower-case letters, digits and hyphens, as in names of files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_SLUG]


def latency_costs(stages: Sequence[float], shares: Sequence[float], watts: float | None = None) -> dict[str, float]:
    """The costs of a cascade that follow from the milliseconds that each of its routes adds.

    Args:
        stages: milliseconds that each route adds for an image that reaches it.
        shares: share of the images that reach each route; empty where it is unknown.
        watts: power of the processor while routes run; None if it is not counted.
    """
    costs = {"latency_ms": sum(stages)}
    if shares:
        costs["mean_latency_ms"] = sum(share * stage for share, stage in zip(shares, stages, strict=True))
        reached = max((at for at, share in enumerate(shares) if share > 1 - PERCENTILE), default=0)
        costs["latency_p99_ms"] = sum(stages[: reached + 1])
    if watts is not None:
        costs["energy_j"] = watts * costs["latency_ms"] / 1e3
    return costs


def without_times(row: AnyProfiled) -> dict[str, float]:
    """The costs of a row that are the same on every device."""
    return {name: value for name, value in row.costs.items() if name not in TIMES}


@dataclass(frozen=True)
class DeviceTable:
    """Latencies of an adapter's routes and cascades on one device, and the weights that they were measured with.

    Anybody can publish one in the adapter's repository (`push_latency`), for budgets on that device.

    Args:
        device: name of the processor or accelerator.
        runtime: name of the runtime: ``torch eager`` for an adapter, or that of exported routes, such as ``onnx``.
        precision: precision of the weights, such as ``fp32`` or ``int8``.
        threads: number of threads of the processor; None on an accelerator.
        batch_size: number of images in a run.
        routes: milliseconds for one image, by route.
        weights: SHA-256 of the adapter's stitches, heads and tuned parts and fingerprints of its anchors, by part.
        cascades: milliseconds that each route of a cascade adds for an image that reaches it, by cascade.
        version: version of the runtime; empty where it is unknown.
        machine: kind of processor, such as ``x86_64``; empty where it is unknown.
        date: day of the measurement, such as ``2026-11-29``; empty where it is unknown.
        watts: power of the processor while routes run; None if it is not counted.
        sustained: ``minutes`` for which a route ran, and its latency in the first and last one of them, ``first_ms``
            and ``last_ms``; empty if that was not measured.
        versions: versions of the packages that measured an adapter, or exported its routes, by name.
        repo_id: repository of the adapter that was measured; None where it is unknown. It is not written.
    """

    device: str
    runtime: str
    precision: str
    threads: int | None
    batch_size: int
    routes: Mapping[str, float]
    weights: Mapping[str, str]
    cascades: Mapping[str, Sequence[float]] = field(default_factory=dict)
    version: str = ""
    machine: str = ""
    date: str = ""
    watts: float | None = None
    sustained: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    repo_id: str | None = None

    @property
    def name(self) -> str:
        """Device, runtime, precision, threads and batch size, which tell tables of one adapter apart."""
        threads = "" if self.threads is None else f" {self.threads} thread{'' if self.threads == 1 else 's'},"
        return f"{self.device}, {self.runtime}, {self.precision},{threads} batch {self.batch_size}"

    @property
    def file_name(self) -> str:
        """The name of the file in which a repository has the table."""
        return f"{slug(self.name)}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}.json"

    def is_named(self, device: str) -> bool:
        """Whether a text is the device's name, or the beginning of the table's up to one of its commas."""
        return f"{self.name}, ".startswith(f"{device}, ")

    @property
    def slowdown(self) -> float:
        """Latency of the warm device over that of the cold one; 1 where that was not measured."""
        return self.sustained["last_ms"] / self.sustained["first_ms"] if self.sustained else 1.0

    def stale_routes(self, weights: Mapping[str, str]) -> list[str]:
        """The routes of the table that an adapter does not have, or that run other weights in it.

        Args:
            weights: SHA-256 of the adapter's parts and fingerprints of its anchors, as in ``weights`` of a table.
        """
        return stale_routes(self.routes, self.weights, weights)

    def current(self, weights: Mapping[str, str]) -> "DeviceTable":
        """The table without routes that run other weights in an adapter, and without cascades of such routes.

        Args:
            weights: SHA-256 of the adapter's parts and fingerprints of its anchors, as in ``weights`` of a table.

        Raises:
            ValueError: no route is left; the message names a part that differs.
        """
        stale = {*self.stale_routes(weights)}
        if not self.routes.keys() - stale:
            differ = sorted(part for part in self.weights if self.weights[part] != weights.get(part))
            raise ValueError(
                f"the latencies of '{self.name}' were measured with other weights than those of the adapter: "
                f"{quote(differ) if differ else 'its parts are not named'}; measure it again"
            )
        cascades = {
            text: stages
            for text, stages in self.cascades.items()
            if not stale & {*map(str, Cascade.parse(text).routes)}
        }
        routes = {text: ms for text, ms in self.routes.items() if text not in stale}
        return replace(self, routes=routes, cascades=cascades)

    def add_to(self, profile: Profile) -> Profile:
        """A profile with these latencies in place of its own, as ``metadata["latency"]`` then reports.

        Routes and cascades that were not measured are left out, so that every row has a latency. Where a route ran for
        minutes, latencies are those of the warm device.

        Args:
            profile: profile of the adapter.

        Raises:
            ValueError: no route of the profile was measured.
        """
        rows = [
            replace(row, costs=without_times(row) | self._route_costs(self.routes[str(row.route)]))
            for row in profile.routes
            if str(row.route) in self.routes
        ]
        if not rows:
            raise ValueError(f"'{self.name}' has latencies of {quote([*self.routes])}, none of which is profiled")
        stages = {Cascade.parse(text).routes: added for text, added in self.cascades.items()}
        kept, cascades = {row.route for row in rows}, []
        for row in profile.cascades:
            added = stages.get(row.route.routes)
            if added is not None and kept.issuperset(row.route.routes):
                warm = tuple(self.slowdown * ms for ms in added)
                costs = without_times(row) | latency_costs(warm, row.shares, self.watts)
                cascades.append(replace(row, costs=costs, stage_costs={**row.stage_costs, "latency_ms": warm}))
        if cascades:
            rows = [row.with_means() for row in rows]
        return Profile(tuple(rows), {**profile.metadata, "latency": self.metadata()}, tuple(cascades))

    def _route_costs(self, ms: float) -> dict[str, float]:
        return latency_costs([self.slowdown * ms], (), self.watts)

    def metadata(self) -> dict[str, Any]:
        """Where the latencies come from, for the metadata of a profile: ``published`` is the name of their file."""
        data, left_out = self.to_dict(), ("format", "routes", "cascades", "weights")
        return {"published": self.file_name} | {key: value for key, value in data.items() if key not in left_out}

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        data = {key: value for key, value in asdict(self).items() if key != "repo_id"}
        return {"format": FORMAT, **data, "cascades": {text: [*added] for text, added in self.cascades.items()}}

    @classmethod
    def from_dict(cls, data: Any, repo_id: str | None = None) -> "DeviceTable":
        """The inverse of `to_dict`, for untrusted data.

        Args:
            data: table as plain JSON values.
            repo_id: repository of the adapter that was measured; None where it is unknown.

        Raises:
            ValueError: it is not a table, of another format, or has values out of range.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(
                    f"its format is {quote(data['format'])}, and this restnet_hf reads format {FORMAT}; upgrade it"
                )
            return _read(data, repo_id)
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"not a latency table: {quote(error, MAX_CAUSE)}") from None

    @classmethod
    def of_export(cls, profile: Profile) -> "DeviceTable":
        """The table of exported routes, from the profile of their folder.

        Args:
            profile: ``profiled`` of an `ExportedModel`, after its ``measure_latency`` on this device.

        Raises:
            ValueError: the folder was not measured on a device, or an earlier version exported it, so that it does not
                name the adapter's weights.
        """
        metadata, adapter = profile.metadata, exported_adapter(profile)
        sustained = metadata.get("sustained")
        if not all("latency_ms" in row.costs for row in profile.routes):
            raise ValueError("the exported routes have no latencies; measure them on the device first")
        data = {key: metadata.get(key) for key in ("device", "machine", "runtime", "precision", "threads", "date")}
        if "input" in metadata:  # files that also prepare images, which takes time
            data["precision"] = f"{data['precision']} of {metadata['input']}"
        data |= {"format": FORMAT, "version": metadata["runtime_version"] or ""}
        data |= {"batch_size": metadata.get("batch_size") or 1}
        data |= {"weights": adapter["weights"], "versions": metadata.get("versions", {})}
        data["routes"] = {str(row.route): row.costs.get("latency_ms") for row in profile.routes}
        data["cascades"] = {str(row.route): list(row.stage_costs.get("latency_ms", ())) for row in profile.cascades}
        if isinstance(sustained, Mapping):
            data["sustained"] = summarise_sustained(sustained)
        return cls.from_dict(data, adapter["repo_id"])


def exported_adapter(profile: Profile) -> dict[str, Any]:
    """``weights`` and ``repo_id`` of the adapter that routes were exported from, as `adapter_identity` returns them.

    Args:
        profile: ``profiled`` of an `ExportedModel`.

    Raises:
        ValueError: an earlier version exported the routes, so that the adapter or the runtime is not named; or what
            names it is malformed.
    """
    adapter = profile.metadata.get("adapter")
    if not isinstance(adapter, Mapping) or "runtime_version" not in profile.metadata:
        raise ValueError(
            "the exported folder does not name the adapter that it was made of, or the version of its runtime; "
            "export it again with this version of restnet_hf"
        )
    weights, repo_id = adapter.get("weights"), adapter.get("repo_id")
    if not isinstance(weights, Mapping):
        raise ValueError(f"the exported folder names no weights of its adapter, but {quote(weights)}")
    return {"weights": _digests(weights), "repo_id": repo_id if isinstance(repo_id, str) else None}


def summarise_sustained(sustained: Mapping[str, Any]) -> dict[str, float]:
    """What a table holds of the result of ``measure_sustained``.

    Args:
        sustained: JSON values of a `SustainedLatency`.

    Raises:
        ValueError: it is something else.
    """
    try:
        minutes = sustained["periods"][-1]["at_s"] / 60
        return {"minutes": minutes, "first_ms": sustained["first_ms"], "last_ms": sustained["last_ms"]}
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"not a sustained latency: {quote(error)}") from None


def stale_routes(routes: Iterable[str], own: Mapping[str, str], others: Mapping[str, str]) -> list[str]:
    """The routes, as text, that an adapter does not have, or that run other weights in it.

    Args:
        routes: routes as text.
        own: SHA-256 of the parts and fingerprints of the anchors of the adapter that has these routes.
        others: the same of the adapter to compare.
    """
    known = own.keys() & others.keys()
    changed = {part for part in {*own, *others} if own.get(part) != others.get(part)}
    tuned = any(part.startswith("tuned.") for part in changed)  # anchors alone never run these
    stale = []
    for text in routes:
        route = Route.parse(text)
        used = {*_parts(route)}
        other = changed & {*used, f"heads.{route.head}"}
        if other or not used <= known or (tuned and not route.is_anchor):
            stale.append(text)
    return stale


def _parts(route: Route) -> Iterator[str]:
    """The names of the anchors and stitches that a route runs, as in ``weights``."""
    yield from (f"anchors.{segment.anchor}" for segment in route.segments)
    yield from (f"stitches.{point.name}" for point in route.stitch_points)


def _read(data: Mapping[str, Any], repo_id: str | None) -> DeviceTable:
    """A table from JSON values; raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    texts = {key: _text(key, data[key]) for key in TEXTS}
    if not texts["device"] or not texts["runtime"] or not texts["precision"]:
        raise ValueError("device, runtime and precision must not be empty")
    routes = {str(Route.parse(_text("a route", text, MAX_NAME))): _ms(ms) for text, ms in data["routes"].items()}
    if not 0 < len(routes) <= MAX_ROUTES or len(data["cascades"]) > MAX_ROUTES:
        raise ValueError(f"it has {len(routes)} routes and {len(data['cascades'])} cascades; 1 to {MAX_ROUTES}")
    watts = data.get("watts")
    if watts is not None and not is_number(watts, 0, MOST_WATTS):
        raise ValueError(f"watts={quote(watts)} must be null or a number from 0 to {MOST_WATTS:g}")
    sustained = data.get("sustained") or {}
    return DeviceTable(
        **texts,
        threads=None if data["threads"] is None else _count("threads", data["threads"], MOST_THREADS),
        batch_size=_count("batch_size", data["batch_size"], MOST_IMAGES),
        routes=routes,
        weights=_digests(data["weights"]),
        cascades=dict(_stages(text, added, routes) for text, added in data["cascades"].items()),
        watts=watts,
        sustained={key: _ms(sustained[key]) for key in SUSTAINED} if sustained else {},
        versions={_text("a package", k): _text("a version", v) for k, v in (data.get("versions") or {}).items()},
        repo_id=repo_id,
    )


def _text(key: str, value: Any, most: int = MAX_TEXT) -> str:
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise ValueError(f"{key} is {quote(value)}, not a printable text of at most {most} characters")
    return value


def _ms(value: Any, least: float = FASTEST_MS) -> float:
    if not is_number(value, least, SLOWEST_MS):
        raise ValueError(f"{quote(value)} is not a number of milliseconds from {least:g} to {SLOWEST_MS:g}")
    return float(value)


def _count(key: str, value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{key}={quote(value)} must be a whole number from 1 to {most}")
    return value


def _digests(weights: Mapping[str, Any]) -> dict[str, str]:
    if len(weights) > MOST_PARTS:
        raise ValueError(f"it names {len(weights)} parts; at most {MOST_PARTS}")
    for part, digest in weights.items():
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise ValueError(f"the SHA-256 of {quote(part)} is {quote(digest)}")
    return {_text("a part", part, MAX_NAME): digest for part, digest in weights.items()}


def _stages(text: str, added: Any, routes: Mapping[str, float]) -> tuple[str, tuple[float, ...]]:
    cascade = Cascade.parse(_text("a cascade", text, MAX_NAME))
    if not isinstance(added, list) or len(added) != len(cascade.routes) or not cascade.thresholds:
        raise ValueError(f"cascade {quote(text)} has no thresholds, or other stages than {quote(added)}")
    if lacking := [str(route) for route in cascade.routes if str(route) not in routes]:
        raise ValueError(f"cascade {quote(text)} runs {quote(lacking)}, which have no latency")
    return str(cascade), tuple(_ms(ms, 0.0) for ms in added)  # a route may add nothing to those before it
