"""Sensors of boards from trees with the layouts of their kernels; what a board lacks is said, and is never a figure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lilliput.results import Conditions
from targets import sensors
from targets.sensors import Recorder, absent, find

PMIC = """\
   3V7_WL_SW_A current(0)=0.08000000A
   3V3_SYS_A current(1)=0.05000000A
  VDD_CORE_A current(7)=2.00000000A
   3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.90000000V
     EXT5V_V volt(24)=5.15000000V
"""
TEGRASTATS = (
    "11-25-2026 03:00:00 RAM 2452/7620MB (lfb 4x4MB) CPU [12%@1510,8%@1510] cpu@46.5C tj@47C "
    "VDD_IN 4996mW/4996mW VDD_CPU_GPU_CV 1198mW/1198mW VDD_SOC 1440mW/1440mW"
)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def nothing(command: Sequence[str]) -> str | None:
    return None


def values(root: Path, run: sensors.Run = nothing) -> dict[tuple[str, str], float | None]:
    return {(s.kind, s.name): s.read() for s in find(root, run)}


CPU = "sys/devices/system/cpu"
PI = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48312",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "3",
    f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "2400000",
    f"{CPU}/cpu3/cpufreq/scaling_cur_freq": "1500000",
    "sys/class/hwmon/hwmon0/name": "cpu_thermal",
    "sys/class/hwmon/hwmon0/temp1_input": "48312",
}


def test_a_raspberry_pi_5(tmp_path: Path) -> None:
    said = {("vcgencmd", "get_throttled"): "throttled=0x50004\n", ("vcgencmd", "pmic_read_adc"): PMIC}
    found = values(tree(tmp_path, PI), lambda command: said.get(tuple(command)))
    assert found == {
        ("temperature_c", "cpu-thermal"): pytest.approx(48.312),
        ("frequency_mhz", "cpu0"): 2400.0,
        ("frequency_mhz", "cpu3"): 1500.0,
        ("throttling", "vcgencmd"): 4.0,  # what holds now, not what has occurred
        ("power_w", "PMIC rails"): pytest.approx(0.08 * 3.7 + 0.05 * 3.3 + 2.0 * 0.9),
    }


def test_a_raspberry_pi_4_has_no_power(tmp_path: Path) -> None:
    root = tree(tmp_path, PI)
    said = {("vcgencmd", "get_throttled"): "throttled=0x0\n"}
    found = find(root, lambda command: said.get(tuple(command)))
    assert "power_w" not in {sensor.kind for sensor in found}
    assert absent(found, root) == {"power_w": sensors.LOOKED_FOR["power_w"]}


def test_a_jetsons_input_is_its_power_and_its_other_rails_are_behind_it(tmp_path: Path) -> None:
    at = "sys/class/hwmon/hwmon1"
    rails = {
        f"{at}/name": "ina3221",
        f"{at}/in1_label": "VDD_IN",
        f"{at}/in1_input": "5056",
        f"{at}/curr1_input": "984",
        f"{at}/in2_label": "VDD_CPU_GPU_CV",
        f"{at}/in2_input": "5048",
        f"{at}/curr2_input": "240",
        f"{at}/in7_label": "sum of shunt voltages",
        f"{at}/curr4_input": "1224",
    }
    assert values(tree(tmp_path, rails)) == {("power_w", "VDD_IN"): pytest.approx(5.056 * 0.984)}


def test_rails_without_an_input_are_added(tmp_path: Path) -> None:
    at = "sys/class/hwmon/hwmon0"
    rails = {
        f"{at}/in1_input": "5000",
        f"{at}/curr1_input": "400",
        f"{at}/in2_input": "900",
        f"{at}/curr2_input": "1000",
    }
    recorder = Recorder(find(tree(tmp_path, rails), nothing), {})
    assert recorded(recorder).joules_per_token == pytest.approx((2.0 + 0.9) * 0.2 / 10)


def test_tegrastats_where_hwmon_is_hidden(tmp_path: Path) -> None:
    found = values(tmp_path, lambda command: TEGRASTATS if "tegrastats" in command[-1] else None)
    assert found == {("power_w", "VDD_IN"): pytest.approx(4.996)}


def test_a_pcs_packages_and_not_their_parts(tmp_path: Path) -> None:
    zone, part = tmp_path / "sys/class/powercap/intel-rapl:0", tmp_path / "sys/class/powercap/intel-rapl:0:0"
    tree(zone, {"name": "package-0", "energy_uj": "999000", "max_energy_range_uj": "1000000"})
    tree(part, {"name": "core", "energy_uj": "1"})
    (sensor,) = find(tmp_path, nothing)
    assert (sensor.name, sensor.source) == ("package-0", "/sys/class/powercap/intel-rapl:0/energy_uj")
    sensor.read()
    start = time.monotonic()
    time.sleep(0.1)
    (zone / "energy_uj").write_text("499000\n")  # it wrapped: half a joule
    watts = sensor.read()
    assert watts is not None
    assert 0.5 / (time.monotonic() - start + 0.05) < watts < 0.5 / 0.1


def test_a_phone_on_battery_and_on_a_charger(tmp_path: Path) -> None:
    at = "sys/class/power_supply/battery"
    tree(tmp_path, {f"{at}/status": "Discharging", f"{at}/current_now": "-650000", f"{at}/voltage_now": "3900000"})
    assert values(tmp_path) == {("power_w", "battery"): pytest.approx(0.65 * 3.9)}
    tree(tmp_path, {f"{at}/status": "Charging"})
    assert values(tmp_path) == {}


def test_what_cannot_be_read_is_absent_with_the_reason(tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    tree(zone, {"name": "package-0"})
    (zone / "energy_uj").mkdir()  # like a file that only root may read
    found = find(tmp_path, nothing)
    assert found == []
    assert absent(found, tmp_path) == sensors.LOOKED_FOR | {
        "power_w": "powercap is there, its energy_uj is not readable by this user"
    }


def test_nothing_at_all_is_four_absences_and_no_zero(tmp_path: Path) -> None:
    recorder = Recorder(find(tmp_path, nothing), absent([], tmp_path))
    conditions = recorded(recorder)
    assert (conditions.sensors, conditions.joules_per_token, conditions.power_source) == ((), None, None)
    assert set(conditions.absent) == set(sensors.KINDS)


def recorded(recorder: Recorder, meanwhile: object = None) -> Conditions:
    """Ten tokens in 0.2 s."""
    recorder.start()
    start = time.perf_counter()
    if callable(meanwhile):
        meanwhile()
    recorder.decoded(start, start + 0.2, 10)
    return recorder.stop()


def test_before_during_and_after(tmp_path: Path) -> None:
    root = tree(tmp_path, PI | {"sys/class/thermal/cooling_device1/type": "cpufreq-cpu0"})
    tree(root, {"sys/class/thermal/cooling_device1/cur_state": "0"})
    temperature, state = root / "sys/class/thermal/thermal_zone0/temp", "sys/class/thermal/cooling_device1/cur_state"

    def heat() -> None:
        temperature.write_text("81000\n")
        tree(root, {state: "2"})
        time.sleep(0.2)
        temperature.write_text("60000\n")
        tree(root, {state: "0"})

    found = find(root, nothing)
    conditions = recorded(Recorder(found, absent(found, root), period_s=0.02), heat)
    (zone,) = [s for s in conditions.sensors if s.kind == "temperature_c"]
    assert (zone.before, zone.highest, zone.after) == (pytest.approx(48.312), 81.0, 60.0)
    assert conditions.throttled == "cooling device cpufreq-cpu0 was at state 2"
    assert conditions.samples >= 4
    assert Conditions.model_validate_json(conditions.model_dump_json()) == conditions


def test_energy_is_the_integral_of_power_over_the_decoding() -> None:
    watts = iter([2.0, 4.0, 4.0])
    sensor = sensors.Sensor("power_w", "made up", "nowhere", lambda: next(watts))
    recorder = Recorder([sensor], {}, period_s=100.0)
    recorder.start()
    (first, _), *_ = recorder._samples
    time.sleep(0.05)
    recorder._sample()
    second = recorder._samples[1][0]
    recorder.decoded(first, second, 5)
    recorder.decoded(second, second + 0.01, 5)
    expected = (second - first) * 3.0 + 0.01 * 4.0
    assert recorder.stop().joules_per_token == pytest.approx(expected / 10, rel=1e-6)
