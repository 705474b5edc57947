"""`from_pretrained` takes the options of transformers with their meaning, or gives the reason why not."""

import copy
import logging
import shutil

import pytest
import torch
from conftest import CLASSES, SIZE, make_anchor, make_model, save_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification, pipeline

from restnet_hf import RestNetConfig, StitchedModelForImageClassification
from restnet_hf.hub.adapter_files import WEIGHTS
from restnet_hf.hub.loading_options import CONFIG_KEYS, REFUSED, hub_options


Model = StitchedModelForImageClassification
ROUTE = "resnet[:3] + vit[2:]"
NAMES = {0: "cat", 1: "dog", 2: "owl"}
AT = {"ours": Model.from_pretrained, "auto": AutoModelForImageClassification.from_pretrained}


def through_pipeline(path, **options):
    return pipeline("image-classification", model=str(path), model_kwargs=options).model


WAYS = AT | {"pipeline": through_pipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters on the same anchors: of their own classes, and with new heads."""
    folder = tmp_path_factory.mktemp("adapters")
    images = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for name in ("resnet", "vit"):
        save_model(name, folder / name)
    for name, options in (("own", {}), ("new", {"id2label": NAMES})):
        model = Model.from_anchors(folder / "resnet", folder / "vit", order="given", **options)
        model.set_route(model.add_stitch(ROUTE))
        model.fit_stitches(images)
        model.profile([(images, torch.zeros(len(images), dtype=torch.long))])
        if options:
            model.config.trained_heads = ["vit"]
        model.save_pretrained(folder / name)
        if name == "new":
            model.save_pretrained(folder / "whole", standalone=True)
    return folder


@pytest.fixture
def log(caplog):
    """What is logged where transformers says what it loaded."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("way", AT)
def test_output_loading_info(folders, way):
    """The keys and types that transformers gives."""
    model, info = AT[way](folders / "own", output_loading_info=True)
    assert isinstance(model, Model)
    _, expected = ViTForImageClassification.from_pretrained(folders / "vit", output_loading_info=True)
    assert info == expected and {key: type(value) for key, value in info.items()} == {
        key: type(value) for key, value in expected.items()
    }
    assert isinstance(AT[way](folders / "own", output_loading_info=False), Model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["own", "whole"])
@torch.no_grad()
def test_attn_implementation(folders, images, name, way):
    plain, eager = (WAYS[way](folders / name, **options) for options in ({}, {"attn_implementation": "eager"}))
    assert [m.anchors["vit"].model.config._attn_implementation for m in (plain, eager)] == ["sdpa", "eager"]
    assert eager.config._attn_implementation == "eager"
    assert torch.allclose(plain(images).logits, eager(images).logits, atol=1e-5)


def test_attention_by_anchor(log):
    anchors = [make_anchor("vit"), make_anchor("vit", seed=1)]
    model = Model.from_anchors(*anchors, order="given")
    attention = [anchor.model.config for anchor in anchors]
    model.set_attn_implementation("eager")
    assert [config._attn_implementation for config in attention] == ["eager", "eager"]
    again = copy.deepcopy(model.config)
    model.set_attn_implementation({"vit_2": "sdpa"})
    assert [config._attn_implementation for config in attention] == ["eager", "sdpa"]
    with pytest.raises(ValueError, match="no anchor named 'resnet'"):
        model.set_attn_implementation({"vit": "sdpa", "resnet": "eager"})
    with pytest.raises(ValueError, match='"foo"` is not supported'):
        model.set_attn_implementation("foo")
    assert [config._attn_implementation for config in attention] == ["eager", "sdpa"]
    assert all(a.model.config._attn_implementation == "eager" for a in Model(again).anchors.values())


def test_attention_of_anchors_without(pair, caplog):
    """A CNN is left alone where another anchor can be asked; where none can, that is an error."""
    pair.set_attn_implementation("sdpa")
    assert "anchors ['resnet'] keep the attention they have" in caplog.text
    pair.set_attn_implementation("eager")
    alone = Model.from_anchors(make_anchor("resnet"), make_anchor("plain"))
    with pytest.raises(
        ValueError, match="does not support an attention implementation|is not a model of transformers"
    ):
        alone.set_attn_implementation("sdpa")
    assert Model(pair.config).anchors["vit"].model.config._attn_implementation == "eager"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["new", "whole"])
@pytest.mark.parametrize("options", [{"num_labels": 7}, {"id2label": dict(enumerate("abcd"))}])
def test_ignore_mismatched_sizes(folders, images, log, name, way, options):
    """Heads for other classes start anew, everything else is as saved."""
    model = WAYS[way](folders / name, ignore_mismatched_sizes=True, **options)
    count = options.get("num_labels") or 4
    assert model(images).logits.shape == (len(images), count) and model.config.num_labels == count
    assert {"heads.vit.weight", "heads.resnet.bias"} <= {line.split(":")[0] for line in log.text.splitlines()}
    assert "Reinit due to size mismatch, (3,) there and" in log.text
    assert model.profiled is None and model.config.trained_heads == [], "they were of other heads"
    old = load_file(folders / "new" / WEIGHTS)
    for key, value in model.adapter_state_dict().items():
        assert torch.equal(value, old[key]) is key.startswith("stitches.")
    assert model.config.stitches[model.active_route.stitch_points[0].name]["r2"] is not None
    if "id2label" in options:
        assert model.config.id2label == options["id2label"]


def test_mismatched_in_the_info(folders, log):
    _, info = Model.from_pretrained(
        folders / "new", num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["missing_keys"] == set() and info["unexpected_keys"] == set()
    heads = {(f"heads.{name}.bias", (3,), (7,)) for name in ("resnet", "vit")}
    assert heads < info["mismatched_keys"] and len(info["mismatched_keys"]) == 4


def test_a_mismatched_stitch_starts_anew(folders, log):
    config = RestNetConfig.from_pretrained(folders / "own")
    (name,) = config.stitches
    before = copy.deepcopy(config.stitches)
    weights = Model(config).adapter_state_dict()
    key = next(iter(weights))
    weights[key] = torch.zeros(1)
    model, info = Model.from_pretrained(
        folders / "own", config=config, state_dict=weights, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {k for k, *_ in info["mismatched_keys"]} == {key}
    assert "r2" in before[name] and "r2" not in model.config.stitches[name]
    assert config.stitches == before, "the caller's config stays as it is"


@pytest.mark.parametrize("way", AT)
def test_sizes_that_do_not_match(folders, way):
    """A ValueError as before, and a RuntimeError as in transformers."""
    for error in (ValueError, RuntimeError):
        with pytest.raises(error, match=r"of another shape: heads\.resnet\.bias \(3,\) instead of \(7,\).*ignore_mis"):
            AT[way](folders / "new", num_labels=7)
    with pytest.raises(ValueError, match="the anchors have 5 classes, not num_labels=7.*from_anchors"):
        AT[way](folders / "own", num_labels=7, ignore_mismatched_sizes=True)


def test_names_of_the_same_classes(folders, images):
    names = {0: "a", 1: "b", 2: "c"}
    by_name = {"a": 0, "b": 1, "c": 2}
    for options in ({"id2label": names}, {"label2id": by_name}, {"id2label": names, "label2id": by_name}):
        model = Model.from_pretrained(folders / "new", **options)
        assert model.config.id2label == names and model.config.label2id == by_name
    assert Model.from_pretrained(folders / "new", num_labels=3).config.id2label == NAMES
    for wrong in (
        {"id2label": names, "num_labels": 4},
        {"id2label": names, "label2id": {"a": 0}},
        {"id2label": {1: "a", 2: "b", 3: "c"}},
        {"num_labels": 0},
    ):
        with pytest.raises(ValueError, match="id2label|num_labels"):
            Model.from_pretrained(folders / "new", **wrong)


def test_values_of_the_config(folders, images):
    model = Model.from_pretrained(
        folders / "new", problem_type="multi_label_classification", output_hidden_states=True, return_dict=False
    )
    loss, _, states = model(images, torch.ones(len(images), 3))
    assert loss.shape == () and len(states) == 5


@torch.no_grad()
def test_state_dict_instead_of_the_file(folders, images, tmp_path):
    """Config, profile and anchors are the folder's; the tensors are the caller's, and stay hers."""
    shutil.copytree(folders / "own", tmp_path / "own")
    weights = {key: value + 1 for key, value in load_file(tmp_path / "own" / WEIGHTS).items()}
    (tmp_path / "own" / WEIGHTS).unlink()
    model = Model.from_pretrained(tmp_path / "own", state_dict=weights)
    auto = AutoModelForImageClassification.from_pretrained(tmp_path / "own", state_dict=weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.adapter_state_dict().items())
    assert torch.equal(model(images).logits, auto(images).logits) and model.profiled is not None
    for parameter in model.stitches.parameters():
        parameter.zero_()
    assert all(bool(value.any()) for value in weights.values())
    with pytest.raises(ValueError, match="the weights in .* missing: stitches"):
        Model.from_pretrained(tmp_path / "own", state_dict={})


@torch.no_grad()
def test_config_and_state_dict_alone(folders, images):
    """With the anchors' weights in it nothing else is read; without, anchors come from where the config says."""
    model = Model.from_pretrained(folders / "own")
    whole = model.state_dict()
    for weights in (whole, model.adapter_state_dict()):
        again = Model.from_pretrained(None, config=model.config, state_dict=weights)
        assert torch.equal(again(images).logits, model(images).logits)
    for parameter in Model.from_pretrained(None, config=model.config, state_dict=whole).parameters():
        parameter.zero_()
    assert torch.equal(model(images).logits, again(images).logits), "its anchors are its own"
    other = {k: v + 1 if k == "anchors.vit.model.classifier.bias" else v for k, v in whole.items()}
    with pytest.raises(ValueError, match="anchor 'vit'.*is not the network"):
        Model.from_pretrained(None, config=model.config, state_dict=other)
    for options in ({"config": model.config}, {"state_dict": whole}, {}):
        with pytest.raises(ValueError, match="needs config= and state_dict="):
            Model.from_pretrained(None, **options)


@torch.no_grad()
def test_state_dict_of_a_config_that_was_never_saved(images, tmp_path):
    model = Model.from_anchors(make_anchor("resnet"), make_anchor("vit"), order="given")
    model.set_route(model.add_stitch(ROUTE))
    assert model.config.anchors[0]["fingerprint"] is None
    again = Model.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(again(images).logits, model(images).logits)
    assert model.config.anchors[0]["fingerprint"] is None and again.config.anchors[0]["fingerprint"]
    again.save_pretrained(tmp_path, standalone=True)
    assert torch.equal(Model.from_pretrained(tmp_path)(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="missing: classifier.1.bias"):
        Model.from_pretrained(
            None, config=model.config, state_dict={"anchors.vit.x": torch.zeros(1)} | model.adapter_state_dict()
        )
    broken = copy.deepcopy(model.config)
    broken.anchors[0]["config"] = {"model_type": "none"}
    with pytest.raises(ValueError, match="the config given with the state dict is invalid|cannot be rebuilt"):
        Model.from_pretrained(None, config=broken, state_dict=model.state_dict())
    with pytest.raises(ValueError, match="lacks its fingerprint"):
        Model.from_pretrained(None, config=model.config, state_dict=model.adapter_state_dict())


def test_config_from_elsewhere(folders):
    model = Model.from_pretrained(folders / "new", config=folders / "new")
    assert model.config.id2label == NAMES
    auto = AutoModelForImageClassification.from_pretrained(
        folders / "new", config=AutoConfig.from_pretrained(folders / "new")
    )
    assert auto.routes == model.routes


@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_in_any_case(folders, way):
    options = {"use_safetensors": True, "weights_only": True, "low_cpu_mem_usage": True, "variant": None}
    assert isinstance(WAYS[way](folders / "own", **options, max_memory=None, from_tf=False), Model)
    for name in ("use_safetensors", "weights_only"):
        assert isinstance(WAYS[way](folders / "own", **{name: None}), Model)
        with pytest.raises(ValueError, match=f"takes no {name}=False: adapters are safetensors files"):
            WAYS[way](folders / "own", **{name: False})


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_apply(folders, name):
    by_auto = ("gguf_file", "experts_implementation", "code_revision")  # what Auto classes read or refuse themselves
    for way in list(AT.values())[: 1 if name in by_auto else None]:
        with pytest.raises(TypeError, match=f"from_pretrained takes no {name}: .{{20,}}"):
            way(folders / "own", **{name: True if name == "output_attentions" else "something"})


def test_a_pipeline_says_why(folders):
    with pytest.raises(ValueError, match="takes no variant: an adapter has one file, model.safetensors"):
        through_pipeline(folders / "own", variant="fp16")


def test_pipeline_gives_new_labels(folders):
    classify = pipeline(
        "image-classification", model=str(folders / "new"), model_kwargs={"id2label": dict(enumerate("abc"))}
    )
    assert {row["label"] for row in classify(Image.new("RGB", (SIZE, SIZE)))} == {"a", "b", "c"}


KNOWN = {*REFUSED, *CONFIG_KEYS, "use_safetensors", "weights_only", "low_cpu_mem_usage", "cache_dir", "token"}


@given(st.dictionaries(st.text(min_size=1) | st.sampled_from(sorted(KNOWN)), st.none() | st.text(), min_size=1))
def test_unknown_options_are_named(options):
    """Whatever is asked for is taken, or named in the error."""
    try:
        hub = hub_options("from_pretrained", options, (*CONFIG_KEYS, "use_safetensors", "weights_only"))
    except TypeError as error:
        assert any(str(name) in str(error) or repr(name) in str(error) for name in options)
    else:
        assert options.keys() <= KNOWN | {"force_download", "local_files_only", "proxies", "torch_dtype"}
        assert hub == {k: v for k, v in options.items() if k in ("cache_dir", "token") and v is not None}


def test_load_stitch_takes_less(folders):
    model = Model.from_pretrained(folders / "own")
    for options in ({"num_labels": 3}, {"quantise": True}, {"variant": "fp16"}):
        with pytest.raises(TypeError, match="load_stitch takes no"):
            model.load_stitch(folders / "own", "more", **options)
    assert model.load_stitch(folders / "own", "more")


def test_given_anchors_can_be_used_with_all_of_it(folders, images):
    """Modules for anchors beside the new options."""
    given = {name: make_model(name) for name in ("resnet", "vit")}
    model, info = Model.from_pretrained(
        folders / "own", anchors=given, attn_implementation="eager", output_loading_info=True
    )
    assert given["vit"].config._attn_implementation == "eager" and not info["mismatched_keys"]
    assert model(images).logits.shape[1] == CLASSES
