"""A Debian arm64 root for qemu-user, built once in the cache without root's rights, and a board's own view of it.

    apt-get (private state, architecture arm64, an empty dpkg status) resolves and downloads Python and the C++ runtime
    dpkg-deb unpacks each package
    pip downloads the aarch64 wheels of the runtimes, in the versions that are installed here, by name

llama.cpp has no aarch64 wheel under llama-cpp-python; its C API is taken from that of xllamacpp, whose parameter
structures in XLLAMACPP's version are those that llama-cpp-python 0.3.36 binds (a test compares the defaults). The wheel
leaves out functions that it does not need itself: their bindings are placeholders (SITE). It is compiled for Armv8.0:
it has no dot product on any processor, and the gate `dot_product` says so.

A board's prefix links to the root and has what depends on the processor: /proc/cpuinfo and the topology in /sys, from
which onnxruntime chooses kernels. qemu-user looks there before it looks at this machine's own files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from lilliput.errors import MissingError
from targets.boards import Board, Emulation

DEBIAN = ("python3", "libstdc++6", "libgomp1")
WHEELS = (
    *("numpy", "pydantic", "pydantic_core", "psutil", "onnxruntime", "ai-edge-litert"),
    *("typing_extensions", "annotated-types", "typing-inspection", "flatbuffers", "protobuf", "ml_dtypes"),
    *("Jinja2", "MarkupSafe", "diskcache"),  # llama-cpp-python imports them
)
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "manylinux_2_17_aarch64")
XLLAMACPP = "2026.9.11063"
LINKED = ("bin", "etc", "lib", "opt", "usr", "var")
SITE = '''\
"""Functions that this build of llama.cpp leaves out get placeholders: their bindings can be made, not called."""
import ctypes

_found = ctypes.CDLL.__getattr__


def _lenient(library, name):
    try:
        return _found(library, name)
    except AttributeError:
        if not name.startswith(("llama_", "ggml_")):
            raise
        return ctypes.CFUNCTYPE(None)(lambda: None)


ctypes.CDLL.__getattr__ = _lenient
'''


def ready(cache: Path) -> Path:
    """The root of these versions, built where it is not there: about 300 MB and a minute. Raises MissingError."""
    versions = _versions()
    root = cache / f"root-{_key(versions)}"
    if not root.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            if not root.exists():
                with tempfile.TemporaryDirectory(prefix=".root-", dir=cache) as name:
                    building = Path(name) / "root"
                    _debian(building, Path(name))
                    _wheels(building, versions)
                    _llama_cpp(building, Path(name))
                    building.rename(root)
    return root


def prefix(cache: Path, root: Path, board: Board) -> Path:
    """The root as the board shows it. Written anew each time: it is small."""
    assert board.emulation is not None
    folder = cache / f"{root.name}-{board.emulation.qemu_cpu}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(root / name)
    _write(folder / "proc/cpuinfo", cpuinfo(board.emulation, board.clusters[0].count))
    _topology(folder / "sys/devices/system/cpu", board)
    return folder


def cpuinfo(emulation: Emulation, cores: int) -> str:
    """As arch/arm64/kernel/cpuinfo.c prints it."""
    one = (
        "processor\t: {}\nBogoMIPS\t: 108.00\nFeatures\t: {}\nCPU implementer\t: {}\nCPU architecture: 8\n"
        "CPU variant\t: {}\nCPU part\t: {}\nCPU revision\t: {}\n\n"
    )
    given = (" ".join(emulation.features), emulation.implementer, emulation.variant, emulation.part, emulation.revision)
    return "".join(one.format(core, *given) for core in range(cores))


def _topology(folder: Path, board: Board) -> None:
    cluster, span = board.clusters[0], f"0-{board.clusters[0].count - 1}"
    for name in ("possible", "present", "online"):
        _write(folder / name, f"{span}\n")
    for core in range(cluster.count):
        at = folder / f"cpu{core}"
        _write(at / "topology/core_id", f"{core}\n")
        for name in ("physical_package_id", "cluster_id"):
            _write(at / "topology" / name, "0\n")
        for name in ("core_siblings_list", "package_cpus_list", "cluster_cpus_list"):
            _write(at / "topology" / name, f"{span}\n")
        for name in ("thread_siblings_list", "core_cpus_list"):
            _write(at / "topology" / name, f"{core}\n")
        _write(at / "cpufreq/cpuinfo_max_freq", f"{cluster.max_mhz * 1000}\n")


def _write(path: Path, text: str) -> None:
    """Atomically: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _versions() -> dict[str, str]:
    """Of the wheels: those installed here; a package that is not is left to pip ("")."""
    found = {}
    for name in WHEELS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def _key(versions: dict[str, str]) -> str:
    parts = (DEBIAN, versions, XLLAMACPP, SITE, Path("/etc/debian_version").read_text() if _is_debian() else "")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _is_debian() -> bool:
    return Path("/etc/debian_version").exists()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(what: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = lines[-1] if lines else f"status {done.returncode}"
        raise MissingError(f"the arm64 root cannot be built: {what} failed ({last.strip()}): is the network there?")


def _debian(root: Path, work: Path) -> None:
    """Packages by this machine's own apt sources and keys."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MissingError(
                f"{tool} is not there: devices arm://… build their root with Debian's apt, on Debian or like it"
            )
    for name in ("state/lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::State": str(work / "state"),
        "Dir::State::status": str(work / "status"),
        "Dir::Cache": str(work / "cache"),
    }
    apt = ["apt-get", "-qq", *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]
    _run("apt-get update", *apt, "update")
    _run("apt-get download", *apt, "--yes", "--download-only", "install", *DEBIAN)
    root.mkdir()
    for package in sorted((work / "cache/archives").glob("*.deb")):
        _run(f"unpacking {package.name}", "dpkg-deb", "--extract", str(package), str(root))
    for path in ("proc", "sys"):
        if (root / path).is_dir():
            (root / path).rmdir()  # a board's prefix has its own


def python_of(root: Path) -> Path:
    """The root's interpreter, usr/bin/python3.N."""
    found = [path for path in sorted((root / "usr/bin").glob("python3.*")) if path.suffix[1:].isdigit()]
    if not found:
        raise MissingError(f"the arm64 root {root} has no Python: remove it, so that it is built anew")
    return found[-1]


def _pip(python: Path, command: str, *arguments: str) -> None:
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    _run(
        f"pip {command}", sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--only-binary=:all:",
        *platforms, "--python-version", python.name.removeprefix("python"), "--implementation", "cp", *arguments,
    )  # fmt: skip


def _wheels(root: Path, versions: dict[str, str]) -> None:
    wanted = [f"{name}=={number}" if number else name for name, number in versions.items()]
    _pip(python_of(root), "install", "--target", str(root / "opt/site"), *wanted)


def _llama_cpp(root: Path, work: Path) -> None:
    """llama-cpp-python's bindings as they are installed here, on xllamacpp's build of the C API."""
    site = root / "opt/site"
    try:
        ours = distribution("llama-cpp-python")
    except PackageNotFoundError:
        return  # the runtime's package is missing there as it is here
    shutil.copytree(
        Path(str(ours.locate_file("llama_cpp"))),
        site / "llama_cpp",
        ignore=shutil.ignore_patterns("lib", "__pycache__"),
    )
    _pip(python_of(root), "download", "--dest", str(work / "xllamacpp"), f"xllamacpp=={XLLAMACPP}")
    (wheel,) = (work / "xllamacpp").glob("*.whl")
    shutil.unpack_archive(wheel, work / "unpacked", "zip")
    (library,) = (work / "unpacked" / "xllamacpp").glob("*.so")
    (site / "llama_cpp/lib").mkdir()
    shutil.move(library, site / "llama_cpp/lib/libllama.so")
    for name in ("libggml.so", "libmtmd.so"):
        (site / "llama_cpp/lib" / name).symlink_to("libllama.so")
    (site / "sitecustomize.py").write_text(SITE)
