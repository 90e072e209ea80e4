"""ONNX Runtime on the CPU for static networks: integer kernels where QDQ patterns fuse, float32 elsewhere.

Without VNNI, x86 kernels for signed weights add pairs of 8-bit products in 16 bits and saturate; the option
session.x64quantprecision makes ONNX Runtime take exact, slower ones there. `exact` turns every optimization off, so
that QuantizeLinear, operator and DequantizeLinear run in float32 one by one: what the file's integers mean, without
any kernel's shortcuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError, InputError
from lilliput.grid import Float
from targets.runtimes.ort_cpu import PROVIDER, session_options

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = npt.NDArray[Any]


class StaticSession:
    """An opened InferenceSession of fixed shapes."""

    def __init__(self, session: InferenceSession) -> None:
        self._session = session
        self._inputs = {given.name: given for given in session.get_inputs()}
        self._outputs = [made.name for made in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Float]:
        """The outputs by name, float32. Raises InputError for inputs that are not the file's."""
        if inputs.keys() != self._inputs.keys():
            raise InputError(f"inputs are {sorted(inputs)}, the file wants {sorted(self._inputs)}")
        for name, array in inputs.items():
            if list(array.shape) != self._inputs[name].shape:
                raise InputError(f"input {name!r} is {list(array.shape)}, the file wants {self._inputs[name].shape}")
        found = self._session.run(self._outputs, dict(inputs))
        return {name: np.asarray(array, np.float32) for name, array in zip(self._outputs, found, strict=True)}

    def close(self) -> None:
        del self._session


class NetworkRuntime:
    """ONNX Runtime's CPU execution provider."""

    exporters: ClassVar[tuple[str, ...]] = ("onnx_qdq",)
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    extra: ClassVar[str] = "onnx"

    def open(self, artifact: Artifact, threads: int, *, exact: bool = False) -> StaticSession:
        import onnxruntime as ort

        options = session_options(threads)
        options.enable_mem_pattern = True  # shapes are fixed
        options.add_session_config_entry("session.x64quantprecision", "1")
        if exact:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return StaticSession(ort.InferenceSession(str(artifact.path), options, [PROVIDER]))
        except Exception as error:  # onnxruntime raises its own kinds, one per status code
            raise ArtifactError(f"{artifact.path}: ONNX Runtime cannot load it ({error})") from error

    def versions(self) -> dict[str, str]:
        import onnxruntime as ort

        return {"onnxruntime": ort.__version__}
