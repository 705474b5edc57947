"""transformers' own tests of a model, on a tiny stitched one; from its sdist, which `.ci/run` fetches."""

import importlib
import os
import sys
import types
import unittest
from unittest import mock
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CLASSES, SIZE, make_anchor

from restnet_hf import StitchedModelForImageClassification

os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")
SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", "/tmp/mixin/transformers-5.24.0"))

def mixin():
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE / "tests")]
    sys.modules["transformers_tests"] = package
    for folder, name, cls in (("exporters", "test_export", "ExportTesterMixin"), ("generation", "test_utils", "GenerationTesterMixin")):
        parent = types.ModuleType(f"transformers_tests.{folder}")
        parent.__path__ = []
        stub = types.ModuleType(f"transformers_tests.{folder}.{name}")
        setattr(stub, cls, type(cls, (), {}))
        sys.modules[parent.__name__] = parent
        sys.modules[stub.__name__] = stub
    return importlib.import_module("transformers_tests.test_modeling_common")

common = mixin()

class StitchedModelTester:
    batch_size = 3
    num_hidden_layers = 2
    is_training = True
    expected_num_hidden_layers = 5
    seq_length, hidden_size = 16, 16

    def __init__(self, parent):
        self.parent = parent

    def prepare_config_and_inputs_for_common(self):
        torch.manual_seed(0)
        model = StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), make_anchor("vit", seed=1), order="given", num_labels=CLASSES)
        model.set_route(model.add_stitch("resnet[:3] + vit[2:]"))
        model.config.standalone = True
        return model.config, {"pixel_values": torch.rand(self.batch_size, 3, SIZE, SIZE)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common

@pytest.mark.filterwarnings("ignore")
class TransformersMixin(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (StitchedModelForImageClassification,)
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        self.model_tester = StitchedModelTester(self)
        self.has_attentions = "sdpa" in self.id() or "set_attention" in self.id()
        classes = mock.patch.dict(common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, restnet="StitchedModelForImageClassification")
        classes.start()
        self.addCleanup(classes.stop)
