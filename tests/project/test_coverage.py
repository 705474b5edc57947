"""No list of supported models: every classifier that transformers and timm know is cut, or the reason is reported."""

import importlib.util
import sys
from pathlib import Path

import pytest
import timm
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as TYPES


spec = importlib.util.spec_from_file_location("coverage_recipe", Path(__file__).parents[2] / "recipes" / "coverage.py")
coverage = sys.modules["coverage_recipe"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage)

# A member of each kind of timm network, for every run of the tests; the marker `coverage` runs all modules.
SOME = ["resnet10t", "efficientnet_lite0", "convnext_atto", "regnetx_002", "vit_tiny_patch16_224", "mobilevit_xxs"]
SOME += [
    "xcit_nano_12_p16_224",
    "efficientvit_b0",
    "densenet121",
    "dla46x_c",
    "starnet_s1",
    "pvt_v2_b0",
    "levit_128s",
    "crossvit_tiny_240",
]


def certified(row):
    assert not row.refused and row.cuts >= 2
    assert row.float32 == "equal"
    assert row.bfloat16 == "equal" or float(row.bfloat16) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in TYPES if f"transformers/{name}" not in coverage.EXCEPTIONS])
def test_transformers(model_type):
    certified(coverage.try_model(f"transformers/{model_type}", *coverage.transformers_model(model_type)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_timm(name):
    certified(coverage.try_model(f"timm/{name}", *coverage.timm_model(name)))


@pytest.mark.coverage
@pytest.mark.parametrize("module", [module for module in timm.list_modules() if timm.list_models(module=module)])
def test_every_module_of_timm(module):
    certified(coverage.try_model(f"timm/{module}", *coverage.timm_model(coverage.timm_member(module))))


def test_exceptions_are_of_this_release():
    known = {f"transformers/{name}" for name in TYPES} | {f"timm/{name}" for name in timm.list_modules()}
    assert coverage.EXCEPTIONS.keys() <= known
    assert {f"transformers/{name}" for name in coverage.TINY} <= known
