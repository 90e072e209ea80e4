"""Sensors of a device without Python, by its shell: read before and after its runner works, not while it does.

    temperature_c   `dumpsys thermalservice`: Temperature{mValue=45.2, mType=0, mName=CPU0, mStatus=0}, from its HAL;
                    /sys/class/thermal/thermal_zone* where the shell may read it; `dumpsys battery` (tenths of °C)
    frequency_mhz   /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq (kHz)
    throttling      `dumpsys thermalservice`: Thermal Status, 0 to 6 (android.os.PowerManager.THERMAL_STATUS_*)

Power is not among them: on USB a phone charges, and what its battery's gauge shows is the charger's current.
"""

from __future__ import annotations

import re

from lilliput.results import Conditions, SensorFigures, SensorKind

SCRIPT = """
for z in /sys/class/thermal/thermal_zone*; do echo "zone $(cat $z/temp) $(cat $z/type)"; done 2>/dev/null
for c in /sys/devices/system/cpu/cpu[0-9]*; do echo "cpu $(cat $c/cpufreq/scaling_cur_freq) ${c##*/}"; done 2>/dev/null
{ dumpsys thermalservice; dumpsys battery; } 2>/dev/null
true
"""
THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
ABSENT: dict[SensorKind, str] = {
    "temperature_c": "its shell shows no thermal zone, no thermalservice and no battery",
    "frequency_mhz": "its shell shows no cpufreq",
    "power_w": "not measured without Python on the device: a phone on USB charges",
    "throttling": "its shell has no thermalservice",
}

Values = dict[tuple[SensorKind, str, str], float]  # (kind, name, source) → value


def parse(text: str) -> Values:
    """The values in the output of SCRIPT."""
    found: Values = {}
    for value, name in re.findall(r"^zone (-?\d+) (.+)$", text, re.MULTILINE):
        found["temperature_c", name.strip(), "/sys/class/thermal"] = int(value) / 1000
    for value, name in re.findall(r"^cpu (\d+) (.+)$", text, re.MULTILINE):
        found["frequency_mhz", name.strip(), "cpufreq/scaling_cur_freq"] = int(value) / 1000
    _, _, current = text.rpartition("Current temperatures from HAL")
    for value, name in re.findall(r"Temperature\{mValue=(-?[\d.]+), mType=\d+, mName=([^,}]+)", current):
        found["temperature_c", name, "dumpsys thermalservice"] = float(value)
    if status := re.search(r"Thermal Status: (\d+)", text):
        found["throttling", "thermal status", "dumpsys thermalservice"] = float(status[1])
    if battery := re.search(r"^\s+temperature: (-?\d+)", text, re.MULTILINE):
        found["temperature_c", "battery", "dumpsys battery"] = int(battery[1]) / 10
    return found


def conditions(before: str, after: str) -> Conditions:
    """From SCRIPT's output before and after the work; a sensor counts where both have it."""
    first, last = parse(before), parse(after)
    sensors = tuple(_figures(key, first[key], last[key]) for key in first if key in last)
    seen = {sensor.kind for sensor in sensors}
    worst = max((int(s.highest) for s in sensors if s.kind == "throttling"), default=0)
    return Conditions(
        sensors=sensors,
        samples=2,
        absent={kind: why for kind, why in ABSENT.items() if kind not in seen},
        throttled=f"thermal status {THERMAL_STATUS[min(worst, 6)]}" if worst else None,
    )


def _figures(key: tuple[SensorKind, str, str], before: float, after: float) -> SensorFigures:
    kind, name, source = key
    low, high = sorted((before, after))
    return SensorFigures(
        kind=kind, name=name, source=source, before=before, lowest=low, mean=(low + high) / 2, highest=high, after=after
    )
