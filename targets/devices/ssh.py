"""A machine that OpenSSH reaches, `device: ssh://user@host`: a board with Linux and Python on the network.

The `ssh` of this machine is used, with the user's own configuration: aliases, keys, agents and ProxyJump hold. It never
asks anything (BatchMode): a password, or a host key that is not known, is an error. One connection carries everything
(ControlMaster, its socket in a temporary folder); 15 seconds without an answer end it.

Files go as one tar stream through a remote `tar`, so that the device needs neither scp nor an sftp server.
"""

from __future__ import annotations

import shlex
import shutil
import tarfile
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

LOST = 255  # ssh's own status for every error of its own

# What ssh says → what it means and what to do. The first that fits counts.
REASONS = (
    (
        "Host key verification failed",
        "its host key is not known, or changed: connect once by hand, or mend known_hosts",
    ),
    ("Permission denied", "it refuses the key: add yours to its authorized_keys, or load it into the agent"),
    ("Connection refused", "no SSH server answers there: start one, or mend the address or port"),
    ("Could not resolve hostname", "its name is not known: mend the address"),
    ("timed out", "it does not answer: is it on, and on this network?"),
    ("No route to host", "it does not answer: is it on, and on this network?"),
)


class Options(FarOptions):
    """`address` is what ssh takes: user@host, or an alias of its configuration; a port goes as host:port."""

    address: str = Field(pattern=r"^[A-Za-z0-9_][^\s/]*$")
    config: Path | None = None  # in place of ~/.ssh/config
    connect_s: float = Field(10.0, gt=0)


class Device:
    """A machine that ssh reaches."""

    Options: ClassVar[type[BaseModel]] = Options

    def describe(self, options: BaseModel) -> Host:
        with closing(self.open(options)) as connection:
            return connection.probe().host

    def open(self, options: BaseModel) -> FarConnection:
        assert isinstance(options, Options)
        if shutil.which("ssh") is None:
            raise MissingError("ssh is not installed here, devices ssh://… need it: install the OpenSSH client")
        return FarConnection(SshTransport(options), options)


class SshTransport:
    """Commands over one multiplexed connection: the first one, the guardian's, is its master."""

    def __init__(self, options: Options) -> None:
        self.name = f"ssh://{options.address}"
        self._folder = tempfile.TemporaryDirectory(prefix="lilliput-ssh-", dir="/tmp")  # a socket's path is short
        self._socket = Path(self._folder.name) / "master"
        self._options = options

    def shell(self, script: str) -> list[str]:
        return [*self._ssh(), f"exec sh -c {shlex.quote(script)}"]

    def _ssh(self) -> list[str]:
        host, _, port = self._options.address.partition(":")
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": str(max(1, round(self._options.connect_s))),
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "ControlMaster": "no" if self._socket.exists() else "yes",
            "ControlPath": str(self._socket),
            "ControlPersist": "no",
            "LogLevel": "ERROR",
        }
        command = ["ssh", "-T", *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]
        if self._options.config is not None:
            command += ["-F", str(self._options.config)]
        return [*command, *(("-p", port) if port else ()), "--", host]

    def lost(self, status: int, stderr: str) -> str | None:
        if status != LOST:
            return None
        words = " | ".join(line.strip() for line in stderr.splitlines()[-2:] if line.strip())
        reason = next((meaning for said, meaning in REASONS if said in stderr), "the connection was lost")
        return f"{reason} (ssh: {words})" if words else reason

    def put(self, files: Sequence[tuple[Path, str]], folder: PurePosixPath, patience_s: float) -> Ended:
        with tempfile.NamedTemporaryFile(prefix="lilliput-", suffix=".tar") as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for path, name in files:
                    tar.add(path.resolve(), name, recursive=False, filter=_plain)
            packed.flush()
            script = f"mkdir -p {quoted(folder)} && exec tar -xf - -C {quoted(folder)}"
            return run_for(self.shell(script), patience_s, stdin=Path(packed.name))

    def get(self, there: PurePosixPath, here: Path, patience_s: float) -> Ended:
        return run_for(self.shell(f"exec cat {quoted(there)}"), patience_s, stdout=here)

    def close(self) -> None:
        self._folder.cleanup()


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """No owner and no time of this machine's."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry
