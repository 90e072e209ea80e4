"""Validate one target: the artifact on its runtime, held against the float model, rung by rung.

    1. read the weights back from the file (in this process)
    2. accuracy of the shipped artifact (a worker process; teacher-forced on the evaluation text)
    3. accuracy of its exact twin (a second worker)
    4. speed, memory and a greedy continuation (a third: its peak memory is the runtime's alone)
    5. the ladder and the gates

A worker that fails, hangs or is killed leaves a note and figures that are missing; their gates are then
inconclusive. A package that is missing is an error of its own. Per-token figures stay in `folder`:
shipped.npz and exact.npz, as targets.metrics.TokenMetrics saves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from lilliput.artifact import Artifact, sha256
from lilliput.errors import MeasurementError
from lilliput.model import QuantizedModel
from lilliput.progress import Progress, silent
from lilliput.results import ArtifactFigures, Gate, GateResult, Generation, Rung, TargetResult, worst
from targets import gates, ladder, machine
from targets.base import Device
from targets.reference import EvaluationSet, Logits
from targets.request import (
    AccuracyTask,
    ArtifactReference,
    GenerateTask,
    LatencyTask,
    Reply,
    Request,
    Task,
)

WORKER_OVERHEAD_BYTES = 400_000_000  # interpreter, packages, one row of each reference
MEMORY_PER_ARTIFACT_BYTE = 1.5  # weights in the runtime's layout beside the mapped file, at most


@dataclass(frozen=True)
class Place:
    """Where an artifact runs."""

    runtime: str
    device: str
    at: Device
    options: BaseModel
    threads: int | None = None  # None: the device's own number


@dataclass(frozen=True, eq=False)
class Candidate:
    """One target: its artifact, the exact twin (None: `exact_missing` says why) and the file's own weights."""

    name: str
    artifact: Artifact
    read: Callable[[], ladder.Read]
    exact: Artifact | None = None
    exact_missing: str = "the exporter wrote no exact twin"


@dataclass(frozen=True, eq=False)
class References:
    """What the candidate is held against. `dequantized` was made by `targets.reference.compute_against`."""

    model: QuantizedModel
    evaluation: EvaluationSet
    float_model: Logits
    dequantized: Logits


@dataclass(frozen=True)
class Smoke:
    """The prompt that the artifact continues. `float_tokens` is asked only where the continuation looks broken."""

    prompt: str
    tokens: tuple[int, ...]
    stop_tokens: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    float_tokens: Callable[[], Sequence[int]] | None = None
    max_tokens: int = 24


@dataclass(frozen=True)
class Protocol:
    """How much is measured. The defaults take about a minute for a 135M model on two cores."""

    exact_chunks: int = 1
    prompt_tokens: int = 128
    shallow_tokens: int = 16  # the first depth; the second is half the context
    blocks: int = 4
    steps: int = 32


@dataclass(frozen=True)
class _Answer:
    """A worker's reply; an empty one where `missing` says why there is none."""

    reply: Reply
    missing: str = ""


@dataclass(frozen=True)
class _Measured:
    """The answers of the three workers."""

    shipped: _Answer
    exact: _Answer
    speed: _Answer

    @property
    def missing(self) -> dict[gates.Part, str]:
        answers: dict[gates.Part, _Answer] = {"accuracy": self.shipped, "exact": self.exact, "latency": self.speed}
        return {part: answer.missing for part, answer in answers.items() if answer.missing}

    @property
    def versions(self) -> dict[str, str]:
        replies = (answer.reply for answer in (self.shipped, self.exact, self.speed))
        return {name: version for reply in replies for name, version in reply.versions.items()}


def validate(
    candidate: Candidate,
    place: Place,
    references: References,
    smoke: Smoke,
    limits: Sequence[Gate],
    folder: Path,
    protocol: Protocol = Protocol(),
    progress: Progress = silent,
) -> TargetResult:
    """All figures and the verdict of one target; `folder` exists and takes the per-token figures.

    Raises MissingPackageError where the runtime is not installed, MissingError where memory does not suffice.
    """
    _check_memory(candidate)
    rung, read_back = ladder.read_back_rung(
        references.model,
        candidate.read(),
        references.evaluation,
        (references.float_model, references.dequantized),
        folder / "read_back",
    )
    measured = _measure(candidate, place, references, smoke, folder, protocol, progress)
    dequantized = references.dequantized.metrics()
    exact, shipped = measured.exact.reply.accuracy, measured.shipped.reply.accuracy
    rungs = (
        *ladder.first_rungs(dequantized),
        rung,
        ladder.exact_rung(exact, measured.exact.missing, dequantized, _exact_chunks(protocol, references)),
        ladder.shipped_rung(shipped, measured.shipped.missing),
    )
    return _result(candidate, place, smoke, limits, measured, rungs, read_back)


def _check_memory(candidate: Candidate) -> None:
    for artifact in filter(None, (candidate.artifact, candidate.exact)):
        needed = round(MEMORY_PER_ARTIFACT_BYTE * artifact.size_bytes) + WORKER_OVERHEAD_BYTES
        machine.check_memory(needed, f"measuring {artifact.path.name}")


def _exact_chunks(protocol: Protocol, references: References) -> int:
    return min(protocol.exact_chunks, len(references.evaluation.tokens))


class _Counter:
    """One progress over all tasks: shipped and exact positions, then latency blocks."""

    def __init__(self, progress: Progress, totals: Sequence[int]) -> None:
        self._progress, self._total, self._before = progress, sum(totals), 0

    def task(self, size: int) -> Progress:
        before, self._before = self._before, self._before + size

        def advance(done: int, total: int) -> None:
            self._progress(before + size * done // total, self._total)

        return advance


def _measure(
    candidate: Candidate,
    place: Place,
    references: References,
    smoke: Smoke,
    folder: Path,
    protocol: Protocol,
    progress: Progress,
) -> _Measured:
    """Ask the three workers, one after the other."""
    chunks, exact_chunks = len(references.evaluation.tokens), _exact_chunks(protocol, references)
    scored = references.evaluation.scored
    # One exact position takes about as long as three shipped ones, the latency protocol as long as one chunk.
    sizes = (chunks * scored, 3 * exact_chunks * scored if candidate.exact else 0, scored)
    counter = _Counter(progress, sizes)
    references.evaluation.save(folder / "evaluation")
    tasks = {
        "shipped": _accuracy_task(references, folder, "shipped", chunks),
        "exact": _accuracy_task(references, folder, "exact", exact_chunks),
    }
    shipped = _ask(place, candidate.artifact, (tasks["shipped"],), counter.task(sizes[0]))
    exact = _Answer(Reply(), candidate.exact_missing)
    if candidate.exact is not None:
        exact = _ask(place, candidate.exact, (tasks["exact"],), counter.task(sizes[1]), exact=True)
    speed_tasks = (_latency_task(candidate.artifact, references.evaluation, protocol), _generate_task(smoke))
    return _Measured(shipped, exact, _ask(place, candidate.artifact, speed_tasks, counter.task(sizes[2])))


def _accuracy_task(references: References, folder: Path, name: str, chunks: int) -> AccuracyTask:
    return AccuracyTask(
        tokens=(folder / "evaluation" / "tokens.npy").resolve(),
        scored_from=references.evaluation.scored_from,
        chunks=chunks,
        reference=references.float_model.path.resolve(),
        dequantized=references.dequantized.path.resolve(),
        metrics_out=(folder / f"{name}.npz").resolve(),
    )


def _latency_task(artifact: Artifact, evaluation: EvaluationSet, protocol: Protocol) -> LatencyTask:
    """Depths and prompt shrink with a small context, so that every step fits into the cache."""
    room = artifact.context - protocol.steps
    depths = sorted({max(1, min(depth, room)) for depth in (protocol.shallow_tokens, artifact.context // 2)})
    prompt = max(1, min(protocol.prompt_tokens, artifact.context))
    longest, text = max(*depths, prompt), evaluation.tokens.ravel().tolist()
    return LatencyTask(
        tokens=tuple((text * -(-longest // len(text)))[:longest]),
        prompt_tokens=prompt,
        depths=tuple(depths),
        blocks=protocol.blocks,
        steps=min(protocol.steps, artifact.context - depths[-1]),
    )


def _generate_task(smoke: Smoke) -> GenerateTask:
    return GenerateTask(prompt=smoke.tokens, max_tokens=smoke.max_tokens, stop_tokens=smoke.stop_tokens)


def _ask(
    place: Place, artifact: Artifact, tasks: tuple[Task, ...], progress: Progress, *, exact: bool = False
) -> _Answer:
    request = Request(
        artifact=ArtifactReference.of(artifact),
        runtime=place.runtime,
        threads=place.threads or place.at.threads(),
        exact=exact,
        tasks=tasks,
    )
    try:
        return _Answer(place.at.run(request, place.options, progress))
    except MeasurementError as error:
        return _Answer(Reply(), str(error))


def _result(
    candidate: Candidate,
    place: Place,
    smoke: Smoke,
    limits: Sequence[Gate],
    measured: _Measured,
    rungs: tuple[Rung, ...],
    read_back: ladder.ReadBack,
) -> TargetResult:
    figures = _figures(candidate.artifact, measured)
    generation = _generation(smoke, measured)
    results = (
        gates.read_back_gate(len(read_back.differing), read_back.note),
        gates.exact_gate(figures),
        _generation_gate(generation, smoke, measured),
        *gates.judge_all(limits, figures),
    )
    return TargetResult(
        name=candidate.name,
        verdict=worst([gate.verdict for gate in results]),
        runtime=place.runtime,
        device=place.device,
        versions=measured.versions,
        artifact=_artifact_figures(candidate.artifact),
        latency=figures.latency,
        memory=figures.memory,
        accuracy=figures.accuracy,
        ladder=rungs,
        gates=results,
        generation=generation,
        notes=_notes(measured, figures),
    )


def _artifact_figures(artifact: Artifact) -> ArtifactFigures:
    return ArtifactFigures(
        path=artifact.main_file,
        format=artifact.exporter,
        size_bytes=artifact.size_bytes,
        sha256=sha256(artifact.path),
    )


def _figures(artifact: Artifact, measured: _Measured) -> gates.Figures:
    shipped, exact = measured.shipped.reply.accuracy, measured.exact.reply.accuracy
    speed = measured.speed.reply.latency
    return gates.Figures(
        accuracy=shipped.accuracy if shipped else None,
        latency=speed.latency if speed else None,
        memory=speed.memory if speed else None,
        size_bytes=artifact.size_bytes,
        exact_step_kld=exact.step_kld if exact else None,
        shipped_step_kld=shipped.step_kld if shipped else None,
        missing=measured.missing,
    )


def _generation(smoke: Smoke, measured: _Measured) -> Generation | None:
    tokens = measured.speed.reply.generated
    return None if tokens is None else Generation(prompt=smoke.prompt, text=smoke.decode(tokens), tokens=tokens)


def _generation_gate(generation: Generation | None, smoke: Smoke, measured: _Measured) -> GateResult:
    broken = generation is not None and not gates.speaks(generation.tokens)
    float_tokens = smoke.float_tokens() if broken and smoke.float_tokens else None
    return gates.generation_gate(generation, measured.speed.missing, float_tokens)


def _notes(measured: _Measured, figures: gates.Figures) -> tuple[str, ...]:
    notes = [f"{part}: {why}" for part, why in measured.missing.items()]
    if figures.latency and figures.latency.unstable:
        notes.append(f"latency is unstable: {figures.latency.unstable}")
    return tuple(notes)
