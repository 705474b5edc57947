"""Core ML packages: what the files compute, what they hold, and that nothing in them leads elsewhere."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, make_anchor
from exports import ROUTES, changed_json, export, images, without_checksums
from torch import nn
from versions import needs_export

from restnet_hf import ExportedModel, StitchedModelForImageClassification, export_routes
from restnet_hf.data.datasets import load_images, subset, with_pixel_values
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.export.coreml import LEAST_SIZE
from restnet_hf.export.exporter import Quantization, UnsupportedExportError, load_exporter
from restnet_hf.export.programs import trace_route
from restnet_hf.runtime.mil import MilProgram
from restnet_hf.runtime.mil_operations import OPERATIONS
from restnet_hf.runtime.runners import RUNTIMES, read_mil


coremltools = pytest.importorskip("coremltools")
pytestmark = [needs_export, pytest.mark.slow]
STITCHED = "resnet_fashion[:5] + vit_fashion[6:]"
DEMO_ROUTES = [STITCHED, "resnet_fashion[:]", "vit_fashion[:]"]
FILES = ["Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin", "Manifest.json"]


@pytest.fixture(scope="module")
def demo():
    """The demo's anchors with a stitch, and images."""
    model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32")
    rows = with_pixel_values(subset(load_images(DATA, "train"), 200), model.image_processor)
    model.add_stitch(STITCHED)
    model.fit_stitches(rows)
    return model, with_pixel_values(subset(load_images(DATA, "test"), 100), model.image_processor)


@pytest.mark.parametrize(
    ("precision", "error", "size"), [("fp32", 1e-4, 1.0), ("fp16", 0.03, 0.51), ("int8", 0.3, 0.31)]
)
def test_the_demo_in_every_precision(demo, tmp_path, precision, error, size):
    """A stitched route and both anchors: close logits, the same classes, and files as small as the precision."""
    model, rows = demo
    options = {"runtime": "coreml", "precision": precision, "data": rows, "calibration_images": 8}
    exported = export_routes(model, tmp_path / "out", DEMO_ROUTES, **options)
    assert [str(row.route) for row in exported.profiled.routes] == DEMO_ROUTES
    assert all(row.scores["agreement"] >= 0.98 for row in exported.profiled.routes)
    errors = exported.profiled.metadata["logit_error"]
    assert all(0 < errors[route] < error for route in DEMO_ROUTES)
    full = sum(4 * sum(p.numel() for step in model.steps(route) for p in step.parameters()) for route in DEMO_ROUTES)
    weights = [file.stat().st_size for file in (tmp_path / "out").rglob("weight.bin")]
    assert len(weights) == 3 and 0.8 * size < sum(weights) / full < 1.1 * size
    total = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file()) / 2**20
    assert exported.profiled.metadata["size_mb"] == pytest.approx(total, rel=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two routes of tiny networks."""
    return export(tmp_path_factory.mktemp("exported"), "coreml")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def packages(folder):
    return sorted(folder.glob("*.mlpackage"))


def test_what_a_package_holds(folder):
    """Files of Core ML alone, which coremltools reads, with the route and its classes in the metadata."""
    assert [path.name for path in packages(folder)] == ["a_1_b_1.mlpackage", "a_2_b_2.mlpackage"]
    for package, route in zip(packages(folder), ROUTES, strict=True):
        found = sorted(file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file())
        assert found == FILES
        model = coremltools.models.MLModel(str(package), skip_model_load=True)
        spec, about = model.get_spec(), model.user_defined_metadata
        assert about["route"] == route and len(json.loads(about["labels"])) == CLASSES
        (source,), (result,) = spec.description.input, spec.description.output
        assert source.name == "pixel_values" and list(source.type.multiArrayType.shape) == [1, 3, SIZE, SIZE]
        assert result.name == "logits" and list(result.type.multiArrayType.shape) == [1, CLASSES]
        assert spec.specificationVersion == 8  # of iOS 17 and macOS 14


def test_a_changed_bit_is_caught(copy):
    """In any file of a package; the other route still runs."""
    first, second = packages(copy)
    expected = ExportedModel(copy, route=ROUTES[1])(images())
    for name in FILES:
        content = (first / name).read_bytes()
        (first / name).write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
        with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
            ExportedModel(copy)
        other = ExportedModel(copy, route=ROUTES[1])
        assert np.array_equal(other(images()), expected)
        with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
            other.check()
        (first / name).write_bytes(content)
    assert second.is_dir() and ExportedModel(copy).check()


def test_a_snapshot_of_the_hub(folder, tmp_path):
    """Files inside packages are links into the cache there."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "main", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    for number, file in enumerate(sorted(file for file in snapshot.rglob("*") if file.is_file())):
        os.replace(file, blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    assert np.array_equal(ExportedModel(snapshot)(images()), ExportedModel(folder)(images()))


def test_links_that_leave_the_folder(copy, tmp_path):
    without_checksums(copy)
    package = packages(copy)[0]
    shutil.move(package, tmp_path / "elsewhere")
    package.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link to .*, which is not in the folder"):
        ExportedModel(copy)


@pytest.mark.parametrize("path", ["../../../../etc/passwd", "/etc/passwd", "com.apple.CoreML/x", "com.apple.CoreML"])
def test_a_manifest_that_lists_other_files(copy, path):
    without_checksums(copy)
    package = packages(copy)[0]
    changed_json(package, "Manifest.json", lambda data: next(iter(data["itemInfoEntries"].values())).update(path=path))
    with pytest.raises(ValueError, match="are not one Core ML package"):
        ExportedModel(copy)


def test_a_graph_with_weights_in_another_file(copy):
    """It is refused before Core ML could open it."""
    without_checksums(copy)
    graph = packages(copy)[0] / FILES[0]
    content = graph.read_bytes()
    assert content.count(b"@model_path/weights/weight.bin") > 2
    graph.write_bytes(content.replace(b"@model_path/weights/weight.bin", b"@model_path/../../../weigh.bin", 1))
    with pytest.raises(ValueError, match="has weights in other files than a_1_b_1.mlpackage/Data/.*/weight.bin"):
        ExportedModel(copy)


def test_files_of_two_packages(copy):
    without_checksums(copy)

    def swap(data):
        one, two = data["metadata"]["files"].values()
        one["weights"] = two["weights"]

    changed_json(copy, "profile.json", swap)
    with pytest.raises(ValueError, match="are not one Core ML package"):
        ExportedModel(copy)


@pytest.mark.parametrize("key", ["file", "graph", "weights"])
@pytest.mark.parametrize("name", ["../x.mlpackage/Manifest.json", "/etc/passwd", "labels.json"])
def test_names_of_other_files(copy, key, name):
    without_checksums(copy)
    changed_json(copy, "profile.json", lambda data: data["metadata"]["files"][ROUTES[0]].update({key: name}))
    with pytest.raises(ValueError, match="which is not in the folder|which must be of the form"):
        ExportedModel(copy)


def test_what_is_not_the_runtime_is_not_measured(copy):
    """Latency and memory of the evaluator are nobody's; and none are recorded at the export."""
    model = ExportedModel(copy)
    if RUNTIMES["coreml"].runs_here:
        pytest.skip("Core ML runs here")
    before = (copy / "profile.json").read_bytes()
    for measure in (model.measure_latency, model.measure_sustained, model.measure_memory):
        with pytest.raises(ValueError, match="'coreml' runs on darwin alone; .* measure the folder there"):
            measure(save=True)
    assert (copy / "profile.json").read_bytes() == before and b"latency_ms" not in before


def weights(exporter, model, folder):
    """The weights of all layers in the order of the graph, as the files have them, and which are in eight bits."""
    folder.mkdir()
    (entry,) = exporter.save({"route": model}, folder).values()
    spec = read_mil(folder, entry)
    operations = spec.mlProgram.functions["main"].block_specializations["CoreML7"].operations
    kinds = {operation.outputs[0].name: operation.type for operation in operations}
    names = [each.inputs["weight"].arguments[0].name for each in operations if each.type in ("conv", "linear")]
    constants = MilProgram(spec, folder / entry["weights"])._constants
    return [constants[name] for name in names], [kinds[name] != "const" for name in names]


def test_layers_that_are_kept(pair, tmp_path):
    """By name: a kept layer has its own weights, in float16; the others are off by half a step at most."""
    exporter = load_exporter("coreml")
    pair.fit_stitches(torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)))
    route = pair.route("resnet[:3] + vit[2:]")
    program = trace_route(route, pair.steps(route), 1)
    whole, names = exporter.convert(program, "int8"), list(program.layers)
    assert list(whole.weights) == names
    kept = ("steps.2.model.classifier", names[1])
    full, halved = weights(exporter, whole, tmp_path / "full")
    some, eight = weights(exporter, exporter.quantize(whole, [], Quantization("int8", keep=kept)), tmp_path / "some")
    assert not any(halved) and any(eight)
    large = [each.size > LEAST_SIZE for each in full]
    assert eight == [size and name not in kept for name, size in zip(names, large, strict=True)]
    assert large[1]
    for before, after, changed in zip(full, some, eight, strict=True):
        step = np.abs(before).reshape(len(before), -1).max(1).reshape(-1, *[1] * (before.ndim - 1)) / 127
        assert (np.abs(after - before) <= 0.51 * step + 1e-3 * np.abs(before)).all()
        assert np.array_equal(before, after) != changed
    head = program.module.get_submodule(kept[0]).weight
    assert np.array_equal(some[-1], head.half().float().numpy())


class Bessel(nn.Module):
    """An operation that Core ML does not have."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coremltools leaves a temporary folder
def test_operations_that_core_ml_does_not_have(pair, tmp_path):
    pair.anchors["vit"].model.classifier = nn.Sequential(pair.anchors["vit"].model.classifier, Bessel())
    with pytest.raises(UnsupportedExportError, match="cannot be written for Core ML: .*bessel_j0"):
        export_routes(pair, tmp_path / "out", runtime="coreml")
    assert not list(tmp_path.iterdir())


def test_operations_that_are_not_verified(pair, tmp_path, monkeypatch):
    """What the evaluator does not know is not exported, and named."""
    monkeypatch.delitem(OPERATIONS, "conv")
    with pytest.raises(UnsupportedExportError, match="coreml cannot load what was exported.*: operation 'conv' is"):
        export_routes(pair, tmp_path / "out", runtime="coreml")
    assert not list(tmp_path.iterdir())


def test_an_export_over_another(folder, tmp_path):
    """The packages are replaced file by file, and all is of the second one."""
    out = tmp_path / "coreml"
    shutil.copytree(folder, out)
    changed_json(out, "labels.json", lambda labels: labels.reverse())
    (packages(out)[0] / FILES[1]).write_bytes(b"old")
    export(tmp_path, "coreml")
    model = ExportedModel(out)
    assert model.check() and model.labels == ExportedModel(folder).labels and len(packages(out)) == 2


@pytest.mark.parametrize("route", ["vit[:2] + resnet[2:]", "resnet[:1] + vit[1:]"])
def test_stitches_between_grids_of_other_sizes(tmp_path, route):
    """Areas are averaged where a grid shrinks, and interpolated where it grows; three images in a run."""
    front = route.partition("[")[0]
    names = (front, "resnet" if front == "vit" else "vit")
    model = StitchedModelForImageClassification.from_anchors(*map(make_anchor, names), order="given")
    added = model.add_stitch(route)
    exported = export_routes(model, tmp_path / "out", added, runtime="coreml", batch_size=3)
    assert exported.batch_size == 3 and exported.profiled.metadata["logit_error"][str(added)] < 1e-4


def test_cascades(pair, tmp_path):
    """What its routes share is a package that runs once."""
    cascade = "resnet[:3] + vit[2:] >0.3 resnet[:]"
    exported = export_routes(pair, tmp_path / "out", cascades=cascade, runtime="coreml")
    assert [*map(str, exported.cascades)] == [cascade] and exported.profiled.cascades
    assert exported.run_cascade(images())[0].shape == (2, CLASSES)
    assert not any("latency_ms" in row.costs for row in exported.profiled.rows)
