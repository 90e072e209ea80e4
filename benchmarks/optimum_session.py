"""optimum's ONNX graph with past in ONNX Runtime: each step's present tensors are the next step's past.

The graph concatenates, so its caches are new tensors at every step; they stay in ONNX Runtime's own memory (IO binding)
and are never copied to numpy, which is the fastest way to run such a graph on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.grid import Float


class OptimumSession:
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        from targets.runtimes.ort_cpu import PROVIDER, session_options

        self._runtime = onnxruntime
        self._session = onnxruntime.InferenceSession(str(path), session_options(threads), [PROVIDER])
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._past_names = [name for name in self._inputs if name.startswith("past_key_values.")]
        self.reset()

    def reset(self) -> None:
        self._used = 0
        self._past: list[Any] = []
        for name in self._past_names:
            _, heads, _, head_dim = self._inputs[name].shape
            self._past.append(self._runtime.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, head_dim), np.float32)))

    def prefill(self, tokens: Sequence[int]) -> Float:
        total = self._used + len(tokens)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.asarray([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        if "position_ids" in self._inputs:
            binding.bind_cpu_input("position_ids", np.arange(self._used, total, dtype=np.int64)[None])
        for name, value in zip(self._past_names, self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name in self._past_names:
            binding.bind_output(name.replace("past_key_values.", "present."))
        self._session.run_with_iobinding(binding)
        logits, *self._past = binding.get_outputs()
        self._used = total
        last: Float = logits.numpy()[0, -1].astype(np.float32)
        return last

    def decode(self, token: int) -> Float:
        return self.prefill([token])

    def close(self) -> None:
        self._past = []
        del self._session
