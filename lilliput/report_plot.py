"""Size × loss × speed in one drawing: down and to the left is better, a larger disc decodes faster.

Targets are filled discs with a number; what was tried on the way (rungs of an escalation) are rings, which have no
speed. Axes do not begin at 0: they span the figures that there are, with a margin, so that close ones come apart; but
at least LEAST_SPAN of the largest, so that what hardly differs does not look far apart.
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
LEAST_SPAN = 0.1


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
class Tick:
    """A figure at its place on an axis."""

    text: str
    at: float


@dataclass(frozen=True)
class Plot:
    """Dots, and two ticks on each axis."""

    dots: tuple[Dot, ...]
    sizes: tuple[Tick, Tick]
    losses: tuple[Tick, Tick]


@dataclass(frozen=True)
class _Axis:
    """From the figure `low` to `high`, a margin within `start` and `end` of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = MARGIN + (1 - 2 * MARGIN) * (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


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
    across = _axis([float(p.size_bytes) for p in points], LEFT, WIDTH - RIGHT)
    up = _axis([p.kld for p in points], HEIGHT - BOTTOM, TOP)
    fastest = max((p.speed for p in points if p.speed), default=1.0)
    numbers = iter(range(1, len(points) + 1))
    dots = [_dot(p, "" if p.speed is None else str(next(numbers)), across, up, fastest) for p in points]
    sizes = (Tick(figures.megabytes(round(v)), across.at(v)) for v in (across.low, across.high))
    losses = (Tick(figures.number(v), up.at(v)) for v in (up.low, up.high))
    return Plot(tuple(dots), (next(sizes), next(sizes)), (next(losses), next(losses)))


def _axis(values: list[float], start: float, end: float) -> _Axis:
    """Over the values, widened about their middle where they are close, never below 0."""
    low, high = min(values), max(values)
    span = max(high - low, LEAST_SPAN * high) or 1.0
    low = max(0.0, (low + high - span) / 2)
    return _Axis(low, max(high, low + span), start, end)


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


def _dot(point: _Point, label: str, across: _Axis, up: _Axis, fastest: float) -> Dot:
    loss = f"{figures.megabytes(point.size_bytes)}, KLD {figures.number(point.kld)}"
    share = None if point.speed is None else point.speed / fastest
    return Dot(
        label=label,
        name=point.name,
        text=loss if point.speed is None else f"{loss}, {figures.number(point.speed)} tok/s",
        x=across.at(point.size_bytes),
        y=up.at(point.kld),
        radius=RING if share is None else round(max(SMALLEST, LARGEST * share**0.5), 1),
        verdict=point.verdict,
    )
