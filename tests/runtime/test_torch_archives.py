"""Untrusted programs of torch.export: what would run code is left out or refused."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from exports import export, images, without_checksums
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import Trap, places, put
from versions import needs_export, older

from restnet_hf import ExportedModel
from restnet_hf.runtime.torch_archives import safe_archive


pytestmark = needs_export


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A folder of two programs."""
    return export(tmp_path_factory.mktemp("folders"), "torch")


class Maker(Trap):
    """Makes a folder when somebody unpickles it."""

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(trap):
    file = io.BytesIO()
    torch.save({"x": Maker(str(trap))}, file)
    return file.getvalue()


def with_model(change):
    """An attack by the graph of a program."""

    def attack(members, trap):
        program = json.loads(members["models/model.json"])
        change(program, program["graph_module"]["graph"]["nodes"], trap)
        members["models/model.json"] = json.dumps(program).encode()

    return attack


def with_member(name, content=pickled):
    return lambda members, trap: members.update({name: content(trap)})


def with_config(name, **changes):
    """An attack by what is said of a tensor."""

    def attack(members, trap):
        config = json.loads(members[f"data/{name}s/model_{name}s_config.json"])
        meta = next(iter(json.loads(members["data/weights/model_weights_config.json"])["config"].values()))
        config["config"]["x"] = {**meta, **changes}
        members[f"data/{name}s/model_{name}s_config.json"] = json.dumps(config).encode()
        members.setdefault(f"data/{name}s/{changes['path_name']}", pickled(trap))

    return attack


def call(target, **argument):
    """An operator that any place below torch names, called with a text."""

    def change(program, nodes, trap):
        text = {"as_string": f"mkdir {trap}"}
        nodes[0]["target"] = target
        nodes[0]["inputs"] = [{"name": "", "arg": argument or text, "kind": 1}]

    return with_model(change)


def symbolic(program, nodes, trap):
    text = f"__import__('os').mkdir({str(trap)!r})"
    for value in program["graph_module"]["graph"]["sym_int_values"].values():
        value["as_expr"]["expr_str"] = text


def guard(program, nodes, trap):
    program["guards_code"] = [f"__import__('os').mkdir({str(trap)!r}) or True"]


def enumeration(program, nodes, trap):
    (trap.parent / "evil_module.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    context = json.dumps([{"__enum__": True, "fqn": "evil_module:X", "name": "X"}])
    spec = [1, {"type": "builtins.dict", "context": context, "children_spec": []}]
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(spec)


LEGACY = {"version": b"8.20"} | {f"serialized_{name}.pt": b"" for name in ("state_dict", "constants")}
ATTACKS = {  # what loading it without a check does: True where it makes the folder
    "sample inputs": (with_member("data/sample_inputs/model.pt"), True),
    "legacy weights": (with_member("data/weights/model.pt"), True),
    "legacy constants": (with_member("data/constants/model.pt"), True),
    "a pickled weight": (with_config("weight", path_name="weight_99", use_pickle=True), True),
    "a pickled constant": (with_config("constant", path_name="tensor_99", use_pickle=True), True),
    "a pickled object": (
        lambda members, trap: (
            members.update({"data/constants/opaque_obj_0": pickle.dumps(Maker(str(trap)))}),
            with_config("constant", path_name="opaque_obj_0", use_pickle=True, tensor_meta=None)(members, trap),
        ),
        True,
    ),
    "a symbolic size": (with_model(symbolic), True),
    "a guard": (with_model(guard), True),
    "an enumeration": (with_model(enumeration), True),
    "a function below torch": (call("torch.serialization.os.system"), False),
    "an operator that writes": (call("torch.ops.aten.save.default"), False),
    "an operator that maps": (call("torch.ops.aten.from_file.default"), False),
    "a private attribute": (call("torch.ops.aten.add.__init__"), False),
    "an object": (call("torch.ops.aten.add.Tensor", as_custom_obj={"name": "x", "class_fqn": "y"}), False),
    "an operator as argument": (call("torch.ops.aten.add.Tensor", as_operator="torch.os.system"), False),
    "compiled code": (with_member("data/aotinductor/model/model.so"), False),
    "another program": (with_member("models/other.json"), False),
    "a huge empty tensor": (
        lambda members, trap: (
            members.update({"data/weights/weight_99": b""}),
            with_config("weight", path_name="weight_99", tensor_meta=huge(members))(members, trap),
        ),
        False,
    ),
}
HARMLESS = ("sample inputs", "a guard")  # they are left out, and the program is loaded


def huge(members):
    config = json.loads(members["data/weights/model_weights_config.json"])["config"]
    return {**next(iter(config.values()))["tensor_meta"], "sizes": [{"as_int": 10**7}, {"as_int": 10**7}]}


def attacked(source, folder, attack, compression=zipfile.ZIP_STORED):
    """A folder whose programs were changed."""
    without_checksums(shutil.copytree(source, folder))
    for file in folder.glob("*.pt2"):
        with zipfile.ZipFile(file) as archive:
            members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        attack(members, folder.parent / "trap")
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(f"x/{name}", content)
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_programs(program, tmp_path, monkeypatch, name):
    """Each runs code, or may, when torch loads it as it is; we leave it out, or refuse to load it."""
    attack, runs = ATTACKS[name]
    monkeypatch.syspath_prepend(tmp_path)
    trap, folder = tmp_path / "trap", attacked(program, tmp_path / "folder", attack)
    if name in HARMLESS:
        assert np.array_equal(ExportedModel(folder)(images()), ExportedModel(program)(images()))
    else:
        with pytest.raises(ValueError, match="cannot be loaded by torch.*could run code.*trust_remote_code=True"):
            ExportedModel(folder)
    assert not trap.exists()
    if runs and not older(torch="2.15"):  # so that the attack is known to be one
        with contextlib.suppress(ValueError):
            ExportedModel(folder, trust_remote_code=True)(images())
        assert trap.exists()


def test_archives_that_are_no_programs(program, tmp_path):
    """Older formats, compressed and overlapping members, two of one name."""
    nothing = lambda members, trap: None  # noqa: E731
    cases = {
        "legacy": attacked(
            program, tmp_path / "legacy", lambda members, trap: (members.clear(), members.update(LEGACY))
        ),
        "bomb": attacked(program, tmp_path / "bomb", nothing, zipfile.ZIP_DEFLATED),
        "twice": attacked(program, tmp_path / "twice", nothing),
        "larger": attacked(program, tmp_path / "larger", nothing),
    }
    for file in cases["twice"].glob("*.pt2"):
        with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x/models/model.json", b"{}")
    for file in cases["larger"].glob("*.pt2"):
        raw = bytearray(file.read_bytes())
        start = raw.rindex(b"PK\x01\x02") + 20  # of the sizes of the last member in the directory
        raw[start : start + 8] = struct.pack("<II", 2**31, 2**31)
        file.write_bytes(raw)
    said = {"legacy": "is not one that", "bomb": "is compressed", "twice": "is not one that", "larger": "larger than"}
    for name, folder in cases.items():
        with pytest.raises(ValueError, match=said[name]):
            ExportedModel(folder)


@pytest.fixture(scope="module")
def graph(program, tmp_path_factory):
    """The JSON of a program, all members of its archive, and a folder to write into."""
    with zipfile.ZipFile(next(iter(sorted(program.glob("*.pt2"))))) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return json.loads(members["models/model.json"]), members, tmp_path_factory.mktemp("archives")


CODE = ["__import__('os').system('x')", "f(1)", "a;b", "../x", 'x"y', "[].append", "x\ny", "lambda: 0", "{x}", "é"]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_text_of_a_program_is_code(graph, data):
    """Whatever place it is at, as a value or a key: refused, or not in what torch is given."""
    program, members, folder = graph
    path, text = data.draw(st.sampled_from(places(program))), data.draw(st.sampled_from(CODE))
    changed = put(program, path, text) if data.draw(st.booleans()) else put(program, path, {text: 1})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(f"x/{name}", json.dumps(changed) if name == "models/model.json" else content)
    (folder / "x.pt2").write_bytes(archive.getvalue())
    try:
        made = safe_archive(folder / "x.pt2")
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError):
        return
    with zipfile.ZipFile(made) as file:
        said = json.loads(file.read("program/models/model.json"))
    mode = path[-1:] in (("as_string",), ("as_strings",))
    assert mode or json.dumps(text)[1:-1] not in json.dumps(said)
