"""The files of an adapter, read strictly, and where its weights go."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.accelerate import check_and_set_device_map
from transformers.utils import cached_file

from restnet_hf.files import finish_folder
from restnet_hf.hub import PROFILE
from restnet_hf.profiles import Profile


CONFIG, WEIGHTS, SHIM = "config.json", "model.safetensors", "modeling_restnet.py"
OWN_FILES = (CONFIG, WEIGHTS, PROFILE, SHIM, "preprocessor_config.json")
AUTO_MAP = {  # without the package installed, transformers then says what to install
    "AutoConfig": "modeling_restnet.RestNetConfig",
    "AutoModelForImageClassification": "modeling_restnet.StitchedModelForImageClassification",
}
SHIM_TEXT = "from restnet_hf import RestNetConfig, StitchedModelForImageClassification  # pip install restnet-hf\n"


class WeightsError(ValueError, RuntimeError):
    """Weights that do not fit a config; a RuntimeError too, as transformers raises."""


def finish_saving(path_or_id: str | os.PathLike[str], subfolder: str) -> None:
    """Where saving to a local folder was cut off half way, do the rest of it."""
    if os.path.isdir(path_or_id):
        finish_folder(os.path.join(path_or_id, subfolder), CONFIG)


def read_weights(path_or_id: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The stitches' (and new heads') tensors of an adapter in a local folder or on the Hub.

    Raises:
        OSError: there is no such file, or it is damaged.
    """
    file = cached_file(path_or_id, WEIGHTS, **hub_kwargs)
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise OSError(f"{file} is damaged or cut short ({error}); download or save the adapter again") from error


def read_profile(path_or_id: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> Profile | None:
    """The adapter's profile, None where it has none."""
    file = cached_file(path_or_id, PROFILE, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return None if file is None else Profile.load(file)


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError unless there is exactly every tensor that is expected, in its shape."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "not expected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & found.keys())
            if found[key].shape != expected[key].shape
        ],
    }
    said = "; ".join(f"{problem}: {', '.join(keys)}" for problem, keys in problems.items() if keys)
    if said:
        begin = ", or pass ignore_mismatched_sizes=True to begin these anew" if problems["of another shape"] else ""
        raise WeightsError(f"the weights in {where} do not fit its config.json. {said}. Save the adapter again{begin}")


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
    """A type of weights from itself or its name; float32 for None. Raises ValueError where there is no such type."""
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted or torch.float32
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={wanted!r} is not the name of a type of weights, such as 'float32'")
    return found
