"""Processes share the images and the solving of a fit, which gives the stitches of one process."""

import os
import signal
import time

import numpy as np
import pytest
from several_processes import run_in_processes, start_processes


# in two batches of 32 and 5 images, or one, there are fewer than processes
FITS = """
import json
import torch
from accelerate import PartialState
from conftest import SIZE, make_anchor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from restnet_hf import StitchedModelForImageClassification, StitchConfig

many = torch.randn(37, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))
ROUTES = ["resnet[:2] + vit[1:]", "resnet[:4] + vit[3:]", "resnet[:6] + vit[2:]"]


class Rows(Dataset):  # augmented at random
    def __len__(self):
        return len(many)

    def __getitem__(self, index):
        return many[index] + 0.1 * torch.randn(3, SIZE, SIZE)


class Stream(IterableDataset):
    def __iter__(self):
        yield from many


def shuffled():
    torch.manual_seed(PartialState().process_index)  # the order of the main process counts
    return DataLoader(TensorDataset(many), batch_size=8, shuffle=True)


def own_generator():
    generator = torch.Generator().manual_seed(PartialState().process_index)
    return DataLoader(TensorDataset(many), batch_size=8, shuffle=True, generator=generator)


def seeded(rows):
    torch.manual_seed(3 + PartialState().process_index)
    return rows


WAYS = {
    "tensor": lambda: (many, {"batch_size": 8}),
    "two batches": lambda: (many, {"batch_size": 32}),
    "one batch": lambda: (many, {"batch_size": 64}),
    "one ridge": lambda: (many, {"batch_size": 8, "ridge": 1e-2}),
    "data set": lambda: (TensorDataset(many), {"batch_size": 8}),
    "augmented": lambda: (seeded(Rows()), {"batch_size": 8}),
    "loader": lambda: (DataLoader(TensorDataset(many), batch_size=7), {}),
    "shuffled": lambda: (shuffled(), {}),
    "its own generator": lambda: (own_generator(), {}),
    "stream": lambda: (DataLoader(Stream(), batch_size=5), {}),
    "generator": lambda: ((batch for batch in many.split(6)), {}),
    "list": lambda: ([{"pixel_values": batch} for batch in many.split(6)], {}),
}
found = {}
for name, way in WAYS.items():
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), order="given"
    )
    model.add_stitches(ROUTES, StitchConfig(class_token="learn" if name == "list" else "pool"))
    data, options = way()
    r2 = model.fit_stitches(data, **options)
    weights = {key: value.double().flatten().tolist() for key, value in model.stitches.state_dict().items()}
    found[name] = [r2, weights, model.config.training[-1]["images"], [e["r2"] for e in model.config.stitches.values()]]
errors = []
for bad in ([], torch.zeros(0, 3, SIZE, SIZE), torch.full((20, 3, SIZE, SIZE), float("nan"))):
    try:
        model.fit_stitches(bad, batch_size=8)
    except ValueError as error:
        errors.append(str(error))
if PartialState().is_main_process:
    print(json.dumps([PartialState().num_processes, found, errors]))
"""


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path):
    """R² to 1e-9 and weights to the rounding of float32, with data of every form; three errors on all processes."""
    (one, expected, errors), *others = run_in_processes(FITS, tmp_path)
    assert one == 1 and len(errors) == 3 and "NaN" in errors[2]
    for number, (processes, found, raised) in enumerate(others, 2):
        assert processes == number and raised == errors and found.keys() == expected.keys()
        for name, (r2, weights, images, recorded) in expected.items():
            assert found[name][2] == images == 37, name
            assert found[name][0] == pytest.approx(r2, rel=1e-9, abs=1e-9), name
            assert found[name][3] == pytest.approx(recorded, rel=1e-9, abs=1e-9), name
            for key, values in weights.items():
                scale = max(map(abs, values))
                assert np.allclose(found[name][1][key], values, rtol=0, atol=1e-6 * scale), f"{name}: {key}"


SUMS = """
import json
import torch
from accelerate import PartialState
from restnet_hf.distributed import this_process
from restnet_hf.stitches.least_squares import LeastSquares, Moments, _Job, _merge

rng = torch.Generator().manual_seed(0)
x = torch.randn(500, 12, generator=rng, dtype=torch.float64) * torch.logspace(0, -3, 12, dtype=torch.float64) + 1e4
y = torch.randn(500, 7, generator=rng, dtype=torch.float64) - 3
parts = list(zip(x.split([7, 1, 300, 192]), y.split([7, 1, 300, 192])))
state, found = this_process(), []
for used in (4, 2, 1):
    job = _Job("a", None)
    for number, (rows_x, rows_y) in enumerate(parts[:used]):
        if number % state.num_processes == state.process_index:
            (job.held if number == 1 else job.fit).update(rows_x, rows_y)
    owner, = _merge([job], torch.device("cpu"))
    assert owner == 0
    moments = [None if s.moments is None else [s.rows, *(m.flatten().tolist() for m in s.moments[1:])]
               for s in (job.fit, job.held)]
    found.append([moments, job.shortage])
if state.is_main_process:
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_moments_add_up_in_float64(tmp_path):
    """To 1e-9 of the largest moment in spite of an offset of 1e7 standard deviations, of parts of any size or none."""
    one, *others = run_in_processes(SUMS, tmp_path)
    for found in others:
        for (moments, shortage), (expected, expected_shortage) in zip(found, one, strict=True):
            assert shortage == expected_shortage
            for mine, theirs in zip(moments, expected, strict=True):
                assert (mine is None) == (theirs is None)
                for a, b in zip(mine[1:], theirs[1:], strict=True) if mine else ():
                    assert mine[0] == theirs[0]
                    assert np.allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


DEATH = """
import os, sys
from pathlib import Path
import torch
from conftest import SIZE, make_anchor
from restnet_hf import StitchedModelForImageClassification
from restnet_hf.distributed import this_process

model = StitchedModelForImageClassification.from_anchors(
    make_anchor("resnet"), make_anchor("vit", seed=1), order="given"
)
model.add_stitch("resnet[:2] + vit[1:]")


def endless():
    for number in range(10**9):
        if number == 3 and this_process().process_index == 1:
            Path("rank").write_text(str(os.getpid()))
        yield torch.zeros(1, 3, SIZE, SIZE)


model.fit_stitches(endless())
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_all(tmp_path):
    """Killed in the middle of a pass, without a last word: the others, who would wait for it, are ended too."""
    (tmp_path / "job.py").write_text(DEATH)
    launcher = start_processes(tmp_path / "job.py", 3)
    while not (rank := tmp_path / "rank").exists() or not rank.read_text():
        assert launcher.poll() is None, launcher.communicate()[1][-3000:]
        time.sleep(0.1)
    os.kill(int(rank.read_text()), signal.SIGKILL)
    began = time.monotonic()
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0 and time.monotonic() - began < 90
