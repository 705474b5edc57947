"""Hundreds of hostile and damaged adapters, each loaded in a watched process: refused or loaded, and nothing else."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import save_model
from safetensors.torch import save_file
from test_trust import places, put

from restnet_hf import StitchConfig, StitchedModelForImageClassification
from restnet_hf.adapter_files import WEIGHTS
from restnet_hf.tuning import TunedConfig, tuned_keys


ROUTES = ("resnet[:2] + vit[1:]", "resnet[:4] + vit[2:]", "vit[:1] + vit[3:]")
HUGE = [10**9, 2**40, 2**63, 10**400, 100_000, 16_384, 4096]
ODD = [*HUGE, None, True, -1, 0, 3, 0.5, -0.0, 1e400, float("nan"), "", "x", "../../x", "/etc/passwd", "\x00", "a.b"]
ODD += ["a" * 10_000, "é\ud800", "float32", "complex64", "float8_e4m3fn", "int8", "load", "train", "resnet[:]", "lora"]
ODD += [[], [3], ["a"], [[[[]]]], {}, {"a": 1}, {"0": {"a": []}}, {"__float__": "NaN"}, {"model_type": "restnet"}]
KEYS = ["attribute_map", "check", "to_dict", "__class__", "attn_implementation", "dtype", "num_labels", "id2label"]
KEYS += ["label2id", "auto_map", "problem_type", "per_layer_config", "quantization_config", "configuration_files"]
KEYS += ["output_attentions", "rope_parameters", "sub_configs", "architectures", "_name_or_path", "torch_dtype"]
LOADER = """
import hashlib, json, os, resource, signal, sys, time, traceback, warnings
folder, names = sys.argv[1], json.loads(sys.argv[2])
import torch
from transformers import AutoModelForImageClassification
from transformers.utils import logging
from restnet_hf import StitchedModelForImageClassification as Model
logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.simplefilter("ignore")
good = Model.from_pretrained(folder + "/good")
for warm in ("good", "whole"):
    AutoModelForImageClassification.from_pretrained(f"{folder}/{warm}")
assets, seen = os.path.realpath(os.environ["HF_ASSETS_CACHE"]), []
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
CHANGES += ("os.chown", "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move")
RUNS = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile")
RUNS += ("socket.connect", "socket.getaddrinfo")
def watch(event, args):
    if event == "open":
        mode, flags = args[1], args[2]
        changes = bool(set(mode) & set("wax+")) if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        changes = event in CHANGES
    if changes and not isinstance(args[0], int):
        path = os.path.realpath(os.fspath(args[0]))
        if not path.startswith((assets, "/dev/null")):
            seen.append([event, str(path)])
    elif event in RUNS:
        seen.append([event, str(args)[:300]])
    elif event == "exec" and os.path.realpath(args[0].co_filename).startswith(folder):
        seen.append(["run", args[0].co_filename])
sys.addaudithook(watch)
class TooSlow(BaseException): pass
def stop(*args): raise TooSlow()
signal.signal(signal.SIGALRM, stop)
answers = []
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for index, name in enumerate(names):
    path, began, before = f"{folder}/{name}/adapter", time.monotonic(), len(seen)
    signal.alarm(10)
    try:
        if index % 6 == 4:
            kept = Model.from_pretrained(folder + "/good") if index % 60 == 4 else kept
            kept.load_stitch(path, f"n{index}")
        else:
            (AutoModelForImageClassification if index % 6 == 5 else Model).from_pretrained(path)
        said, kind = "loaded", ""
    except BaseException as error:
        said, kind = str(error), type(error).__name__
        signal.alarm(0)
        frames = traceback.extract_tb(error.__traceback__)
        ours = any("restnet_hf" in frame.filename for frame in frames)  # else it was in the Auto class, before
        if not isinstance(error, (OSError, ValueError)) and (ours or not isinstance(error, Exception)):
            kind = "UNDOCUMENTED " + kind + " " + " < ".join(
                f"{f.name}:{f.lineno}" for f in reversed(frames[-6:]))
    signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024
    row = [name, kind, len(said), said[:400], round(time.monotonic() - began, 2), grown, seen[before:]]
    answers.append(row)
    if os.environ.get("VERBOSE"): print(json.dumps(row), file=sys.stderr, flush=True)
print("\\n" + json.dumps(answers))
"""


class Trap:
    """Writes a file when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with anchors, an adapter of every kind of stitch with tuned parts, and the same as a whole checkpoint."""
    folder = tmp_path_factory.mktemp("untrusted").resolve()
    for name in ("resnet", "vit"):
        save_model(name, folder / name)
    model = StitchedModelForImageClassification.from_anchors(folder / "resnet", folder / "vit", order="given")
    kinds = ("mlp", "lora", "branch")
    routes = [model.add_stitch(route, StitchConfig(kind)) for route, kind in zip(ROUTES, kinds, strict=True)]
    model.set_route(routes[0])
    for key in tuned_keys(routes[0])[-1]:
        model.add_tuned(key, TunedConfig(key.split("-")[0], "vit", 1, None))
    model.profile()
    model.save_pretrained(folder / "good")
    model.save_pretrained(folder / "whole", standalone=True)
    return folder


def write(path: Path, data: Any) -> None:
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def odd_json(name: str) -> Callable[[Path, random.Random], None]:
    """Put an odd value at a random place of a JSON file."""

    def change(folder: Path, dice: random.Random) -> None:
        file = folder / name
        data = json.loads(file.read_text())
        for _ in range(dice.choice((1, 1, 1, 3))):
            data = put(data, dice.choice(places(data)), dice.choice(ODD))
            if not places(data):
                break
        write(file, data)

    return change


def odd_key(folder: Path, dice: random.Random) -> None:
    data = json.loads((folder / "adapter/config.json").read_text())
    write(folder / "adapter/config.json", data | {dice.choice(KEYS): dice.choice(ODD)})


def odd_header(name: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, dice: random.Random) -> None:
        raw = (folder / name).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        text = json.dumps(put(header, dice.choice(places(header)), dice.choice([*ODD, "F8_E4M3", "I64", "BF16"])))
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :])

    return change


def odd_bytes(name: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, dice: random.Random) -> None:
        raw = bytearray((folder / name).read_bytes())
        for _ in range(dice.choice((1, 20))):
            raw[dice.randrange(dice.choice((8, 2000, len(raw))))] = dice.randrange(256)
        (folder / name).write_bytes(raw[: dice.randrange(len(raw))] if dice.random() < 0.4 else raw)

    return change


def odd_files(folder: Path, dice: random.Random) -> None:
    """Links, pickles and code in the place of files, or beside them."""
    file = folder / dice.choice(
        ["adapter/config.json", f"adapter/{WEIGHTS}", "adapter/profile.json", "vit/config.json"]
    )
    precious = folder.parent / "precious"
    kind = dice.choice(["zero", "pipe", "self", "gone", "folder", "other", "pickle", "missing", "text", "lora"])
    if kind == "lora":
        lora = {"peft_type": "LORA", "r": dice.choice([4, 4096, 10**9]), "target_modules": ["q_proj"]}
        write(file.parent / "adapter_config.json", lora | {"base_model_name_or_path": str(folder / "adapter")})
        return
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Trap(precious / "trap")))
    elif kind == "text":
        write(
            file, dice.choice(["", "[]", "null", "{", '"x"', "[" * 50_000, "{}", '{"a":' * 2000, "\x00", "1" * 9999])
        )
    elif kind != "missing":
        to = {"zero": Path("/dev/zero"), "self": file, "gone": folder / "gone", "folder": folder}
        file.symlink_to(to.get(kind, precious / "notes.json"))


def odd_anchor(folder: Path, dice: random.Random) -> None:
    """Anchors that hold only pickles, and adapters that name themselves or each other."""
    anchor, config = folder / "vit", json.loads((folder / "adapter/config.json").read_text())
    kind = dice.choice(["bin", "timm", "self", "other", "lora", "index"])
    if kind in ("self", "other"):
        config["anchors"][1]["repo_id"] = str(folder / ("adapter" if kind == "self" else "resnet"))
        write(folder / "adapter/config.json", config)
        if kind == "other":  # and that one names the first
            shutil.copytree(folder / "adapter", folder / "resnet", dirs_exist_ok=True)
            config["anchors"][1]["repo_id"] = str(folder / "adapter")
            write(folder / "resnet/config.json", config)
        return
    trap = pickle.dumps(Trap(folder.parent / "precious" / "trap"))
    (anchor / WEIGHTS).unlink()
    (anchor / "pytorch_model.bin").write_bytes(trap)
    if kind == "timm":
        args = {"checkpoint_path": str(anchor / "pytorch_model.bin")}
        write(anchor / "config.json", {"architecture": "resnet18", "num_classes": 5, "model_args": args})
        save_file({}, anchor / WEIGHTS, {"format": "pt"})
    elif kind == "lora":
        save_file({}, anchor / WEIGHTS, {"format": "pt"})
        write(anchor / "adapter_config.json", {"peft_type": "LORA", "r": 4})
        (anchor / "adapter_model.bin").write_bytes(trap)
    elif kind == "index":
        write(anchor / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}})


CHANGES = {
    "config": (odd_json("adapter/config.json"), 8),
    "key": (odd_key, 2),
    "profile": (odd_json("adapter/profile.json"), 1),
    "header": (odd_header(f"adapter/{WEIGHTS}"), 2),
    "bytes": (odd_bytes(f"adapter/{WEIGHTS}"), 1),
    "files": (odd_files, 2),
    "anchor": (odd_anchor, 1),
    "anchor-config": (odd_json("vit/config.json"), 1),
    "anchor-header": (odd_header(f"vit/{WEIGHTS}"), 1),
    "anchor-bytes": (odd_bytes(f"vit/{WEIGHTS}"), 1),
    "anchor-images": (odd_json("vit/preprocessor_config.json"), 1),
}


def hostile(folder: Path, original: Path, dice: random.Random, kind: str) -> None:
    """A copy of an adapter and its anchors with something changed, and traps beside it."""
    shutil.copytree(original / ("whole" if dice.random() < 0.25 else "good"), folder / "adapter")
    for name in ("resnet", "vit"):
        shutil.copytree(original / name, folder / name)
    file = folder / "adapter/config.json"
    file.write_text(file.read_text().replace(f"{original}/", f"{folder}/"))
    CHANGES[kind][0](folder, dice)
    trap = folder.parent / "precious" / "trap"
    for name in ("configuration_restnet.py", "setup.py", "__init__.py", "modeling_vit.py"):
        write(folder / "adapter" / name, f"open({str(trap)!r}, 'w')")
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / "adapter" / name).write_bytes(pickle.dumps(Trap(trap)))


def state(folder: Path) -> dict[str, Any]:
    """Everything in a folder: types, rights, times, links and contents."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        content = os.readlink(path) if path.is_symlink() else None
        if content is None and path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (about.st_mode, about.st_mtime_ns, about.st_size * path.is_file(), content)
    return found


def test_hostile_folders(original, tmp_path_factory):
    """Only documented and short errors, no code, nothing written, little memory and time, for 320 adapters."""
    dice, amount = random.Random(int(os.environ.get("SEED", "0"))), int(os.environ.get("AMOUNT", "320"))
    (original / "precious").mkdir(exist_ok=True)
    write(original / "precious/notes.json", {"mine": True})
    kinds = [kind for kind, (_, weight) in CHANGES.items() for _ in range(weight)]
    names = [f"{index:03}-{kinds[index % len(kinds)]}" for index in range(amount)]
    for name in names:
        hostile(original / name, original, dice, name[4:].lstrip("0123456789-"))
    before = state(original)
    env = os.environ | {"HF_ASSETS_CACHE": str(tmp_path_factory.mktemp("assets")), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LOADER, str(original), json.dumps(names)], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = json.loads(run.stdout.splitlines()[-1])
    if os.environ.get("DUMP"):
        Path(os.environ["DUMP"]).write_text(json.dumps(answers))
    assert len(answers) == amount
    for name, kind, length, said, seconds, grown, seen in answers:
        about = (name, kind, said, seconds, grown)
        assert not seen and not kind.startswith("UNDOCUMENTED"), (*about, seen)
        assert length < 4000 and seconds < 10 and grown < 1000, about
    assert state(original) == before
    refused = [kind for _, kind, *_ in answers if kind]
    assert amount / 2 < len(refused) < amount
