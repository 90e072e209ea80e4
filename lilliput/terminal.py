"""What the command line prints: plans, reports, checks, comparisons, inspections, as tables of 80 columns.

Targets are columns and figures are rows, so that three targets fit a terminal and a log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import exp
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lilliput import figures
from lilliput.ab import AB
from lilliput.chat import Conversation
from lilliput.checks.base import Checked
from lilliput.compare import Comparison, Difference
from lilliput.doctor import Check
from lilliput.escalation import Rung
from lilliput.file_ladder.found import WHO, FileLadder, FileRung
from lilliput.inspection.found import Inspection
from lilliput.race import Race
from lilliput.report import Report, TriedRung
from lilliput.report_table import COLUMNS, TRIED_COLUMNS, cells, headline, reasons, tried
from lilliput.results import TargetResult
from lilliput.run import Plan, Run
from lilliput.sweep import Sweep
from lilliput.verify import Verification
from targets.paired import Judgement

COLOURS = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}
CHECK_COLOURS = {"ok": "green", "warning": "yellow", "missing": "bold red"}
GIB = 2**30
SUSPECTS = 10  # matrices of a sweep that are listed


def console() -> Console:
    """Standard output; made when asked for, so that a redirected stream is the one that is written to."""
    return Console(highlight=False, soft_wrap=False)


def table(*head: str) -> Table:
    """The one look of all tables: the first column left, the others right, no frame."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for index, title in enumerate(head):
        made.add_column(title, justify="left" if index == 0 else "right", overflow="fold")
    return made


def show_plan(plan: Plan) -> None:
    """Stages with what is cached, estimated sizes, memory, disk and time."""
    out = console()
    stages = table("stage", "state", "time")
    for stage in plan.stages:
        stages.add_row(stage.name, "cached" if stage.cached else "to do", "" if stage.cached else _about(stage.seconds))
    out.print(stages)
    targets = table("target", "exporter", "runtime", "size")
    for target in plan.targets:
        size = f"about {figures.megabytes(target.size_bytes)}"
        targets.add_row(target.name, target.exporter, f"{target.runtime} on {target.device}", size)
    out.print(targets)
    for target in plan.targets:
        if target.estimate:
            out.print(f"{target.name}: {target.estimate}", markup=False, soft_wrap=True)
    out.print(
        f"In all: {_about(plan.seconds)}, memory about {figures.number(plan.ram_bytes / GIB)} GiB, "
        f"disk about {figures.number(plan.disk_bytes / GIB)} GiB, into {escape(str(plan.out))} (nothing was done)"
    )


def _about(seconds: float) -> str:
    return f"about {figures.seconds(seconds)}"


def plan_json(plan: Plan) -> str:
    """The plan for programs."""
    facts = {
        "recipe": plan.recipe.name,
        "recipe_sha256": plan.recipe_sha256,
        "out": str(plan.out),
        "stages": [asdict(stage) | {"name": stage.name} for stage in plan.stages],
        "targets": [asdict(target) for target in plan.targets],
        "ram_bytes": plan.ram_bytes,
        "disk_bytes": plan.disk_bytes,
        "seconds": plan.seconds,
    }
    return json.dumps(facts, indent=2)


def show_ladder(ladder: Sequence[tuple[Rung, Plan]]) -> None:
    """The rungs of an escalation: what each does, what it adds to do if every target comes so far, and the sizes."""
    out, seen = console(), set[str]()
    made = table("rung", "to do", "time", *(f"{target.name}, about" for target in ladder[0][1].targets))
    for rung, plan in ladder:
        left = [stage for stage in plan.stages if not stage.cached and stage.key not in seen]
        seen |= {stage.key for stage in left if stage.key}
        sizes = (figures.megabytes(target.size_bytes) for target in plan.targets)
        made.add_row(rung.name, f"{len(left)} stages", _about(sum(stage.seconds for stage in left)), *sizes)
        out.print(f"{rung.name}: {rung.what}", markup=False, soft_wrap=True)
    out.print(made)
    out.print("A target stops at the first rung where its gates on accuracy pass (nothing was done)", soft_wrap=True)


def ladder_json(ladder: Sequence[tuple[Rung, Plan]]) -> str:
    """The plan of each rung for programs."""
    found = [{"rung": rung.name, "what": rung.what, "plan": json.loads(plan_json(plan))} for rung, plan in ladder]
    return json.dumps({"ladder": found}, indent=2)


def tell_rung(step: TriedRung) -> None:
    """One line for each target that a rung was tried for, on stderr: standard output has results only."""
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    for _, target, seconds, kld, size, verdict in tried([step]):
        what = f"rung {step.rung} ({step.what}), {target}: KLD {kld}, {size}, {verdict}"
        out.print(f"{what}; {seconds}" if seconds else what, markup=False)


def show_run(done: Run, out: Path, as_json: bool) -> None:
    """The end of a run: the table of its rungs where it climbed, then its report."""
    if as_json:
        print(done.report.model_dump_json(indent=2))
        return
    if done.report.escalation:
        made = table(*TRIED_COLUMNS)
        for row in tried(done.report.escalation):
            made.add_row(*map(_coloured, row))
        console().print(made)
        console().print()
    show_report(done.report, out)


def show_report(report: Report, out: Path) -> None:
    """The end of a run: the figures, the verdict, why, and where the report is."""
    show_targets(report.targets)
    for warning in report.coverage.warnings if report.coverage else ():
        console().print(f"[yellow]{escape(warning)}[/]", soft_wrap=True)
    console().print(f"[{COLOURS[report.verdict]}]{report.verdict}[/] {escape(headline(report))}")
    console().print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)


def show_target(target: TargetResult) -> None:
    """One target, validated by itself."""
    show_targets([target])
    console().print(f"[{COLOURS[target.verdict]}]{target.verdict}[/] {escape(target.name)}")


def show_targets(targets: Sequence[TargetResult]) -> None:
    """Figures as rows, targets as columns; below, each gate that did not pass with the rung that answers for it."""
    rows = [cells(target) for target in targets]
    made = table("", *(row[0] for row in rows))
    for index, title in enumerate(COLUMNS[1:], start=1):
        made.add_row(title, *(_coloured(row[index]) for row in rows))
    out = console()
    out.print(made)
    out.print()
    for target in targets:
        for reason in reasons(target):
            out.print(f"[{COLOURS[target.verdict]}]{escape(target.name)}[/] {escape(reason)}")
        for note in target.notes:
            out.print(f"[dim]{escape(target.name)}: {escape(note)}[/]")


def _coloured(text: str) -> str:
    return f"[{COLOURS[text]}]{text}[/]" if text in COLOURS else escape(text)


def show_checks(checks: Iterable[Check]) -> None:
    """The doctor's answer: one line a check, its fix below it."""
    out = console()
    for check in checks:
        status = f"[{CHECK_COLOURS[check.status]}]{check.status:8}[/]"
        out.print(f"{status} {escape(f'{check.name:20}')} {escape(check.seen)}", soft_wrap=True)
        if check.fix:
            out.print(f"{'':29} [dim]fix:[/] {escape(check.fix)}", soft_wrap=True)


def show_inspection(found: Inspection, every: bool) -> None:
    """Tensor classes, embedding and head, metadata, and whether the manifest is kept; `every`: all tensors."""
    out = console()
    out.print(f"{found.path}: {found.format}, {figures.megabytes(found.size_bytes)}", markup=False, soft_wrap=True)
    groups = table("tensors", "count", "weights", "bits each", "size", "stored as")
    for group in found.groups:
        weights, bits = figures.count(group.weights), f"{group.bits_per_weight:.3g}"
        size = figures.stored(group.size_bytes)
        groups.add_row(group.role, str(group.tensors), weights, bits, size, escape(group.dtype))
    out.print(groups)
    out.print(f"embedding: {found.dtype_of('embedding')}; head: {found.dtype_of('head')}", markup=False)
    if every:
        for tensor in found.tensors:
            print(f"{tensor.name}  {tensor.dtype}  {' x '.join(map(str, tensor.shape))}  {tensor.size_bytes} bytes")
    facts = {"sha256": ", ".join(found.sha256.values()), **found.metadata, **(found.manifest or {})}
    for key, value in facts.items():
        out.print(f"{key}: {value}", markup=False, soft_wrap=True)
    for note in found.notes:
        out.print(note, markup=False, soft_wrap=True)
    _show_manifest(out, found)


def _show_manifest(out: Console, found: Inspection) -> None:
    if found.manifest is None:
        out.print("manifest: none beside it")
    elif found.intact:
        out.print("manifest: [green]kept[/], every file is as it was proven")
    else:
        out.print(f"manifest: [bold red]not kept[/], {escape('; '.join(found.changes))}", soft_wrap=True)


def show_verification(found: Verification) -> None:
    """What was compared, what differs, and what may explain it."""
    out = console()
    held = "no provenance" if found.embedded is None else f"{found.embedded} entries of provenance"
    out.print(f"{found.folder}: {found.files} files hashed, {held} in the model file", markup=False, soft_wrap=True)
    for name in found.rebuilt:
        out.print(f"rebuilt {name}: the same bytes", markup=False, soft_wrap=True)
    for line in found.differences:
        out.print(f"[bold red]differs[/] {escape(line)}", soft_wrap=True)
    for line in found.notes:
        out.print(f"[yellow]note:[/] {escape(line)}", soft_wrap=True)
    if not found.differences:
        out.print("[bold green]verified[/]: everything is as the manifest says")


SEVERITY_COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}


def show_checked(checked: Checked) -> None:
    """Each finding: rule, place, what was seen; why it matters and what to do. Then what could not be looked at."""
    out = console()
    for found in (*checked.findings, *checked.notes):
        colour = SEVERITY_COLOURS[found.severity]
        head = f"[{colour}]{found.severity}[/] {found.rule}  {escape(found.place)}: {escape(found.seen)}"
        out.print(head, soft_wrap=True)
        out.print(f"    {found.reason} ({found.reference})", markup=False, soft_wrap=True)
        out.print(f"    {found.fix}", markup=False, soft_wrap=True)
    for line in checked.not_checked:
        out.print(f"not checked {line}", markup=False, soft_wrap=True)
    errors, count = len(checked.errors), len(checked.findings)
    out.print(
        f"{checked.path}: {len(checked.rules)} rules of {checked.format} files, {errors} errors, "
        f"{count - errors} warnings, {len(checked.notes)} notes, {len(checked.not_checked)} rules not checked",
        markup=False,
        soft_wrap=True,
    )


def show_file_ladder(found: FileLadder) -> None:
    """What each rung loses; of each that is off, who answers for it and where it begins."""
    out = console()
    made = table("rung", "step", "from float", "other tokens", "off")
    for rung in found.rungs:
        off = "[bold red]off[/]" if rung.off else ""
        flips = "" if rung.flips is None else f"{rung.flips:.1%}"
        made.add_row(rung.rung, _nats(rung.step_kld), _nats(rung.mean_kld), flips, off)
    out.print(made)
    for rung in found.rungs:
        for line in _file_rung(rung):
            out.print(line, markup=False, soft_wrap=True)
    for note in found.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    names = [rung.rung for rung in found.off]
    said = f"off: {', '.join(names)}" if names else "no rung is off"
    out.print(
        f"{found.path}: {said} (more than {found.limit:g} nats a token over {found.tokens} tokens; "
        f"{found.runtime}, {found.processor})",
        markup=False,
        soft_wrap=True,
    )


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _file_rung(rung: FileRung) -> Iterable[str]:
    if rung.off:
        yield f"{rung.rung} is off: {WHO[rung.rung]}"
    if rung.place is not None:
        place, first = rung.place, "first" if rung.off else "furthest"
        behind = f"; before it {place.agrees} agrees" if place.agrees else ""
        yield (
            f"{rung.rung}: {first} in {place.layer}, {place.value}, by {place.error:.2g} of its size: {place.operator} "
            f"{place.node}{behind}"
        )
    if rung.unseen:
        yield f"{rung.rung}: the place cannot be seen: {rung.unseen}"
    if rung.note:
        yield f"{rung.rung}: {rung.note}"


FINDING_COLOURS = {"better": "green", "worse": "red"}


def show_comparison(found: Comparison) -> None:
    """One table a target: A, B, the change, and what it means; why it means nothing stands below."""
    out = console()
    out.print(f"A {found.a}\nB {found.b}", markup=False, soft_wrap=True)
    reasons = list(dict.fromkeys(d.note for target in found.targets for d in target.differences if d.note))
    for target in found.targets:
        made = table(target.name, "A", "B", "change", "B is")
        made.add_row("verdict", _coloured(target.verdict_a), _coloured(target.verdict_b), "", "")
        for difference in target.differences:
            made.add_row(*_difference(difference, reasons))
        out.print()
        out.print(made)
    out.print()
    for number, reason in enumerate(reasons, start=1):
        out.print(f"({number}) {reason}", markup=False, soft_wrap=True)
    for note in found.notes:
        out.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)


def show_race(found: Race) -> None:
    """Speed and loss of B against A: the ratio, its interval, what it means and the limit's verdict."""
    out = console()
    out.print(f"A {found.a}\nB {found.b}", markup=False, soft_wrap=True)
    made = table("", "A", "B", "B / A", "interval", "B is", f"≤ +{100 * found.max_rise:g} %")
    speed, loss = found.speed, found.loss
    a, b = figures.milliseconds(speed.a_ms), figures.milliseconds(speed.b_ms)
    made.add_row("a decoded token", a, b, *_judged(speed.judgement), _coloured(speed.verdict))
    made.add_row("mean KLD", "", "", *_judged(loss.judgement), _coloured(loss.verdict))
    out.print(made)
    out.print(f"{speed.rounds} rounds, {speed.disturbed} of them disturbed and left out", markup=False)
    for note in (speed.note, loss.note):
        if note:
            out.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    out.print(f"[{COLOURS[found.verdict]}]{found.verdict}[/]")


def _judged(found: Judgement | None) -> tuple[str, str, str]:
    if found is None:
        return figures.NONE, figures.NONE, figures.NONE
    return f"{found.ratio:.3f}", f"{found.low:.3f} to {found.high:.3f}", found.finding


def _difference(found: Difference, reasons: Sequence[str]) -> tuple[str, ...]:
    share = found.metric == "top1_agreement"  # the other names say their unit
    a, b = ((figures.percent if share else figures.number)(value) for value in (found.a, found.b))
    change = f"{100 * (found.b / found.a - 1):+.1f} %" if found.a and found.b is not None else ""
    colour = FINDING_COLOURS.get(found.finding)
    meaning = f"[{colour}]{found.finding}[/]" if colour else found.finding
    return found.metric, a, b, change, f"{meaning} ({reasons.index(found.note) + 1})" if found.note else meaning


def show_ab(found: AB) -> None:
    """A row for each pair of solved models, and in words what the difference means."""
    out = console()
    for name, settings, text in (
        ("A", found.settings_a, found.calibration_a),
        ("B", found.settings_b, found.calibration_b),
    ):
        out.print(f"{name} {' '.join(settings) or '(the recipe as it is)'}", markup=False, soft_wrap=True)
        out.print(f"  calibration: {text.origin if text else 'none'}", style="dim", markup=False, soft_wrap=True)
    made = table("mean KLD", "A", "B", "B − A", "95 % interval", "finding")
    for pair in found.pairs:
        between = (
            f"{figures.signed(pair.interval.low)} to {figures.signed(pair.interval.high)}" if pair.interval else ""
        )
        klds = (figures.number(pair.mean_kld_a), figures.number(pair.mean_kld_b), figures.signed(pair.difference))
        made.add_row(", ".join(pair.targets), *klds, between, pair.finding)
    out.print(made)
    where = f"on {found.tokens:,} scored tokens of {found.evaluation.origin}, in torch; the interval is over chunks"
    out.print(where, markup=False, soft_wrap=True)
    if any(pair.finding == "the noise is too large" for pair in found.pairs):
        out.print("to tell more, evaluate more: --set evaluation.count=…", markup=False, soft_wrap=True)


def show_sweep(found: Sweep) -> None:
    """A row a width; where the cliff is; the matrices that cost most there."""
    out = console()
    made = table("bits", "mean KLD", "× a bit", "top-1", "predicted KLD")
    for width in found.widths:
        factor = figures.number(exp(width.step)) if width.step is not None else figures.NONE
        klds = figures.number(width.mean_kld), factor, figures.percent(width.top1_agreement)
        made.add_row(str(width.bits), *klds, figures.number(width.predicted_kld))
    out.print(made)
    out.print(cliff_line(found), markup=False, soft_wrap=True)
    suspects = table("matrix", "predicted KLD", "measured cost")
    for suspect in found.suspects[:SUSPECTS]:
        suspects.add_row(suspect.name, figures.number(suspect.predicted), figures.signed(suspect.costs))
    out.print(suspects)
    confirmed = sum(suspect.costs is not None for suspect in found.suspects)
    whole = next(width.mean_kld for width in found.widths if width.bits == found.suspects_at)
    out.print(
        f"with {confirmed} of them kept at 8 bits the KLD is {figures.number(found.kept_kld)} instead of "
        f"{figures.number(whole)}, on {found.tokens:,} scored tokens",
        markup=False,
        soft_wrap=True,
    )


def cliff_line(found: Sweep) -> str:
    """Where the model collapses, in a sentence."""
    steepest = f"; the KLD grows most from {found.steepest[0]} to {found.steepest[1]} bits" if found.steepest else ""
    limit = figures.percent(found.limit)
    if found.cliff is None:
        return f"{found.model}: no cliff, top-1 agreement stays at {limit} or above{steepest}"
    return f"{found.model} collapses at {found.cliff} bits: top-1 agreement below {limit}{steepest}"


def talk(conversation: Conversation, prompt: str | None) -> None:
    """Answer one prompt; without one, every line of standard input, until its end."""
    if prompt is not None:
        _answer(conversation, prompt)
        return
    asks = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(asks).strip()
        except EOFError:
            return
        if text:
            _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    """Stream an answer; control characters that a model writes must not reach the terminal."""
    for piece in conversation.ask(text):
        sys.stdout.write("".join(c for c in piece if c.isprintable() or c in "\n\t"))
        sys.stdout.flush()
    sys.stdout.write("\n")
    if conversation.full:
        print("(the cache is full: the answer ends here)", file=sys.stderr)
