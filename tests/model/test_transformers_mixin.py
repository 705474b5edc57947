"""transformers' own tests of a model, run on a tiny stitched one.

They come from the source distribution of the installed version, which `.ci/run` downloads: no part of it is kept here.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import transformers
from conftest import CLASSES, SIZE, make_anchor

from restnet_hf import StitchedModelForImageClassification


FOLDER = f"transformers-{transformers.__version__}"
SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE") or Path(__file__).parents[2] / ".transformers" / FOLDER)
if not (SOURCE / "tests" / "test_modeling_common.py").is_file():
    pytest.skip(
        f"the source distribution {FOLDER} is not in {SOURCE}: .ci/run downloads it, or set TRANSFORMERS_SOURCE",
        allow_module_level=True,
    )
os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")  # before transformers.testing_utils reads it

FROZEN = "anchors come with their weights and stay as they are: "
CHECKPOINTED = (
    "the layers of frozen anchors are never in training mode, in which alone transformers checkpoints them; here "
    "each anchor is checkpointed from cut to cut, see test_switching.py"
)
DOES_NOT_APPLY = {
    "test_problem_types": "problem_type='regression' is refused: the model classifies; see test_modeling.py",
    "test_capture_outputs_decorator": "it asks for output_attentions, which not every anchor has, so it is refused",
    "test_init_weights_can_init_buffers": f"{FROZEN}init_weights() initialises nothing",
    "test_model_get_set_embeddings": "images have no vocabulary, and the front need not embed patches either",
    "test_model_weights_reload_no_missing_tied_weights": "loading is strict: a missing tensor is an error",
    "test_retain_grad_hidden_states_attentions": f"{FROZEN}no gradient reaches the hidden states before the first "
    "stitch; test_hidden_states.py does the same for those after it",
    "test_training_gradient_checkpointing": CHECKPOINTED,
    "test_training_gradient_checkpointing_use_reentrant_false": CHECKPOINTED,
    "test_training_gradient_checkpointing_use_reentrant_true": CHECKPOINTED,
}
OF_ATTENTION = ("sdpa", "set_attention")  # how it is computed can be set, though none is returned


def imported() -> ModuleType:
    """`tests/test_modeling_common.py`, which needs only a class each of two modules that the distribution lacks."""
    package = ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE / "tests")]
    sys.modules[package.__name__] = package
    for path, name in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = ModuleType(f"transformers_tests.{path}")
        setattr(module, name, type(name, (), {}))
        sys.modules[module.__name__] = module
        sys.modules[module.__name__.rpartition(".")[0]] = ModuleType(module.__name__.rpartition(".")[0])
    return importlib.import_module("transformers_tests.test_modeling_common")


common = imported()


class StitchedModelTester:
    """What the tests ask of a model: a config, inputs, and the shape of its first hidden state."""

    batch_size = 3
    is_training = True
    num_hidden_layers = 2  # is read where the next is there too
    expected_num_hidden_layers = 5  # three cuts of the ResNet, what the stitch makes, and one more cut of the ViT
    seq_length = hidden_size = SIZE // 4  # of the first one's (N, C, H, W), H and W

    def prepare_config_and_inputs_for_common(self):
        """A config that was never saved, so that every model made from it may have other weights."""
        generator = torch.Generator().manual_seed(0)
        model = StitchedModelForImageClassification.from_anchors(
            make_anchor("resnet"), make_anchor("vit", seed=1), order="given", num_labels=CLASSES
        )
        model.set_route(model.add_stitch("resnet[:3] + vit[2:]"))
        model.config.standalone = True
        return model.config, {"pixel_values": torch.rand(self.batch_size, 3, SIZE, SIZE, generator=generator)}


class TestStitchedModel(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (StitchedModelForImageClassification,)
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self):
        name = self.id().rpartition(".")[2]
        if name in DOES_NOT_APPLY:
            self.skipTest(DOES_NOT_APPLY[name])
        self.model_tester = StitchedModelTester()
        self.has_attentions = any(part in name for part in OF_ATTENTION)
        known = common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES  # who is in it gets labels, and more tests
        classes = mock.patch.dict(known, restnet=StitchedModelForImageClassification.__name__)
        classes.start()
        self.addCleanup(classes.stop)

    def test_reverse_loading_mapping(self):
        """A standalone checkpoint has the anchors' tensors under the names that they have in memory."""
        super().test_reverse_loading_mapping(check_keys_were_modified=False)


def test_what_does_not_apply_is_there():
    assert all(hasattr(common.ModelTesterMixin, name) for name in DOES_NOT_APPLY)
