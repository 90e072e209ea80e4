"""The truth-check as a gate of a validation: no finding of severity error. Every finding stands in the notes."""

from __future__ import annotations

from pathlib import Path

from lilliput.checks import FORMATS, Checked, check
from lilliput.checks.comparison import Source
from lilliput.results import GateResult, TargetResult, worst

NAME = "truth_check"


def with_gate(result: TargetResult, file: Path, source: Source) -> TargetResult:
    """The result with the gate and its notes, where there are rules for the file's format."""
    return judged(result, check(file, source)) if file.suffix in FORMATS else result


def judged(result: TargetResult, checked: Checked) -> TargetResult:
    note = "; ".join(dict.fromkeys(f"{found.rule} at {found.place}" for found in checked.errors))
    gate = GateResult(
        name=NAME,
        kind="max",
        limit=0,
        value=len(checked.errors),
        verdict="FAIL" if checked.errors else "PASS",
        note=note,
    )
    notes = [f"truth-check: {f.severity} {f.rule} at {f.place}: {f.seen} ({f.reference})" for f in checked.findings]
    notes += [f"truth-check: not checked {line}" for line in checked.not_checked]
    gates = (*result.gates, gate)
    return result.model_copy(
        update={"gates": gates, "verdict": worst([g.verdict for g in gates]), "notes": (*result.notes, *notes)}
    )
