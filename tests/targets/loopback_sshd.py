"""A real sshd on 127.0.0.1 with its own keys, port and configuration, and an ssh configuration that reaches it."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import psutil


@dataclass(frozen=True)
class Board:
    """For ssh's `config`: `board` has the right key, `stranger` another; `unknown` lacks a host key."""

    config: Path
    port: int
    server: psutil.Process

    def sessions(self) -> list[psutil.Process]:
        """The processes that serve connections now."""
        return [p for p in self.server.children(recursive=True) if p.name().startswith("sshd")]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@contextmanager
def loopback(sshd: str, folder: Path, pythonpath: Path) -> Iterator[Board]:
    """The server, until the block ends."""
    port = free_port()
    host, mine, _ = (_key(folder / name) for name in ("host", "mine", "other"))
    (folder / "authorized").write_text(mine.with_suffix(".pub").read_text())
    key = " ".join(host.with_suffix(".pub").read_text().split()[:2])
    (folder / "known").write_text(f"[127.0.0.1]:{port} {key}\n")
    (folder / "nobody").write_text("")
    (folder / "sshd.conf").write_text(
        dedent(f"""
            Port {port}
            ListenAddress 127.0.0.1
            HostKey {host}
            PidFile {folder}/sshd.pid
            AuthorizedKeysFile {folder}/authorized
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            UsePAM no
            StrictModes no
            PermitRootLogin prohibit-password
            SetEnv PYTHONPATH={pythonpath} OMP_NUM_THREADS=1
        """)
    )
    (folder / "ssh.conf").write_text(
        dedent(f"""
            Host stranger
                IdentityFile {folder}/other
            Host board unknown
                IdentityFile {mine}
            Host unknown
                UserKnownHostsFile {folder}/nobody
            Host *
                HostName 127.0.0.1
                Port {port}
                User {getpass.getuser()}
                IdentityAgent none
                IdentitiesOnly yes
                StrictHostKeyChecking yes
                UserKnownHostsFile {folder}/known
        """)
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where its unprivileged part lives
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd.conf")], stderr=log)
    try:
        _wait(port, folder / "log")
        yield Board(folder / "ssh.conf", port, psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait()


def _wait(port: int, log: Path) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with socket.socket() as probing:
            if probing.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"sshd did not start: {log.read_text()}")
