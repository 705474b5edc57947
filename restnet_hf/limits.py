"""Limits on what untrusted files can ask for: size, depth and numbers of JSON, image sizes, mean and std. No torch."""

import json
import os
import re
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any

from restnet_hf.errors import quote


MAX_BYTES = 2**24  # of a JSON file; two anchors of ImageNet-21k with all their names take 6 MB
MAX_VALUES = 2**19  # values in a JSON file, each about a hundred bytes of memory
MAX_DEPTH = 48
MAX_NUMBER = 2**20  # in the config of an anchor: widths, depths, image sizes, vocabularies
MAX_LABELS = 2**17
MAX_ANCHORS, MAX_ROUTES = 64, 2**16
MAX_SIDE = 4096  # pixels of an image; published classifiers take up to 1,024, and 4,096 are 200 MB in float32
MIN_STD, MAX_VALUE = 1e-6, 1e6  # of mean and std: float32 holds their products and ratios, and pixels stay apart
ARCHITECTURE = re.compile(r"[\w.-]+")  # name of a timm architecture, without a path
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
NOT_IN_CONFIGS = ("use_pretrained_backbone", "checkpoint_path")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file of reasonable size.

    Raises:
        OSError: there is no such file.
        ValueError: the file is not JSON, or is too large.
    """
    file = Path(path)
    if not file.is_file():  # a device or a pipe may never end
        raise OSError(f"{file} does not exist, or is not a file")
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


def walk_json(data: Any) -> Iterator[tuple[Any, Any, int]]:
    """Yield every value in nested JSON as its key or index, the value itself and its depth."""
    pending: list[tuple[Any, Any, int]] = [(None, data, 0)]
    while pending:
        key, value, depth = pending.pop()
        yield key, value, depth
        if isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending.extend((k, v, depth + 1) for k, v in items)


def check_json(data: Any, where: str) -> None:
    """Raise ValueError where JSON is nested too deeply or holds too many values."""
    for count, (_, _, depth) in enumerate(walk_json(data)):
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"{where} holds more than {MAX_VALUES} values, or is nested over {MAX_DEPTH} levels deep")


def check_network(config: Any, where: str) -> None:
    """Raise ValueError where a config asks for an unreasonably large network, or for code or weights from elsewhere.

    Args:
        config: config of transformers or timm, as JSON.
        where: file or argument that holds the config, for errors.
    """
    check_json(config, where)
    for key, value, _ in walk_json(config):
        most = MAX_LABELS if key in ("num_labels", "num_classes") else MAX_NUMBER
        numbers = value if isinstance(value, list) else [value]
        if sum(abs(number) for number in numbers if type(number) is int) > most:
            raise ValueError(f"{where}: {quote(key)} is {quote(value)}, and at most {most} is reasonable")
        brings_code = key in IMPLEMENTATIONS and isinstance(value, str) and "/" in value
        brings_weights = key in NOT_IN_CONFIGS and value is not None and value is not False
        if brings_code or brings_weights or (key == "architecture" and not ARCHITECTURE.fullmatch(str(value))):
            raise ValueError(f"{where}: {key}={quote(value)} would bring code or weights from elsewhere; remove it")


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether a value is a real number from ``low`` to ``high``; NaN, True and False are not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value  # Real declares no comparison with float
    return low <= number <= high


def is_side(value: Any) -> bool:
    """Whether a value can be the height or width of an image."""
    return type(value) is int and 1 <= value <= MAX_SIDE


def is_mean(values: Any) -> bool:
    """Whether values can be the means of the three channels of an image."""
    return _are_three_numbers(values, -MAX_VALUE)


def is_std(values: Any) -> bool:
    """Whether values can be the standard deviations of the three channels of an image."""
    return _are_three_numbers(values, MIN_STD)


def _are_three_numbers(values: Any, low: float) -> bool:
    return isinstance(values, tuple | list) and len(values) == 3 and all(is_number(v, low, MAX_VALUE) for v in values)
