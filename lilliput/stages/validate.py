"""Prove one artifact on its runtime and device: speed, memory, accuracy, the ladder (targets.validate); and read its
file against the source (lilliput.checks).

    result.json                   the TargetResult with the gates that are always on
    shipped.npz, exact.npz        figures of every scored token

The recipe's own gates are judged after it, from the figures: another limit needs no new measurement. The exact twin is
written here, measured, and removed: it is as large as the float model in some formats.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput import registry
from lilliput.errors import ExportError
from lilliput.progress import Progress
from lilliput.recipe_schema import Plugin, Target
from lilliput.results import Gate, TargetResult, worst
from lilliput.stages.export import export, open_artifact

if TYPE_CHECKING:
    from pydantic import BaseModel

    from exporters.base import Exporter
    from lilliput.artifact import Artifact
    from lilliput.model import QuantizedModel
    from targets.base import Device
    from targets.gates import Figures, Part
    from targets.validate import Asked, Smoke

RESULT = "result.json"
QUESTION = "What is the capital of France?"  # to a model with a chat template
BEGINNING = "The capital of France is"  # to any other
SMOKE_TOKENS = 24


@dataclass(frozen=True)
class Held:
    """The folders of what a candidate is held against."""

    source: Path
    quantized: Path
    traced: Path
    evaluation: Path
    reference: Path
    dequantized: Path
    suites: Path | None = None  # with answers: the questions of the recipe's suites, and the float model's answers
    answers: Path | None = None


def work(exported: Path, held: Held, target: Target, folder: Path, progress: Progress) -> None:
    result = measure(open_artifact(exported), held, target, folder, progress)
    (folder / RESULT).write_text(result.model_dump_json(indent=2) + "\n")


def measure(artifact: Artifact, held: Held, target: Target, folder: Path, progress: Progress) -> TargetResult:
    """The figures of an artifact, wherever it lies, and the gates that are always on."""
    from lilliput import checkpoint
    from lilliput.checks import source_of
    from lilliput.checks.gate import with_gate
    from lilliput.source import open_stage
    from targets.reference import EvaluationSet, Logits
    from targets.validate import Candidate, Place, References, validate

    model = checkpoint.load(held.quantized)
    exporter: Exporter = registry.load("exporters", target.exporter.name)()
    twin, missing = _exact_twin(model, held, target, folder / "exact")
    candidate = Candidate(
        target.name,
        artifact,
        lambda: exporter.read(artifact),
        twin,
        missing or "the exporter wrote no exact twin",
        low_bit=bool(model.quantized),
    )
    device, options = device_of(target.device)
    evaluation = EvaluationSet.load(held.evaluation)
    references = References(model, evaluation, Logits(held.reference), Logits(held.dequantized))
    try:
        with closing(device.open(options)) as connection:
            place = Place(target.runtime.name, target.device.url, connection, target.threads, target.board)
            smoke, asked = _smoke(held, artifact), _asked(held)
            result = validate(candidate, place, references, smoke, (), folder, asked=asked, progress=progress)
        return with_gate(result, artifact.path, source_of(open_stage(held.source)))
    finally:
        shutil.rmtree(folder / "exact", ignore_errors=True)


def _asked(held: Held) -> Asked | None:
    """What the recipe's suites ask."""
    from lilliput.stages.suites import items_in
    from lilliput.suites.harness import HarnessItem, left_out
    from lilliput.tokenizer_folder import load_tokenizer
    from targets.validate import Asked

    if held.suites is None or held.answers is None:
        return None
    tokenizer = load_tokenizer(held.quantized / "tokenizer")

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    items = items_in(held.suites)
    tasks = dict.fromkeys(item.suite for item in items if isinstance(item, HarnessItem))
    return Asked(items, held.suites, held.answers, decode, left_out(tasks))


def device_of(plugin: Plugin) -> tuple[Device, BaseModel]:
    """A device that a recipe names, and its options."""
    options = registry.options("devices", plugin.name, plugin.options)
    assert options is not None, "devices have options"
    return registry.load("devices", plugin.name)(), options


def _exact_twin(model: QuantizedModel, held: Held, target: Target, folder: Path) -> tuple[Artifact | None, str]:
    """The twin, or why there is none."""
    folder.mkdir()
    try:
        return export(model, held.traced, target.exporter, folder, exact=True), ""
    except ExportError as error:
        return None, f"no exact twin: {error}"


def _smoke(held: Held, artifact: Artifact) -> Smoke:
    """A question through the chat template, or the beginning of a sentence; greedy tokens follow."""
    from lilliput.tokenizer_folder import load_tokenizer
    from targets.validate import Smoke

    tokenizer = load_tokenizer(held.quantized / "tokenizer")
    prompt, tokens = BEGINNING, tokenizer.encode(BEGINNING, verbose=False)
    if tokenizer.chat_template:
        prompt, turns = QUESTION, [{"role": "user", "content": QUESTION}]
        tokens = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    tokens = tuple(tokens[: artifact.context - SMOKE_TOKENS])

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    stop = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return Smoke(prompt, tokens, stop, decode, _float_greedy(held.source, tokens, stop), SMOKE_TOKENS)


def _float_greedy(source: Path, prompt: tuple[int, ...], stop: tuple[int, ...]) -> Callable[[], tuple[int, ...]]:
    """The float model's own continuation, computed when asked for."""

    def continuation() -> tuple[int, ...]:
        from lilliput.source import open_stage
        from targets.reference import greedy

        model = open_stage(source)
        return greedy(model.config, model.weights, prompt, SMOKE_TOKENS, stop)

    return continuation


def judged(folder: Path, gates: tuple[Gate, ...]) -> TargetResult:
    """A validate stage's result with a recipe's gates judged."""
    return judge(TargetResult.model_validate_json((folder / RESULT).read_bytes()), gates)


def measured_at(folder: Path) -> str:
    """When the figures were taken: UTC, ISO 8601."""
    return datetime.fromtimestamp((folder / RESULT).stat().st_mtime, UTC).isoformat(timespec="seconds")


def judge(result: TargetResult, gates: tuple[Gate, ...]) -> TargetResult:
    """The result with these gates beside those that are always on."""
    from targets.gates import judge_all

    always = {(gate.name, gate.limit) for gate in result.gates}
    asked = [gate for gate in judge_all(gates, _figures(result)) if (gate.name, gate.limit) not in always]
    found = (*result.gates, *asked)
    return result.model_copy(update={"gates": found, "verdict": worst([gate.verdict for gate in found])})


def _figures(result: TargetResult) -> Figures:
    """What the gates look at, from the result itself."""
    from targets.gates import Figures

    steps = {rung.rung: rung.step_kld for rung in result.ladder}
    parts: tuple[Part, ...] = ("accuracy", "latency", "exact", "suites", "instructions")
    notes = {part: note.removeprefix(f"{part}: ") for part in parts for note in result.notes if note.startswith(part)}
    return Figures(
        accuracy=result.accuracy,
        latency=result.latency,
        memory=result.memory,
        size_bytes=result.artifact.size_bytes,
        suites=result.suites,
        exact_step_kld=steps.get("exact"),
        shipped_step_kld=steps.get("shipped"),
        missing=notes,
        instructions=result.instructions,
    )
