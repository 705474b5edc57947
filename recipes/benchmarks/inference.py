"""What a stitched route costs beside its parts run by hand: eager, baked, switching, and memory.

    python recipes/benchmarks/inference.py [--quick] [--out FILE.json]

Networks of timm at 224 px with random weights, one thread. The limit is the sum of the parts: the front's own blocks,
the stitch and the end's own blocks called one after the other by hand. All are timed in turn, repeat by repeat; a
ratio is of minima, and of medians in brackets.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import typer
from torch import Tensor, nn

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification


PAIRS = [  # front, its cut, end, its cut
    ("resnet50", 7, "resnet18", 4),
    ("deit_small_patch16_224", 6, "deit_tiny_patch16_224", 6),
    ("resnet50", 7, "deit_tiny_patch16_224", 6),
]


def parts_by_hand(model: nn.Module, cut: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A timm ResNet or ViT up to a block and from it on, without this package."""
    if hasattr(model, "layer1"):
        stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
        return nn.Sequential(stem, *blocks[:cut]), nn.Sequential(*blocks[cut:], model.global_pool, model.fc)

    def begin(x: Tensor) -> Tensor:
        return model.blocks[:cut](model.norm_pre(model._pos_embed(model.patch_embed(x))))

    return begin, lambda x: model.forward_head(model.norm(model.blocks[cut:](x)))


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of several functions, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if repeat >= 2:  # the first two warm up
                taken[name].append(time.perf_counter() - began)
    return taken


@torch.no_grad()
def bench_pair(front: str, i: int, end: str, j: int, batch: int, repeats: int) -> dict[str, float]:
    """Ratios of one pair."""
    models = {name: timm.create_model(name).eval() for name in (front, end)}
    anchors = [Anchor(model, name, Preprocessing((224, 224))) for name, model in models.items()]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    route = model.set_route(model.add_stitch(f"{front}[:{i}] + {end}[{j}:]"))
    stitch, images = model.stitches[route.stitch_points[0].name], torch.randn(batch, 3, 224, 224)
    begin, finish = parts_by_hand(models[front], i)[0], parts_by_hand(models[end], j)[1]
    baked = model.bake()
    assert torch.allclose(finish(stitch(begin(images))), model(images).logits, atol=1e-4)
    assert torch.equal(baked(images), model(images).logits)
    hidden = begin(images)
    carried = stitch(hidden)
    taken = seconds(
        {
            "front part": lambda: begin(images),
            "stitch": lambda: stitch(hidden),
            "end part": lambda: finish(carried),
            "eager": lambda: model(images),
            "baked": lambda: baked(images),
            "front": lambda: models[front](images),
            "end": lambda: models[end](images),
        },
        repeats,
    )
    parts = [sum(times) for times in zip(taken["front part"], taken["stitch"], taken["end part"], strict=True)]
    ratios = {}
    for name in ("eager", "baked", "front", "end"):
        label = f"{front} -> {end}, batch {batch}: {name} over sum of parts"
        ratios[label] = min(taken[name]) / min(parts)
        ratios[f"{label} (median)"] = statistics.median(taken[name]) / statistics.median(parts)
    return ratios


def bench_switching(repeats: int) -> dict[str, float]:
    """Microseconds to switch routes, and what a model with every route of a pair holds beside anchors and stitches."""
    names = ("resnet50", "resnet18")
    anchors = [Anchor(timm.create_model(name).eval(), name, Preprocessing((224, 224))) for name in names]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    depths = [anchor.depth for anchor in anchors]
    pairs = [(i, j) for i in range(1, depths[0] + 1) for j in range(1, depths[1] + 1)]
    routes = [model.add_stitch(f"resnet50[:{i}] + resnet18[{j}:]") for i, j in pairs]
    taken = seconds({"switch": lambda: [model.set_route(route) for route in routes]}, repeats)["switch"]
    held = sum(p.numel() for p in model.parameters())
    apart = sum(p.numel() for part in (*anchors, *model.stitches.values()) for p in part.parameters())
    separate = sum(row.costs["params"] for row in model.profile(routes=routes).routes)
    return {
        "switching a route, microseconds": min(taken) / len(routes) * 1e6,
        f"parameters of {len(routes)} routes in one model over anchors and stitches": held / apart,
        f"parameters of {len(routes)} separate models over one model": separate / held,
    }


def main(quick: bool = False, out: Path | None = None) -> None:
    """Print the ratios, and write them to OUT."""
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    for pair in PAIRS:
        for batch in (1,) if quick else (1, 16):
            ratios |= bench_pair(*pair, batch, 5 if quick else 25 if batch == 1 else 9)
    ratios |= bench_switching(3 if quick else 20)
    for name, ratio in ratios.items():
        if not name.endswith("(median)"):
            median = ratios.get(f"{name} (median)")
            print(f"{name}: {ratio:.3f}" + (f" ({median:.3f})" if median else ""))
    if out is not None:
        out.write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
