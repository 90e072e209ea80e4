"""A board's own sensors, read around and during a measurement of speed.

    kind            read from (Linux; kernel documentation under Documentation/ABI, hwmon and power)
    temperature_c   /sys/class/thermal/thermal_zone*/temp (m°C, `type` is its name); else hwmon's temp*_input (m°C)
    frequency_mhz   /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq (kHz)
    throttling      /sys/class/thermal/cooling_device*/cur_state of processors (0: not held back),
                    `vcgencmd get_throttled` of Raspberry Pis (the bits that hold now; PI_BITS)
    power_w         the first of these that can be read, as each counts the board or the package as a whole:
                    powercap's intel-rapl:N/energy_uj (µJ, wraps at max_energy_range_uj)
                    hwmon's in*_input × curr*_input (mV × mA) of the rail VDD_IN, else of all rails (INA3221 of Jetsons)
                    `vcgencmd pmic_read_adc` of a Raspberry Pi 5: the sum over its rails of volt × ampere,
                    without the converters' losses
                    `tegrastats`: VDD_IN in mW
                    hwmon's power1_input (µW)
                    power_supply's power_now (µW), else current_now × voltage_now (µA × µV)

The tree's root and the commands are given, so that any board's layout can be read on any machine.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lilliput.results import Conditions, SensorFigures, SensorKind

PERIOD_S = 0.5  # a command takes a few ms of it
COMMAND_S = 2.0
KINDS: tuple[SensorKind, ...] = ("temperature_c", "frequency_mhz", "power_w", "throttling")
LOOKED_FOR: dict[SensorKind, str] = {
    "temperature_c": "no thermal zone and no hwmon temperature",
    "frequency_mhz": "no cpufreq",
    "power_w": "no powercap, hwmon or battery power, no vcgencmd, no tegrastats",
    "throttling": "no cooling device of a processor, no vcgencmd",
}
PI_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
COOLING = re.compile(r"cpu|processor", re.IGNORECASE)  # of cooling devices: not fans, not GPUs
RAIL = re.compile(r"(\w+)_([AV])\s+\w+\(\d+\)=([\d.]+)[AV]")

Run = Callable[[Sequence[str]], str | None]  # a command's output; None where it is not there or fails


@dataclass(frozen=True)
class Sensor:
    """`read` gives the value now, None where it cannot be had."""

    kind: SensorKind
    name: str
    source: str
    read: Callable[[], float | None]


def run_command(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def find(root: Path = Path("/"), run: Run = run_command) -> list[Sensor]:
    """The sensors that can be read now."""
    found = [*_temperatures(root), *_frequencies(root), *_throttling(root, run), *_first_power(root, run)]
    return [sensor for sensor in found if sensor.read() is not None]


def absent(sensors: Sequence[Sensor], root: Path = Path("/")) -> dict[SensorKind, str]:
    """The kinds that none of the sensors is of, with the reason."""
    seen = {sensor.kind for sensor in sensors}
    reasons = {kind: why for kind, why in LOOKED_FOR.items() if kind not in seen}
    if "power_w" in reasons and any(root.glob("sys/class/powercap/*/energy_uj")):
        reasons["power_w"] = "powercap is there, its energy_uj is not readable by this user"
    return reasons


def number(path: Path, scale: float) -> Callable[[], float | None]:
    """Reads a file's number, times `scale`."""

    def read() -> float | None:
        try:
            return float(path.read_text()) * scale
        except (OSError, ValueError):
            return None

    return read


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _shown(path: Path, root: Path) -> str:
    return f"/{path.relative_to(root)}"


def _temperatures(root: Path) -> Iterator[Sensor]:
    zones = sorted(root.glob("sys/class/thermal/thermal_zone*"))
    for zone in zones:
        file = zone / "temp"
        yield Sensor("temperature_c", _text(zone / "type") or zone.name, _shown(file, root), number(file, 1e-3))
    for file in () if zones else sorted(root.glob("sys/class/hwmon/hwmon*/temp*_input")):
        name = _text(file.with_name(file.name.replace("_input", "_label"))) or _text(file.with_name("name"))
        yield Sensor("temperature_c", name or file.name, _shown(file, root), number(file, 1e-3))


def _frequencies(root: Path) -> Iterator[Sensor]:
    for file in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")):
        yield Sensor("frequency_mhz", file.parents[1].name, _shown(file, root), number(file, 1e-3))


def _throttling(root: Path, run: Run) -> Iterator[Sensor]:
    for device in sorted(root.glob("sys/class/thermal/cooling_device*")):
        if COOLING.search(_text(device / "type")):
            file = device / "cur_state"
            yield Sensor("throttling", _text(device / "type"), _shown(file, root), number(file, 1))

    def bits() -> float | None:
        found = re.search(r"throttled=0x([0-9a-fA-F]+)", run(("vcgencmd", "get_throttled")) or "")
        return float(int(found[1], 16) & 0xF) if found else None

    yield Sensor("throttling", "vcgencmd", "vcgencmd get_throttled", bits)


def _first_power(root: Path, run: Run) -> list[Sensor]:
    """Every way to know the power counts it as a whole, so that one is enough."""
    for way in (_powercap, _rails, _pmic, _tegrastats, _hwmon_power, _battery):
        sensors = [sensor for sensor in way(root, run) if sensor.read() is not None]
        if sensors:
            return sensors
    return []


def _powercap(root: Path, run: Run) -> Iterator[Sensor]:
    """One sensor a package; domains within it (intel-rapl:0:0) are parts of it."""
    for zone in sorted(root.glob("sys/class/powercap/*rapl:[0-9]")):
        if _text(zone / "name").startswith("package"):
            source = _shown(zone / "energy_uj", root)
            yield Sensor("power_w", _text(zone / "name"), source, EnergyCounter(zone))


@dataclass
class EnergyCounter:
    """Mean power since the last reading, from a counter of energy; since a moment ago at the first."""

    zone: Path
    _last: tuple[float, float] | None = field(default=None, init=False)

    def __call__(self) -> float | None:
        energy_uj = number(self.zone / "energy_uj", 1)()
        if energy_uj is None:
            return None
        if self._last is None:
            self._last = (time.monotonic(), energy_uj)
            time.sleep(0.02)
            return self()
        (then, before), now = self._last, time.monotonic()
        self._last = (now, energy_uj)
        if energy_uj < before:
            energy_uj += number(self.zone / "max_energy_range_uj", 1)() or 0.0
        return (energy_uj - before) * 1e-6 / max(now - then, 1e-9)


def _rails(root: Path, run: Run) -> Iterator[Sensor]:
    """VDD_IN is a Jetson's whole input; its other rails are behind it."""
    rails = []
    for current in sorted(root.glob("sys/class/hwmon/hwmon*/curr[0-9]*_input")):
        channel = re.sub(r"\D", "", current.name)
        volts, label = current.with_name(f"in{channel}_input"), _text(current.with_name(f"in{channel}_label"))
        if volts.exists():
            rails.append(Sensor("power_w", label or current.parent.name, _shown(current, root), _watts(volts, current)))
    whole = [rail for rail in rails if rail.name == "VDD_IN"]
    yield from whole or rails


def _watts(volts: Path, amperes: Path, scale: float = 1e-6) -> Callable[[], float | None]:
    """mV × mA → W; another scale for other units."""
    left, right = number(volts, 1), number(amperes, scale)

    def read() -> float | None:
        u, i = left(), right()
        return None if u is None or i is None else abs(u * i)

    return read


def _pmic(root: Path, run: Run) -> Iterator[Sensor]:
    def read() -> float | None:
        values: dict[str, dict[str, float]] = {}
        for rail, unit, value in RAIL.findall(run(("vcgencmd", "pmic_read_adc")) or ""):
            values.setdefault(rail, {})[unit] = float(value)
        pairs = [v for v in values.values() if len(v) == 2]
        return sum(v["A"] * v["V"] for v in pairs) if pairs else None

    yield Sensor("power_w", "PMIC rails", "vcgencmd pmic_read_adc", read)


def _tegrastats(root: Path, run: Run) -> Iterator[Sensor]:
    def read() -> float | None:
        script = "tegrastats --interval 100 | head -n 1"
        found = re.search(r"VDD_IN (\d+)mW", run(("sh", "-c", script)) or "") if _there("tegrastats") else None
        return float(found[1]) * 1e-3 if found else None

    def _there(command: str) -> bool:
        return run is not run_command or shutil.which(command) is not None

    yield Sensor("power_w", "VDD_IN", "tegrastats", read)


def _hwmon_power(root: Path, run: Run) -> Iterator[Sensor]:
    for file in sorted(root.glob("sys/class/hwmon/hwmon*/power1_input")):
        yield Sensor(
            "power_w", _text(file.with_name("name")) or file.parent.name, _shown(file, root), number(file, 1e-6)
        )


def _battery(root: Path, run: Run) -> Iterator[Sensor]:
    for supply in sorted(root.glob("sys/class/power_supply/*")):
        if _text(supply / "status") not in ("Discharging", "Not charging"):
            continue  # else it measures the charger
        if (supply / "power_now").exists():
            file = supply / "power_now"
            yield Sensor("power_w", supply.name, _shown(file, root), number(file, 1e-6))
        else:
            file = supply / "current_now"
            yield Sensor("power_w", supply.name, _shown(file, root), _watts(supply / "voltage_now", file, 1e-12))


class Recorder:
    """Samples sensors in a thread of its own, from `start` to `stop`; what is timed runs beside it."""

    def __init__(self, sensors: Sequence[Sensor], missing: dict[SensorKind, str], period_s: float = PERIOD_S) -> None:
        self._sensors, self._missing, self._period_s = sensors, missing, period_s
        self._samples: list[tuple[float, list[float | None]]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._windows: list[tuple[float, float, int]] = []

    def start(self) -> None:
        self._sample()
        if self._sensors:
            self._thread.start()

    def decoded(self, start: float, end: float, tokens: int) -> None:
        """Note that `tokens` were decoded between two times of time.perf_counter()."""
        self._windows.append((start, end, tokens))

    def stop(self) -> Conditions:
        self._done.set()
        if self._sensors:
            self._thread.join()
        self._sample()
        power = [sensor for sensor in self._sensors if sensor.kind == "power_w"]
        return Conditions(
            sensors=tuple(figures for i in range(len(self._sensors)) if (figures := self._figures(i)) is not None),
            samples=len(self._samples),
            absent=self._missing,
            throttled=self._throttled(),
            joules_per_token=self._joules_per_token(),
            power_source=", ".join(sensor.source for sensor in power) or None,
        )

    def _work(self) -> None:
        while not self._done.wait(self._period_s):
            self._sample()

    def _sample(self) -> None:
        self._samples.append((time.perf_counter(), [sensor.read() for sensor in self._sensors]))

    def _figures(self, index: int) -> SensorFigures | None:
        values = [row[index] for _, row in self._samples]
        known = [value for value in values if value is not None]
        if not known:
            return None
        sensor = self._sensors[index]
        return SensorFigures(
            kind=sensor.kind,
            name=sensor.name,
            source=sensor.source,
            before=known[0],
            lowest=min(known),
            mean=statistics.fmean(known),
            highest=max(known),
            after=known[-1],
        )

    def _throttled(self) -> str | None:
        reasons = []
        for i, sensor in enumerate(self._sensors):
            states = [int(row[i] or 0) for _, row in self._samples if sensor.kind == "throttling"]
            if not any(states):
                continue
            if sensor.name == "vcgencmd":
                bits = [text for bit, text in PI_BITS.items() if any(state >> bit & 1 for state in states)]
                reasons.append(f"vcgencmd says {', '.join(bits)}")
            else:
                reasons.append(f"cooling device {sensor.name} was at state {max(states)}")
        return "; ".join(reasons) or None

    def _joules_per_token(self) -> float | None:
        """Energy of the windows, by trapezoids of the power's samples; None where there are not two of them."""
        times, watts = self._power()
        if len(times) < 2 or not self._windows:
            return None
        joules = sum(_integral(times, watts, start, end) for start, end, _ in self._windows)
        return joules / sum(tokens for _, _, tokens in self._windows)

    def _power(self) -> tuple[list[float], list[float]]:
        indices = [i for i, sensor in enumerate(self._sensors) if sensor.kind == "power_w"]
        rows = [(at, [row[i] for i in indices]) for at, row in self._samples]
        whole = [(at, sum(v for v in row if v is not None)) for at, row in rows if row and None not in row]
        return [at for at, _ in whole], [value for _, value in whole]


def _integral(times: list[float], values: list[float], start: float, end: float) -> float:
    """∫ of the samples' polygon; beyond the first and last sample it is level."""
    import numpy as np

    inner = [at for at in times if start < at < end]
    points = [start, *inner, end]
    return float(np.trapezoid(np.interp(points, times, values), points))
