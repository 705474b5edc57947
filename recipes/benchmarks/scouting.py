"""Which two of twenty: seconds of `restnet-hf scout`, and what its choice gives on images that it has not seen.

    python recipes/benchmarks/scouting.py OUT [--dataset DIR] [--epochs 4] [--budget 2e6] [--images 1000] [--few 4]

Makes twenty small classifiers of seven kinds in OUT/anchors (timm and transformers, 28 px, 10,000 training images of
Fashion-MNIST; those that are there stay), and runs scout over all of them. Then:

Regret: for every pair, the best cascade within the budget of mean MACs by cross-validation on all test images that
scout did not see; the best of all pairs minus that of the pair that scout chose, in points of accuracy.

Brute force: for every pair of the first --few candidates, the selector fitted_accuracy without a race and cascades of
the pair's own model on the same images, one pair after another; its seconds, and whether the best pair is the same.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import dataclasses
import json
import time
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import Dataset
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from restnet_hf.data.datasets import load_images
from restnet_hf.data.labels import class_names_of


SIZE, MEAN, STD = 28, 0.286, 0.353
console = Console()
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"resnet18_w{w}": ("resnet18", {"channels": [w, 2 * w, 3 * w, 4 * w], "stem_width": w})
        for w in (8, 12, 16, 24, 32)
    },
    **{f"resnet26_w{w}": ("resnet26", {"channels": [w, 2 * w, 3 * w, 4 * w]}) for w in (8, 16)},
    **{f"resnet34_w{w}": ("resnet34", {"channels": [w, 2 * w, 3 * w, 4 * w]}) for w in (8, 16)},
    "mobilenetv3_050": ("mobilenetv3_small_050", {}),
    "mobilenetv3_075": ("mobilenetv3_small_075", {}),
    "lcnet_035": ("lcnet_035", {}),
    "lcnet_050": ("lcnet_050", {}),
    "convnext_16": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "patch_size": 2}),
    "convnext_24": ("convnext_atto", {"depths": (1, 2, 3, 1), "dims": (24, 48, 64, 96), "patch_size": 2}),
    "regnetx_002": ("regnetx_002", {}),
}
VIT = {"vit_24x3": (24, 3), "vit_36x4": (36, 4), "vit_48x6": (48, 6), "vit_72x6": (72, 6)}


def make(name: str, names: list[str]) -> PreTrainedModel:
    """A classifier of the table, with random weights."""
    labels = dict(enumerate(names))
    if name in VIT:
        hidden, layers = VIT[name]
        config = ViTConfig(
            image_size=SIZE, patch_size=7, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=2 * hidden, id2label=labels,
        )  # fmt: skip
        return ViTForImageClassification(config)
    architecture, options = TIMM[name]
    cfg = {"input_size": [3, SIZE, SIZE], "interpolation": "bilinear", "crop_pct": 1.0}
    cfg |= {"mean": [MEAN] * 3, "std": [STD] * 3}
    options = {key: value for key, value in options.items() if key != "stem_width"}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=architecture, model_args=options, id2label=labels, pretrained_cfg=cfg)
    )


def pixels(rows: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of a shuffled split in one channel, as bytes, and their labels."""
    some = rows.shuffle(seed=1).select(range(min(count, len(rows))))
    images = np.stack([np.asarray(image.convert("L").resize((SIZE, SIZE))) for image in some["image"]])
    return torch.from_numpy(images), torch.tensor(some["label"])


def fit(model: PreTrainedModel, images: torch.Tensor, labels: torch.Tensor, epochs: int, vit: bool) -> None:
    """Train all weights, images flipped at random."""
    mean, std = (0.5, 0.5) if vit else (MEAN, STD)
    steps = epochs * (len(images) // 100)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(100)[: len(images) // 100]:
            x = (images[rows].float()[:, None] / 255 - mean) / std
            flip = torch.rand(len(x)) < 0.5
            x[flip] = x[flip].flip(-1)
            loss = cross_entropy(model(x.expand(-1, 3, -1, -1)).logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def make_anchors(folder: Path, dataset: str, epochs: int, train_images: int) -> list[Path]:
    """Train and save the classifiers that are not there yet; returns their folders."""
    rows, places = load_images(dataset, "train"), []
    names, data = class_names_of(rows), None
    for name in [*TIMM, *VIT]:
        place = folder / name
        places.append(place)
        if (place / "model.safetensors").exists():
            continue
        torch.manual_seed(0)
        data = data or pixels(rows, train_images)
        began, model = time.perf_counter(), make(name, names)
        fit(model, *data, epochs * (2 if name in VIT else 1), name in VIT)
        if name in VIT:
            ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(place)
        model.save_pretrained(place)
        console.print(f"{name}: {time.perf_counter() - began:.0f} s")
    return places


def observe_unseen(result: ScoutResult, dataset: str, seen: int) -> tuple[np.ndarray, Any, list[str], Dataset]:
    """Logits (anchors, N, classes) of all candidates on the test images that scout did not see, and their labels."""
    rows = load_images(dataset, "test")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[seen:].tolist()
    names, logits = list(result.sources), []
    labels = np.array(rows.select(order)["label"])
    for name in names:
        model = StitchedModelForImageClassification.from_anchors(result.sources[name], dtype="float32")
        data = with_pixel_values(rows.select(order), model.image_processor)
        with torch.no_grad():
            logits.append(torch.cat([model(batch["pixel_values"]).logits for batch in batches(data, 250)]).numpy())
    return np.stack(logits), labels, names, rows


def regret(result: ScoutResult, dataset: str, budget: float) -> dict[str, Any]:
    """Accuracy within the budget, and gap closed, of the cascades of each pair on images that scout did not see."""
    logits, labels, names, _ = observe_unseen(result, dataset, result.images // 2)
    macs = {pair.front: pair.alone(pair.front).costs["macs"] for pair in result.pairs}
    macs |= {pair.end: pair.alone(pair.end).costs["macs"] for pair in result.pairs}
    best, gaps = {}, {}
    for a, b in combinations(sorted(names, key=macs.__getitem__), 2):
        routes, at = [Route.alone(a), Route.alone(b)], [names.index(a), names.index(b)]
        observed = observe_logits(routes, logits[at], labels)
        costs = StageCosts([macs[a], macs[b]], np.zeros((2, 2)))
        found = [(each.mean_cost, each.score) for each in calibrate_cascades(observed, costs)]
        found += [(macs[name], observed.right[row].mean().item()) for row, name in enumerate((a, b))]
        best[frozenset((a, b))] = max((score for cost, score in found if cost <= budget), default=0.0)
        rows = [Point(str(at), cost, score, at < 0) for at, (cost, score) in enumerate(found)]
        gaps[frozenset((a, b))] = measure_gap(anchors_last(rows), "mean_macs", "accuracy")[0]
    winner = frozenset((result.winner.front, result.winner.end))
    order = sorted(best, key=best.__getitem__, reverse=True)
    return {
        "images": len(labels), "winner": sorted(winner), "winner_accuracy": best[winner], "winner_gap": gaps[winner],
        "best": sorted(order[0]), "best_accuracy": best[order[0]], "best_gap": gaps[order[0]],
        "place": order.index(winner) + 1, "pairs": len(order), "median_accuracy": float(np.median([*best.values()])),
    }  # fmt: skip
