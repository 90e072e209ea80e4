"""report.html: one page that a release manager reads in a minute, on a desk or on a phone.

It is a file without neighbours: style and drawings are in it, it asks nothing of a network, and prints. This
module turns figures into words and lengths (shares of the widest bar, in percent); the template
report.html.j2 only places them. All text is escaped by jinja2.

A ladder is drawn as a waterfall: each rung's bar begins where the one before it ends, on a scale that all
targets share, so that bars compare across targets; a gate on mean_kld is the dashed line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from lilliput import figures
from lilliput.ladder import Step, costliest, steps
from lilliput.report import Coverage, Report
from lilliput.report_device import device_rows
from lilliput.report_plot import HEIGHT, WIDTH, plot
from lilliput.report_table import (
    ALLOCATED,
    SLICES,
    TRIED_COLUMNS,
    allocated_rows,
    budget_line,
    confidence_line,
    headline,
    reasons,
    requantized,
    shown,
    slice_rows,
    solve_steps,
    tried,
    weak_line,
)
from lilliput.results import TargetResult

HAIRLINE = 0.4  # the narrowest bar, in percent of the width: below it nothing would be seen
HEADROOM = 1.06  # the scale ends this much beyond the longest bar or the gate


@dataclass(frozen=True)
class Cell:
    """A figure of the summary; `share` (0 to 100) is its bar's length, None: no bar."""

    label: str
    text: str
    share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """One rung of a waterfall. start and width are in percent of the drawing's width."""

    rung: str
    cause: str
    added: str
    total: str
    start: float
    width: float
    kind: str  # "loss", "gain", "zero", or "none" where it was not measured
    note: str
    costliest: bool


@dataclass(frozen=True)
class TargetView:
    """One target as the page shows it. gate_at: where the mean_kld gate stands, in percent."""

    result: TargetResult
    cells: tuple[Cell, ...]
    bars: tuple[Bar, ...]
    gate_at: float | None
    reasons: list[str]
    sentence: str


def html(report: Report) -> str:
    """The whole page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    scored = max((t.accuracy.tokens for t in report.targets if t.accuracy), default=0)
    return environment.from_string(source).render(
        report=report,
        headline=headline(report),
        targets=_views(report.targets),
        scored=scored,
        plot=plot(report),
        plot_width=WIDTH,
        plot_height=HEIGHT,
        tried_columns=TRIED_COLUMNS,
        tried=tried(report.escalation),
        allocated=ALLOCATED,
        allocations=[(budget_line(found), allocated_rows(found)) for found in report.allocations],
        facts=_facts(report),
        solve_steps=solve_steps(report),
        slices=SLICES,
        slice_rows=slice_rows,
        confidence_line=confidence_line,
        weak_line=weak_line,
        requantized=requantized(report),
        figures=figures,
    )


def _views(targets: Sequence[TargetResult]) -> list[TargetView]:
    scale = _scale(targets)
    return [
        TargetView(t, _cells(t, targets), _bars(t, scale), _gate_at(t, scale), reasons(t), _sentence(t))
        for t in targets
    ]


def _scale(targets: Sequence[TargetResult]) -> float:
    """The divergence that the full width stands for, in nats."""
    seen = [rung.mean_kld for t in targets for rung in t.ladder if rung.mean_kld is not None]
    limits = [limit for t in targets if (limit := _kld_limit(t)) is not None]
    return HEADROOM * max([*seen, *limits, 1e-6])


def _kld_limit(target: TargetResult) -> float | None:
    return next((g.limit for g in target.gates if g.name == "mean_kld" and g.kind == "max"), None)


def _gate_at(target: TargetResult, scale: float) -> float | None:
    limit = _kld_limit(target)
    return None if limit is None else round(100 * limit / scale, 3)


def _bars(target: TargetResult, scale: float) -> tuple[Bar, ...]:
    worst = costliest(target.ladder)
    return tuple(_bar(step, scale, step == worst) for step in steps(target.ladder) if step.rung != "float")


def _bar(step: Step, scale: float, is_costliest: bool) -> Bar:
    added = step.added or 0.0
    low = min(step.before, step.before + added)
    width = max(100 * abs(added) / scale, HAIRLINE)
    kind = "none" if step.total is None else "zero" if added == 0 else "gain" if added < 0 else "loss"
    return Bar(
        step.rung, step.cause, figures.signed(step.added), figures.number(step.total), round(100 * low / scale, 3),
        round(width, 3), kind, step.note, is_costliest,
    )  # fmt: skip


def _sentence(target: TargetResult) -> str:
    """Where the loss is, in words."""
    worst = costliest(target.ladder)
    final = next((rung.mean_kld for rung in reversed(target.ladder) if rung.mean_kld is not None), None)
    if worst is None or not final or worst.added is None:
        return "No rung adds loss, or none was measured."
    return f"{round(100 * min(worst.added / final, 1))} % of the loss is {worst.cause}."


def _cells(target: TargetResult, targets: Sequence[TargetResult]) -> tuple[Cell, ...]:
    latency, memory, accuracy = target.latency, target.memory, target.accuracy
    size = max(t.artifact.size_bytes for t in targets)
    decode = max((t.latency.decode_tokens_per_s for t in targets if t.latency), default=0.0)
    kld = max((t.accuracy.mean_kld for t in targets if t.accuracy), default=0.0)
    speed = figures.number(latency.decode_tokens_per_s if latency else None)
    tail = f"p90 {figures.milliseconds(latency.decode_ms_p90)}" if latency else ""
    return (
        Cell("size", figures.megabytes(target.artifact.size_bytes), _share(target.artifact.size_bytes, size)),
        Cell("decode tok/s", speed, _share(latency.decode_tokens_per_s if latency else None, decode), tail),
        Cell("KLD, nats", figures.number(accuracy.mean_kld if accuracy else None),
             _share(accuracy.mean_kld if accuracy else None, kld), _interval(target)),
        Cell("prefill tok/s", figures.number(latency.prefill_tokens_per_s if latency else None)),
        Cell("first token", figures.milliseconds(latency.ttft_ms if latency else None)),
        Cell("load", figures.milliseconds(latency.load_ms if latency else None)),
        Cell("peak RSS", figures.megabytes(memory.peak_rss_bytes if memory else None)),
        Cell("top-1", figures.percent(accuracy.top1_agreement if accuracy else None)),
        Cell("perplexity", figures.number(accuracy.perplexity if accuracy else None), None,
             f"float {figures.number(accuracy.reference_perplexity)}" if accuracy else ""),
    )  # fmt: skip


def _interval(target: TargetResult) -> str:
    interval = target.accuracy.mean_kld_interval if target.accuracy else None
    return f"{figures.number(interval.low)} to {figures.number(interval.high)}" if interval else ""


def _share(value: float | None, most: float) -> float | None:
    return None if value is None or most <= 0 else round(100 * value / most, 2)


def _facts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Provenance: titled groups of (what, value)."""
    source, host, recipe = report.source, report.host, report.recipe
    model = [
        ("name", f"{source.name} ({source.family}, {figures.count(source.parameters)} parameters)"),
        ("from", source.origin),
        ("licence", source.license or "not stated by the source"),
        ("sha256", source.sha256),
    ]
    run = [
        ("recipe", recipe.name),
        ("sha256", recipe.sha256),
        ("seed", str(recipe.seed)),
        ("context", f"{recipe.context} positions, prefill in chunks of {recipe.prefill}"),
        ("when", report.created or "not recorded"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    machine = [
        ("processor", f"{host.cpu}, {host.architecture}, {host.cores} cores ({host.logical_cores} logical)"),
        ("instructions", " ".join(host.isa) or "not known"),
        ("memory", f"{figures.number(host.memory_bytes / 2**30)} GiB"),
        ("system", f"{host.system}, Python {host.python}"),
    ]
    devices = [(f"Device of {target.name}", rows) for target in report.targets if (rows := device_rows(target))]
    return [("Model", model), ("Run", run), ("Texts", _texts(report)), ("Measured on", machine), *devices]


def _texts(report: Report) -> list[tuple[str, str]]:
    texts = [("evaluation", report.evaluation), ("calibration", report.calibration)]
    found = [(use, f"{text.origin}, {text.tokens:,} tokens, sha256 {text.sha256}") for use, text in texts if text]
    if report.calibration is None:
        found.append(("calibration", "none: no rule needed statistics"))
    return [*found, *_covered(report.coverage)] if report.coverage else found


def _covered(coverage: Coverage) -> list[tuple[str, str]]:
    """Each slice's share of the tokens that calibrate and that judge."""
    rows = [
        (s.name, f"{figures.percent(s.calibration)} of calibration, {figures.percent(s.evaluation)} of evaluation")
        for s in shown(coverage)
    ]
    return [*rows, ("in common", f"{figures.percent(coverage.shared)} of the evaluation's runs of tokens")]
