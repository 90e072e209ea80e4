"""What a rule of the truth-check is, and what it finds.

A rule looks at an opened file (lilliput.checks.opened) and yields what it saw and where. Its reason names a public
report of the defect, so that a finding can be looked up; its fix says what to do. Rules of severity "error" are about
files that compute wrong numbers or do not load; "warning" is what makes a file slow, large or doubtful. "note" is what
only some targets cannot run: it is no alarm, until it is asked for such a target, where it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lilliput.results import Record

if TYPE_CHECKING:
    from lilliput.checks.opened import Opened

Format = Literal["onnx", "gguf", "tflite", "safetensors"]
Severity = Literal["error", "warning", "note"]

EVERY: tuple[Format, ...] = ("onnx", "gguf", "tflite", "safetensors")
RUNTIMES: tuple[Format, ...] = ("onnx", "gguf", "tflite")
ONNX: tuple[Format, ...] = ("onnx",)
GGUF: tuple[Format, ...] = ("gguf",)
TFLITE: tuple[Format, ...] = ("tflite",)


class NotCheckedError(Exception):
    """Raised by a rule that could not look: a package that is missing, weights that cannot be read. Its text is
    listed beside the findings."""


@dataclass(frozen=True)
class Seen:
    """What a rule saw. `place` names a tensor, a node, or a key of the metadata, as the file names it."""

    place: str
    what: str


Check = Callable[["Opened"], Iterable[Seen]]


@dataclass(frozen=True)
class Rule:
    """One rule. `summary` ends without a full stop; `reference` is an issue (owner/name#number) or an address.

    `needs`: "source" rules are asked only where a source was given.
    """

    id: str
    formats: tuple[Format, ...]
    severity: Severity
    summary: str
    reason: str
    reference: str
    fix: str
    check: Check
    needs: Literal["file", "source"] = "file"


class Finding(Record):
    """One thing that is wrong, with the rule's own words on it."""

    rule: str
    severity: Severity
    place: str
    seen: str
    reason: str
    reference: str
    fix: str


class Checked(Record):
    """The truth-check of one file. `not_checked` are rules that could not look, each with why; `notes` alarm nobody."""

    path: str
    format: Format
    findings: tuple[Finding, ...]
    rules: tuple[str, ...]  # the ids that were asked
    not_checked: tuple[str, ...] = ()
    notes: tuple[Finding, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")


def finding(rule: Rule, seen: Seen) -> Finding:
    return Finding(
        rule=rule.id,
        severity=rule.severity,
        place=seen.place,
        seen=seen.what,
        reason=rule.reason,
        reference=rule.reference,
        fix=rule.fix,
    )
