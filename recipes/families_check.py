# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Compare every route of SN-Net's and SN-Netv2's families with the parameters and MACs that their authors published.

    python recipes/families_check.py deit snnet_deit.csv      # a minute on a CPU; the weights are random
    python recipes/families_check.py swin snnet_swin.csv
    python recipes/families_check.py deit3 snnetv2_deit3_s_l.csv

What is counted differs in places that the authors' numbers show, so each table comes twice, as we count and as they
do. They add five operations for each element that a LayerNorm gives. Of stitched networks they leave out class tokens
and position embeddings (DeiT) and the front's patch merging (Swin), though these run.

The tables are the authors' lists of results with a header. Columns: ``route`` (``anchor Ti``, ``Ti>S (0, 1)``,
``Ti>S stage3 (0, 1)``) or ``type`` and ``cfg`` (``SLS``, ``((0, 2), (3, 2))``), with the last block of the front and
the first of the end, counted from 0; ``gmacs``; and ``params_m`` where it is published.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import typer
from torch import nn

from restnet_hf import Anchor, Preprocessing, Route, Segment, StitchedModelForImageClassification
from restnet_hf.routes.blocks import Blocks
from restnet_hf.routes.families import family


ALLOWED = 0.005
SHOWN = 5
SIZE = Preprocessing((224, 224))
Counts = dict[str, int]


@dataclass(frozen=True)
class Published:
    """How a table's routes are enumerated.

    Args:
        networks: timm's names, from the cheapest to the most costly, by the table's names.
        granularity: of the search for cuts; the ends of blocks and the embedding must be among them.
        stages: paths of the lists of blocks; stages that are not joined are left out.
        entry: path of the embedding, where routes enter before the first block.
        options: options of `family` by name.
    """

    networks: Mapping[str, str]
    granularity: str
    stages: tuple[str, ...]
    entry: str | None
    options: Mapping[str, Any]


PUBLISHED = {
    "deit": Published(
        {"Ti": "deit_tiny_patch16_224", "S": "deit_small_patch16_224", "B": "deit_base_patch16_224"},
        "module",
        ("blocks",),
        "patch_embed",
        {},
    ),
    "swin": Published(
        {
            "Ti": "swin_tiny_patch4_window7_224",
            "S": "swin_small_patch4_window7_224",
            "B": "swin_base_patch4_window7_224",
        },
        "block",
        ("layers.0.blocks", "layers.1.blocks", "layers.2.blocks"),
        None,
        {"overlap": False},
    ),
    "deit3": Published(
        {"S": "deit3_small_patch16_224", "L": "deit3_large_patch16_224"},
        "block",
        ("blocks",),
        None,
        {"kind": "two_way", "directions": "both"},
    ),
}


@dataclass(frozen=True)
class Compared:
    """A route's number in a column of a table, ours, and ours by what the authors count."""

    route: Route
    column: str
    published: float
    ours: float
    as_they_count: float


def blocks_of(anchor: Anchor, published: Published) -> Blocks:
    """Where its blocks end, by their paths."""
    stages = []
    for path in published.stages:
        count = sum(1 for _ in anchor.model.get_submodule(path).children())
        stages.append(tuple(anchor.cut_index(f"{path}.{index}") for index in range(count)))
    return Blocks(anchor.name, tuple(stages), anchor.cut_index(published.entry) if published.entry else 0)


def route_of(row: Mapping[str, str], blocks: Mapping[str, Blocks]) -> Route:
    """A row's route."""
    text = row["route"] if "route" in row else f"{'>'.join(row['type'])} {row['cfg']}"
    names, stage = re.findall(r"Ti|[SBL](?!\d)", text.replace("anchor ", "")), re.search(r"stage(\d)", text)
    numbers = [int(number) for number in re.findall(r"\d+", re.sub(r"stage\d|L\d+", "", text))]
    at, start, segments = int(stage[1]) - 1 if stage else 0, 0, []
    for index, name in enumerate(names[:-1]):
        last, first = numbers[2 * index : 2 * index + 2]
        segments.append(Segment(name, start, blocks[name].stages[at][last]))
        start = blocks[names[index + 1]].cut_before(at, first)
    return Route((*segments, Segment(names[-1], start)))


def norms(anchor: Anchor) -> dict[str, int]:
    """Elements that each LayerNorm gives for one image, by the name of its weight."""
    found: dict[str, int] = {}

    def keep(name: str, module: nn.Module, args: object, output: torch.Tensor) -> None:
        found[f"{name}.weight"] = output.numel()

    layers = [(name, layer) for name, layer in anchor.model.named_modules() if isinstance(layer, nn.LayerNorm)]
    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers]
    with torch.no_grad():
        anchor.model(torch.zeros(1, 3, *anchor.preprocessing.image_size))
    for handle in handles:
        handle.remove()
    return found


def as_they_count(route: Route, anchors: Mapping[str, Anchor], elements: Mapping[str, Mapping[str, int]]) -> Counts:
    """What the authors count and we do not, which may be negative."""
    macs = params = 0
    for segment in route.segments:
        own = anchors[segment.anchor].own_parameters(segment.start, segment.stop)
        macs += 5 * sum(count for name, count in elements[segment.anchor].items() if name in own)
        for name, parameter in own.items() if len(route.segments) > 1 else ():
            embedding, merging = "." not in name, ".downsample." in name and not segment.start
            params -= parameter.numel() if embedding or merging else 0
    return {"macs": macs, "params": params}


def compared(rows: list[dict[str, str]], published: Published) -> Iterator[Compared]:
    """Every route and column of a table."""
    networks = published.networks.items()
    anchors = {
        name: Anchor(timm.create_model(network).eval(), name, SIZE, granularity=published.granularity)
        for name, network in networks
    }
    blocks = {name: blocks_of(anchor, published) for name, anchor in anchors.items()}
    by_route = {route_of(row, blocks): row for row in rows}
    routes = {replace(route, via=()) for route in family(blocks.values(), **published.options)}
    same = "the same" if routes == by_route.keys() else "OTHER"
    print(f"{len(rows)} rows, {len(routes)} routes enumerated, {same} ones")
    costs = StitchedModelForImageClassification.from_anchors(*anchors.values(), order="given").route_costs()
    elements = {name: norms(anchor) for name, anchor in anchors.items()}
    for route, row in by_route.items():
        found, more = costs(route), as_they_count(route, anchors, elements)
        for column, cost, unit in (("gmacs", "macs", 1e9), ("params_m", "params", 1e6)):
            if column in row:
                ours = found[cost] / unit
                yield Compared(route, column, float(row[column]), ours, ours + more[cost] / unit)


def main(name: str, table: Path) -> None:
    """Print how far the routes of NAME (deit, swin or deit3) are from those of TABLE."""
    with table.open() as file:
        found = list(compared(list(csv.DictReader(file)), PUBLISHED[name]))
    for column in sorted({row.column for row in found}):
        for label, counted in (("as we count", "ours"), ("as they count", "as_they_count")):
            pairs = [(getattr(row, counted), row) for row in found if row.column == column]
            pairs.sort(key=lambda pair: -abs(pair[0] / pair[1].published - 1))
            within = sum(abs(ours / row.published - 1) <= ALLOWED for ours, row in pairs)
            print(f"\n{column}, {label}: {within} of {len(pairs)} within {ALLOWED:.1%}\n")
            print("| route | published | ours | difference |\n|---|---:|---:|---:|")
            for ours, row in pairs[:SHOWN]:
                print(f"| `{row.route}` | {row.published:.2f} | {ours:.3f} | {ours / row.published - 1:+.2%} |")


if __name__ == "__main__":
    typer.run(main)
