"""What is needed to rebuild a stitched model: its anchors, stitches and routes."""

import inspect
import os
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from functools import lru_cache
from json import JSONDecodeError
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file

from restnet_hf.anchors.layouts import AnyLayout, layout_from_dict
from restnet_hf.data.labels import class_names
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.errors import quote, shorten
from restnet_hf.files import SHA256
from restnet_hf.hashing import Piece, stored_dtype
from restnet_hf.limits import MAX_ANCHORS, MAX_LABELS, MAX_ROUTES, check_json, read_json
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.route import ANCHOR_NAME, HeadKey, Route, StitchPoint, TunedKey
from restnet_hf.stitches.layers import StitchConfig
from restnet_hf.stitches.tuning import TunedConfig


ANCHOR_KEYS = {"name", "repo_id", "revision", "fingerprint", "config", "preprocessing", "label_names"}
ANCHOR_KEYS |= {"granularity", "pieces"}
SETTABLE = ("model_type", "num_labels", "name_or_path", "torch_dtype", "output_attentions")  # allowed, but not fields
REFUSED = ("attn_implementation", "experts_implementation", "__class__", "__dict__")  # never written by us
TYPE_NAMES = {
    (list, object): "a list",
    (dict, object): "an object",
    (list, str): "a list of strings",
    (list, dict): "a list of objects",
}
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


class RestNetConfig(PreTrainedConfig):
    """Configuration of `StitchedModelForImageClassification`.

    Args:
        anchors: one dict for each anchor, front first: ``name``, ``repo_id``, ``revision``, ``fingerprint``,
            ``config`` (the anchor's own), ``preprocessing``, ``label_names``, ``granularity``, ``pieces`` (name and
            shape of each cut, and the SHA-256 of the weights before it).
        stitches: dict of each stitch by name: ``point``, ``config``, ``source`` and ``target`` layouts, and ``r2``
            once fitted.
        routes: string form of each route.
        active_route: string form of the active route.
        active_cascade: string form of the active cascade; None where a route is active.
        trained_heads: keys of the new heads that were trained.
        tuned: tensors that replace anchors' own weights, by key; see `TunedConfig`.
        training: settings of each fit or training of stitches and heads, one dict for each.
        standalone: whether the checkpoint also holds the anchors' weights.
        new_head: whether each anchor has a new classifier for this model's labels instead of its own.
    """

    model_type = "restnet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "answered_by"
    ]  # of the output, for the predictions of `Trainer`

    def __init__(  # written out: that transformers makes it from fields is new in 5.4
        self,
        anchors: list[dict[str, Any]] | None = None,
        stitches: dict[str, dict[str, Any]] | None = None,
        routes: list[str] | None = None,
        active_route: str | None = None,
        active_cascade: str | None = None,
        new_head: bool = False,
        standalone: bool = False,
        trained_heads: list[str] | None = None,
        training: list[dict[str, Any]] | None = None,
        tuned: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.anchors = anchors or []
        self.stitches = stitches or {}
        self.routes = routes or []
        self.active_route = active_route
        self.active_cascade = active_cascade
        self.new_head = new_head
        self.standalone = standalone
        self.trained_heads = trained_heads or []
        self.training = training or []
        self.tuned = tuned or {}
        kwargs.pop(SHA256, None)  # checksums of the folder that was read, not part of the model
        labels = kwargs.get("num_labels")
        if labels is not None and (type(labels) is not int or not 0 < labels <= MAX_LABELS):
            raise ValueError(f"num_labels={quote(labels)} must be a whole number from 1 to {MAX_LABELS}")
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config from a dict, as in transformers.

        Args:
            config_dict: parsed content of config.json.
            **kwargs: values that override those of the dict.

        Raises:
            ValueError: values have the wrong types, or are far too many.
        """
        check_json(config_dict, "config.json")
        own = {*SETTABLE, *inspect.signature(cls).parameters, *inspect.signature(PreTrainedConfig).parameters}
        refused = [key for key in config_dict if key in REFUSED or (key not in own and hasattr(cls, key))]
        if refused:
            raise ValueError(f"config.json must not set {quote(refused)}; remove it")
        if config_dict.get("output_attentions"):
            raise ValueError("config.json must not set output_attentions: not every anchor has attention; remove it")
        auto_map = config_dict.get("auto_map") or {}
        if not isinstance(auto_map, dict) or not all(isinstance(text, str) for text in auto_map.values()):
            raise ValueError(f"config.json: auto_map must be an object of strings, not {quote(auto_map)}")
        try:
            return super().from_dict(config_dict, **kwargs)
        except Exception as error:  # transformers trusts its files
            raise ValueError(f"config.json is invalid: {type(error).__name__}: {shorten(str(error))}") from None

    def stitch_parts(self, name: str) -> tuple[StitchPoint, AnyLayout, AnyLayout, StitchConfig]:
        """Point, source layout, target layout and config of a stitch; raises ValueError where its entry is invalid."""
        try:
            entry = (self.stitches or {})[name]
            point = StitchPoint(**entry["point"])
            parts = (
                layout_from_dict(entry["source"]),
                layout_from_dict(entry["target"]),
                StitchConfig.from_dict(entry["config"]),
            )
            _check_point(point)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"config.json: the entry of stitch {quote(name)} is invalid: {quote(error)}") from error
        if point.name != name:
            raise ValueError(f"config.json: stitch {quote(name)} has the point of {quote(point.name)}")
        return point, *parts

    def tuned_config(self, key: str) -> TunedConfig:
        """The config of the tensors tuned under a key; raises ValueError where its entry is invalid."""
        try:
            config, kind = TunedConfig(**(self.tuned or {})[key]), TunedKey.parse(key).kind
            if config.anchor not in {entry["name"] for entry in self.anchors or []} or kind != config.kind:
                raise ValueError("its anchor does not exist, or its key names another kind")
            return config
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.json: the tuned entry {quote(key)} is invalid: {quote(error)}") from error

    def check(self) -> "RestNetConfig":
        """Return the config if a model can be built from it; raise ValueError that names an invalid entry."""
        for key, kind, inner in (
            ("anchors", list, object),
            ("stitches", dict, object),
            ("tuned", dict, object),
            ("routes", list, str),
            ("trained_heads", list, str),
            ("training", list, dict),
        ):
            value = getattr(self, key)
            entries = value.values() if isinstance(value, dict) else value
            if not isinstance(value, kind) or not all(isinstance(entry, inner) for entry in entries):
                raise ValueError(f"config.json: {key} must be {TYPE_NAMES[kind, inner]}, not {quote(value)}")
        for key in ("new_head", "standalone"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"config.json: {key} must be true or false, not {quote(getattr(self, key))}")
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"config.json: problem_type={quote(self.problem_type)} is not one of {PROBLEM_TYPES}")
        for key in ("active_route", "active_cascade"):
            if not isinstance(getattr(self, key), str | None):
                raise ValueError(f"config.json: {key} must be a string, not {quote(getattr(self, key))}")
        self._check_labels()
        names = self._check_anchors()
        points = {name: self.stitch_parts(name)[0] for name in self.stitches or {}}
        for key in self.tuned or {}:
            self.tuned_config(key)
        for name, point in points.items():
            if not {point.source, point.target} <= names:
                raise ValueError(f"config.json: stitch {quote(name)} joins anchors that are not there")
        self._check_routes(names, points.keys())
        return self

    def _check_labels(self) -> None:
        try:
            names = class_names(None, self.id2label)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"config.json: id2label is invalid: {quote(error)}") from error
        if len(names) > MAX_LABELS or not all(isinstance(name, str) for name in (self.id2label or {}).values()):
            raise ValueError(f"config.json: id2label must hold at most {MAX_LABELS} strings")
        numbers = (self.label2id or {}).values() if isinstance(self.label2id, dict | None) else [self.label2id]
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"config.json: label2id must hold whole numbers, not {quote(self.label2id)}")

    def _check_routes(self, names: AbstractSet[str], points: AbstractSet[str]) -> None:
        if len(self.routes or ()) > MAX_ROUTES or sum(map(len, self.routes or ())) > 64 * MAX_ROUTES:
            raise ValueError(f"config.json: the routes are too many or too long; at most {MAX_ROUTES} are allowed")
        routes = set(self.parsed_routes())
        active = [Route.parse(self.active_route)] if self.active_route else []
        if self.active_cascade is not None:
            cascade = Cascade.parse(self.active_cascade)
            if not cascade.thresholds:
                raise ValueError(f"config.json: the active cascade {quote(str(cascade))} has no thresholds")
            if cascade.routes[-1:] != tuple(active):
                raise ValueError(f"config.json: active_route must be the last of {quote(str(cascade))}")
            active += cascade.routes
        for route in (*routes, *active):
            unknown = {segment.anchor for segment in route.segments} - names
            unknown |= {str(route)} if route.tuned and route not in routes else set()
            if unknown or not points >= {point.name for point in route.stitch_points}:
                raise ValueError(
                    f"config.json: route {quote(str(route))} names anchors or stitches that are not there"
                )

    def _check_anchors(self) -> set[str]:
        """The anchors' names; raises ValueError where an entry is invalid."""
        entries = self.anchors or []
        if not 0 < len(entries) <= MAX_ANCHORS:
            count = "there are no anchors" if not entries else f"there are {len(entries)} anchors"
            raise ValueError(f"config.json: {count}, and a model has from 1 to {MAX_ANCHORS}")
        names = [self._anchor_name(index, entry) for index, entry in enumerate(entries)]
        if len(set(names)) < len(names):
            raise ValueError(f"config.json: two anchors have the same name: {quote(names)}")
        return set(names)

    def _anchor_name(self, index: int, entry: Any) -> str:
        """The name of an anchor; raises ValueError where its entry is invalid."""
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
            pieces = list(map(Piece.from_dict, entry["pieces"]))
            texts += [text for piece in pieces for text in (piece.sha256, piece.unnamed or "")]
            if not all(type(number) is int for piece in pieces for number in piece.shape):
                raise ValueError("a shape holds other values than whole numbers")
            if not all(isinstance(text, str) for text in texts) or not isinstance(entry["config"], dict | None):
                raise ValueError("a name, an id, a label, a hash or the config has the wrong type")
            if not ANCHOR_NAME.fullmatch(entry["name"]):
                raise ValueError("its name may hold only letters, digits, '_' and '-'")
            stored_dtype(entry["fingerprint"])
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"config.json: the entry of anchor {index} is invalid: {quote(error)}") from error
        return entry["name"]

    def set_stitch(self, point: StitchPoint, source: AnyLayout, target: AnyLayout, config: StitchConfig) -> None:
        """Add or replace the entry of a stitch."""
        entry = {"point": asdict(point), "source": asdict(source), "target": asdict(target), "config": asdict(config)}
        self.stitches = {**(self.stitches or {}), point.name: entry}

    def head_keys(self) -> list[str]:
        """The keys of all new heads: one for each anchor and tuned anchor, and each anchor in every named adapter."""
        routes = self.parsed_routes() if self.new_head else ()
        adapters = sorted({"", *(route.adapter for route in routes)}) if self.new_head else []
        keys = [str(HeadKey(entry["name"], adapter)) for adapter in adapters for entry in self.anchors or []]
        return list(dict.fromkeys([*keys, *(route.head for route in routes if route.tuned)]))

    def part_names(self) -> Iterator[str]:
        """The names of all stitches, heads and tuned parts, which are prefixes of the names of their tensors."""
        parts = {"stitches": self.stitches or {}, "heads": self.head_keys(), "tuned": self.tuned or {}}
        return (f"{kind}.{key}" for kind, keys in parts.items() for key in keys)

    def parsed_routes(self) -> tuple[Route, ...]:
        """The routes; raises ValueError where one does not parse."""
        return tuple(map(_parsed, self.routes or ()))


def _check_point(point: StitchPoint) -> None:
    """Raise ValueError unless a stitch's anchors, cuts and names are such as a route can hold."""
    names = [point.source, point.target, *(name for name in (point.adapter, point.via) if name != "")]
    if not all(isinstance(name, str) and ANCHOR_NAME.fullmatch(name) for name in names):
        raise ValueError("its names may hold only letters, digits, '_' and '-'")
    if not all(type(cut) is int and cut > 0 for cut in (point.source_cut, point.target_cut)):
        raise ValueError("its cuts must be whole numbers above 0")


@lru_cache(maxsize=65536)  # routes are asked for often, and there may be thousands
def _parsed(text: str) -> Route:
    return Route.parse(text)


def read_config(path_or_id: str, hub_kwargs: Mapping[str, Any]) -> RestNetConfig:
    """Read and check the config of an adapter.

    Args:
        path_or_id: local folder or Hub id of the adapter.
        hub_kwargs: options of `cached_file`, such as ``revision`` and ``token``.

    Raises:
        OSError: there is no config.json, or it is not JSON.
        ValueError: the config is not that of an adapter, or is invalid.
    """
    try:
        file = cached_file(path_or_id, CONFIG_NAME, **hub_kwargs)
        data = read_json(file or os.path.join(path_or_id, CONFIG_NAME))
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{CONFIG_NAME} of {path_or_id} is not valid JSON: {error}") from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind != RestNetConfig.model_type or "configuration_files" in data:
        raise ValueError(f"{CONFIG_NAME} of {path_or_id} is not that of an adapter: its model_type is {quote(kind)}")
    return RestNetConfig.from_pretrained(path_or_id, **hub_kwargs).check()


AutoConfig.register("restnet", RestNetConfig, exist_ok=True)
