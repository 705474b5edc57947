"""Image processors are measured right, and images are converted exactly between anchors."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor

from restnet_hf.preprocessing import Preprocessing, Reprocess, prepare, timm_processor, with_image_size


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)).resize((300, 260))


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (ViTImageProcessor(), Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3)),
        (BitImageProcessor(image_mean=IMAGENET[0], image_std=IMAGENET[1]), Preprocessing((224, 224), *IMAGENET)),
        (ViTImageProcessor(do_normalize=False, size={"height": 48, "width": 64}), Preprocessing((48, 64))),
        (
            ConvNextImageProcessor(
                size={"shortest_edge": 224}, image_mean=[103.53 / 255] * 3, image_std=[1 / 255] * 3
            ),
            Preprocessing((224, 224), (0.406,) * 3, (1 / 255,) * 3),
        ),
    ],
    ids=["half", "imagenet", "not normalised", "caffe"],
)
def test_measured(processor, expected):
    found = Preprocessing.of(processor)
    assert found.image_size == expected.image_size
    assert found.mean == pytest.approx(expected.mean, rel=1e-6, abs=1e-7)
    assert found.std == pytest.approx(expected.std, rel=1e-6)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "tf_efficientnet_lite0", "vit_small_patch14_dinov2"])
def test_timm_processor_does_what_timm_does(name):
    config = timm.get_pretrained_cfg(name).to_dict()
    picture = PICTURE.resize((320, 320))  # libraries round half a pixel of crop differently
    ours = prepare(timm_processor(config), [picture])[0]
    model_config = resolve_model_data_config(None, pretrained_cfg=config)
    theirs = create_transform(**model_config, is_training=False)(picture)
    level = 2.01 / 255 / min(model_config["std"])
    assert (ours - theirs).abs().max() <= level


def test_image_size_keeps_the_crop():
    processor = timm_processor({"input_size": (3, 224, 224), "crop_pct": 0.875})
    changed = with_image_size(processor, (96, 96))
    assert Preprocessing.of(changed).image_size == (96, 96)
    assert changed.size["shortest_edge"] == round(96 / 0.875)
    assert processor.size["shortest_edge"] == 256


def test_reprocess_equals_the_other_anchors_own_preparation():
    source, target = Preprocessing((224, 224), *IMAGENET), Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3)
    raw = torch.rand(2, 3, 224, 224, dtype=torch.float64)

    def prepared(p):
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (p.mean, p.std))
        return (raw - mean) / std

    convert = Reprocess(source, target).double()
    assert torch.allclose(convert(prepared(source)), prepared(target), atol=1e-6)


def test_reprocess_resizes():
    source, target = Preprocessing((224, 224), *IMAGENET), Preprocessing((240, 240), (0.5,) * 3, (0.5,) * 3)
    flat = torch.ones(1, 3, 224, 224) * torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    out = Reprocess(source, target)(flat)
    expected = [
        (0.1 * 0.229 + 0.485 - 0.5) / 0.5,
        (0.2 * 0.224 + 0.456 - 0.5) / 0.5,
        (0.3 * 0.225 + 0.406 - 0.5) / 0.5,
    ]
    assert out.shape == (1, 3, 240, 240)
    assert torch.allclose(out[0, :, 120, 7], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_prepare_takes_any_mode(mode):
    assert prepare(ViTImageProcessor(size={"height": 8, "width": 8}), [PICTURE.convert(mode)]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("pixel_values", "error"),
    [
        (torch.zeros(2, 3, 8, 9), ValueError),
        (torch.zeros(2, 1, 8, 8), ValueError),
        (torch.zeros(3, 8, 8), ValueError),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError),
        (np.zeros((2, 3, 8, 8), np.float32), TypeError),
    ],
)
def test_check(pixel_values, error):
    Preprocessing((8, 8)).check(torch.zeros(2, 3, 8, 8))
    with pytest.raises(error, match="pixel_values must"):
        Preprocessing((8, 8)).check(pixel_values)


@pytest.mark.parametrize("size", [(64, 96), (96, 192), (192, 96)])
def test_sizes_that_are_not_square(size):
    processor = timm_processor(
        {"input_size": (3, 224, 224), "crop_pct": 0.875, "mean": IMAGENET[0], "std": IMAGENET[1]}
    )
    found = Preprocessing.of(with_image_size(processor, size))
    assert found.image_size == size
    assert found.mean == pytest.approx(IMAGENET[0], rel=1e-6) and found.std == pytest.approx(IMAGENET[1], rel=1e-6)
    assert prepare(with_image_size(processor, size), [Image.new("RGB", (300, 260), "white")]).min() > 0  # no padding
