"""What a report says of a device: its sensors, what it lacks, and what an emulator counted."""

from __future__ import annotations

import sample_report

from lilliput.report_device import device_rows
from lilliput.report_table import markdown
from lilliput.results import Conditions, Host, Instructions, SensorFigures, SensorKind

PI = Host(
    device="ssh://pi", cpu="Raspberry Pi 5 Model B", architecture="aarch64", isa=("asimd",), cores=4, logical_cores=4,
    memory_bytes=8 * 2**30, system="Linux", python="3.11.2",
)  # fmt: skip


def sensor(kind: SensorKind, name: str, before: float, lowest: float, highest: float, after: float) -> SensorFigures:
    mean = (before + after) / 2
    return SensorFigures(
        kind=kind,
        name=name,
        source=f"/sys/{name}",
        before=before,
        lowest=lowest,
        mean=mean,
        highest=highest,
        after=after,
    )


CONDITIONS = Conditions(
    sensors=(
        sensor("temperature_c", "cpu-thermal", 48.3, 48.3, 63.0, 61.2),
        sensor("frequency_mhz", "cpu0", 2400, 1500, 2400, 2400),
        sensor("power_w", "PMIC rails", 3.0, 3.0, 6.1, 5.0),
    ),
    samples=9,
    absent={"throttling": "no vcgencmd"},
    joules_per_token=0.0251,
    power_source="vcgencmd pmic_read_adc",
)


def test_sensors_stand_beside_the_speed_and_what_is_absent_is_said() -> None:
    target = sample_report.report().targets[0].model_copy(update={"host": PI, "conditions": CONDITIONS})
    assert device_rows(target) == [
        ("device", "ssh://pi: Raspberry Pi 5 Model B, 4 cores"),
        ("temperature", "cpu-thermal 48.3 → 61.2 °C, 63.0 at most"),
        ("frequency", "2,400 MHz on average, 1,500 at least"),
        ("power", "4.00 W on average, 0.0251 J a decoded token (vcgencmd pmic_read_adc)"),
        ("not shown by the device", "throttling: no vcgencmd"),
    ]


def test_throttling_is_named() -> None:
    throttled = CONDITIONS.model_copy(update={"absent": {}, "throttled": "vcgencmd says under-voltage"})
    target = sample_report.report().targets[0].model_copy(update={"conditions": throttled})
    assert ("throttling", "vcgencmd says under-voltage") in device_rows(target)


def test_an_emulator_and_its_counts() -> None:
    counts = Instructions(tokens=4, per_token=48_000_000, dot_per_token=8_400_000, mmla_per_token=0, fma_per_token=1)
    host = PI.model_copy(update={"device": "arm://cortex-a76", "cpu": "cortex-a76", "emulated": "QEMU 7.2"})
    report = sample_report.report()
    target = report.targets[0].model_copy(update={"host": host, "instructions": counts})
    assert device_rows(target) == [
        ("device", "arm://cortex-a76: cortex-a76, 4 cores, emulated by QEMU 7.2"),
        ("instructions", "48.0 M a decoded token, 17.5 % of them dot products"),
    ]
    text = markdown(report.model_copy(update={"targets": (target,)}))
    assert f"| {target.name} | instructions | 48.0 M a decoded token, 17.5 % of them dot products |" in text
