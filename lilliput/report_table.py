"""report.md: the verdict in a sentence, and tables that a README can hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lilliput import figures
from lilliput.allocated import Allocation, classes, ranges
from lilliput.ladder import guilty, steps
from lilliput.report import Coverage, Report, Slice, TriedRung
from lilliput.report_device import device_rows
from lilliput.results import GateResult, RungName, SuiteFigures, TargetResult

COLUMNS = ("target", "verdict", "size", "decode", "prefill", "TTFT", "peak RSS", "mean KLD", "top-1", "perplexity")

TRIED_COLUMNS = ("rung", "target", "time", "mean KLD", "size", "verdict")
LEAST_SHOWN = 0.005
SLICE_GATE = "slice_drop "  # what the name of a slice's gate begins with

RUNGS: tuple[RungName, ...] = ("dequantized", "read_back", "exact", "shipped")


def headline(report: Report) -> str:
    """What the verdict means, in one sentence."""
    passed, total = sum(t.verdict == "PASS" for t in report.targets), len(report.targets)
    gates = sum(len(t.gates) for t in report.targets)
    if passed == total:
        return f"{passed} of {total} targets pass, {gates} of {gates} gates."
    words = {"FAIL": "fails", "INCONCLUSIVE": "is inconclusive"}
    others = ", ".join(f"{t.name} {words[t.verdict]}" for t in report.targets if t.verdict != "PASS")
    return f"{passed} of {total} targets pass; {others}."


def reasons(target: TargetResult) -> list[str]:
    """Why a target does not pass: each gate in question, and the rung where its loss is; open slices in one line."""
    found = [gate for gate in target.gates if gate.verdict != "PASS"]
    still = [gate for gate in found if gate.verdict == "INCONCLUSIVE" and gate.name.startswith(SLICE_GATE)]
    lines = [reason(target, gate) for gate in found if len(still) < 2 or gate not in still]
    if len(still) > 1:
        names = ", ".join(gate.name.removeprefix(SLICE_GATE) for gate in still)
        lines.append(
            f"{SLICE_GATE.strip()} of {len(still)} slices is open, wanted {figures.limit(still[0])}: their intervals "
            f"hold the limit, ask more ({names})"
        )
    return lines


def reason(target: TargetResult, gate: GateResult) -> str:
    """What a gate saw and wanted, and the rung where the loss is."""
    seen = figures.metric(gate.name, gate.value) if gate.value is not None else "not measured"
    text = f"{gate.name} is {seen}, wanted {figures.limit(gate)}"
    if gate.note:
        text += f" ({gate.note})"
    step = guilty(target, gate)
    if step is None:
        return text
    cost = step.step_kld if gate.name.endswith("step_kld") else step.added
    return f"{text}; the loss is at rung {step.rung} ({figures.signed(cost)} nats): {step.cause}"


def cells(target: TargetResult) -> tuple[str, ...]:
    """One target's row of COLUMNS."""
    latency, memory, accuracy = target.latency, target.memory, target.accuracy
    return (
        target.name,
        target.verdict,
        figures.megabytes(target.artifact.size_bytes),
        f"{figures.number(latency.decode_tokens_per_s)} tok/s" if latency else figures.NONE,
        f"{figures.number(latency.prefill_tokens_per_s)} tok/s" if latency else figures.NONE,
        figures.milliseconds(latency.ttft_ms) if latency else figures.NONE,
        figures.megabytes(memory.peak_rss_bytes) if memory else figures.NONE,
        figures.number(accuracy.mean_kld) if accuracy else figures.NONE,
        figures.percent(accuracy.top1_agreement) if accuracy else figures.NONE,
        figures.perplexity(accuracy),
    )


def markdown(report: Report) -> str:
    """The whole of report.md."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {report.recipe.name}: {report.verdict}"
    yield ""
    yield headline(report)
    yield ""
    yield from _table(COLUMNS, (cells(t) for t in report.targets))
    yield ""
    why = [f"- **{target.name}**: {reason}" for target in report.targets for reason in reasons(target)]
    yield from (*why, "") if why else ()
    yield "Where the loss is: what each rung adds to the mean KLD from the float model, in nats a token."
    yield ""
    yield from _table(("target", *RUNGS, "together"), map(_ladder_row, report.targets))
    yield ""
    for target in report.targets:
        yield from _slices(target)
    if report.escalation:
        yield "What each rung of the escalation cost, and what it bought:"
        yield ""
        yield from _table(TRIED_COLUMNS, tried(report.escalation))
        yield ""
    if solve_steps(report):
        yield "What each step of the solvers left: the squared error of the matrices' outputs, relative to the outputs."
        yield ""
        yield from _table(("rule", "grid", "after each step"), solve_steps(report))
        yield ""
    if rows := requantized(report):
        yield "What re-quantizing costs: the squared error of the weights, relative to those that the source held."
        yield ""
        yield from _table(REQUANTIZED, rows)
        yield ""
    for allocation in report.allocations:
        yield from _allocation(allocation)
    yield _provenance(report)
    yield from _coverage(report)
    yield from _devices(report)
    notes = [*report.notes, *(f"{t.name}: {note}" for t in report.targets for note in t.notes)]
    if notes:
        yield from ("", "What was proven, refused, or kept in float:", "")
        yield from (f"- {note}" for note in notes)


SLICES = ("slice", "items", "float model", "artifact", "lost", "95 % interval", "mean KLD")


def slice_rows(found: SuiteFigures) -> list[tuple[str, ...]]:
    """A row for each slice in the columns of SLICES."""
    return [
        (
            s.name,
            str(s.items),
            figures.percent(s.float_score),
            figures.percent(s.score),
            figures.percent(s.drop),
            f"{figures.percent(s.drop_interval.low)} to {figures.percent(s.drop_interval.high)}",
            figures.number(s.mean_kld),
        )
        for s in found.slices
    ]


def confidence_line(found: SuiteFigures) -> str:
    """How far confidence is from being right, in a sentence; empty where nothing was to choose."""
    if found.calibration_error is None:
        return ""
    ours, theirs = figures.percent(found.calibration_error), figures.percent(found.float_calibration_error)
    return f"Expected calibration error of the choices: {ours} (float model {theirs})."


def weak_line(found: SuiteFigures) -> str:
    """The slices of which the float model itself has no more than one item above chance; empty where it has."""
    names = [s.name for s in found.slices if s.float_score <= s.chance + 1 / s.items]
    if not names:
        return ""
    return (
        f"The float model itself hardly beats chance in {', '.join(names)}: there the divergence tells, not the score."
    )


def _slices(target: TargetResult) -> Iterator[str]:
    if target.suites is None:
        return
    yield f"What {target.name} answers, against the float model: shares of items that are right."
    yield ""
    yield from _table(SLICES, slice_rows(target.suites))
    yield ""
    for line in filter(None, (confidence_line(target.suites), weak_line(target.suites))):
        yield from (line, "")


def tried(rungs: Iterable[TriedRung]) -> list[tuple[str, ...]]:
    """A row of TRIED_COLUMNS for each target that a rung was tried for; the rung's time stands in its first."""
    return [
        (
            rung.rung,
            target.name,
            figures.seconds(rung.seconds) if target is rung.targets[0] else "",
            figures.number(target.mean_kld),
            figures.megabytes(target.size_bytes),
            target.verdict,
        )
        for rung in rungs
        for target in rung.targets
    ]


def solve_steps(report: Report) -> list[tuple[str, str, str]]:
    """A row a rule: its pattern, its grid, "rtn 1.20 % → awq 1.05 % → gptq 0.310 %"."""
    found: dict[tuple[str, str], list[str]] = {}
    for step in (step for step in report.steps if step.source_grid is None):
        left = f"{step.step} {figures.number(100 * step.relative_error)} %"
        found.setdefault((step.match, step.grid), []).append(left)
    return [(*rule, " → ".join(steps)) for rule, steps in found.items()]


REQUANTIZED = ("matrices", "from and to", "number", "mean error", "largest")


def requantized(report: Report) -> list[tuple[str, ...]]:
    """A row of REQUANTIZED for each kind of matrix that the source held on one grid and the files hold on another."""
    found: dict[tuple[str, str], list[float]] = {}
    for step in report.steps:
        if step.source_grid is not None:
            kind = re.sub(r"^layers\.\d+\.", "layers.*.", step.match)
            found.setdefault((kind, f"{step.source_grid} → {step.grid}"), []).append(100 * step.relative_error)
    return [
        (*kind, str(len(its)), f"{figures.number(sum(its) / len(its))} %", f"{figures.number(max(its))} %")
        for kind, its in found.items()
    ]


def _ladder_row(target: TargetResult) -> tuple[str, ...]:
    found = {step.rung: step for step in steps(target.ladder)}
    added = (figures.signed(found[rung].added) if rung in found else figures.NONE for rung in RUNGS)
    measured = [step.total for step in found.values() if step.total is not None]
    return (target.name, *added, figures.number(measured[-1] if measured else None))


ALLOCATED = ("matrices", "grid", "layers", "size", "bits a weight", "predicted KLD")


def budget_line(allocation: Allocation) -> str:
    """What a budget came to, in a sentence."""
    found = (
        f"{figures.number(allocation.bits_per_weight)} bits a weight, predicted KLD {figures.number(allocation.loss)}"
    )
    if allocation.finalists:
        measured = (f"{one.tables} {figures.number(one.kld)}" for one in allocation.finalists)
        found += f"; measured on samples that no solve had seen: {'; '.join(measured)}"
    if allocation.limit_bytes is None or allocation.file_bytes is None:
        return f"{allocation.target}: {found}."
    return f"{allocation.target}: {allocation.file_bytes:,} of {allocation.limit_bytes:,} bytes, {found}."


def allocated_rows(allocation: Allocation) -> list[tuple[str, ...]]:
    """What went where: a row for each kind of matrix and grid, in the columns of ALLOCATED."""
    return [
        (
            row.kind,
            row.grid,
            ranges(row.layers) or figures.NONE,
            figures.megabytes(row.size_bytes),
            figures.number(8 * row.size_bytes / row.weights),
            figures.number(row.loss),
        )
        for row in classes(allocation)
    ]


def _allocation(allocation: Allocation) -> Iterator[str]:
    yield f"What the budget gave to each matrix. {budget_line(allocation)}"
    yield ""
    yield from _table(ALLOCATED, allocated_rows(allocation))
    yield ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    titles = list(head)
    for row in (titles, ["---", "---", *["---:"] * (len(titles) - 2)], *rows):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def _devices(report: Report) -> Iterator[str]:
    """What the devices' sensors said, and what they lack."""
    rows = [(t.name, what, value) for t in report.targets for what, value in device_rows(t)]
    if rows:
        yield from ("", "What the devices said of themselves while they were measured:", "")
        yield from _table(("target", "what", "value"), rows)


def _coverage(report: Report) -> Iterator[str]:
    """Each slice's share of the tokens that calibrate and that judge."""
    if report.coverage is None:
        return
    shared = figures.percent(report.coverage.shared)
    yield from ("", f"What calibration holds of what is judged, in shares of tokens (text in common: {shared}):", "")
    rows = [(s.name, figures.percent(s.calibration), figures.percent(s.evaluation)) for s in shown(report.coverage)]
    yield from _table(("slice", "calibration", "evaluation"), rows)


def shown(coverage: Coverage) -> list[Slice]:
    """Slices of at least half a percent on either side."""
    return [s for s in coverage.slices if max(s.calibration, s.evaluation) >= LEAST_SHOWN]


def _provenance(report: Report) -> str:
    host = report.host
    calibration = report.calibration.origin if report.calibration else "none"
    return (
        f"Model {report.source.name}, sha256 `{report.source.sha256[:12]}`; calibration: {calibration}; "
        f"measured on {host.cpu} ({host.cores} cores, {figures.number(host.memory_bytes / 2**30)} GiB, {host.system})."
    )
