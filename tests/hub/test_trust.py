"""A hostile or damaged adapter gives one of the errors that are documented, runs no code and writes nothing."""

import contextlib
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
from conftest import make_anchor, save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import places, put

from restnet_hf import StitchedModelForImageClassification


DOCUMENTED = (OSError, ValueError)
MANY = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(),
    st.sampled_from(
        ["", "../../x", "/etc/passwd", "a" * 10_000, "\x00", "nan", "__import__('os')", "float32", "resnet[:]"]
    ),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An adapter and its parents, which tests copy."""
    folder = tmp_path_factory.mktemp("original")
    for name in ("resnet", "vit"):
        save_model(name, folder / name)
    model = StitchedModelForImageClassification.from_anchors(folder / "resnet", folder / "vit", order="given")
    model.set_route(model.add_stitch("resnet[:2] + vit[1:]"))
    model.profile()
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def parents():
    """The right parents, whatever an adapter says of where they are."""
    return {name: make_anchor(name).model for name in ("resnet", "vit")}


@contextlib.contextmanager
def nothing_else_happens(folder: Path):
    """No file beside those of the adapter, and no new module of foreign code."""
    files, modules = {p for p in folder.parent.rglob("*") if folder not in p.parents}, set(sys.modules)
    yield
    assert {p for p in folder.parent.rglob("*") if folder not in p.parents} == files
    assert not [name for name in set(sys.modules) - modules if name.startswith("transformers_modules")]


def load(folder: Path, parents: dict) -> None:
    with nothing_else_happens(folder), contextlib.suppress(*DOCUMENTED):
        StitchedModelForImageClassification.from_pretrained(folder, anchors=parents)


def changed(original: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(original / "adapter", folder))


@pytest.mark.parametrize("name", ["config.json", "profile.json"])
@MANY
@given(data=st.data())
def test_strange_json(original, parents, tmp_path, name, data):
    folder = changed(original, tmp_path)
    whole = json.loads((folder / name).read_text())
    path = data.draw(st.sampled_from(places(whole)))
    (folder / name).write_text(json.dumps(put(whole, path, data.draw(ODD))))
    load(folder, parents)


@MANY
@given(data=st.data())
def test_strange_weights(original, parents, tmp_path, data):
    """The header of the safetensors file is JSON too: other shapes, offsets, types; or bytes cut and flipped."""
    folder = changed(original, tmp_path)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    if data.draw(st.booleans()):
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        path = data.draw(st.sampled_from(places(header)))
        text = json.dumps(put(header, path, data.draw(ODD))).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    else:
        cut = data.draw(st.integers(0, len(raw) - 1))
        flip = data.draw(st.integers(0, max(0, cut - 1)))
        file.write_bytes(raw[:flip] + bytes([raw[flip] ^ 255]) + raw[flip + 1 : cut])
    load(folder, parents)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"', "[" * 50_000, "{}", "\x00\xff"])
@pytest.mark.parametrize("name", ["config.json", "profile.json"])
def test_no_json_at_all(original, parents, tmp_path, name, text):
    folder = changed(original, tmp_path)
    (folder / name).write_text(text)
    with nothing_else_happens(folder), pytest.raises(DOCUMENTED):
        StitchedModelForImageClassification.from_pretrained(folder, anchors=parents)
