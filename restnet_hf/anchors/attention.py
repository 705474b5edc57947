"""How anchors from transformers compute attention."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from restnet_hf.anchors.anchor import Anchor


def set_attention(
    anchors: Mapping[str, Anchor], implementations: Mapping[str, str], **kwargs: Any
) -> dict[str, ValueError]:
    """Set the attention implementation of some anchors; returns the errors of those that cannot take it, by name.

    Args:
        anchors: mapping from names to anchors.
        implementations: ``eager``, ``sdpa``, ``flash_attention_2``, ... by anchor name.
        **kwargs: further arguments of ``PreTrainedModel.set_attn_implementation``.
    """
    errors: dict[str, ValueError] = {}
    for name, implementation in implementations.items():
        model = anchors[name].model
        if not isinstance(model, PreTrainedModel):
            errors[name] = ValueError(f"anchor '{name}' is not a model of transformers")
            continue
        try:
            model.set_attn_implementation(implementation, **kwargs)
        except ValueError as error:
            errors[name] = error
    return errors
