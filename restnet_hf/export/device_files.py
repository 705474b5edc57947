"""Plain files of an exported folder: how images are prepared, and a script that runs a route."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from restnet_hf.data.preprocessing import Preprocessing, prepare_images
from restnet_hf.runtime.exported_files import EXAMPLE, LABELS, PREPROCESSING, PROFILE
from restnet_hf.runtime.exported_model import prepare_image
from restnet_hf.runtime.golden import CHECK, IMAGES, MOST, PICTURE, made_images
from restnet_hf.runtime.pixels import SMALLEST
from restnet_hf.runtime.runners import RUNTIMES


SIZES = ((320, 240), (190, 250))  # width and height of the pictures on which two preprocessings are compared
MAX_DIFFERENCE = 2.0  # mean difference of prepared pictures, in levels of 255
UNCROPPED_FROM = 384  # edge in pixels from which on ConvNeXt's processor resizes without a crop


def plain_preprocessing(processor: Any, preprocessing: Preprocessing) -> dict[str, Any]:
    """The settings of a preprocessing that `prepare_image` reads.

    Args:
        processor: image processor of transformers; None where images are only resized and normalised.
        preprocessing: image size, mean and standard deviation of the processor.

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
        if edge is not None and edge < UNCROPPED_FROM:
            how |= {"resize": int(edge / settings["crop_pct"]), "crop": size}
    elif settings.get("do_center_crop"):
        resized = [settings["size"][key] for key in ("height", "width")] if edge is None else edge
        how |= {"resize": resized, "crop": size}
    elif edge is not None:
        how |= {"resize": edge}
    _check_same(processor, how)
    return how


def _check_same(processor: Any, how: Mapping[str, Any]) -> None:
    """Raise ValueError where the settings prepare pictures in another way than the processor."""
    rng = np.random.default_rng(0)
    for size in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (7, 6, 3), np.uint8))
        picture = coarse.resize(size, Image.Resampling.BICUBIC)
        ours, expected = prepare_image(picture, how), prepare_images(processor, [picture])[0].numpy()
        difference = np.inf
        if ours.shape == expected.shape:
            scale = np.array(how["std"], np.float32)[:, None, None]
            difference = 255 * float((np.abs(ours - expected) * scale).mean())
        if difference > MAX_DIFFERENCE:
            raise ValueError(
                f"{type(processor).__name__} prepares images in a way that is not resizing, cropping and normalising "
                f"(off by {difference:.1f} of 255 levels), so an exported route would get other images than its "
                "anchor; load the anchor with another image processor"
            )


def run_script(
    runtime: str,
    active: str,
    run: Sequence[str],
    how: Mapping[str, Any],
    batch_size: int | None,
    with_preprocessing: bool = False,
) -> str:
    """A script that classifies a picture with a route or cascade, and needs numpy, Pillow and the runtime alone.

    With ``--check`` it tells whether the files and the runtime are as they were at the export.

    Args:
        runtime: a key of `RUNTIMES`.
        active: string form of the route or cascade.
        run: lines that run the route or cascade, from ``x`` (1, 3, H, W) to ``logits`` (classes,).
        how: settings that `plain_preprocessing` returned.
        batch_size: number of images that the file takes; None for any number.
        with_preprocessing: whether the file takes pixels and returns probabilities.
    """
    resize, crop = how["resize"], how["crop"]
    many = f".repeat({batch_size}, 0)" if batch_size and batch_size > 1 else ""
    prepare = [
        'pixels = (np.float32(picture) / 255 - np.float32(how["mean"])) / np.float32(how["std"])',
        "return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])",
    ]
    if with_preprocessing:
        prepare = ["return np.uint8(picture)[None]"]
    if isinstance(resize, int):
        size = f"[int({resize} * edge / min(image.size)) for edge in image.size]"
    else:
        size = f"({resize[1]}, {resize[0]})"
    lines = [
        '"""Classify a picture. Usage: python run.py PICTURE; or --check, whether all is as it was at the export"""',
        "import hashlib, json, pathlib, sys",
        "if len(sys.argv) != 2: print(__doc__, file=sys.stderr); sys.exit(2)",
        f"import numpy as np, {RUNTIMES[runtime].script_imports}",
        "from PIL import Image, ImageOps",
        "here = pathlib.Path(__file__).parent",
        f'how, labels = (json.loads((here / name).read_text()) for name in ("{PREPROCESSING}", "{LABELS}"))',
        "def prepare(picture):",
        *(f"    {line}{many}" if line.startswith("return") else f"    {line}" for line in prepare),
        "def run(x):",
        *(f"    {line}" for line in run),
        f"    return np.log(np.maximum(logits, {float(SMALLEST)!r}))" if with_preprocessing else "    return logits",
        *_check_lines(active, how),
        'image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")',
        f"image = image.resize({size}, Image.Resampling.{how['resample'].upper()})",
    ]
    if crop is not None:
        lines += [
            f"left, top = (image.width - {crop[1]}) // 2, (image.height - {crop[0]}) // 2",
            f"image = image.crop((left, top, left + {crop[1]}, top + {crop[0]}))",
        ]
    lines.append("print(labels[run(prepare(image)).argmax()])")
    return "\n".join(lines) + "\n"


def _check_lines(active: str, how: Mapping[str, Any]) -> list[str]:
    """Lines that compare files with their checksums, and logits with those of `restnet_hf.runtime.golden`."""
    height, width = made_images(how).shape[2:]
    return [
        'if sys.argv[1] == "--check":',
        f"    profile, check = (json.loads((here / name).read_text()) for name in ({PROFILE!r}, {CHECK!r}))",
        f"    sums = {{n: s for n, s in profile['sha256'].items() if n != {EXAMPLE!r}}}",
        "    changed = [n for n in sums if hashlib.sha256((here / n).read_bytes()).hexdigest() != sums[n]]",
        f"    y, x, c = np.ogrid[:{height}, :{width}, :3]",
        f"    logits = np.stack([run(prepare({PICTURE})) for k in range({IMAGES})])",
        f'    expected = np.float32(check["logits"][{active!r}])',
        f"    logits = logits[:, :: -(-logits.shape[1] // {MOST})]",
        "    off = np.abs(logits - expected).max() / max(expected.std(), 1e-9)",
        "    print(f\"changed files: {changed or 'none'}; logits off by {off:.2g} of {check['tolerance']}\")",
        '    sys.exit(bool(changed) or not off <= check["tolerance"])',
    ]
