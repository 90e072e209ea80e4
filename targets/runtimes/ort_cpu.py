"""ONNX Runtime on the CPU: one session, one set of KV buffers, no copies between steps.

The KV cache is allocated once, at the artifact's context, and bound as past and present of every layer:
GroupQueryAttention then writes new positions in place. A step binds only token ids, positions and the attention
mask, whose width tells the graph how many positions are valid; logits land in one buffer and are copied out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError, InputError
from lilliput.grid import Float

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

CHUNK = 512  # tokens of one prefill call: bounds the attention scores, (heads, chunk, context) float32
PROVIDER = "CPUExecutionProvider"


def session_options(threads: int) -> SessionOptions:
    """The options of every session that Lilliput measures.

    intra_op_num_threads   the target's thread count
    inter_op_num_threads   1: a decoder's graph is a chain, nothing runs beside anything
    enable_mem_pattern     off: a plan of the buffers is made and kept for every new input shape, and the mask's width
                           is new at each step (off: 16 MB less memory after a prompt of 512, SmolLM2)
    force_spinning_stop    workers spin within a call, as ONNX Runtime's default is, but not between calls: an idle
                           session takes no CPU from what runs beside it
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_mem_pattern = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors; they are raised too
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Session:
    """A loaded model with one KV cache, batch 1."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        import onnxruntime as ort

        try:
            self._session: InferenceSession = ort.InferenceSession(str(path), session_options(threads), [PROVIDER])
        except Exception as error:  # onnxruntime raises its own kinds, one per status code
            raise ArtifactError(f"{path}: ONNX Runtime cannot load it ({error})") from error
        self._context, self._past = context, 0
        self._has_positions = any(i.name == "position_ids" for i in self._session.get_inputs())
        self._mask = np.ones((1, context), np.int64)
        self._binding = self._session.io_binding()
        self._bind_outputs()

    def _bind_outputs(self) -> None:
        from onnxruntime import OrtValue

        self._logits = np.zeros((1, 1, self._session.get_outputs()[0].shape[2]), np.float32)
        self._held = [OrtValue.ortvalue_from_numpy(self._logits)]
        self._binding.bind_ortvalue_output("logits", self._held[0])
        for given in self._session.get_inputs():
            if not given.name.startswith("past_key_values."):
                continue
            buffer = OrtValue.ortvalue_from_numpy(
                np.zeros((1, given.shape[1], self._context, given.shape[3]), np.float32)
            )
            self._held.append(buffer)
            self._binding.bind_ortvalue_input(given.name, buffer)
            self._binding.bind_ortvalue_output(given.name.replace("past_key_values.", "present."), buffer)

    def reset(self) -> None:
        self._past = 0

    def prefill(self, tokens: Sequence[int]) -> Float:
        """Long prompts go in pieces of CHUNK tokens. Raises InputError for an empty or too long prompt."""
        if not tokens or self._past + len(tokens) > self._context:
            raise InputError(
                f"{len(tokens)} tokens after {self._past}: the artifact's context is 1 to {self._context} positions, "
                "export it with a larger context"
            )
        for start in range(0, len(tokens), CHUNK):
            self._step(tokens[start : start + CHUNK])
        logits: Float = self._logits[0, 0].copy()
        return logits

    def decode(self, token: int) -> Float:
        return self.prefill([token])

    def _step(self, tokens: Sequence[int]) -> None:
        """Append the tokens to the cache; leaves the last one's logits in the buffer."""
        total = self._past + len(tokens)
        self._binding.bind_cpu_input("input_ids", np.asarray([tokens], np.int64))
        self._binding.bind_cpu_input("attention_mask", self._mask[:, :total])
        if self._has_positions:
            self._binding.bind_cpu_input("position_ids", np.arange(self._past, total, dtype=np.int64)[None])
        self._session.run_with_iobinding(self._binding)
        self._past = total

    def close(self) -> None:
        self._held.clear()
        del self._binding, self._session


class Runtime:
    """ONNX Runtime's CPU execution provider. `exact` needs no other options: what trades precision is the graph's
    accuracy_level, and the exact twin is exported without it."""

    exporters: ClassVar[tuple[str, ...]] = ("onnx_int4",)
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    extra: ClassVar[str] = "onnx"

    def open(self, artifact: Artifact, threads: int, *, exact: bool = False) -> Session:
        return Session(artifact.path, artifact.context, threads)

    def versions(self) -> dict[str, str]:
        import onnxruntime as ort

        return {"onnxruntime": ort.__version__}
