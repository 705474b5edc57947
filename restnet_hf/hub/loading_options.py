"""Options of transformers that ``from_pretrained`` takes, and for the others the reasons why it refuses them."""

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.config_entry import add_fingerprint, load_embedded_anchor, rebuild_anchor, reload_anchor
from restnet_hf.anchors.loading import load_lora
from restnet_hf.anchors.weights import check_weights
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.data.labels import class_names
from restnet_hf.errors import BudgetError
from restnet_hf.hub.cards import is_hub_id
from restnet_hf.routes.cascade import Cascade, is_cascade
from restnet_hf.routes.profile import BudgetLike, Profile
from restnet_hf.routes.route import Route
from restnet_hf.stitches.precision import match_stored_types


HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")
PASSED_BY_AUTO = (
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "_commit_hash",
    "torch_dtype",
)  # and passed by pipelines
CONFIG_KEYS = ("num_labels", "id2label", "label2id", "problem_type", "output_hidden_states", "return_dict")
SAFE = ("use_safetensors", "weights_only")  # True is the only behaviour
_ONE_DEVICE = "the anchors, which all routes share, are on one device: name it with device_map="
_WEIGHTS = "an adapter has one file, model.safetensors"
_ANCHORS = "this is a setting of the anchors: load one with it, and pass anchors={name: the module}"
REFUSED = {
    "max_memory": f"{_ONE_DEVICE}; page_to() keeps in memory only what the active route uses",
    "offload_folder": f"{_ONE_DEVICE}; page_to(folder) keeps the weights of other routes on disk",
    "offload_buffers": f"{_ONE_DEVICE}; page_to(folder) keeps the weights of other routes on disk",
    "offload_state_dict": f"{_ONE_DEVICE}; weights are mapped into memory from their file in any case",
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "device_mesh": _ONE_DEVICE,
    "distributed_config": f"{_ONE_DEVICE}; train() runs on several with accelerate launch",
    "quantization_config": "anchors and stitches run in float; restnet-hf export --precision int8 quantises routes",
    "variant": f"{_WEIGHTS}; load it with dtype= for another type, or give each variant a folder or revision",
    "gguf_file": f"{_WEIGHTS}; pass tensors from elsewhere as state_dict=",
    "from_tf": f"{_WEIGHTS}; pass tensors from elsewhere as state_dict=",
    "from_flax": f"{_WEIGHTS}; pass tensors from elsewhere as state_dict=",
    "key_mapping": "its tensors have the names that config.json implies; rename them and pass state_dict=",
    "disable_mmap": f"{_WEIGHTS}, which is mapped into memory; copy the folder to a disk where that works",
    "experts_implementation": _ANCHORS,
    "fusion_config": _ANCHORS,
    "use_kernels": _ANCHORS,
    "kernel_config": _ANCHORS,
    "allow_all_kernels": _ANCHORS,
    "output_attentions": "not every anchor has attention; run one alone: model.anchors[name].model(...)",
    "generation_config": "an image classifier does not generate",
    "code_revision": "code of anchors comes from the commit that config.json names",
    "adapter_name": "load what PEFT wrote afterwards, with load_adapter(..., adapter_name=)",
    "tqdm_class": "set HF_HUB_DISABLE_PROGRESS_BARS=1 to hide progress bars",
    "mirror": "set HF_ENDPOINT instead",
}
FROM_PRETRAINED = (*CONFIG_KEYS, *SAFE, "low_cpu_mem_usage")  # the last has no effect in transformers 5 either
STATE_DICT = "the state dict"  # in place of a folder or Hub id
Mismatched = set[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in the file, shape in the model
# The logger with which transformers reports on loading, so that its verbosity applies.
logger = logging.get_logger("transformers.modeling_utils")


def hub_options(method: str, options: Mapping[str, Any], taken: Collection[str] = ()) -> dict[str, Any]:
    """The options of huggingface_hub that are set; all others are checked.

    Args:
        method: name of the method, for errors.
        options: keyword arguments of the caller.
        taken: names that are allowed beside those of huggingface_hub.

    Raises:
        TypeError: an option is unknown, or cannot apply to a stitched model.
        ValueError: an option has a value that cannot apply.
    """
    for name, value in options.items():
        if name in REFUSED and value is not None and value is not False:
            raise TypeError(f"{method} takes no {name}: {REFUSED[name]}")
        if name in SAFE and name in taken and value is False:
            raise ValueError(f"{method} takes no {name}=False: adapters are safetensors files, nothing is unpickled")
    unknown = sorted(options.keys() - {*HUB_KEYS, *PASSED_BY_AUTO, *REFUSED, *taken})
    if unknown:
        raise TypeError(f"{method} takes no {unknown}; see its documentation for what it takes")
    return {key: options[key] for key in HUB_KEYS if options.get(key) is not None}


def override_config(config: RestNetConfig, options: Mapping[str, Any]) -> RestNetConfig:
    """A copy of a config with the values that a caller gives.

    Args:
        config: config of the adapter.
        options: keyword arguments of the caller, of which those of the config are used.

    Raises:
        TypeError: ``output_attentions`` is set.
        ValueError: ``id2label`` and ``label2id`` contradict each other.
    """
    config = copy.deepcopy(config)
    if config.output_attentions:  # Auto classes have set it
        raise TypeError(f"from_pretrained takes no output_attentions: {REFUSED['output_attentions']}")
    values = {key: options[key] for key in CONFIG_KEYS if options.get(key) is not None}
    count, by_index, by_name = (values.pop(key, None) for key in ("num_labels", "id2label", "label2id"))
    if by_index is None and by_name is not None:
        by_index = {index: name for name, index in by_name.items()}
    names = class_names(count, by_index)
    if by_name is not None and {name: int(index) for name, index in by_name.items()} != _inverse(names):
        raise ValueError(f"label2id={by_name} is not the inverse of id2label={names}")
    if names and (by_index is not None or len(names) != config.num_labels):
        config.id2label, config.label2id = names, _inverse(names)
    for key, value in values.items():
        setattr(config, key, value)
    return config


def _inverse(names: Mapping[int, str]) -> dict[str, int]:
    return {name: index for index, name in names.items()}


def holds_anchors(weights: Mapping[str, Tensor]) -> bool:
    """Whether an adapter's weights include those of the anchors."""
    return any(key.startswith("anchors.") for key in weights)


def read_state_dict(state_dict: Mapping[str, Tensor], config: RestNetConfig, where: str) -> dict[str, Tensor]:
    """The tensors of a caller's state dict, with copies of the anchors' tensors.

    A config that was never saved has no fingerprints of the anchors' weights; they are computed here.

    Args:
        state_dict: mapping from names to tensors.
        config: config of the model; its entries of anchors may be changed.
        where: source of the tensors, for errors.

    Raises:
        ValueError: the config is invalid, or the weights are not those of its anchors.
    """
    weights = {k: v.detach().to("cpu", copy=k.startswith("anchors.")) for k, v in state_dict.items()}
    try:
        new = [entry for entry in config.anchors or [] if entry["fingerprint"] is None]
        for entry in new if holds_anchors(weights) else ():
            prefix = f"anchors.{entry['name']}.model."
            own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            anchor = rebuild_anchor(entry, partial(_check, own, where))
            anchor.model.load_state_dict(own, assign=True)
            add_fingerprint(entry, anchor)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the config given with {where} is invalid: {error!r}") from error
    return weights


def _check(weights: Mapping[str, Tensor], where: str, model: nn.Module) -> None:
    check_weights(weights, model.state_dict(), where)


def load_weights(model: Any, weights: Mapping[str, Tensor], where: str, ignore_mismatched_sizes: bool) -> Mismatched:
    """Load an adapter's tensors into a new model; returns those that were left out for their shape.

    A warning names these, and their entries in the config and the profile are removed.

    Args:
        model: stitched model to load into.
        weights: tensors by name, without those of anchors.
        where: folder or Hub id of the adapter, for errors.
        ignore_mismatched_sizes: whether tensors of another shape than the model's are left out.

    Raises:
        WeightsError: the names or shapes are not exactly those of the model's tensors.
    """
    own = model.adapter_state_dict()
    mismatched: Mismatched = set()
    if ignore_mismatched_sizes:
        for key in own.keys() & weights.keys():
            if weights[key].shape != own[key].shape:
                mismatched.add((key, tuple(weights[key].shape), tuple(own[key].shape)))
    weights = {**weights, **{key: own[key] for key, *_ in mismatched}}
    check_weights(weights, own, where)
    match_stored_types({name: model.get_submodule(name) for name in model.config.part_names()}, weights, model.dtype)
    model.load_state_dict(weights)
    if mismatched:
        parts, config = {".".join(key.split(".")[:2]) for key, *_ in mismatched}, model.config
        config.trained_heads = [key for key in config.trained_heads if f"heads.{key}" not in parts]
        for name, entry in config.stitches.items():
            if f"stitches.{name}" in parts:
                entry.pop("r2", None)
        model.forget_profile()
        lines = [f"{key}: Reinit due to size mismatch, {then} there and {now} here" for key, then, now in mismatched]
        logger.warning(f"Train what is newly initialized, since it has another shape in {where}.\n" + "\n".join(lines))
    return mismatched


def finish_loading(
    model: Any, options: Mapping[str, Any] | None, attn_implementation: str | Mapping[str, str] | None
) -> None:
    """Load the adapter that PEFT wrote on top of a stitched model, if Auto classes were given one; set the attention.

    Args:
        model: stitched model to load into.
        options: ``adapter_kwargs`` of the Auto classes, with the path of PEFT's adapter.
        attn_implementation: ``eager``, ``sdpa``, ... for the anchors; None for what they have.
    """
    options = dict(options or {})
    if path := options.pop("_adapter_model_path", None):
        load_lora(model, path, options)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)


def loading_info(mismatched: Mismatched) -> dict[str, Any]:
    """The report of transformers on loading; a stitched model never has missing or unexpected tensors."""
    return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": mismatched, "error_msgs": []}


def choose_route(
    config: RestNetConfig, profile: Profile | None, route: Route | Cascade | str | None, budget: BudgetLike | None
) -> tuple[Route, ...]:
    """Make the wanted route or cascade active; returns the routes whose weights are checked at once.

    Args:
        config: config of the model; its active route is changed.
        profile: profile to choose from within a budget; None if there is none.
        route: route or cascade to make active.
        budget: limits, a `Budget` or such as ``{"macs": 1e9}``, on what to make active.

    Raises:
        BudgetError: no route fits, or there is no profile.
        ValueError: both route and budget are given, or the model has no such route.
    """
    if route is not None and budget is not None:
        raise ValueError("give either route or budget")
    if budget is not None:
        if profile is None:
            raise BudgetError("the adapter has no profile, so the costs of its routes are not known; give a route")
        route = profile.best(budget).route
    if route is not None:
        cascade = Cascade.parse(str(route)) if is_cascade(str(route)) else None
        config.active_cascade = None if cascade is None else str(cascade)
        config.active_route = str(route if cascade is None else cascade.routes[-1])
        config.check()
        return (Route.parse(config.active_route),) if cascade is None else cascade.routes
    active = [Route.parse(config.active_route)] if config.active_route else []
    active += Cascade.parse(config.active_cascade).routes if config.active_cascade else ()
    return (*config.parsed_routes(), *active)


def load_anchors(
    config: RestNetConfig,
    weights: Mapping[str, Tensor],
    replacements: Mapping[str, nn.Module | str],
    dtype: torch.dtype,
    options: Mapping[str, Any],
    used: Sequence[Route],
    where: str,
    whole: bool,
) -> list[Anchor]:
    """Load the anchors of a config: replacements, those in the checkpoint itself, or from their own source.

    Args:
        config: config of the model.
        weights: tensors of the checkpoint by name.
        replacements: modules or folders by anchor name, in place of those that the config names.
        dtype: dtype of the weights.
        options: further arguments of `load_anchor`.
        used: routes whose weights are checked at once.
        where: folder or Hub id of the adapter, or `STATE_DICT`.
        whole: whether the checkpoint has the anchors' weights.

    Raises:
        OSError: an anchor cannot be loaded.
        ValueError: an anchor is not one of the config, or not the one the adapter was made for.
    """
    entries = config.anchors or []
    unknown = sorted(replacements.keys() - {entry["name"] for entry in entries})
    if unknown:
        raise ValueError(f"anchors= names {unknown}, which the adapter does not have")
    if where != STATE_DICT and not os.path.isdir(where) and not whole:
        elsewhere = [e["name"] for e in entries if e["name"] not in replacements and not is_hub_id(e["repo_id"])]
        if elsewhere:
            raise ValueError(
                f"anchors {elsewhere} of {where} are not on the Hub but on the machine it was made on; pass them: "
                "from_pretrained(..., anchors={name: a module or a folder})"
            )
    return [
        load_embedded_anchor(entry, weights, dtype, used, where)
        if whole and entry["name"] not in replacements
        else reload_anchor(entry, replacements.get(entry["name"]), dtype, options, used)
        for entry in entries
    ]
