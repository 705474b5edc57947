"""Exported routes measured on the device: latencies into the folder, minutes with throttling, memory of a process."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIZE
from exports import ABSENT
from typer.testing import CliRunner
from versions import needs_export

from restnet_hf import DeviceTable, ExportedModel, Profile, export_routes, push_latency
from restnet_hf.cli import app
from restnet_hf.runtime import processor
from restnet_hf.runtime.measuring import time_parts
from restnet_hf.runtime.runners import installed_version
from restnet_hf.runtime.sustained import Period, SustainedLatency, measure_sustained


ROUTES = ["vit[:]", "resnet[:3] + vit[2:]"]
CASCADE = "vit[:] >0.5 resnet[:3] + vit[2:]"


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """A folder with two routes and a cascade of both."""
    from conftest import make_anchor

    from restnet_hf import StitchedModelForImageClassification

    anchors = make_anchor("resnet"), make_anchor("vit", seed=1)
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given", dtype="float32")
    model.add_stitch(ROUTES[1])
    model.fit_stitches(torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    out = tmp_path_factory.mktemp("measured") / "out"
    export_routes(model, out, ROUTES, cascades=CASCADE, batch_size=1)
    return out


def test_times_are_medians_for_an_image():
    """A clock that goes on by itself: the first takes 3 ms for two images, and once 100; the second 5 ms for one."""
    now = [0.0]
    slow = iter([0.003] * 4 + [0.1] + [0.003] * 100)
    runs = {
        "a": lambda x: now.__setitem__(0, now[0] + next(slow)),
        "b": lambda x: now.__setitem__(0, now[0] + 0.005),
    }
    found = time_parts(runs, {"a": np.zeros((2, 1)), "b": np.zeros((1, 1))}, clock=lambda: now[0])
    assert found == pytest.approx({"a": 1.5, "b": 5.0})
    with pytest.raises(ValueError, match="repeats=4 must be from 5 to 200"):
        time_parts(runs, {}, repeats=4)


@needs_export
def test_latencies_of_this_device(folder):
    """Measured anew in place of those at the export; scores and files stay, and the next process has them."""
    path = folder / "profile.json"
    before = Profile.load(path)
    shipped = json.loads(path.read_text())
    for row in (*shipped["routes"], *shipped["cascades"]):
        row["costs"]["latency_ms"] = 1e6
    path.write_text(json.dumps(shipped))
    model = ExportedModel(folder, threads=1)
    with pytest.raises(ValueError, match="no route or cascade|no route"):
        model.set_budget(latency_ms=1e5)
    profile = model.measure_latency(seconds=1, repeats=5, save=True)
    assert profile is model.profiled and model.set_budget(latency_ms=1e5) in model.routes
    again = ExportedModel(folder)
    assert again.profiled.to_dict() == profile.to_dict() and again.check()
    assert again.profiled.metadata["device"] == processor.processor_name() and profile.metadata["threads"] == 1
    alone, stitched = (row.costs["latency_ms"] for row in profile.routes)
    (row,) = profile.cascades
    assert 0 < alone < 1e3 and row.stage_costs["latency_ms"][0] == pytest.approx(alone)
    assert row.costs["latency_ms"] >= alone and row.costs["mean_latency_ms"] <= row.costs["latency_ms"] + 1e-9
    assert [row.scores for row in profile.routes] == [row.scores for row in before.routes] and stitched > 0


class Throttled:
    """A device whose runs take 10 ms, and 16 ms after two minutes; time goes on only while it runs."""

    def __init__(self):
        self.now = 0.0

    def run(self):
        self.now += 0.010 if self.now < 120 else 0.016

    def sensors(self):
        return (2400.0, 50.0) if self.now < 120 else (1500.0, 92.0)


def test_throttling_is_seen():
    device, rows = Throttled(), []
    result = measure_sustained(
        device.run, "a[:]", 10, report=rows.append, clock=lambda: device.now, sensors=device.sensors
    )
    assert result.first_ms == pytest.approx(10) and result.last_ms == pytest.approx(16)
    assert result.slowdown == pytest.approx(1.6) and tuple(rows) == result.periods
    assert len(rows) == 120 and rows[-1].at_s == pytest.approx(600, abs=0.1)
    assert (rows[0].clock_mhz, rows[-1].temperature_c) == (2400, 92)
    assert SustainedLatency.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_short_measurement_compares_its_thirds():
    device = Throttled()
    result = measure_sustained(device.run, "a[:]", 2.5, clock=lambda: device.now, sensors=lambda: (None, None))
    assert result.window_s == pytest.approx(50, abs=0.1)
    assert result.first_ms == pytest.approx(10) and result.slowdown == pytest.approx(1.6)


def test_stopped_early():
    """Ctrl-C ends it with what there is, and before the first period with nothing."""
    device = Throttled()

    def stop(period):
        if period.at_s > 22:
            raise KeyboardInterrupt

    assert len(measure_sustained(device.run, "a[:]", 10, report=stop, clock=lambda: device.now).periods) == 5
    with pytest.raises(KeyboardInterrupt):
        measure_sustained(lambda: (_ for _ in ()).throw(KeyboardInterrupt), "a[:]", 10)


@pytest.mark.parametrize(("minutes", "period_s"), [(0, 5), (-1, 5), (float("nan"), 5), (1e9, 5), (True, 5), (1, 0)])
def test_wrong_times(minutes, period_s):
    with pytest.raises(ValueError, match="must be above 0 and at most 1440"):
        measure_sustained(time.time, "a[:]", minutes, period_s=period_s)


@pytest.mark.parametrize("data", [{}, {"route": "a", "periods": []}, {"route": "a", "periods": [{"at_s": 1}]},
                                  {"route": "a", "periods": [{"at_s": 1, "latency_ms": -1}]},
                                  {"route": "a", "periods": [{"at_s": 1, "latency_ms": "x"}]}])  # fmt: skip
def test_what_is_no_sustained_latency(data):
    with pytest.raises(ValueError, match="sustained latency|no run was measured"):
        SustainedLatency.from_dict(data)


def test_sensors(tmp_path, monkeypatch):
    """The hottest sensor counts, and one that is not connected or off does not."""
    monkeypatch.setattr(processor, "THERMAL", tmp_path)
    assert processor.temperature_c() is None
    for number, text in enumerate(["41000", "67500", "-274000", "250000", "off"]):
        (tmp_path / f"thermal_zone{number}").mkdir()
        (tmp_path / f"thermal_zone{number}" / "temp").write_text(f"{text}\n")
    assert processor.temperature_c() == 67.5


@needs_export
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count the memory of processes as others do")
def test_memory_of_a_process(folder, tmp_path):
    """A route with 64 MB of weights takes at least that much more than one without."""
    import onnx

    model = ExportedModel(folder)
    memory = model.measure_memory()
    assert list(memory) == ROUTES and all(0 < each["loaded_mb"] < each["resident_mb"] for each in memory.values())
    weights = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    graph = onnx.load(model.folder / model._entries[model.routes[0]]["file"])
    large = onnx.numpy_helper.from_array(weights, "large")
    graph.graph.initializer.append(large)
    image, logits = graph.graph.input[0].name, graph.graph.output[0].name
    last = next(node for node in graph.graph.node if logits in node.output)
    last.output[0] = "small"
    helper = onnx.helper
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    graph.graph.node.extend([
        helper.make_node("MatMul", ["large", "large"], ["square"]),
        helper.make_node("ReduceSum", ["square"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["small", "nothing"], [logits]),
    ])  # fmt: skip
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    onnx.save(graph, copy / model._entries[model.routes[0]]["file"])
    profile = json.loads((copy / "profile.json").read_text())
    profile.pop("sha256")
    (copy / "profile.json").write_text(json.dumps(profile))
    heavier = ExportedModel.from_pretrained(copy, route=ROUTES[1]).measure_memory()
    assert heavier[ROUTES[0]]["loaded_mb"] > memory[ROUTES[0]]["loaded_mb"] + 60 and image
    assert heavier[ROUTES[1]]["loaded_mb"] < memory[ROUTES[1]]["loaded_mb"] + 30


@needs_export
def test_memory_of_a_route_that_cannot_run(folder):
    from restnet_hf.runtime.measuring import measure_memory

    with pytest.raises(RuntimeError, match=r"cannot be measured: .*there is no route 'c\[:\]'"):
        measure_memory(folder, "c[:]")


@needs_export
def test_by_command_without_torch(folder):
    code = f"from restnet_hf.cli import app; app(['measure', {str(folder)!r}, '--seconds', '1', '--minutes', '0.01'])"
    done = subprocess.run([sys.executable, "-c", ABSENT + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 routes and 1 cascades" in done.stdout and "median of the first" in done.stdout
    sustained = SustainedLatency.from_dict(Profile.load(folder / "profile.json").metadata["sustained"])
    assert sustained.periods and sustained.route == str(ExportedModel(folder).active_cascade)


@needs_export
def test_options_that_do_not_fit(folder, tmp_path):
    for options in (["--out", str(tmp_path / "x.json")], ["--batch-size", "2"], ["--overwrite"]):
        result = CliRunner().invoke(app, ["measure", str(folder), *options])
        assert result.exit_code == 2 and "not for exported routes" in " ".join(result.output.replace("│", "").split())
    result = CliRunner().invoke(app, ["measure", str(tmp_path), "--memory"])
    assert result.exit_code == 2 and "--memory is for exported routes" in result.output


def test_a_period_knows_what_was_not_reported():
    assert Period(5.0, 1.0) == Period(5.0, 1.0, None, None)


@needs_export
def test_what_is_published_of_a_folder(folder):
    """Its latencies here, those of each stage of a cascade, and the adapter's weights; a lost entry is an error."""
    model = ExportedModel(folder, threads=1)
    profile = model.measure_latency(seconds=0.1, repeats=5)
    table = DeviceTable.of_export(profile)
    assert dict(table.routes) == {text: profile[text].costs["latency_ms"] for text in ROUTES}
    assert table.cascades[CASCADE] == profile[CASCADE].stage_costs["latency_ms"]
    assert {"anchors.resnet", "anchors.vit"} < {*table.weights} and not table.stale_routes(table.weights)
    assert table.add_to(profile)[CASCADE].costs["latency_ms"] == pytest.approx(profile[CASCADE].costs["latency_ms"])
    assert (table.runtime, table.version, table.threads) == ("onnx", installed_version("onnx"), 1)
    with pytest.raises(ValueError, match="name its repository, as in repo_id="):
        push_latency(table)
    pixels = DeviceTable.of_export(replace(profile, metadata={**profile.metadata, "input": "pixels"}))
    assert pixels.precision == "fp32 of pixels" and pixels.file_name != table.file_name
    for change, message in (({"adapter": 3}, "export it again"), ({"sustained": {"periods": []}}, "sustained")):
        with pytest.raises(ValueError, match=message):
            DeviceTable.of_export(replace(profile, metadata={**profile.metadata, **change}))


@needs_export
def test_what_was_measured_elsewhere_is_forgotten(folder):
    """A new measurement says nothing of how much another device slowed down, or of its memory."""
    model = ExportedModel(folder, threads=1)
    model.measure_sustained(0.005)
    assert "sustained" in model.profiled.metadata
    measured = model.measure_latency(seconds=0.1, repeats=5)
    assert not {"sustained", "memory"} & measured.metadata.keys() and "device" in measured.metadata


def test_versions_of_runtimes():
    here = installed_version("torch")
    assert here == installed_version("torch eager") and here.partition("+")[0] == torch.__version__.partition("+")[0]
    assert installed_version("../torch") is None and installed_version("") is None
