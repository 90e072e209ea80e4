"""llama.cpp on this machine's CPU, through llama-cpp-python's bindings of its C API (llama.h).

Shipped, as llama.cpp runs a file by default: weights repacked for the CPU's kernels where it has such, products with
Q4 and Q8 matrices on activations rounded to 8 bits, flash attention, KV cache in float16.

Exact (for a file whose matrices are F32): no repacking, plain attention, KV cache in float32, so that all
arithmetic is float32.

A prompt is computed in batches of N_BATCH tokens. llama.cpp logs to a callback of ours: nothing reaches the
terminal, and where a call fails its last lines are in the error.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lilliput.artifact import Artifact
from lilliput.errors import MeasurementError
from lilliput.grid import Float

N_BATCH = 512  # llama.cpp's own default for the tokens of one computed batch
TYPE_F32, TYPE_F16 = 0, 1  # enum ggml_type
LOG_WARN, LOG_ERROR = 2, 3  # enum ggml_log_level
LOG_LINES_SHOWN = 3

_log: deque[str] = deque(maxlen=20)  # llama.cpp's log is global to the process, so is its reader


class Runtime:
    exporters: ClassVar[tuple[str, ...]] = ("gguf_llamacpp",)
    packages: ClassVar[tuple[str, ...]] = ("llama_cpp",)
    extra: ClassVar[str] = "llamacpp"

    def open(self, artifact: Artifact, threads: int, *, exact: bool = False) -> LlamaCppSession:
        """Load the file (memory-mapped, where nothing is repacked)."""
        return LlamaCppSession(artifact, threads, exact)

    def versions(self) -> dict[str, str]:
        import llama_cpp

        return {"llama-cpp-python": llama_cpp.__version__, "llama.cpp": llama_cpp.llama_version().decode()}


class OpenModel:
    """A file that llama.cpp has loaded, and a context of it. Raises MeasurementError where it takes one of them not."""

    def __init__(self, path: Path, exact: bool, options: Any) -> None:
        """`options` are the context's."""
        import llama_cpp

        self._api: Any = llama_cpp
        self._model = self._context = None
        start_logging()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), _model_options(exact))
        if not self._model:
            raise MeasurementError(f"llama.cpp cannot load {path}: {last_log()}")
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            self.close()
            raise MeasurementError(f"llama.cpp cannot make a context of {options.n_ctx} positions: {last_log()}")

    def close(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = self._context = None


class LlamaCppSession(OpenModel):
    """One model with one sequence in its KV cache."""

    def __init__(self, artifact: Artifact, threads: int, exact: bool) -> None:
        super().__init__(artifact.path, exact, context_options(artifact.context, threads, exact))
        self._limit, self._used = artifact.context, 0
        self._vocab_size = int(self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model)))
        self._memory = self._api.llama_get_memory(self._context)

    def reset(self) -> None:
        self._api.llama_memory_clear(self._memory, False)
        self._used = 0

    def prefill(self, tokens: Sequence[int]) -> Float:
        for start in range(0, len(tokens), N_BATCH):
            self._append(tokens[start : start + N_BATCH])
        return self._logits()

    def decode(self, token: int) -> Float:
        self._append((token,))
        return self._logits()

    def _append(self, tokens: Sequence[int]) -> None:
        """Compute at most N_BATCH tokens after those in the cache; logits are kept for the last one alone."""
        if self._used + len(tokens) > self._limit:
            raise MeasurementError(f"{self._used + len(tokens)} tokens do not fit the context of {self._limit}")
        ids = (self._api.llama_token * len(tokens))(*tokens)
        status = self._api.llama_decode(self._context, self._api.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise MeasurementError(
                f"llama.cpp failed on {len(tokens)} tokens at position {self._used} (status {status}): {last_log()}"
            )
        self._used += len(tokens)

    def _logits(self) -> Float:
        pointer = self._api.llama_get_logits_ith(self._context, -1)  # waits until they are computed
        return floats_at(pointer, self._vocab_size)


def floats_at(pointer: Any, count: int) -> Float:
    """A copy of `count` float32 numbers that llama.cpp points to."""
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (count,)).copy()


def _model_options(exact: bool) -> Any:
    import llama_cpp

    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    options.use_extra_bufts = not exact  # the repacked layouts
    return options


def context_options(context: int, threads: int, exact: bool) -> Any:
    import llama_cpp

    options = llama_cpp.llama_context_default_params()
    options.n_ctx = context
    options.n_batch = options.n_ubatch = N_BATCH
    options.n_seq_max = 1
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = TYPE_F32 if exact else TYPE_F16
    options.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    )
    return options


def start_logging() -> None:
    """Send llama.cpp's log to `_log`, which starts anew."""
    import llama_cpp

    _log.clear()
    llama_cpp.llama_log_set(_log_callback(), None)
    llama_cpp.llama_backend_init()


@cache
def _log_callback() -> Any:
    """Kept for the life of the process, as C holds a pointer to it."""
    import llama_cpp

    def write(level: int, text: bytes, _: object) -> None:
        line = text.decode(errors="replace").strip()
        if level in (LOG_WARN, LOG_ERROR) and line:
            _log.append(line)

    return llama_cpp.llama_log_callback(write)


def last_log() -> str:
    """llama.cpp's last warnings and errors, in one line."""
    return "; ".join(list(_log)[-LOG_LINES_SHOWN:]) or "it logged no reason"
