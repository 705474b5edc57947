"""Hostile and damaged repositories, over HTTP by the real client: refused, nothing run, nothing written elsewhere."""

import json
import pickle
import random
import re
import struct

import pytest
from mutations import ODD, Trap, places, put


HOSTILE = """
from transformers import AutoModelForImageClassification
said = {}
for name in json.loads(sys.argv[2]):
    for load in (Model, AutoModelForImageClassification):
        try:
            load.from_pretrained(name)
            said.setdefault(name, []).append("loaded")
        except (ValueError, OSError, TypeError) as error:
            said.setdefault(name, []).append(str(error))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_hostile_repositories(world):
    """Parents on the reader's own disk, names that leave their folder, unknown stitches: refused. Code: never run."""
    files = world.hub.repos["me/adapter"].commits[-1][1]
    config = json.loads(files["config.json"])
    trap, secret = world.folder / "trap", str(world.folder / "vit")
    code = f"open({str(trap)!r}, 'w').write('ran')\n".encode()
    (stitch,) = [name for name in config["stitches"] if name.endswith("vit_1")]
    changes = {
        "evil/disk": (lambda c: c["anchors"][1].update(repo_id=secret), "not on the Hub but on the machine"),
        "evil/up": (lambda c: c["anchors"][1].update(repo_id="../vit"), "not on the Hub but on the machine"),
        "evil/name": (lambda c: c["anchors"][1].update(name="../vit"), "is invalid|names|may hold only"),
        "evil/kind": (lambda c: c["stitches"][stitch]["config"].update(kind="exec"), "is not one of"),
        "evil/huge": (lambda c: c["stitches"][stitch]["target"].update(channels=2**40), "was made for"),
        "evil/code": (lambda c: None, "loaded"),
    }
    for name, (change, _) in changes.items():
        changed = json.loads(files["config.json"])
        change(changed)
        mine = {"config.json": json.dumps(changed).encode(), "modeling_restnet.py": code, "setup.py": code}
        world.hub.put(name, files | mine)
    answers = world.run(HOSTILE, "victim", arguments=[json.dumps(list(changes))])
    for name in changes:
        del world.hub.repos[name]
    for name, (_, message) in changes.items():
        assert all(re.search(message, answer) for answer in answers[name]), (name, answers[name])
    assert not trap.exists()


WATCHED = """
import os
from transformers import AutoModelForImageClassification
cache, seen = os.path.realpath(os.environ["HF_HOME"]), []
inside = 0
def watch(event, args):
    global inside
    writes = event == "open" and (set(args[1]) & set("wax+") if args[1] else args[2] & (os.O_WRONLY | os.O_RDWR))
    if writes or event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        path = args[0] if writes or event == "os.mkdir" else args[1]
        if isinstance(path, int):
            return
        path = os.path.realpath(os.fspath(path))
        inside += path.startswith(cache)
        if not path.startswith((cache, "/dev/")):
            seen.append([event, path])
    elif event == "exec" and os.path.realpath(args[0].co_filename).startswith(cache):
        seen.append(["run", args[0].co_filename])
    elif event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen.append([event, str(args)])
Model.from_pretrained("me/adapter")
AutoModelForImageClassification.from_pretrained("me/adapter")
sys.addaudithook(watch)
said = []
for index, name in enumerate(json.loads(sys.argv[2])):
    load = (Model, AutoModelForImageClassification)[index % 2]
    try:
        load.from_pretrained(name)
        said.append("loaded")
    except (OSError, ValueError, TypeError) as error:
        said.append(f"{type(error).__name__}: {error}")
print("\\n" + json.dumps([seen, said, inside]))  # transformers may have asked about remote code on the line before
"""
ODD += [["a"], {"a": 1}, "resnet[:]", "me/big-resnet", 0.5]


def fuzzed(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """An adapter's files with one of them changed at random."""
    name = rng.choice(["config.json"] * 4 + ["profile.json", "preprocessor_config.json", "header", "bytes"])
    raw = files["model.safetensors"]
    length = struct.unpack("<Q", raw[:8])[0]
    if name == "bytes":
        cut, flip = rng.randrange(1, len(raw)), rng.randrange(len(raw))
        changed = raw[:flip] + bytes([raw[flip] ^ rng.randrange(1, 256)]) + raw[flip + 1 :]
        return files | {"model.safetensors": changed[:cut] if rng.random() < 0.5 else changed}
    whole = json.loads(raw[8 : 8 + length] if name == "header" else files[name])
    text = json.dumps(put(whole, rng.choice(places(whole)), rng.choice(ODD))).encode()
    if name == "header":
        return files | {"model.safetensors": struct.pack("<Q", len(text)) + text + raw[8 + length :]}
    return files | {name: text}


@pytest.mark.slow
def test_fuzzed_repositories(world):
    """Only documented errors come out, no code runs, no file is written outside of the cache."""
    rng, trap = random.Random(0), world.folder / "trapped"
    code = f"open({str(trap)!r}, 'w').write('ran')\n".encode()
    traps = {name: code for name in ("modeling_restnet.py", "configuration_restnet.py", "__init__.py", "setup.py")}
    traps |= {name: pickle.dumps(Trap(str(trap))) for name in ("pytorch_model.bin", "training_args.bin")}
    files = world.hub.repos["me/adapter"].commits[-1][1]
    names = [f"evil/fuzz-{index:03}" for index in range(40)]
    for name in names:
        world.hub.put(name, fuzzed(files, rng) | traps)
    before = {path for path in world.folder.rglob("*") if "fuzzed" not in path.parts}
    seen, said, inside = world.run(WATCHED, "fuzzed", arguments=[json.dumps(names)])
    for name in names:
        del world.hub.repos[name]
    assert inside > 200, "the watch saw nothing, so this shows nothing"
    assert seen == [] and not trap.exists()
    assert {path for path in world.folder.rglob("*") if "fuzzed" not in path.parts} == before
    refused = [message for message in said if message != "loaded"]
    assert len(said) == 40 and 10 < len(refused) < 36
