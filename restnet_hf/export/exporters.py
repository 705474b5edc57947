"""EXPORTERS: the runtimes that routes can be written for."""

from restnet_hf.export.executorch import ExecuTorchExporter
from restnet_hf.export.exporter import Exporter
from restnet_hf.export.onnx import OnnxExporter
from restnet_hf.export.openvino import OpenVinoExporter
from restnet_hf.export.torch_program import TorchExporter


EXPORTERS: dict[str, Exporter] = {
    exporter.runtime: exporter
    for exporter in (OnnxExporter(), OpenVinoExporter(), ExecuTorchExporter(), TorchExporter())
}
