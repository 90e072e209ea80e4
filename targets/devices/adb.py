"""An Android device that adb reaches, `device: adb`, or `adb://SERIAL` where several are attached.

The `adb` of this machine is used, with its server and its keys. A phone has no Python that adb's shell may run: give
`runner`, a program for it (targets.far says what it must do), or `python` where there is one (a rooted device, a
development board). Commands go through `adb shell` with its second protocol, which carries standard input, standard
error and the exit status: Android 7 and later.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import ClassVar

from pydantic import BaseModel, Field

from lilliput.errors import MissingError
from lilliput.results import Host
from targets.far import FarConnection, FarOptions, quoted, run_for
from targets.process import Ended

# What adb says → what it means and what to do. The first that fits counts.
REASONS = (
    ("unauthorized", "it does not trust this machine: allow USB debugging on its screen"),
    ("still authorizing", "it does not trust this machine yet: allow USB debugging on its screen"),
    ("still connecting", "it is still connecting: try again in a moment"),
    ("no devices/emulators found", "no device is attached: plug one in with USB debugging on, or `adb connect` it"),
    ("more than one device", "several devices are attached: name one, adb://SERIAL (`adb devices` lists them)"),
    ("' not found", "it is not attached: plug it in, or `adb connect` it (`adb devices` lists what is)"),
    ("offline", "it is offline: unlock it, or plug it in again"),
    ("cannot connect to daemon", "adb's server does not start: `adb start-server` says why"),
)
ADB_SPEAKS = ("error:", "adb: error:", "adb: no devices", "adb: device")


class Options(FarOptions):
    """`address` is a serial number as `adb devices` lists it; None is the one device that is attached."""

    address: str | None = Field(None, pattern=r"^[^\s/-][^\s/]*$")
    folder: str = Field("/data/local/tmp", min_length=1)


class Device:
    """A device that adb reaches."""

    Options: ClassVar[type[BaseModel]] = Options

    def describe(self, options: BaseModel) -> Host:
        with closing(self.open(options)) as connection:
            return connection.probe().host

    def open(self, options: BaseModel) -> FarConnection:
        assert isinstance(options, Options)
        if shutil.which("adb") is None:
            raise MissingError("adb is not installed here, devices adb://… need it: apt-get install adb")
        return FarConnection(AdbTransport(options), options)


class AdbTransport:
    """Commands and files by the adb program; each is a stream of the one connection that adb's server holds."""

    def __init__(self, options: Options) -> None:
        self.name = f"adb://{options.address}" if options.address else "adb"
        self._adb = ["adb", *(("-s", options.address) if options.address else ())]
        self._patience_s = options.answer_s

    def shell(self, script: str) -> list[str]:
        return [*self._adb, "shell", "-T", script]

    def lost(self, status: int, stderr: str) -> str | None:
        """adb has the statuses 1 and 255 for errors of its own, as scripts may have, and none of a stream that broke:
        where its words do not tell, the device is asked whether it is there."""
        if status not in (1, 255):
            return None
        lines = [line.strip() for line in stderr.splitlines() if line.strip().startswith(ADB_SPEAKS)]
        if (found := _reason(lines)) is not None:
            return found
        state = run_for([*self._adb, "get-state"], self._patience_s)
        if state.status == 0:
            return None
        lines = [line.strip() for line in state.stderr.splitlines() if line.strip()]
        return _reason(lines) or f"the connection was lost{f' (adb: {lines[0]})' if lines else ''}"

    def put(self, files: Sequence[tuple[Path, str]], folder: PurePosixPath, patience_s: float) -> Ended:
        """adb pushes what lies in a folder here that has the names of there."""
        made = run_for(self.shell(f"mkdir -p {quoted(folder)}"), self._patience_s)
        if made.stopped or made.status != 0:
            return made
        with tempfile.TemporaryDirectory(prefix="lilliput-") as name:
            for path, as_name in files:
                staged = Path(name) / as_name
                staged.parent.mkdir(parents=True, exist_ok=True)
                _link(path.resolve(), staged)
            given = [str(path) for path in sorted(Path(name).iterdir())]
            return run_for([*self._adb, "push", *given, f"{folder}/"], patience_s, both=True)

    def get(self, there: PurePosixPath, here: Path, patience_s: float) -> Ended:
        return run_for([*self._adb, "pull", str(there), str(here)], patience_s, both=True)

    def close(self) -> None:
        """The connection is the server's."""


def _reason(lines: Sequence[str]) -> str | None:
    """What the first line means that says a device is away; None where none does."""
    found = ((meaning, line) for line in lines for word, meaning in REASONS if word in line)
    return next((f"{meaning} (adb: {line})" for meaning, line in found), None)


def _link(path: Path, staged: Path) -> None:
    """The file under another name, without its bytes where the file system can."""
    try:
        os.link(path, staged)
    except OSError:
        shutil.copyfile(path, staged)
