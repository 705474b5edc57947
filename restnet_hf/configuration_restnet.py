"""What is needed to rebuild a stitched model: its anchors, stitches and routes."""

from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from restnet_hf.features import Layout
from restnet_hf.routes import Route, StitchPoint
from restnet_hf.stitches import StitchConfig


class RestNetConfig(PreTrainedConfig):
    """Configuration of `StitchedModelForImageClassification`.

    Args:
        anchors: one dict for each, front first: ``name``, ``repo_id``, ``revision``, ``fingerprint``, ``config`` (of
            the anchor itself), ``preprocessing``, ``label_names``, ``granularity``.
        stitches: by name: ``point``, ``config``, ``source`` and ``target`` layouts, and ``r2`` once fitted.
        routes: as strings.
        active_route: as a string.
        new_head: in place of the anchors' own classifiers each has a new one for this model's labels.
    """

    model_type = "restnet"

    anchors: list[dict[str, Any]] | None = None
    stitches: dict[str, dict[str, Any]] | None = None
    routes: list[str] | None = None
    active_route: str | None = None
    new_head: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.anchors = self.anchors or []
        self.stitches = self.stitches or {}
        self.routes = self.routes or []
        super().__post_init__(**kwargs)

    def stitch_parts(self, name: str) -> tuple[StitchPoint, Layout, Layout, StitchConfig]:
        """What a stitch is made from; raises ValueError where its entry is not sound."""
        try:
            entry = (self.stitches or {})[name]
            point = StitchPoint(**entry["point"])
            parts = (
                Layout.from_dict(entry["source"]),
                Layout.from_dict(entry["target"]),
                StitchConfig(**entry["config"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"config.json: the entry of stitch {name!r} is not sound: {error!r}") from error
        if point.name != name:
            raise ValueError(f"config.json: stitch {name!r} says of itself that it is {point.name!r}")
        return point, *parts

    def set_stitch(self, point: StitchPoint, source: Layout, target: Layout, config: StitchConfig) -> None:
        """Write down a stitch."""
        entry = {"point": asdict(point), "source": asdict(source), "target": asdict(target), "config": asdict(config)}
        self.stitches = {**(self.stitches or {}), point.name: entry}

    def parsed_routes(self) -> tuple[Route, ...]:
        """The routes; raises ValueError where one does not parse."""
        return tuple(Route.parse(text) for text in self.routes or ())


AutoConfig.register("restnet", RestNetConfig, exist_ok=True)
