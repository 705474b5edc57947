"""Load anchors from the Hub, folders, modules and configs."""

import copy
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
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

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.labels import label_names
from restnet_hf.data.preprocessing import Preprocessing, timm_processor, with_image_size
from restnet_hf.errors import http_error, hub_errors, quote, short_errors, shorten
from restnet_hf.files import COMMIT
from restnet_hf.limits import MAX_SIDE, check_network, read_json, walk_json
from restnet_hf.progress import library_bars
from restnet_hf.routes.route import ANCHOR_NAME


REGISTRATIONS = (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
    register_module_buffer_registration_hook,
)
HUB_KEYS = ("revision", "cache_dir", "local_files_only", "token", "proxies", "subfolder")
FEW_PARTS, MOST_PARTS = 2**12, 2**15  # modules and tensors that a network may always and at most have
HEAD = 2**24  # weights of a classifier, which a file may lack
LOAD_KEYS = ("dtype", "force_download", "trust_remote_code", "use_safetensors")
PASSED_ON = ("attn_implementation", "code_revision")  # to transformers
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IMAGES = "preprocessor_config.json"
QUIET = {"_raise_exceptions_for_missing_entries": False}
TIMM_PREFIXES = ("hf_hub:", "hf-hub:", "local-dir:")


def check_load_options(function: Callable[..., Any], hub_kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError, which names the function that was called, for options that no library takes.

    Args:
        function: function that was called with the options.
        hub_kwargs: its further keyword arguments.
    """
    unknown = sorted(hub_kwargs.keys() - {*HUB_KEYS, *LOAD_KEYS, *PASSED_ON})
    if unknown:
        kinds = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        own = [name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds]
        raise TypeError(
            f"{function.__name__} takes no {unknown}; it takes {sorted({*own} - {'source'})}, and of huggingface_hub "
            f"and transformers {sorted({*HUB_KEYS, *LOAD_KEYS, *PASSED_ON} - {*own})}"
        )


@short_errors()
@hub_errors()
@library_bars()
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
    """Load a classifier as an anchor.

    Args:
        source: Hub id of transformers or timm (``timm/resnet50.a1_in1k``), local folder of either, or module.
        name: name in routes; by default the last part of the id up to its first dot.
        revision: branch, tag or commit on the Hub.
        image_size: image size in pixels to use instead of the anchor's own.
        preprocessing: preprocessing to use instead of the image processor's, or for a module without one.
        label_names: names of the classes, for an anchor without them.
        granularity: ``block`` or ``module``, the places that may be cuts; see `find_cuts`.
        dtype: type of the weights, as in ``from_pretrained``.
        trust_remote_code: whether to run code from the Hub.
        **hub_kwargs: ``token``, ``cache_dir``, ``local_files_only``, ... as in ``from_pretrained``. Without
            ``use_safetensors=False`` no pickle such as ``pytorch_model.bin`` is read.

    Raises:
        OSError: the model cannot be found or read.
        TypeError: an option is unknown.
        ValueError: the model's preprocessing is unknown, or options contradict each other.
    """
    check_load_options(load_anchor, hub_kwargs)
    if isinstance(source, Anchor):
        return _copied(source, name, revision, image_size, preprocessing, label_names)
    if preprocessing is not None and image_size is not None:
        raise ValueError("pass either image_size or preprocessing, which holds the image size")
    if isinstance(source, nn.Module):
        named = getattr(source, "name_or_path", "")
        model, repo_id, commit = source, _source_id(named) if named else None, None
    else:
        repo_id = _source_id(source)
        revision = (commit := resolve_commit(repo_id, revision, hub_kwargs)) or revision  # one commit for all files
        load = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code, **hub_kwargs}
        model = _load_pretrained(repo_id, load)
    source_name = repo_id or type(model).__name__
    with _processor_errors(source_name):
        processor = _load_processor(model, repo_id, revision, trust_remote_code, hub_kwargs)
        preprocessing, processor = _choose_preprocessing(source_name, processor, preprocessing, image_size)
    return Anchor(
        model,
        name or _short_name(source_name),
        preprocessing,
        label_names=label_names or _config_labels(getattr(model, "config", None)),
        processor=processor,
        repo_id=repo_id,
        revision=commit,
        granularity=granularity,
    )


def _copied(anchor: Anchor, *options: Any) -> Anchor:
    """The same network, but with its own name and head; raises ValueError where options are given for it."""
    if any(option is not None for option in options):
        raise ValueError(f"anchor '{anchor.name}' is made already; pass its options where it is made")
    return copy.copy(anchor)


@contextmanager
def _processor_errors(source_name: str) -> Iterator[None]:
    """Raise OSError for undocumented errors of image processors, which trust their files and may fail in any way."""
    try:
        yield
    except (http_error(), OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"the image processor of {quote(source_name)} cannot be used: {quote(error)}") from error


def resolve_commit(repo_id: str, revision: str | None, hub_kwargs: Mapping[str, Any]) -> str | None:
    """The commit that a revision of a repository is at now; None for a folder, or where nobody can tell.

    A file of the repository tells it rather than its description: the cache then knows the revision, too, and gives
    the commit where the Hub cannot be reached.

    Args:
        repo_id: Hub id or local folder.
        revision: branch, tag or commit.
        hub_kwargs: options of huggingface_hub for the request.
    """
    if os.path.exists(repo_id):
        return None
    keys = ("token", "cache_dir", "local_files_only", "subfolder")
    at = {key: hub_kwargs[key] for key in keys if hub_kwargs.get(key)}
    for name in (CONFIG_NAME, PEFT_CONFIG):
        try:
            file = Path(hf_hub_download(repo_id, name, revision=revision, **at))  # snapshots/COMMIT/SUBFOLDER/NAME
        except EntryNotFoundError:
            continue
        except (http_error(), OSError, ValueError):  # the files that are read next say what is wrong
            return None
        commit = file.parents[len(Path(at.get("subfolder", "")).parts)].name
        return commit if COMMIT.fullmatch(commit) else None
    return None


def anchor_from_config(
    config: dict[str, Any],
    name: str,
    preprocessing: Preprocessing,
    check: Callable[[nn.Module], None] | None = None,
    **kwargs: Any,
) -> Anchor:
    """Make an anchor of the architecture in a transformers config, with random weights.

    Args:
        config: config as JSON; nothing is downloaded for it and none of its code runs.
        name: name of the anchor.
        preprocessing: size and normalisation of the anchor's images.
        check: function that raises ValueError for a wrong network. It is called with one on the meta device, which
            takes no memory, before the anchor's own is made.
        **kwargs: other arguments of `Anchor`.

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
                meta_model = make()
            check(meta_model)
        model = make()
    except Exception as error:  # transformers and timm trust their configs, and may fail in any way
        raise ValueError(f"anchor '{name}' cannot be rebuilt from its config: {shorten(str(error))}") from error
    return Anchor(model, name, preprocessing, **kwargs)


@contextmanager
def limit_network_size(parts: int, weights: int, meta: bool = True) -> Iterator[None]:
    """Raise ValueError where this thread makes networks with more modules and tensors, or more weights, than allowed.

    Args:
        parts: largest number of modules and tensors.
        weights: largest number of elements of tensors.
        meta: whether to count only weights on the meta device, where networks are made first and take no memory.
    """
    parts_left, weights_left, thread = parts, weights, threading.get_ident()

    def count(module: nn.Module, name: str, part: Any) -> None:
        nonlocal parts_left, weights_left
        if threading.get_ident() == thread:
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


def _load_pretrained(repo_id: str, load: dict[str, Any]) -> PreTrainedModel:
    hub = {key: value for key, value in load.items() if key != "dtype"}
    try:
        size = _check_files(repo_id, hub)
        config = AutoConfig.from_pretrained(repo_id, **hub)
        # timm writes the class count in two places, and transformers passes both on
        if config.model_type == "timm_wrapper" and config.model_args:
            config.model_args.pop("num_classes", None)
        load = {"use_safetensors": True, **load}  # other files are pickles
        with limit_network_size(
            min(size // 16 + FEW_PARTS, MOST_PARTS), size + HEAD
        ):  # each weight takes a byte at least
            return AutoModelForImageClassification.from_pretrained(repo_id, config=config, **load)
    except http_error():
        raise
    except Exception as error:  # transformers and timm trust their files, and may fail in any way
        if isinstance(error, TypeError) and not load.keys() <= {*HUB_KEYS, *LOAD_KEYS}:
            raise  # an unknown option
        raise OSError(
            f"anchor {quote(repo_id)} cannot be loaded: it must be a local folder with config.json and "
            "model.safetensors, or the Hub id of an image classifier of transformers or timm, such as "
            f"'timm/resnet50.a1_in1k'. {shorten(str(error))}"
        ) from error


def _check_files(repo_id: str, hub: Mapping[str, Any]) -> int:
    """Check an anchor's files; return the bytes of its weights, or a huge number for several files on the Hub.

    Raises:
        OSError, ValueError: the files would bring code or pickles, or ask for an unreasonably large network.
    """
    at = {key: hub[key] for key in HUB_KEYS if hub.get(key) is not None}
    config = read_json(cached_file(repo_id, CONFIG_NAME, **at) or os.path.join(repo_id, CONFIG_NAME))
    check_network(config, f"its {CONFIG_NAME}")
    if isinstance(config, dict) and config.get("model_type") == "restnet":
        raise ValueError("It is a stitched model itself, which cannot be an anchor")
    check_peft(repo_id, at)
    if os.path.isdir(repo_id):
        return sum(file.stat().st_size for file in Path(repo_id).glob("*.safetensors") if file.is_file())
    file = cached_file(repo_id, SAFE_WEIGHTS_NAME, **QUIET, **at)
    return sys.maxsize // 2 if file is None else os.path.getsize(file)


def check_peft(repo_id: str, at: Mapping[str, Any]) -> int:
    """Check PEFT's files in a folder or repository; return the bytes of the weights, 0 where there are no such files.

    Args:
        repo_id: local folder or Hub id.
        at: revision and other options of `cached_file`.

    Raises:
        OSError: the weights are not a safetensors file but a pickle.
        ValueError: PEFT's config is invalid.
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
    ranks = [value for key, value, _ in (*walk_json(data), *walk_json(patterns)) if key in ("r", *patterns)]
    if any(type(rank) is int and rank > longest for rank in ranks):
        raise ValueError(
            f"its {PEFT_CONFIG} asks for ranks {quote(ranks)}, and {PEFT_WEIGHTS} holds none above {longest}"
        )
    return os.path.getsize(weights)


def load_lora(model: PreTrainedModel, source: str, options: Mapping[str, Any]) -> None:
    """Load an adapter that PEFT saved into a model.

    Args:
        model: model to load the adapter into.
        source: local folder or Hub id.
        options: revision and other options of `cached_file`.

    Raises:
        OSError: the adapter cannot be read.
    """
    hub = {key: options[key] for key in HUB_KEYS if options.get(key) is not None}
    try:
        size = check_peft(source, hub)
        with limit_network_size(MOST_PARTS, size, meta=False):
            info = model.load_adapter(source, adapter_kwargs=dict(options), low_cpu_mem_usage=True)
    except (http_error(), OSError):
        raise
    except Exception as error:  # PEFT trusts its files, and may fail in any way
        raise OSError(f"the PEFT adapter in {source} cannot be loaded: {quote(error)}") from error
    if info.missing_keys:
        first = quote(min(info.missing_keys))
        raise OSError(
            f"{PEFT_WEIGHTS} of {source} lacks what its {PEFT_CONFIG} asks for, such as {first}; save it again, "
            "or, where it has modules_to_save, install transformers>=5.23 and peft>=0.21, which load them"
        )


def _load_processor(
    model: nn.Module, repo_id: str | None, revision: str | None, trust: bool, hub: dict[str, Any]
) -> Any:
    cfg = getattr(getattr(model, "config", None), "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None)
    at = {"revision": revision, **hub}
    if cfg:
        processor = timm_processor(dict(cfg))
    elif repo_id is None or (file := cached_file(repo_id, IMAGES, **QUIET, **at)) is None:
        return None
    else:
        check_network(read_json(file), IMAGES)
        processor = AutoImageProcessor.from_pretrained(repo_id, trust_remote_code=trust, **at)
    _check_sizes(processor)
    return processor


def own_preprocessing(module: nn.Module) -> Preprocessing | None:
    """The preprocessing that a classifier was trained with, as far as it or its image processor tells.

    Args:
        module: anchor, stitched model, module of transformers or timm, or any other.

    Returns:
        The preprocessing; None where it is unknown, as for most modules made in code.

    Raises:
        OSError: the image processor cannot be read.
    """
    known = getattr(module, "preprocessing", None)
    if isinstance(known, Preprocessing):
        return known
    named = getattr(module, "name_or_path", "")
    with _processor_errors(type(module).__name__):
        processor = _load_processor(module, _source_id(named) if named else None, None, False, {})
        return None if processor is None else Preprocessing.of(processor)


def _check_sizes(processor: Any) -> None:
    """Raise ValueError where a processor's images would be too large to try it."""
    settings = processor.to_dict()
    for key, value, _ in walk_json(settings):
        if key == "crop_pct" and value is not None and not 0.1 <= value <= 1:
            raise ValueError(f"{key}={quote(value)} must be from 0.1 to 1")
        if type(value) is int and abs(value) > MAX_SIDE:
            raise ValueError(f"{quote(key)} is {quote(value)}, and images have at most {MAX_SIDE} pixels a side")


def _choose_preprocessing(
    source_name: str, processor: Any, preprocessing: Preprocessing | None, image_size: int | tuple[int, int] | None
) -> tuple[Preprocessing, Any]:
    """The preprocessing to use, and the processor for it; None where the processor differs."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = preprocessing.image_size if preprocessing is not None else size
    if processor is not None and size is not None:
        processor = with_image_size(processor, size)
    measured = None if processor is None else Preprocessing.of(processor)
    chosen = preprocessing or measured
    if chosen is None:
        raise ValueError(
            f"the preprocessing of {source_name} is unknown: it has no image processor. Pass "
            "load_anchor(..., preprocessing=Preprocessing(image_size, mean, std))"
        )
    return chosen, processor if chosen == measured else None


def _config_labels(config: Any) -> tuple[str, ...] | None:
    id2label = getattr(config, "id2label", None)
    return label_names(id2label) if id2label else None


def _short_name(text: str) -> str:
    last = Path(text).name.split(".")[0]
    return "".join(character if ANCHOR_NAME.fullmatch(character) else "_" for character in last) or "anchor"
