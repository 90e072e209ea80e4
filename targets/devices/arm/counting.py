"""Instructions that a guest ran between two marks, by class, counted by a plugin of qemu-user (count.c).

The plugin is compiled with this machine's C compiler at first use and kept in the cache. Its API changed with QEMU 9:
counting needs 7.2 to 8.2, which the distributions of 2023 and 2024 have.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from lilliput.errors import MissingError
from lilliput.results import Instructions

SOURCE = Path(__file__).with_name("count.c")
VERSIONS = ((7, 2), (8, 2))


def why_not(version: tuple[int, int]) -> str | None:
    """Why a version of QEMU cannot count; None where it can."""
    if VERSIONS[0] <= version <= VERSIONS[1]:
        return None
    return f"QEMU is {version[0]}.{version[1]}, counting needs 7.2 to 8.2"


def plugin(cache: Path) -> Path:
    """The compiled plugin. Raises MissingError without a C compiler."""
    built = cache / f"count-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if built.exists():
        return built
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MissingError("no C compiler: counting instructions needs one (apt-get install gcc)")
    cache.mkdir(parents=True, exist_ok=True)
    partial = built.with_suffix(f".{hashlib.sha256(str(cache).encode()).hexdigest()[:6]}.partial")
    command = [compiler, "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(partial), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise MissingError(f"count.c does not compile ({last}): mend the C compiler {compiler}")
    partial.replace(built)
    return built


def read(path: Path, tokens: int) -> Instructions | None:
    """The counts up to mark 2, of the stretch that began at mark 1; None where it did not come so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split() for line in lines if re.match(r"2( \d+){4}$", line)]
    if not found:
        return None
    total, dot, mmla, fma = (int(word) / tokens for word in found[-1][1:])
    return Instructions(tokens=tokens, per_token=total, dot_per_token=dot, mmla_per_token=mmla, fma_per_token=fma)
