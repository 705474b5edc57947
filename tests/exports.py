"""Exported folders, and images for them."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import SIZE, Plain, spread

from restnet_hf import Anchor, StitchedModelForImageClassification, export_routes
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.export.exporter import load_exporter


ABSENT = """import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in ('torch', 'transformers', 'timm'): raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
ROUTES = ["a[:1] + b[1:]", "a[:2] + b[2:]"]


def needs_runtime(runtime):
    """Skip a test where a package that exporting to a runtime needs is not installed."""
    for package in load_exporter(runtime).packages:
        pytest.importorskip(package)


def is_installed(runtime):
    return all(find_spec(package.partition(".")[0]) for package in load_exporter(runtime).packages)


def export(folder, runtime, **options):
    """Two routes of tiny networks."""
    anchors = [Anchor(spread(Plain(), seed), name, Preprocessing((SIZE, SIZE))) for seed, name in enumerate("ab")]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    for route in ROUTES:
        model.add_stitch(route)
    export_routes(model, folder / runtime, ROUTES, runtime=runtime, **options)
    return folder / runtime


def changed_json(folder, name, change):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def without_checksums(folder):
    """As an untrusted author, or an earlier version, writes it."""
    changed_json(folder, "profile.json", lambda data: data.pop("sha256"))
    return folder


def images(count=2):
    return np.random.default_rng(0).standard_normal((count, 3, SIZE, SIZE)).astype(np.float32)
