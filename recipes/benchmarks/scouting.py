"""Which two of twenty: seconds of `restnet-hf scout`, and what its choice gives on images that it has not seen.

    python recipes/benchmarks/scouting.py OUT [--dataset DIR] [--epochs 2] [--train-images 6000] [--budget 3e6]
        [--images 2000] [--few 4]

Makes twenty small classifiers of seven kinds in OUT/anchors (timm and transformers, 28 px, some training images of
Fashion-MNIST; those that are there stay), and runs scout over all of them. Then:

Regret: for every pair, the best cascade within the budget of mean MACs by cross-validation on all test images that
scout did not see; the best of all pairs minus that of the pair that scout chose, in points of accuracy.

Brute force: for every pair of the first --few candidates, the selector fitted_accuracy without a race and cascades of
the pair's own model on the same images, one pair after another; its seconds, and whether the best pair is the same.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import json
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from datasets import Dataset, concatenate_datasets
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

from restnet_hf import Route, ScoutResult, StitchedModelForImageClassification, scout, with_pixel_values
from restnet_hf.data import batches
from restnet_hf.data.datasets import load_images
from restnet_hf.data.labels import class_names_of
from restnet_hf.files import atomic_file
from restnet_hf.profiling.cascades import StageCosts, as_cascade, calibrate_cascades, observe_logits
from restnet_hf.routes.fronts import measure_gap
from restnet_hf.routes.profile import ProfiledCascade, ProfiledRoute
from restnet_hf.selection.ranking import rank_routes


SIZE, MEAN, STD = 28, 0.286, 0.353
console = Console()
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"resnet18_w{w}": ("resnet18", {"channels": [w, 2 * w, 3 * w, 4 * w]}) for w in (8, 12, 16, 24, 32)},
    **{f"resnet26_w{w}": ("resnet26", {"channels": [w, 2 * w, 3 * w, 4 * w]}) for w in (8, 16)},
    **{f"resnet34_w{w}": ("resnet34", {"channels": [w, 2 * w, 3 * w, 4 * w]}) for w in (8, 16)},
    "mobilenetv3_050": ("mobilenetv3_small_050", {}),
    "mobilenetv3_075": ("mobilenetv3_small_075", {}),
    "lcnet_035": ("lcnet_035", {}),
    "lcnet_050": ("lcnet_050", {}),
    "resnet10t_w16": ("resnet10t", {"channels": [16, 32, 48, 64]}),
    "resnet18d_w12": ("resnet18d", {"channels": [12, 24, 36, 48]}),
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


def unseen_logits(result: ScoutResult, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (anchors, N, classes) of all candidates on the test images that scout did not see, and their labels."""
    rows, logits = load_images(dataset, "test"), []
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[result.images // 2 :].tolist()
    rows = rows.select(order)
    for source in result.sources.values():
        model = StitchedModelForImageClassification.from_anchors(source, dtype="float32")
        data = with_pixel_values(rows, model.image_processor)
        with torch.no_grad():
            logits.append(torch.cat([model(batch["pixel_values"]).logits for batch in batches(data, 250)]).numpy())
    return np.stack(logits), np.array(rows["label"])


def regret(result: ScoutResult, dataset: str, budget: float) -> dict[str, Any]:
    """What cascades of each pair give on images that scout did not see: the best pair's, and the chosen one's."""
    logits, labels = unseen_logits(result, dataset)
    at, anchors = {name: number for number, name in enumerate(result.sources)}, dict[str, ProfiledRoute]()
    for pair in result.pairs:
        anchors |= {name: pair.alone(name) for name in (pair.front, pair.end)}
    best, gaps = dict[frozenset[str], float](), dict[frozenset[str], float | None]()
    for names in combinations(sorted(anchors, key=lambda name: anchors[name].costs["macs"]), 2):
        macs = [anchors[name].costs["macs"] for name in names]
        observed = observe_logits([Route.alone(n) for n in names], logits[[at[n] for n in names]], labels)
        rows: list[Any] = [
            ProfiledRoute(r, {"macs": m, "mean_macs": m}, {"accuracy": right.mean().item()})
            for r, m, right in zip(observed.routes, macs, observed.right, strict=True)
        ]
        for each in calibrate_cascades(observed, StageCosts(macs, np.zeros((2, 2)))):
            cascade = as_cascade(observed, each.chain)
            rows.append(ProfiledCascade(cascade, {"mean_macs": each.mean_cost}, {"accuracy": each.score}))
        fitting = [row.scores["accuracy"] for row in rows if row.costs["mean_macs"] <= budget]
        best[frozenset(names)] = max(fitting, default=0.0)
        gaps[frozenset(names)] = measure_gap(rows, "mean_macs", "accuracy")[0]
    winner = frozenset((result.winner.front, result.winner.end))
    order = sorted(best, key=best.__getitem__, reverse=True)
    first = {"pair": sorted(order[0]), "accuracy": best[order[0]], "gap_closed": gaps[order[0]]}
    chosen = {"pair": sorted(winner), "accuracy": best[winner], "gap_closed": gaps[winner]}
    return {
        "images": len(labels), "budget": budget, "best": first, "chosen": chosen, "place": order.index(winner) + 1,
        "pairs": len(order), "median": float(np.median([*best.values()])),
    }  # fmt: skip


def by_hand(result: ScoutResult, few: Sequence[str], budget: float) -> dict[str, Any]:
    """The best pair of a few candidates, each in a model of its own and without a race, and the seconds that takes."""
    began, found = time.perf_counter(), dict[str, float]()
    job = result.job
    half = result.images // 2
    rows = [load_images(job["dataset"], job[split]) for split in ("split", "eval_split")]
    drawn = [
        each.select(torch.randperm(len(each), generator=torch.Generator().manual_seed(0))[:half].tolist())
        for each in rows
    ]
    both = concatenate_datasets([each.select_columns(["image", "label"]) for each in drawn])
    both = both.select([n // 2 + n % 2 * half for n in range(2 * half)])
    for a, b in combinations(few, 2):
        model = StitchedModelForImageClassification.from_anchors(result.sources[a], result.sources[b], dtype="float32")
        ready, held = (with_pixel_values(each, model.image_processor) for each in (both, drawn[1]))
        (values,) = model.compare(ready, ["fitted_accuracy"], kept_images=len(both), max_images=None).values()
        costs = model.route_costs()
        profile = model.profile(held, cascades=True)
        scores = [row.scores["accuracy"] for row in profile.rows if row.costs["mean_macs"] <= budget]
        for ranked in rank_routes(values, costs):
            if ranked.costs["macs"] <= budget:
                scores.append(ranked.score)
        found[f"{a} + {b}"] = max(scores, default=0.0)
    scouted = {
        " + ".join((pair.front, pair.end)): row.scores["accuracy"]
        for pair in result.pairs
        if {pair.front, pair.end} <= {*few} and (row := pair.best({"mean_macs": budget})) is not None
    }
    return {"seconds": round(time.perf_counter() - began, 1), "by_hand": found, "scouted": scouted}


def main(
    out: Path,
    dataset: str = "zalando-datasets/fashion_mnist",
    epochs: int = 2,
    train_images: int = 6000,
    budget: float = 3e6,
    images: int = 2000,
    few: int = 4,
) -> None:
    """Make the candidates, scout, and compare with images that scout did not see and with a search by hand."""
    sources = make_anchors(out / "anchors", dataset, epochs, train_images)
    began = time.perf_counter()
    result = scout(sources, dataset, {"mean_macs": budget}, out / "scouted", images=images, resume=True)
    seconds = round(time.perf_counter() - began, 1)
    report: dict[str, Any] = {"candidates": len(sources), "pairs": len(result.pairs), "passes": result.passes}
    best = result.winner.best(result.budget)
    assert best is not None
    report |= {"seconds": dict(result.seconds) | {"all": seconds}, "left_out": dict(result.left_out)}
    report |= {"predicted": {"best": str(best.route), "accuracy": best.scores["accuracy"]}}
    report["predicted"] |= {"gap_closed": result.winner.gap_closed}
    report["unseen"] = regret(result, dataset, budget)
    report["few"] = by_hand(result, list(result.sources)[:few], budget)
    console.print_json(json.dumps(report))
    with atomic_file(out / "scouting.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
