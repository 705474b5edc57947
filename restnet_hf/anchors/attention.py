"""How anchors from transformers compute attention."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from restnet_hf.anchors.anchor import Anchor


logger = logging.get_logger(__name__)


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


def change_attention(anchors: Mapping[str, Anchor], implementation: str | Mapping[str, str], **kwargs: Any) -> None:
    """Set the attention implementation of anchors; those that cannot take it stay as they are, with a warning.

    Args:
        anchors: mapping from names to anchors.
        implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ... for all anchors, or by anchor name.
        **kwargs: further arguments of ``PreTrainedModel.set_attn_implementation``.

    Raises:
        ImportError: a package that the implementation needs is not installed.
        ValueError: there is no such implementation or anchor, or none of the anchors can take it.
    """
    wanted = dict.fromkeys(anchors, implementation) if isinstance(implementation, str) else dict(implementation)
    for name in wanted:
        if name not in anchors:
            raise ValueError(f"no anchor named '{name}'; there are {list(anchors)}")
    errors = set_attention(anchors, wanted, **kwargs)
    if errors and len(errors) == len(wanted):
        raise next(iter(errors.values()))
    if errors:
        logger.warning(f"anchors {list(errors)} keep the attention they have: {next(iter(errors.values()))}")
