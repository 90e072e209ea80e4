"""ONNX for static integer runtimes: encoders and CNNs in QDQ form, fixed shapes, 8- or 16-bit activations.

    model.onnx   the graph (graph.py); integer inputs int32, float inputs and outputs float32

For ONNX Runtime's CPU provider and for NPUs (the QNN provider takes uint8 and uint16 activations). Nothing is chosen
here: weights, grids and biases are those of the solved network, and `differences` reads them back from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from exporters.base import ExporterOptions
from lilliput.artifact import Artifact
from lilliput.errors import ExportError
from lilliput.network import QuantizedNetwork

MAIN_FILE = "model.onnx"


class Options(ExporterOptions):
    """None yet."""


class NetworkExporter:
    """Writes and reads the file. Stateless."""

    Options: ClassVar[type[ExporterOptions]] = Options
    packages: ClassVar[tuple[str, ...]] = ("onnx",)
    extra: ClassVar[str] = "onnx"
    activations: ClassVar[tuple[str, ...]] = ("uint8", "uint16", "int8", "int16")

    def export(self, model: QuantizedNetwork, options: ExporterOptions, folder: Path) -> tuple[Artifact, list[str]]:
        import onnx

        from exporters.onnx_qdq import graph

        for name, tensor in model.weights.items():
            tensor.check(name)
            if tensor.spec.bits not in (4, 8):
                raise ExportError(
                    f"{name} on {tensor.spec.name}: ONNX stores weights of 4 or 8 bits: choose one of them"
                )
        proto = graph.build(model)
        onnx.checker.check_model(proto, full_check=True)
        onnx.save_model(proto, str(folder / MAIN_FILE))
        in_float = model.in_float
        notes = [f"{len(in_float)} nodes stay in float32, by name: {', '.join(in_float)}"] if in_float else []
        return Artifact(folder, "onnx_qdq", MAIN_FILE, context=0, prefill=0), notes

    def differences(self, model: QuantizedNetwork, artifact: Artifact) -> list[str]:
        from exporters.onnx_qdq import reading

        return reading.differences(model, reading.read(artifact.path))
