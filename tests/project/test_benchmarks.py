"""The arithmetic by which benchmarks judge; the benchmarks themselves are run by hand."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from restnet_hf import TrainArgs
from restnet_hf.demo.paths import DATA, END, FRONT


FOLDER = Path(__file__).parents[2] / "recipes" / "benchmarks"


def benchmark(name, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # it takes its own folder off
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def selectors(monkeypatch):
    return benchmark("selectors", monkeypatch)


@pytest.fixture
def accuracy(monkeypatch):
    return benchmark("accuracy", monkeypatch)


@pytest.fixture
def training(monkeypatch):
    return benchmark("training", monkeypatch)


def result(values):
    """Four routes in two halves of the range of costs; the dearer of each half is the better one by two points."""
    routes = {"a[:1] + b[1:]": [10e6, 0.70], "a[:2] + b[1:]": [19e6, 0.72], "a[:3] + b[1:]": [21e6, 0.80]}
    routes |= {"a[:4] + b[1:]": [30e6, 0.82]}
    named = {name: dict(zip(routes, each, strict=True)) for name, each in values.items()}
    anchors = {"a[:]": [40e6, 0.9], "b[:]": [5e6, 0.6]}
    return {"routes": routes, "anchors": anchors, "values": named, "seconds": dict.fromkeys(named, 1.0),
            "least_squares": dict.fromkeys(routes, 0.5), "images": 1000}  # fmt: skip


@pytest.mark.slow
def test_verdicts(selectors):
    found = selectors.judge(result({"right": [1, 2, 3, 4], "wrong": [4, 3, 2, 1], "half": [1, 2, 4, 3]}), buckets=2)
    assert found["right"]["spearman"] == pytest.approx(1) and found["wrong"]["spearman"] == pytest.approx(-1)
    assert [found[name]["recovered"] for name in ("right", "wrong", "half", "oracle")] == [1.0, 0.0, 0.5, 1.0]
    assert [found[name]["recovered by two"] for name in ("right", "wrong", "oracle")] == [1.0, 1.0, 1.0]
    assert found["random"]["recovered"] == pytest.approx(0.5, abs=0.05)
    assert found["random"]["spearman"] == pytest.approx(0, abs=0.05)
    # budgets from 5 to 40 million: 0.6 to 19, then 0.72 to 30, 0.82 to 40, where the larger anchor begins
    assert found["right"]["area"] == pytest.approx((14 * 0.6 + 11 * 0.72 + 10 * 0.82) / 35, abs=2e-3)
    assert found["oracle"]["area"] == pytest.approx(
        (5 * 0.6 + 9 * 0.70 + 2 * 0.72 + 9 * 0.80 + 10 * 0.82) / 35, abs=2e-3
    )
    assert found["oracle"]["area"] > found["right"]["area"] > found["wrong"]["area"] - 0.1


@pytest.mark.slow
def test_half_a_point_is_as_good(selectors):
    near = result({"other": [2, 1, 4, 3]})
    near["routes"]["a[:1] + b[1:]"][1] = 0.7151
    near["routes"]["a[:3] + b[1:]"][1] = 0.8149
    assert selectors.judge(near, buckets=2)["other"]["recovered"] == 0.5


def test_area(accuracy, selectors):
    anchors, routes = [[5e6, 0.6], [40e6, 0.9]], [[19e6, 0.72], [10e6, 0.7], [30e6, 0.65]]
    both = (5 * 0.6 + 9 * 0.7 + 21 * 0.72) / 35  # the most costly route is worse than a cheaper one
    assert accuracy.area([*routes, *anchors], 5e6, 40e6) == pytest.approx(both)
    assert accuracy.area(routes, 0, 40e6) == pytest.approx((9 * 0.7 + 21 * 0.72) / 30)  # from 10 million on
    assert accuracy.area([[5e6, 0.8]], 0, 40e6) == pytest.approx(0.8)
    assert accuracy.area([[45e6, 0.8], [50e6, 0.9]], 0, 40e6) == 0.8  # too dear, and no division by nothing
    rng = np.random.default_rng(0)
    for _ in range(20):  # as the sum over a thousand budgets
        points = np.c_[rng.uniform(1e6, 50e6, 6), rng.random(6)].tolist()
        expected = selectors.area([*map(tuple, points)], anchors)
        assert accuracy.area([*points, *anchors], 5e6, 40e6) == pytest.approx(expected, abs=5e-3)


def test_summary_over_seeds(accuracy):
    def run(low, high, seconds):
        return {"points": {"a": [10e6, low], "b": [20e6, high]}, "seconds": seconds}

    runs = {"two": {"0": run(0.5, 0.7, 9.0), "1": run(0.6, 0.9, 11.0)}, "one": {"0": run(0.3, 0.5, 10.0)}}
    found = accuracy.summary({"anchors": {"s[:]": [5e6, 0.4], "l[:]": [25e6, 0.95]}, "runs": runs})
    assert found["two"]["accuracy"]["a"] == pytest.approx([10e6, 0.55, np.std([0.5, 0.6], ddof=1)])
    assert found["two"]["seconds"] == pytest.approx([10, 2**0.5])
    areas = [(5 * 0.4 + 10 * 0.5 + 5 * 0.7) / 20, (5 * 0.4 + 10 * 0.6 + 5 * 0.9) / 20]
    assert found["two"]["area"] == pytest.approx([np.mean(areas), np.std(areas, ddof=1)])
    gaps = [(each - 0.4) / 0.55 for each in areas]
    assert found["two"]["gap closed"] == pytest.approx([np.mean(gaps), np.std(gaps, ddof=1)])
    alone = [(10 * 0.5 + 5 * 0.7) / 15, (10 * 0.6 + 5 * 0.9) / 15]
    assert found["two"]["area alone"] == pytest.approx([np.mean(alone), np.std(alone, ddof=1)])
    assert found["one"]["accuracy"] == {"a": [10e6, 0.3, None], "b": [20e6, 0.5, None]}
    assert found["one"]["beaten by an anchor"] == [0.5, None] and found["two"]["beaten by an anchor"][0] == 0
    worse = accuracy.summary({"anchors": {"s[:]": [5e6, 0.4], "l[:]": [25e6, 0.3]}, "runs": runs})
    assert worse["one"]["gap closed"] is None


def test_results_are_of_one_kind(accuracy, tmp_path):
    settings = {"seconds": 2.0, "front": "a"}
    anchors = {"s[:]": [5e6, 0.4], "l[:]": [25e6, 0.95]}
    out = tmp_path / "found.json"
    assert accuracy.read_known(out, settings) is None and accuracy.read_known(None, settings) is None
    result = {"settings": settings, "pair": "l to s", "anchors": anchors}
    result["runs"] = {"norm": {"0": {"points": {"a": [10e6, 0.5]}, "seconds": 2.0}}}
    accuracy.write(result, out)
    known = accuracy.read_known(out, settings)
    assert known["runs"] == result["runs"] and known["ratios"]["l to s, 2 s, norm: area alone"] == 0.5
    known["runs"]["lora"] = known["runs"]["norm"]
    accuracy.write(known, out)  # gone on from
    assert "l to s, 2 s, lora: gap closed" in json.loads(out.read_text())["ratios"]
    with pytest.raises(ValueError, match="other front, seconds"):
        accuracy.read_known(out, {"seconds": 60.0, "front": "b"})


@pytest.mark.slow
def test_a_run_is_what_the_package_does(accuracy, tmp_path):
    model, train_set, eval_set = accuracy.load(str(FRONT), str(END), str(DATA), 600, "b", 40)
    anchors = [model.route(text) for text in ("vit_fashion[:]", "resnet_fashion[:]")]
    routes = [model.route("resnet_fashion[:5] + vit_fashion[6:]"), model.route("vit_fashion[:2] + resnet_fashion[6:]")]
    pair = accuracy.Pair(model, train_set, eval_set, tmp_path, anchors, routes)
    weights = {name: anchor.fingerprint() for name, anchor in model.anchors.items()}
    points = {}
    for name in ("least squares", "stitch", "all weights (SN-Net)", "small anchor, norms and head"):
        points[name] = accuracy.run_method(pair, accuracy.METHODS[name], 0, 0.5)["points"]
        profile = {str(r.route): [r.costs["macs"], r.scores["accuracy"]] for r in model.profile(eval_set)}
        for route, (macs, at) in points[name].items():
            assert profile[route] == [macs, pytest.approx(at, abs=0.026)]  # activations are cached in half precision
    assert [*points["small anchor, norms and head"]] == ["tuned vit_fashion[:]"]
    assert weights == {name: anchor.fingerprint() for name, anchor in model.anchors.items()}  # no method changes them
    curve = accuracy.cascade(pair)
    costs = [macs for macs, _ in curve]
    small, large = (model.route_costs()(route)["macs"] for route in anchors)
    assert costs == sorted(costs) and small <= costs[0] and costs[-1] <= small + large


def test_methods_name_options_of_training(accuracy):
    for method in accuracy.METHODS.values():
        TrainArgs(**(method.options or {}))
    assert {*accuracy.DEFAULT} <= {*accuracy.METHODS}


def test_ten_epochs_out_of_steps(training):
    """1,000 images in batches of 20 are 50 steps; a cache that holds 80 images is filled 12.5 times."""
    taken = {"front + end": [1.0, 1.0, 1.0], "end alone": [0.5, 0.5, 0.5], "stitch-only": [1.1, 1.3, 1.2],
             "cached": [0.5, 0.6, 0.8], "naive": [2.2, 2.6, 2.4], "full fine-tuning": [3.0, 3.0, 3.0],
             "filling the cache": [4.0, 8.0, 4.0]}  # fmt: skip
    found = training.time_ratios("DeiT-S to DeiT-Ti", taken, batch=20)
    ratios = {name.removeprefix("DeiT-S to DeiT-Ti, "): ratio for name, ratio in found.items()}
    full = 10 * 50 * 3.0
    cached = [12.5 * 4 + 500 * 0.5, 12.5 * 8 + 500 * 0.6, 12.5 * 4 + 500 * 0.8]  # 300, 400, 450
    assert ratios == pytest.approx({
        "stitch-only over front + end: time": 1.2, "stitch-only over front + end: time (of minima)": 1.1,
        "cached over end alone: time": 1.2, "cached over end alone: time (of minima)": 1.0,
        "naive over stitch-only: time": 2.0, "naive over stitch-only: time (of minima)": 2.0,
        "full fine-tuning over stitch-only: time": 2.5, "full fine-tuning over stitch-only: time (of minima)": 3 / 1.1,
        "full fine-tuning over cached: time": 5.0, "full fine-tuning over cached: time (of minima)": 6.0,
        "10 epochs, full fine-tuning over cached: time": full / sorted(cached)[1],
        "10 epochs, full fine-tuning over cached: time (of minima)": full / min(cached),
        "10 epochs, full fine-tuning over stitch-only: time": 2.5,
        "10 epochs, full fine-tuning over stitch-only: time (of minima)": 3 / 1.1,
    })  # fmt: skip
    assert all(any(name.endswith(limit) for name in found) for limit in training.LIMITS)


@pytest.fixture
def streamed(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return benchmark("data", monkeypatch)


def test_amplitudes_fall_with_frequency(streamed):
    """As one over the frequency, which is what photographs have."""
    picture = streamed.noise(256, np.random.default_rng(0)).mean(-1)
    spectrum = np.abs(np.fft.fft2(picture - picture.mean()))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
    octaves = [spectrum[(frequency >= low) & (frequency < 2 * low)].mean() for low in (1 / 64, 1 / 32, 1 / 16, 1 / 8)]
    falls = [earlier / later for earlier, later in itertools.pairwise(octaves)]
    assert falls == pytest.approx([2, 2, 2], rel=0.15)


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "webdataset"])
def test_every_format_holds_the_same_pictures(streamed, kind, tmp_path):
    write, read = streamed.FORMATS[kind]
    write(tmp_path, streamed.jpegs(12, 16))
    model = streamed.build(32)
    rows = [*model.prepare_data(read(tmp_path))]
    images = streamed.decode_by_hand([data for data, _ in streamed.jpegs(12, 16)], model.image_processor)
    found = {(int(row["labels"]), row["pixel_values"].numpy().tobytes()) for row in rows}
    assert len(rows) == 12 and found == {(i % 10, image.numpy().tobytes()) for i, image in enumerate(images)}
