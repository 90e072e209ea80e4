"""Two runs side by side: what differs, and whether the difference means anything.

    size                 is exact: any difference is one
    speed and memory     mean something only on one machine at rest. The noise is what the host probe saw in
                         either run (slowest over fastest, less 1), at least NOISE_FLOOR
    loss                 means something only on one evaluation text; where the two 95 % intervals of the mean
                         overlap, the difference is "not significant" (conservative: the texts are the same, so a
                         paired test would see more)

A run is given by its folder or report.json, or by a target's folder with its manifest.json. Targets are
matched by name; two single targets are compared whatever their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lilliput import manifest, report
from lilliput.errors import ArtifactError
from lilliput.results import Accuracy, Host, Latency, Record, TargetResult, Verdict

NOISE_FLOOR = 0.03  # of a figure: timings of two runs of the same file differ by as much

Finding = Literal["same", "better", "worse", "not significant", "not comparable"]


class Difference(Record):
    """One figure of both. `finding` is B's, seen from A; `note` says why it is not significant or comparable."""

    metric: str
    a: float | None
    b: float | None
    finding: Finding
    note: str = ""


class TargetComparison(Record):
    name: str
    verdict_a: Verdict
    verdict_b: Verdict
    differences: tuple[Difference, ...]


class Comparison(Record):
    """`notes` name what the two runs do not share, and targets that only one has."""

    a: str
    b: str
    targets: tuple[TargetComparison, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """One side: its targets, where they were measured, and on which text."""

    label: str
    host: Host
    source_sha256: str
    evaluation_sha256: str
    targets: dict[str, TargetResult]


def compare(a: Path, b: Path) -> Comparison:
    """Raises ArtifactError where a side is no run, or the two have no target in common."""
    left, right = side(a), side(b)
    if len(left.targets) == len(right.targets) == 1:
        pairs = list(zip(left.targets, right.targets, strict=True))
    else:
        pairs = [(name, name) for name in left.targets if name in right.targets]
    if not pairs:
        raise ArtifactError(
            f"{a} and {b} have no target in common: {', '.join(left.targets)} against {', '.join(right.targets)}"
        )
    targets = tuple(_target(left, right, one, other) for one, other in pairs)
    return Comparison(a=left.label, b=right.label, targets=targets, notes=tuple(_notes(left, right, pairs)))


def side(path: Path) -> Side:
    """Read a run or a target."""
    if (path / manifest.NAME).is_file():
        found = manifest.read(path)
        return Side(
            str(path), found.host, found.source.sha256, found.evaluation.sha256, {found.result.name: found.result}
        )
    run = report.load(path)
    targets = {target.name: target for target in run.targets}
    return Side(str(path), run.host, run.source.sha256, run.evaluation.sha256, targets)


def _notes(a: Side, b: Side, pairs: list[tuple[str, str]]) -> Iterator[str]:
    if not _same_machine(a.host, b.host):
        yield f"different machines ({a.host.cpu}, {b.host.cpu}): speed and memory do not compare"
    if a.source_sha256 != b.source_sha256:
        yield "different source models: losses are from different float models"
    if a.evaluation_sha256 != b.evaluation_sha256:
        yield "different evaluation texts: losses do not compare"
    for label, names, matched in (
        (a.label, a.targets, {x for x, _ in pairs}),
        (b.label, b.targets, {y for _, y in pairs}),
    ):
        if only := sorted(set(names) - matched):
            yield f"only in {label}: {', '.join(only)}"


def _same_machine(a: Host, b: Host) -> bool:
    return (a.device, a.cpu, a.cores, a.memory_bytes) == (b.device, b.cpu, b.cores, b.memory_bytes)


def _target(a: Side, b: Side, name_a: str, name_b: str) -> TargetComparison:
    left, right = a.targets[name_a], b.targets[name_b]
    differences = (
        _exact("size_mb", left.artifact.size_bytes / 1e6, right.artifact.size_bytes / 1e6),
        *_speeds(left, right, _same_machine(a.host, b.host)),
        *_losses(left.accuracy, right.accuracy, a.evaluation_sha256 == b.evaluation_sha256),
    )
    name = name_a if name_a == name_b else f"{name_a} → {name_b}"
    return TargetComparison(name=name, verdict_a=left.verdict, verdict_b=right.verdict, differences=differences)


def _exact(metric: str, a: float, b: float) -> Difference:
    return Difference(metric=metric, a=a, b=b, finding="same" if a == b else "better" if b < a else "worse")


SPEEDS = {  # metric → whether more is better
    "decode_tokens_per_s": True,
    "prefill_tokens_per_s": True,
    "ttft_ms": False,
    "load_ms": False,
    "decode_ms_p90": False,
}


def _speeds(a: TargetResult, b: TargetResult, same_machine: bool) -> Iterator[Difference]:
    noise = max(_noise(a.latency), _noise(b.latency))
    unstable = (a.latency and a.latency.unstable) or (b.latency and b.latency.unstable)
    trouble = "" if same_machine else "different machines"
    if unstable and not trouble:
        trouble = f"a machine was not at rest: {unstable}"
    for metric, more_is_better in SPEEDS.items():
        values = [getattr(latency, metric) if latency else None for latency in (a.latency, b.latency)]
        yield _noisy(metric, values[0], values[1], more_is_better, noise, trouble)
    memory = [m.peak_rss_bytes / 1e6 if m else None for m in (a.memory, b.memory)]
    yield _noisy("peak_rss_mb", memory[0], memory[1], False, NOISE_FLOOR, "" if same_machine else trouble)


def _noise(latency: Latency | None) -> float:
    """The spread of the host probe, as a share."""
    if latency is None or not latency.probe_ms:
        return NOISE_FLOOR
    return max(NOISE_FLOOR, max(latency.probe_ms) / min(latency.probe_ms) - 1)


def _noisy(
    metric: str, a: float | None, b: float | None, more_is_better: bool, noise: float, trouble: str
) -> Difference:
    if a is None or b is None:
        return Difference(metric=metric, a=a, b=b, finding="not comparable", note="not measured")
    if trouble:
        return Difference(metric=metric, a=a, b=b, finding="not comparable", note=trouble)
    if a <= 0 or abs(b / a - 1) <= noise:
        return Difference(metric=metric, a=a, b=b, finding="not significant", note=f"within noise, {100 * noise:.0f} %")
    return Difference(metric=metric, a=a, b=b, finding="better" if (b > a) == more_is_better else "worse")


def _losses(a: Accuracy | None, b: Accuracy | None, same_text: bool) -> Iterator[Difference]:
    for metric, more_is_better in (("mean_kld", False), ("top1_agreement", True), ("perplexity", False)):
        if a is None or b is None:
            x, y = (getattr(accuracy, metric) if accuracy else None for accuracy in (a, b))
            yield Difference(metric=metric, a=x, b=y, finding="not comparable", note="not measured")
        else:
            yield _loss(metric, a, b, more_is_better, same_text and a.tokens == b.tokens)


def _loss(metric: str, a: Accuracy, b: Accuracy, more_is_better: bool, same_text: bool) -> Difference:
    x, y = float(getattr(a, metric)), float(getattr(b, metric))
    finding: Finding = "better" if (y > x) == more_is_better else "worse"
    note = ""
    if not same_text:
        finding, note = "not comparable", "different evaluation texts"
    elif x == y:
        finding = "same"
    elif _overlap(a, b, metric):
        finding, note = "not significant", "the 95 % intervals overlap"
    return Difference(metric=metric, a=x, b=y, finding=finding, note=note)


def _overlap(a: Accuracy, b: Accuracy, metric: str) -> bool:
    """Whether the intervals overlap; a figure without an interval cannot be told apart."""
    name = "perplexity_ratio_interval" if metric == "perplexity" else f"{metric}_interval"
    one, other = getattr(a, name), getattr(b, name)
    return one is None or other is None or (one.low <= other.high and other.low <= one.high)
