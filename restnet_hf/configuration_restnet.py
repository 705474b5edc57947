"""What is needed to rebuild a stitched model: its anchors, stitches and routes."""

from dataclasses import asdict
from functools import lru_cache
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from restnet_hf.features import AnyLayout, layout_from_dict
from restnet_hf.files import SHA256
from restnet_hf.fingerprints import Piece
from restnet_hf.preprocessing import Preprocessing
from restnet_hf.routes import Route, StitchPoint, of_adapter
from restnet_hf.stitches import StitchConfig
from restnet_hf.tuning import TunedConfig


ANCHOR_KEYS = {"name", "repo_id", "revision", "fingerprint", "config", "preprocessing", "label_names"}
ANCHOR_KEYS |= {"granularity", "pieces"}


class RestNetConfig(PreTrainedConfig):
    """Configuration of `StitchedModelForImageClassification`.

    Args:
        anchors: one dict for each, front first: ``name``, ``repo_id``, ``revision``, ``fingerprint``, ``config`` (of
            the anchor itself), ``preprocessing``, ``label_names``, ``granularity``, ``pieces`` (each
            cut's name and shape, and the SHA-256 of the weights before it).
        stitches: by name: ``point``, ``config``, ``source`` and ``target`` layouts, and ``r2`` once fitted.
        routes: as strings.
        active_route: as a string.
        trained_heads: keys of the new heads that were trained.
        tuned: what takes the place of anchors' own weights, by key; see `TunedConfig`.
        training: how stitches and heads were fitted and trained, one dict for each time.
        standalone: the checkpoint holds the anchors' weights too.
        new_head: in place of the anchors' own classifiers each has a new one for this model's labels.
    """

    model_type = "restnet"

    anchors: list[dict[str, Any]] | None = None
    stitches: dict[str, dict[str, Any]] | None = None
    routes: list[str] | None = None
    active_route: str | None = None
    new_head: bool = False
    standalone: bool = False
    trained_heads: list[str] | None = None
    training: list[dict[str, Any]] | None = None
    tuned: dict[str, dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.anchors = self.anchors or []
        self.stitches = self.stitches or {}
        self.routes = self.routes or []
        self.trained_heads = self.trained_heads or []
        self.training = self.training or []
        self.tuned = self.tuned or {}
        kwargs.pop(SHA256, None)  # it is of the folder that was read, not of the model
        super().__post_init__(**kwargs)

    def stitch_parts(self, name: str) -> tuple[StitchPoint, AnyLayout, AnyLayout, StitchConfig]:
        """What a stitch is made from; raises ValueError where its entry is not sound."""
        try:
            entry = (self.stitches or {})[name]
            point = StitchPoint(**entry["point"])
            parts = (
                layout_from_dict(entry["source"]),
                layout_from_dict(entry["target"]),
                StitchConfig(**entry["config"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"config.json: the entry of stitch {name!r} is not sound: {error!r}") from error
        if point.name != name:
            raise ValueError(f"config.json: stitch {name!r} says of itself that it is {point.name!r}")
        return point, *parts

    def tuned_config(self, key: str) -> TunedConfig:
        """What is tuned under a key; raises ValueError where its entry is not sound."""
        try:
            found = TunedConfig(**(self.tuned or {})[key])
            if found.anchor not in {entry["name"] for entry in self.anchors or []} or key.split("-")[0] != found.kind:
                raise ValueError("it is of an anchor that is not there, or its key says another kind")
            return found
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.json: the entry of what is tuned as {key!r} is not sound: {error}") from error

    def check(self) -> "RestNetConfig":
        """Return the config if a model can be built from it; raise ValueError that says which entry is not sound."""
        if not isinstance(self.anchors, list) or not all(isinstance(e, dict) for e in (self.stitches, self.tuned)):
            raise ValueError("config.json: anchors must be a list, stitches and tuned must be objects")
        names = {self._anchor_name(index, entry) for index, entry in enumerate(self.anchors)}
        points = {self.stitch_parts(name)[0].name for name in self.stitches or {}}
        for key in self.tuned or {}:
            self.tuned_config(key)
        if not names:
            raise ValueError("config.json: there are no anchors")
        if not isinstance(self.routes, list) or not all(isinstance(route, str) for route in self.routes):
            raise ValueError(f"config.json: routes must be a list of strings, not {self.routes!r}")
        if not isinstance(self.trained_heads, list) or not all(isinstance(key, str) for key in self.trained_heads):
            raise ValueError(f"config.json: trained_heads must be a list of strings, not {self.trained_heads!r}")
        if not isinstance(self.training, list) or not all(isinstance(entry, dict) for entry in self.training):
            raise ValueError(f"config.json: training must be a list of objects, not {self.training!r}")
        if not isinstance(self.active_route, str | None):
            raise ValueError(f"config.json: active_route must be a string, not {self.active_route!r}")
        for route in (*self.parsed_routes(), *([Route.parse(self.active_route)] if self.active_route else [])):
            strange = {segment.anchor for segment in route.segments} - names
            if strange or {point.name for point in route.stitch_points} - points:
                raise ValueError(f"config.json: route '{route}' names anchors or stitches that are not there")
        return self

    def _anchor_name(self, index: int, entry: Any) -> str:
        """The name of an anchor; raises ValueError where its entry is not sound."""
        missing = sorted(ANCHOR_KEYS - entry.keys()) if isinstance(entry, dict) else ["everything"]
        if missing or not isinstance(entry["fingerprint"], str):
            raise ValueError(
                f"config.json: anchor {index} lacks {missing or 'its fingerprint'}; save the adapter again with this "
                "version of restnet_hf"
            )
        labels = entry["label_names"]
        texts = [entry["name"], entry["granularity"], *(labels or [] if isinstance(labels, list | None) else [labels])]
        texts += [entry[key] for key in ("repo_id", "revision") if entry[key] is not None]
        try:
            Preprocessing.from_dict(entry["preprocessing"])
            texts += [piece.sha256 for piece in map(Piece.from_dict, entry["pieces"])]
            if not all(isinstance(text, str) for text in texts) or not isinstance(entry["config"], dict | None):
                raise ValueError("a name, an id, a label, a hash or the config is of another type")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"config.json: the entry of anchor {index} is not sound: {error!r}") from error
        return entry["name"]

    def set_stitch(self, point: StitchPoint, source: AnyLayout, target: AnyLayout, config: StitchConfig) -> None:
        """Write down a stitch."""
        entry = {"point": asdict(point), "source": asdict(source), "target": asdict(target), "config": asdict(config)}
        self.stitches = {**(self.stitches or {}), point.name: entry}

    def head_keys(self) -> list[str]:
        """The keys of all new heads: every anchor's, and those again of every named adapter."""
        adapters = sorted({"", *(route.adapter for route in self.parsed_routes())}) if self.new_head else []
        return [of_adapter(adapter, entry["name"]) for adapter in adapters for entry in self.anchors or []]

    def parsed_routes(self) -> tuple[Route, ...]:
        """The routes; raises ValueError where one does not parse."""
        return tuple(map(_parsed, self.routes or ()))


@lru_cache(maxsize=65536)  # routes are asked for often, and there may be thousands
def _parsed(text: str) -> Route:
    return Route.parse(text)


AutoConfig.register("restnet", RestNetConfig, exist_ok=True)
