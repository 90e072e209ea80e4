"""The report of one run: report.json for programs, report.md for a README, report.html for a person,
report.junit.xml for CI.

`Report` is what `pipeline` fills and what report.json holds, field by field. A figure that was not measured
is null, and a note says why. The files are written atomically (a temporary name, then rename), the
JSON last: who finds a report.json finds all.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from lilliput.allocated import Allocation
from lilliput.errors import ArtifactError, OutputError
from lilliput.results import Host, Record, TargetResult, Verdict


class RecipeFacts(Record):
    """The recipe as it ran, after --set, --model and --target. sha256 is of its canonical JSON."""

    name: str
    sha256: str
    seed: int
    context: int  # positions of the KV caches
    prefill: int


class SourceFacts(Record):
    """The float model. sha256 is of the files that it was read from."""

    name: str
    origin: str  # what the user called it
    family: str
    parameters: int
    sha256: str
    license: str | None = None


class TextFacts(Record):
    """A text that was used: to calibrate, or to evaluate. sha256 is of its UTF-8 bytes, or of its token ids."""

    origin: str  # "self", "builtin", a path, a data set
    tokens: int
    sha256: str


class Slice(Record):
    """A kind of text (calibration.coverage): its share of the tokens that calibrate, and of those that judge."""

    name: str
    calibration: float
    evaluation: float


class Coverage(Record):
    """What calibration holds of what is judged. `shared`: of the evaluation's runs of tokens (calibration.overlap)."""

    slices: tuple[Slice, ...]
    warnings: tuple[str, ...]
    shared: float


class TensorClass(Record):
    """Tensors that one rule of the recipe treats alike. bits_per_weight counts their scales and offsets."""

    match: str
    grid: str  # a grid's name, or float32 / float16 where they are kept
    solver: str | None  # None: kept in float
    tensors: int
    weights: int
    bits_per_weight: float
    size_bytes: int
    targets: tuple[str, ...] = ()  # the targets that hold it; empty: all


class StepLoss(Record):
    """What one step of a rule's solvers left of the error of its matrices' outputs (lilliput.model.SolveStep)."""

    match: str
    grid: str
    step: str
    relative_error: float  # E|D x|² / E|W x|²; of a re-quantized matrix |D|² / |W|²
    source_grid: str | None = None  # of a re-quantized matrix: the source's grid, or "no grid"


class TriedTarget(Record):
    """What a rung of the escalation came to for one target."""

    name: str
    verdict: Verdict
    size_bytes: int
    mean_kld: float | None


class TriedRung(Record):
    """One rung of `quantize: auto`: what it did, how long its own work took, and what it bought."""

    rung: str
    what: str
    seconds: float  # of the stages that were not in the store
    targets: tuple[TriedTarget, ...]  # those that were not yet content


class StageTime(Record):
    """One stage of the pipeline."""

    name: str
    seconds: float
    cached: bool


class Report(Record):
    """Everything that a run found. `targets` is in the recipe's order."""

    verdict: Verdict
    recipe: RecipeFacts
    source: SourceFacts
    calibration: TextFacts | None  # None: no rule needed statistics
    evaluation: TextFacts
    coverage: Coverage | None = None  # None: nothing was calibrated
    host: Host
    versions: dict[str, str]  # lilliput's own and those of the shared packages
    tensors: tuple[TensorClass, ...]
    targets: tuple[TargetResult, ...]
    steps: tuple[StepLoss, ...] = ()  # rule by rule, in the order of its steps
    allocations: tuple[Allocation, ...] = ()  # of the targets whose grids a budget chose
    escalation: tuple[TriedRung, ...] = ()  # rung by rung, where the recipe says `quantize: auto`
    stages: tuple[StageTime, ...] = ()
    notes: tuple[str, ...] = ()  # whatever was refused, kept in float or not proven, by name
    created: str = ""  # UTC, ISO 8601


def load(path: Path) -> Report:
    """Read a report.json, or the one in a folder. Raises ArtifactError where it is none."""
    file = path / "report.json" if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}), wanted the report of a run") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{file}: not a report of this version ({where}: {first['msg']}): run again") from error


def write(report: Report, out: Path) -> None:
    """Write report.html, report.md, report.junit.xml and report.json into `out` (made if absent)."""
    from lilliput.report_junit import junit
    from lilliput.report_page import html
    from lilliput.report_table import markdown

    contents = {
        "report.html": html(report),
        "report.md": markdown(report),
        "report.junit.xml": junit(report),
        "report.json": report.model_dump_json(indent=2) + "\n",
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            _replace(out / name, text)
    except OSError as error:
        raise OutputError(
            f"{out}: the report cannot be written ({error.strerror}); free space or pass another --out"
        ) from error


def _replace(path: Path, text: str) -> None:
    """All of the text or none of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
