"""Every runtime and precision of RUNTIMES, verified against the routes themselves; and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, make_anchor
from exports import ABSENT, needs_runtime
from PIL import Image
from torch import nn
from typer.testing import CliRunner
from versions import needs_export

from restnet_hf import Budget, Controller, ExportedModel, Profile, StitchedModelForImageClassification, export_routes
from restnet_hf.cli import app
from restnet_hf.data.datasets import load_images, subset, with_pixel_values
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.export.export import NOISE_IMAGES, DisagreementError, pareto_routes
from restnet_hf.export.exporter import Exporter, Quantization, UnsupportedExportError, load_exporter
from restnet_hf.export.programs import trace_route
from restnet_hf.export.sensitivity import most_sensitive, rounded
from restnet_hf.hub.cards import make_card
from restnet_hf.runtime.runners import RUNTIMES, MissingRuntimeError, Runtime, openvino_core
from restnet_hf.stitches.tuning import TunedConfig, tuned_keys


pytestmark = needs_export
CASES = [(name, precision) for name in RUNTIMES for precision in load_exporter(name).precisions]
ROUTES = ["resnet[:3] + vit[2:]", "resnet[:2] + vit[2:]"]
FAST = [("onnx", "fp32"), ("onnx", "int8")]
WITHOUT_TORCH = [case for case in CASES if case[0] in ("coreml", "litert", "onnx", "openvino")]


def noise(count, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(pair):
    pair.add_stitch(ROUTES[1])
    pair.fit_stitches(noise(40, 5))
    return pair


def test_a_model_in_half_precision(images, tmp_path):
    """Its stitch is in float32; what is exported is all in float32, with the same weights."""
    anchors = make_anchor("resnet").to(torch.float16), make_anchor("vit", seed=1).to(torch.float16)
    half = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    route = half.add_stitch(ROUTES[0])
    half.fit_stitches(noise(40, 5))
    exported = torch.export.export(half.bake(route), (images.half(),)).module()
    with torch.no_grad():
        expected = half(images, route=route).logits
        assert expected.dtype == torch.float16 and torch.equal(exported(images.half()), expected)
    program = trace_route(route, half.steps(route))
    assert program.example.dtype == torch.float32
    found = program.exported.module()(images)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.02 * expected.std()


def logits(model, route, images):
    model.set_route(route)
    with torch.no_grad():
        return model(images).logits.numpy()


def can_run(runtime, precision):
    if (runtime, precision) != ("openvino", "bf16"):
        return True
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_every_runtime_and_precision(model, tmp_path, runtime, precision):
    """Logits close to the route's own, at any number of images; a script that prints the same class; a stored profile.

    In float32 two routes are in one folder, and share what they can.
    """
    needs_runtime(runtime)
    out, data = tmp_path / "out", [(noise(24), torch.arange(24) % CLASSES)]
    options = {"runtime": runtime, "precision": precision, "data": data, "min_agreement": 0.5, "calibration_images": 8}
    if not can_run(runtime, precision):
        with pytest.raises(ValueError, match="does not compute in bfloat16"):
            export_routes(model, out, ROUTES[:1], **options)
        assert not out.exists()
        return
    routes = ROUTES if precision == "fp32" else ROUTES[:1]
    exported = export_routes(model, out, routes, **options)
    check_logits(exported, model, routes, precision)
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    exported.set_route(ROUTES[0])
    check_script(exported, tmp_path, picture, (runtime, precision) in WITHOUT_TORCH)
    assert max(exported.check().values()) < 1e-3
    check_profile(exported, model, routes, runtime, precision)
    if len(routes) > 1 and runtime not in ("coreml", "litert", "torch"):
        check_sharing(out, model)
    if len(routes) > 1 and (runtime, precision) in WITHOUT_TORCH:
        subprocess.run([sys.executable, "-c", SWITCHING.format(folder=str(out), size=SIZE)], check=True)
        subprocess.run([sys.executable, "-c", SIGNALLED.format(folder=str(out))], check=True)


def check_logits(exported, model, routes, precision):
    images = noise(5, 1)
    for route in routes:
        expected, found = logits(model, route, images), (exported.set_route(route), exported(images.numpy()))[1]
        off = np.abs(found - expected).max() / expected.std()
        assert off < {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.2}.get(precision, 1.0)
        assert precision == "fp32" or off > 1e-4  # it is in low precision
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9
        one_by_one = np.concatenate([exported(image.numpy()) for image in images.split(1)])
        # where a sum is between two levels the number of images may decide, by the order that it is added up in; and
        # scales that are found as images come depend on which come together
        apart = {"int8": 0.1, "int8_dynamic": 1.0}.get(precision, 1e-3)
        assert np.allclose(found, one_by_one, atol=apart * expected.std())


def check_script(exported, folder, picture, without_torch):
    """It prints the same class; where its runtime does not run, the error says where it does."""
    code = (folder / "out" / "run.py").read_text()
    assert code.count("\n") <= 30
    if not RUNTIMES[exported.runtime].runs_here:
        compile(code, "run.py", "exec")
        with pytest.raises(subprocess.CalledProcessError) as caught:
            run_in(folder, code, without_torch)
        assert "only supported on macOS" in caught.value.stderr
        return
    assert run_in(folder, code, without_torch) == exported.classify(picture)[0]["label"]
    assert run_in(folder, code, without_torch, "--check").startswith("changed files: none; logits off by")


def run_in(folder, code, without_torch, picture="picture.png"):
    (folder / "out" / "run.py").write_text((ABSENT if without_torch else "") + code)
    done = subprocess.run(
        [sys.executable, "out/run.py", picture], cwd=folder, check=True, capture_output=True, text=True
    )
    (folder / "out" / "run.py").write_text(code)
    return done.stdout.splitlines()[-1]


def check_profile(exported, model, routes, runtime, precision):
    rows = exported.profiled.routes
    assert [str(row.route) for row in rows] == routes
    eager = {str(row.route): row for row in model.profile().routes}
    assert all(row.costs["macs"] == eager[str(row.route)].costs["macs"] for row in rows)
    images = 24 - (8 if precision.startswith("int8") else 0)
    assert exported.profiled.metadata["images"] == images
    assert all((images * row.scores["accuracy"]) % 1 == pytest.approx(0, abs=1e-9) for row in rows)
    if not RUNTIMES[runtime].runs_here:  # no latency is that of the runtime
        assert not any("latency_ms" in row.costs for row in rows) and "runtimes" not in model.profiled.metadata
        assert exported.profiled.metadata["verified_by"] == "evaluator"
        return
    assert all(row.costs["latency_ms"] > 0 for row in rows) and "verified_by" not in exported.profiled.metadata
    (entry,) = model.profiled.metadata["runtimes"]
    assert (entry["runtime"], entry["precision"], list(entry["routes"])) == (runtime, precision, routes)
    card = make_card("me/adapter", [{"name": "a", "repo_id": None, "revision": None, "license": None}], model.profiled)
    assert f"| `{ROUTES[0]}` | {runtime} | {precision} | " in card.text


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_exporter_of_each_runtime(runtime):
    """Each row names an exporter that exists and is for the same runtime."""
    exporter = load_exporter(runtime)
    assert isinstance(exporter, Exporter) and exporter.runtime == runtime


class Table(Exporter):
    """One affine map from the pixels, fitted to the logits of a route; a runtime that needs numpy alone."""

    runtime, packages, precisions = "table", ("numpy",), ("fp32",)

    def convert(self, program, precision):
        images = noise(NOISE_IMAGES)  # as many as verify, and fewer than there are pixels, so that the fit is exact
        with torch.no_grad():
            logits = program.module(images)
        pixels = np.column_stack([images.flatten(1).numpy(), np.ones(len(images))])
        return np.linalg.lstsq(pixels, logits.numpy())[0].astype(np.float32)

    def save(self, models, folder):
        entries = {route: {"file": f"{number}.npy"} for number, route in enumerate(models)}
        for route, entry in entries.items():
            np.save(folder / entry["file"], models[route])
        return entries


def run_table(folder, entry, threads, trust_remote_code=False):
    weight = np.load(folder / entry["file"])
    return lambda images: (images.reshape(len(images), -1) @ weight[:-1] + weight[-1]).astype(np.float32)


@pytest.mark.parametrize("exporter", [Table, Table(), f"{__name__}:Table"])
def test_a_runtime_from_outside(model, tmp_path, monkeypatch, exporter):
    """One row is enough to export and verify routes, load the folder, and run its script without torch."""
    script = 'np.append(x.ravel(), 1) @ np.load(here / "{file}")'
    row = Runtime(run_table, exporter, "os", script, {"file": r"\d+\.npy"})
    with pytest.raises(ValueError, match="'table' is not one of"):
        export_routes(model, tmp_path / "out", ROUTES, runtime="table")
    monkeypatch.setitem(RUNTIMES, "table", row)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Table.__module__])
    exported = export_routes(model, tmp_path / "out", ROUTES, runtime="table")
    assert exported.runtime == "table" and [*map(str, exported.routes)] == ROUTES
    images = noise(NOISE_IMAGES)
    for route in ROUTES:
        exported.set_route(route)
        assert np.allclose(exported(images.numpy()), logits(model, route, images), atol=1e-3)
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    exported.set_route(ROUTES[0])
    printed = run_in(tmp_path, (tmp_path / "out" / "run.py").read_text(), without_torch=True)
    assert printed == exported.classify(picture)[0]["label"]
    profile = json.loads((tmp_path / "out" / "profile.json").read_text())
    profile["metadata"]["files"][ROUTES[0]]["file"] = "run.py"
    (tmp_path / "out" / "profile.json").write_text(json.dumps(profile))
    with pytest.raises(ValueError, match=r"file='run.py', which must be of the form .* for runtime 'table'"):
        ExportedModel(tmp_path / "out")


def test_an_exporter_of_another_runtime(monkeypatch):
    monkeypatch.setitem(RUNTIMES, "mine", Runtime(run_table, Table, "os", ""))
    with pytest.raises(ValueError, match="exporter of runtime 'mine' has runtime='table'; give both one name"):
        load_exporter("mine")


def check_sharing(folder, model):
    """The folder holds each tensor once: as much as the segments and stitches that the routes use."""
    used = {p for route in ROUTES for step in model.steps(route) for p in step.parameters()}
    each = [sum(p.numel() for step in model.steps(route) for p in step.parameters()) for route in ROUTES]
    union = sum(p.numel() for p in used)
    assert sum(each) > 1.5 * union  # so that it matters
    weights = next(f for f in folder.iterdir() if f.name in ("weights.bin", "model.pte"))
    # small tensors stay in the graphs of ONNX, norms are folded away, and a .pte has its graphs too
    assert 0.6 * 4 * union < weights.stat().st_size < 4 * union * (1.6 if weights.suffix == ".pte" else 1.1)


SWITCHING = (
    ABSENT
    + """
import numpy as np
from restnet_hf import Budget, Controller, ExportedModel, Profile, ProfiledRoute
model = ExportedModel.from_pretrained({folder!r}, threads=1)
rows = sorted(model.profiled.routes, key=lambda row: row.costs["macs"])
# without scores, the route of the most MACs is the best
unscored = Profile(tuple(ProfiledRoute(row.route, row.costs) for row in rows))
controller = Controller(unscored, {{"macs": rows[0].costs["macs"]}})
images = np.random.default_rng(0).standard_normal((2, 3, {size}, {size}))
seen = []
for step, row in enumerate(rows):
    decision = controller.set_budget(step, Budget(macs=row.costs["macs"]))
    model.set_route(decision.route)
    seen.append(model(images))
assert not np.allclose(seen[0], seen[1]) and "torch" not in sys.modules
assert model.set_budget(macs=rows[0].costs["macs"]) == rows[0].route
assert np.array_equal(model(images), seen[0])
"""
)

SIGNALLED = (
    ABSENT
    + """
import signal, subprocess
from restnet_hf import ExportedModel
signal.signal(signal.SIGCHLD, lambda *_: None)
first = ExportedModel({folder!r})
second = ExportedModel({folder!r})
del first  # before the other, as when routes are switched
del second
subprocess.run(["true"], check=True)  # whose end is a signal, and a runtime may have left no stack for it
"""
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A folder of two routes with one end, whose norms each of them has tuned for itself."""
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("vit"), make_anchor("resnet", seed=1), order="given"
    )
    routes = [model.add_stitch(f"vit[:{cut}] + resnet[{cut}:]") for cut in (1, 2)]
    for seed, route in enumerate(routes):
        key = next(key for key in tuned_keys(route)[-1] if key.kind == "norm")
        tuned = model.add_tuned(key, TunedConfig("norm", "resnet", route.segments[-1].start))
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    folder = tmp_path_factory.mktemp("bundle")
    export_routes(model, folder / "onnx", routes)
    return model, routes, folder / "onnx"


@pytest.mark.slow
def test_tuned_norms_leave_convolutions_shared(bundle):
    """A folder takes little more than the anchors, though no two routes have the same norms."""
    model, routes, folder = bundle
    kernels = {p for route in routes for step in model.steps(route) for p in step.parameters() if p.dim() == 4}
    apart = sum(p.numel() for route in routes for s in model.steps(route) for p in s.parameters() if p.dim() == 4)
    assert apart > 1.4 * sum(p.numel() for p in kernels)  # so that it matters
    every = {p for route in routes for step in model.steps(route) for p in step.parameters()}
    assert (folder / "weights.bin").stat().st_size < 1.1 * 4 * sum(p.numel() for p in every)


@pytest.mark.slow
def test_keeps_as_many_routes_loaded_as_asked(bundle):
    _, routes, folder = bundle
    model = ExportedModel(folder, keep=2)
    first = model._loaded[routes[0]]
    model.set_route(routes[1])
    assert model.set_route(str(routes[0])) == routes[0] and model._loaded[routes[0]] is first
    model = ExportedModel.from_pretrained(folder, route=routes[1])
    assert list(model._loaded) == [routes[1]]


@pytest.mark.slow
def test_layers_that_lose_too_much_stay_in_full_precision(model, tmp_path, monkeypatch):
    """A classifier whose inputs differ by 1e4 in size cannot be in eight bits; kept out of them, all is well."""
    monkeypatch.setattr(type(load_exporter("onnx")), "careful", False)  # which here does as well
    head, norm = model.anchors["vit"].model.classifier, model.anchors["vit"].model.vit.layernorm
    with torch.no_grad():
        norm.weight[0] *= 1e4
        head.weight[:, 0] /= 1e4
    images = noise(60)
    options = {"runtime": "onnx", "precision": "int8", "data": images, "calibration_images": 20, "target": "x86-avx2"}
    exported = export_routes(model, tmp_path / "out", [ROUTES[0]], min_agreement=0.9, **options)
    (kept,) = exported.profiled.metadata["kept_in_full_precision"].values()
    assert "steps.2.model.classifier" in kept
    assert exported.profiled.routes[0].scores["agreement"] >= 0.9
    program = trace_route(model.route(ROUTES[0]), model.steps(ROUTES[0]))
    assert most_sensitive(program, images[:8])[0] == "steps.2.model.classifier"


@pytest.mark.slow
def test_onnx_runtime_leaves_kept_layers_in_float(model, tmp_path):
    """Its optimiser quantises weights behind quantised activations; those of kept layers must stay as they are."""
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    exporter, program = load_exporter("onnx"), trace_route(model.route(ROUTES[0]), model.steps(ROUTES[0]))
    images, lost = [image[None].numpy() for image in noise(8)], []
    whole = exporter.convert(program, "int8")
    source = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in whole.proto.graph.initializer}
    for node in (node for node in whole.proto.graph.node if node.op_type == "Conv"):
        how = Quantization("int8", keep=(whole.layers[node.name],), full_range=True)
        quantised = exporter.quantize(whole, images, how).proto
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        onnxruntime.InferenceSession(quantised.SerializeToString(), options, providers=["CPUExecutionProvider"])
        tensors = onnx.load(tmp_path / "optimized.onnx").graph.initializer
        arrays = [onnx.numpy_helper.to_array(tensor) for tensor in tensors]
        if not any(array.dtype == np.float32 and np.array_equal(array, source[node.input[1]]) for array in arrays):
            lost.append(node.name)
    assert not lost


@pytest.mark.slow
def test_too_little_agreement_is_refused(model, tmp_path):
    """Scales that were calibrated on nothing but grey fit no other image, whatever else is kept."""
    data = [torch.zeros(4, 3, SIZE, SIZE), noise(40)]
    options = {"precision": "int8", "data": data, "calibration_images": 4, "min_agreement": 1.0}
    with pytest.raises(DisagreementError, match=r"agrees with the original on \d.*100.0% are asked for"):
        export_routes(model, tmp_path / "none", [ROUTES[0]], **options)
    assert not (tmp_path / "none").exists()


def test_rounded():
    """Against the scale written out: 0 to 2.55 in 255 steps of 0.01; -1.27 to 1.27 with zero on it."""
    x = torch.tensor([0.0, 0.014, 0.016, 2.55, 3.0], dtype=torch.float64)
    found = rounded(x, torch.tensor(0.5).double(), torch.tensor(2.55).double())
    assert torch.allclose(found, torch.tensor([0, 0.01, 0.02, 2.55, 2.55]).double())
    found = rounded(
        torch.tensor([-2.0, -0.004, 0.006]).double(), torch.tensor(-1.27).double(), torch.tensor(1.28).double()
    )
    assert torch.allclose(found, torch.tensor([-1.27, 0.0, 0.01]).double())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"runtime": "tflite"}, ValueError, "'tflite' is not one of"),
        ({"precision": "int4"}, UnsupportedExportError, "'int4' is not one of"),
        ({"runtime": "torch", "precision": "int8"}, UnsupportedExportError, "'int8' is not one of"),
        ({"precision": "int8"}, ValueError, "needs images to calibrate and verify with"),
        ({"precision": "int8", "data": noise(8), "calibration_images": 8}, ValueError, "no others to verify with"),
        ({"min_agreement": 2}, ValueError, "min_agreement=2 must be from 0 to 1"),
        ({"max_accuracy_drop": 0}, ValueError, "max_accuracy_drop=0 must be above 0"),
        ({"max_accuracy_drop": 1}, ValueError, "max_accuracy_drop needs labelled images"),
        ({"target": "x86"}, ValueError, r"target='x86' is not one of \['auto', 'x86-avx2', 'x86-vnni', 'arm'\]"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
        ({"routes": []}, ValueError, "no routes to export"),
        ({"routes": ["resnet[:1] + vit[1:]"]}, ValueError, "has no stitch yet"),
        ({"data": torch.randn(4, 3, 32, 32)}, ValueError, "must have shape"),
    ],
)
def test_refusals(model, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export_routes(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dynamo", "Onnx"])
@pytest.mark.filterwarnings("ignore:.*children_specs.*:FutureWarning")  # of its runner
def test_a_baked_route_exports_by_transformers(model, name):
    """As any module does: the same logits."""
    exporters = pytest.importorskip("transformers.exporters")
    if name == "Onnx":
        needs_runtime("onnx")
    exporter, config = (getattr(exporters, f"{name}{kind}") for kind in ("Exporter", "Config"))
    exported, images = exporter().export(model.bake(ROUTES[0]), {"input": noise(3)}, config()), noise(3, 4)
    assert np.allclose(exported(input=images).detach().numpy(), logits(model, ROUTES[0], images), atol=1e-4)


@pytest.mark.slow
def test_layers_that_litert_keeps(model):
    """By name: the more layers stay in float32, the larger the file is."""
    needs_runtime("litert")
    exporter, program = load_exporter("litert"), trace_route(model.route(ROUTES[0]), model.steps(ROUTES[0]), 1)
    whole, images = exporter.convert(program, "fp32"), [image[None].numpy() for image in noise(8)]
    kept = [(), program.first_kept[0], program.first_kept[-1], tuple(program.layers)]
    sizes = [len(exporter.quantize(whole, images, Quantization("int8", keep=layers))) for layers in kept]
    assert sizes == sorted(set(sizes)) and sizes[0] < 0.7 * len(whole)


@pytest.mark.slow
def test_layers_that_executorch_keeps(model):
    """What is kept has no weight in eight bits; all others of its kind have."""
    needs_runtime("executorch")
    exporter, program = load_exporter("executorch"), trace_route(model.route(ROUTES[0]), model.steps(ROUTES[0]), 1)
    images = [image[None].numpy() for image in noise(8)]
    counts = []
    for layers in ((), program.first_kept[0], tuple(program.layers)):
        quantized = exporter.quantize(program, images, Quantization("int8", keep=layers)).exported
        weights = [value for value in quantized.state_dict.values() if value.dtype == torch.int8]
        weights += [value for value in quantized.constants.values() if getattr(value, "dtype", None) == torch.int8]
        counts.append(len(weights))
    assert counts == [len(program.layers), len(program.layers) - len(program.first_kept[0]), 0]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_missing_package(model, tmp_path, monkeypatch, runtime):
    """What is not installed is named, with the extra that brings it."""
    *others, package = load_exporter(runtime).packages
    for other in others:
        pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(MissingRuntimeError, match=rf"needs {package.split('.')[0]}.*restnet-hf\[{runtime}\]"):
        export_routes(model, tmp_path / "out", runtime=runtime)
    assert not list(tmp_path.iterdir())


class Bessel(nn.Module):
    """An operation that edge runtimes do not have."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_unsupported_operator(model, tmp_path, runtime):
    model.anchors["vit"].model.classifier = nn.Sequential(model.anchors["vit"].model.classifier, Bessel())
    with pytest.raises(UnsupportedExportError, match="cannot be written as ONNX"):
        export_routes(model, tmp_path / "out", runtime=runtime)
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_not_called_good(model, tmp_path, monkeypatch):
    """A runner that gives other numbers stands for a runtime that computes wrongly."""
    row = replace(RUNTIMES["onnx"], run=lambda *_: lambda images: np.zeros((len(images), CLASSES), np.float32))
    monkeypatch.setitem(RUNTIMES, "onnx", row)
    with pytest.raises(DisagreementError, match="agrees with the original on .* nothing was written"):
        export_routes(model, tmp_path / "out", data=noise(20))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_hostile_folder(bundle, tmp_path):
    """Files outside the folder are never opened, and damaged ones are named."""
    source = bundle[2]
    good = json.loads((source / "profile.json").read_text())
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def written(**changes):
        (tmp_path / "profile.json").write_text(json.dumps({**good, "metadata": {**good["metadata"], **changes}}))
        return tmp_path

    first = next(iter(good["metadata"]["files"]))
    for name in ("../model.onnx", "/etc/passwd", "a/../../b.onnx", "a//b.onnx", "./model.onnx", ".a/b.onnx"):
        with pytest.raises(ValueError, match="not in the folder"):
            ExportedModel(written(files={**good["metadata"]["files"], first: {"file": name}}))
    with pytest.raises(ValueError, match="runtime 'pickle', not one of"):
        ExportedModel(written(runtime="pickle"))
    with pytest.raises(ValueError, match="does not name a file for each"):
        ExportedModel(written(files={}))
    with pytest.raises(ValueError, match="there is no route 'a"):
        ExportedModel(written()).set_route("a[:1] + b[2:]")
    with pytest.raises(ValueError, match="keep=0"):
        ExportedModel(written(), keep=0)
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(ValueError, match=r"labels.json must hold a list, not a dict"):
        ExportedModel(tmp_path)
    (tmp_path / "labels.json").write_text("[")
    with pytest.raises(ValueError, match=r"labels.json: Expecting"):
        ExportedModel(tmp_path)


@pytest.mark.slow
def test_by_command_on_real_images(tmp_path):
    """int8 of a trained route agrees with it, by the command; the adapter's profile has what was measured."""
    model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32")
    route = "resnet_fashion[:5] + vit_fashion[6:]"
    model.set_route(model.add_stitch(route))
    rows = with_pixel_values(subset(load_images(DATA, "train"), 300), model.image_processor)
    model.fit_stitches(rows)
    model.profile(rows.select(range(64)))
    assert pareto_routes(model)
    model.save_pretrained(tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--data", str(DATA)]
    more = ["--precision", "int8", "--images", "400", "--calibration-images", "100", "--threads", "1"]
    result = CliRunner().invoke(app, [*command, *more, "--route", route, "--split", "test"])
    assert result.exit_code == 0, result.output
    (row,) = ExportedModel(tmp_path / "out").profiled.routes
    assert row.scores["agreement"] >= 0.98 and row.scores["accuracy"] > 0.8
    (entry,) = Profile.load(tmp_path / "adapter" / "profile.json").metadata["runtimes"]
    assert entry["routes"][route]["latency_ms"] == row.costs["latency_ms"]
    both = CliRunner().invoke(app, [*command, "--route", route, "--budget", "macs=1e9"])
    assert both.exit_code == 2 and "not several of them" in " ".join(both.output.replace("│", "").split())
    assert Controller(ExportedModel(tmp_path / "out").profiled, Budget(latency_ms=1e4)).route == row.route
