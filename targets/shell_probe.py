"""What a device without Python says of itself, by its shell and Linux's own files (busybox or toybox will do)."""

from __future__ import annotations

import re

from lilliput.errors import MeasurementError
from lilliput.results import Host
from targets import machine
from targets.probe import Probe

MARK = "--lilliput--"
COMMANDS = (
    "cat /proc/cpuinfo",
    "cat /proc/meminfo",
    "df -k {folder}",
    "uname -srm",
    "getprop ro.product.model 2>/dev/null; true",
)
SCRIPT = f"; echo {MARK}; ".join(COMMANDS)


def parse(text: str, device: str) -> Probe:
    """The probe from the output of SCRIPT. Raises MeasurementError where a part of it is not as Linux has it."""
    parts = [part.strip() for part in text.replace("\r\n", "\n").split(MARK)]
    memory = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    if len(parts) != len(COMMANDS) or not {"MemTotal", "MemAvailable"} <= set(memory):
        raise MeasurementError(f"{device}: its shell does not show /proc as Linux does: give the device a Python")
    cpuinfo, _, disk, system, model = parts
    columns = disk.splitlines()[-1].split()
    name, release, architecture = (*system.split(), "", "", "")[:3]
    fields = machine.cpuinfo_fields(cpuinfo)
    cores = len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)) or 1
    host = Host(
        device=device,
        cpu=model or fields.get("Hardware") or fields.get("model name") or architecture,
        architecture=architecture,
        isa=machine.extensions(fields),
        cores=cores,
        logical_cores=cores,
        memory_bytes=memory["MemTotal"],
        system=f"{name} {release}",
        python="none",
    )
    free = int(columns[-3]) * 1024 if len(columns) >= 6 else 0
    return Probe(host=host, free_memory_bytes=memory["MemAvailable"], free_disk_bytes=free)
