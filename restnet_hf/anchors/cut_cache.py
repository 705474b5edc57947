"""Cuts found before: kept on disk by architecture, so that a network is searched once on a machine."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import treespec_dumps, treespec_loads
from transformers import PreTrainedConfig

from restnet_hf.anchors.cut import Cut, Leaf, Made, OutputSpec
from restnet_hf.anchors.discovery import MIN_CUTS, Cuts
from restnet_hf.anchors.layouts import layout_from_dict
from restnet_hf.files import written_whole
from restnet_hf.hashing import software_sha256


LIBRARIES = ("torch", "torchvision", "transformers", "timm")  # whose code is known by its version
CODE = ("data", "anchors")  # rooms that cuts depend on
NAMES = {
    "_name_or_path",
    "name_or_path",
    "id2label",
    "label2id",
    "label_names",
    "transformers_version",
    "training",
}  # not settings
CONTAINERS = ("builtins.dict", "builtins.list", "builtins.tuple", "collections.OrderedDict", "torch.Size")
PLAIN = (bool, int, float, str, type(None))
logger = logging.getLogger(__name__)


def cached_cuts(model: nn.Module, image_size: tuple[int, int], granularity: str, find: Callable[[], Cuts]) -> Cuts:
    """What ``find`` returns, or what it returned before for a network of the same architecture.

    Weights do not matter: cuts depend on classes, their settings, and the names, shapes and types of the weights. A
    network with code that has no version, such as a module of yours, is searched every time. The files lie in
    ``HF_HOME/assets/restnet_hf`` and can be deleted.
    """
    key = architecture(model, image_size, granularity)
    if key is None:
        return find()
    try:
        file = cached_assets_path("restnet_hf", "cuts") / f"{key}.safetensors"
    except (OSError, ValueError) as error:  # a file in the way is a ValueError there
        logger.info("cuts cannot be kept: %s", error)
        return find()
    known = _read(file)
    if known is not None:
        return known
    found = find()
    if found.rejected or len(found.cuts) < MIN_CUTS:
        return found  # it may be the weights' fault, and the next ones will be others
    try:
        _write(file, found)
    except (OSError, NotImplementedError, TypeError, ValueError) as error:
        logger.info("cuts of %s cannot be kept: %s", type(model).__name__, error)
    return found


def architecture(model: nn.Module, image_size: tuple[int, int], granularity: str) -> str | None:
    """SHA-256 of all that cuts depend on; None where some of the code has no version."""
    for module in model.modules():
        changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        if changed or type(module).__module__.split(".")[0] not in LIBRARIES:
            return None
    digest = hashlib.sha256(repr((image_size, granularity, software_sha256(LIBRARIES, CODE))).encode())
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        settings = {key: value for key, value in config.to_dict().items() if key not in NAMES}
        digest.update(repr((sorted(settings.items()), config._attn_implementation)).encode())
    for name, module in model.named_modules():
        settings = {k: v for k, v in vars(module).items() if k[0] != "_" and k not in NAMES and _plain(v)}
        weights = [(key, tuple(t.shape), t.dtype) for key, t in _own(module)]
        digest.update(
            repr(
                (name, type(module).__module__, type(module).__qualname__, sorted(settings.items()), weights)
            ).encode()
        )
    return digest.hexdigest()


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list | torch.Size):
        return all(_plain(item) for item in value)
    return isinstance(value, PLAIN)


def _write(file: Path, found: Cuts) -> None:
    """Structure as JSON in the header of a safetensors file, values of constants as its tensors.

    Raises:
        NotImplementedError, TypeError: an output has a structure that JSON cannot hold.
        ValueError: a constant was computed from weights.
    """
    values: dict[str, Tensor] = {}
    specs: dict[str, Any] = {}
    for cut in found.cuts:
        for path, spec in cut.specs().items():
            if path not in specs:
                tree = treespec_dumps(spec.tree)
                if not _known(json.loads(tree)[1]):
                    raise TypeError(f"the output of '{path}' is of a class of its own")
                specs[path] = {"tree": tree, "leaves": [_leaf(x, values) for x in spec.leaves]}
    cuts = [
        {
            "name": cut.name,
            "aliases": cut.aliases,
            "layout": asdict(cut.layout),
            "tensors": [(made.path, made.leaf, made.modified) for made in cut.tensors],
            "before": [path for path, _ in cut.before],
            "after": [path for path, _ in cut.after],
        }
        for cut in found.cuts
    ]
    rest = {"classes": found.classes, "classifier": found.classifier, "features": found.features}
    text = json.dumps({"specs": specs, "cuts": cuts, "rejected": found.rejected, **rest})
    with written_whole(file) as temporary:
        save_file(values, temporary, {"cuts": text})


def _known(tree: dict[str, Any]) -> bool:
    """Whether a structure, dumped by torch, is of plain containers and outputs of transformers."""
    kind = tree["type"]
    known = kind is None or kind in CONTAINERS or kind.startswith("transformers.")
    return known and all(map(_known, tree["children_spec"]))


def _leaf(leaf: Any, values: dict[str, Tensor]) -> Any:
    if not isinstance(leaf, Leaf):
        if not isinstance(leaf, PLAIN):
            raise TypeError(f"{type(leaf).__name__} in an output")
        return {"plain": leaf}
    entry: dict[str, Any] = {
        "shape": leaf.shape,
        "dtype": str(leaf.dtype).removeprefix("torch."),
        "batched": leaf.batched,
        "constant": leaf.constant,
    }
    if leaf.values is not None:
        if leaf.values.is_floating_point():
            raise ValueError("an output holds a constant that may depend on weights")
        entry["values"] = str(len(values))
        values[entry["values"]] = leaf.values.cpu().contiguous()
    return entry


def _read(file: Path) -> Cuts | None:
    """The cuts in a file; None where there is none or it cannot be read."""
    try:
        if not file.exists():
            return None
        with safe_open(file, "pt") as opened:
            data = json.loads(opened.metadata()["cuts"])
            values = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        specs = {path: _spec(entry, values) for path, entry in data["specs"].items()}
        cuts = tuple(_cut(entry, specs) for entry in data["cuts"])
        return Cuts(cuts, data["classes"], data["classifier"], data["features"], data["rejected"])
    except Exception as error:  # whatever is wrong with it, a search will put it right
        logger.info("%s cannot be read: %s", file, error)
        return None


def _spec(entry: dict[str, Any], values: dict[str, Tensor]) -> OutputSpec:
    if not _known(json.loads(entry["tree"])[1]):
        raise ValueError("an output of a class that is not known")
    leaves: list[Any] = []
    for leaf in entry["leaves"]:
        if "plain" in leaf:
            leaves.append(leaf["plain"])
            continue
        kept = values[leaf["values"]] if "values" in leaf else None
        dtype = getattr(torch, leaf["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{leaf['dtype']!r} is no type of tensors")
        leaves.append(Leaf(tuple(leaf["shape"]), dtype, leaf["batched"], leaf["constant"], kept))
    return OutputSpec(tuple(leaves), treespec_loads(entry["tree"]))


def _cut(entry: dict[str, Any], specs: dict[str, OutputSpec]) -> Cut:
    return Cut(
        entry["name"],
        tuple(entry["aliases"]),
        layout_from_dict(entry["layout"]),
        tuple(Made(path, specs[path], leaf, modified) for path, leaf, modified in entry["tensors"]),
        tuple((path, specs[path]) for path in entry["before"]),
        tuple((path, specs[path]) for path in entry["after"]),
    )
