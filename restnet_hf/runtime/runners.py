"""RUNTIMES: how routes are exported to each runtime, and run as functions from images to logits. No torch here."""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from threading import Lock, local
from typing import Any, Protocol

import numpy as np
from packaging.version import Version

from restnet_hf.limits import read_json
from restnet_hf.routes.device_table import EAGER
from restnet_hf.runtime.mil import WEIGHTS, MilProgram, only, weight_files
from restnet_hf.runtime.torch_archives import UntrustedProgramError, safe_archive


Run = Callable[[np.ndarray], np.ndarray]
"""Images (N, 3, H, W) in float32 to logits (N, classes). Several threads may call it at the same time.

It may have an attribute ``input_shape``: the four sizes that the model takes, None for any size.
"""
LEAST_TORCH = "2.9"  # before, torch.export writes other archives, and its ONNX exporter fails on some routes
TELEMETRY = "openvino_telemetry"
EXECUTORCH = Lock()  # of ExecuTorch's programs


class MissingRuntimeError(ImportError):
    """A runtime, or a package that exports to it, is not installed."""


def import_for_runtime(package: str, runtime: str) -> Any:
    """Import a module that a runtime needs.

    Raises:
        MissingRuntimeError: the module is not installed; the message names the command that installs it.
    """
    if package == "coremltools" and not (logger := logging.getLogger(package)).level:
        logger.setLevel(logging.ERROR)  # it warns of what is for macOS alone, and of versions later than it knows
    try:
        with without_telemetry():
            return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise MissingRuntimeError(
            f"runtime '{runtime}' needs {name}, which cannot be imported ({error}); pip install {name}, or all that "
            f"exporting needs: pip install 'restnet-hf[{runtime}]'"
        ) from error


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Keep OpenVINO and NNCF, imported or called in the block, from sending reports and writing to the home folder.

    Both send reports through a package that they do without where it is not installed, and that no setting of a
    process turns off: on import it writes an identity into the home folder, and it reports each quantisation.
    """
    package = sys.modules.get(TELEMETRY)
    try:
        reporter = None if package is None else package.Telemetry()  # the only instance, if it was imported before
    except RuntimeError:  # it was never configured
        reporter = None
    consent = getattr(reporter, "consent", False)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        if reporter is not None:
            reporter.consent = False
        yield
    finally:
        if reporter is not None:
            reporter.consent = consent
        sys.modules.pop(TELEMETRY, None)
        if package is not None:
            sys.modules[TELEMETRY] = package


class _ShapedRun:
    """A function from images to logits with an ``input_shape``."""

    def __init__(self, run: Run, shape: Sequence[Any]) -> None:
        self._run = run
        self.input_shape = tuple(size if isinstance(size, int) else None for size in shape)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._run(images)


def run_onnx(folder: Path, entry: Mapping[str, str], threads: int | None, trust_remote_code: bool = False) -> Run:
    """Load a session of ONNX Runtime on the CPU."""
    onnxruntime = import_for_runtime("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / entry["file"], options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return _ShapedRun(lambda images: session.run(None, {source.name: images})[0], source.shape)


@cache
def openvino_core() -> Any:
    """The only core of OpenVINO in this process.

    A core sets the thread's stack for signals and, when it is deleted, restores the previous one. If two cores are
    deleted in the order of their creation, the first one's stack is restored after it was freed, and the next signal
    ends the process. A core that is never deleted also avoids loading its plugins again.
    """
    return import_for_runtime("openvino", "openvino").Core()


def run_openvino(folder: Path, entry: Mapping[str, str], threads: int | None, trust_remote_code: bool = False) -> Run:
    """Load a compiled model of OpenVINO on the CPU, in the precision it was exported for."""
    # by default, a processor with bfloat16 computes in it
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": entry["compute"], "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    core = openvino_core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if entry["compute"] == "bf16" and "BF16" not in capabilities:
        raise ValueError(
            f"this processor does not compute in bfloat16 (OpenVINO lists {capabilities}); choose fp32 or int8"
        )
    model = core.read_model(folder / entry["file"], folder / entry["weights"])
    compiled = core.compile_model(model, "CPU", config)
    sizes = [size.get_length() if size.is_static else None for size in compiled.input().partial_shape]
    requests = local()  # a request computes for one thread at a time; the weights are shared

    def run(images: np.ndarray) -> np.ndarray:
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        return requests.own.infer(images, share_inputs=True)[0]

    return _ShapedRun(run, sizes)


def run_executorch(
    folder: Path, entry: Mapping[str, str], threads: int | None, trust_remote_code: bool = False
) -> Run:
    """Load a method of an ExecuTorch program. Its Python package needs torch; its C++ and mobile ones do not.

    Programs are not safe for threads, and all of them share one pool of threads: calls run one after the other.
    """
    runtime = import_for_runtime("executorch.runtime", "executorch")
    torch = import_for_runtime("torch", "executorch")
    with EXECUTORCH:
        if threads is not None:
            bindings = import_for_runtime("executorch.extension.pybindings.portable_lib", "executorch")
            bindings._unsafe_reset_threadpool(threads)
        method = runtime.Runtime.get().load_program(folder / entry["file"]).load_method(entry["method"])
    sizes = method.metadata.input_tensor_meta(0).sizes()

    def run(images: np.ndarray) -> np.ndarray:
        with EXECUTORCH:
            return method.execute([torch.from_numpy(images)])[0].numpy().copy()  # the next call writes there

    return _ShapedRun(run, sizes)


def run_litert(folder: Path, entry: Mapping[str, str], threads: int | None, trust_remote_code: bool = False) -> Run:
    """Load an interpreter of LiteRT, which computes for one thread at a time."""
    interpreter = import_for_runtime("ai_edge_litert.interpreter", "litert")
    loaded = interpreter.Interpreter(model_path=str(folder / entry["file"]), num_threads=threads)
    runner, lock = loaded.get_signature_runner(), Lock()
    (source,) = runner.get_input_details().values()

    def run(images: np.ndarray) -> np.ndarray:
        with lock:
            (logits,) = runner(pixel_values=images).values()
        return logits

    return _ShapedRun(run, [int(size) for size in source["shape"]])


def run_torch(folder: Path, entry: Mapping[str, str], threads: int | None, trust_remote_code: bool = False) -> Run:
    """Load a program of torch.export, without any part that may run code unless it is trusted."""
    torch = import_for_runtime("torch", "torch")
    if Version(torch.__version__) < Version(LEAST_TORCH):
        raise MissingRuntimeError(f"runtime 'torch' needs torch>={LEAST_TORCH}, not {torch.__version__}; upgrade it")
    if threads is not None:
        torch.set_num_threads(threads)
    file = folder / entry["file"]
    try:
        program = torch.export.load(file if trust_remote_code else safe_archive(file))
    except UntrustedProgramError as error:
        raise UntrustedProgramError(
            f"{error}, so that loading it could run code of its author; if you trust them, pass trust_remote_code=True"
        ) from error
    module, dtype = program.module(), getattr(torch, entry["compute"])
    (source,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images).to(dtype)).float().numpy()

    return _ShapedRun(run, source.meta["val"].shape)


def read_mil(folder: Path, entry: Mapping[str, str]) -> Any:
    """The graph of a Core ML package, as coremltools' ``Model.proto``, after a check of what Core ML would open.

    Raises:
        ValueError: the files are not those of one package, or the package is not of one ML program.
    """
    package = Path(entry["file"]).parent
    items = read_json(folder / entry["file"])["itemInfoEntries"].values()
    listed = {f"{package}/Data/{item['path']}" for item in items}
    graph, weights = (f"{package}/Data/com.apple.CoreML/{name}" for name in ("model.mlmodel", "weights"))
    named = {entry["graph"], entry.get("weights", f"{weights}/weight.bin")}
    if named != {graph, f"{weights}/weight.bin"} or graph not in listed or not listed <= {graph, weights}:
        raise ValueError(f"{entry['file']} and the files beside it are not one Core ML package")
    spec = import_for_runtime("coremltools", "coreml").models.utils.load_spec(str(folder / entry["graph"]))
    if spec.WhichOneof("Type") != "mlProgram":
        raise ValueError(f"{entry['graph']} is not an ML program")
    blocks = (block for each in spec.mlProgram.functions.values() for block in each.block_specializations.values())
    if {file for block in blocks for file in weight_files(block.operations)} - {WEIGHTS}:
        raise ValueError(f"{entry['graph']} has weights in other files than {weights}/weight.bin")
    return spec


def run_coreml(folder: Path, entry: Mapping[str, str], threads: int | None, trust_remote_code: bool = False) -> Run:
    """Load a package in Core ML on macOS; elsewhere in `MilProgram`, which evaluates the same files in numpy.

    Neither takes a number of threads: Core ML chooses the processor, its own threads included.
    """
    spec = read_mil(folder, entry)
    if not RUNTIMES["coreml"].runs_here:
        return MilProgram(spec, folder / entry["weights"] if "weights" in entry else None)
    model = import_for_runtime("coremltools", "coreml").models.MLModel(str((folder / entry["file"]).parent))
    source, result = only(spec.description.input, "input"), only(spec.description.output, "output")
    lock = Lock()

    def run(images: np.ndarray) -> np.ndarray:
        with lock:
            return np.asarray(model.predict({source.name: images})[result.name])

    return _ShapedRun(run, [int(size) for size in source.type.multiArrayType.shape])


class LoadRoute(Protocol):
    """A function that loads an exported route."""

    def __call__(
        self, folder: Path, entry: Mapping[str, str], threads: int | None, trust_remote_code: bool = False
    ) -> Run:
        """The route as a function from images to logits.

        Args:
            folder: folder of the exported files.
            entry: names of the route's files and what else `Exporter.save` returned, see `Runtime.fields`.
            threads: number of threads of the processor; None for the runtime's own default.
            trust_remote_code: whether files that may run code of their author are loaded.
        """
        ...


@dataclass(frozen=True)
class Runtime:
    """One row of `RUNTIMES`: how routes are exported to a runtime, checked and run.

    Args:
        run: function that loads an exported route, on a device without torch where the runtime allows it.
        exporter: an `Exporter` or its class, or the place of one as ``"package.module:Name"``, which is imported only
            when a route is exported, as exporters need torch.
        script_imports: modules that the exported ``run.py`` imports, separated by commas.
        script_logits: expression for the logits of one image in ``run.py``, where ``x`` is the image (1, 3, H, W) and
            ``here`` the folder; fields of the entry are written as in ``"{file}"``, the input's name as ``{input}``.
        fields: regular expression for each field that the entry of a route must have.
        platforms: values of ``sys.platform`` on which the runtime itself runs, where it does not run on all. Elsewhere
            its files are evaluated by other means, whose latencies are not recorded.
    """

    run: LoadRoute
    exporter: Any
    script_imports: str
    script_logits: str
    fields: Mapping[str, str] = field(default_factory=lambda: {"file": ".+"})
    platforms: tuple[str, ...] = ()

    @property
    def runs_here(self) -> bool:
        """Whether the runtime itself runs on this system."""
        return not self.platforms or sys.platform in self.platforms


RUNTIMES: dict[str, Runtime] = {
    "onnx": Runtime(
        run=run_onnx,
        exporter="restnet_hf.export.onnx:OnnxExporter",
        script_imports="onnxruntime",
        script_logits='onnxruntime.InferenceSession(here / "{file}").run(None, {{"{input}": x}})[0][0]',
        fields={"file": r".+\.onnx"},
    ),
    "openvino": Runtime(
        run=run_openvino,
        exporter="restnet_hf.export.openvino:OpenVinoExporter",
        script_imports="openvino",
        script_logits=(
            'openvino.compile_model(openvino.Core().read_model(here / "{file}", here / "{weights}"), "CPU", '
            '{{"INFERENCE_PRECISION_HINT": "{compute}"}})(x)[0][0]'
        ),
        fields={"file": r".+\.xml", "weights": r".+\.bin", "compute": "f32|f16|bf16"},
    ),
    "executorch": Runtime(
        run=run_executorch,
        exporter="restnet_hf.export.executorch:ExecuTorchExporter",
        script_imports="torch, executorch.runtime",
        script_logits=(
            'executorch.runtime.Runtime.get().load_program(here / "{file}").load_method("{method}")'
            ".execute([torch.from_numpy(x)])[0][0].numpy()"
        ),
        fields={"file": r".+\.pte", "method": r"\w+"},
    ),
    "litert": Runtime(
        run=run_litert,
        exporter="restnet_hf.export.litert:LiteRtExporter",
        script_imports="ai_edge_litert.interpreter",
        script_logits=(
            'next(iter(ai_edge_litert.interpreter.Interpreter(str(here / "{file}")).get_signature_runner()'
            "(pixel_values=x).values()))[0]"
        ),
        fields={"file": r".+\.tflite"},
    ),
    "coreml": Runtime(
        run=run_coreml,
        exporter="restnet_hf.export.coreml:CoreMlExporter",
        script_imports="coremltools",
        script_logits=(
            'coremltools.models.MLModel(str((here / "{file}").parent)).predict({{"pixel_values": x}})["logits"][0]'
        ),
        fields={
            "file": r"\w+\.mlpackage/Manifest\.json",
            "graph": r"\w+\.mlpackage/Data/com\.apple\.CoreML/model\.mlmodel",
            "weights": r"(\w+\.mlpackage/Data/com\.apple\.CoreML/weights/weight\.bin)?",
        },
        platforms=("darwin",),
    ),
    "torch": Runtime(
        run=run_torch,
        exporter="restnet_hf.export.torch_program:TorchExporter",
        script_imports="torch",
        script_logits=(
            'torch.export.load(here / "{file}").module()(torch.from_numpy(x).to(torch.{compute}))[0]'
            ".detach().float().numpy()"
        ),
        fields={"file": r".+\.pt2", "compute": "float32|float16|bfloat16|float64"},
    ),
}
"""The runtimes that routes are exported to, by name; a new one is one more row."""


def installed_version(runtime: str) -> str | None:
    """The version of a runtime that is installed here; None where it is unknown, or not installed.

    Args:
        runtime: a key of `RUNTIMES`, or ``torch eager``.
    """
    known = RUNTIMES.get("torch" if runtime == EAGER else runtime)
    if known is None:
        return None
    module = known.script_imports.split(", ")[-1].partition(".")[0]
    for name in chain([module], _distributions(module)):  # which take long to list, and most have the module's name
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _distributions(module: str) -> Iterator[str]:
    """The packages that bring a module."""
    yield from packages_distributions().get(module, ()) if find_spec(module) else ()
