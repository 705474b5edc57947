"""Which two of twenty: seconds of `restnet-hf scout`, and what its choice gives on images that it has not seen.

    python recipes/benchmarks/scouting.py OUT [--quick] [--out FILE.json] [--dataset DIR] [--epochs 2]
        [--train-images 6000] [--budget 3e6] [--images 2000] [--eval-images 5000] [--few 4] [--without NAME]

Makes twenty small classifiers of seven kinds in OUT/anchors (timm and transformers, 28 px, some training images of
Fashion-MNIST; those that are there stay), and runs scout over all of them, or all but those named --without, for each
--budget of mean MACs; passes and races in OUT/work serve all budgets. Then:

Regret: for every pair, the best anchor alone or cascade within the budget on all test images that scout used neither
to choose nor to check, with a threshold for these; the best of all pairs minus that of the pair that scout chose, in
points of accuracy, with the standard error of the paired difference. Stitched routes of other pairs are not tried
there, the one that scout chose is. Beside it the accuracy of the entry that scout chose: predicted, checked, and on
these images.

Brute force: for every pair of the first --few candidates, the selector fitted_accuracy without a race and cascades of
the pair's own model, both on the half of --images that tests stitched routes, one pair after another; its seconds, and
accuracies beside those that scout predicts, of anchors and cascades on more images.

With --quick five candidates and 1,000 training images of the embedded demo; less than a minute.
"""

import sys


sys.path.pop(0)  # this folder: a benchmark in it has the name of a module of Python's

import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

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

from restnet_hf import Budget, Cascade, Route, ScoutResult, StitchedModelForImageClassification, with_pixel_values
from restnet_hf.data import batches
from restnet_hf.data.datasets import load_images
from restnet_hf.data.labels import class_names_of
from restnet_hf.demo.paths import DATA
from restnet_hf.files import atomic_file
from restnet_hf.profiling.cascades import (
    Observations,
    StageCosts,
    join_observations,
    observe_logits,
    run_chain,
    search_cascades,
)
from restnet_hf.scouting.checks import score_images
from restnet_hf.scouting.pairs import PairJudge
from restnet_hf.scouting.results import ScoutedPair
from restnet_hf.scouting.scout import judge_pairs
from restnet_hf.selection.racing import race_routes
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


def make_anchors(
    folder: Path, dataset: str, epochs: int, train_images: int, wanted: Sequence[str] = (*TIMM, *VIT)
) -> list[Path]:
    """Train and save the classifiers that are not there yet; returns their folders."""
    rows, places = load_images(dataset, "train"), []
    names, data = class_names_of(rows), None
    for name in wanted:
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


def unseen(dataset: str, used: int) -> tuple[Dataset, np.ndarray]:
    """The test images that scout used neither to choose nor to check, and their labels (N,).

    Args:
        dataset: data set of the run.
        used: number of test images that it used, the first ones in its order.
    """
    rows = load_images(dataset, "test")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[used:].tolist()
    rows = rows.select(order)
    return rows, np.array(rows["label"])


def logits_of(sources: Mapping[str, str], rows: Dataset, file: Path) -> dict[str, np.ndarray]:
    """Logits (N, classes) of candidates by name; those that the file holds are read."""
    known = dict(np.load(file)) if file.exists() else {}
    for name in sources.keys() - known.keys():
        model = StitchedModelForImageClassification.from_anchors(sources[name], dtype="float32")
        data = with_pixel_values(rows, model.image_processor)
        with torch.no_grad():
            known[name] = torch.cat([model(batch["pixel_values"]).logits for batch in batches(data, 250)]).numpy()
    with atomic_file(file) as temporary, temporary.open("wb") as opened:
        np.savez(opened, **known)
    return {name: known[name] for name in sources}


class Truth:
    """What anchors alone and cascades of each pair give on images that scout did not use.

    Args:
        result: result of scout.
        logits: logits (N, classes) of each candidate.
        labels: class (N,) of each image.
    """

    def __init__(self, result: ScoutResult, logits: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
        macs: dict[str, float] = {}
        for pair in result.pairs:
            macs |= {name: pair.alone(name).costs["macs"] for name in (pair.front, pair.end)}
        self.logits, self.labels = logits, labels
        self.pairs: dict[frozenset[str], tuple[Observations, StageCosts]] = {}
        observed = {name: observe_logits([Route.alone(name)], logits[name][None], labels) for name in macs}
        for names in combinations(sorted(macs, key=macs.__getitem__), 2):
            both, costs = join_observations([observed[name] for name in names]), [macs[name] for name in names]
            self.pairs[frozenset(names)] = both, StageCosts(costs, np.zeros((2, 2)))

    def best(self, budget: float) -> dict[frozenset[str], tuple[float, np.ndarray]]:
        """Accuracy, and on which images it is right, of the best of each pair within a budget; the best pair first."""
        found = {}
        for names, (both, costs) in self.pairs.items():
            (chain,) = search_cascades(both, costs, np.array([budget])).chains
            right = np.zeros(len(both), bool) if chain is None else run_chain(both, chain).right
            found[names] = right.mean().item(), right
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def accuracy(self, entry: Route | Cascade) -> float:
        """Accuracy of an anchor alone, or of a cascade of anchors with the thresholds that scout chose."""
        routes = entry.routes if isinstance(entry, Cascade) else (entry,)
        temperatures = (*(entry.temperatures if isinstance(entry, Cascade) else ()), 1.0, 1.0)[: len(routes)]
        logits = np.stack([self.logits[str(route).removesuffix("[:]")] for route in routes])
        observed = observe_logits(routes, logits, self.labels, temperatures=temperatures)
        return score_images(observed, entry)[0].mean().item()


def _cheapest_near(result: ScoutResult, best: Mapping[frozenset[str], tuple[float, np.ndarray]]) -> float:
    """Accuracy of the pair whose best takes the fewest mean MACs, of those not significantly worse than the winner."""

    def mean_macs(pair: ScoutedPair) -> float:
        row = pair.best(result.budget)
        return float("inf") if row is None else row.costs["mean_macs"]

    pair = min(result.near or result.pairs[:1], key=mean_macs)
    return best[frozenset((pair.front, pair.end))][0]


def judge_choice(
    result: ScoutResult, truth: Truth, run_stitched: Callable[[Route], np.ndarray | None]
) -> dict[str, Any]:
    """The place of the pair that scout chose, its regret, and the accuracy of the entry that it chose.

    Args:
        result: result of scout, ranked for a budget of mean MACs.
        truth: what pairs give on other images.
        run_stitched: function that returns whether a stitched route is right on each of these images.
    """
    budget, entry, check = result.budget.limits["mean_macs"], result.winner.best(result.budget), result.check
    assert entry is not None
    best, winner = truth.best(budget), frozenset((result.winner.front, result.winner.end))
    (first, (most, right)), (mine, own) = next(iter(best.items())), best[winner]
    count, true = len(truth.labels), None
    if isinstance(entry.route, Cascade) or entry.route.is_anchor:
        true = truth.accuracy(entry.route)
    elif (hits := run_stitched(entry.route)) is not None:
        true = hits.mean().item()
        mine, own = max((mine, own), (true, hits), key=lambda each: each[0])
    error = (right.astype(float) - own).std().item() / count**0.5
    return {
        "budget": budget, "chosen": sorted(winner), "entry": str(entry.route), "best": sorted(first),
        "place": 1 + sum(each > mine for each, _ in best.values()), "pairs": len(best), "regret": 100 * (most - mine),
        "regret_error": 100 * error, "near": len(result.near),
        "regret_of_cheapest_near": 100 * (most - _cheapest_near(result, best)),
        "best_is_near": any({pair.front, pair.end} == first for pair in result.near),
        "best_accuracy": most, "median": float(np.median([each for each, _ in best.values()])),
        "predicted": entry.scores["accuracy"], "checked": None if check is None else check.accuracy,
        "checked_error": None if check is None else check.standard_error, "true": true,
        "true_error": None if true is None else (true * (1 - true) / count) ** 0.5, "images": count,
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


def run_scout(
    sources: Sequence[Path], dataset: str, budget: float, work: Path, images: int, eval_images: int
) -> tuple[ScoutResult, PairJudge]:
    """Scout for a budget of mean MACs, with the passes and races of other budgets in ``work``."""
    return judge_pairs(
        sources, dataset, Budget(mean_macs=budget), work, split="train", eval_split="test", images=images,
        eval_images=eval_images, head_images=1, image_size=None, order="given", new_head=False,
    )  # fmt: skip


def main(
    folder: Annotated[Path, typer.Argument(metavar="OUT")],
    dataset: str = "zalando-datasets/fashion_mnist",
    epochs: int = 2,
    train_images: int = 6000,
    budget: Annotated[list[float], typer.Option()] = [3e6],  # noqa: B006  typer copies it
    images: int = 2000,
    eval_images: int = 5000,
    few: int = 4,
    without: Annotated[list[str], typer.Option()] = [],  # noqa: B006
    quick: bool = False,
    out: Path | None = None,
) -> None:
    """Make the candidates, scout, and compare with images that scout did not use and with a search by hand."""
    names = [name for name in (*TIMM, *VIT) if name not in without]
    if quick:
        names, dataset, epochs, train_images = [*names[:3], *names[-2:]], str(DATA), 1, 1000
        images, eval_images, few = 200, 600, 2
    sources = make_anchors(folder / "anchors", dataset, epochs, train_images, names)
    truth, report, ratios = None, list[dict[str, Any]](), dict[str, float]()
    for limit in budget:
        result, judge = run_scout(sources, dataset, limit, folder / "work", images, eval_images)
        rows, labels = unseen(dataset, result.eval_images)
        truth = truth or Truth(result, logits_of(result.sources, rows, folder / f"unseen-{len(rows)}.npz"), labels)

        def run_stitched(route: Route, judge: PairJudge = judge, rows: Dataset = rows) -> np.ndarray:
            data = with_pixel_values(rows, judge.model.image_processor)
            images = batches(data, 250)
            return race_routes(judge.fit([route]), images, judge.model.device, error=0, keep=True).right[route]

        each = judge_choice(result, truth, run_stitched)
        each |= {"passes": result.passes, "seconds": dict(result.seconds), "left_out": dict(result.left_out)}
        console.print_json(json.dumps(each))
        report.append(each)
        ratios[f"{limit:g}: regret, points"] = each["regret"]
        ratios[f"{limit:g}: place over pairs"] = each["place"] / each["pairs"]
    hand = by_hand(result, list(result.sources)[:few], budget[-1]) if few > 1 else {}
    console.print_json(json.dumps(hand))
    with atomic_file(out or folder / "scouting.json") as temporary:
        temporary.write_text(json.dumps({"ratios": ratios, "budgets": report, "few": hand}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
