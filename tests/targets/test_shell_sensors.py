"""Sensors of a phone from the output of its own commands, before and after; what it does not show is said."""

from __future__ import annotations

import pytest

from lilliput.results import Conditions
from targets import shell_sensors

BEFORE = """\
zone 41200 BIG
zone -40000 disabled
cpu 2910000 cpu8
IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
	Temperature{mValue=99.0, mType=0, mName=CPU0, mStatus=0}
Current temperatures from HAL:
	Temperature{mValue=45.2, mType=0, mName=CPU0, mStatus=0}
	Temperature{mValue=33.1, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=0, mType=2, mName=thermal-cpufreq-0}
Current Battery Service state:
  AC powered: false
  USB powered: true
  level: 85
  voltage: 4165
  temperature: 271
"""
AFTER = BEFORE.replace("45.2", "71.5").replace("Status: 0", "Status: 2").replace("2910000", "1800000")


def found(conditions: Conditions, name: str) -> tuple[float, float, float]:
    (sensor,) = (s for s in conditions.sensors if s.name == name)
    return sensor.before, sensor.highest, sensor.after


def test_a_phones_temperatures_frequencies_and_throttling() -> None:
    conditions = shell_sensors.conditions(BEFORE, AFTER)
    assert found(conditions, "CPU0") == (45.2, 71.5, 71.5), "not the cached one"
    assert found(conditions, "BIG")[0] == pytest.approx(41.2)
    assert found(conditions, "battery") == (27.1, 27.1, 27.1)
    assert found(conditions, "cpu8") == (2910.0, 2910.0, 1800.0)
    assert conditions.throttled == "thermal status moderate"
    assert conditions.samples == 2
    assert conditions.absent == {"power_w": shell_sensors.ABSENT["power_w"]}
    assert Conditions.model_validate_json(conditions.model_dump_json()) == conditions


def test_a_shell_that_shows_nothing_has_no_zeros() -> None:
    conditions = shell_sensors.conditions("", "")
    assert (conditions.sensors, conditions.throttled) == ((), None)
    assert conditions.absent == shell_sensors.ABSENT


def test_a_sensor_that_is_gone_afterwards_is_no_figure() -> None:
    conditions = shell_sensors.conditions("zone 41200 BIG\n", "cpu 1800000 cpu8\n")
    assert conditions.sensors == ()
