"""Limits on what untrusted files can ask for: the size, depth and numbers of JSON."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from restnet_hf.errors import quote


MAX_BYTES = 2**24  # of a JSON file; two anchors of ImageNet-21k with all their names take 6 MB
MAX_VALUES = 2**19  # in it, each some hundred bytes of memory
MAX_DEPTH = 48
MAX_NUMBER = 2**20  # in the config of an anchor: widths, depths, image sizes, vocabularies
MAX_LABELS = 2**17
MAX_ANCHORS, MAX_ROUTES = 64, 2**16
ARCHITECTURE = re.compile(r"[\w.-]+")  # of timm, by name alone
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
NOT_IN_CONFIGS = ("use_pretrained_backbone", "checkpoint_path")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file of reasonable size.

    Raises:
        OSError: there is no such file.
        ValueError: it is not JSON, or is too large.
    """
    file = Path(path)
    if not file.is_file():  # a device or a pipe may never end
        raise OSError(f"{file} is not there, or is no file")
    with file.open("rb") as opened:
        raw = opened.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES or sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"{file} is too large: {MAX_BYTES} bytes and {MAX_VALUES} values at most")
    try:
        data = json.loads(raw)
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply: {MAX_DEPTH} levels at most") from None
    check_json(data, str(file))
    return data


def values(data: Any) -> Iterator[tuple[Any, Any, int]]:
    """Every value in nested JSON with its key or index, and its depth."""
    left: list[tuple[Any, Any, int]] = [(None, data, 0)]
    while left:
        key, value, depth = left.pop()
        yield key, value, depth
        if isinstance(value, dict | list | tuple):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            left.extend((k, v, depth + 1) for k, v in inner)


def check_json(data: Any, where: str) -> None:
    """Raise ValueError where JSON is nested too deeply or holds too many values."""
    for count, (_, _, depth) in enumerate(values(data)):
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"{where} holds more than {MAX_VALUES} values, or is nested over {MAX_DEPTH} levels deep")


def check_network(config: Any, where: str) -> None:
    """Raise ValueError where no network of reasonable size has a config, or where it brings code or other weights.

    Args:
        config: of transformers or timm, as JSON.
        where: it is, for errors.
    """
    check_json(config, where)
    for key, value, _ in values(config):
        most = MAX_LABELS if key in ("num_labels", "num_classes") else MAX_NUMBER
        numbers = value if isinstance(value, list) else [value]
        if sum(abs(number) for number in numbers if type(number) is int) > most:
            raise ValueError(f"{where}: {quote(key)} is {quote(value)}, and at most {most} is reasonable")
        brings_code = key in IMPLEMENTATIONS and isinstance(value, str) and "/" in value
        brings_weights = key in NOT_IN_CONFIGS and value is not None and value is not False
        if brings_code or brings_weights or (key == "architecture" and not ARCHITECTURE.fullmatch(str(value))):
            raise ValueError(f"{where}: {key}={quote(value)} would bring code or weights from elsewhere; remove it")
