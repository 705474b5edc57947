"""Anchors from the Hub, from folders, from modules and from configs."""

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ResolvedRevision
from huggingface_hub.utils import httpx
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import resolve_revision

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.labels import label_names
from restnet_hf.data.preprocessing import MAX_SIDE, Preprocessing, timm_processor, with_image_size
from restnet_hf.errors import hub_errors, quote, short_errors, shorten
from restnet_hf.limits import check_network, read_json, values
from restnet_hf.routes.route import ANCHOR_NAME


REGISTRATIONS = (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
    register_module_buffer_registration_hook,
)
HUB_KEYS = ("revision", "cache_dir", "local_files_only", "token", "proxies", "subfolder")
FEW_PARTS, MOST_PARTS = 2**12, 2**15  # modules and tensors of a network, whatever its file holds
HEAD = 2**24  # weights of a classifier, which may be missing in a file
LOAD_KEYS = ("dtype", "force_download", "trust_remote_code", "use_safetensors")
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IMAGES = "preprocessor_config.json"
QUIET = {"_raise_exceptions_for_missing_entries": False}
TIMM_PREFIXES = ("hf_hub:", "hf-hub:", "local-dir:")


@short_errors()
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
        **hub_kwargs: ``token``, ``cache_dir``, ``local_files_only``, ... as in ``from_pretrained``. Without
            ``use_safetensors=False`` no pickle such as ``pytorch_model.bin`` is read.

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
    of = repo_id or type(model).__name__
    with _processor_errors(of):
        found = _processor(model, repo_id, revision, trust_remote_code, hub_kwargs)
        preprocessing, processor = _preparation(of, found, preprocessing, size)
    config = getattr(model, "config", None)
    return Anchor(
        model,
        name or _short_name(of),
        preprocessing,
        label_names=label_names or _labels(config),
        processor=processor,
        repo_id=repo_id,
        revision=revision.resolved if isinstance(revision, ResolvedRevision) else None,
        granularity=granularity,
    )


@contextmanager
def _processor_errors(of: str) -> Iterator[None]:
    """Image processors trust their files, and may fail in any way; raise OSError for what is not documented."""
    try:
        yield
    except (httpx.HTTPError, OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"the image processor of {quote(of)} cannot be used: {quote(error)}") from error


def at_commit(repo_id: str, revision: str | None, hub_kwargs: Mapping[str, Any]) -> str | None:
    """The revision of a repository with the commit that it now stands for, where the Hub or the cache can tell."""
    keys = ("token", "cache_dir", "local_files_only")
    return resolve_revision(repo_id, revision, **{key: hub_kwargs[key] for key in keys if hub_kwargs.get(key)})


def anchor_from_config(
    config: dict[str, Any],
    name: str,
    preprocessing: Preprocessing,
    check: Callable[[nn.Module], None] | None = None,
    **kwargs: Any,
) -> Anchor:
    """An anchor of the architecture that a transformers config describes, with random weights.

    Args:
        config: as JSON; nothing is fetched for it and no code of it runs.
        name: of the anchor.
        preprocessing: of its images.
        check: raises ValueError for a network that is not the one meant; it gets one on the meta device, which takes
            no memory, before there is any other.
        **kwargs: of `Anchor`.

    Raises:
        ValueError: no image classifier has such a config.
    """
    check_network(config, f"the config of anchor '{name}'")
    kind = config.get("model_type")
    try:
        if kind == "restnet" or kind not in CONFIG_MAPPING:
            raise ValueError(f"model_type={quote(kind)} is not that of an image classifier of transformers")
        rebuilt = CONFIG_MAPPING[kind].from_dict({k: v for k, v in copy.deepcopy(config).items() if k != "auto_map"})
        make = partial(AutoModelForImageClassification.from_config, rebuilt, dtype=torch.get_default_dtype())
        if check is not None:
            with torch.device("meta"):
                ghost = make()
            check(ghost)
        model = make()
    except Exception as error:  # transformers and timm trust their configs, and may fail in any way
        raise ValueError(f"anchor '{name}' cannot be rebuilt from its config: {shorten(str(error))}") from error
    return Anchor(model, name, preprocessing, **kwargs)


@contextmanager
def at_most(parts: int, weights: int, meta: bool = True) -> Iterator[None]:
    """Raise ValueError where this thread makes networks of more modules and tensors, or of more weights.

    Args:
        parts: modules and tensors.
        weights: numbers in tensors.
        meta: count those on the meta device alone, where networks are made first and take no memory.
    """
    parts_left, weights_left, here = parts, weights, threading.get_ident()

    def count(module: nn.Module, name: str, part: Any) -> None:
        nonlocal parts_left, weights_left
        if threading.get_ident() == here:
            parts_left -= 1
            weights_left -= part.numel() if isinstance(part, Tensor) and (part.is_meta or not meta) else 0
        if parts_left < 0 or weights_left < 0:
            raise ValueError(
                f"its config asks for more than {parts} modules and tensors, or {weights} weights, and its file of "
                "weights does not hold as many"
            )

    hooks = [register(count) for register in REGISTRATIONS]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _source_id(source: str | os.PathLike[str]) -> str:
    text = os.fspath(source)
    for prefix in TIMM_PREFIXES:
        text = text.removeprefix(prefix)
    return str(Path(text).resolve()) if Path(text).is_dir() else text


def _pretrained(repo_id: str, load: dict[str, Any]) -> PreTrainedModel:
    hub = {key: value for key, value in load.items() if key != "dtype"}
    try:
        size = _check_files(repo_id, hub)
        config = AutoConfig.from_pretrained(repo_id, **hub)
        # timm writes the class count in two places, and transformers passes both on
        if config.model_type == "timm_wrapper" and config.model_args:
            config.model_args.pop("num_classes", None)
        load = {"use_safetensors": True, **load}  # other files are pickles
        with at_most(min(size // 16 + FEW_PARTS, MOST_PARTS), size + HEAD):  # each weight takes a byte at least
            return AutoModelForImageClassification.from_pretrained(repo_id, config=config, **load)
    except httpx.HTTPError:
        raise
    except Exception as error:  # transformers and timm trust their files, and may fail in any way
        if isinstance(error, TypeError) and not load.keys() <= {*HUB_KEYS, *LOAD_KEYS}:
            raise  # an option is not known
        raise OSError(
            f"anchor {quote(repo_id)} cannot be loaded: it must be a local folder with config.json and "
            "model.safetensors, or the Hub id of an image classifier of transformers or timm, such as "
            f"'timm/resnet50.a1_in1k'. {shorten(str(error))}"
        ) from error


def _check_files(repo_id: str, hub: Mapping[str, Any]) -> int:
    """The bytes of an anchor's weights, or as many as there can be where they lie in several files of the Hub.

    Raises:
        OSError, ValueError: the files would bring code or pickles, or ask for more than a reasonable network has.
    """
    at = {key: hub[key] for key in HUB_KEYS if hub.get(key) is not None}
    config = read_json(cached_file(repo_id, CONFIG_NAME, **at) or os.path.join(repo_id, CONFIG_NAME))
    check_network(config, f"its {CONFIG_NAME}")
    if isinstance(config, dict) and config.get("model_type") == "restnet":
        raise ValueError("It is a stitched model itself, which cannot be an anchor of another")
    check_peft(repo_id, at)
    if os.path.isdir(repo_id):
        return sum(file.stat().st_size for file in Path(repo_id).glob("*.safetensors") if file.is_file())
    file = cached_file(repo_id, SAFE_WEIGHTS_NAME, **QUIET, **at)
    return sys.maxsize // 2 if file is None else os.path.getsize(file)


def check_peft(repo_id: str, at: Mapping[str, Any]) -> int:
    """The bytes of the weights that PEFT wrote into a folder or repository, 0 where it has written nothing.

    Args:
        repo_id: local folder or Hub id.
        at: revision and other options of `cached_file`.

    Raises:
        OSError: they are no safetensors file but a pickle.
        ValueError: its config is invalid.
    """
    config = cached_file(repo_id, PEFT_CONFIG, **QUIET, **at)
    if config is None:
        return 0
    data = read_json(config)
    check_network(data, f"its {PEFT_CONFIG}")
    weights = cached_file(repo_id, PEFT_WEIGHTS, **QUIET, **at)
    if weights is None:
        raise OSError(f"{repo_id} has {PEFT_CONFIG} but no {PEFT_WEIGHTS}; save the LoRA again as safetensors")
    with safe_open(weights, "pt") as file:
        longest = max((size for key in file.keys() for size in file.get_slice(key).get_shape()), default=0)  # noqa: SIM118
    patterns = data.get("rank_pattern") or {}
    ranks = [value for key, value, _ in (*values(data), *values(patterns)) if key in ("r", *patterns)]
    if any(type(rank) is int and rank > longest for rank in ranks):
        raise ValueError(
            f"its {PEFT_CONFIG} asks for ranks {quote(ranks)}, and {PEFT_WEIGHTS} holds none above {longest}"
        )
    return os.path.getsize(weights)


def load_lora(model: PreTrainedModel, source: str, options: Mapping[str, Any]) -> None:
    """Put on a model what PEFT wrote into a folder or repository.

    Raises:
        OSError: it cannot be read.
    """
    hub = {key: options[key] for key in HUB_KEYS if options.get(key) is not None}
    try:
        size = check_peft(source, hub)
        with at_most(MOST_PARTS, size, meta=False):
            info = model.load_adapter(source, adapter_kwargs=dict(options), low_cpu_mem_usage=True)
    except (httpx.HTTPError, OSError):
        raise
    except Exception as error:  # PEFT trusts its files, and may fail in any way
        raise OSError(f"what PEFT wrote into {source} cannot be loaded: {quote(error)}") from error
    if info.missing_keys:
        first = quote(min(info.missing_keys))
        raise OSError(f"{PEFT_WEIGHTS} of {source} lacks what its {PEFT_CONFIG} asks for, such as {first}")


def _processor(model: nn.Module, repo_id: str | None, revision: str | None, trust: bool, hub: dict[str, Any]) -> Any:
    cfg = getattr(getattr(model, "config", None), "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None)
    at = {"revision": revision, **hub}
    if cfg:
        found = timm_processor(dict(cfg))
    elif repo_id is None or (file := cached_file(repo_id, IMAGES, **QUIET, **at)) is None:
        return None
    else:
        check_network(read_json(file), IMAGES)
        found = AutoImageProcessor.from_pretrained(repo_id, trust_remote_code=trust, **at)
    _check_sizes(found)
    return found


def _check_sizes(processor: Any) -> None:
    """Raise ValueError where images would become too large to try."""
    settings = processor.to_dict()
    for key, value, _ in values(settings):
        if key == "crop_pct" and value is not None and not 0.1 <= value <= 1:
            raise ValueError(f"{key}={quote(value)} must be from 0.1 to 1")
        if type(value) is int and abs(value) > MAX_SIDE:
            raise ValueError(f"{quote(key)} is {quote(value)}, and images have at most {MAX_SIDE} pixels a side")


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
