"""Qualcomm's NPU by ONNX Runtime's QNN provider: strict, and on x86 in the vendor's emulator.

Every node is the NPU's or the file is refused with the names of those that are not (targets.npu.qnn). The emulator
computes what the NPU's integers would; its time says nothing of a phone's.
"""

from __future__ import annotations

from typing import ClassVar

from lilliput.artifact import Artifact
from targets.npu import qnn, soc
from targets.runtimes.ort_static_cpu import StaticSession

DEFAULT_SOC = "sm8650"


class NetworkRuntime:
    """The QNN provider's HTP backend."""

    exporters: ClassVar[tuple[str, ...]] = ("onnx_qdq",)
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime_qnn", "onnxruntime")
    extra: ClassVar[str] = "qnn"

    def open(self, artifact: Artifact, threads: int, *, chip: str = DEFAULT_SOC) -> StaticSession:
        return StaticSession(qnn.open_strict(artifact.path, soc(chip)))

    def versions(self) -> dict[str, str]:
        from importlib.metadata import version

        return {name: version(name) for name in ("onnxruntime-qnn", "onnxruntime")}
