"""What a run is before and after: Plan (stages, what is cached, estimates) and Run (what was done and found).

A stage has a kind and, where there are several of it, a subject: `export:onnx`, `quantize:int4-b32+int8-channel`.
Its key addresses its result in the store: same code, same inputs, same options → same key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lilliput.progress import Progress, silent
from lilliput.recipe_schema import Recipe
from lilliput.report import Report, StageTime
from lilliput.results import Verdict

StageKind = Literal[
    "source",
    "evaluation",
    "samples",
    "coverage",
    "trace",
    "reference",
    "suites",
    "answers",
    "statistics",
    "sensitivity",
    "correction",
    "price",
    "allocate",
    "quantize",
    "recover",
    "dequantized",
    "export",
    "validate",
    "report",
]


EXIT_CODES: dict[Verdict, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


@dataclass(frozen=True)
class PlannedStage:
    """One stage. Seconds are an estimate of the work that is left: 0 where it is cached."""

    kind: StageKind
    subject: str  # "" where there is one of its kind
    key: str  # hex; "" for the report, which is always written
    cached: bool
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.subject}" if self.subject else self.kind


@dataclass(frozen=True)
class PlannedTarget:
    """One artifact to be. `size_bytes` is an estimate: exact bytes of each matrix on its grid, floats as stored."""

    name: str
    exporter: str
    runtime: str
    device: str
    size_bytes: int
    estimate: str = ""  # the roofline of the board that the recipe names, with its label


@dataclass(frozen=True)
class Plan:
    """What `run` will do. The figures are estimates from the model's size; only stages that are not cached count."""

    recipe: Recipe
    recipe_sha256: str  # of its canonical JSON
    source_sha256: str  # of the files that the model is read from
    host: str  # names the machine that measures
    out: Path
    store: Path
    fresh: bool
    parameters: int
    stages: tuple[PlannedStage, ...]
    targets: tuple[PlannedTarget, ...]
    ram_bytes: int
    disk_bytes: int
    seconds: float

    @property
    def cached(self) -> bool:
        """Whether nothing but the report is left to do."""
        return all(stage.cached for stage in self.stages if stage.kind != "report")


@dataclass(frozen=True)
class Run:
    """A finished run. `report` is what report.json holds: verdict, targets with all figures, the stages' times."""

    plan: Plan
    report: Report

    @property
    def verdict(self) -> Verdict:
        return self.report.verdict

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


class Watcher(Protocol):
    """Told of each stage as it starts (gives what to call with its progress) and ends."""

    def started(self, stage: PlannedStage) -> Progress: ...

    def finished(self, stage: StageTime) -> None: ...


class Quiet:
    """A watcher that draws nothing."""

    def started(self, stage: PlannedStage) -> Progress:
        return silent

    def finished(self, stage: StageTime) -> None:
        """Draw nothing."""
