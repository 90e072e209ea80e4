"""What a validating process asks of a worker process, and its reply: both one JSON file.

The worker opens one artifact on one runtime and does the tasks in their order in that one session.
While it works it writes lines to its standard output, each a JSON list [done, total] of the task at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lilliput.artifact import Artifact
from lilliput.results import Conditions, Instructions, Latency, Memory, Record


class ArtifactReference(Record):
    """lilliput.artifact.Artifact, field by field."""

    folder: Path
    exporter: str
    main_file: str
    context: int
    prefill: int

    @classmethod
    def of(cls, artifact: Artifact) -> ArtifactReference:
        return cls(
            folder=artifact.folder.resolve(),
            exporter=artifact.exporter,
            main_file=artifact.main_file,
            context=artifact.context,
            prefill=artifact.prefill,
        )

    def artifact(self) -> Artifact:
        return Artifact(self.folder, self.exporter, self.main_file, self.context, self.prefill)


class AccuracyTask(Record):
    """Teacher-force some chunks of the evaluation tokens and compare with the float and dequantized logits."""

    kind: Literal["accuracy"] = "accuracy"
    tokens: Path  # .npy (chunks, length) int32
    scored_from: int
    first: int = 0  # chunk
    chunks: int
    reference: Path  # .npy (chunks, scored, vocab) float32, the float model's
    dequantized: Path  # likewise, the dequantized weights'
    metrics_out: Path  # .npz that TokenMetrics.save writes


class LogitsTask(Record):
    """Teacher-force some chunks and keep the logits: what an accuracy task is where the references do not lie."""

    kind: Literal["logits"] = "logits"
    tokens: Path  # as of AccuracyTask
    scored_from: int
    first: int = 0
    chunks: int
    logits_out: Path  # .npy (chunks, scored, vocab) float32


class LatencyTask(Record):
    """Time prompts and decoding; `targets.measure` has the protocol."""

    kind: Literal["latency"] = "latency"
    tokens: tuple[int, ...]  # any text; at least as many as a prompt or a depth needs
    prompt_tokens: int = 128
    depths: tuple[int, ...] = (16, 512)
    blocks: int = 4
    steps: int = 32  # decoded tokens a depth and block
    budget_s: float = 30.0  # of all blocks: steps, then blocks are left out beyond it


class CountTask(Record):
    """Decode some tokens between two marks that an emulator counts instructions by; on one thread."""

    kind: Literal["count"] = "count"
    tokens: tuple[int, ...]  # the prompt, then those that are decoded
    steps: int


class GenerateTask(Record):
    """Decode greedily after a prompt until a stop token."""

    kind: Literal["generate"] = "generate"
    prompt: tuple[int, ...]
    max_tokens: int = 24
    stop_tokens: tuple[int, ...] = ()


class SuiteTask(Record):
    """Answer questions, held against the float model's answers (targets.answers)."""

    kind: Literal["suite"] = "suite"
    questions: Path  # .json
    reference: Path  # the folder of the float model's answers and logits
    answers_out: Path  # .json


Task = Annotated[
    AccuracyTask | LogitsTask | LatencyTask | CountTask | GenerateTask | SuiteTask, Field(discriminator="kind")
]


class Request(Record):
    artifact: ArtifactReference
    runtime: str
    threads: int
    exact: bool = False
    tasks: tuple[Task, ...]


class LatencyReply(Record):
    latency: Latency
    memory: Memory
    conditions: Conditions


class MissingPackage(Record):
    """A package that the worker could not import."""

    package: str
    extra: str


class Reply(Record):
    """What the worker found. On an error the rest is as far as it came."""

    versions: dict[str, str] = Field(default_factory=dict)
    metrics: Path | None = None  # what an accuracy task wrote
    logits: Path | None = None  # what a logits task wrote
    latency: LatencyReply | None = None
    instructions: Instructions | None = None  # of a count task, where the device counts
    generated: tuple[int, ...] | None = None
    answers: Path | None = None  # what a suite task wrote
    error: str | None = None
    missing: MissingPackage | None = None
