"""A process of several that is killed ends the others soon, and what the launcher prints names its rank."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


JOB = """
import os
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from conftest import CLASSES, SIZE, make_anchor
from restnet_hf import StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.distributed import this_process

state = this_process()
assert state.num_processes == 2 and torch.distributed.get_backend() == "gloo"


class Endless(torch.utils.data.Dataset):
    repeatable, read = True, 0

    def __len__(self):
        return 10**6

    def __getitem__(self, index):
        self.read += 1
        if self.read == 200:
            Path(f"{state.process_index}.new").write_text(str(os.getpid()))
            Path(f"{state.process_index}.new").rename(f"{state.process_index}.pid")
        return torch.zeros(3, SIZE, SIZE), index % CLASSES


anchors = make_anchor("resnet"), make_anchor("vit", seed=1)
model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
model.add_stitch("resnet[:2] + vit[1:]")
if sys.argv[1] == "train":
    train(model, Endless(), TrainArgs(batch_size=8, keep="last", max_steps=10**5, teacher="resnet"))
elif sys.argv[1] == "fit_stitches":
    model.fit_stitches(Endless())
else:
    model.profile(Endless())
"""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
LAUNCH += ["--dynamo_backend=no", "--main_process_port=0"]


def is_running(pid):
    """Whether a process exists and has not ended."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_one(job, folder, rank, printed):
    """Kill a process in the middle of its work, and wait for the launcher to end; returns the ids of all."""
    files, until = [folder / f"{index}.pid" for index in range(2)], time.monotonic() + 300
    while not all(file.exists() for file in files):
        assert job.poll() is None and time.monotonic() < until, printed.read_text()[-3000:]
        time.sleep(0.1)
    pids = [int(file.read_text()) for file in files]
    os.kill(pids[rank], signal.SIGKILL)
    job.wait(60)
    return pids


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("method", "launcher", "rank"),
    [
        ("train", TORCHRUN, 0),
        ("train", LAUNCH, 1),
        ("fit_stitches", LAUNCH, 0),
        ("fit_stitches", TORCHRUN, 1),
        ("profile", TORCHRUN, 0),
        ("profile", LAUNCH, 1),
    ],
    ids=lambda value: value[0].split(".")[0] if isinstance(value, list) else value,
)
def test_a_killed_process_ends_all_and_is_named(method, launcher, rank, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    command, printed = [sys.executable, "-m", *launcher, "job.py", method], tmp_path / "printed"
    options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.STDOUT}
    with printed.open("w") as file, subprocess.Popen(command, stdout=file, **options) as job:
        try:
            pids = kill_one(job, tmp_path, rank, printed)
        finally:
            job.terminate()
    assert job.returncode != 0 and not any(map(is_running, pids))
    text = printed.read_text()
    assert re.search(rf"rank +: {rank} .*\n *exitcode +: -9 .*SIGKILL", text), text[-3000:]
