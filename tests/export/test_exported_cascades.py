"""Cascades in an exported folder: the answers and ways of PyTorch, shared beginnings run once, without torch."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE
from exports import ABSENT
from PIL import Image
from typer.testing import CliRunner
from versions import needs_export

from restnet_hf import BudgetError, Cascade, ExportedModel, StitchedModelForImageClassification, export_routes
from restnet_hf.cli import app
from restnet_hf.demo.paths import END, FRONT
from restnet_hf.routes.profile import ProfiledCascade, ProfiledRoute
from restnet_hf.runtime.exported_cascades import SCRIPTS, read_stages, run_stages


pytestmark = needs_export
STITCHED = ["resnet[:3] + vit[2:]", "resnet[:2] + vit[2:]"]
SHARED = "resnet[:2] + vit[2:] > resnet[:3] + vit[2:] > resnet[:]"  # the first two share two blocks, the last three


def noise(count, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(pair):
    for route in STITCHED:
        pair.add_stitch(route)
    pair.fit_stitches(noise(40, 5))
    return pair


@torch.no_grad()
def with_thresholds(model, text, confidence="probability", temperatures=()):
    """A cascade whose first routes each answer about half of the images that reach them."""
    routes, images = Cascade.parse(text).routes, noise(64, 1)
    cascade = Cascade(routes, (1.0,) * (len(routes) - 1), confidence, temperatures)
    for at in range(len(routes) - 1):
        low, high = 0.0, 1.0
        for _ in range(20):
            tried = (*cascade.thresholds[:at], (low + high) / 2, *cascade.thresholds[at + 1 :])
            cascade = replace(cascade, thresholds=tried)
            answered = model(images, cascade=cascade).answered_by
            low, high = (low, tried[at]) if (answered == at).sum() < (answered > at).sum() else (tried[at], high)
    return cascade


@torch.no_grad()
def eager(model, images, cascade):
    output = model(images, cascade=cascade)
    return output.logits.numpy(), output.answered_by.numpy()


@pytest.mark.parametrize("text", [SHARED, pytest.param("vit[:] > resnet[:]", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "runtime", ["onnx", *(pytest.param(each, marks=pytest.mark.slow) for each in ("openvino", "torch"))]
)
def test_the_answers_and_ways_of_eager(model, tmp_path, runtime, text):
    cascade, images = with_thresholds(model, text), noise(60, 3)
    exported = export_routes(model, tmp_path / "out", cascades=cascade, runtime=runtime, data=noise(30, 2))
    assert exported.cascades == (cascade,) and exported.active_cascade == cascade
    assert {*exported.routes} == {*cascade.routes}
    logits, ways = exported.run_cascade(images.numpy())
    expected, answered = eager(model, images, cascade)
    assert np.array_equal(ways, answered) and {*answered} == {*range(len(cascade.routes))}
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(exported(images.numpy()), logits)
    one, way = exported.run_cascade(images[:1].numpy())
    assert way == answered[:1] and np.allclose(one, expected[:1], rtol=1e-3, atol=1e-4)
    metadata = exported.profiled.metadata
    assert metadata["same_route"] == {str(cascade): 1.0} and metadata["active"] == str(cascade)
    assert len(metadata["parts"]) == (5 if text == SHARED else 0)


@pytest.mark.slow
def test_a_shared_beginning_runs_once(model, tmp_path, monkeypatch):
    """The blocks that routes share are a file of their own, whose weights are in the folder once."""
    cascade = with_thresholds(model, SHARED)
    exported = export_routes(model, tmp_path / "out", cascades=cascade)
    stages, ran = exported.profiled.metadata["stages"][str(cascade)], []
    monkeypatch.setattr(exported, "_part", lambda name, part=exported._part: ran.append(name) or part(name))
    exported(noise(30, 3).numpy(), cascade=replace(cascade, thresholds=(1.0, 1.0)))  # all images go all the way
    assert len(ran) == len({*ran}) == 5 and [each["start"] for each in stages] == ["", *(ran[0], ran[2])]
    ran.clear()
    exported(noise(30, 3).numpy(), cascade=replace(cascade, thresholds=(0.0, 0.0)))
    assert ran == stages[0]["parts"]
    alone = export_routes(model, tmp_path / "routes", list(cascade.routes))
    weights = [(folder.folder / "weights.bin").stat().st_size for folder in (exported, alone)]
    assert weights[0] <= 1.1 * weights[1]


@pytest.mark.parametrize(
    "confidence",
    ["agreement", *(pytest.param(each, marks=pytest.mark.slow) for each in SCRIPTS if each != "agreement")],
)
def test_the_script_of_a_cascade(model, tmp_path, confidence):
    """run.py needs neither torch nor this package, and answers as the cascade does."""
    cascade = with_thresholds(model, SHARED, confidence, (1.5, 0.7))
    exported = export_routes(model, tmp_path / "out", cascades=cascade)
    rng, pictures = np.random.default_rng(0), []
    for index in range(6):
        picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
        picture.save(tmp_path / f"{index}.png")
        pictures.append(picture)
    logits = exported(exported.prepare(pictures))
    script = (tmp_path / "out" / "run.py").read_text()
    code = f"""{ABSENT.replace("'timm')", "'timm', 'restnet_hf')")}
import contextlib, io, json
found = []
for index in range(6):
    sys.argv, out = ["run.py", {str(tmp_path)!r} + f"/{{index}}.png"], io.StringIO()
    with contextlib.redirect_stdout(out):
        exec({script!r}, {{"__file__": {str(tmp_path / "out" / "run.py")!r}}})
    found.append(out.getvalue().strip())
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [exported.labels[each] for each in logits.argmax(1)]


def test_on_a_device_without_torch(model, tmp_path):
    """Loading, budgets over routes and cascades, switching and predicting."""
    cascade, images = with_thresholds(model, SHARED), noise(40, 3)
    export_routes(model, tmp_path / "out", cascades=cascade, data=noise(30, 2))
    np.save(tmp_path / "images.npy", images.numpy())
    code = (
        ABSENT
        + f"""
import json
import numpy as np
from restnet_hf import ExportedModel
model = ExportedModel.from_pretrained({str(tmp_path / "out")!r})
images = np.load({str(tmp_path / "images.npy")!r})
logits, ways = model.run_cascade(images)
small = str(model.set_budget(mean_macs=model.profiled[{str(cascade)!r}].costs['mean_macs']))
route = str(model.set_route(model.routes[0]))
with model.using({str(cascade)!r}):
    same = bool((model(images) == logits).all())
predicted = len(model.predict(np.zeros((2, {SIZE}, {SIZE}, 3), np.uint8), cascade={str(cascade)!r}))
assert 'torch' not in sys.modules
print(json.dumps([logits.argmax(1).tolist(), ways.tolist(), small, route, same, predicted]))
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    classes, ways, _, route, same, predicted = json.loads(done.stdout)
    expected, answered = eager(model, images, cascade)
    assert ways == answered.tolist() and classes == expected.argmax(1).tolist()
    assert route == str(cascade.routes[0]) and same and predicted == 2


@pytest.mark.slow
def test_costs_of_exported_cascades(model, tmp_path):
    """Stages cost what their parts take; shares are those of the calibration where there was one."""
    cascade = with_thresholds(model, SHARED)
    rows = [ProfiledRoute(route, {"macs": 1.0}, {"accuracy": 0.5}) for route in cascade.routes]
    known = ProfiledCascade(cascade, {"macs": 3.0, "mean_macs": 2.0}, {"accuracy": 0.6}, (1.0, 0.5, 0.25))
    model.record_profile(rows, cascades=[known])
    (row,) = export_routes(model, tmp_path / "out", cascades=[cascade], data=noise(30, 2)).profiled.cascades
    assert row.shares == (1.0, 0.5, 0.25)
    for cost in ("macs", "latency_ms"):
        stages = row.stage_costs[cost]
        assert row.costs[cost] == pytest.approx(sum(stages))
        assert row.costs[f"mean_{cost}"] == pytest.approx(stages[0] + stages[1] / 2 + stages[2] / 4)
    model.set_cascade(cascade)
    alone = export_routes(model, tmp_path / "active")  # the active cascade
    assert alone.active_cascade == cascade
    assert alone.profiled.cascades[0].costs["macs"] == row.costs["macs"]


@pytest.mark.slow
def test_quantised_cascades_run_whole_routes(model, tmp_path):
    cascade = with_thresholds(model, SHARED)
    exported = export_routes(
        model, tmp_path / "out", cascades=cascade, precision="int8", data=noise(60, 2), calibration_images=20,
        min_agreement=0.0,
    )  # fmt: skip
    assert exported.profiled.metadata["parts"] == {} and exported.run_cascade(noise(9).numpy())[0].shape == (
        9,
        CLASSES,
    )


CHANGES = [
    lambda stages: stages[0].update(start="vit[:]"),
    lambda stages: stages[0].update(parts=["../weights"]),
    lambda stages: stages[0].update(parts=[]),
    lambda stages: stages[0].update(parts=["vit[:]"] * 65),
    lambda stages: stages.pop(),
    lambda stages: stages.append({"start": "", "parts": ["vit[:]"]}),
    lambda stages: stages.__setitem__(1, None),
]


def test_what_is_refused(model, tmp_path):
    """Other cascades, and stages that are not of the cascade: nothing of a folder runs before it is checked."""
    with pytest.raises(ValueError, match="has no thresholds"):
        export_routes(model, tmp_path / "out", cascades="vit[:] > resnet[:]")
    cascade = with_thresholds(model, "vit[:] > resnet[:]")
    exported = export_routes(model, tmp_path / "out", "vit[:]", cascades=cascade)
    assert exported.cascade("vit[:] >0.25 resnet[:]").thresholds == (0.25,)
    for text in ("resnet[:] >0.5 vit[:]", "vit[:] > resnet[:]"):
        with pytest.raises(ValueError, match="there is no cascade '.*' in .*; the cascades are"):
            exported.set_cascade(text)
    with pytest.raises(ValueError, match="give a route or a cascade, not both"):
        exported(noise(1).numpy(), route="vit[:]", cascade=cascade)
    given = ExportedModel.from_pretrained(tmp_path / "out", route="vit[:] >0.25 resnet[:]")
    assert given.active_cascade.thresholds == (0.25,)
    exported.set_route("vit[:]")
    with pytest.raises(ValueError, match="no cascade is active; give one of"):
        exported.run_cascade(noise(1).numpy())
    with pytest.raises(BudgetError):
        exported.set_budget(mean_macs=1.0)
    file = tmp_path / "out" / "profile.json"
    text = file.read_text()
    for change in CHANGES:
        profile = json.loads(text)
        (stages,) = profile["metadata"]["stages"].values()
        change(stages)
        file.write_text(json.dumps(profile))
        with pytest.raises(ValueError, match=r"stages|stage of cascade"):
            ExportedModel(tmp_path / "out")


def test_all_sure_and_none_sure():
    """The runner by itself, on parts that are functions."""
    calls = []

    def run(part, x):
        calls.append((part, len(x)))
        return {"half": x / 2, "a": x * 4, "b": -x}[part]

    data = [{"start": "", "parts": ["half", "a"]}, {"start": "half", "parts": ["b"]}]
    cascade = Cascade.parse("a[:] >0.9 b[:2] + a[3:]")
    stages = read_stages(data, {"half", "a", "b"}, cascade)
    x = np.array([[4.0, 0.0], [0.1, 0.0], [0.0, 4.0]], np.float32)
    logits, ways = run_stages(run, x, stages, cascade)
    assert ways.tolist() == [0, 1, 0] and np.allclose(logits, [[8, 0], [-0.05, 0], [0, 8]])
    assert calls == [("half", 3), ("a", 3), ("b", 1)]
    assert run_stages(run, x[:1], stages, cascade)[1].tolist() == [0]
    assert run_stages(run, x[1:2], stages, cascade)[1].tolist() == [1]


@pytest.mark.slow
def test_export_by_command(tmp_path):
    model = StitchedModelForImageClassification.from_anchors(FRONT, END)
    model.set_cascade("vit_fashion[:] >0.8 resnet_fashion[:]")
    model.save_pretrained(tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--out"]
    for name, more in (("active", []), ("given", ["--cascade", "vit_fashion[:] >0.7 resnet_fashion[:]"])):
        done = CliRunner().invoke(app, [*command, str(tmp_path / name), *more])
        assert done.exit_code == 0, done.output
        threshold = ExportedModel(tmp_path / name).active_cascade.thresholds
        assert threshold == ((0.7,) if more else (0.8,))
