"""The results that this folder fills. They are defined in lilliput.results, below the report that shows them."""

from __future__ import annotations

from lilliput.results import (
    Accuracy,
    ArtifactFigures,
    DepthLatency,
    Gate,
    GateResult,
    Generation,
    Host,
    Interval,
    Latency,
    Memory,
    Metric,
    Rung,
    TargetResult,
    Verdict,
    worst,
)

__all__ = [
    "Accuracy",
    "ArtifactFigures",
    "DepthLatency",
    "Gate",
    "GateResult",
    "Generation",
    "Host",
    "Interval",
    "Latency",
    "Memory",
    "Metric",
    "Rung",
    "TargetResult",
    "Verdict",
    "worst",
]
