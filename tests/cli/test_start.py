"""The command line starts at once, without torch; errors and statuses are where scripts expect them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from restnet_hf.cli import app
from restnet_hf.cli.flags import in_flags
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.runtime import RUNTIMES


WITHOUT_TORCH = """
import os, sys, time
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers", "datasets", "timm", "numpy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from restnet_hf.cli import app
for words in sys.argv[1:]:
    try:
        app(words.split())
    except SystemExit as end:
        print(f"status {end.code}", flush=True)
"""
COMMANDS = ("demo", "train", "similarity", "predict", "profile", "measure", "adapt", "export", "find", "push")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_and_typos_need_no_torch(tmp_path):
    """They took 7 s of processor when they imported it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.json").touch()
    right = ["--help", "--version", *(f"{command} --help" for command in COMMANDS)]
    wrong = ["trian", "demo --outt x", "demo --front timm/x", "train none.yaml --out o", "predict a none.png"]
    wrong += ["adapt a --data d --budget speed=3", "export a --out o --route r --pareto"]
    run = [sys.executable, "-c", WITHOUT_TORCH, *right, *wrong, "demo --out full", "measure ./none"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0"] * len(right) + ["status 2"] * len(wrong) + ["status 1"] * 2, done.stderr
    assert "restnet-hf 0." in done.stdout and "Did you mean 'train'" in done.stderr
    assert "full exists already; give --overwrite" in done.stderr and "no such folder: ./none" in done.stderr
    assert "error" not in done.stdout.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_script_is_the_app():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == dict.fromkeys(("restnet-hf", "hf-restnet"), "restnet_hf.cli:app")


def test_every_runtime_is_in_the_help():
    text = " ".join(invoke("export", "--help").output.replace("│", "").split())
    assert all(name in text.partition("--runtime")[2].partition("--precision")[0] for name in RUNTIMES)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("max_routes=0 must be at least 1", ["max_routes"], "--max-routes 0 must be at least 1"),
        ("go on with resume_from_checkpoint=True, or", ["resume", "out"], "go on with --resume, or"),
        ("choose another output_dir", ["resume", "out"], "choose another --out"),
        ("method='magic' is not one of ['a']", ["method"], "--method 'magic' is not one of ['a']"),
        ("pass standalone=True", ["standalone"], "pass --standalone"),
        ("stitches.sampler='x', macs<=10", ["sampler", "macs"], "stitches.sampler='x', macs<=10"),
        ("augment='blur' is wrong", ["out"], "augment='blur' is wrong"),
        ("not known; call profile() first", [], "not known; run `restnet-hf profile ADAPTER --data DIR_OR_ID` first"),
    ],
)
def test_messages_name_flags(text, options, expected):
    assert in_flags(text, options) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure", "./none"], "there is no such folder: ./none"),
        (["adapt", "runs/x/adapter", "--data", "/no/where", "--budget", "macs=1"], "runs/x/adapter, /no/where"),
        (["measure", "my-stitch"], "There is no folder 'my-stitch' in"),
        (["demo", "--front", "../a", "--end", END, "--dataset", DATA], "there is no such folder: ../a"),
        (["demo", "--front", "nobody/none", "--end", END, "--dataset", DATA], "cannot be loaded"),
    ],
)
def test_a_missing_folder_is_called_one(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 1 and message in result.stderr and result.stdout == ""
    assert not ("no such folder" in message and "Hub" in result.stderr)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "r.yaml", "--out", "out"],
        ["demo", "--out", "out"],
        ["similarity", FRONT, END, "--dataset", DATA, "--out", "out"],
        ["export", "me/a", "--out", "out"],
        ["adapt", "me/a", "--data", DATA, "--budget", "macs=1e9", "--out", "out"],
        ["measure", "me/a", "--out", "out/old"],
        ["profile", "me/a", "--data", DATA, "--out", "out/old"],
    ],
)
def test_nothing_is_overwritten_unasked(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("mine")
    result = invoke(*arguments)
    assert result.exit_code == 1 and "exists already; give --overwrite" in result.stderr
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_interrupted_run_may_be_resumed(tmp_path):
    (tmp_path / "training" / "stitches").mkdir(parents=True)
    result = invoke("demo", "--out", tmp_path)
    assert result.exit_code == 1 and "--resume to go on with the run in it" in result.stderr
    both = invoke("demo", "--out", tmp_path, "--resume", "--overwrite")
    assert both.exit_code == 2 and "not both" in both.stderr


def test_an_error_can_be_traced(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTNET_HF_DEBUG", "1")
    assert isinstance(invoke("measure", "./none").exception, FileNotFoundError)
