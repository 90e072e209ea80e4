"""Is this machine fit? Python, packages, memory, disk, cores, instruction sets, and whether each runtime opens.

A check is "ok", "warning" (something is worse than it could be) or "missing" (something that is needed is
not there); each that is not ok carries its fix. What is needed:

    the base packages              always
    packages of an extra           where one of its runtimes is asked for; at least one runtime must open
    versions of constraints.txt    a differing version is a warning: it is not what Lilliput was tested with

Runtimes are opened in child processes: a package whose native code crashes must not take the doctor with it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lilliput.listing import ROOT, entries

Status = Literal["ok", "warning", "missing"]

GIB = 2**30
WANTED_MEMORY_BYTES = 5 * GIB  # what the default recipe is held to
WANTED_DISK_BYTES = 4 * GIB  # checkpoints, twins of the exact rung and three artifacts of a 135M model
OPEN_TIMEOUT_S = 120
REFERENCE = "torch_cpu"  # opens no exported file: it does not count as a runtime to prove one on
EXTRAS = ("onnx", "litert", "llamacpp")  # extras that install runtimes

# instruction sets that the runtimes' kernels look for, and what they buy
INSTRUCTION_SETS = {
    "x86_64": ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"),
    "aarch64": ("asimd", "asimdhp", "asimddp", "i8mm", "sve"),
}
NEEDED_INSTRUCTION_SETS = {"x86_64": ("avx2", "fma", "f16c"), "aarch64": ("asimd",)}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer. `fix` is empty where nothing is to be done."""

    name: str
    status: Status
    seen: str
    fix: str = ""


def examine(folder: Path, runtimes: Sequence[str] | None = None) -> list[Check]:
    """All checks; `folder` is where runs will write. `runtimes` names those that are needed, None: any one."""
    return [
        _python(),
        *_packages(),
        _memory(),
        _disk(folder),
        _cores(),
        *_instruction_sets(),
        *_runtimes(runtimes),
    ]


def _python() -> Check:
    """Which Python; one that is too old would not have come as far as this."""
    seen = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Check("python", "ok", seen)


def constraints() -> dict[str, str]:
    """Package → version that Lilliput is tested with; empty where the file is not shipped."""
    for path in (Path(__file__).parent / "constraints.txt", ROOT / "constraints.txt"):
        if path.is_file():
            lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
            return {_canonical(n): v for n, _, v in (line.partition("==") for line in lines if "==" in line)}
    return {}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, tuple[str, ...]]:
    """Extra ("" for the base) → names of the packages that lilliput's own metadata asks for."""
    grouped: dict[str, list[str]] = {"": []}
    for line in importlib.metadata.requires("lilliput") or []:
        name, _, marker = line.partition(";")
        match = re.match(r"[A-Za-z0-9._-]+", name.strip())
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if match and _canonical(match[0]) != "lilliput":
            grouped.setdefault(extra[1] if extra else "", []).append(_canonical(match[0]))
    return {extra: tuple(names) for extra, names in grouped.items()}


def _packages() -> Iterator[Check]:
    """One check per extra: the base is needed, of extras at least one (see _runtimes)."""
    if _version("lilliput") is None:
        where = f"lilliput runs from {ROOT} without being installed, so its requirements are not known"
        yield Check("packages", "missing", where, f'pip install --editable "{ROOT}[all]"')
        return
    wanted, tested = requirements(), constraints()
    for extra in ("", *EXTRAS, "data"):
        names = wanted.get(extra, ())
        seen = {name: _version(name) for name in names}
        yield _package_check(extra, seen, tested)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_check(extra: str, seen: dict[str, str | None], tested: dict[str, str]) -> Check:
    title = f"packages [{extra}]" if extra else "packages"
    install = f'pip install "lilliput[{extra}]"' if extra else "pip install lilliput"
    absent = sorted(name for name, version in seen.items() if version is None)
    if absent and not extra:
        return Check(title, "missing", f"not installed: {', '.join(absent)}", install)
    if absent:
        return Check(title, "warning", f"not installed: {', '.join(absent)}", install)
    other = [f"{n} {v} (tested: {tested[n]})" for n, v in seen.items() if n in tested and v and not _same(v, tested[n])]
    if other:
        pins = " ".join(f"{name}=={tested[name]}" for name, v in seen.items() if name in tested and v != tested[name])
        return Check(title, "warning", ", ".join(other), f"pip install {pins}")
    return Check(title, "ok", ", ".join(f"{name} {version}" for name, version in sorted(seen.items())))


def _same(seen: str, tested: str) -> bool:
    """Equal up to a local build tag, as of torch's `+cpu`."""
    return seen.partition("+")[0] == tested.partition("+")[0]


def _memory() -> Check:
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    limit = _cgroup_limit_bytes()
    free = min(free, limit) if limit is not None else free
    seen = f"{free / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    if limit and limit < total:
        seen += f", container limit {limit / GIB:.1f} GiB"
    if free < WANTED_MEMORY_BYTES:
        return Check(
            "memory", "warning", seen, f"the default recipe is held to {WANTED_MEMORY_BYTES // GIB} GiB: free some"
        )
    return Check("memory", "ok", seen)


def _cgroup_limit_bytes() -> int | None:
    """The container's memory limit (cgroup v2, then v1), if there is one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None


def _disk(folder: Path) -> Check:
    home = folder.resolve()
    place = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(place).free
    seen = f"{free / GIB:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Check("disk", "missing", f"{place} is not writable", "choose another folder with --out")
    if free < WANTED_DISK_BYTES:
        return Check(
            "disk", "warning", seen, f"the default recipe takes up to {WANTED_DISK_BYTES // GIB} GiB: free some"
        )
    return Check("disk", "ok", seen)


def _cores() -> Check:
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False)
    return Check("cores", "ok", f"{usable} usable, {physical or 'unknown'} physical")


def _instruction_sets() -> Iterator[Check]:
    """What /proc/cpuinfo reports; elsewhere the question stays open, and is said so."""
    machine, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    known = INSTRUCTION_SETS.get(machine)
    if known is None or not cpuinfo.is_file():
        yield Check("instructions", "warning", f"not known for {platform.system()} {machine}", "")
        return
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    absent = [flag for flag in NEEDED_INSTRUCTION_SETS[machine] if flag not in flags]
    seen = " ".join(flag for flag in known if flag in flags) or "none of " + " ".join(known)
    if absent:
        fix = "speed will be far below the reports'; use a newer processor"
        yield Check("instructions", "warning", f"{seen}; without {' '.join(absent)}", fix)
    else:
        yield Check("instructions", "ok", seen)


def _runtimes(needed: Sequence[str] | None) -> Iterator[Check]:
    opened = 0
    for entry in entries("runtimes"):
        versions, trouble = open_runtime(entry.name)
        opened += trouble is None and entry.name != REFERENCE
        if trouble is None:
            yield Check(f"runtime {entry.name}", "ok", ", ".join(f"{k} {v}" for k, v in sorted(versions.items())))
        else:
            status: Status = "missing" if needed is not None and entry.name in needed else "warning"
            yield Check(f"runtime {entry.name}", status, trouble, _runtime_fix(entry.name))
    if not opened:
        yield Check("runtimes", "missing", "none opens, so nothing can be proven", 'pip install "lilliput[all]"')


OPEN = """
import importlib, json, sys
runtime = importlib.import_module(f"targets.runtimes.{sys.argv[1]}").Runtime()
for package in runtime.packages:
    importlib.import_module(package)
print(json.dumps(runtime.versions()))
"""


def open_runtime(name: str) -> tuple[dict[str, str], str | None]:
    """Import a runtime with all that it needs, in a child: (its versions, what went wrong or None)."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", OPEN, name], capture_output=True, text=True, timeout=OPEN_TIMEOUT_S, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {}, f"did not answer within {OPEN_TIMEOUT_S} s"
    if child.returncode < 0:
        return {}, f"crashed with signal {-child.returncode} while it was imported"
    if child.returncode:
        return {}, (child.stderr.strip().splitlines() or ["failed without a word"])[-1]
    versions: dict[str, str] = json.loads(child.stdout.strip().splitlines()[-1])
    return versions, None


def _runtime_fix(name: str) -> str:
    """The extra that installs a runtime, read from its source."""
    folder = ROOT / "targets" / "runtimes"
    source = folder / f"{name}.py" if (folder / f"{name}.py").is_file() else folder / name / "__init__.py"
    match = (
        re.search(r"extra[^=\n]*=\s*\(?[\"'](\w+)", source.read_text(encoding="utf-8")) if source.is_file() else None
    )
    return f'pip install "lilliput[{match[1] if match else "all"}]"'


def runtimes_of(recipe: str) -> tuple[str, ...]:
    """The runtimes that a recipe's targets name."""
    from lilliput.recipe import load

    return tuple(sorted({target.runtime.name for target in load(recipe).targets}))


def as_json(checks: Sequence[Check]) -> str:
    """The checks for programs."""
    return json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False)
