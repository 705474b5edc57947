"""ExportedModel: pictures in, labels out; routes and budgets of a call; many threads."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import CLASSES, SIZE, Plain, spread
from exports import ROUTES, changed_json, export, needs_runtime
from PIL import Image
from versions import needs_export

from restnet_hf import Anchor, Budget, BudgetError, ExportedModel, StitchedModelForImageClassification, export_routes
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.errors import PictureError
from restnet_hf.runtime import RUNTIMES


onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytestmark = needs_export
THREADS, CALLS = 8, 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two routes for ONNX Runtime."""
    return export(tmp_path_factory.mktemp("exported"), "onnx")


@pytest.fixture(scope="module")
def model(folder):
    return ExportedModel(folder, threads=1, keep=2)


@pytest.fixture(scope="module")
def arrays():
    return [np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8) for seed in range(3)]


def softmax(logits):
    scores = np.exp(logits - logits.max())
    return scores / scores.sum()


def test_one_answer_for_each_image(model, arrays):
    one, two, three = map(Image.fromarray, arrays)
    answers = model.predict([one, two, three])
    assert [len(answer) for answer in answers] == [5, 5, 5] and answers[0] != answers[1]
    assert model.predict(one) == answers[0] and model.predict([two]) == [answers[1]]
    assert model.classify([one, two]) == answers[:2] and model.classify(three, top_k=2) == answers[2][:2]
    scores = softmax(model(model.prepare(two))[0].astype(np.float64))
    assert answers[1][0] == {"label": model.labels[scores.argmax()], "score": pytest.approx(scores.max())}
    assert model.predict([]) == []
    assert len(model.predict(one, top_k=None)) == CLASSES


def test_pictures_of_every_form(model, arrays, tmp_path):
    Image.fromarray(arrays[0]).save(tmp_path / "a.png")
    expected = model.predict(Image.fromarray(arrays[0]))
    for picture in (arrays[0], tmp_path / "a.png", str(tmp_path / "a.png")):
        assert model.predict(picture) == expected and model.predict([picture, picture]) == [expected, expected]
    assert model.predict(np.stack(arrays)) == model.predict(arrays) == model.predict(iter(arrays))


def test_a_picture_that_is_turned_by_its_metadata(model, arrays, tmp_path):
    """As `datasets` and transformers read it."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(arrays[0][::-1, ::-1]).save(tmp_path / "a.png", exif=exif)
    assert model.predict(tmp_path / "a.png") == model.predict(arrays[0])


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Files that are no pictures, or too large ones."""
    folder = tmp_path_factory.mktemp("broken")
    Image.new("RGB", (900, 900), "red").save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "text.png").write_text("no picture")
    Image.new("1", (14_000, 14_000)).save(folder / "huge.png")
    Image.new("1", (10_000, 10_000)).save(folder / "large.png")
    return folder


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        ("cut.jpg", PictureError, r"picture 1 \('.*cut.jpg'\) cannot be decoded"),
        ("text.png", PictureError, r"picture 1 \('.*text.png'\) cannot be decoded"),
        ("huge.png", PictureError, r"picture 1 \('.*huge.png'\) is too large: .*196000000 pixels"),
        ("large.png", PictureError, r"picture 1 \('.*large.png'\) is too large: 10000x10000 pixels|100000000 pixels"),
        ("none.png", FileNotFoundError, r"picture 1 \('.*none.png'\) cannot be opened"),
        (".", OSError, r"picture 1 .* cannot be opened"),
        (np.zeros((8, 8), np.uint8), ValueError, r"picture 1 is an array of shape \(8, 8\) in uint8"),
        (np.zeros((8, 8, 3)), ValueError, r"in float64; give \(H, W, 3\) in uint8"),
        (3, TypeError, "picture 1 is of type int"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(model, arrays, broken, picture, error, message):
    picture = broken / picture if isinstance(picture, str) else picture
    with pytest.raises(error, match=message):
        model.predict([arrays[0], picture])
    with pytest.raises(TypeError, match="pictures must be PIL images"):
        model.predict(None)


def test_a_route_or_a_budget_for_one_call(model, arrays):
    first, second = ROUTES
    answers = {route: (model.set_route(route), model.predict(arrays))[1] for route in ROUTES}
    pixels = model.prepare(arrays)
    logits = model(pixels)
    assert answers[first] != answers[second] and str(model.active_route) == second
    assert model.predict(arrays, route=first) == answers[first]
    assert not np.allclose(model(pixels, route=first), logits) and np.array_equal(model(pixels), logits)
    with model.using(first) as route:
        assert str(route) == first and model.predict(arrays) == answers[first]
        assert model.predict(arrays, route=second) == answers[second]
    cheapest = min(model.profiled, key=lambda row: row.costs["macs"])
    for budget in ({"macs": cheapest.costs["macs"]}, Budget(macs=cheapest.costs["macs"])):
        assert model.predict(arrays, budget=budget) == answers[str(cheapest.route)]
        assert model.set_budget(budget) == model.set_budget(macs=cheapest.costs["macs"]) == cheapest.route
    for wrong in ({"route": first, "budget": {"macs": 1e9}}, {"top_k": 0}, {"top_k": "3"}):
        with pytest.raises(ValueError, match="either route or budget|must be a whole number"):
            model.predict(arrays, **wrong)
    with pytest.raises(ValueError, match="no route 'a"):
        model(pixels, route="a[:2] + b[1:]")


def test_a_score_that_nobody_measured(folder):
    """Nothing scored in the profile: the most MACs; a score that is not there is an error."""
    model = ExportedModel(folder)
    rows = sorted(model.profiled, key=lambda row: row.costs["macs"])
    assert not rows[0].scores and model.set_budget(macs=1e12, score="acc") == rows[-1].route
    scored = type(model.profiled)(
        tuple(type(row)(row.route, row.costs, {"agreement": 1 - i / 9}) for i, row in enumerate(rows))
    )
    model.profiled = scored
    assert model.set_budget(macs=1e12) == rows[0].route
    with pytest.raises(BudgetError, match=r"has the scores \['agreement'\]; score='acc' is not one of them"):
        model.set_budget(macs=1e12, score="acc")


def wrong_calls(model, routes, calls):
    """Calls of all threads, each with its own image and routes in turn, that do not give the expected logits."""
    pixels = np.random.default_rng(0).standard_normal((THREADS, 1, 3, SIZE, SIZE)).astype(np.float32)
    expected = [{route: model(image, route=route) for route in routes} for image in pixels]
    assert not np.allclose(expected[0][routes[0]], expected[1][routes[0]], atol=1e-3)
    start = threading.Barrier(THREADS)

    def work(thread):
        start.wait()
        wrong = 0
        for call in range(calls):
            route = routes[(thread + call) % len(routes)]
            if call % 3:
                logits = model(pixels[thread], route=route)
            else:
                with model.using(route):
                    model.set_route(routes[call % len(routes)])  # which concerns other threads
                    logits = model(pixels[thread])
            wrong += not np.allclose(logits, expected[thread][route], atol=1e-4)
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


@pytest.mark.parametrize("keep", [2, 1])
@pytest.mark.parametrize(
    "runtime", [name if name == "onnx" else pytest.param(name, marks=pytest.mark.slow) for name in RUNTIMES]
)
def test_many_threads(folder, tmp_path, runtime, keep):
    """Also where each route pushes the other out of memory while threads run it."""
    needs_runtime(runtime)
    if runtime != "onnx":
        folder = export(tmp_path, runtime)
    model = ExportedModel(folder, threads=1, keep=keep)
    assert wrong_calls(model, ROUTES, CALLS if keep > 1 or runtime == "onnx" else 4) == 0
    assert len(model._loaded) <= keep


def test_a_route_is_loaded_once_for_all_threads(folder, monkeypatch):
    model, loads = ExportedModel(folder, threads=1, keep=2), []
    load = model._load
    monkeypatch.setattr(model, "_load", lambda *args: (loads.append(args[0]), load(*args))[1])
    with ThreadPoolExecutor(THREADS) as pool:
        [*pool.map(lambda _: model.set_route(ROUTES[1]), range(THREADS))]
    assert [*map(str, loads)] == ROUTES[1:]


@pytest.fixture(scope="module")
def second_active(tmp_path_factory):
    """A folder whose second route was active at the export, with class names."""
    anchors = [Anchor(spread(Plain(), seed), name, Preprocessing((SIZE, SIZE))) for seed, name in enumerate("ab")]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    model.add_stitches(ROUTES)
    model.set_route(ROUTES[1])
    export_routes(model, tmp_path_factory.mktemp("active") / "out", ROUTES)
    return tmp_path_factory.getbasetemp() / "active0" / "out"


def test_the_active_route_stays_active(second_active, tmp_path, arrays):
    """In the script, too; folders of earlier versions begin with the first route."""
    model = ExportedModel(second_active)
    assert str(model.active_route) == ROUTES[1]
    Image.fromarray(arrays[0]).save(tmp_path / "picture.png")
    command = [sys.executable, second_active / "run.py", tmp_path / "picture.png"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert printed == model.predict(arrays[0])[0]["label"]
    script, (first, second) = (second_active / "run.py").read_text(), model.profiled.metadata["files"].values()
    assert second["file"] in script and first["file"] not in script
    for file in second_active.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed_json(tmp_path, "profile.json", lambda data: data["metadata"].pop("active"))
    assert str(ExportedModel(tmp_path).active_route) == ROUTES[0]
    for wrong in ("a[:]", 3):
        changed_json(tmp_path, "profile.json", lambda data, wrong=wrong: data["metadata"].update(active=wrong))
        with pytest.raises(ValueError, match="active route .* is not one of its routes"):
            ExportedModel(tmp_path)


def test_the_script_without_a_picture(second_active):
    done = subprocess.run([sys.executable, second_active / "run.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "Usage: python run.py PICTURE" in done.stderr and not done.stdout


def test_what_an_onnx_file_says_of_itself(second_active):
    """For tools that know nothing of the folder: classes, preprocessing, a named batch, a version."""
    for route, entry in ExportedModel(second_active).profiled.metadata["files"].items():
        about = onnxruntime.InferenceSession(second_active / entry["file"]).get_modelmeta()
        values = about.custom_metadata_map
        assert about.version == 1 and values["route"] == route
        assert json.loads(values["labels"]) == [f"LABEL_{index}" for index in range(CLASSES)]
        assert json.loads(values["mean"]) == [0.0] * 3 and json.loads(values["std"]) == [1.0] * 3
        graph = onnx.load(second_active / entry["file"], load_external_data=False).graph
        names = {size.dim_param for each in (*graph.input, *graph.output) for size in each.type.tensor_type.shape.dim}
        assert names == {"batch", ""}
