"""llama.cpp on this machine's CPU for encoders: one text at a time, its real tokens alone, pooled as the file says.

    pooling   what the session gives                                    of the inputs
    mean, cls (1, hidden) `embedding`, not normed                       input_ids, attention_mask (1, positions) int32,
    rank      (1, labels) `logits`                                      padded on the right
    none      (1, positions, hidden) `hidden_states`, zeros at padding

Shipped, products with quantized matrices are on activations rounded to 8 bits, with repacked weights and flash
attention. `exact` opens the file's float32 twin (lilliput.ggml.in_float) with neither: what the file's numbers mean,
but for GELU, which llama.cpp looks up in a table of float16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lilliput.artifact import Artifact
from lilliput.errors import InputError, MeasurementError
from lilliput.grid import Float
from targets.runtimes import llamacpp_cpu

NONE, RANK = 0, 4  # enum llama_pooling_type
INPUTS = {"input_ids", "attention_mask"}


class NetworkRuntime:
    exporters: ClassVar[tuple[str, ...]] = ("gguf_encoder",)
    packages: ClassVar[tuple[str, ...]] = ("llama_cpp", "gguf")
    extra: ClassVar[str] = "llamacpp"

    def open(self, artifact: Artifact, threads: int, *, exact: bool = False) -> EmbeddingSession:
        if not exact:
            return EmbeddingSession(artifact.path, artifact.context, threads, exact)
        import gguf

        from lilliput.ggml import in_float

        with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
            twin = Path(scratch) / "twin.gguf"
            in_float.write([gguf.GGUFReader(artifact.path)], twin)
            return EmbeddingSession(twin, artifact.context, threads, exact)  # mapped or read: the file may go

    def versions(self) -> dict[str, str]:
        return llamacpp_cpu.Runtime().versions()


class EmbeddingSession(llamacpp_cpu.OpenModel):
    """One model, without a KV cache."""

    def __init__(self, path: Path, context: int, threads: int, exact: bool) -> None:
        options = llamacpp_cpu.context_options(context, threads, exact)
        options.n_batch = options.n_ubatch = context  # an encoder sees a text at once
        options.embeddings = True
        super().__init__(path, exact, options)
        self._positions, self._pooling = context, int(self._api.llama_pooling_type(self._context))
        width_of = self._api.llama_model_n_cls_out if self._pooling == RANK else self._api.llama_model_n_embd
        self._width = int(width_of(self._model))

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, Float]:
        """Raises InputError for inputs that are not one text padded on the right."""
        if inputs.keys() != INPUTS or inputs["input_ids"].shape != inputs["attention_mask"].shape:
            raise InputError(f"inputs are {sorted(inputs)}, llama.cpp wants {sorted(INPUTS)} of one shape")
        ids, mask = inputs["input_ids"][0], inputs["attention_mask"][0]
        real = int(mask.sum())
        if len(inputs["input_ids"]) != 1 or not mask[:real].all() or not 1 <= real <= self._positions:
            raise InputError(
                f"{inputs['input_ids'].shape} with {real} real tokens, llama.cpp wants one text of 1 to "
                f"{self._positions}, padded on the right"
            )
        self._encode(ids[:real])
        if self._pooling == NONE:
            rows = [self._row(self._api.llama_get_embeddings_ith(self._context, i)) for i in range(real)]
            return {"hidden_states": np.pad(np.stack(rows), ((0, len(ids) - real), (0, 0)))[None]}
        pooled = self._row(self._api.llama_get_embeddings_seq(self._context, 0))[None]
        return {"logits" if self._pooling == RANK else "embedding": pooled}

    def _encode(self, tokens: npt.NDArray[Any]) -> None:
        ids = (self._api.llama_token * len(tokens))(*map(int, tokens))
        status = self._api.llama_encode(self._context, self._api.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise MeasurementError(f"llama.cpp failed on {len(tokens)} tokens: {llamacpp_cpu.last_log()}")

    def _row(self, pointer: Any) -> Float:
        if not pointer:
            raise MeasurementError(f"llama.cpp gives no embedding: {llamacpp_cpu.last_log()}")
        return llamacpp_cpu.floats_at(pointer, self._width)
