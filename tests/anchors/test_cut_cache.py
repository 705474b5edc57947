"""A network is searched once: the second time its cuts come from disk and are the same."""

import contextlib
import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import CLASSES, MODELS, SIZE, assert_parts_make_the_whole, make_anchor, make_model, save_model
from huggingface_hub import cached_assets_path
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from restnet_hf import StitchConfig, StitchedModelForImageClassification, caching
from restnet_hf.anchors import cut_cache
from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.discovery import find_cuts
from restnet_hf.data.preprocessing import Preprocessing


LIBRARY_MODELS = [name for name in MODELS if name != "plain"]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where the client of the Hub keeps this package's files, in a place of the test's own."""
    monkeypatch.setattr(caching, "cached_assets_path", partial(cached_assets_path, assets_dir=tmp_path))
    return caching.assets_folder(caching.CUTS)


def anchor(name, seed=0, size=SIZE):
    return Anchor(make_model(name, seed), name, Preprocessing((size, size)))


def ran(searched):
    """Whether the search ran the network; hooks on modules would themselves keep it from the cache."""
    ran = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: ran.append(module))
    try:
        searched.search()
    finally:
        handle.remove()
    return bool(ran)


@pytest.mark.parametrize("name", LIBRARY_MODELS)
def test_the_second_load_does_not_search(images, name):
    first, second = anchor(name), anchor(name, seed=1)
    assert ran(first) and not ran(second)
    assert [(c.name, c.aliases, c.layout) for c in second.cuts] == [(c.name, c.aliases, c.layout) for c in first.cuts]
    assert (second.search_result.classes, second.search_result.classifier) == (
        first.search_result.classes,
        first.search_result.classifier,
    )
    assert_parts_make_the_whole(second, images)
    with torch.no_grad():
        assert torch.equal(second.bake(2)(second(images, stop=2)), second(images))


def test_other_sizes_and_settings_are_searched():
    assert ran(anchor("resnet"))
    assert ran(anchor("resnet", size=2 * SIZE))
    other = anchor("resnet")
    other.granularity = "module"
    assert ran(other)
    assert ran(Anchor(make_model("resnet").double(), "double", Preprocessing((SIZE, SIZE))))
    deeper = transformers.ResNetConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 2], layer_type="basic")
    deeper.num_labels = 5
    assert ran(Anchor(transformers.ResNetForImageClassification(deeper), "deeper", Preprocessing((SIZE, SIZE))))
    assert not ran(anchor("resnet"))


def test_settings_that_weights_do_not_show():
    """Two networks of equal weights: the number of attention heads is in no shape."""
    keys = set()
    for heads in (1, 2, 4):
        config = transformers.ViTConfig(
            image_size=SIZE, patch_size=16, hidden_size=32, num_attention_heads=heads, num_hidden_layers=2
        )
        keys.add(cut_cache.architecture(transformers.ViTForImageClassification(config), (SIZE, SIZE), "block"))
    assert len(keys) == 3 and None not in keys


def test_names_are_no_settings(tmp_path):
    config = transformers.ViTConfig(image_size=SIZE, patch_size=16, hidden_size=32, num_attention_heads=2)
    config.num_hidden_layers = 1
    keys = set()
    for place, label in (("here", "cat"), ("there", "dog")):
        config.id2label = {0: label, 1: "other"}
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / place)
        model = transformers.ViTForImageClassification.from_pretrained(tmp_path / place)
        keys.add(cut_cache.architecture(model, (SIZE, SIZE), "block"))
    assert len(keys) == 1


def test_another_attention_or_version_is_another_key(monkeypatch):
    model = make_model("vit")
    keys = {cut_cache.architecture(model, (SIZE, SIZE), "block")}
    model.set_attn_implementation("eager")
    keys.add(cut_cache.architecture(model, (SIZE, SIZE), "block"))
    monkeypatch.setattr(cut_cache, "software_sha256", lambda *what: "other software")
    keys.add(cut_cache.architecture(model, (SIZE, SIZE), "block"))
    model.vit.config.hidden_act = "relu"
    keys.add(cut_cache.architecture(model, (SIZE, SIZE), "block"))
    assert len(keys) == 4


def test_a_failed_search_is_not_kept(folder):
    """Weights that are not numbers certify nothing; the next network of the kind is searched, and is fine."""
    broken = make_model("vit")
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="'vit' .* has 0 places"):
        Anchor(broken, "vit", Preprocessing((SIZE, SIZE))).search()
    assert not list(folder.iterdir())
    assert anchor("vit").depth == 3


class Scaled(nn.Module):
    """Hands on a number that comes from a weight."""

    class Stem(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), self.bias[:1].clone()

    def __init__(self):
        super().__init__()
        self.stem = self.Stem(3, 4, 3, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x, scale = self.stem(x)
        for block in self.blocks:
            x = block(x) * scale
        return self.head(x.mean((2, 3)))


def test_values_from_weights_are_not_kept(folder):
    found = find_cuts(Scaled(), (16, 16))
    assert len(found.cuts) == 3
    with pytest.raises(ValueError, match="may depend on weights"):
        cut_cache._write(folder / "cuts.safetensors", found, "scaled")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("change", [('"float32"', '"float99"'), ("builtins.tuple", "os.path"), ('"NLC"', '"LCN"')])
def test_a_file_of_strange_contents_is_written_again(folder, change):
    anchor("swin").search()
    (file,) = folder.iterdir()
    with safe_open(file, "pt") as opened:
        text, tensors = opened.metadata()["cuts"], {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    old, new = (part.replace('"', '\\"') if "builtins" in change[0] else part for part in change)
    assert old in text
    save_file(tensors, file, {"cuts": text.replace(old, new)})
    assert ran(anchor("swin")) and not ran(anchor("swin"))


def test_code_without_a_version_is_searched_every_time(folder):
    assert ran(anchor("plain")) and ran(anchor("plain"))
    changed = make_model("resnet")
    changed.resnet.forward = changed.resnet.forward
    assert cut_cache.architecture(changed, (SIZE, SIZE), "block") is None
    assert not list(folder.iterdir())


@pytest.mark.parametrize("damage", [b"", b"not a file of tensors", None])
def test_a_damaged_file_is_written_again(folder, damage):
    anchor("vit").search()
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    assert ran(anchor("vit")) and not ran(anchor("vit"))


def test_without_a_place_to_write(folder):
    """A file stands where the folder should be."""
    folder.rmdir()
    folder.write_text("in the way")
    assert ran(anchor("vit")) and anchor("vit").depth == 3
    assert folder.read_text() == "in the way"


@pytest.mark.parametrize("context", [partial(torch.device, "meta"), init_empty_weights])
@pytest.mark.parametrize("names", [("resnet", "vit"), ("swin", "resnet")])
def test_models_without_values(tmp_path, folder, images, names, context):
    """A config builds a model on the meta device also where its cuts were never searched for; weights come after."""
    model = two(tmp_path, names)
    found = [other.search_result for other in model.anchors.values()]
    config = copy.deepcopy(model.config)
    for file in folder.iterdir():
        file.unlink()
    with context():
        empty = StitchedModelForImageClassification(config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.state_dict().keys() == model.state_dict().keys()
    for other, before in zip(empty.anchors.values(), found, strict=True):
        assert [(c.name, c.layout) for c in other.cuts] == [(c.name, c.layout) for c in before.cuts]
        assert (other.search_result.classes, other.search_result.classifier) == (before.classes, before.classifier)
    assert list(folder.iterdir()), "kept for the next time"
    if context is init_empty_weights:  # buffers have values
        empty.load_state_dict(model.state_dict(), assign=True)
        with torch.no_grad():
            assert torch.equal(empty.eval()(images).logits, model(images).logits)


def two(tmp_path, names):
    """A model out of two folders, with a stitch of every kind that reads no weights."""
    folders = [save_model(name, tmp_path / name) for name in names]
    model = StitchedModelForImageClassification.from_anchors(*folders, order="given")
    front, end = model.anchors.values()
    for number, kind in enumerate(("lora", "mlp", "linear"), 1):
        model.set_route(model.add_stitch(f"{front.name}[:{number}] + {end.name}[2:]", StitchConfig(kind)))
    model.add_stitch(f"{front.name}[:1] + {front.name}[2:]", StitchConfig("branch"))
    return model


@pytest.mark.parametrize("name", ["plain", "mobilenet", "swin", "swin_nhwc"])
def test_search_on_another_device_than_ones_own(name, images):
    """What ``torch.device`` says is for what the user makes, and not for what a search does with real weights."""
    expected = make_anchor(name)
    with torch.device("meta"):
        found = find_cuts(make_anchor_on_cpu(name).model, (SIZE, SIZE))
    assert [(c.name, c.layout) for c in found.cuts] == [(c.name, c.layout) for c in expected.cuts]


def make_anchor_on_cpu(name):
    with torch.device("cpu"):
        return make_anchor(name)


def test_what_cannot_be_searched_without_values(tmp_path):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="Sequential is on the meta device, where it has no values"),
    ):
        find_cuts(nn.Sequential(MODELS["plain"][0](), nn.BatchNorm1d(CLASSES)), (SIZE, SIZE))
    model = StitchedModelForImageClassification.from_anchors(save_model("vit", tmp_path / "vit"))
    model.add_stitch("vit[:1] +prune50_2 vit[2:]", StitchConfig("branch"))
    with torch.device("meta"), pytest.raises(ValueError, match="a pruned copy keeps depends on its weights"):
        StitchedModelForImageClassification(copy.deepcopy(model.config))


@contextlib.contextmanager
def small_disk(folder, *options):
    """A file system of its own, with room for two pages; a test without the right to mount one is skipped."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(("size=8k", *options)), "tmpfs", folder], check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system, as root on Linux")
@pytest.mark.parametrize("options", [(), ("ro",)], ids=["full", "read-only"])
def test_a_disk_that_takes_nothing(folder, options):
    """The cuts are found, nothing is kept, and nothing of a failed try is left."""
    with small_disk(folder, *options):
        if not options:
            with contextlib.suppress(OSError), (folder / "filler").open("wb") as file:
                file.write(bytes(2**16))
        assert ran(anchor("vit")) and ran(anchor("vit")) and anchor("vit").depth == 3
        assert {path.name for path in folder.iterdir()} <= {"filler"}


def test_a_place_that_cannot_be_read(folder, monkeypatch):
    """Its name is too long for the file system, which is only known when it is looked for."""
    monkeypatch.setattr(caching, "cached_assets_path", lambda *names: folder / ("x" * 300))
    assert ran(anchor("vit")) and anchor("vit").depth == 3
