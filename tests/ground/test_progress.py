"""Bars are for terminals."""

import io
import sys

import datasets
import pytest
import torch
from transformers.utils import logging

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.data.datasets import batches, load_images
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def bars():
    logging.enable_progress_bar()
    yield
    logging.disable_progress_bar()  # as conftest does


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_bars_are_shown_on_terminals_only(monkeypatch, kind):
    monkeypatch.setattr(sys, "stderr", kind())
    assert [*progress_bar([1, 2], "step")] == [1, 2]
    with progress_bar(desc="by hand", total=3) as bar:
        bar.update()
        bar.set_postfix(loss="0.1")
    assert len([*batches(torch.zeros(4, 3, 8, 8), 2, "images")]) == 2
    written = sys.stderr.getvalue()
    assert all(name in written for name in ("step", "by hand", "images")) if kind is Terminal else written == ""


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_bars_of_libraries_are_shown_on_terminals_only(monkeypatch, tmp_path, kind):
    """Those of loading, of data sets and of saving; the libraries' own settings are as they were."""
    monkeypatch.setattr(sys, "stderr", kind())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.enable_progress_bars()
    load_images(DATA, "test")
    StitchedModelForImageClassification.from_anchors(FRONT, END).save_pretrained(tmp_path / "adapter")
    written = sys.stderr.getvalue()
    assert ("Loading weights" in written and "test split" in written) if kind is Terminal else written == ""
    assert logging.is_progress_bar_enabled() and not datasets.are_progress_bars_disabled()


def test_notebooks_have_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert [*progress_bar([1], "step")] == [1]
    assert "step" in sys.stderr.getvalue()


def test_every_long_part_of_a_selector_has_a_bar(monkeypatch, pair, images):
    monkeypatch.setattr(sys, "stderr", Terminal())
    pair.compare(images, ("fitted_accuracy", "kl_probe"))
    written = sys.stderr.getvalue()
    assert all(f"{name}: 100%" in written for name in ("calibration", "stitches", "routes", "probes of vit"))


def test_latency_has_a_bar(monkeypatch, pair):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("restnet_hf.profiling.timing.MAX_SPREAD", float("inf"))
    pair.measure_latency(seconds=0.0, checked_routes=1)
    assert "latency: " in sys.stderr.getvalue()
