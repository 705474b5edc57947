"""The files of an adapter, read strictly, and where its weights go."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.accelerate import check_and_set_device_map
from transformers.utils import cached_file

from restnet_hf.anchors.weights import check_weights, refuse
from restnet_hf.configuration_restnet import RestNetConfig, read_config
from restnet_hf.errors import quote
from restnet_hf.files import read_whole
from restnet_hf.hashing import FLOATS
from restnet_hf.hub.loading_options import STATE_DICT
from restnet_hf.hub.repository import PROFILE
from restnet_hf.limits import read_json
from restnet_hf.routes.profile import Profile


CONFIG, WEIGHTS, SHIM = "config.json", "model.safetensors", "modeling_restnet.py"
OWN_FILES = (CONFIG, WEIGHTS, PROFILE, SHIM, "preprocessor_config.json")
AUTO_MAP = {  # without the package installed, transformers then says what to install
    "AutoConfig": "modeling_restnet.RestNetConfig",
    "AutoModelForImageClassification": "modeling_restnet.StitchedModelForImageClassification",
}
MAX_HEADER = 2**23  # bytes, of some eighty thousand tensors
SHIM_TEXT = "from restnet_hf import RestNetConfig, StitchedModelForImageClassification  # pip install restnet-hf\n"


def read_weights(path_or_id: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The stitches' (and new heads') tensors of an adapter in a local folder or on the Hub, memory-mapped.

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
    """Raise ValueError where the header of a safetensors file, which is read whole, is longer than that of any model.

    It is the length in eight bytes, little-endian, before the header itself; only the number is looked at.
    """
    with Path(file).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length} bytes, and {MAX_HEADER} are enough for any model")


def read_profile(path_or_id: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> Profile | None:
    """The adapter's profile, None where it has none.

    Raises:
        ValueError: the file holds none.
    """
    file = cached_file(path_or_id, PROFILE, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if file is None:
        return None
    data = read_json(file)
    try:
        return Profile.from_dict(data)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and none in the memory of another, as a safetensors file holds them."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        found[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


PartCheck = Callable[[str, nn.Module], None]


def unchecked(name: str, module: nn.Module) -> None:
    """For modules of a config that is trusted."""


class Parts:
    """The tensors of an adapter by the module they are for, to be compared with it before it takes memory.

    Args:
        weights: of stitches, heads and what is tuned, by name.
        names: of the modules that config.json asks for, such as ``stitches.resnet_2__vit_1``.
        where: they come from, for errors.

    Raises:
        WeightsError: there are tensors for other modules.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Iterable[str], where: str) -> None:
        self.where = where
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in weights.items():
            name = ".".join(key.split(".")[:2])
            self.tensors.setdefault(name, {})[key] = tensor
        asked = set(names)
        refuse(
            {
                "missing": sorted(asked - self.tensors.keys()),
                "not expected": sorted(key for key in weights if ".".join(key.split(".")[:2]) not in asked),
            },
            where,
        )

    def check(self, name: str, module: nn.Module) -> None:
        """Raise WeightsError unless the tensors are those of a module, which may be one on the meta device."""
        check_weights(
            self.tensors.get(name, {}), {f"{name}.{k}": v for k, v in module.state_dict().items()}, self.where
        )


def whole_device(device_map: Any) -> torch.device:
    """The one device that a ``device_map`` of transformers names; the CPU for None.

    Raises:
        ValueError: it names several, or none that there is.
    """
    placed = check_and_set_device_map(dict(device_map) if isinstance(device_map, Mapping) else device_map)
    if placed is None:
        return torch.device("cpu")
    if placed == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = placed.get("") if isinstance(placed, dict) and set(placed) == {""} else None
    try:
        if isinstance(device, str | int | torch.device) and not isinstance(device, bool):
            return torch.device(device)
    except RuntimeError:
        pass  # no such device, such as "disk"
    raise ValueError(
        f"device_map={device_map!r} is not one device, and the anchors, which all routes share, must be on one: give "
        "its name, its number, or 'auto'"
    )


def weights_dtype(wanted: Any) -> torch.dtype:
    """A type of weights from itself or its name; float32 for None.

    Raises:
        ValueError: there is no such type, or no network runs in it.
    """
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted or torch.float32
    if not isinstance(found, torch.dtype) or found not in FLOATS.values():
        raise ValueError(
            f"dtype={quote(wanted)} is not the name of a type of weights, such as 'float32', or no network runs in it"
        )
    return found


def read_adapter(
    where: str,
    at: Mapping[str, Any],
    config: RestNetConfig | str | os.PathLike[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> tuple[RestNetConfig, Profile | None, dict[str, Tensor]]:
    """Config, profile and weights of an adapter, all of one save, but for what the caller has already."""
    if not isinstance(config, RestNetConfig | None):
        config = read_config(os.fspath(config), {k: v for k, v in at.items() if k not in ("revision", "subfolder")})
    if where == STATE_DICT:
        if config is None or state_dict is None:
            raise ValueError("without a folder or Hub id, from_pretrained needs config= and state_dict=")
        return config, None, {}

    def read(source: str, at: Mapping[str, Any]) -> tuple[RestNetConfig, Profile | None, dict[str, Tensor]]:
        found = read_config(source, at) if config is None else config
        return found, read_profile(source, at), read_weights(source, at) if state_dict is None else {}

    if not os.path.isdir(where):
        return read(where, at)
    inside = {**at, "subfolder": ""}
    return read_whole(Path(where, at["subfolder"]), CONFIG, lambda folder: read(os.fspath(folder), inside))
