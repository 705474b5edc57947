"""Anchors from the Hub, from folders, from modules and from configs."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ResolvedRevision
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

from restnet_hf.anchors import Anchor
from restnet_hf.hub import hub_errors
from restnet_hf.labels import label_names
from restnet_hf.preprocessing import Preprocessing, timm_processor, with_image_size
from restnet_hf.routes import ANCHOR_NAME


TIMM_PREFIXES = ("hf_hub:", "hf-hub:", "local-dir:")


@hub_errors()
def load_anchor(
    source: str | os.PathLike[str] | nn.Module | Anchor,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    label_names: Sequence[str] | None = None,
    granularity: str = "block",
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> Anchor:
    """A classifier as an anchor.

    Args:
        source: a Hub id of transformers or timm (``timm/resnet50.a1_in1k``), a local folder of either, or a module.
        name: in routes; by default the last part of the id up to its first dot.
        revision: branch, tag or commit on the Hub.
        image_size: in pixels, instead of the anchor's own.
        preprocessing: instead of what the anchor's image processor says; for a module without one.
        label_names: class names, for an anchor that does not know them.
        dtype: of the weights, as in ``from_pretrained``.
        trust_remote_code: run code from the Hub.
        **hub_kwargs: ``token``, ``cache_dir``, ``local_files_only``, ... as in ``from_pretrained``.

    Raises:
        OSError: the model cannot be found or read.
        ValueError: how the model wants its images is not known, or options contradict each other.
    """
    if isinstance(source, Anchor):
        if any(option is not None for option in (name, revision, image_size, preprocessing, label_names)):
            raise ValueError(f"anchor '{source.name}' is made already; give its options where it is made")
        return copy.copy(source)  # of the same network, but with a name and a head of its own
    if preprocessing is not None and image_size is not None:
        raise ValueError("give either image_size or preprocessing, which holds the image size")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(source, nn.Module):
        named = getattr(source, "name_or_path", "")
        model, repo_id = source, _source_id(named) if named else None
    else:
        repo_id = _source_id(source)
        revision = at_commit(repo_id, revision, hub_kwargs)  # all files from one commit, and it is known which
        load = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code, **hub_kwargs}
        model = _pretrained(repo_id, load)
    found = _processor(model, repo_id, revision, trust_remote_code, hub_kwargs)
    preprocessing, processor = _preparation(repo_id or type(model).__name__, found, preprocessing, size)
    config = getattr(model, "config", None)
    return Anchor(
        model,
        name or _short_name(repo_id or type(model).__name__),
        preprocessing,
        label_names=label_names or _labels(config),
        processor=processor,
        repo_id=repo_id,
        revision=revision.resolved if isinstance(revision, ResolvedRevision) else None,
        granularity=granularity,
    )


def at_commit(repo_id: str, revision: str | None, hub_kwargs: Mapping[str, Any]) -> str | None:
    """The revision of a repository with the commit that it now stands for, where the Hub or the cache can tell."""
    keys = ("token", "cache_dir", "local_files_only")
    return resolve_revision(repo_id, revision, **{key: hub_kwargs[key] for key in keys if hub_kwargs.get(key)})


def anchor_from_config(config: dict[str, Any], name: str, preprocessing: Preprocessing, **kwargs: Any) -> Anchor:
    """An anchor of the architecture that a transformers config describes, with random weights."""
    rebuilt = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    model = AutoModelForImageClassification.from_config(rebuilt, dtype=torch.get_default_dtype())
    return Anchor(model, name, preprocessing, **kwargs)


def _source_id(source: str | os.PathLike[str]) -> str:
    text = os.fspath(source)
    for prefix in TIMM_PREFIXES:
        text = text.removeprefix(prefix)
    return str(Path(text).resolve()) if Path(text).is_dir() else text


def _pretrained(repo_id: str, load: dict[str, Any]) -> PreTrainedModel:
    hub = {key: value for key, value in load.items() if key != "dtype"}
    try:
        config = AutoConfig.from_pretrained(repo_id, **hub)
        # timm writes the class count in two places, and transformers passes both on
        if config.model_type == "timm_wrapper" and config.model_args:
            config.model_args.pop("num_classes", None)
        return AutoModelForImageClassification.from_pretrained(repo_id, config=config, **load)
    except (OSError, ValueError) as error:
        raise OSError(
            f"anchor {repo_id!r} cannot be loaded: it must be a local folder with config.json and model.safetensors, "
            f"or the Hub id of an image classifier of transformers or timm, such as 'timm/resnet50.a1_in1k'. {error}"
        ) from error


def _processor(model: nn.Module, repo_id: str | None, revision: str | None, trust: bool, hub: dict[str, Any]) -> Any:
    cfg = getattr(getattr(model, "config", None), "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None)
    if cfg:
        return timm_processor(dict(cfg))
    if repo_id is None:
        return None
    at = {"revision": revision, **hub}
    if cached_file(repo_id, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **at) is None:
        return None
    return AutoImageProcessor.from_pretrained(repo_id, trust_remote_code=trust, **at)


def _preparation(
    of: str, processor: Any, preprocessing: Preprocessing | None, size: tuple[int, int] | None
) -> tuple[Preprocessing, Any]:
    """How images are prepared, and the processor that does it (None where it does otherwise)."""
    size = preprocessing.image_size if preprocessing is not None else size
    if processor is not None and size is not None:
        processor = with_image_size(processor, size)
    measured = None if processor is None else Preprocessing.of(processor)
    wanted = preprocessing or measured
    if wanted is None:
        raise ValueError(
            f"how {of} wants its images is not known: it has no image processor. Pass "
            "load_anchor(..., preprocessing=Preprocessing(image_size, mean, std))"
        )
    return wanted, processor if wanted == measured else None


def _labels(config: Any) -> tuple[str, ...] | None:
    id2label = getattr(config, "id2label", None)
    return label_names(id2label) if id2label else None


def _short_name(text: str) -> str:
    last = Path(text).name.split(".")[0]
    return "".join(character if ANCHOR_NAME.fullmatch(character) else "_" for character in last) or "anchor"
