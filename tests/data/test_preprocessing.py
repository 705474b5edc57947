"""Image processors are measured right, and images are converted exactly between anchors."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import JSON
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor

from restnet_hf.data.preprocessing import Preprocessing, Reprocess, prepare_images, timm_processor, with_image_size


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
    ours = prepare_images(timm_processor(config), [picture])[0]
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
    assert prepare_images(ViTImageProcessor(size={"height": 8, "width": 8}), [PICTURE.convert(mode)]).shape == (
        1,
        3,
        8,
        8,
    )


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
    assert (
        prepare_images(with_image_size(processor, size), [Image.new("RGB", (300, 260), "white")]).min() > 0
    )  # no padding


BAD = [math.nan, math.inf, -math.inf, 10**400, 1e308, "0.5", True, None, [0.5]]


@pytest.mark.parametrize("value", BAD, ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("field", ["mean", "std"])
def test_mean_and_std_are_finite_numbers(field, value):
    for row in ((0.5, value, 0.5), (0.5, 0.5), 0.5, None, "abc"):
        with pytest.raises(ValueError, match="mean and std must hold three numbers each"):
            Preprocessing((8, 8), **{field: row})


@pytest.mark.parametrize("std", [0.0, -1.0, 1e-9])
def test_std_is_above_0(std):
    with pytest.raises(ValueError, match="std from 1e-06 on"):
        Preprocessing((8, 8), std=(1.0, 1.0, std))


@pytest.mark.parametrize(
    "size", [8, (8,), (8, 0), (8, 4097), (8, 2**70), (8, 8.0), (8, True), "88", None, ("8" * 10**6, 8)]
)
def test_image_size_is_two_sides(size):
    with pytest.raises(ValueError, match="image_size=.* must be two whole numbers") as caught:
        Preprocessing(size)
    assert len(str(caught.value)) < 300


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_json_of_a_file(data):
    """It is refused by ValueError, or images are converted by it to numbers."""
    whole = {"image_size": [8, 9], "mean": [0.5, 0.5, 0.5], "std": [1, 2, 3.0]}
    keys = data.draw(st.sets(st.sampled_from([*whole, "x"]), min_size=1))
    odd = JSON | st.lists(st.floats() | st.integers(-5, 5000), min_size=2, max_size=3)
    changed = data.draw(odd) if keys == {*whole, "x"} else whole | {key: data.draw(odd, label=key) for key in keys}
    try:
        found = Preprocessing.from_dict(changed)
    except ValueError as error:
        assert len(str(error)) < 500
        return
    assert Preprocessing.from_dict(asdict(found)) == found
    plain = Preprocessing(found.image_size)
    for source, target in ((found, plain), (plain, found)):
        convert = Reprocess(source, target)
        assert convert.scale.isfinite().all() and convert.shift.isfinite().all()


HUGE = 10**6  # pixels a side: 12 terabytes


def test_image_size_out_of_range():
    for size in ((HUGE, HUGE), (0, 8), (-1, 8), ("8", 8)):
        with pytest.raises(ValueError, match="must be two whole numbers"):
            with_image_size(ViTImageProcessor(size={"height": 8, "width": 8}), size)
    far = BitImageProcessor(size={"shortest_edge": 4096}, crop_size={"height": 1, "width": 1})
    with pytest.raises(ValueError, match="would be resized to 4194304 pixels"):
        with_image_size(far, (1024, 1024))


@pytest.mark.parametrize(
    "options",
    [
        {"image_mean": [math.nan] * 3},
        {"image_std": [0.0] * 3},
        {"image_mean": [0.5] * 2},
        {"image_std": "x"},
        {"resample": 99},
    ],
    ids=str,
)
def test_an_image_processor_of_odd_settings(options):
    with pytest.raises(ValueError, match="mean and std must|cannot prepare an image"):
        Preprocessing.of(ViTImageProcessor(size={"height": 8, "width": 8}, **options))


@pytest.mark.parametrize(
    "changed",
    [
        {"crop_pct": -1.0},
        {"crop_pct": "x"},
        {"crop_pct": math.nan},
        {"input_size": 3},
        {"input_size": "xyz"},
    ]
    + [
        {"input_size": [3, None, 8]},
        {"mean": 3},
        {"std": [0.0] * 3},
        {"mean": [math.nan] * 3},
    ],
    ids=str,
)
def test_odd_settings_of_timm(changed):
    """An anchor's config.json holds them."""
    config = {"input_size": (3, 8, 8), "crop_pct": 0.9, "mean": IMAGENET[0], "std": IMAGENET[1]}
    Preprocessing.of(timm_processor(config))
    with pytest.raises(ValueError, match="invalid|mean and std|cannot prepare"):
        Preprocessing.of(timm_processor(config | changed))
