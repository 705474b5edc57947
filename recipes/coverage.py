# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Try every image classifier of transformers and timm as an anchor and write the result as a table.

    python recipes/coverage.py recipes/coverage.md            # about 6 minutes on a CPU

The rows come from the libraries' own registries: every type that ``AutoModelForImageClassification`` knows, and for
every model module of timm its smallest member. Weights are random; cuts do not depend on them. A row is certified
where running to each of its cuts and on from it gives the network's own logits.
"""

import copy
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import transformers
import typer
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from restnet_hf import Anchor, Preprocessing


CLASSES = 10
SMALL_SIDES = (128, 126)  # for networks that take any size, the second for patches of 14
TRIED = 6  # members of a timm module whose parameters are counted to find the smallest

PLAIN = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT = {**PLAIN, "intermediate_size": 48}
DINO = {**PLAIN, "mlp_ratio": 2}
STAGES = {"depths": [1, 2, 2, 1], "hidden_sizes": [16, 24, 32, 48]}
WINDOWS = {"image_size": 64, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 2], "window_size": 2}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2] * 4}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}

# Smaller than the default, so that a row takes a second. A type without an entry is tried at its default size.
TINY: dict[str, dict[str, object]] = {
    "beit": {**VIT, "use_shared_relative_position_bias": True},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 2, 1], "num_groups": 8},
    "clip": {"vision_config": {**VIT, "projection_dim": 16}, "text_config": TEXT},
    "metaclip_2": {"vision_config": {**VIT, "projection_dim": 16}, "text_config": TEXT},
    "convnext": {**STAGES, "image_size": 64},
    "convnextv2": {**STAGES, "image_size": 64},
    "cvt": {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 4]},
    "data2vec-vision": {**VIT, "use_relative_position_bias": True},
    "deit": VIT,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "donut-swin": WINDOWS,
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 64},
    "focalnet": {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 2, 1]},
    "hiera": {"image_size": [64, 64], "embed_dim": 16, "num_heads": [1, 2, 4, 8], "depths": [1, 1, 2, 1]},
    "ijepa": VIT,
    "levit": {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2] * 3, "depths": [2] * 3},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.35, "image_size": 64},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "image_size": 64},
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.5},
    "poolformer": STAGES,
    "pvt": {**PYRAMID, "image_size": 64},
    "pvt_v2": {**PYRAMID, "image_size": 64},
    "regnet": {"embedding_size": 8, **STAGES, "groups_width": 8},
    "resnet": {"embedding_size": 16, **STAGES, "layer_type": "basic"},
    "segformer": {**PYRAMID, "decoder_hidden_size": 32},
    "siglip": {"vision_config": VIT, "text_config": TEXT},
    "swiftformer": {"depths": [1, 1, 2, 1], "embed_dims": [16, 24, 32, 48], "mlp_ratio": 2},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "textnet": {"image_size": 64},
    "vit": VIT,
    "vit_msn": VIT,
}

# What cannot be an anchor, and why.
EXCEPTIONS = {
    "transformers/imagegpt": "reads colour tokens, not pixels",
    "transformers/perceiver": "cross-attends from learned latents: takes `inputs`, and has no map or grid of tokens",
    "transformers/siglip2": "takes flattened patches, not images",
    "transformers/shieldgemma2": "a language model that answers yes or no",
    "transformers/dinat": "needs the package natten, compiled for the machine",
    "transformers/timm_wrapper": "is timm, below",
}


@dataclass(frozen=True)
class Row:
    """One architecture: what was found, or why it was refused."""

    name: str
    cuts: int = 0
    layouts: str = ""
    float32: str = ""
    bfloat16: str = ""
    refused: str = ""
    seconds: float = 0.0


def transformers_model(model_type: str) -> tuple[nn.Module, int]:
    """A random classifier of that type, and the side of its images."""
    config = CONFIG_MAPPING[model_type](**TINY.get(model_type, {}))
    config.num_labels = CLASSES
    architecture = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    name = architecture if isinstance(architecture, str) else architecture[0]
    side = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    side = side[0] if isinstance(side, list | tuple) else side
    return getattr(transformers, name)(config), side or 64


def timm_member(module: str) -> str:
    """The smallest model of a module, of those whose names look small."""
    names = timm.list_models(module=module)
    small = ("tiny", "nano", "pico", "femto", "atto", "xx", "small", "_s", "18", "050", "mini", "t0", "b0")
    likely = sorted(names, key=lambda n: (-sum(word in n for word in small), len(n)))[:TRIED]

    def params(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    return min(likely, key=params)


def timm_model(name: str) -> tuple[nn.Module, int]:
    """A random timm model, and the side of its images: its own where that is fixed or the small one does not fit."""
    model = timm.create_model(name, num_classes=CLASSES).eval()
    side = model.pretrained_cfg["input_size"][-1]
    for small in () if model.pretrained_cfg.get("fixed_input_size") else SMALL_SIDES:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, small, small))
        except (AssertionError, RuntimeError, ValueError):
            continue
        return model, min(side, small)
    return model, side


def spread(model: nn.Module) -> nn.Module:
    """Weights of unit gain: with the usual ones logits hardly depend on the image, and equality proves nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model.eval()


@torch.no_grad()
def certify(anchor: Anchor) -> str:
    """``equal`` where to each cut and on from it gives the logits bit for bit; else the largest relative error."""
    dtype = next(anchor.parameters()).dtype
    size = anchor.preprocessing.image_size
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(5)).to(dtype)
    whole = anchor.logits(images)
    some = sorted({1, anchor.depth // 4 + 1, anchor.depth // 2 + 1, anchor.depth})
    reached = anchor.capture(images, some)
    errors = [(anchor(reached[cut], cut) - whole).abs().max().item() for cut in some]
    error = max(errors) / (whole.max() - whole.min()).item()
    return "equal" if error == 0 else f"{error:.0e}"


def try_model(name: str, model: nn.Module, side: int) -> Row:
    """One row of the table."""
    began = time.perf_counter()
    half = copy.deepcopy(spread(model)).to(torch.bfloat16)  # before it has run: some keep float32 tables
    anchor, twin = (Anchor(m, name.split("/")[-1], Preprocessing((side, side))) for m in (model, half))
    try:
        layouts = sorted({f"{cut.layout.kind}{cut.layout.prefix or ''}" for cut in anchor.cuts})
        float32, bfloat16 = certify(anchor), certify(twin)
    except (ValueError, RuntimeError) as error:
        return Row(name, refused=" ".join(str(error).split())[:160], seconds=time.perf_counter() - began)
    return Row(name, anchor.depth, ", ".join(layouts), float32, bfloat16, "", time.perf_counter() - began)


def rows(only: str = "") -> Iterator[Row]:
    """Every architecture of both libraries; ``only`` keeps names that contain it."""
    for model_type in sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES):
        name = f"transformers/{model_type}"
        if only in name:
            yield (
                Row(name, refused=EXCEPTIONS[name])
                if name in EXCEPTIONS
                else try_model(name, *transformers_model(model_type))
            )
    for module in timm.list_modules():
        if only in f"timm/{module}" and timm.list_models(module=module):
            member = timm_member(module)
            yield try_model(f"timm/{module}/{member}", *timm_model(member))
            gc.collect()


def main(out: Path, only: str = "") -> None:
    """Write the table to OUT."""
    found = []
    for row in rows(only):
        print(row, flush=True)
        found.append(row)
    lines = [
        "# Architectures tried as anchors",
        "",
        "Written by `python recipes/coverage.py recipes/coverage.md` with",
    ]
    lines += [f"transformers {transformers.__version__}, timm {timm.__version__}, torch {torch.__version__}.", ""]
    for library in ("transformers", "timm"):
        tried = [row for row in found if row.name.startswith(library + "/")]
        good = sum(not row.refused for row in tried)
        lines.append(f"- {library}: {len(tried)} tried, {good} certified, {len(tried) - good} refused")
    lines += [
        "",
        "| architecture | cuts | layouts | float32 | bfloat16 | refused because |",
        "|---|---:|---|---|---|---|",
    ]
    lines += [f"| {r.name} | {r.cuts} | {r.layouts} | {r.float32} | {r.bfloat16} | {r.refused} |" for r in found]
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
