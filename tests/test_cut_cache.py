"""A network is searched once: the second time its cuts come from disk and are the same."""

import pytest
import torch
import transformers
from conftest import MODELS, SIZE, assert_parts_make_the_whole, make_model
from torch import nn

from restnet_hf import cut_cache
from restnet_hf.anchors import Anchor
from restnet_hf.preprocessing import Preprocessing


LIBRARY_MODELS = [name for name in MODELS if name != "plain"]


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(cut_cache, "cached_assets_path", lambda *names: tmp_path)
    return tmp_path


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
    assert (second.found.classes, second.found.classifier) == (first.found.classes, first.found.classifier)
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


def test_without_a_place_to_write(monkeypatch):
    def refuse(*names):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(cut_cache, "cached_assets_path", refuse)
    assert ran(anchor("vit")) and anchor("vit").depth == 3
