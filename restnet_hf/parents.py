"""What config.json says of an anchor, and the anchor back from it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from restnet_hf.anchors import Anchor, anchor_from_config, load_anchor
from restnet_hf.labels import label_order
from restnet_hf.preprocessing import Preprocessing


def describe(anchor: Anchor) -> dict[str, Any]:
    """What config.json says of an anchor."""
    config = anchor.model.config if isinstance(anchor.model, PreTrainedModel) else None
    return {
        "name": anchor.name,
        "repo_id": anchor.repo_id,
        "revision": anchor.revision,
        "fingerprint": None,
        "config": None if config is None else config.to_dict(),
        "preprocessing": asdict(anchor.preprocessing),
        "label_names": None if anchor.label_names is None else list(anchor.label_names),
        "granularity": anchor.granularity,
        "depth": anchor.depth,
    }


def rebuild(entry: Mapping[str, Any]) -> Anchor:
    """An anchor with random weights from what config.json says of it."""
    if entry["config"] is None:
        raise ValueError(f"anchor '{entry['name']}' was made in code and cannot be rebuilt from a config")
    preprocessing = Preprocessing.from_dict(entry["preprocessing"])
    options = {"label_names": entry["label_names"], "granularity": entry["granularity"]}
    return anchor_from_config(entry["config"], entry["name"], preprocessing, **options)


def reload(
    entry: Mapping[str, Any], given: nn.Module | str | None, dtype: torch.dtype, options: Mapping[str, Any]
) -> Anchor:
    """An anchor as config.json names it, or the one given for it; checked to be the same network.

    Raises:
        OSError: it cannot be loaded.
        ValueError: it is another network.
    """
    name, hint = entry["name"], f"from_pretrained(..., anchors={{{entry['name']!r}: a module or a folder}})"
    source = entry["repo_id"] if given is None else given
    if source is None:
        raise ValueError(f"anchor '{name}' was made in code; pass it: {hint}")
    preprocessing = Preprocessing.from_dict(entry["preprocessing"])
    # the weights are compared in the type that they had, and cast after
    stored = getattr(torch, entry["fingerprint"].split(":")[0], None)
    try:
        anchor = load_anchor(
            source,
            name=name,
            revision=entry["revision"] if given is None else None,
            preprocessing=preprocessing,
            label_names=entry["label_names"],
            granularity=entry["granularity"],
            dtype=stored if isinstance(stored, torch.dtype) else dtype,
            **options,
        )
    except OSError as error:
        raise OSError(f"{error} If the anchor has moved, pass it: {hint}") from error
    found = anchor.fingerprint()
    if found != entry["fingerprint"]:
        raise ValueError(
            f"anchor '{name}' ({type(source).__name__ if given is not None else source}) is not the network this "
            f"adapter was made for: its fingerprint is {found}, not {entry['fingerprint']}. Pass the right one: {hint}"
        )
    if anchor.depth != entry["depth"]:
        raise ValueError(
            f"anchor '{name}' has {anchor.depth} cuts here and had {entry['depth']} when the adapter was saved: the "
            "versions of transformers or timm differ too much for its routes. Install those that profile.json names"
        )
    return anchor.to(dtype)


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
