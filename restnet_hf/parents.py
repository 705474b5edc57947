"""What config.json says of an anchor, and the anchor back from it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

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
    }


def rebuild(entry: Mapping[str, Any]) -> Anchor:
    """An anchor with random weights from what config.json says of it."""
    if entry["config"] is None:
        raise ValueError(f"anchor '{entry['name']}' was made in code and cannot be rebuilt from a config")
    preprocessing = Preprocessing.from_dict(entry["preprocessing"])
    options = {"label_names": entry["label_names"], "granularity": entry["granularity"]}
    return anchor_from_config(entry["config"], entry["name"], preprocessing, **options)


def reload(entry: Mapping[str, Any], module: nn.Module | None, load: Mapping[str, Any]) -> Anchor:
    """An anchor as config.json names it, or the module given for it; checked to be the same network."""
    source = module if module is not None else entry["repo_id"]
    if source is None:
        raise ValueError(
            f"anchor '{entry['name']}' was made in code; pass it: "
            f"from_pretrained(..., anchors={{{entry['name']!r}: module}})"
        )
    preprocessing = Preprocessing.from_dict(entry["preprocessing"])
    anchor = load_anchor(
        source,
        name=entry["name"],
        revision=entry["revision"],
        image_size=preprocessing.image_size,
        preprocessing=preprocessing if module is not None else None,
        label_names=entry["label_names"],
        granularity=entry["granularity"],
        **load,
    )
    anchor.preprocessing = preprocessing
    found = anchor.fingerprint()
    if found.split(":")[0] == entry["fingerprint"].split(":")[0] and found != entry["fingerprint"]:
        raise ValueError(
            f"anchor '{anchor.name}' ({source if module is None else 'given'}) is not the network this adapter was "
            f"made for: its fingerprint is {found}, not {entry['fingerprint']}"
        )
    return anchor


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
