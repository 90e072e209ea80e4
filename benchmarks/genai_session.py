"""A graph of onnxruntime-genai's builder in ONNX Runtime, as ours are run: caches bound once, written in place.

Its inputs have the names of ours. Its logits are those of every position, (1, T, vocab): their buffer is as wide as the
step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from targets.runtimes import ort_cpu


class GenaiSession(ort_cpu.Session):
    def _step(self, tokens: Sequence[int]) -> None:
        """Append the tokens; the last one's logits are where the base class reads them."""
        if self._logits.shape[1] != len(tokens):
            from onnxruntime import OrtValue

            self._logits = np.zeros((1, len(tokens), self._logits.shape[2]), np.float32)
            self._held[0] = OrtValue.ortvalue_from_numpy(self._logits)
            self._binding.bind_ortvalue_output("logits", self._held[0])
        super()._step(tokens)

    def prefill(self, tokens: Sequence[int]) -> ort_cpu.Float:
        super().prefill(tokens)
        logits: ort_cpu.Float = self._logits[0, -1].copy()
        return logits
