"""recipes/check_gpu.py: what it calls a difference, its words without a GPU, and the whole of it on a processor."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).parents[2] / "recipes" / "check_gpu.py"
SPEC = importlib.util.spec_from_file_location("check_gpu", SCRIPT)
check_gpu = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_gpu)


def run(*options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True)


def test_differences():
    logits = torch.tensor([[1.0, 2.0], [4.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    reference = {"forward 0": logits, "forward 1": logits, "cascade": logits, "fit r2": torch.tensor([0.5, 0.7])}
    reference |= {"profile": torch.tensor([0.9]), "select": torch.tensor([[0.3, 0.4]]), "train 0": logits}
    assert check_gpu.differences(reference, reference) == dict.fromkeys(
        (kind for kind in check_gpu.TOLERANCES if kind != "fit: share of other classes"), 0.0
    )
    other = {name: value.clone() for name, value in reference.items()}
    other["forward 1"][2] = torch.tensor([2.0, 1.0])  # of another class; the largest logit is 4
    other["fit r2"][1] = 0.6
    other["select"][0, 1] = 0.3
    other["train 0"][0, 0] = float("nan")
    found = check_gpu.differences(reference, other)
    assert found["forward: logits, of the largest"] == 0.5 and found["forward: share of other classes"] == 0.25
    assert found["fit: R² of stitches"] == pytest.approx(0.1) == found["select: accuracies of pairs of cuts"]
    assert found["train: logits, of the largest"] == float("inf") and found["cascade: share of other classes"] == 0


def test_what_differs_is_shown(capsys):
    kind = "forward: logits, of the largest"
    assert check_gpu.show({"float32": {kind: 9e-4}, "bfloat16 autocast": {kind: 0.09}}, {"a": 2.0})
    assert not check_gpu.show({"float32": {kind: 2e-3}}, {}) and "2.0e-03 !" in capsys.readouterr().out
    expected = torch.tensor([[1.0, -4.0]])
    check_gpu.check_equal("graph", expected + 0.03, expected)
    with pytest.raises(ValueError, match=r"graph route's logits differ .* by 1.2e-02"):
        check_gpu.check_equal("graph", expected + 0.05, expected)


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator():
    for options, asked in (((), "no accelerator"), (("--device", "cuda"), "no cuda")):
        done = run(*options)
        lines = [line for line in done.stderr.splitlines() if "register_constant" not in line]  # of torchao, on import
        assert done.returncode == 2 and not done.stdout
        assert lines == [f"there is {asked} here: --device cpu compares the processor with itself"]


@pytest.mark.slow
def test_a_processor_equals_itself(tmp_path):
    done = run("--device", "cpu", "--quick", "--out", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["equal"] and len(found["ratios"]) == 8 and all(ratio > 0 for ratio in found["ratios"].values())
    assert [*found["differences"]] == ["float32", "bfloat16 autocast", "float32, two processes"]
    assert all(kinds.keys() == check_gpu.TOLERANCES.keys() for kinds in found["differences"].values())
    assert max(found["differences"]["float32"].values()) == 0  # the same machine twice
    assert max(found["differences"]["bfloat16 autocast"].values()) > 1e-3  # another precision indeed
    assert max(found["differences"]["float32, two processes"].values()) < 1e-5
