"""Size × loss × speed in one drawing: down and to the left is better, a larger disc decodes faster.

Targets are filled discs with a number; what was tried on the way (rungs of an escalation) are rings, which have no
speed. Axes span the figures that there are, with a margin, so that close ones come apart: they do not begin at 0.
Lengths are in the drawing's own units, WIDTH by HEIGHT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lilliput import figures
from lilliput.report import Report
from lilliput.results import Verdict

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 30  # room for the axes' words
LARGEST, SMALLEST, RING = 16.0, 9.0, 4.0  # radii; a number fits into the smallest disc
MARGIN = 0.18  # of an axis, on both sides


@dataclass(frozen=True)
class Dot:
    """`radius` is a target's speed; `verdict` colours it."""

    label: str  # a target's number; "" for a ring
    name: str
    text: str
    x: float
    y: float
    radius: float
    verdict: Verdict


@dataclass(frozen=True)
class Plot:
    """Dots, and the words at the ends of the axes."""

    dots: tuple[Dot, ...]
    sizes: tuple[str, str]
    losses: tuple[str, str]


@dataclass(frozen=True)
class _Point:
    name: str
    size_bytes: int
    kld: float
    speed: float | None
    verdict: Verdict


def plot(report: Report) -> Plot | None:
    """None where fewer than two have both figures: nothing would be compared."""
    points = list(_points(report))
    if len(points) < 2:
        return None
    sizes, losses = [float(p.size_bytes) for p in points], [p.kld for p in points]
    fastest = max((p.speed for p in points if p.speed), default=1.0)
    numbers = iter(range(1, len(points) + 1))
    dots = [_dot(p, "" if p.speed is None else str(next(numbers)), sizes, losses, fastest) for p in points]
    ends = (figures.megabytes(round(min(sizes))), figures.megabytes(round(max(sizes))))
    return Plot(tuple(dots), ends, (figures.number(min(losses)), figures.number(max(losses))))


def _points(report: Report) -> Iterator[_Point]:
    """Targets, then what was tried and is none of them."""
    shipped = set()
    for target in report.targets:
        if target.accuracy is not None:
            speed = target.latency.decode_tokens_per_s if target.latency else None
            size, kld = target.artifact.size_bytes, target.accuracy.mean_kld
            shipped.add((target.name, size, kld))
            yield _Point(target.name, size, kld, speed, target.verdict)
    for rung in report.escalation:
        for tried in rung.targets:
            if tried.mean_kld is not None and (tried.name, tried.size_bytes, tried.mean_kld) not in shipped:
                yield _Point(f"{tried.name}, {rung.rung}", tried.size_bytes, tried.mean_kld, None, tried.verdict)


def _dot(point: _Point, label: str, sizes: list[float], losses: list[float], fastest: float) -> Dot:
    loss = f"{figures.megabytes(point.size_bytes)}, KLD {figures.number(point.kld)}"
    share = None if point.speed is None else point.speed / fastest
    return Dot(
        label=label,
        name=point.name,
        text=loss if point.speed is None else f"{loss}, {figures.number(point.speed)} tok/s",
        x=round(_place(point.size_bytes, sizes, LEFT, WIDTH - RIGHT), 1),
        y=round(_place(point.kld, losses, HEIGHT - BOTTOM, TOP), 1),
        radius=RING if share is None else round(max(SMALLEST, LARGEST * share**0.5), 1),
        verdict=point.verdict,
    )


def _place(value: float, values: list[float], start: float, end: float) -> float:
    """From the least at `start` to the most at `end`, both a margin inside; the middle where all are alike."""
    low, high = min(values), max(values)
    share = 0.5 if high == low else MARGIN + (1 - 2 * MARGIN) * (value - low) / (high - low)
    return start + share * (end - start)
