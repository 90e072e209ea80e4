"""What a device said of itself while a target was measured: (what, value), for report.md and report.html alike."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lilliput import figures
from lilliput.results import Conditions, Instructions, SensorFigures, TargetResult


def device_rows(target: TargetResult) -> list[tuple[str, str]]:
    """Nothing where nothing is known of the device."""
    rows: list[tuple[str, str]] = []
    if target.host is not None and target.host.device != "host":
        emulated = f", emulated by {target.host.emulated}" if target.host.emulated else ""
        rows.append(("device", f"{target.host.device}: {target.host.cpu}, {target.host.cores} cores{emulated}"))
    if target.instructions is not None:
        rows.append(("instructions", _instructions(target.instructions)))
    return [*rows, *_conditions(target.conditions)] if target.conditions else rows


def _instructions(found: Instructions) -> str:
    dots = found.dot_per_token + found.mmla_per_token
    share = figures.percent(dots / found.per_token)
    return f"{figures.count(round(found.per_token))} a decoded token, {share} of them dot products"


def _conditions(found: Conditions) -> list[tuple[str, str]]:
    by_kind = {
        kind: [s for s in found.sensors if s.kind == kind] for kind in ("temperature_c", "frequency_mhz", "power_w")
    }
    rows = []
    if by_kind["temperature_c"]:
        rows.append(("temperature", _hottest(by_kind["temperature_c"])))
    if by_kind["frequency_mhz"]:
        lowest = min(sensor.lowest for sensor in by_kind["frequency_mhz"])
        mean = statistics.fmean(sensor.mean for sensor in by_kind["frequency_mhz"])
        rows.append(("frequency", f"{figures.number(mean)} MHz on average, {figures.number(lowest)} at least"))
    if by_kind["power_w"]:
        watts = sum(sensor.mean for sensor in by_kind["power_w"])
        joules = (
            "" if found.joules_per_token is None else f", {figures.number(found.joules_per_token)} J a decoded token"
        )
        rows.append(("power", f"{figures.number(watts)} W on average{joules} ({found.power_source})"))
    if "throttling" not in found.absent:
        rows.append(("throttling", found.throttled or "none"))
    absent = [f"{kind.partition('_')[0]}: {why}" for kind, why in found.absent.items()]
    return [*rows, ("not shown by the device", "; ".join(absent))] if absent else rows


def _hottest(zones: Sequence[SensorFigures]) -> str:
    zone = max(zones, key=lambda z: z.highest)
    return f"{zone.name} {zone.before:.1f} → {zone.after:.1f} °C, {zone.highest:.1f} at most"
