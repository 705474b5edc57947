"""The entry of an anchor in config.json, and how to rebuild an anchor from it."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.loading import HEAD, anchor_from_config, limit_network_size, load_anchor
from restnet_hf.anchors.weights import check_weights
from restnet_hf.data.labels import class_names, label_order
from restnet_hf.data.prepare import task_classes
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.errors import quote
from restnet_hf.hashing import Piece, fingerprint, stored_dtype
from restnet_hf.routes.route import Route


LARGE_IMAGE = 2**20  # pixels
PARTS = 8  # modules, parameters and buffers for each tensor that is saved; networks of transformers and timm have 3
NOT_COMPARED = {"label_names", "num_classes", "pretrained_cfg"}  # of timm, without effect on how the model runs
logger = logging.getLogger(__name__)


def make_entry(anchor: Anchor) -> dict[str, Any]:
    """Make the entry of an anchor, without its fingerprint, and record weights that are loaded from elsewhere."""
    config = anchor.model.config if isinstance(anchor.model, PreTrainedModel) else None
    if anchor.repo_id is not None:
        anchor.record_weights()
    return {
        "name": anchor.name,
        "repo_id": anchor.repo_id,
        "revision": anchor.revision,
        "fingerprint": None,
        "config": None if config is None else config.to_dict(),
        "preprocessing": asdict(anchor.preprocessing),
        "label_names": None if anchor.label_names is None else list(anchor.label_names),
        "granularity": anchor.granularity,
        "pieces": None,
    }


def add_fingerprint(entry: dict[str, Any], anchor: Anchor) -> None:
    """Add the pieces and the fingerprint of an anchor's weights to its entry, unless it has them.

    Where weights have changed since the anchor was loaded, ``changed`` is added too: ``repo_id`` holds other ones.
    """
    if entry["fingerprint"] is not None:
        return
    names = anchor.snapshot.match(anchor.weights()) if anchor.snapshot.records else None
    if names is not None and None in names.values():
        names, entry["changed"] = None, True
    entry.update(_identity(anchor, names=names))
    anchor.record_weights()
    anchor.snapshot.cast = False


def _identity(
    anchor: Anchor, given: Mapping[str, Tensor] | None = None, names: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    pieces, now = anchor.pieces(given, names), anchor.weights(given)
    own = now if names is None else names.values()  # without the weights of LoRA, for example
    weights = {key: tensor for key, tensor in now.items() if key in own and tensor is not None}
    return {
        "pieces": [asdict(piece) for piece in pieces],
        "fingerprint": fingerprint(anchor.model, pieces, weights),
    }


def _changes(entry: dict[str, Any], anchor: Anchor, given: Mapping[str, Tensor] | None = None) -> list[str]:
    unnamed = entry["fingerprint"] is None and bool(anchor.snapshot.records)
    if unnamed and (changed := anchor.changed_weights(given=given)):
        return changed  # nothing is recorded, since the weights may be restored
    add_fingerprint(entry, anchor)
    return anchor.changed_weights([Piece.from_dict(piece) for piece in entry["pieces"]], given)


def current_entry(entry: dict[str, Any], anchor: Anchor) -> dict[str, Any]:
    """The entry of an anchor with its present weights; ``entry`` itself where none has changed."""
    changed = _changes(entry, anchor) or anchor.weights().keys() - anchor.snapshot.records.keys()
    return {**entry, **_identity(anchor), "changed": True} if changed else entry


def saved_entry(
    entry: dict[str, Any], anchor: Anchor, standalone: bool, given: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """The entry to save for an anchor.

    Args:
        entry: present entry of the anchor.
        anchor: anchor that is saved.
        standalone: whether the anchor's weights are saved too.
        given: weights to save instead of the anchor's own, by name.

    Raises:
        ValueError: weights that are not saved have changed, or the config could not rebuild the saved weights.
    """
    changed = _changes(entry, anchor, given)
    if standalone:
        _check_layers(anchor, given)
        if not changed and not anchor.snapshot.cast:
            return entry
        return {**entry, **_identity(anchor, given), **({"changed": True} if changed else {})}
    if not changed and not entry.get("changed"):
        return entry
    what = f"{len(changed)} of its weights have changed, {changed[0]} first" if changed else "its weights have changed"
    advice = (
        "save with standalone=True, which writes them too, or keep LoRA as it is instead of merging it, and save it "
        "beside with PEFT"
        if entry["config"] is not None
        else "it was made in code: save its weights yourself, and build a new model out of it with from_anchors"
    )
    raise ValueError(
        f"anchor '{anchor.name}' is no longer the network that the adapter names ({entry['repo_id']}): {what}, and an "
        f"adapter holds no weights of anchors. Nothing was saved: {advice}"
    )


def _check_layers(anchor: Anchor, given: Mapping[str, Tensor] | None) -> None:
    """Raise ValueError where an anchor has other layers than its config would build."""
    now, records = anchor.weights(given), anchor.snapshot.records
    different = sorted(now.keys() ^ records.keys()) if records else []
    different += [
        name for name, record in records.items() if (t := now.get(name)) is not None and t.shape != record.shape
    ]
    if different:
        raise ValueError(
            f"anchor '{anchor.name}' has other layers than its config ({different[0]} and {len(different) - 1} more), "
            "and a checkpoint with them could not be loaded. Merge LoRA with merge_and_unload() first, or leave "
            "standalone=True out and save it beside with PEFT"
        )


def rebuild_anchor(entry: Mapping[str, Any], check: Callable[[nn.Module], None] | None = None) -> Anchor:
    """Rebuild an anchor with random weights from its entry.

    Args:
        entry: entry of the anchor in config.json.
        check: function that raises ValueError for a wrong network; see `anchor_from_config`.

    Raises:
        ValueError: no image classifier has such a config.
    """
    if entry["config"] is None:
        raise ValueError(f"anchor '{entry['name']}' was made in code and cannot be rebuilt from a config")
    preprocessing = Preprocessing.from_dict(entry["preprocessing"])
    options = {"label_names": entry["label_names"], "granularity": entry["granularity"]}
    return anchor_from_config(entry["config"], entry["name"], preprocessing, check, **options)


def reload_anchor(
    entry: Mapping[str, Any],
    given: nn.Module | str | None,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    routes: Iterable[Route],
) -> Anchor:
    """Load the anchor of an entry, or use the one given, and check that it is the same network.

    The weights that ``routes`` use are checked at once, the others when they first run.

    Args:
        entry: entry of the anchor in config.json.
        given: module, folder or Hub id to use instead of the entry's; None to load the entry's.
        dtype: type to cast the weights to.
        options: options of `load_anchor`, such as ``token``.
        routes: routes whose weights are checked at once.

    Raises:
        OSError: the anchor cannot be loaded.
        ValueError: the anchor is another network.
    """
    if isinstance(given, Anchor):
        given = given.model
    hint = _hint(entry)
    source = entry["repo_id"] if given is None else given
    if source is None:
        raise ValueError(f"anchor '{entry['name']}' was made in code; pass it: {hint}")
    # the weights are compared in the type that they had, and cast afterwards
    stored = stored_dtype(entry["fingerprint"])
    try:
        anchor = load_anchor(
            source,
            name=entry["name"],
            revision=entry["revision"] if given is None else None,
            preprocessing=Preprocessing.from_dict(entry["preprocessing"]),
            label_names=entry["label_names"],
            granularity=entry["granularity"],
            dtype=stored or dtype,
            **options,
        )
    except OSError as error:
        raise OSError(f"{error} If the anchor has moved, pass it: {hint}") from error
    return _check_anchor(anchor, entry, dtype, routes, type(source).__name__ if given is not None else str(source))


def load_embedded_anchor(
    entry: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, routes: Iterable[Route], where: str
) -> Anchor:
    """Rebuild an anchor whose weights are in the checkpoint, under ``anchors.NAME.model.``, and check it.

    Args:
        entry: entry of the anchor in config.json.
        weights: tensors of the checkpoint, by name.
        dtype: type to cast the weights to.
        routes: routes whose weights are checked at once.
        where: file or argument that holds the weights, for errors.

    Raises:
        ValueError: the anchor cannot be rebuilt, or is another network.
    """
    prefix = f"anchors.{entry['name']}.model."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    with limit_network_size(PARTS * (len(own) + 32), 2 * sum(tensor.numel() for tensor in own.values()) + HEAD):
        anchor = rebuild_anchor(entry, lambda model: check_weights(own, model.state_dict(), where))
    anchor.model.load_state_dict(own, assign=True)
    return _check_anchor(anchor, entry, dtype, routes, where)


def _hint(entry: Mapping[str, Any]) -> str:
    return f"from_pretrained(..., anchors={{{entry['name']!r}: a module or a folder}})"


def _check_anchor(
    anchor: Anchor, entry: Mapping[str, Any], dtype: torch.dtype, routes: Iterable[Route], where: str
) -> Anchor:
    pieces = [Piece.from_dict(piece) for piece in entry["pieces"]]
    if math.prod(anchor.preprocessing.image_size) > LARGE_IMAGE:
        _check_sizes(anchor, pieces)
    try:
        _check_settings(anchor.model, entry["config"] or {}, _hint(entry))
        _check_cuts(anchor, pieces)
        anchor.expect_weights(pieces)
        if fingerprint(anchor.model, pieces) != entry["fingerprint"]:
            raise ValueError(f"its class or the type of its weights differs. Pass the right one: {_hint(entry)}")
        used = [segment for route in routes for segment in route.segments if segment.anchor == anchor.name]
        for start, stop in {(segment.start, segment.stop) for segment in used}:
            anchor.verify(start, stop)
        if any(parameter.dtype != dtype for parameter in anchor.parameters()):
            anchor.verify()
    except ValueError as error:
        present = anchor.fingerprint()
        differs = f"its fingerprint is {present}, not {entry['fingerprint']}. "
        differs = differs if present != entry["fingerprint"] else ""
        raise ValueError(
            f"anchor '{anchor.name}' ({where}) is not the network this adapter was made for: {differs}{error}"
        ) from error
    return anchor.to(dtype)


def _check_settings(model: nn.Module, saved: Mapping[str, Any], hint: str) -> None:
    """Raise ValueError where a setting that both have differs, such as the number of attention heads."""
    config = getattr(model, "config", None)
    settings = json.loads(json.dumps(config.to_dict(), default=str)) if isinstance(config, PreTrainedConfig) else {}
    for key in sorted(settings.keys() & saved.keys() - PreTrainedConfig().to_dict().keys() - NOT_COMPARED):
        then = json.loads(json.dumps(saved[key], default=str))
        if settings[key] != then:
            raise ValueError(f"its setting {key} is {settings[key]!r} and was {then!r}. Pass the right one: {hint}")


@torch.no_grad()
def _check_sizes(anchor: Anchor, pieces: Sequence[Piece]) -> None:
    """Raise ValueError where the sizes of activations differ from the entry's, before any is computed.

    The network runs on the meta device, so that a config that asks for images of 4096x4096 pixels takes no memory.
    """
    modules = dict(anchor.model.named_modules())
    sizes = {p.cut: math.prod(p.shape) for p in pieces[:-1] if p.cut in modules or p.unnamed is None}
    for name in sizes:
        if not isinstance(name, str) or name not in modules:
            raise ValueError(f"anchor '{anchor.name}' has no module {quote(name)}, where it had a cut")
    counts: dict[str, list[int]] = {}

    def count(name: str, output: Any) -> None:
        counts[name] = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    hooks = [
        modules[name].register_forward_hook(lambda module, args, output, name=name: count(name, output))
        for name in sizes
        if name
    ]
    tensors = (*anchor.model.named_parameters(), *anchor.model.named_buffers())
    images = torch.empty(1, 3, *anchor.preprocessing.image_size, device="meta", dtype=next(anchor.parameters()).dtype)
    try:
        functional_call(anchor.model, {name: tensor.to("meta") for name, tensor in tensors}, (images,))
    except Exception:  # not every network runs without values; the search for cuts then checks them
        logger.info("%s does not run on the meta device", type(anchor.model).__name__)
    finally:
        for hook in hooks:
            hook.remove()
    for name, numbers in counts.items():
        if numbers and sizes[name] not in (*numbers, sum(numbers)):
            pixels = "x".join(map(str, anchor.preprocessing.image_size))
            raise ValueError(
                f"'{name}' of anchor '{anchor.name}' returns {numbers} numbers for an image of {pixels} pixels, and "
                f"{sizes[name]} when the adapter was made"
            )


def _check_cuts(anchor: Anchor, pieces: Sequence[Piece]) -> None:
    """Raise ValueError unless the anchor has the cuts of its entry, by which routes are numbered.

    Where the weights before each cut can be recognised without their names, cuts may have other names, too.
    """
    present = [(cut.name, cut.layout.shape(1)[1:]) for cut in anchor.cuts]
    saved = [(piece.cut, piece.shape) for piece in pieces[:-1]]
    if all(piece.unnamed for piece in pieces) and len(present) == len(saved):
        saved = [(now, shape) for (now, _), (_, shape) in zip(present, saved, strict=True)]
    if present != saved:
        number = next(
            (i for i, (a, b) in enumerate(zip(present, saved, strict=False)) if a != b), min(len(present), len(saved))
        )
        here, then = (f"'{c[number][0]}' {c[number][1]}" if number < len(c) else "missing" for c in (present, saved))
        raise ValueError(
            f"cut {number + 1} is {here} here and was {then}. Where the weights are the same, the versions of "
            "transformers or timm differ too much for its routes: install those that profile.json names."
        )


def class_order(front: Anchor, anchor: Anchor) -> list[int]:
    """The position among an anchor's logits of each class of the front.

    Raises:
        ValueError: the anchors do not name the same classes.
    """
    if (
        front.label_names is None
        and anchor.label_names is None
        and front.search_result.classes == anchor.search_result.classes
    ):
        return list(range(front.search_result.classes))
    order = None
    if front.label_names is not None and anchor.label_names is not None:
        order = label_order(front.label_names, anchor.label_names)
    if order is None:
        counts = [
            f"'{a.name}': {len(a.label_names)} names" if a.label_names else f"'{a.name}': no names"
            for a in (front, anchor)
        ]
        raise ValueError(
            f"the anchors do not name the same classes ({', '.join(counts)}). Name them with "
            "load_anchor(..., label_names=), or ask for a new head with num_labels= or id2label="
        )
    return order


def know_classes(anchors: Iterable[Anchor], names: Sequence[str]) -> bool:
    """Whether all anchors classify the classes of these names, in any order.

    Args:
        anchors: anchors with their own heads.
        names: names of the classes; ``_`` stands for a space too.
    """
    plain = [name.replace("_", " ") for name in names]
    known = [[name.replace("_", " ") for name in anchor.label_names or ()] for anchor in anchors]
    return all(bool(each) and label_order(plain, each) is not None for each in known)


def new_task(
    anchors: Sequence[Anchor], num_labels: int | None, id2label: Mapping[int, str] | None, labels_from: Any
) -> tuple[int | None, Mapping[int, str] | None]:
    """Number and names of the classes of a new task; None for both where the anchors keep their heads.

    Args:
        anchors: anchors of the model.
        num_labels: number of classes that the caller gives.
        id2label: names of classes that the caller gives.
        labels_from: data whose classes are the task; None for those that the caller gives.

    Raises:
        ValueError: the classes of the data are not known, or are given twice.
    """
    if labels_from is None:
        return num_labels, id2label
    if num_labels is not None or id2label is not None:
        raise ValueError("labels_from gives the classes of the task; leave num_labels and id2label out")
    names = task_classes(labels_from)
    return (None, None) if know_classes(anchors, names) else (None, dict(enumerate(names)))


def describe_model(
    anchors: Sequence[Anchor], num_labels: int | None, id2label: Mapping[int, str] | None
) -> dict[str, Any]:
    """The values of the config of a new model.

    Args:
        anchors: anchors of the model, front first.
        num_labels: number of classes of a new task; None for the anchors' own, or with ``id2label``.
        id2label: class names of a new task.
    """
    front = anchors[0]
    names = class_names(num_labels, id2label) or dict(enumerate(front.label_names or ()))
    names = names or {index: f"LABEL_{index}" for index in range(front.search_result.classes)}
    return {
        "anchors": [make_entry(anchor) for anchor in anchors],
        "new_head": num_labels is not None or id2label is not None,
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "dtype": next(front.parameters()).dtype,
    }
