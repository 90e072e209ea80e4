"""An Arm board emulated on this machine, `device: arm://cortex-a76` or `arm://raspberry-pi-4`: qemu-user, never timed.

The real aarch64 wheels of the runtimes run on an emulated processor, in the same worker as anywhere. That proves
accuracy with the kernels that such a processor chooses, that no instruction is used that it lacks, and how many
instructions a token takes (targets.devices.arm.counting). It says nothing of time or memory: neither is measured, and
who asks for it is refused.

The processor is one that a board's file describes (`emulation`), with the /proc/cpuinfo that goes with it: an
instruction that is offered there and not by qemu's -cpu ends the worker with SIGILL. qemu's `max` is none of them: its
SVE computed wrong products of 8-bit integers (QEMU 7.2).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, Field

from lilliput.errors import InputError, MeasurementError, MissingError, did_you_mean
from lilliput.progress import Progress, silent
from lilliput.results import Host
from lilliput.store import default_root
from targets import boards, far, machine
from targets.boards import Board
from targets.devices.arm import counting, root
from targets.devices.host import HostConnection
from targets.devices.host import Options as HostOptions
from targets.probe import Probe
from targets.process import Limits
from targets.request import CountTask, LatencyTask, Reply, Request

QEMU = "qemu-aarch64"
PROBE_S = 120.0


class Options(Limits):
    """`address` is a board with an emulation, or the processor of one."""

    address: str = Field("cortex-a76", min_length=1)
    stall_s: float = Field(1800.0, gt=0)  # emulation is some hundred times slower


class Device:
    """A board's processor, emulated."""

    Options: ClassVar[type[BaseModel]] = Options

    def describe(self, options: BaseModel) -> Host:
        assert isinstance(options, Options)
        board = board_of(options.address)
        assert board.emulation is not None
        return Host(
            device=f"arm://{options.address}",
            cpu=board.emulation.qemu_cpu,
            architecture="aarch64",
            isa=tuple(name for name in machine.ISA if name in board.emulation.features),
            cores=machine.usable_cores(),
            logical_cores=board.clusters[0].count,
            memory_bytes=machine.memory_limit_bytes(),
            system=machine.describe("host").system,
            python="",
            emulated=f"QEMU {'.'.join(map(str, qemu_version()))}",
        )

    def open(self, options: BaseModel) -> ArmConnection:
        assert isinstance(options, Options)
        return ArmConnection(options, board_of(options.address))


def board_of(address: str) -> Board:
    """Raises InputError naming what can be emulated."""
    emulated = {name: board for name in boards.names() if (board := boards.load(name)).emulation}
    found = {board.emulation.qemu_cpu: board for board in emulated.values() if board.emulation} | emulated
    if address not in found:
        raise InputError(f"arm://{address} cannot be emulated: {did_you_mean(address, found)}")
    return found[address]


def qemu_version() -> tuple[int, int]:
    """Raises MissingError without qemu-user."""
    if shutil.which(QEMU) is None:
        raise MissingError(f"{QEMU} is not installed here, devices arm://… need it: apt-get install qemu-user")
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    if found is None:
        raise MissingError(f"{QEMU} --version says {said[:60]!r}, wanted its version: install qemu-user anew")
    return int(found[1]), int(found[2])


class ArmConnection(HostConnection):
    """Workers of emulated Pythons: this machine's files are theirs, but for the prefix."""

    def __init__(self, options: Options, board: Board) -> None:
        self.name = f"arm://{options.address}"
        self._version, self._board = qemu_version(), board
        self._cache = default_root() / "arm64"
        built = root.ready(self._cache)
        self._prefix, self._python = root.prefix(self._cache, built, board), root.python_of(built)
        self._sources = tempfile.TemporaryDirectory(prefix="lilliput-")
        for path, name in far.sources():
            (Path(self._sources.name) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, Path(self._sources.name) / name)
        super().__init__(HostOptions(limit_s=options.limit_s, stall_s=options.stall_s))

    def command(self, module: str, plugin: Path | None = None, counts: Path | None = None) -> list[str]:
        """A module of ours on the emulated processor."""
        assert self._board.emulation is not None
        given = {"PYTHONPATH": f"/opt/site:{self._sources.name}", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        environment = [part for key, value in given.items() for part in ("-E", f"{key}={value}")]
        counted = [] if plugin is None else ["-plugin", f"{plugin},out={counts}"]
        python = str(self._prefix / "usr/bin" / self._python.name)
        cpu = self._board.emulation.qemu_cpu
        return [QEMU, "-L", str(self._prefix), "-cpu", cpu, *environment, *counted, python, "-P", "-m", module]

    def probe(self) -> Probe:
        log, answer = (Path(self._sources.name) / name for name in ("probe.txt", "probe.json"))
        command = [*self.command("targets.probe"), self.name, tempfile.gettempdir()]
        ended = far.run_for(command, PROBE_S, stdout=answer)
        log.write_text(ended.stderr)
        if ended.stopped or ended.status != 0:
            raise MeasurementError(f"{self.name}: its Python does not run (status {ended.status}): {ended.last_words}")
        found = Probe.model_validate_json(answer.read_text())
        major, minor = self._version
        assert self._board.emulation is not None
        update = {"cpu": self._board.emulation.qemu_cpu, "emulated": f"QEMU {major}.{minor}"}
        return found.model_copy(update={"host": found.host.model_copy(update=update)})

    def run(self, request: Request, progress: Progress = silent) -> Reply:
        if any(isinstance(task, LatencyTask) for task in request.tasks):
            raise MeasurementError(
                f"{self.name} is emulated: its speed is no evidence of any board's, measure on a real one"
            )
        counted = [task for task in request.tasks if isinstance(task, CountTask)]
        if not counted or counting.why_not(self._version):
            return self.answer(request, self.command("targets.worker"), progress, self.name)
        with tempfile.TemporaryDirectory(prefix="lilliput-") as name:
            counts = Path(name) / "counts"
            command = self.command("targets.worker", counting.plugin(self._cache), counts)
            reply = self.answer(request, command, progress, self.name)
            return reply.model_copy(update={"instructions": counting.read(counts, counted[0].steps)})

    def close(self) -> None:
        self._sources.cleanup()
