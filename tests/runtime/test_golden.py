"""Golden outputs: a good folder passes the check, one that changed or computes something else does not."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from exports import changed_json, export, without_checksums
from versions import needs_export

from restnet_hf import ExportedModel
from restnet_hf.runtime.golden import CHECK, IMAGES, MOST, PICTURE, difference, golden, made_images


pytestmark = needs_export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("golden"), "onnx")


@pytest.fixture
def folder(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "folder")
    return tmp_path / "folder"


def run_check(folder):
    done = subprocess.run([sys.executable, "run.py", "--check"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_good_folder(folder):
    model = ExportedModel(folder)
    assert max(model.check().values()) < 1e-4 and model.check().keys() == {*map(str, model.routes)}
    status, printed = run_check(folder)
    assert status == 0 and printed.startswith("changed files: none; logits off by")
    with (folder / "run.py").open("a") as script:
        script.write("# mine\n")  # people change their scripts
    assert run_check(folder)[0] == 0


def test_one_bit(folder):
    """In the last tensor of the weights, after the folder was loaded."""
    model = ExportedModel(folder)
    file = max((path for path in folder.iterdir() if path.suffix != ".json"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=file.name):
        model.check()
    status, printed = run_check(folder)
    assert status == 1 and file.name in printed


def test_another_computation(folder):
    """As on a processor that rounds otherwise, where all files are what they were."""

    def change(data):
        for logits in data["logits"].values():
            logits[1][0] += 3 * np.std(logits)

    changed_json(without_checksums(folder), CHECK, change)
    changed_json(folder, "profile.json", lambda data: data.update(sha256={}))
    with pytest.raises(ValueError, match="computes other logits here than at the export: off by .* 0.01 is allowed"):
        ExportedModel(folder).check()
    status, printed = run_check(folder)
    assert status == 1 and "none" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold a dict"),
        ('{"tolerance": 1}', "is invalid: KeyError"),
        ('{"tolerance": "x", "logits": {}}', "is invalid"),
        ('{"tolerance": 1, "logits": {}}', f"must hold logits of {IMAGES} images"),
        ('{"tolerance": 1, "logits": {"a[:]": [[1, [2]], [1, 2]]}}', "is invalid"),
        ('{"tolerance": 1, "logits": {"a[:]": [[1], [2]]}}', "does not fit the routes"),
        ("{", "Expecting"),
    ],
)
def test_strange_content(folder, content, message):
    (without_checksums(folder) / CHECK).write_text(content)
    with pytest.raises(ValueError, match=message):
        ExportedModel(folder).check()


def test_a_folder_without(folder):
    (without_checksums(folder) / CHECK).unlink()
    with pytest.raises(FileNotFoundError, match="earlier versions did not write; export it again"):
        ExportedModel(folder).check()


def test_made_images():
    """By the formula that the script has, in whole numbers; of the size that the preprocessing gives."""
    how = {"resize": 40, "crop": [12, 20], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1.0]}
    images = made_images(how)
    assert images.shape == (IMAGES, 3, 12, 20) and images.dtype == np.float32
    y, x, c, k = 11, 7, 2, 1
    assert images[k, c, y, x] == pytest.approx((eval(PICTURE) / 255 - 0.3) / 1.0, abs=1e-6)
    assert len(np.unique(images)) > 200 and not np.array_equal(images[0], images[1])
    with pytest.raises(ValueError, match="no fixed size"):
        made_images({**how, "crop": None})


def test_many_classes_are_thinned():
    logits = np.random.default_rng(0).standard_normal((IMAGES, 21_843)).astype(np.float32)
    content = json.loads(json.dumps(golden({"a[:]": logits}, "int8")))
    kept = np.float32(content["logits"]["a[:]"])
    assert kept.shape[1] <= MOST and content["tolerance"] == 0.5
    assert difference(logits, kept) < 1e-5 and difference(logits + 1, kept) == pytest.approx(1 / kept.std(), rel=1e-3)
    assert np.isinf(difference(logits[:, :5], kept)) and np.isnan(difference(logits * np.nan, kept))
