"""The files of an adapter, read strictly, and the model that is built from them."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from restnet_hf.anchors.loading import resolve_commit
from restnet_hf.anchors.weights import check_weights, present_names, raise_problems
from restnet_hf.configuration_restnet import RestNetConfig, read_config
from restnet_hf.errors import quote
from restnet_hf.files import read_folder
from restnet_hf.hashing import FLOATS, weights_sha256
from restnet_hf.hub.latency_tables import find_table, is_own_device, table_names
from restnet_hf.hub.loading_options import (
    STATE_DICT,
    Mismatched,
    holds_anchors,
    load_anchors,
    load_weights,
    override_config,
    read_state_dict,
)
from restnet_hf.hub.repository import PROFILE
from restnet_hf.limits import read_json
from restnet_hf.routes.profile import Profile
from restnet_hf.routes.route import Route


CONFIG, WEIGHTS, SHIM = "config.json", "model.safetensors", "modeling_restnet.py"
OWN_FILES = (CONFIG, WEIGHTS, PROFILE, SHIM, "preprocessor_config.json")
AUTO_MAP = {  # with it, transformers names the package to install if it is missing
    "AutoConfig": "modeling_restnet.RestNetConfig",
    "AutoModelForImageClassification": "modeling_restnet.StitchedModelForImageClassification",
}
MAX_NAMES = 1000  # characters of names in an error
MAX_HEADER = 2**23  # bytes, enough for some eighty thousand tensors
SHIM_TEXT = "from restnet_hf import RestNetConfig, StitchedModelForImageClassification  # pip install restnet-hf\n"


def read_weights(path_or_id: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of an adapter, memory-mapped.

    Args:
        path_or_id: local folder or Hub id of the adapter.
        hub_kwargs: options of huggingface_hub, with ``revision`` and ``subfolder``.

    Raises:
        OSError: there is no such file, or it is damaged.
    """
    file = cached_file(path_or_id, WEIGHTS, **hub_kwargs)
    try:
        check_header(file)
        return load_file(file)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{file} is damaged or cut short ({error}); download or save the adapter again") from error


def check_header(file: str | os.PathLike[str]) -> None:
    """Raise ValueError if the header of a safetensors file is longer than that of any model.

    Loading reads the whole header into memory. Its length is in the first eight bytes, little-endian; only these are
    read here.

    Args:
        file: path of the file.
    """
    with Path(file).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length} bytes, and {MAX_HEADER} are enough for any model")


def read_profile(path_or_id: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> Profile | None:
    """Read the profile of an adapter; None if it has none.

    Args:
        path_or_id: local folder or Hub id of the adapter.
        hub_kwargs: options of huggingface_hub, with ``revision`` and ``subfolder``.

    Raises:
        ValueError: the file does not hold a profile.
    """
    file = cached_file(path_or_id, PROFILE, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if file is None:
        return None
    data = read_json(file)
    try:
        return Profile.from_dict(data)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def select_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def separate_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous and without shared memory, as a safetensors file holds them."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        separate[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return separate


PartCheck = Callable[[str, nn.Module], None]


def unchecked(name: str, module: nn.Module) -> None:
    """Accept any module, for a config that is trusted."""


class Parts:
    """The tensors of an adapter by module, to check each module before it takes memory.

    Args:
        weights: tensors of stitches, heads and tuned parts, by name.
        names: names of the modules that config.json asks for, such as ``stitches.resnet_2__vit_1``.
        where: folder or Hub id of the adapter, for errors.

    Raises:
        WeightsError: there are tensors for other modules.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Iterable[str], where: str) -> None:
        self.where, self.weights = where, dict(weights)
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in weights.items():
            name = ".".join(key.split(".")[:2])
            self.tensors.setdefault(name, {})[key] = tensor
        asked = set(names)
        raise_problems(
            {
                "missing": sorted(asked - self.tensors.keys()),
                "not expected": sorted(key for key in weights if ".".join(key.split(".")[:2]) not in asked),
            },
            where,
        )

    def check(self, name: str, module: nn.Module) -> None:
        """Raise WeightsError unless the tensors fit a module; in `weights` they then have its names.

        Args:
            name: name of the module, such as ``stitches.resnet_2__vit_1``.
            module: module with the expected names and shapes; it may be on the meta device.
        """
        own, expected = self.tensors.get(name, {}), {f"{name}.{k}": v for k, v in module.state_dict().items()}
        for then, now in present_names(own, expected).items():
            own[now] = self.weights[now] = own.pop(then)
            self.weights.pop(then) if then != now else None
        check_weights(own, expected, self.where)


def single_device(device_map: Any) -> torch.device:
    """The one device that a ``device_map`` of transformers names; torch's default device for None.

    Args:
        device_map: name or number of a device, ``auto``, or a mapping with one device for the whole model.

    Raises:
        RuntimeError: the default device is the meta device.
        ValueError: the map names several devices, or an unknown one.
    """
    device = device_map
    if isinstance(device_map, Mapping):
        device = device_map[""] if set(device_map) == {""} else None
    elif device_map is None:
        device = torch.get_default_device()
        if device.type == "meta":
            raise RuntimeError(  # as transformers says it
                "You are using `from_pretrained` with a meta device context manager, and weights need memory; leave it"
            )
    elif device_map == "auto":
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    elif device_map == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # as transformers does
    try:
        if isinstance(device, str | int | torch.device) and not isinstance(device, bool):
            return torch.device(device)
    except RuntimeError:
        pass  # no such device, such as "disk"
    raise ValueError(
        f"device_map={device_map!r} is not one device, and the anchors, which all routes share, must be on one: give "
        "its name, its number, or 'auto'"
    )


def resolve_dtype(wanted: Any) -> torch.dtype:
    """The dtype of weights from itself or its name; float32 for None.

    Args:
        wanted: dtype or its name.

    Raises:
        ValueError: there is no such dtype, or no network runs in it.
    """
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted or torch.float32
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS.values():
        raise ValueError(
            f"dtype={quote(wanted)} is not the name of a type of weights, such as 'float32', or no network runs in it"
        )
    return dtype


def read_adapter(
    where: str,
    at: Mapping[str, Any],
    config: RestNetConfig | str | os.PathLike[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> tuple[RestNetConfig, Profile | None, dict[str, Tensor]]:
    """Read config, profile and weights of an adapter, all from one save, except those that the caller has.

    Args:
        where: local folder or Hub id of the adapter, or `STATE_DICT`.
        at: options of huggingface_hub, with ``revision`` and ``subfolder``.
        config: config in place of the adapter's own, or a folder or Hub id of one.
        state_dict: tensors in place of those in the file.
    """
    if not isinstance(config, RestNetConfig | None):
        config = read_config(os.fspath(config), {k: v for k, v in at.items() if k not in ("revision", "subfolder")})
    if where == STATE_DICT:
        if config is None or state_dict is None:
            raise ValueError("without a folder or Hub id, from_pretrained needs config= and state_dict=")
        return config, None, {}

    def read_all(source: str, at: Mapping[str, Any]) -> tuple[RestNetConfig, Profile | None, dict[str, Tensor]]:
        read = read_config(source, at) if config is None else config
        return read, read_profile(source, at), read_weights(source, at) if state_dict is None else {}

    if not os.path.isdir(where):
        return read_all(where, at)
    inside = {**at, "subfolder": ""}
    return read_folder(Path(where, at["subfolder"]), CONFIG, lambda folder: read_all(os.fspath(folder), inside))


class Checkpoint(NamedTuple):
    """What was read of an adapter, with the options of the caller applied.

    Args:
        where: local folder or Hub id of the adapter, or `STATE_DICT`.
        config: config of the model, checked.
        profile: profile of the adapter; None if it has none.
        weights: tensors by name, those of the anchors included if the checkpoint has them.
        standalone: whether the anchors' weights are among the tensors.
    """

    where: str
    config: RestNetConfig
    profile: Profile | None
    weights: dict[str, Tensor]
    standalone: bool
    own_profile: Profile | None = None


def read_checkpoint(
    path_or_id: str | os.PathLike[str] | None,
    revision: str | None,
    subfolder: str,
    config: RestNetConfig | str | os.PathLike[str] | None,
    state_dict: Mapping[str, Tensor] | None,
    options: Mapping[str, Any],
    hub_kwargs: Mapping[str, Any],
    device: str | None = None,
) -> Checkpoint:
    """Read an adapter and apply the options of a caller.

    Args:
        path_or_id: local folder or Hub id of the adapter; None with ``config`` and ``state_dict``.
        revision: branch, tag or commit of the adapter.
        subfolder: folder of the adapter in its repository.
        config: config in place of the adapter's own, or a folder or Hub id of one.
        state_dict: tensors in place of those in the file.
        options: keyword arguments of ``from_pretrained``, of which those of the config are used.
        hub_kwargs: options of huggingface_hub, such as ``token``.
        device: name of a device whose published latencies replace those of the profile.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the config is invalid, the state dict does not fit it, or no latencies of the device are published.
    """
    where, at = STATE_DICT, {**hub_kwargs, "subfolder": subfolder}
    if path_or_id is not None:
        where = os.fspath(path_or_id)
        at["revision"] = resolve_commit(where, revision, at) or revision
    config, profile, weights = read_adapter(where, at, config, state_dict)
    config = override_config(config, options)
    if state_dict is not None:
        weights = read_state_dict(state_dict, config, where)
    standalone = config.standalone if state_dict is None else holds_anchors(weights)
    config.check()
    of_device = profile if device is None else profile_of_device(where, device, config, profile, weights, at)
    return Checkpoint(where, config, of_device, weights, standalone, None if device is None else profile)


def profile_of_device(
    where: str,
    device: str,
    config: RestNetConfig,
    profile: Profile | None,
    weights: Mapping[str, Tensor],
    at: Mapping[str, Any],
) -> Profile:
    """The profile of an adapter with the published latencies of a device in place of its own.

    Args:
        where: local folder or Hub id of the adapter, or `STATE_DICT`.
        device: name of the device, or the beginning of the table's name.
        config: config of the model.
        profile: profile of the adapter; None if it has none.
        weights: tensors of the adapter by name.
        at: options of huggingface_hub, with ``revision`` and ``subfolder``.

    Raises:
        OSError: the Hub cannot be reached.
        ValueError: there is no such table, it was measured with other weights, or the adapter has no profile.
    """
    if profile is None or where == STATE_DICT:
        raise ValueError(f"{where} has no profile to which the latencies of device={device!r} belong")
    parts = dict.fromkeys(".".join(key.split(".")[:2]) for key in weights if not key.startswith("anchors."))
    digests = {part: weights_sha256(select_prefix(f"{part}.", weights)) for part in parts}
    digests |= {f"anchors.{entry['name']}": entry["fingerprint"] for entry in config.anchors}
    table = find_table(where, device, digests, at)
    if table is not None:
        return table.add_to(profile)
    if is_own_device(profile, device):
        return profile
    names = table_names(where, at)
    there = f"only of {quote(names, MAX_NAMES)}: name one of these, or" if names else "and of no other one:"
    raise ValueError(
        f"{where} has no latencies of device={device!r}, {there} measure and publish them there with `restnet-hf "
        "measure --push`; device_map= is the option that places the model"
    )


def build_model(
    model_class: Callable[..., Any],
    checkpoint: Checkpoint,
    anchors: Mapping[str, nn.Module | str],
    routes: Sequence[Route],
    dtype: torch.dtype | str | None,
    options: Mapping[str, Any],
    ignore_mismatched_sizes: bool,
) -> tuple[Any, Mismatched]:
    """Build a model from a checkpoint; returns it and the tensors that were left out for their shape.

    Args:
        model_class: class of the model.
        checkpoint: files of the adapter.
        anchors: modules or folders by anchor name, in place of those that the config names.
        routes: routes whose weights are checked at once.
        dtype: dtype of the weights; None or ``auto`` for that of the config.
        options: further arguments of `load_anchor`.
        ignore_mismatched_sizes: whether tensors of another shape than the model's are left out.

    Raises:
        WeightsError: the tensors do not fit the config.
        ValueError: an anchor is not the one the adapter was made for.
    """
    where, config, profile, weights, standalone, own_profile = checkpoint
    dtype = resolve_dtype(config.dtype if dtype in (None, "auto") else dtype)
    adapter = {k: v for k, v in weights.items() if not (standalone and k.startswith("anchors."))}
    parts = Parts(adapter, config.part_names(), where)  # before any network is made
    loaded = load_anchors(config, weights, anchors, dtype, options, routes, where, standalone)
    model = model_class(config, loaded, unchecked if ignore_mismatched_sizes else parts.check)
    model.profiled = profile
    if own_profile is not None:
        model.saved_profile = profile, own_profile
    mismatched = load_weights(model, parts.weights, where, ignore_mismatched_sizes)
    if where != STATE_DICT:
        model.config.name_or_path = model.name_or_path = where
    return model, mismatched
