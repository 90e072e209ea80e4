"""This machine: what it is, and whether it has the memory and disk that work asks for.

Cores and memory are those that this process may use: an affinity mask or a control group can give it less
than the machine has. Vector extensions are listed under the names that /proc/cpuinfo gives them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil

from lilliput.errors import MissingError
from lilliput.results import Host

CPUINFO = Path("/proc/cpuinfo")
DEVICE_TREE = Path("/proc/device-tree/model")
CGROUP = Path("/sys/fs/cgroup")

# Extensions that kernels of the runtimes choose by.
ISA = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16"),  # x86-64
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),  # Arm
)


def describe(device: str) -> Host:
    """The description that manifests and reports hold."""
    fields = _cpuinfo()
    return Host(
        device=device,
        cpu=_cpu_name(fields),
        architecture=platform.machine(),
        isa=extensions(fields),
        cores=usable_cores(),
        logical_cores=os.cpu_count() or 1,
        memory_bytes=memory_limit_bytes(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor; empty where the system has no such file."""
    return cpuinfo_fields(CPUINFO.read_text()) if CPUINFO.exists() else {}


def cpuinfo_fields(text: str) -> dict[str, str]:
    """Fields of the first processor in the text of /proc/cpuinfo."""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def extensions(fields: dict[str, str]) -> tuple[str, ...]:
    """Those of ISA that a processor's fields name."""
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return tuple(name for name in ISA if name in flags)


def _cpu_name(fields: dict[str, str]) -> str:
    if "model name" in fields:
        return fields["model name"]
    if DEVICE_TREE.exists():  # boards: "Raspberry Pi 5 Model B Rev 1.0"
        return DEVICE_TREE.read_text().rstrip("\0\n")
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Physical cores, or fewer where the affinity mask or the control group's quota says so."""
    counts = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    quota = _cgroup_words("cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        counts.append(int(quota[0]) // int(quota[1]))
    return max(1, min(counts))


def memory_limit_bytes() -> int:
    """The machine's memory, or the control group's limit where that is less."""
    total = int(psutil.virtual_memory().total)
    limit = _cgroup_words("memory.max")
    return min(total, int(limit[0])) if limit and limit[0] != "max" else total


def available_memory_bytes() -> int:
    """What can be had without swapping: of the machine, and of the control group (its file cache can be dropped)."""
    available = int(psutil.virtual_memory().available)
    limit = _cgroup_words("memory.max")
    if not limit or limit[0] == "max":
        return available
    words = _cgroup_words("memory.stat")
    cached = int(words[words.index("inactive_file") + 1]) if "inactive_file" in words else 0
    used = int(_cgroup_words("memory.current")[0]) - cached
    return max(0, min(available, int(limit[0]) - used))


def _cgroup_words(name: str) -> list[str]:
    """The words of a control file of this process's group (version 2); none where there is no such file."""
    try:
        return (CGROUP / name).read_text().split()
    except OSError:
        return []


def check_memory(needed_bytes: int, what: str) -> None:
    """Raise MissingError (exit 4) where `what` needs more memory than is available."""
    available = available_memory_bytes()
    if needed_bytes > available:
        raise MissingError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available: "
            "end other programs, or choose a smaller model"
        )


def check_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise MissingError (exit 4) where `what` needs more disk than `folder`'s file system has free."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise MissingError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: "
            "free some, or choose another folder"
        )
