"""An x86 processor of qemu's, to run a runtime's kernels as another machine would choose them.

On x86 without VNNI, 8-bit products go through VPMADDUBSW, which saturates sums of two products at 16 bits; with VNNI,
and on Arm, they are exact. ONNX Runtime chooses by what the processor says that it has, so the same wheel shows either.
"""

from __future__ import annotations

import platform
import shutil
import subprocess

from lilliput.errors import InputError, MissingError, did_you_mean

QEMU = "qemu-x86_64"


def command(processor: str) -> tuple[str, ...]:
    """What stands before a command of this machine's. Raises MissingError without qemu, InputError for other names."""
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
