"""What the benchmark measures: one file, the runtime that runs it, and the session that drives it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from lilliput.artifact import Artifact
from lilliput.results import Record
from targets.base import Session

# KV cache positions of every file (a LiteRT step attends over its whole allocated cache), and the prompt's tokens.
# From the environment, so that the processes that make and measure files see the same.
CONTEXT = int(os.environ.get("BENCH_CONTEXT", "512"))
PROMPT_TOKENS = int(os.environ.get("BENCH_PROMPT", "256"))
PREFILL = 128  # chunk of LiteRT's files, as in the ready recipes
DRIVERS = ("llamacpp_cpu", "ort_cpu", "litert_cpu", "optimum_onnx", "genai_onnx")


class Subject(Record):
    """`driver` is one of Lilliput's runtimes, or the session for a peer's graphs. Paths are absolute.

    `twin` is a file of the same numbers that is scored in its place, where the file itself is too slow for that.
    """

    name: str
    maker: Literal["ours", "peer"]
    driver: str  # one of DRIVERS
    path: Path
    context: int
    prefill: int = 0
    decode_steps: int = 48  # decoded tokens a block
    twin: Path | None = None

    @property
    def scored_path(self) -> Path:
        return self.twin or self.path

    @property
    def size_bytes(self) -> int:
        """Bytes that the runtime loads: the model file and its data files."""
        data = [
            f for f in self.path.parent.glob(f"{self.path.name}*") if f != self.path
        ]  # model.onnx.data, model.onnx_data
        return sum(f.stat().st_size for f in [self.path, *data])

    @property
    def runtime(self) -> str:
        names = {"llamacpp_cpu": "llama.cpp", "litert_cpu": "LiteRT"}
        return names.get(self.driver, "ONNX Runtime")


def open_session(subject: Subject, threads: int) -> Session:
    """The subject as a session. Peers' .gguf and .tflite files run through the very sessions that ours do."""
    if subject.driver == "optimum_onnx":
        from benchmarks.optimum_session import OptimumSession

        return OptimumSession(subject.path, threads)
    if subject.driver == "genai_onnx":
        from benchmarks.genai_session import GenaiSession

        return GenaiSession(subject.path, subject.context, threads)
    from lilliput import registry

    runtime = registry.load("runtimes", subject.driver)()
    artifact = Artifact(subject.path.parent, runtime.exporters[0], subject.path.name, subject.context, subject.prefill)
    session: Session = runtime.open(artifact, threads)
    return session
