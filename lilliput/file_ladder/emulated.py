"""Another processor, emulated by qemu, to run a runtime's kernels as another machine would choose them.

On x86 without VNNI, 8-bit products go through VPMADDUBSW, which saturates sums of two products at 16 bits; with VNNI,
and on Arm, they are exact. ONNX Runtime chooses by what the processor says that it has: the same wheel shows either on
an x86 of qemu's (Haswell), and its aarch64 wheel runs on the boards of `device: arm://…` (targets.devices.arm).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

from lilliput.errors import InputError, MissingError, did_you_mean

QEMU = "qemu-x86_64"
ARM = "arm://"


def python(processor: str) -> tuple[str, ...]:
    """A Python with numpy and onnxruntime on that processor: what stands before a script.

    Raises MissingError without qemu, InputError for a processor that is not known.
    """
    return _arm(processor.removeprefix(ARM)) if processor.startswith(ARM) else (*_x86(processor), sys.executable)


def _x86(processor: str) -> tuple[str, ...]:
    if platform.machine() != "x86_64":
        raise InputError(f"processor {processor!r}: emulated on x86-64 alone, this is {platform.machine()}")
    path = shutil.which(QEMU)
    if path is None:
        raise MissingError(f"{QEMU} is not installed, processor {processor!r} is emulated by it: install qemu-user")
    listed = subprocess.run([path, "-cpu", "help"], capture_output=True, text=True, check=False).stdout
    names = {words[1] for line in listed.splitlines() if len(words := line.split()) > 1 and words[0] == "x86"}
    if processor not in names:
        raise InputError(f"processor {processor!r}: not one of {QEMU}'s; {did_you_mean(processor, names)}")
    return (path, "-cpu", processor)


def _arm(address: str) -> tuple[str, ...]:
    """The Python of the Arm root, which is built where it is not there yet."""
    from lilliput.store import default_root
    from targets.devices import arm
    from targets.devices.arm import root

    board = arm.board_of(address)
    arm.qemu_version()
    assert board.emulation is not None
    cache = default_root() / "arm64"
    built = root.ready(cache)
    prefix = root.prefix(cache, built, board)
    given = ["-E", "PYTHONPATH=/opt/site", "-E", "OPENBLAS_NUM_THREADS=1"]
    interpreter = str(prefix / "usr/bin" / root.python_of(built).name)
    return (arm.QEMU, "-L", str(prefix), "-cpu", board.emulation.qemu_cpu, *given, interpreter)
