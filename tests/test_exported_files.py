"""Exported folders that are damaged, or made by a stranger: documented errors, and nothing runs or is written."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import SIZE, Plain, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_hostile import ODD, Trap
from test_trust import places, put

from restnet_hf import Anchor, ExportedModel, StitchedModelForImageClassification, export_routes
from restnet_hf.exported import prepare_image
from restnet_hf.exported_files import MAX_MESSAGE, checksums, read_labels, read_preprocessing
from restnet_hf.preprocessing import Preprocessing
from restnet_hf.runners import RUNNERS
from restnet_hf.torch_archives import safe_archive


ROUTES = ["a[:1] + b[1:]", "a[:2] + b[2:]"]
PREPROCESSING = {"resize": [64, 64], "crop": None, "resample": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


def export(folder, runtime, **options):
    """Two routes of tiny networks."""
    anchors = [Anchor(spread(Plain(), seed), name, Preprocessing((SIZE, SIZE))) for seed, name in enumerate("ab")]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    for route in ROUTES:
        model.add_stitch(route)
    export_routes(model, folder / runtime, ROUTES, runtime=runtime, **options)
    return folder / runtime


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    return export(tmp_path_factory.mktemp("folders"), "onnx")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return export(tmp_path_factory.mktemp("folders"), "torch")


def changed_json(folder, name, change):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def without_checksums(folder):
    """As a stranger, or an earlier version, writes it."""
    changed_json(folder, "profile.json", lambda data: data["metadata"].pop("checksums"))
    return folder


def images(count=2):
    return np.random.default_rng(0).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)
