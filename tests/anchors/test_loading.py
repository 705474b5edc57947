"""Anchors come from folders of transformers and timm, and say what is wrong with them."""

import json

import pytest
import torch
from conftest import CLASSES, MODELS, SIZE, make_model, save_model
from safetensors.torch import save_file
from torch import nn

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.anchors.anchor import free_name
from restnet_hf.anchors.loading import load_anchor
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.routes.route import ANCHOR_NAME
from restnet_hf.steps import run_steps


def test_load(tmp_path, images):
    save_model("vit", tmp_path / "my.vit.v1")
    model = make_model("vit")
    for source in (tmp_path / "my.vit.v1", str(tmp_path / "my.vit.v1"), f"local-dir:{tmp_path}/my.vit.v1"):
        anchor = load_anchor(source)
        assert (anchor.name, anchor.repo_id) == ("my", str(tmp_path / "my.vit.v1"))
        assert torch.allclose(anchor(images), model.eval()(images).logits, atol=1e-5)
    assert not any(p.requires_grad for p in anchor.parameters())


def test_load_from_a_folder_that_timm_wrote(tmp_path, images):
    from timm.models import save_for_hf

    model = MODELS["mobilenet"][0]().eval()
    save_for_hf(model, tmp_path / "small", safe_serialization=True)
    anchor = load_anchor(tmp_path / "small", image_size=SIZE)
    # the file's tensors lie at other addresses, and kernels round by alignment
    assert torch.allclose(anchor(images), model(images), atol=1e-5)
    assert anchor.preprocessing.image_size == (SIZE, SIZE)
    assert anchor.preprocessing.mean == model.pretrained_cfg["mean"]


def test_unknown_id():
    with pytest.raises(OSError, match=r"anchor 'nobody/nothing' cannot be loaded: it must be a local folder"):
        load_anchor("nobody/nothing")


def test_images_must_be_understood(tmp_path):
    with pytest.raises(
        ValueError, match=r"the preprocessing of Plain is unknown.*Pass load_anchor\(..., preprocessing="
    ):
        load_anchor(make_model("plain"), image_size=SIZE)
    make_model("vit").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="the preprocessing of .*bare is unknown"):
        load_anchor(tmp_path / "bare")
    told = Preprocessing((SIZE, SIZE), (0.1,) * 3, (0.2,) * 3)
    assert load_anchor(tmp_path / "bare", preprocessing=told).preprocessing == told
    save_model("vit", tmp_path / "full")
    other = load_anchor(tmp_path / "full", preprocessing=told)
    assert (other.preprocessing, other.processor) == (told, None)
    with pytest.raises(ValueError, match="either image_size or preprocessing"):
        load_anchor(tmp_path / "full", preprocessing=told, image_size=SIZE)
    with pytest.raises(ValueError, match="is made already"):
        load_anchor(other, image_size=SIZE)


CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

torch.foreign_code_ran = True


class StrangeConfig(PreTrainedConfig):
    model_type = "strange"


class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(nn.Conv2d(width, 8, 3, 2, 1) for width in (3, 8, 8))
        self.head = nn.Linear(8, config.num_labels)
        self.post_init()

    def forward(self, pixel_values):
        for block in self.blocks:
            pixel_values = block(pixel_values)
        return ImageClassifierOutput(logits=self.head(pixel_values.mean((2, 3))))
"""


def test_code_from_elsewhere_needs_consent(tmp_path, monkeypatch):
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "strange.py").write_text(CODE)
    names = {"AutoConfig": "strange.StrangeConfig", "AutoModelForImageClassification": "strange.StrangeModel"}
    config = {"model_type": "strange", "num_labels": 4, "auto_map": names, "architectures": ["StrangeModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {f"blocks.{k}": (8, 8 if k else 3, 3, 3) for k in range(3)} | {"head": (4, 8)}
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(torch, "foreign_code_ran", False, raising=False)
    told = Preprocessing((SIZE, SIZE))
    with pytest.raises(OSError, match="trust_remote_code"):
        load_anchor(folder, preprocessing=told)
    assert not torch.foreign_code_ran
    anchor = load_anchor(folder, preprocessing=told, trust_remote_code=True)
    assert torch.foreign_code_ran and anchor.depth == 3
    save_model("vit", tmp_path / "vit")
    with pytest.raises(OSError, match="trust_remote_code"):
        StitchedModelForImageClassification.from_anchors(folder, tmp_path / "vit", image_size=SIZE, num_labels=2)


ATTRIBUTES = [name for name in dir(nn.ModuleDict()) if ANCHOR_NAME.fullmatch(name)]


def test_names_that_modules_have_themselves():
    """Every one gets a name that a module can be called by, always the same; names that are free stay."""
    assert {"train", "type", "keys", "values", "float", "T_destination", "_modules"} <= set(ATTRIBUTES)
    for name in (*ATTRIBUTES, "resnet50", "Train", "train_"):
        free = free_name(name)
        nn.ModuleDict({free: nn.Identity(), f"{free}_2": nn.Identity()})
        assert free_name(free) == free == name.ljust(len(name) + (name in ATTRIBUTES), "_")


@pytest.mark.parametrize("options", [{}, {"num_labels": 3}])
@pytest.mark.parametrize("names", [("train", "values"), ("keys", "keys")])
def test_folders_called_like_attributes(tmp_path, images, names, options):
    """Routes, heads, converters and label orders use the name; it is the same when the adapter is loaded."""
    labels = [f"class {index}" for index in range(CLASSES)]
    for kind, folder, order in zip(("resnet", "vit"), ("a", "b"), (labels, labels[::-1]), strict=True):
        path = save_model(kind, tmp_path / folder / names[folder == "b"])
        config = json.loads((path / "config.json").read_text())
        config |= {"id2label": dict(enumerate(order)), "label2id": {name: i for i, name in enumerate(order)}}
        (path / "config.json").write_text(json.dumps(config))
    processor = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.1, 0.2, 0.3]}))
    folders = [tmp_path / folder / name for folder, name in zip("ab", names, strict=True)]
    model = StitchedModelForImageClassification.from_anchors(*folders, order="given", **options)
    front, end = model.anchors
    assert (front, end) == {("train", "values"): ("train_", "values_"), ("keys", "keys"): ("keys_", "keys__2")}[names]
    assert list(model.converters) == [end] and list(model.orders) == ([] if options else [end])
    assert list(model.heads) == ([front, end] if options else [])
    model.set_route(model.add_stitch(f"{front}[:2] + {end}[2:]"))
    for whole in (False, True):
        model.save_pretrained(tmp_path / "adapter", standalone=whole)
        again = StitchedModelForImageClassification.from_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            for route in model.all_routes:
                assert torch.equal(run_steps(images, again.steps(route)), run_steps(images, model.steps(route)))
        again.train().eval().float()
    entry = next(entry for entry in model.config.anchors if entry["name"] == front)
    with pytest.raises(ValueError, match=f"anchors cannot be called .'{front.rstrip('_')}'"):
        entry["name"] = front.rstrip("_")
        StitchedModelForImageClassification(model.config)
