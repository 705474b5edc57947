"""Exported folders that are damaged, or untrusted: documented errors, and nothing runs or is written."""

import contextlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import traceback

import numpy as np
import pytest
from exports import ROUTES, changed_json, export, images, is_installed, without_checksums
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import ODD, Trap, places, put
from PIL import Image
from versions import needs_export

from restnet_hf import ExportedModel
from restnet_hf.runtime.exported_files import MAX_MESSAGE, exported_checksums, read_labels, read_preprocessing
from restnet_hf.runtime.exported_model import prepare_image
from restnet_hf.runtime.runners import RUNTIMES


pytestmark = needs_export
DAMAGES = 320  # of folders, a quarter for each runtime
PREPROCESSING = {"resize": [64, 64], "crop": None, "resample": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    return export(tmp_path_factory.mktemp("folders"), "onnx")


# Loads, switches and runs folders, and writes a line before and after each, so that one that crashes it is known.
WATCHED = """
import json, os, sys, time
import numpy as np
from pathlib import Path
from restnet_hf import ExportedModel
from restnet_hf.runtime.runners import MissingRuntimeError
good, folders, count, results = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), open(sys.argv[5], "w")
images, seen = np.zeros((2, 3, 64, 64), np.float32), []
for runtime in sorted(good.iterdir()):
    ExportedModel(runtime)(images)  # which imports the runtime, and that may do what it likes
RUNNING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
WRITING = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
def watch(event, args):
    writes = event == "open" and (set(args[1]) & set("wax+") if args[1] else args[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and not str(args[0]).startswith("/dev/") or event in (*RUNNING, *WRITING, "pickle.find_class"):
        seen.append([event, str(args)])
sys.addaudithook(watch)
for index in range(int(sys.argv[4]), count):
    print(f"start {index}", file=results, flush=True)
    del seen[:]
    start = time.monotonic()
    try:
        model = ExportedModel(folders / str(index))
        for route in model.routes:
            model.set_route(route)
            model(images)
        said = "loaded"
    except (OSError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    except BaseException as error:
        said = f"UNDOCUMENTED {type(error).__name__}: {error}"
    print(json.dumps([index, said, seen, time.monotonic() - start]), file=results, flush=True)
"""


def damage(source, folder, rng, secret):
    """A copy of a folder in which one thing is wrong, and what; half have no checksums, as hostile ones may."""
    shutil.copytree(source, folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "run.py")
    models = [file for file in files if file.suffix != ".json"]
    kind = rng.choice(["json"] * 4 + ["flip"] * 2 + ["cut", "swap", "remove", "link", "pickle", "text", "folder"])
    file = rng.choice(models if kind == "flip" else files)
    if kind == "json":
        file = rng.choice([file for file in files if file.suffix == ".json"])
        data = json.loads(file.read_text())
        file.write_text(json.dumps(put(data, rng.choice(places(data)), rng.choice(ODD))))
    elif kind == "flip":
        raw = bytearray(file.read_bytes())
        for _ in range(rng.choice([1, 1, 4, 64])):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    elif kind == "swap":
        shutil.copyfile(rng.choice(files), folder / "other")
        os.replace(folder / "other", file)
    elif kind == "text":
        file.write_text(rng.choice(["", "[]", "{}", "null", "[" * 100_000, "\x00\xff", "1" * 5000, "x" * 2**20]))
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Trap(str(secret))))
    else:
        file.unlink()
        if kind == "link":
            file.symlink_to(rng.choice([secret, "/dev/zero", "/etc/passwd", source / file.name, "missing"]))
        elif kind == "folder":
            file.mkdir()
    hostile = rng.random() < 0.5
    if hostile and not (folder / "profile.json").is_symlink():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            without_checksums(folder)
    return f"{kind} {file.name}{' hostile' if hostile else ''}"


def run_all(source, folders, count):
    """What came of each folder, and which crashed the process of their runtime."""
    said, crashed, start = {}, [], 0
    report = folders / "report"
    while start < count:
        arguments = [str(source), str(folders), str(count), str(start), str(report)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", WATCHED, *arguments], capture_output=True, text=True, timeout=300
        )
        lines = report.read_text().splitlines()
        said |= {index: rest for index, *rest in (json.loads(line) for line in lines if line.startswith("["))}
        if done.returncode == 0:
            break
        assert lines, done.stderr[-3000:]
        crashed.append(int(lines[-1].split()[1]))
        start = crashed[-1] + 1
    return said, crashed


def snapshot(folder):
    """Every file, folder and link below, with its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != "report":
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path)] = (path.lstat().st_mode, content)
    return found


@pytest.mark.slow
def test_damaged_and_hostile_folders(onnx, tmp_path):
    """Documented errors alone, of bounded length; no process, pickle or file; no crash of a runtime; quickly."""
    sources = [onnx] + [
        export(onnx.parent, runtime) for runtime in RUNTIMES if runtime != "onnx" and is_installed(runtime)
    ]
    rng, trap, folders = random.Random(7), tmp_path / "trap", tmp_path / "many"
    folders.mkdir()
    kinds = [damage(sources[i % len(sources)], folders / str(i), rng, trap) for i in range(DAMAGES)]
    before = snapshot(tmp_path)
    said, crashed = run_all(onnx.parent, folders, DAMAGES)
    # ExecuTorch checks some of a program alone; where there are checksums, it is not given one that has changed
    assert all(kinds[index].endswith("model.pte hostile") for index in crashed), [kinds[index] for index in crashed]
    for index, (message, seen, seconds) in said.items():
        assert not message.startswith("UNDOCUMENTED") and not seen and seconds < 10, (kinds[index], message, seen)
        assert len(message) < 2 * MAX_MESSAGE + 1000
    assert snapshot(tmp_path) == before and not trap.exists()
    loaded = sum(message == "loaded" for message, *_ in said.values())
    assert len(said) + len(crashed) == DAMAGES and 10 < loaded < DAMAGES / 2


def copied(source, tmp_path, **changes):
    """A folder without checksums and with other metadata."""
    folder = without_checksums(shutil.copytree(source, tmp_path / "copied", dirs_exist_ok=True))
    changed_json(folder, "profile.json", lambda data: data["metadata"].update(changes))
    return folder


def test_folders_of_earlier_versions_load(onnx, tmp_path):
    """They have no checksums."""
    assert np.array_equal(ExportedModel(copied(onnx, tmp_path))(images()), ExportedModel(onnx)(images()))


def test_checksums(onnx, tmp_path):
    """Files that changed, or are of another export, are named; the script may change."""
    for name in exported_checksums((onnx / "profile.json").read_bytes()):
        folder = shutil.copytree(onnx, tmp_path / name)
        (folder / "run.py").write_text("")
        model = ExportedModel(folder)
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        with pytest.raises(ValueError, match=f"{name} is not the file that was exported.*'sha256' of profile.json"):
            [ExportedModel(folder).set_route(route) for route in ROUTES]
        assert model(images()).shape == (2, 5)  # it was loaded before


def test_an_export_that_was_killed_over_another(onnx, tmp_path):
    """All that is read is of the new one from the moment that its profile is there, and reading changes nothing."""
    old, new = shutil.copytree(onnx, tmp_path / "old"), shutil.copytree(onnx, tmp_path / "new")
    changed_json(old, "labels.json", lambda labels: labels.reverse())
    for route in ExportedModel(onnx).routes:  # what an old model would answer
        (old / ExportedModel(onnx)._entries[route]["file"]).write_bytes(b"old")
    shutil.move(new, old / ".x.pending")
    shutil.copy(old / ".x.pending" / "profile.json", old / "profile.json")
    files = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    model, expected = ExportedModel(old), ExportedModel(onnx)
    for route in expected.routes:
        assert model.set_route(route) == expected.set_route(route)
        assert np.array_equal(model(images()), expected(images()))
    assert model.labels == expected.labels and {path: path.stat().st_mtime_ns for path in old.rglob("*")} == files


def test_exported_to_again_since(onnx, tmp_path):
    folder = shutil.copytree(onnx, tmp_path / "folder")
    model = ExportedModel(folder)
    changed_json(folder, "profile.json", lambda data: data["metadata"].update(date="later"))
    with pytest.raises(OSError, match="was exported to again since it was loaded; load it anew"):
        model.set_route(ROUTES[1])
    assert model(images()).shape == (2, 5)


def test_a_failed_switch_leaves_the_route(onnx, tmp_path):
    folder = shutil.copytree(onnx, tmp_path / "folder")
    model = ExportedModel(folder)
    expected = model(images())
    (folder / "a_2_b_2.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="a_2_b_2.onnx"):
        model.set_route(ROUTES[1])
    assert str(model.active_route) == ROUTES[0] and np.array_equal(model(images()), expected)


def test_the_caller_picks_runtimes(onnx):
    """profile.json alone does not."""
    assert ExportedModel(onnx, runtimes=["onnx"]).runtime == "onnx"
    assert ExportedModel.from_pretrained(onnx, runtimes="onnx").runtime == "onnx"
    with pytest.raises(ValueError, match="exported for runtime 'onnx', and only \\['openvino'\\] may run it"):
        ExportedModel.from_pretrained(onnx, runtimes=["openvino"])
    for runtimes in (["pickle"], ["onnx", "pickle"], [], "pickle"):
        with pytest.raises(ValueError, match="must be some of"):
            ExportedModel(onnx, runtimes=runtimes)


@pytest.mark.parametrize("batch_size", [0, -1, True, 1.5, "2", 60_000, 2**40, [1]])
def test_batch_sizes(onnx, tmp_path, batch_size):
    with pytest.raises(ValueError, match="batch_size=.* must be null or a whole number from 1 to 4096"):
        ExportedModel(copied(onnx, tmp_path, batch_size=batch_size))


def test_sizes_that_the_model_does_not_take(tmp_path):
    """The runtime's own shape is compared with what the folder says."""
    source = export(tmp_path, "onnx", batch_size=2)
    assert ExportedModel(source)(images(3)).shape == (3, 5)
    for batch_size in (None, 1, 4096):
        with pytest.raises(ValueError, match=r"takes images of shape \(2, 3, 64, 64\), the folder prepares"):
            ExportedModel(copied(source, tmp_path, batch_size=batch_size))
    folder = copied(source, tmp_path, batch_size=2)
    changed_json(folder, "preprocessing.json", lambda how: how.update(crop=[64, 32]))
    with pytest.raises(ValueError, match=r"the folder prepares \(2, 3, 64, 32\)"):
        ExportedModel(folder)


NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3), st.just(10**400))
SIZES = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3), st.sampled_from([64, [64, 64], 100_000, [1, 100_000]]))


@settings(max_examples=300, deadline=None)
@given(
    resize=SIZES,
    crop=SIZES,
    resample=st.one_of(NUMBERS, st.sampled_from(["bicubic", "__class__", "BOX", []])),
    mean=st.one_of(NUMBERS, st.lists(NUMBERS, min_size=2, max_size=4)),
    std=st.one_of(NUMBERS, st.lists(NUMBERS, min_size=2, max_size=4)),
    changed=st.sets(st.sampled_from(sorted(PREPROCESSING)), min_size=1),
)
def test_any_preprocessing(tmp_path_factory, changed, **values):
    """Refused, or it prepares any picture as finite numbers, of no more than the largest size."""
    folder = tmp_path_factory.getbasetemp()
    how = PREPROCESSING | {key: values[key] for key in changed}
    (folder / "preprocessing.json").write_text(json.dumps(how))
    try:
        read = read_preprocessing(folder)
    except ValueError:
        return
    prepared = prepare_image(Image.new("L", (3, 2), 100), read)
    assert prepared.dtype == np.float32 and np.isfinite(prepared).all() and prepared.size <= 3 * 4096**2


def test_pictures_that_would_be_too_large():
    for size in ((1, 60_000), (0, 5), (5, 0)):
        with pytest.raises(ValueError, match="would be resized to"):
            prepare_image(Image.new("L", size), PREPROCESSING | {"resize": 4096})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "has no labels"),
        ([{"a": 1}], "among its labels"),
        ([1.5], "among its labels"),
        ([None], "among its labels"),
        (["x" * 2**24], "is too large: 16777216 bytes"),
        ([["x" * 2**20]], "among its labels"),
        ({"0": "x"}, "must hold a list"),
    ],
)
def test_labels(tmp_path, labels, message):
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=message) as caught:
        read_labels(tmp_path)
    assert len(str(caught.value)) < MAX_MESSAGE + 500


def test_as_many_labels_as_logits(onnx, tmp_path):
    folder = copied(onnx, tmp_path)
    (folder / "labels.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match=r"shape \(2, 5\), but labels.json has 2 labels"):
        ExportedModel(folder)(images())


@pytest.mark.parametrize("key", ["runtime", "precision", "batch_size", "threads", "files"])
def test_long_metadata(onnx, tmp_path, key):
    """None of it comes back whole."""
    long = "x" * 2**20
    for value in (long, [long], {long: long}, {ROUTES[0]: long}, {ROUTES[0]: {"file": long}, ROUTES[1]: {}}):
        try:
            ExportedModel(copied(onnx, tmp_path, **{key: value}))
        except ValueError as error:
            assert len("".join(traceback.format_exception(error))) < 10_000
        else:
            assert key == "precision" and value == long


def test_links_and_pipes(onnx, tmp_path):
    """A link that leaves the folder is refused, but for those in the cache of the Hub; a pipe is not waited for."""
    for name in ("a_1_b_1.onnx", "labels.json", "profile.json"):
        folder = shutil.copytree(onnx, tmp_path / name)
        (folder / name).unlink()
        (folder / name).symlink_to(onnx / name)
        with pytest.raises(ValueError, match="is a link to .*, which is not in the folder"):
            ExportedModel(folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match="is not a file"):
            ExportedModel(folder)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "main", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(onnx, snapshot)
    for file in ("labels.json", "profile.json"):
        os.replace(snapshot / file, blobs / file)
        (snapshot / file).symlink_to(blobs / file)
    assert ExportedModel(snapshot).labels


@pytest.mark.parametrize(
    "location", ["../../../../../../../../etc/passwd", "/etc/passwd", "link", "sub/../../weights.bin"]
)
def test_weights_outside_of_the_folder(onnx, tmp_path, location):
    """ONNX Runtime itself refuses them."""
    import onnx as library

    folder = copied(onnx, tmp_path)
    (folder / "link").symlink_to("/etc/passwd")
    shutil.copyfile(onnx / "weights.bin", tmp_path / "weights.bin")
    graph = library.load(folder / "a_1_b_1.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "a_1_b_1.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ValueError, match="cannot be loaded by onnx: .*(escapes|Absolute)"):
        ExportedModel(folder)


# Exports, quantises and runs in a process of its own, as a user does, with an empty home folder.
QUIET = """
import os, sys
from pathlib import Path
home, out, seen = Path(os.environ["HOME"]), Path(sys.argv[1]), []
def watch(event, args):
    writes = event == "open" and (set(args[1]) & set("wax+") if args[1] else args[2] & (os.O_WRONLY | os.O_RDWR))
    if (writes or event == "os.mkdir") and str(home) in str(args[0]):
        seen.append([event, str(args)])
    elif event in ("socket.connect", "socket.getaddrinfo", "os.fork") or event == "_thread.start_new_thread":
        seen.append([event, str(args)])
sys.addaudithook(watch)
from exports import changed_json, export, images
import torch
from restnet_hf import ExportedModel
export(out, "openvino", precision="int8", data=torch.from_numpy(images(24)), calibration_images=4, min_agreement=0)
ExportedModel(out / "openvino")(images())
seen = [each for each in seen if "tqdm" not in str(each)]
assert not seen and not list(home.iterdir()) and "openvino_telemetry" not in sys.modules, seen
"""
# What a program agreed to itself, before it used us, is off while we work, and on again.
AGREED = """
import openvino_telemetry
from restnet_hf.runtime.runners import import_for_runtime, without_telemetry
reporter = openvino_telemetry.Telemetry("app", "1", "G-X", backend="ga4", enable_opt_in_dialog=False)
assert reporter.consent
with without_telemetry():
    assert not reporter.consent
    try:
        import openvino_telemetry as again
    except ImportError:
        again = None
    assert again is None
assert reporter.consent and __import__("openvino_telemetry") is openvino_telemetry
assert import_for_runtime("onnxruntime", "onnx") and reporter.consent
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [QUIET, AGREED])
def test_no_telemetry(tmp_path, code):
    """Exporting to OpenVINO, quantising and running report nothing and leave nothing in the home folder."""
    (tmp_path / "home").mkdir()
    environment = os.environ | {"HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path), "CI": ""}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
