"""What an exported folder says in plain files: how images are prepared, and a script that runs a route."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from restnet_hf.data.preprocessing import Preprocessing, prepare
from restnet_hf.runtime.exported_files import LABELS, PREPROCESSING
from restnet_hf.runtime.exported_model import prepare_image


SIZES = ((320, 240), (190, 250))  # of pictures, width and height, on which two ways of preparing are compared
LEVELS = 2.0  # of 255 by which they may differ on average
SQUASHED_FROM = 384  # pixels from which on ConvNeXt's processor does not crop
LOAD = {  # runtime: what a script imports, and how it gets logits of x
    "onnx": (
        "onnxruntime",
        'onnxruntime.InferenceSession(here / "{file}").run(None, {{"pixel_values": x}})[0][0]',
    ),
    "openvino": (
        "openvino",
        'openvino.compile_model(openvino.Core().read_model(here / "{file}", here / "{weights}"), "CPU")(x)[0][0]',
    ),
    "executorch": (
        "torch, executorch.runtime",
        'executorch.runtime.Runtime.get().load_program(here / "{file}").load_method("{method}")'
        ".execute([torch.from_numpy(x)])[0][0].numpy()",
    ),
    "torch": (
        "torch",
        'torch.export.load(here / "{file}").module()(torch.from_numpy(x).to(torch.{compute}))[0]'
        ".detach().float().numpy()",
    ),
}


def plain_preprocessing(processor: Any, preprocessing: Preprocessing) -> dict[str, Any]:
    """How images are prepared, as `prepare_image` reads it.

    Args:
        processor: image processor of transformers; None where images are but scaled.
        preprocessing: what was measured of it.

    Raises:
        ValueError: the processor does more than resizing, cropping and normalising.
    """
    size: list[int] = [*preprocessing.image_size]
    values = {"mean": [*preprocessing.mean], "std": [*preprocessing.std]}
    how: dict[str, Any] = {"resize": size, "crop": None, "resample": "bilinear", **values}
    if processor is None:
        return how
    settings = processor.to_dict()
    edge = (settings.get("size") or {}).get("shortest_edge")
    how["resample"] = Image.Resampling(settings.get("resample", 2)).name.lower()
    if settings.get("crop_pct") is not None:  # as ConvNeXt's does it
        if edge is not None and edge < SQUASHED_FROM:
            how |= {"resize": int(edge / settings["crop_pct"]), "crop": size}
    elif settings.get("do_center_crop"):
        resized = [settings["size"][key] for key in ("height", "width")] if edge is None else edge
        how |= {"resize": resized, "crop": size}
    elif edge is not None:
        how |= {"resize": edge}
    _compare(processor, how)
    return how


def _compare(processor: Any, how: Mapping[str, Any]) -> None:
    """Raise ValueError where what is written prepares pictures in another way than the processor."""
    dice = np.random.default_rng(0)
    for size in SIZES:
        coarse = Image.fromarray(dice.integers(0, 256, (7, 6, 3), np.uint8))
        picture = coarse.resize(size, Image.Resampling.BICUBIC)
        mine, its = prepare_image(picture, how), prepare(processor, [picture])[0].numpy()
        off = np.inf
        if mine.shape == its.shape:
            off = 255 * float((np.abs(mine - its) * np.array(how["std"], np.float32)[:, None, None]).mean())
        if off > LEVELS:
            raise ValueError(
                f"{type(processor).__name__} prepares images in a way that is not resizing, cropping and normalising "
                f"(off by {off:.1f} of 255 levels), so no exported route could be fed as its anchor was; load the "
                "anchor with another image processor"
            )


def run_script(runtime: str, entry: Mapping[str, str], how: Mapping[str, Any], batch_size: int | None) -> str:
    """A script that classifies a picture with one route, and needs numpy, Pillow and the runtime alone.

    Args:
        runtime: a key of `RUNNERS`.
        entry: of the route.
        how: from `plain_preprocessing`.
        batch_size: that the file was made for; None for any.
    """
    package, logits = LOAD[runtime]
    resize, crop = how["resize"], how["crop"]
    if isinstance(resize, int):
        size = f"[int({resize} * edge / min(image.size)) for edge in image.size]"
    else:
        size = f"({resize[1]}, {resize[0]})"
    lines = [
        '"""Classify a picture: python run.py PICTURE"""',
        "import json, pathlib, sys",
        f"import numpy as np, {package}",
        "from PIL import Image",
        "here = pathlib.Path(__file__).parent",
        f'how, labels = (json.loads((here / name).read_text()) for name in ("{PREPROCESSING}", "{LABELS}"))',
        'image = Image.open(sys.argv[1]).convert("RGB")',
        f"image = image.resize({size}, Image.Resampling.{how['resample'].upper()})",
    ]
    if crop is not None:
        lines += [
            f"left, top = (image.width - {crop[1]}) // 2, (image.height - {crop[0]}) // 2",
            f"image = image.crop((left, top, left + {crop[1]}, top + {crop[0]}))",
        ]
    many = f".repeat({batch_size}, 0)" if batch_size and batch_size > 1 else ""
    lines += [
        'pixels = (np.asarray(image, np.float32) / 255 - np.float32(how["mean"])) / np.float32(how["std"])',
        f"x = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]){many}",
        f"logits = {logits.format(**entry)}",
        "print(labels[logits.argmax()])",
    ]
    return "\n".join(lines) + "\n"
