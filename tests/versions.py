"""What older versions of libraries lack, as marks for the tests that need it."""

from importlib.metadata import version

import pytest
from datasets import Dataset
from packaging.version import Version

from restnet_hf.runtime.runners import LEAST_TORCH


def older(**least: str) -> bool:
    """Whether one of these packages is older than the version given."""
    return any(Version(version(package)) < Version(number) for package, number in least.items())


def _formats_tensors() -> bool:
    try:
        return "x" in Dataset.from_dict({"x": [1.0]}).with_format("torch")[0]
    except ImportError:
        return False


def needs(condition: bool, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not condition, reason=reason)


needs_export = needs(not older(torch=LEAST_TORCH), f"exporting needs torch {LEAST_TORCH}")
needs_mixed_streams = needs(not older(datasets="5.0"), "parts of streams need datasets 5.0")
needs_saved_modules = needs(
    not older(transformers="5.23", peft="0.21"), "modules_to_save in from_pretrained need transformers 5.23, peft 0.21"
)
needs_safe_locks = needs(
    not older(filelock="4.0"), "before filelock 4 two processes may hold one lock whose file a third one removes"
)
needs_new_names = needs(not older(transformers="5.9"), "before transformers 5.9 the layers of ViT have other names")
needs_tensor_format = needs(_formats_tensors(), "datasets 4 formats no tensors with a torchvision without VideoReader")
