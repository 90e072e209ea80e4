"""report.junit.xml: a target is a suite, a gate a test case, for the test views of CI systems.

    PASS            a test case and nothing in it
    FAIL            <failure>, with what was seen and wanted
    INCONCLUSIVE    <error>: it was not shown, and most CI systems show skipped tests as good ones

The format has no standard; elements and attributes are those of Jenkins' and Maven Surefire's schemas.
"""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from lilliput import figures
from lilliput.report import Report
from lilliput.report_table import reason
from lilliput.results import GateResult, TargetResult

OUTCOMES = {"FAIL": "failure", "INCONCLUSIVE": "error"}


def junit(report: Report) -> str:
    """The whole document."""
    root = Xml.Element("testsuites", {"name": f"lilliput {report.recipe.name}", **_counts(report.targets)})
    for target in report.targets:
        suite = Xml.SubElement(root, "testsuite", {"name": target.name, **_counts((target,))})
        if report.created:
            suite.set("timestamp", report.created)
        facts = Xml.SubElement(suite, "properties")
        for name, value in _properties(report, target).items():
            Xml.SubElement(facts, "property", {"name": name, "value": _allowed(value)})
        for gate in target.gates:
            _case(suite, report, target, gate)
    Xml.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{Xml.tostring(root, encoding="unicode")}\n'


def _counts(targets: tuple[TargetResult, ...]) -> dict[str, str]:
    verdicts = [gate.verdict for target in targets for gate in target.gates]
    return {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count("FAIL")),
        "errors": str(verdicts.count("INCONCLUSIVE")),
        "skipped": "0",
    }


def _properties(report: Report, target: TargetResult) -> dict[str, str]:
    return {
        "verdict": target.verdict,
        "model": report.source.name,
        "sha256": target.artifact.sha256,
        "size_bytes": str(target.artifact.size_bytes),
        "runtime": f"{target.runtime} on {target.device}",
    }


def _case(suite: Xml.Element, report: Report, target: TargetResult, gate: GateResult) -> None:
    name = f"{gate.name} {figures.limit(gate)}"
    case = Xml.SubElement(suite, "testcase", {"name": name, "classname": f"{report.recipe.name}.{target.name}"})
    if gate.verdict in OUTCOMES:
        text = _allowed(reason(target, gate))
        outcome = Xml.SubElement(case, OUTCOMES[gate.verdict], {"message": text, "type": gate.verdict})
        outcome.text = text


def _allowed(text: str) -> str:
    """Without control characters, which XML 1.0 cannot hold and a model's words may have."""
    return "".join(
        c if c >= " " or c in "\t\n" else "\N{REPLACEMENT CHARACTER}" for c in text if c not in "\ufffe\uffff"
    )
