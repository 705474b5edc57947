"""What config.json says of an anchor, and the anchor back from it."""

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
from restnet_hf.anchors.loading import HEAD, anchor_from_config, at_most, load_anchor
from restnet_hf.anchors.weights import check_weights
from restnet_hf.data.labels import class_names, label_order
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.errors import quote
from restnet_hf.hashing import Piece, fingerprint, stored_dtype
from restnet_hf.routes.route import Route


LARGE_IMAGE = 2**20  # pixels
logger = logging.getLogger(__name__)
PARTS = 8  # modules, parameters and buffers for each tensor that is saved; networks of transformers and timm have 3
NO_SETTINGS = {"label_names", "num_classes", "pretrained_cfg"}  # of timm: what the model does with images is elsewhere


def describe(anchor: Anchor) -> dict[str, Any]:
    """What config.json says of an anchor; from now on a change of weights that lie elsewhere is told."""
    config = anchor.model.config if isinstance(anchor.model, PreTrainedModel) else None
    if anchor.repo_id is not None:
        anchor.seal_weights()
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


def identify(entry: dict[str, Any], anchor: Anchor) -> None:
    """Write into what config.json says of an anchor, unless it stands there already, which weights it has.

    Where they have changed since it was loaded, ``changed`` stands there, too: ``repo_id`` holds others.
    """
    if entry["fingerprint"] is not None:
        return
    names = anchor.seal.match(anchor.weights()) if anchor.seal.marks else None
    if names is not None and None in names.values():
        names, entry["changed"] = None, True
    entry.update(_identity(anchor, names=names))
    anchor.seal_weights()
    anchor.seal.cast = False


def _identity(
    anchor: Anchor, given: Mapping[str, Tensor] | None = None, names: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    pieces, now = anchor.pieces(given, names), anchor.weights(given)
    own = now if names is None else names.values()  # without those of LoRA, say
    weights = {key: tensor for key, tensor in now.items() if key in own and tensor is not None}
    return {
        "pieces": [asdict(piece) for piece in pieces],
        "fingerprint": fingerprint(anchor.model, pieces, weights),
    }


def _changes(entry: dict[str, Any], anchor: Anchor, given: Mapping[str, Tensor] | None = None) -> list[str]:
    unnamed = entry["fingerprint"] is None and bool(anchor.seal.marks)
    if unnamed and (changed := anchor.changed(given=given)):
        return changed  # nothing is written down, as they may be set right
    identify(entry, anchor)
    return anchor.changed([Piece.from_dict(piece) for piece in entry["pieces"]], given)


def present(entry: dict[str, Any], anchor: Anchor) -> dict[str, Any]:
    """What config.json would say of an anchor that has the weights it has now; ``entry`` where none has changed."""
    changed = _changes(entry, anchor) or anchor.weights().keys() - anchor.seal.marks.keys()
    return {**entry, **_identity(anchor), "changed": True} if changed else entry


def saved_entry(
    entry: dict[str, Any], anchor: Anchor, standalone: bool, given: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """What config.json is to say of an anchor that is saved.

    Args:
        entry: what it says so far.
        anchor: whose it is.
        standalone: whether its weights are saved, too.
        given: weights that are saved in the place of its own, by name.

    Raises:
        ValueError: weights that are not saved have changed, or such as no config could rebuild are to be saved.
    """
    changed = _changes(entry, anchor, given)
    if standalone:
        _check_layers(anchor, given)
        if not changed and not anchor.seal.cast:
            return entry
        return {**entry, **_identity(anchor, given), **({"changed": True} if changed else {})}
    if not changed and not entry.get("changed"):
        return entry
    what = f"{len(changed)} of its weights have changed, {changed[0]} first" if changed else "its weights have changed"
    ways = (
        "save with standalone=True, which writes them too, or keep LoRA as it is instead of merging it, and save it "
        "beside with PEFT"
        if entry["config"] is not None
        else "it was made in code: save its weights yourself, and build a new model out of it with from_anchors"
    )
    raise ValueError(
        f"anchor '{anchor.name}' is no longer the network that the adapter names ({entry['repo_id']}): {what}, and an "
        f"adapter holds no weights of anchors. Nothing was saved: {ways}"
    )


def _check_layers(anchor: Anchor, given: Mapping[str, Tensor] | None) -> None:
    """Raise ValueError where an anchor has other layers than its config would build."""
    now, then = anchor.weights(given), anchor.seal.marks
    odd = sorted(now.keys() ^ then.keys()) if then else []
    odd += [name for name, mark in then.items() if (t := now.get(name)) is not None and t.shape != mark.shape]
    if odd:
        raise ValueError(
            f"anchor '{anchor.name}' has other layers than its config says ({odd[0]} and {len(odd) - 1} more), and a "
            "checkpoint with them could not be loaded. Merge LoRA with merge_and_unload() first, or leave "
            "standalone=True out and save it beside with PEFT"
        )


def rebuild(entry: Mapping[str, Any], check: Callable[[nn.Module], None] | None = None) -> Anchor:
    """An anchor with random weights from what config.json says of it; see `anchor_from_config`."""
    if entry["config"] is None:
        raise ValueError(f"anchor '{entry['name']}' was made in code and cannot be rebuilt from a config")
    preprocessing = Preprocessing.from_dict(entry["preprocessing"])
    options = {"label_names": entry["label_names"], "granularity": entry["granularity"]}
    return anchor_from_config(entry["config"], entry["name"], preprocessing, check, **options)


def reload(
    entry: Mapping[str, Any],
    given: nn.Module | str | None,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    routes: Iterable[Route],
) -> Anchor:
    """An anchor as config.json names it, or the one given for it; checked to be the same network.

    The weights that ``routes`` use are checked at once, the others when they first run.

    Raises:
        OSError: it cannot be loaded.
        ValueError: it is another network.
    """
    if isinstance(given, Anchor):
        given = given.model
    hint = _hint(entry)
    source = entry["repo_id"] if given is None else given
    if source is None:
        raise ValueError(f"anchor '{entry['name']}' was made in code; pass it: {hint}")
    # the weights are compared in the type that they had, and cast after
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
    return _checked(anchor, entry, dtype, routes, type(source).__name__ if given is not None else str(source))


def embedded(
    entry: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype, routes: Iterable[Route], where: str
) -> Anchor:
    """An anchor whose weights lie in the checkpoint itself, under ``anchors.NAME.model.``; checked as by `reload`.

    Raises:
        ValueError: it cannot be rebuilt, or is another network.
    """
    prefix = f"anchors.{entry['name']}.model."
    mine = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    with at_most(PARTS * (len(mine) + 32), 2 * sum(tensor.numel() for tensor in mine.values()) + HEAD):
        anchor = rebuild(entry, lambda model: check_weights(mine, model.state_dict(), where))
    anchor.model.load_state_dict(mine, assign=True)
    return _checked(anchor, entry, dtype, routes, where)


def _hint(entry: Mapping[str, Any]) -> str:
    return f"from_pretrained(..., anchors={{{entry['name']!r}: a module or a folder}})"


def _checked(
    anchor: Anchor, entry: Mapping[str, Any], dtype: torch.dtype, routes: Iterable[Route], where: str
) -> Anchor:
    pieces = [Piece.from_dict(piece) for piece in entry["pieces"]]
    if math.prod(anchor.preprocessing.image_size) > LARGE_IMAGE:
        _same_sizes(anchor, pieces)
    try:
        _same_settings(anchor.model, entry["config"] or {}, _hint(entry))
        _same_cuts(anchor, pieces)
        anchor.expect(pieces)
        if fingerprint(anchor.model, pieces) != entry["fingerprint"]:
            raise ValueError(f"its class or the type of its weights differs. Pass the right one: {_hint(entry)}")
        used = [segment for route in routes for segment in route.segments if segment.anchor == anchor.name]
        for start, stop in {(segment.start, segment.stop) for segment in used}:
            anchor.verify(start, stop)
        if any(parameter.dtype != dtype for parameter in anchor.parameters()):
            anchor.verify()
    except ValueError as error:
        found = anchor.fingerprint()
        differs = f"its fingerprint is {found}, not {entry['fingerprint']}. " if found != entry["fingerprint"] else ""
        raise ValueError(
            f"anchor '{anchor.name}' ({where}) is not the network this adapter was made for: {differs}{error}"
        ) from error
    return anchor.to(dtype)


def _same_settings(model: nn.Module, saved: Mapping[str, Any], hint: str) -> None:
    """Raise ValueError where a setting that both know differs, such as the number of attention heads."""
    config = getattr(model, "config", None)
    found = json.loads(json.dumps(config.to_dict(), default=str)) if isinstance(config, PreTrainedConfig) else {}
    for key in sorted(found.keys() & saved.keys() - PreTrainedConfig().to_dict().keys() - NO_SETTINGS):
        then = json.loads(json.dumps(saved[key], default=str))
        if found[key] != then:
            raise ValueError(f"its setting {key} is {found[key]!r} and was {then!r}. Pass the right one: {hint}")


@torch.no_grad()
def _same_sizes(anchor: Anchor, pieces: Sequence[Piece]) -> None:
    """Raise ValueError where activations are not as large as they were, before any is computed.

    The network runs on the meta device, so that a config that asks for images of 4096x4096 pixels takes no memory.
    """
    sizes, modules = {piece.cut: math.prod(piece.shape) for piece in pieces[:-1]}, dict(anchor.model.named_modules())
    for name in sizes:
        if not isinstance(name, str) or name not in modules:
            raise ValueError(f"anchor '{anchor.name}' has no module {quote(name)}, where it had a cut")
    found: dict[str, list[int]] = {}

    def see(name: str, output: Any) -> None:
        found[name] = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    hooks = [
        modules[name].register_forward_hook(lambda module, args, output, name=name: see(name, output))
        for name in sizes
        if name
    ]
    tensors = (*anchor.model.named_parameters(), *anchor.model.named_buffers())
    images = torch.empty(1, 3, *anchor.preprocessing.image_size, device="meta", dtype=next(anchor.parameters()).dtype)
    try:
        functional_call(anchor.model, {name: tensor.to("meta") for name, tensor in tensors}, (images,))
    except Exception:  # not every network runs without values; then the search for cuts will tell
        logger.info("%s does not run on the meta device", type(anchor.model).__name__)
    finally:
        for hook in hooks:
            hook.remove()
    for name, there in found.items():
        if there and sizes[name] not in (*there, sum(there)):
            pixels = "x".join(map(str, anchor.preprocessing.image_size))
            raise ValueError(
                f"'{name}' of anchor '{anchor.name}' gives {there} numbers for an image of {pixels} pixels, and "
                f"{sizes[name]} when the adapter was made"
            )


def _same_cuts(anchor: Anchor, pieces: Sequence[Piece]) -> None:
    """Raise ValueError unless the anchor has the cuts that it had, from which routes count."""
    found = [(cut.name, cut.layout.shape(1)[1:]) for cut in anchor.cuts]
    saved = [(piece.cut, piece.shape) for piece in pieces[:-1]]
    if found != saved:
        number = next(
            (i for i, (a, b) in enumerate(zip(found, saved, strict=False)) if a != b), min(len(found), len(saved))
        )
        here, then = (f"'{c[number][0]}' {c[number][1]}" if number < len(c) else "missing" for c in (found, saved))
        raise ValueError(
            f"cut {number + 1} is {here} here and was {then}. Where the weights are the same, the versions of "
            "transformers or timm differ too much for its routes: install those that profile.json names."
        )


def class_order(front: Anchor, anchor: Anchor) -> list[int]:
    """Where the front's classes are among the anchor's logits."""
    if front.label_names is None and anchor.label_names is None and front.found.classes == anchor.found.classes:
        return list(range(front.found.classes))
    order = None
    if front.label_names is not None and anchor.label_names is not None:
        order = label_order(front.label_names, anchor.label_names)
    if order is None:
        says = [
            f"'{a.name}': {len(a.label_names)} names" if a.label_names else f"'{a.name}': no names"
            for a in (front, anchor)
        ]
        raise ValueError(
            f"the anchors do not name the same classes ({', '.join(says)}). Name them with "
            "load_anchor(..., label_names=), or ask for a new head with num_labels= or id2label="
        )
    return order


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
    names = names or {index: f"LABEL_{index}" for index in range(front.found.classes)}
    return {
        "anchors": [describe(anchor) for anchor in anchors],
        "new_head": num_labels is not None or id2label is not None,
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "dtype": next(front.parameters()).dtype,
    }
