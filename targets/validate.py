"""Validate one target: the artifact on its runtime, held against the float model, rung by rung.

    1. read the weights back from the file (in this process)
    2. accuracy of the exact twin and of the shipped artifact, teacher-forced on the evaluation text (several workers)
    3. speed, memory and a greedy continuation (one worker, alone: its peak memory is the runtime's)
    4. the recipe's questions, where it has suites (one worker): each slice against the float model's answers
    5. the ladder and the gates

A worker that fails, hangs or is killed leaves a note and figures that are missing; their gates are then
inconclusive. A package that is missing is an error of its own. Per-token figures stay in `folder`:
shipped.npz and exact.npz, as targets.metrics.TokenMetrics saves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lilliput.artifact import Artifact, sha256
from lilliput.errors import MeasurementError
from lilliput.model import QuantizedModel
from lilliput.progress import Progress, silent
from lilliput.results import ArtifactFigures, Gate, GateResult, Generation, Rung, SuiteFigures, TargetResult, worst
from targets import boards, gates, ladder, slices
from targets.answers import ANSWERS, QUESTIONS, load_answers
from targets.base import Connection
from targets.metrics import summarize
from targets.probe import Probe
from targets.reference import EvaluationSet, Logits
from targets.request import (
    AccuracyTask,
    ArtifactReference,
    CountTask,
    GenerateTask,
    LatencyTask,
    Reply,
    Request,
    SuiteTask,
)
from targets.scoring import Scored, Subject, score

WORKER_OVERHEAD_BYTES = 400_000_000  # interpreter, packages, one row of each reference
MEMORY_PER_ARTIFACT_BYTE = 1.5  # weights in the runtime's layout beside the mapped file, at most


@dataclass(frozen=True)
class Place:
    """Where an artifact runs."""

    runtime: str
    device: str
    at: Connection
    threads: int | None = None  # None: the device's own number
    board: str | None = None  # what the device should be


@dataclass(frozen=True, eq=False)
class Candidate:
    """One target: its artifact, the exact twin (None: `exact_missing` says why) and the file's own weights."""

    name: str
    artifact: Artifact
    read: Callable[[], ladder.Read]
    exact: Artifact | None = None
    exact_missing: str = "the exporter wrote no exact twin"
    low_bit: bool = True  # some matrices are quantized


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
class Asked:
    """The recipe's questions: the folders of their tokens and of the float model's answers."""

    items: tuple[slices.Asked, ...]
    questions: Path
    answers: Path
    decode: Callable[[Sequence[int]], str]
    notes: tuple[str, ...] = ()  # what is not asked, by name


@dataclass(frozen=True)
class Protocol:
    """How much is measured. The defaults take about a minute for a 135M model on two cores."""

    exact_chunks: int = 1
    prompt_tokens: int = 128
    shallow_tokens: int = 16  # the first depth; the second is half the context
    blocks: int = 4
    steps: int = 32
    counted_steps: int = 4  # decoded by an emulator that counts


@dataclass(frozen=True, eq=False)
class _Measured:
    """What the workers found; `speed` is an empty reply where `speed_missing` says why. It has no figures of time and
    memory where `untimed` says why."""

    shipped: Scored
    exact: Scored
    speed: Reply
    speed_missing: str = ""
    untimed: str = ""
    suites: SuiteFigures | None = None
    suites_missing: str = ""

    @property
    def missing(self) -> dict[gates.Part, str]:
        reasons: dict[gates.Part, str] = {
            "accuracy": self.shipped.missing,
            "exact": self.exact.missing,
            "latency": self.speed_missing or self.untimed,
            "suites": self.suites_missing,
        }
        if self.untimed and self.speed.instructions is None:
            reasons["instructions"] = self.speed_missing or "the emulator does not count them (QEMU 7.2 to 8.2 do)"
        return {part: why for part, why in reasons.items() if why}


def validate(
    candidate: Candidate,
    place: Place,
    references: References,
    smoke: Smoke,
    limits: Sequence[Gate],
    folder: Path,
    protocol: Protocol = Protocol(),
    asked: Asked | None = None,
    progress: Progress = silent,
) -> TargetResult:
    """All figures and the verdict of one target; `folder` exists and takes the per-token figures.

    Raises MissingPackageError where the runtime is not installed, MissingError where memory does not suffice.
    """
    seen = place.at.probe()
    _check_memory(candidate, seen)
    rung, read_back = ladder.read_back_rung(
        references.model,
        candidate.read(),
        references.evaluation,
        (references.float_model, references.dequantized),
        folder / "read_back",
    )
    first = progress if asked is None else _share(progress, 0, 80)
    measured = _measure(candidate, place, seen, references, smoke, folder, protocol, first)
    if asked is not None:
        threads = place.threads or seen.host.cores
        measured = _questioned(measured, candidate, place, threads, asked, folder, _share(progress, 80, 100))
    dequantized = references.dequantized.metrics()
    rungs = (
        *ladder.first_rungs(dequantized),
        rung,
        ladder.exact_rung(measured.exact.metrics, measured.exact.missing, dequantized),
        ladder.shipped_rung(measured.shipped.metrics, measured.shipped.missing),
    )
    found = _result(candidate, place, seen, smoke, limits, measured, rungs, read_back)
    return found if asked is None else found.model_copy(update={"notes": (*found.notes, *asked.notes)})


def _needed_bytes(artifact: Artifact) -> int:
    return round(MEMORY_PER_ARTIFACT_BYTE * artifact.size_bytes) + WORKER_OVERHEAD_BYTES


def _check_memory(candidate: Candidate, seen: Probe) -> None:
    for artifact in filter(None, (candidate.artifact, candidate.exact)):
        seen.check_memory(_needed_bytes(artifact), f"measuring {artifact.path.name}")


def _slots(candidate: Candidate, seen: Probe, threads: int) -> int:
    """Workers at a time: one a thread, fewer where memory does not hold so many of the larger artifact."""
    largest = max(_needed_bytes(artifact) for artifact in filter(None, (candidate.artifact, candidate.exact)))
    return max(1, min(threads, seen.free_memory_bytes // largest))


def _measure(
    candidate: Candidate,
    place: Place,
    seen: Probe,
    references: References,
    smoke: Smoke,
    folder: Path,
    protocol: Protocol,
    progress: Progress,
) -> _Measured:
    """Accuracy with 95 % of the progress, then speed."""
    references.evaluation.save(folder / "evaluation")
    threads, chunks = place.threads or seen.host.cores, len(references.evaluation.tokens)
    subjects = [Subject("shipped", candidate.artifact, chunks)]
    if candidate.exact is not None:
        subjects.insert(0, Subject("exact", candidate.exact, min(protocol.exact_chunks, chunks)))
    task, slots = _accuracy_task(references, folder), _slots(candidate, seen, threads)
    scored = score(subjects, place.runtime, task, place.at.run, slots, _share(progress, 0, 95))
    exact = scored.get("exact", Scored(None, candidate.exact_missing))
    untimed = f"not measured: emulated by {seen.host.emulated}" if seen.host.emulated else ""
    text = references.evaluation.tokens.ravel().tolist()
    speed = (
        _count_task(candidate.artifact, text, protocol)
        if untimed
        else _latency_task(candidate.artifact, text, protocol)
    )
    request = Request(
        artifact=ArtifactReference.of(candidate.artifact),
        runtime=place.runtime,
        threads=1 if untimed else threads,
        tasks=(speed, _generate_task(candidate.artifact, smoke)),
    )
    try:
        return _Measured(scored["shipped"], exact, place.at.run(request, _share(progress, 95, 100)), untimed=untimed)
    except MeasurementError as error:
        return _Measured(scored["shipped"], exact, Reply(), str(error))


def _questioned(
    measured: _Measured,
    candidate: Candidate,
    place: Place,
    threads: int,
    asked: Asked,
    folder: Path,
    progress: Progress,
) -> _Measured:
    """With what the artifact answers."""
    task = SuiteTask(
        questions=(asked.questions / QUESTIONS).resolve(),
        reference=asked.answers.resolve(),
        answers_out=(folder / ANSWERS).resolve(),
    )
    request = Request(
        artifact=ArtifactReference.of(candidate.artifact), runtime=place.runtime, threads=threads, tasks=(task,)
    )
    try:
        reply = place.at.run(request, progress)
    except MeasurementError as error:
        return replace(measured, suites_missing=str(error))
    assert reply.answers is not None
    wanted, found = load_answers(asked.answers / ANSWERS), load_answers(reply.answers)
    return replace(measured, suites=slices.figures(asked.items, wanted, found, asked.decode))


def _share(progress: Progress, start: int, end: int) -> Progress:
    """Progress in thousandths of the whole, from `start` to `end` per cent."""

    def advance(done: int, total: int) -> None:
        progress(10 * start + 10 * (end - start) * done // total, 1000)

    return advance


def _accuracy_task(references: References, folder: Path) -> AccuracyTask:
    """All chunks; figures go to files in `folder`."""
    return AccuracyTask(
        tokens=(folder / "evaluation" / "tokens.npy").resolve(),
        scored_from=references.evaluation.scored_from,
        chunks=len(references.evaluation.tokens),
        reference=references.float_model.path.resolve(),
        dequantized=references.dequantized.path.resolve(),
        metrics_out=folder.resolve(),
    )


def _count_task(artifact: Artifact, text: list[int], protocol: Protocol) -> CountTask:
    steps = min(protocol.counted_steps, artifact.context - 1)
    length = min(protocol.shallow_tokens + steps, artifact.context)
    return CountTask(tokens=tuple((text * -(-length // len(text)))[:length]), steps=steps)


def _latency_task(artifact: Artifact, text: list[int], protocol: Protocol) -> LatencyTask:
    """Depths and prompt shrink with a small context, so that every step fits into the cache."""
    room = artifact.context - protocol.steps
    depths = sorted({max(1, min(depth, room)) for depth in (protocol.shallow_tokens, artifact.context // 2)})
    prompt = max(1, min(protocol.prompt_tokens, artifact.context))
    longest = max(*depths, prompt)
    return LatencyTask(
        tokens=tuple((text * -(-longest // len(text)))[:longest]),
        prompt_tokens=prompt,
        depths=tuple(depths),
        blocks=protocol.blocks,
        steps=min(protocol.steps, artifact.context - depths[-1]),
    )


def _generate_task(artifact: Artifact, smoke: Smoke) -> GenerateTask:
    """Prompt and continuation fit into the cache: a small context shortens the prompt first, then the continuation."""
    prompt = smoke.tokens[: max(1, artifact.context - smoke.max_tokens)]
    room = artifact.context - len(prompt)
    return GenerateTask(prompt=prompt, max_tokens=min(smoke.max_tokens, room), stop_tokens=smoke.stop_tokens)


def _result(
    candidate: Candidate,
    place: Place,
    seen: Probe,
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
        *_dot_product_gate(candidate, seen, measured),
        *gates.judge_all(limits, figures),
    )
    return TargetResult(
        name=candidate.name,
        verdict=worst([gate.verdict for gate in results]),
        runtime=place.runtime,
        device=place.device,
        host=seen.host,
        versions=measured.speed.versions,
        artifact=_artifact_figures(candidate.artifact),
        latency=figures.latency,
        memory=figures.memory,
        instructions=measured.speed.instructions,
        conditions=measured.speed.latency.conditions if measured.speed.latency else None,
        accuracy=figures.accuracy,
        ladder=rungs,
        gates=results,
        generation=generation,
        suites=figures.suites,
        notes=(
            *candidate.artifact.notes,
            *_notes(measured, figures),
            *_device_notes(place, seen, measured.speed.versions),
        ),
    )


def _artifact_figures(artifact: Artifact) -> ArtifactFigures:
    return ArtifactFigures(
        path=artifact.main_file,
        format=artifact.exporter,
        size_bytes=artifact.size_bytes,
        sha256=sha256(artifact.path),
    )


def _figures(artifact: Artifact, measured: _Measured) -> gates.Figures:
    shipped, exact, speed = measured.shipped.metrics, measured.exact.metrics, measured.speed.latency
    return gates.Figures(
        accuracy=summarize(shipped) if shipped else None,
        latency=speed.latency if speed else None,
        memory=speed.memory if speed else None,
        size_bytes=artifact.size_bytes,
        exact_step_kld=exact.mean_step_kld if exact else None,
        shipped_step_kld=shipped.mean_step_kld if shipped else None,
        missing=measured.missing,
        suites=measured.suites,
        instructions=measured.speed.instructions,
    )


def _generation(smoke: Smoke, measured: _Measured) -> Generation | None:
    tokens = measured.speed.generated
    return None if tokens is None else Generation(prompt=smoke.prompt, text=smoke.decode(tokens), tokens=tokens)


def _generation_gate(generation: Generation | None, smoke: Smoke, measured: _Measured) -> GateResult:
    broken = generation is not None and not gates.speaks(generation.tokens)
    float_tokens = smoke.float_tokens() if broken and smoke.float_tokens else None
    return gates.generation_gate(generation, measured.speed_missing, float_tokens)


def _dot_product_gate(candidate: Candidate, seen: Probe, measured: _Measured) -> list[GateResult]:
    """On an emulated processor that has the dot product; a model in float needs none."""
    if not measured.untimed or "asimddp" not in seen.host.isa or not candidate.low_bit:
        return []
    return [gates.dot_product_gate(measured.speed.instructions, measured.missing.get("instructions", ""))]


def _notes(measured: _Measured, figures: gates.Figures) -> tuple[str, ...]:
    notes = [f"{part}: {why}" for part, why in measured.missing.items()]
    if figures.latency and figures.latency.unstable:
        notes.append(f"latency is unstable: {figures.latency.unstable}")
    return tuple(notes)


def _device_notes(place: Place, seen: Probe, versions: Mapping[str, str]) -> list[str]:
    """Where the device is not the board that was named, or its packages are not those here."""
    notes = []
    if place.board is not None and (why := boards.differences(boards.load(place.board), seen.host)):
        notes.append(why)
    for name, there in versions.items():
        with contextlib.suppress(PackageNotFoundError):
            if (here := version(name)) != there:
                notes.append(f"{name} is {there} on {seen.host.device}, {here} here")
    return notes
