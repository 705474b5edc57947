"""Tiny random classifiers of every layout, the demo's trained anchors, and real images."""

import atexit
import os
import shutil
import tempfile


os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library reads it
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="restnet-hf-tests-")

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from fork_server import ForkServers
from hub_server import World, running
from safetensors.torch import save_file
from torch import nn
from transformers import ViTImageProcessor

import restnet_hf
from restnet_hf import Anchor, StitchedModelForImageClassification, load_anchor
from restnet_hf.data.datasets import load_images, subset, with_pixel_values
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.demo.paths import DATA, DEMO, END, FRONT


atexit.register(shutil.rmtree, os.environ["HF_ASSETS_CACHE"], ignore_errors=True)
SIZE = 64
CLASSES = 5
VIT = {"image_size": SIZE, "patch_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
SWIN = {"image_size": SIZE, "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 2], "window_size": 2}
transformers.utils.logging.disable_progress_bar()


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of unit gain: the usual ones leave logits nearly constant, and equality would say nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(1 + 0.1 * noise)
    return model.eval()


def _hf(config: transformers.PreTrainedConfig) -> nn.Module:
    config.num_labels = CLASSES
    return transformers.AutoModelForImageClassification.from_config(config)


def _timm(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **options)


class Plain(nn.Module):
    """A classifier that no library knows; its in-place ReLUs write into the activations at its cuts."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width in ((3, 8), (8, 12), (12, 16)):
            layers += [nn.Conv2d(width_in, width, 3, 2, 1), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class OneBlock(nn.Module):
    """Too small to be cut; other networks build on it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3, 2)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](x).mean((2, 3)))


# One representative of each layout and library: how to build it, and the layout kind and prefix of its cuts.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "resnet": (
        lambda: _hf(transformers.ResNetConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 1], layer_type="basic")),
        "NCHW",
        0,
    ),
    "vit": (lambda: _hf(transformers.ViTConfig(num_hidden_layers=3, **VIT)), "NLC", 1),
    "swin": (lambda: _hf(transformers.SwinConfig(**SWIN)), "NLC", 0),
    "mobilenet": (lambda: _timm("mobilenetv3_small_050"), "NCHW", 0),
    "swin_nhwc": (
        lambda: _timm(
            "swin_tiny_patch4_window7_224",
            img_size=SIZE,
            window_size=2,
            embed_dim=16,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 2, 2),
        ),
        "NHWC",
        0,
    ),
    "registers": (
        lambda: _timm(
            "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=32, depth=3, num_heads=2, reg_tokens=4
        ),
        "NLC",
        5,
    ),
    "distilled": (
        lambda: _timm("deit_tiny_distilled_patch16_224", img_size=SIZE, embed_dim=24, depth=3, num_heads=2),
        "NLC",
        2,
    ),
    "plain": (Plain, "NCHW", 0),
    "tnt": (
        lambda: _timm("tnt_s_patch16_224", img_size=SIZE, embed_dim=32, inner_dim=8, depth=4, num_heads_outer=2),
        "NLC+NLC",
        1,
    ),
}


def make_model(name: str, seed: int = 0) -> nn.Module:
    """A fresh model of `MODELS`, the same every time."""
    return spread(MODELS[name][0](), seed)


def save_model(name: str, folder: Path, seed: int = 0) -> Path:
    """A folder with a model of `MODELS` and its image processor, as the Hub has them."""
    make_model(name, seed).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def vit_layers(model):
    """The blocks of a ViT of transformers, which older versions call encoder.layer."""
    return getattr(model.vit, "layers", None) or model.vit.encoder.layer


def make_anchor(name: str, seed: int = 0) -> Anchor:
    """A fresh anchor of `MODELS`."""
    return Anchor(make_model(name, seed), name, Preprocessing((SIZE, SIZE)))


def assert_parts_make_the_whole(anchor: Anchor, images: torch.Tensor) -> None:
    """To each cut and on from it, and from each to the next, as the whole does."""
    with torch.no_grad():
        whole = anchor(images)
        captured = anchor.capture(images, [*range(1, anchor.depth + 1), None])
        assert torch.equal(captured[None], whole)
        assert whole.std(0).mean() > 1e-3, "logits hardly depend on the image, equality would say nothing"
        for index in range(1, anchor.depth + 1):
            activation = anchor(images, stop=index)
            assert activation.shape == anchor.layout(index).shape(len(images))
            assert torch.equal(activation, captured[index])
            kept = activation.clone()
            assert torch.equal(anchor(activation, start=index), whole)
            assert torch.equal(activation, kept), "the segment wrote into what it was given"
            if index < anchor.depth:
                assert torch.equal(anchor(activation, index, index + 1), captured[index + 1])


@pytest.fixture(scope="session")
def anchors() -> dict[str, Anchor]:
    """Every representative, its cuts found once. Tests do not change them."""
    return {name: make_anchor(name) for name in MODELS}


@pytest.fixture
def pair() -> StitchedModelForImageClassification:
    """A fresh model of a ResNet in front of a ViT, random weights, one stitch."""
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), order="given"
    )
    model.set_route(model.add_stitch("resnet[:3] + vit[2:]"))
    return model


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Noise, for the tiny random models."""
    return torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def saved(
    tmp_path: Path, images: torch.Tensor
) -> tuple[StitchedModelForImageClassification, Path, torch.Tensor, torch.Tensor]:
    """A model out of two folders, saved: (model, path of the adapter, images, logits)."""
    for name in ("resnet", "vit"):
        save_model(name, tmp_path / name)
    model = StitchedModelForImageClassification.from_anchors(tmp_path / "resnet", tmp_path / "vit", order="given")
    for route in ("resnet[:2] + vit[1:]", "resnet[:4] + vit[2:]"):
        model.set_route(model.add_stitch(route))
    model.fit_stitches(images)
    model.profile([(images, torch.zeros(len(images), dtype=torch.long))])
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return model, tmp_path / "adapter", images, model(images).logits


@pytest.fixture(scope="session")
def processes():
    """Processes of their own, forked from one that has imported the package."""
    servers = ForkServers(
        "import restnet_hf.cli, restnet_hf.adaptation.adapt, restnet_hf.export.export, restnet_hf.recipe"
    )
    yield servers
    servers.close()


PARENTS = {"me/big-resnet": ("resnet", "mit"), "me/small-vit": ("vit", "apache-2.0")}
PUSH = """
model = Model.from_anchors("me/big-resnet", "me/small-vit", order="given")
routes = [model.add_stitch(r) for r in ("big-resnet[:2] + small-vit[1:]", "big-resnet[:4] + small-vit[2:]")]
model.set_route(routes[0])
model.fit_stitches(images)
model.profile([(images, torch.zeros(len(images), dtype=torch.long))], metadata={"dataset": "me/noise"})
commits = [model.push_to_hub("me/adapter", commit_message=text) for text in ("one", "two")]
assert commits[0].oid == commits[1].oid, "an unchanged adapter made a commit"
save_file({str(i): (model.set_route(r), model(images).logits)[1] for i, r in enumerate(model.all_routes)},
          folder / "logits.safetensors")
print(json.dumps([str(r) for r in model.all_routes]))
"""


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two anchors on a Hub, an adapter pushed by another process, and images."""
    folder = tmp_path_factory.mktemp("world")
    save_file(
        {"images": torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(7))},
        folder / "images.safetensors",
    )
    with running() as hub:
        for repo_id, (name, licence) in PARENTS.items():
            path = save_model(name, folder / name)
            files = {file.name: file.read_bytes() for file in path.iterdir()}
            hub.put(repo_id, files | {"README.md": f"---\nlicense: {licence}\n---\n".encode()})
        world = World(hub, folder)
        world.routes = world.run(PUSH, "author")
        yield world
        world.processes.close()


@pytest.fixture(scope="session")
def demo_anchor() -> Callable[[str], Anchor]:
    """A trained anchor of the demo, by name."""
    return lambda name: load_anchor(DEMO / name, dtype=torch.float32)


@pytest.fixture
def demo_model() -> StitchedModelForImageClassification:
    """The demo's trained anchors, no stitches yet."""
    return StitchedModelForImageClassification.from_anchors(FRONT, END, dtype=torch.float32)


@pytest.fixture(scope="session")
def clothes() -> Callable[..., object]:
    """Real images for a model: ``clothes(model, "train", 200)``."""

    def make(model: StitchedModelForImageClassification, split: str, size: int | None = None) -> object:
        return with_pixel_values(subset(load_images(DATA, split), size), model.image_processor)

    return make


@pytest.fixture(scope="session")
def package() -> Path:
    """Folder of the package."""
    return Path(restnet_hf.__file__).parent
