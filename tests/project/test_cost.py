"""The formulas of recipes/cost.py against sums by hand, its counts against the package's, and the guide's tables."""

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from restnet_hf import StitchedModelForImageClassification


ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("cost", ROOT / "recipes" / "cost.py")
cost = sys.modules["cost"] = importlib.util.module_from_spec(SPEC)  # dataclasses look for it there
SPEC.loader.exec_module(cost)

MEASURED = cost.Measured("core", 100.0, 1e9, 2e9, 1e9, 1e6, 2e6)
GPU = cost.Accelerator("gpu", 1e12, 1e11, 1e9, 8, 10)
SETTING = cost.Setting(MEASURED, GPU, images=1000, epochs=2, price=2.0, utilisation=0.5, bandwidth=0.25)
# two cuts in front and one at the end; activations of 4 and 8 channels, 3 of the end, on 9 positions
COUNTED = cost.Counted(([10, 20, 30], [5, 7]), ([1, 2, 3], [4, 6]), ([4, 8], [3]), ([36, 72], [27]))
ROUTES = [(1, 1), (2, 1)]


def test_seconds():
    work = cost.Work(decoded=1e5, flops=1e13, traffic=1e9, flops64=1e12, written=1e6, read=4e6)
    one = cost.seconds(work, 1, SETTING)
    assert one == {"decode": 100, "products": 20, "GPU memory": 0, "float64": 20, "disk": 3, "solve": 0}
    assert cost.elapsed(one) == 100 and cost.bound(one) == "decode"
    many = cost.seconds(dataclasses.replace(work, decoded=0), 16, SETTING)  # two nodes, with a disk each
    assert many == {"decode": 0, "products": 1.25, "GPU memory": 0, "float64": 1.25, "disk": 1.5, "solve": 0}
    assert cost.elapsed(many) == 2.5 and cost.bound(many) in ("products", "float64")
    wide = cost.seconds(cost.Work(flops=1e11, traffic=1e9, solved32=2e11, solved64=1e11), 2, SETTING)
    assert wide["products"] == 0 and wide["GPU memory"] == 2
    assert wide["solve"] == 10 + 2  # on ten cores, and on one GPU: one job is not divided
    jobs = cost.Work(solved32=2e11, solved64=1e11, jobs=3)
    assert cost.seconds(jobs, 2, SETTING)["solve"] == 12 * 2 / 3  # one process has two of three
    assert cost.elapsed(wide) == 14 and cost.bound(wide) == "solve"
    assert cost.core_seconds(work, MEASURED) == 1000 + 10000 + 1000


def test_work():
    fit = cost.fit_work(COUNTED, ROUTES, 1000)  # the front to its second cut, the end to its first
    assert (fit.decoded, fit.flops, fit.traffic) == (1000, 2 * 35 * 1000, 4 * 7 * 1000)
    assert fit.flops64 == 2 * 9 * (4 * 7 + 8 * 11) * 1000
    assert fit.solved64 == pytest.approx(7 * (4**3 / 3 + 2 * 4**2 * 3 + 8**3 / 3 + 2 * 8**2 * 3))
    cache = cost.cache_work(COUNTED, ROUTES, 1000)
    assert cache.written == (2 * (36 + 72) + 4 * 1000) * 1000 and cache.flops == 2 * 60 * 1000
    train = cost.train_work(COUNTED, ROUTES, 1000)
    assert train.read == cache.written and train.decoded == 0
    assert train.flops == 1000 * sum(2 * (2 * 7 + 3 * inputs * 27) for inputs in (4, 8))
    assert train.traffic == 4 * 1000 * 3 * 2 * (6 + 27 + 3)
    whole = cost.uncached_work(COUNTED, ROUTES, 1000)
    assert (whole.decoded, whole.read) == (1000, 0) and whole.flops == train.flops + cache.flops
    assert cost.times(train, 3).flops == 3 * train.flops


def test_work_of_a_selection():
    """Each image runs once through both; the tested ones again to each cut, and from each on with each stitch."""
    work = cost.select_work(COUNTED, ROUTES)
    assert work.decoded == 512
    assert work.flops == 2 * (512 * (60 + 12) + 256 * 60 + 256 * 2 * 7)
    rows = 1024
    assert work.solved32 == pytest.approx(
        sum(2 * rows * c**2 + c**3 / 3 + 2 * c**2 * 3 + 2 * rows * c * 3 for c in (4, 8))
    )


@pytest.mark.parametrize(("value", "text"), [(0.0234, "0.023 s"), (59, "59 s"), (3599, "1 h"), (7.3e4, "20 h")])
def test_durations(value, text):
    assert cost.duration(value) == text


def test_the_guide_has_what_the_script_prints(tmp_path):
    done = CliRunner().invoke(app(), ["--out", str(tmp_path / "cost.json")])
    assert done.exit_code == 0, done.output
    guide = (ROOT / "recipes" / "guides" / "cost.md").read_text().splitlines()
    printed = [line for line in done.output.splitlines() if line]
    assert len(printed) == 28 and [line for line in printed if line not in guide] == []
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert len(rows) == 2 * 5 * 3 and all(row["dollars"] > 0 for row in rows)
    dear = CliRunner().invoke(app(), ["--price", "6"]).output.splitlines()
    assert next(line for line in dear if "| fit |" in line).split(" | ")[4] == "0.44"  # twice as dear


@pytest.mark.parametrize("options", [["--images", "0"], ["--utilisation", "1.5"], ["--disk", "0"]])
def test_impossible_options(options):
    done = CliRunner().invoke(app(), options)
    assert done.exit_code == 2 and "above 0" in done.output


def app():
    made = cost.typer.Typer()
    made.command()(cost.main)
    return made


def test_measurements(tmp_path):
    data = cost.picture_bytes()
    assert Image.open(io.BytesIO(data)).size == (500, 375) and 1e5 < len(data) < 1.2e5  # of ImageNet's mean
    assert cost.measure_decode(2) > 1 and cost.measure_product(torch.float64, 64) > 1e6
    written, read = cost.measure_disk(tmp_path, 2**25, 1)
    assert min(written, read) > 1e6 and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("pair", cost.PAIRS)
def test_counts(pair):
    """Of timm's networks; the routes are those that are chosen by position."""
    assert dataclasses.asdict(cost.count_pair(pair)) == dataclasses.asdict(cost.COUNTED[pair])
    anchors = cost.anchors_of(pair)
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    chosen = model.select_stitches(torch.zeros(2, 3, 224, 224), "position", max_routes=8)
    assert sorted((r.segments[0].stop, r.segments[1].start) for r in chosen) == sorted(cost.ROUTES[pair])
    macs = model.profile(routes=[f"{anchor.name}[:]" for anchor in anchors]).routes
    assert [row.costs["macs"] for row in macs] == [sum(each) for each in cost.COUNTED[pair].macs]
