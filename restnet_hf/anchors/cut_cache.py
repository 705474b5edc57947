"""A cache of cuts on disk by architecture, so that a network is searched once on a machine."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import treespec_dumps, treespec_loads
from transformers import PreTrainedConfig

from restnet_hf.anchors.cut import Cut, CutTensor, Leaf, OutputSpec
from restnet_hf.anchors.discovery import MIN_CUTS, Cuts
from restnet_hf.anchors.layouts import layout_from_dict
from restnet_hf.caching import CUTS, assets_folder, note_use
from restnet_hf.files import atomic_file
from restnet_hf.hashing import software_sha256


LIBRARIES = ("torch", "torchvision", "transformers", "timm")  # their code is identified by the version
CODE = ("data", "anchors")  # rooms that cuts depend on
NOT_SETTINGS = {
    "_name_or_path",
    "name_or_path",
    "id2label",
    "label2id",
    "label_names",
    "transformers_version",
    "training",
}
CONTAINERS = ("builtins.dict", "builtins.list", "builtins.tuple", "collections.OrderedDict", "torch.Size")
PLAIN_TYPES = (bool, int, float, str, type(None))
logger = logging.getLogger(__name__)


def cached_cuts(model: nn.Module, image_size: tuple[int, int], granularity: str, find: Callable[[], Cuts]) -> Cuts:
    """The result of ``find``, or the cached one for a network of the same architecture.

    Cuts depend on classes, their settings, and the names, shapes and types of the weights, but not on their values. A
    network with code that has no version, such as a module of yours, is searched every time. The files lie in
    ``HF_HOME/assets/restnet_hf`` and can be deleted.

    Args:
        model: classifier whose cuts are needed.
        image_size: height and width of the images.
        granularity: granularity of the search, as for `find_cuts`.
        find: function that searches for the cuts.
    """
    key = architecture(model, image_size, granularity)
    if key is None:
        return find()
    try:
        file = assets_folder(CUTS) / f"{key}.safetensors"
    except (OSError, ValueError) as error:  # a file in the way is a ValueError there
        logger.info("cuts cannot be cached: %s", error)
        return find()
    cached = _read(file)
    if cached is not None:
        note_use(file)
        return cached
    cuts = find()
    if cuts.rejected or len(cuts.cuts) < MIN_CUTS:
        return cuts  # other weights may give other cuts
    try:
        _write(file, cuts, f"{type(model).__name__}, {image_size[0]} x {image_size[1]} px")
    except (OSError, NotImplementedError, TypeError, ValueError) as error:
        logger.info("cuts of %s cannot be cached: %s", type(model).__name__, error)
    return cuts


def architecture(model: nn.Module, image_size: tuple[int, int], granularity: str) -> str | None:
    """SHA-256 of everything that cuts depend on; None where some of the code has no version."""
    for module in model.modules():
        changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        if changed or type(module).__module__.split(".")[0] not in LIBRARIES:
            return None
    digest = hashlib.sha256(repr((image_size, granularity, software_sha256(LIBRARIES, CODE))).encode())
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        settings = {key: value for key, value in config.to_dict().items() if key not in NOT_SETTINGS}
        digest.update(repr((sorted(settings.items()), config._attn_implementation)).encode())
    for name, module in model.named_modules():
        settings = {k: v for k, v in vars(module).items() if k[0] != "_" and k not in NOT_SETTINGS and _is_plain(v)}
        weights = [(key, tuple(t.shape), t.dtype) for key, t in _own(module)]
        digest.update(
            repr(
                (name, type(module).__module__, type(module).__qualname__, sorted(settings.items()), weights)
            ).encode()
        )
    return digest.hexdigest()


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | torch.Size):
        return all(_is_plain(item) for item in value)
    return isinstance(value, PLAIN_TYPES)


def _write(file: Path, result: Cuts, of: str) -> None:
    """Write cuts as a safetensors file: structure as JSON in its header, values of constants as its tensors.

    ``of`` is what ``restnet-hf cache list`` shows beside the file.

    Raises:
        NotImplementedError, TypeError: an output has a structure that JSON cannot hold.
        ValueError: a constant was computed from weights.
    """
    values: dict[str, Tensor] = {}
    specs: dict[str, Any] = {}
    for cut in result.cuts:
        for path, spec in cut.specs().items():
            if path not in specs:
                tree = treespec_dumps(spec.tree)
                if not _is_known(json.loads(tree)[1]):
                    raise TypeError(f"the output of '{path}' is of an unknown class")
                specs[path] = {"tree": tree, "leaves": [_leaf_entry(x, values) for x in spec.leaves]}
    cuts = [
        {
            "name": cut.name,
            "aliases": cut.aliases,
            "layout": asdict(cut.layout),
            "tensors": [(made.path, made.leaf, made.modified) for made in cut.tensors],
            "before": [path for path, _ in cut.before],
            "after": [path for path, _ in cut.after],
        }
        for cut in result.cuts
    ]
    rest = {"classes": result.classes, "classifier": result.classifier, "features": result.features}
    text = json.dumps({"specs": specs, "cuts": cuts, "rejected": result.rejected, **rest})
    with atomic_file(file) as temporary:
        save_file(values, temporary, {"cuts": text, "of": of})


def _is_known(tree: dict[str, Any]) -> bool:
    """Whether a structure, dumped by torch, only holds plain containers and outputs of transformers."""
    kind = tree["type"]
    known = kind is None or kind in CONTAINERS or kind.startswith("transformers.")
    return known and all(map(_is_known, tree["children_spec"]))


def _leaf_entry(leaf: Any, values: dict[str, Tensor]) -> Any:
    if not isinstance(leaf, Leaf):
        if not isinstance(leaf, PLAIN_TYPES):
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
    """Read cuts from a file; None where there is no file or it cannot be read."""
    try:
        if not file.exists():
            return None
        with safe_open(file, "pt") as opened:
            data = json.loads(opened.metadata()["cuts"])
            values = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        specs = {path: _read_spec(entry, values) for path, entry in data["specs"].items()}
        cuts = tuple(_read_cut(entry, specs) for entry in data["cuts"])
        return Cuts(cuts, data["classes"], data["classifier"], data["features"], data["rejected"])
    except Exception as error:  # whatever is wrong with the file, a search replaces it
        logger.info("%s cannot be read: %s", file, error)
        return None


def _read_spec(entry: dict[str, Any], values: dict[str, Tensor]) -> OutputSpec:
    if not _is_known(json.loads(entry["tree"])[1]):
        raise ValueError("an output is of an unknown class")
    leaves: list[Any] = []
    for leaf in entry["leaves"]:
        if "plain" in leaf:
            leaves.append(leaf["plain"])
            continue
        constant = values[leaf["values"]] if "values" in leaf else None
        dtype = getattr(torch, leaf["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{leaf['dtype']!r} is not a type of tensors")
        leaves.append(Leaf(tuple(leaf["shape"]), dtype, leaf["batched"], leaf["constant"], constant))
    return OutputSpec(tuple(leaves), treespec_loads(entry["tree"]))


def _read_cut(entry: dict[str, Any], specs: dict[str, OutputSpec]) -> Cut:
    return Cut(
        entry["name"],
        tuple(entry["aliases"]),
        layout_from_dict(entry["layout"]),
        tuple(CutTensor(path, specs[path], leaf, modified) for path, leaf, modified in entry["tensors"]),
        tuple((path, specs[path]) for path in entry["before"]),
        tuple((path, specs[path]) for path in entry["after"]),
    )
