"""LiteRT on this machine's CPU for static networks: its interpreter with XNNPACK.

Float inputs and outputs of the session are put on the file's grids and taken off them here, as an application would:
code = round(x / scale) + zero point, within −128 to 127. Images of a traced network are (N, C, H, W) for the caller,
(N, H, W, C) in the file; those of a converted Keras model are (N, H, W, C) for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError, InputError
from lilliput.grid import Float

Array = npt.NDArray[Any]
SIGNATURE = "serving_default"
TO_NHWC = (0, 2, 3, 1)


class NetworkRuntime:
    exporters: ClassVar[tuple[str, ...]] = ("litert_static", "tensorflow_converter")
    packages: ClassVar[tuple[str, ...]] = ("ai_edge_litert",)
    extra: ClassVar[str] = "litert"

    def open(self, artifact: Artifact, threads: int) -> InterpreterSession:
        from ai_edge_litert.interpreter import Interpreter

        return InterpreterSession(Interpreter, artifact, threads)

    def versions(self) -> dict[str, str]:
        return {"ai-edge-litert": version("ai-edge-litert")}


class InterpreterSession:
    """A file in an interpreter of that class: LiteRT's, or tensorflow's of the same interface."""

    def __init__(self, interpreter: Any, artifact: Artifact, threads: int) -> None:
        if not artifact.path.is_file():
            raise ArtifactError(f"{artifact.path}: no such file, wanted the .tflite of a {artifact.exporter} artifact")
        try:
            self._interpreter = interpreter(model_path=str(artifact.path), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{artifact.path}: the interpreter does not open it ({error})") from error
        self._transposes = artifact.exporter == "litert_static"
        self._runner = self._interpreter.get_signature_runner(SIGNATURE)
        self._inputs, self._outputs = self._runner.get_input_details(), self._runner.get_output_details()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Float]:
        """The outputs by name, float32. Raises InputError for inputs that are not the file's."""
        if inputs.keys() != self._inputs.keys():
            raise InputError(f"inputs are {sorted(inputs)}, the file wants {sorted(self._inputs)}")
        given = {name: _channels_last(array) if self._transposes else array for name, array in inputs.items()}
        found = self._runner(**{name: _coded(array, self._inputs[name]) for name, array in given.items()})
        return {name: _decoded(array, self._outputs[name]) for name, array in found.items()}

    def close(self) -> None:
        self._runner = self._interpreter = None


def _channels_last(array: Array) -> Array:
    """An image (N, C, H, W) as (N, H, W, C); anything else as it is."""
    return np.ascontiguousarray(array.transpose(TO_NHWC)) if array.dtype == np.float32 and array.ndim == 4 else array


def _coded(array: Array, details: Mapping[str, Any]) -> Array:
    """An input as the file's tensor has it."""
    dtype, (scale, zero_point) = details["dtype"], details["quantization"]
    if dtype == np.int8 and array.dtype == np.float32:
        array = np.clip(np.rint(array / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
    return array


def _decoded(array: Array, details: Mapping[str, Any]) -> Float:
    """float32 of an output."""
    scale, zero_point = details["quantization"]
    if array.dtype != np.int8:
        return array.astype(np.float32)
    found: Float = (array.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)
    return found
