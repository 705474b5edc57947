"""Hundreds of hostile and damaged adapters, each loaded in a watched process: refused or loaded, and nothing else."""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from mutations import places, put
from safetensors.torch import load_file, save_file

from restnet_hf import StitchConfig, StitchedModelForImageClassification
from restnet_hf.hub.adapter_files import WEIGHTS
from restnet_hf.stitches.tuning import TunedConfig, tuned_keys


AMOUNT = 320
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
        if name.startswith("asks-"):
            Model.from_pretrained(path)
        elif index % 6 == 4:
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
    row = [name, kind, len(said), said[:3000], round(time.monotonic() - began, 2), grown, seen[before:]]
    answers.append(row)
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
    """A folder with anchors, an adapter of every kind of stitch with tuned parts, and the same standing alone."""
    folder = tmp_path_factory.mktemp("untrusted").resolve()
    for name in ("resnet", "vit"):
        save_model(name, folder / name)
    model = StitchedModelForImageClassification.from_anchors(folder / "resnet", folder / "vit", order="given")
    kinds = ("mlp", "lora", "branch")
    routes = [model.add_stitch(route, StitchConfig(kind)) for route, kind in zip(ROUTES, kinds, strict=True)]
    model.set_route(routes[0])
    for key in tuned_keys(routes[0])[-1]:
        model.add_tuned(key, TunedConfig(key.kind, "vit", 1, None))
    model.profile()
    model.save_pretrained(folder / "good")
    model.save_pretrained(folder / "whole", standalone=True)
    return folder


def write(path: Path, data: Any) -> None:
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def odd_json(name: str) -> Callable[[Path, random.Random], None]:
    """Put a random value at a random place of a JSON file."""

    def change(folder: Path, rng: random.Random) -> None:
        file = folder / name
        data = json.loads(file.read_text())
        for _ in range(rng.choice((1, 1, 1, 3))):
            data = put(data, rng.choice(places(data)), rng.choice(ODD))
            if not places(data):
                break
        write(file, data)

    return change


def odd_key(folder: Path, rng: random.Random) -> None:
    data = json.loads((folder / "adapter/config.json").read_text())
    write(folder / "adapter/config.json", data | {rng.choice(KEYS): rng.choice(ODD)})


def odd_header(name: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        raw = (folder / name).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        text = json.dumps(put(header, rng.choice(places(header)), rng.choice([*ODD, "F8_E4M3", "I64", "BF16"])))
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :])

    return change


def odd_bytes(name: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        raw = bytearray((folder / name).read_bytes())
        for _ in range(rng.choice((1, 20))):
            raw[rng.randrange(rng.choice((8, 2000, len(raw))))] = rng.randrange(256)
        (folder / name).write_bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.4 else raw)

    return change


def odd_files(folder: Path, rng: random.Random) -> None:
    """Links, pickles and code in the place of files, or beside them."""
    file = folder / rng.choice(
        ["adapter/config.json", f"adapter/{WEIGHTS}", "adapter/profile.json", "vit/config.json"]
    )
    precious = folder.parent / "precious"
    kind = rng.choice(["zero", "pipe", "self", "gone", "folder", "other", "pickle", "missing", "text", "lora"])
    if kind == "lora":
        lora = {"peft_type": "LORA", "r": rng.choice([4, 4096, 10**9]), "target_modules": ["q_proj"]}
        write(file.parent / "adapter_config.json", lora | {"base_model_name_or_path": str(folder / "adapter")})
        return
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Trap(precious / "trap")))
    elif kind == "text":
        write(file, rng.choice(["", "[]", "null", "{", '"x"', "[" * 50_000, "{}", '{"a":' * 2000, "\x00", "1" * 9999]))
    elif kind != "missing":
        to = {"zero": Path("/dev/zero"), "self": file, "gone": folder / "gone", "folder": folder}
        file.symlink_to(to.get(kind, precious / "notes.json"))


def odd_anchor(folder: Path, rng: random.Random) -> None:
    """Anchors that hold only pickles, and adapters that name themselves or each other."""
    anchor, config = folder / "vit", json.loads((folder / "adapter/config.json").read_text())
    kind = rng.choice(["bin", "timm", "self", "other", "lora", "index"])
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


def copied(folder: Path, original: Path, name: str) -> None:
    """A copy of an adapter with its own copies of the anchors."""
    shutil.copytree(original / name, folder / "adapter")
    for anchor in ("resnet", "vit"):
        shutil.copytree(original / anchor, folder / anchor)
    file = folder / "adapter/config.json"
    file.write_text(file.read_text().replace(f"{original}/", f"{folder}/"))


def hostile(folder: Path, original: Path, rng: random.Random, kind: str) -> None:
    """A copy of an adapter and its anchors with something changed, and traps beside it."""
    copied(folder, original, "whole" if rng.random() < 0.25 else "good")
    CHANGES[kind][0](folder, rng)
    trap = folder.parent / "precious" / "trap"
    for name in ("configuration_restnet.py", "setup.py", "__init__.py", "modeling_vit.py"):
        write(folder / "adapter" / name, f"open({str(trap)!r}, 'w')")
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / "adapter" / name).write_bytes(pickle.dumps(Trap(trap)))


def stitches(config: dict, amount: int, **options: Any) -> None:
    name, entry = next(iter(config["stitches"].items()))
    for index in range(amount):
        point = entry["point"] | {"adapter": f"n{index}"}
        made = entry | {"point": point, "config": entry["config"] | options}
        config["stitches"][f"n{index}:{name}"] = made


def tuned(config: dict, amount: int, kind: str, **options: Any) -> None:
    entry = next(iter(config["tuned"].values())) | {"kind": kind, "start": 0} | options
    config["tuned"] |= {f"{kind}-n{index}:vit": entry for index in range(amount)}


def heads(config: dict, amount: int) -> None:
    config["new_head"] = True
    stitches(config, amount)
    config["routes"] += [f"n{index}: {config['routes'][0]}" for index in range(amount)]


def anchor(config: dict, **options: Any) -> None:
    config["anchors"][1].update(options)


def network(config: dict, **options: Any) -> None:
    config["anchors"][1]["config"].update(options)


def long_key(config: dict) -> None:
    config["stitches"]["k" * 10**7] = {}


def timm_checkpoint(config: dict) -> None:
    network(config, model_type="timm_wrapper", architecture="resnet18", model_args={"checkpoint_path": "/x/y.bin"})


# What is asked for is far more than the weights hold, or fits no model: each is refused, in kilobytes.
ASKS: dict[str, tuple[str, Callable[[dict], Any], str]] = {
    "stitches": ("good", lambda c: stitches(c, 500, kind="mlp", hidden=16384), "do not fit"),
    "hidden": ("good", lambda c: c["stitches"]["resnet_2__vit_1"]["config"].update(hidden=16384), "of another shape"),
    "rank": ("good", lambda c: c["stitches"]["resnet_4__vit_2"]["config"].update(r=16384), "of another shape"),
    "tuned": ("good", lambda c: tuned(c, 1000, "lora", r=4096), "do not fit"),
    "tuned-rank": ("good", lambda c: c["tuned"]["lora-vit"].update(r=4096), "of another shape"),
    "tuned-dots": ("good", lambda c: c["tuned"].update({"norm-a.b": c["tuned"]["norm-resnet_2__vit_1"]}), "key"),
    "tuned-alpha": ("good", lambda c: c["tuned"]["lora-vit"].update(lora_alpha=10**400), "lora_alpha"),
    "heads": ("good", lambda c: heads(c, 1000), "heads.n0:"),
    "labels": ("good", lambda c: (c.pop("id2label"), c.update(num_labels=10**9)), "from 1 to"),
    "many-labels": ("good", lambda c: c.update(id2label={i: str(i) for i in range(10**5)}), "5 classes"),
    "label-kind": ("good", lambda c: c["id2label"].update({"0": {"a": 1}}), "id2label"),
    "long-label": ("good", lambda c: anchor(c, label_names=["a" * 10**7]), "1 label_names"),
    "long-key": ("good", long_key, "is invalid"),
    "long-routes": ("good", lambda c: c.update(routes=["x" * 10**7]), "too many or too long"),
    "routes": ("good", lambda c: c.update(routes=["resnet[:2] + vit[1:]"] * 10**5), "too many or too long"),
    "segments": (
        "good",
        lambda c: c.update(routes=["vit[:1]" + " + vit[1:1]" * 10**4 + " + vit[1:]"]),
        "not there|are no route",
    ),
    "large": ("good", lambda c: c.update(more="a" * 2**24), "is too large"),
    "values": ("good", lambda c: c.update(more=[[]] * 2**20), "is too large"),
    "anchors": ("good", lambda c: c.update(anchors=c["anchors"] * 40), "1 to 64"),
    "twice": ("good", lambda c: c.update(anchors=c["anchors"] * 2), "the same name"),
    "unknown-anchor": ("good", lambda c: (anchor(c, name="who"), c.update(tuned={})), "anchors that are not"),
    "pixels": ("good", lambda c: c["anchors"][0]["preprocessing"].update(image_size=[4096, 4096]), "pixels|cut"),
    "pixels-whole": (
        "whole",
        lambda c: c["anchors"][0]["preprocessing"].update(image_size=[4096, 4096]),
        "pixels|cut",
    ),
    "complex": ("good", lambda c: c.update(dtype="complex64"), "complex64"),
    "float8": ("good", lambda c: c.update(dtype="float8_e4m3fn"), "float8"),
    "int": ("good", lambda c: c.update(dtype="int8"), "int8"),
    "fingerprint": ("good", lambda c: anchor(c, fingerprint="complex64:00"), "the fingerprint must begin"),
    "auto_map": ("good", lambda c: c.update(auto_map={"AutoConfig": 3}), "auto_map"),
    "problem_type": ("good", lambda c: c.update(problem_type="x"), "problem_type"),
    "vast": ("whole", lambda c: network(c, hidden_size=10**6, intermediate_size=10**6), "do not fit|does not hold"),
    "wide": ("whole", lambda c: network(c, hidden_size=10**5), "does not hold|do not fit"),
    "deep": ("whole", lambda c: network(c, num_hidden_layers=10**6), "does not hold"),
    "deeper": ("whole", lambda c: network(c, num_hidden_layers=10**9), "reasonable"),
    "classes": (
        "whole",
        lambda c: (network(c, num_labels=10**9), c["anchors"][1]["config"].pop("id2label")),
        "reason",
    ),
    "inside": ("whole", lambda c: network(c, model_type="restnet"), "model_type"),
    "unknown": ("whole", lambda c: network(c, model_type="nothing"), "model_type"),
    "fetched": ("whole", lambda c: network(c, use_pretrained_backbone=True), "from elsewhere"),
    "kernel": ("whole", lambda c: network(c, attn_implementation="evil/kernel"), "from elsewhere"),
    "checkpoint": ("whole", timm_checkpoint, "from elsewhere"),
    "timm-hub": (
        "whole",
        lambda c: network(c, model_type="timm_wrapper", architecture="hf-hub:a/b"),
        "from elsewhere",
    ),
}


def tiny(folder: Path) -> None:
    """A stitch of 16384 channels for every tensor of one number."""
    file = folder / "adapter/config.json"
    config, weights = json.loads(file.read_text()), load_file(folder / "adapter" / WEIGHTS)
    known = set(config["stitches"])
    stitches(config, 500, kind="mlp", hidden=16384)
    write(file, config)
    weights |= {f"stitches.{name}.hidden.weight": torch.zeros(1) for name in config["stitches"].keys() - known}
    save_file(weights, folder / "adapter" / WEIGHTS, {"format": "pt"})


def long_header(folder: Path) -> None:
    with (folder / "adapter" / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 90 * 2**20))
        file.truncate(2**28)


def number(folder: Path) -> None:
    file = folder / "adapter/profile.json"
    data = json.loads(file.read_text())
    data["routes"][0]["costs"]["macs"] = 10**400
    write(file, data)


def resized(folder: Path, **options: Any) -> None:
    file = folder / "vit/config.json"
    write(file, json.loads(file.read_text()) | options)


def pickled(folder: Path) -> None:
    (folder / "vit" / WEIGHTS).unlink()
    (folder / "vit/pytorch_model.bin").write_bytes(pickle.dumps(Trap(folder / "trap")))


def named(folder: Path, *names: str) -> None:
    """Adapters that name each other as their last anchor."""
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        if name != "adapter":
            shutil.copytree(folder / "adapter", folder / name)
        file = folder / name / "config.json"
        config = json.loads(file.read_text())
        anchor(config, repo_id=str(folder / other))
        write(file, config)


# The same of other files.
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tiny": (tiny, "of another shape|missing: .*proj"),
    "header": (long_header, "its header has 94371840 bytes"),
    "profile": (lambda f: write(f / "adapter/profile.json", " " * 2**25), "is too large"),
    "nested": (lambda f: write(f / "adapter/profile.json", "[" * 10**5), "nested"),
    "number": (number, "not a profile|OverflowError|float"),
    "anchor-wide": (lambda f: resized(f, hidden_size=10**5, intermediate_size=10**5), "does not hold"),
    "anchor-deep": (lambda f: resized(f, num_hidden_layers=10**6), "does not hold"),
    "anchor-classes": (lambda f: resized(f, num_labels=10**9, id2label=None), "at most 131072 is reasonable"),
    "pickle": (pickled, "safetensors"),
    "itself": (lambda f: named(f, "adapter"), "a stitched model itself"),
    "each-other": (lambda f: named(f, "adapter", "other"), "a stitched model itself"),
}


def with_file(folder: Path, original: Path, name: str) -> None:
    """An adapter with anchors of its own, one file of it changed."""
    copied(folder, original, "good")
    FILES[name][0](folder)


def asking(folder: Path, original: Path, name: str) -> None:
    """An adapter whose config.json asks for more than there is."""
    base, change, _ = ASKS[name]
    shutil.copytree(original / base, folder / "adapter")
    config = json.loads((folder / "adapter/config.json").read_text())
    change(config)
    write(folder / "adapter/config.json", config)


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


@pytest.mark.slow
def test_hostile_folders(original, tmp_path_factory):
    """Only documented and short errors, no code, nothing written, little memory and time, for hundreds of adapters."""
    rng = random.Random(0)
    (original / "precious").mkdir(exist_ok=True)
    write(original / "precious/notes.json", {"mine": True})
    kinds = [kind for kind, (_, weight) in CHANGES.items() for _ in range(weight)]
    names = [f"{index:03}-{kinds[index % len(kinds)]}" for index in range(AMOUNT)]
    for name in names:
        hostile(original / name, original, rng, name[4:].lstrip("0123456789-"))
    for name in ASKS:
        asking(original / f"asks-{name}", original, name)
    for name in FILES:
        with_file(original / f"asks-{name}", original, name)
    refusals = {f"asks-{name}": entry[-1] for name, entry in (ASKS | FILES).items()}
    names += refusals
    before = state(original)
    env = os.environ | {"HF_ASSETS_CACHE": str(tmp_path_factory.mktemp("assets")), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LOADER, str(original), json.dumps(names)], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = json.loads(run.stdout.splitlines()[-1])
    assert [name for name, *_ in answers] == names
    for name, kind, length, said, seconds, grown, seen in answers:
        about = (name, kind, said, seconds, grown)
        assert not seen and not kind.startswith("UNDOCUMENTED"), (*about, seen)
        assert length < 4000 and seconds < 10 and grown < 1000, about
    assert state(original) == before
    for name, kind, _, said, *_ in answers[AMOUNT:]:
        assert kind and re.search(refusals[name], said), (name, kind, said)
    refused = [kind for _, kind, *_ in answers[:AMOUNT] if kind]
    assert AMOUNT / 2 < len(refused) < AMOUNT, "some were to load"
