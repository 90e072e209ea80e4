"""LiteRT, full int8: encoders, classifiers and CNNs on static grids, one signature.

Weights are int8 per channel, activations int8 per tensor, biases int32, as the network was solved: nothing here
calibrates or rounds. The flatbuffer is written operator by operator (lowering.py).

    in    int32 inputs as they are; float inputs as int8 codes, images (N, H, W, C)
    out   int8 codes

With `io: float32` the file quantizes and dequantizes at its ends itself.

Files: model.tflite.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from exporters.base import ExporterOptions
from lilliput.artifact import Artifact
from lilliput.network import QuantizedNetwork

MODEL_FILE = "model.tflite"


class Options(ExporterOptions):
    """`io`: what goes in and comes out, int8 codes or float32. Integer inputs stay int32."""

    io: Literal["int8", "float32"] = "int8"


class NetworkExporter:
    Options: ClassVar[type[ExporterOptions]] = Options
    packages: ClassVar[tuple[str, ...]] = ("ai_edge_litert", "flatbuffers")
    extra: ClassVar[str] = "litert"
    activations: ClassVar[tuple[str, ...]] = ("int8", "uint8")

    def export(self, model: QuantizedNetwork, options: ExporterOptions, folder: Path) -> tuple[Artifact, list[str]]:
        from exporters.litert_static import file

        assert isinstance(options, Options)
        in_float = file.write(model, folder / MODEL_FILE, float_io=options.io == "float32")
        notes = [f"computed in float32 between int8 values: {', '.join(in_float)}"] if in_float else []
        return Artifact(folder, "litert_static", MODEL_FILE, 0, 0), notes

    def differences(self, model: QuantizedNetwork, artifact: Artifact) -> list[str]:
        from exporters.litert_static import file

        return file.differences(model, artifact.path)
