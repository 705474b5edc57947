"""A training's numbers are written line by line, by one process, and every line is JSON."""

import json
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from restnet_hf.training.tracking import EXTRAS, JsonlTracker, trackers


def no_such_number(text):
    raise AssertionError(f"{text} is not JSON")


def lines(folder):
    text = (folder / "log.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=no_such_number) for line in text.splitlines()]


def run(folder, config, *steps):
    """What a training does with its trackers."""
    accelerator = Accelerator(cpu=True, log_with=trackers(None, folder))
    accelerator.init_trackers("anything", config=config)
    for step, values in enumerate(steps, 1):
        accelerator.log(values, step)
    for tracker in accelerator.trackers:
        tracker.finish()


def test_a_run_is_written(tmp_path):
    before = time.time()
    run(tmp_path / "new" / "folder", {"learning_rate": 0.1, "seed": 3}, {"loss": 2.5, "who": "me"}, {"loss": 0.5})
    first, *rest = lines(tmp_path / "new" / "folder")
    assert first == {"config": {"learning_rate": 0.1, "seed": 3}}
    times = [row.pop("time") for row in rest]
    assert rest == [{"step": 1, "loss": 2.5, "who": "me"}, {"step": 2, "loss": 0.5}]
    assert before <= times[0] <= times[1] <= time.time()


VALUES = {
    "tensor": (torch.tensor(0.25, requires_grad=True), 0.25),
    "bfloat16": (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    "whole": (torch.tensor(7), 7),
    "vector": (torch.tensor([1.0, float("nan")]), [1.0, "nan"]),
    "numpy": (np.float32(0.5), 0.5),
    "numpy whole": (np.int64(4), 4),
    "truth": (np.bool_(True), True),
    "array": (np.array([[1, 2]]), [[1, 2]]),
    "nan": (float("nan"), "nan"),
    "inf": (torch.tensor(float("inf")), "inf"),
    "-inf": (-np.inf, "-inf"),
    "nothing": (None, None),
    "nested": ({3: (1, np.float64("inf"))}, {"3": [1, "inf"]}),
    "text": ("ä\n", "ä\n"),
    "object": (torch.float16, "torch.float16"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(tmp_path, name):
    value, expected = VALUES[name]
    run(tmp_path, {"it": value}, {"it": value})
    config, row = lines(tmp_path)
    assert config["config"]["it"] == row["it"] == expected and type(row["it"]) is type(expected)


def test_each_line_is_there_at_once(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.start()
    tracker.log({"loss": 1.0}, 1)
    assert [row["step"] for row in lines(tmp_path)] == [1]
    tracker.log({"loss": 1.0})
    assert [row["step"] for row in lines(tmp_path)] == [1, None]
    file = tracker.tracker
    tracker.finish()
    assert file.closed and tracker.tracker is None
    tracker.finish()


def test_a_resumed_run_goes_on(tmp_path):
    run(tmp_path, {"seed": 1}, {"loss": 3.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # killed there
    run(tmp_path, {"seed": 1}, {"loss": 2.0})
    assert [row.get("loss", row.get("config")) for row in lines(tmp_path)] == [{"seed": 1}, 3.0, {"seed": 1}, 2.0]


def of_two(folder):
    """What each of two processes does."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the test process
    accelerator = Accelerator(cpu=True, log_with=trackers("jsonl", folder))
    assert accelerator.num_processes == 2
    accelerator.init_trackers("anything", config={"seed": 0})
    accelerator.log({"process": accelerator.process_index}, 1)
    (tracker,) = accelerator.log_with
    tracker.start()  # also where Accelerate would not
    tracker.log({"process": accelerator.process_index}, 2)
    assert (tracker.tracker is None) == (accelerator.process_index == 1)
    accelerator.end_training()


def test_only_the_main_process_writes(tmp_path):
    debug_launcher(of_two, (tmp_path,), num_processes=2)
    assert [row.get("process") for row in lines(tmp_path)] == [None, 0, 0]


@pytest.mark.parametrize("log_with", [None, "jsonl", ["jsonl"], ("none", "jsonl")])
def test_our_tracker_is_meant(tmp_path, log_with):
    (found,) = trackers(log_with, tmp_path)
    assert isinstance(found, JsonlTracker) and found.path == tmp_path / "log.jsonl"
    assert not list(tmp_path.iterdir()), "nothing is written before the run begins"


def test_no_tracker_is_meant(tmp_path):
    assert trackers(None, None) is trackers("none", tmp_path) is trackers(["none"], tmp_path) is None
    assert trackers([], tmp_path) is None
    with pytest.raises(ValueError, match="log_with='jsonl' writes to a folder, and there is none; give an output_dir"):
        trackers(["jsonl"], None)


def test_others_pass(tmp_path):
    class Mine(GeneralTracker):
        name, requires_logging_directory, tracker = "mine", False, None

        def log(self, values, step=None, **kwargs):
            self.seen = values

    own = Mine()
    assert trackers(own, None) == [own] and trackers(["wandb", own], None) == ["wandb", own]
    accelerator = Accelerator(cpu=True, log_with=trackers([own, "jsonl"], tmp_path))
    accelerator.init_trackers("anything")
    accelerator.log({"loss": 1.0}, 1)
    assert own.seen == {"loss": 1.0} and lines(tmp_path)[0]["loss"] == 1.0
    for tracker in accelerator.trackers:
        tracker.finish()


@pytest.mark.parametrize("name", EXTRAS)
def test_what_is_not_installed(tmp_path, monkeypatch, name):
    for package in (name, f"{name}X"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    for asked in (name, LoggerType(name)):
        with pytest.raises(ValueError, match=rf"log_with='{name}' needs .*: pip install restnet-hf\[{name}\]"):
            trackers(["jsonl", asked], tmp_path)


@pytest.mark.parametrize("name", EXTRAS)
def test_what_is_installed(tmp_path, monkeypatch, name):
    """A package is there when Python finds it and its version."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / f"{name}-9.0.dist-info").mkdir()
    (tmp_path / f"{name}-9.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert trackers(name, tmp_path) == [name]
