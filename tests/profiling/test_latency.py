"""Latency tables add up to what whole routes take; the clocks count work, so a busy machine changes nothing."""

import copy
import dataclasses
import itertools
import json
import logging
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, OneBlock, Plain, make_anchor, spread
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from restnet_hf import Anchor, StitchedModelForImageClassification
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.demo import load_demo
from restnet_hf.profiling import device, timing
from restnet_hf.profiling.device import device_facts, device_name, joules
from restnet_hf.profiling.latency import LatencyTable, Timing
from restnet_hf.profiling.macs import MacsTable, count_macs
from restnet_hf.profiling.timing import check_latency, joules_per_image, measure_latency
from restnet_hf.routes.route import Route, Segment, one_cut_routes
from restnet_hf.runtime import processor
from restnet_hf.steps import Step
from restnet_hf.stitches.tuning import TunedConfig


def both_ways(model):
    """Walks of all anchors alone and of all routes of one stitch between two, or within one."""
    depths = {name: anchor.depth for name, anchor in model.anchors.items()}
    for front, end in itertools.product(depths, repeat=2):
        for route in one_cut_routes(front, depths[front], end, depths[end]):
            model.add_stitch(route)
    return [(route, model.steps(route)) for route in model.all_routes]


def in_macs(walks, **options):
    """A table of walks whose seconds are twice their multiply-accumulates."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        return measure_latency(walks, repeats=5, clock=counter.get_total_flops, **options)


@pytest.mark.parametrize(("front", "end"), [("resnet", "vit"), ("swin_nhwc", "registers"), ("tnt", "plain")])
def test_any_route_adds_up(front, end):
    """By a clock of operations a route takes its MACs; those of three segments were not there when it measured."""
    anchors = make_anchor(front), make_anchor(end, seed=1)
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    walks = both_ways(model)
    table, macs = in_macs(walks), MacsTable()
    last = anchors[0].depth
    more = [f"{front}[:1] + {end}[1:2] + {front}[{last}:]", f"{front}[:1] + {front}[{last}:]"]
    more += [f"{end}[:1] + {end}[1:2] + {front}[1:{last}] + {end}[2:]", f"{front}[:{last}] + {front}[1:]"]
    for _, steps in walks + [(text, model.steps(text)) for text in more]:
        assert table.latency_ms(steps) == 2e3 * macs.macs(steps)
    assert table.depths == {front: last, end: anchors[1].depth} and table.spread == 0


class Clock:
    """Stands still but for what modules add to it, in milliseconds."""

    def __init__(self):
        self.now, self.speed = 0.0, 1.0

    def add(self, ms):
        self.now += ms * self.speed

    def __call__(self):
        return self.now / 1e3


class Slow(Plain):
    """Takes 64 ms outside its layers, 1, 2, 4 ... in each of them, and twice that for maps in another order."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        for index, layer in enumerate([*self.features, self.classifier]):
            layer.forward = partial(self.tick, index, layer.forward)

    def tick(self, index, forward, x):
        self.clock.add(2**index * (1 if x.is_contiguous() else 2))
        return forward(x)

    def forward(self, x):
        self.clock.add(64)
        return super().forward(x)


class Stitch(nn.Module):
    """Makes a map of the channels that are wanted, in any order of axes; takes 10 ms."""

    def __init__(self, clock, target, order):
        super().__init__()
        self.clock, self.target, self.order = clock, target.shape(1), order

    def forward(self, x):
        self.clock.add(10)
        y = x.mean() * torch.ones(len(x), *self.target[1:])
        return y.contiguous(memory_format=self.order)


def slow_pair(order=torch.contiguous_format):
    """A clock, and a model of two slow networks with stitches both ways; those to ``b`` deliver in that order."""
    clock = Clock()
    anchors = [Anchor(spread(Slow(clock)), name, Preprocessing((SIZE, SIZE))) for name in "ab"]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    both_ways(model)
    for route in model.routes:
        [point] = route.stitch_points
        given = order if point.target == "b" else torch.contiguous_format
        target = model.anchors[point.target].layout(point.target_cut)
        model.stitches[point.name] = Stitch(clock, target, given)
    return clock, model


def layers(model, segment):
    """Numbers of the layers that a segment runs, from the names of its cuts (features.0, .2 and .4; 6 is last)."""
    anchor = model.anchors[segment.anchor]
    ends = [
        int(c.name.rpartition(".")[2]) if (c := anchor.cut(cut)) else -1 for cut in (segment.start, segment.stop or 0)
    ]
    return range(ends[0] + 1, 7 if segment.stop is None else ends[1] + 1)


ROUTES = ["a[:]", "b[:]", "a[:2] + b[2:]", "b[:1] + a[3:]", "a[:1] + b[1:3] + a[3:]", "a[:1] + a[3:]", "b[:3] + b[1:]"]


def test_by_hand():
    """Each segment pays for entering it, whatever comes before it; checks run the whole routes."""
    clock, model = slow_pair()
    walks = [(route, model.steps(route)) for route in (*model.all_routes, *map(model.route, ROUTES))]
    table = measure_latency(walks, repeats=5, check=walks, clock=clock)
    for text in ROUTES:
        route = Route.parse(text)
        ms = sum(64 + sum(2**index for index in layers(model, segment)) for segment in route.segments)
        ms += 10 * len(route.stitch_points)
        assert table.latency_ms(model.steps(route)) == pytest.approx(ms)
        assert table.checks[text].measured.ms == pytest.approx(ms) and table.checks[text].error == pytest.approx(0)
    assert table.facts["rounds"] == 5 and table.orders == {}


def test_order_in_memory():
    """Where a stitch delivers channels last, all of the end takes what it takes for that."""
    clock, model = slow_pair(torch.channels_last)
    walks = [(route, model.steps(route)) for route in model.all_routes]
    table = measure_latency(walks, repeats=5, check=walks, clock=clock)
    assert all(check.error == pytest.approx(0) for check in table.checks.values())
    steps = model.steps("a[:2] + b[2:]")
    assert table.latency_ms(steps) == pytest.approx(128 + (1 + 2 + 4) + 10 + 2 * (8 + 16 + 32) + 64)
    assert set(table.orders.values()) == {"231"}
    assert all(name.rpartition("__")[2].startswith("b_") for name in table.orders)


def test_a_device_that_became_slower():
    clock, model = slow_pair()
    walks = [(route, model.steps(route)) for route in model.all_routes[:4]]
    table = measure_latency(walks, repeats=5, clock=clock)
    clock.speed = 1.25
    found = check_latency(table, walks, repeats=5, clock=clock)
    assert list(found) == [route for route, _ in walks]
    assert all(check.error == pytest.approx(-0.2) and check.measured.spread_ms < 1e-9 for check in found.values())


def alone(network):
    """The walk of an anchor alone."""
    anchor = Anchor(network, "a", Preprocessing((SIZE, SIZE)))
    return [(Route.alone("a"), [Step("a[:]", anchor, (1, 3, SIZE, SIZE), Segment("a"))])]


class Paced(nn.Module):
    """Takes the milliseconds of a list, one after the other; too small to be cut."""

    def __init__(self, clock, pace):
        super().__init__()
        self.inner, self.clock, self.pace = OneBlock(), clock, itertools.cycle(pace)

    def forward(self, x):
        self.clock.add(next(self.pace))
        return self.inner(x)


def test_median_and_spread(caplog):
    clock, pace = Clock(), [1.0, 1.0, 5.0, 5.2, 5.1, 5.9, 5.4]  # the first two are not counted
    table = measure_latency(alone(Paced(clock, pace)), repeats=5, clock=clock)
    low, middle, high = np.percentile(pace[2:], [25, 50, 75])
    assert table.entries["a[:]"].ms == pytest.approx(middle)
    assert table.entries["a[:]"].spread_ms == pytest.approx(high - low)
    assert table.spread == pytest.approx((high - low) / middle) and table.depths == {"a": 0}
    assert not caplog.records


def test_uncertain_and_hopeless(caplog):
    clock = Clock()
    with caplog.at_level(logging.WARNING):
        measure_latency(alone(Paced(clock, [1.0, 1.5])), repeats=8, clock=clock)
    assert "differ by 40%" in caplog.text and "close other programs" in caplog.text
    with pytest.raises(
        RuntimeError, match="no latency can be given: half of the runs .* differ by 160%.*raise repeats"
    ):
        measure_latency(alone(Paced(clock, [1.0, 9.0])), repeats=8, clock=clock)


def test_time_is_limited():
    clock = Clock()
    table = measure_latency(alone(Paced(clock, [1.0])), repeats=500, seconds=0.0, clock=clock)
    assert table.facts["rounds"] == 5


def test_what_is_tuned(pair):
    """A low-rank update is made anew in each run, which takes its products."""
    key = "lora-vit"
    pair.add_tuned(key, TunedConfig("lora", "vit", start=2, r=4))
    route = pair.routes[0]
    table = in_macs([(route, pair.steps(route))])
    whole = count_macs(lambda x: pair(x).logits, torch.zeros(1, 3, SIZE, SIZE))
    assert table.latency_ms(pair.steps(route)) == 2e3 * whole > 2e3 * MacsTable().macs(pair.steps(route))


def test_new_head_and_other_images():
    anchors = [make_anchor("resnet"), make_anchor("vit", seed=1)]
    anchors[1].preprocessing = Preprocessing((SIZE, SIZE), mean=(0.1, 0.2, 0.3))
    model = StitchedModelForImageClassification.from_anchors(*anchors, num_labels=3, order="given")
    model.add_stitch("resnet[:3] + vit[2:]")
    walks = [(route, model.steps(route)) for route in model.all_routes]
    table = in_macs(walks, batch_size=2)
    assert {"images for vit", "head of vit", "head of resnet"} <= set(table.entries) and table.batch_size == 2
    assert table.latency_ms(walks[2][1]) == 4e3 * MacsTable().macs(walks[2][1])


def test_real_time(pair, monkeypatch):
    """The processor's own time, which other programs add little to."""
    monkeypatch.setattr(timing, "MAX_SPREAD", float("inf"))  # other tests run beside this one
    walks = [(route, pair.steps(route)) for route in pair.all_routes]
    table = measure_latency(walks, repeats=15, check=walks, clock=time.process_time)
    assert all(0.5 < check.predicted_ms / check.measured.ms < 2 for check in table.checks.values())
    assert "torch" in table.runtime and "float32, batch 1" in table.runtime


@pytest.fixture
def table():
    clock, model = slow_pair(torch.channels_last)
    walks = [(route, model.steps(route)) for route in model.all_routes]
    return measure_latency(walks, repeats=5, check=walks[:2], clock=clock)


def test_on_disk(table, tmp_path):
    path = tmp_path / "new" / "latency.json"
    table.save(path)
    assert LatencyTable.load(path) == table
    others = [dataclasses.replace(table, runtime="onnx"), dataclasses.replace(table, device="a phone")]
    for other in others:
        other.save(path)
    assert [LatencyTable.load(path, each.device, each.runtime) for each in (table, *others)] == [table, *others]
    assert LatencyTable.load(path, "a phone") == others[1]
    with pytest.raises(ValueError, match=r"has no table of '.*; ', only of \[.*; onnx.*a phone; .*\]; measure one"):
        LatencyTable.load(path)  # two runtimes
    with pytest.raises(ValueError, match="has no table of 'a watch; '"):
        LatencyTable.load(path, "a watch")
    assert [file.name for file in path.parent.iterdir()] == ["latency.json"]


def broken(table, key, value):
    return {table.device: {table.runtime: {"batch_size": 1, "depths": {}, "orders": {}, "checks": {}, "facts": {},
                                           "entries": {}} | {key: value}}}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [("entries", {"a[:]": [1.0, -1.0]}), ("entries", {"a[:]": ["1", 2]}), ("entries", {"a[:]": [float("inf"), 0]}),
     ("entries", [1]), ("depths", {"a": None}), ("checks", {"a[:]": [1, 2]}), ("batch_size", True)],
)  # fmt: skip
def test_files_that_are_no_tables(table, tmp_path, key, value):
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(broken(table, key, value)))
    with pytest.raises(ValueError, match="not a latency table"):
        LatencyTable.load(path)


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', "{", "[" * 100_000])
def test_other_files_stay(table, tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="latency.json"):
        table.save(path)
    assert path.read_text() == text


def test_pieces_that_were_not_measured(pair):
    table = in_macs([(route, pair.steps(route)) for route in pair.all_routes])
    pair.add_stitch("resnet[:2] + vit[2:]")
    with pytest.raises(ValueError, match="has no time of 'resnet_2__vit_2'; measure it again with a route that uses"):
        table.latency_ms(pair.steps("resnet[:2] + vit[2:]"))


def test_arguments(pair):
    walks = [(route, pair.steps(route)) for route in pair.all_routes[:1]]
    for options in ({"repeats": 4}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 5, 1 and 1"):
            measure_latency(walks, **options)
    with pytest.raises(ValueError, match="0 routes"):
        measure_latency([])
    with pytest.raises(ValueError, match="repeats=1 must be at least 5"):
        check_latency(in_macs(walks), walks, repeats=1)


def test_latencies_join_a_profile_that_came_with_an_adapter():
    """Scores, MACs and shares stay; times of routes and cascades are those that a profile with the table has."""
    model = load_demo()
    before = model.profiled
    table = measure_latency([(r, model.steps(r)) for r in model.all_routes], clock=partial(next, itertools.count()))
    after = model.record_latency(table)
    assert after is model.profiled and [row.scores for row in after.rows] == [row.scores for row in before.rows]
    for row in after.routes:
        assert row.costs["latency_ms"] == pytest.approx(table.latency_ms(model.steps(row.route)))
        assert row.costs["mean_latency_ms"] == row.costs["latency_ms"]
    for row, old in zip(after.cascades, before.cascades, strict=True):
        assert row.costs["macs"] == old.costs["macs"] and row.shares == old.shares
        stages = row.stage_costs["latency_ms"]
        assert row.costs["latency_ms"] == pytest.approx(sum(stages))
        mean = sum(share * ms for share, ms in zip(row.shares, stages, strict=True))
        assert row.costs["mean_latency_ms"] == pytest.approx(mean) and mean < row.costs["latency_ms"]
    chosen = model.set_budget(mean_latency_ms=max(row.costs["mean_latency_ms"] for row in after.rows))
    assert model.profiled[chosen].scores["accuracy"] == max(row.scores["accuracy"] for row in after.rows)
    assert after.metadata["latency"]["device"] == table.device
    assert after.metadata["dataset"] == before.metadata["dataset"]


def test_no_profile_to_join(pair):
    walks = [(route, pair.steps(route)) for route in pair.all_routes]
    with pytest.raises(ValueError, match="no profile to add latencies to"):
        pair.record_latency(measure_latency(walks, clock=partial(next, itertools.count())))


def test_a_warm_device(pair):
    """A run of seconds gives a table whose routes are as much slower as the end was."""
    walks = [(route, pair.steps(route)) for route in pair.all_routes]
    table = measure_latency(walks, clock=partial(next, itertools.count()))
    with pytest.raises(ValueError, match="no sustained latency"):
        _ = table.sustained
    rows = []
    result = pair.measure_sustained(minutes=0.005, report=rows.append)
    assert result.route == str(pair.active_route) and rows == [*result.periods]
    periods = [{"at_s": 60.0 * k, "latency_ms": 2.0 if k < 5 else 3.0} for k in range(1, 11)]
    warm = dataclasses.replace(table, facts={"sustained": {"route": "vit[:]", "periods": periods}}).sustained
    steps = pair.steps(pair.active_route)
    assert warm.latency_ms(steps) == pytest.approx(1.5 * table.latency_ms(steps))
    assert pair.profile(latency=warm).routes[0].costs["latency_ms"] > 0
    assert "sustained" not in warm.facts, "else what is published would be slowed down twice"


def test_device(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "CPUFREQ", tmp_path / "freq")
    assert device_facts()["clock_mhz"] is None
    (tmp_path / "cpuinfo").write_text(
        "model name\t: A Chip\ncpu MHz\t\t: 1200.5\n\nmodel name\t: A Chip\ncpu MHz : 900\n"
    )
    assert device_name(torch.device("cpu")).startswith("A Chip, ") and device_facts()["clock_mhz"] == 1200.5
    (tmp_path / "freq").write_text("1800000\n")
    assert device_facts()["clock_mhz"] == 1800
    json.dumps(device_facts())


def counters(folder, **domains):
    """Packages of a processor as Linux shows them: name, microjoules, and where the counter begins again."""
    for name, energy in domains.items():
        domain = folder / f"intel-rapl:{len(list(folder.iterdir()))}"
        domain.mkdir()
        for file, text in (("name", name.replace("_", "-")), ("energy_uj", energy), ("max_energy_range_uj", 1000)):
            (domain / file).write_text(f"{text}\n")
    return sorted(folder.iterdir())


def test_energy(tmp_path):
    """70 microjoules a run on the first package, 30 on the second, whose counter begins again; the rest is in them."""
    domains = counters(tmp_path, package_0=100, package_1=995, psys=0, dram=0)

    def run():
        for domain, used in zip(domains, (70, 30, 500, 10), strict=True):
            counter = domain / "energy_uj"
            counter.write_text(str((int(counter.read_text()) + used) % 1000))

    assert joules(run, 0.0, tmp_path) == pytest.approx(100e-6)


def test_energy_of_a_route(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "POWERCAP", tmp_path)
    steps = pair.steps(pair.active_route)
    assert joules_per_image(steps) is None
    [domain] = counters(tmp_path, package_0=0)
    spent = pair.stitches[pair.active_route.stitch_points[0].name].register_forward_hook(
        lambda *_: (domain / "energy_uj").write_text(str(int((domain / "energy_uj").read_text()) + 60)) and None
    )
    assert joules_per_image(steps, batch_size=4, seconds=0.0) == pytest.approx(15e-6)
    spent.remove()
    elsewhere = copy.deepcopy(pair).to("meta")
    assert joules_per_image(elsewhere.steps(elsewhere.active_route)) is None  # the counters are the processor's
    (domain / "energy_uj").unlink()
    (domain / "energy_uj").mkdir()  # cannot be read
    assert joules_per_image(steps) is None


def test_timing_against_numpy():
    samples = np.random.default_rng(0).exponential(size=41).tolist()
    low, middle, high = np.percentile(samples, [25, 50, 75])
    assert dataclasses.astuple(Timing.of(samples)) == pytest.approx((middle, high - low))
    assert CLASSES == 5
