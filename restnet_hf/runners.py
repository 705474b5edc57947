"""RUNNERS: an exported route as a function from images to logits, run by its own runtime. No torch of our own."""

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


Run = Callable[[np.ndarray], np.ndarray]
"""Images (N, 3, H, W) in float32 to logits (N, classes)."""


class MissingRuntime(ImportError):
    """A runtime, or what exports to it, is not installed."""


def need(package: str, runtime: str) -> Any:
    """A module by name.

    Raises:
        MissingRuntime: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise MissingRuntime(
            f"runtime '{runtime}' needs {name}, which cannot be imported ({error}); pip install {name}, or all that "
            f"exporting takes: pip install 'restnet-hf[{runtime}]'"
        ) from error


def run_onnx(folder: Path, entry: Mapping[str, str], threads: int | None) -> Run:
    """A session of ONNX Runtime on the processor."""
    onnxruntime = need("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / entry["file"], options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda images: session.run(None, {given.name: images})[0]


@cache
def openvino_core() -> Any:
    """The only core of OpenVINO in this process.

    A core gives the thread a stack for signals and, when it goes, brings back the one that it found. Of two cores that
    go in the order in which they came the first one's stack is brought back after it was freed, and the next signal
    ends the process. One that never goes also spares loading its plugins again.
    """
    return need("openvino", "openvino").Core()


def run_openvino(folder: Path, entry: Mapping[str, str], threads: int | None) -> Run:
    """A compiled model of OpenVINO on the processor, in the precision it was exported for."""
    # left to itself, a processor that has bfloat16 computes in it
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": entry["compute"], "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    core = openvino_core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if entry["compute"] == "bf16" and "BF16" not in able:
        raise ValueError(f"this processor does not compute in bfloat16 (OpenVINO lists {able}); choose fp32 or int8")
    model = core.read_model(folder / entry["file"], folder / entry["weights"])
    compiled = core.compile_model(model, "CPU", config)
    return lambda images: compiled(images)[0]


def run_executorch(folder: Path, entry: Mapping[str, str], threads: int | None) -> Run:
    """A method of an ExecuTorch program. Its Python package needs torch; its C++ and mobile ones do not."""
    runtime = need("executorch.runtime", "executorch")
    torch = need("torch", "executorch")
    if threads is not None:
        need("executorch.extension.pybindings.portable_lib", "executorch")._unsafe_reset_threadpool(threads)
    method = runtime.Runtime.get().load_program(folder / entry["file"]).load_method(entry["method"])
    return lambda images: method.execute([torch.from_numpy(images)])[0].numpy()


def run_torch(folder: Path, entry: Mapping[str, str], threads: int | None) -> Run:
    """A program of torch.export."""
    torch = need("torch", "torch")
    if threads is not None:
        torch.set_num_threads(threads)
    module = torch.export.load(folder / entry["file"]).module()
    dtype = getattr(torch, entry["compute"])

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images).to(dtype)).float().numpy()

    return run


RUNNERS: dict[str, Callable[[Path, Mapping[str, str], int | None], Run]] = {
    "onnx": run_onnx,
    "openvino": run_openvino,
    "executorch": run_executorch,
    "torch": run_torch,
}
