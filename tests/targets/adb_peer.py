"""The device's side of adb over TCP, for tests: `python adb_peer.py PORT`; adb's real client and server talk to it.

Spoken is what AOSP's packages/modules/adb describes (protocol.txt, SYNC.TXT, shell_protocol.h): messages of six
little-endian words (command, arg0, arg1, length, checksum, magic) and data; CNXN, AUTH, OPEN, OKAY, WRTE, CLSE; the
service `shell,v2` whose packets carry stdin 0, stdout 1, stderr 2, exit 3, end of stdin 4; and `sync:` with STAT, LIST,
SEND, RECV, QUIT. Paths and programs are this machine's.

Faults, by environment: ADB_PEER_FAULT=unauthorized asks for a signature and refuses each; mute accepts streams and says
nothing; full refuses to write more than 64 kB. Killing the process is a device that vanishes; what its shells run
goes with it, as a device's does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
from pathlib import Path

A_CNXN, A_AUTH, A_OPEN, A_OKAY, A_WRTE, A_CLSE = (
    int.from_bytes(word, "little") for word in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE")
)
VERSION, MAX_DATA = 0x01000001, 256 * 1024  # without checksums
BANNER = b"device::ro.product.name=peer;ro.product.model=Peer;ro.product.device=peer;features=shell_v2,cmd"
STDIN, STDOUT, STDERR, EXIT, END = range(5)
FAULT = os.environ.get("ADB_PEER_FAULT", "")
FULL_BYTES = 64_000


class Stream:
    """One opened service: bytes that came in, and a turn to write after each OKAY."""

    def __init__(self, link: Link, local: int, remote: int) -> None:
        self.link, self.local, self.remote = link, local, remote
        self.incoming = asyncio.StreamReader()
        self.turn = asyncio.Event()
        self.closed = False
        self.task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    async def write(self, data: bytes) -> None:
        async with self._writing:
            for start in range(0, len(data), self.link.max_data):
                self.turn.clear()
                await self.link.send(A_WRTE, self.local, self.remote, data[start : start + self.link.max_data])
                await self.turn.wait()
                if self.closed:
                    raise ConnectionError("the stream was closed")

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            await self.link.send(A_CLSE, self.local, self.remote)


class Link:
    """One connection of an adb server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.max_data, self.streams, self.opened = 4096, dict[int, Stream](), 0

    async def send(self, command: int, arg0: int, arg1: int, data: bytes = b"") -> None:
        head = struct.pack("<6I", command, arg0, arg1, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        self.writer.write(head + data)
        await self.writer.drain()

    async def serve(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                command, arg0, arg1, length, _, _ = struct.unpack("<6I", await self.reader.readexactly(24))
                await self.answer(command, arg0, arg1, await self.reader.readexactly(length))
        for stream in self.streams.values():
            stream.closed = True
            stream.incoming.feed_eof()
            stream.turn.set()
        self.writer.close()

    async def answer(self, command: int, arg0: int, arg1: int, data: bytes) -> None:
        if command in (A_CNXN, A_AUTH) and FAULT == "unauthorized":
            await self.send(A_AUTH, 1, 0, os.urandom(20))
        elif command == A_CNXN:
            self.max_data = min(arg1, MAX_DATA)
            await self.send(A_CNXN, VERSION, MAX_DATA, BANNER)
        elif command == A_OPEN:
            self.opened += 1
            stream = self.streams[self.opened] = Stream(self, self.opened, arg0)
            await self.send(A_OKAY, stream.local, arg0)
            if FAULT != "mute":
                stream.task = asyncio.create_task(serve(stream, data.rstrip(b"\0").decode()))
        elif command == A_WRTE and arg1 in self.streams:
            self.streams[arg1].incoming.feed_data(data)
            await self.send(A_OKAY, arg1, arg0)
        elif command == A_OKAY and arg1 in self.streams:
            self.streams[arg1].turn.set()
        elif command == A_CLSE and arg1 in self.streams:
            stream = self.streams.pop(arg1)
            stream.closed = True
            stream.incoming.feed_eof()
            stream.turn.set()


async def serve(stream: Stream, service: str) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        if service.startswith("shell,v2"):
            await shell(stream, service.partition(":")[2])
        elif service.startswith("sync:"):
            await sync(stream)
        await stream.close()


async def shell(stream: Stream, script: str) -> None:
    """adbd's child leads a session, and dies of SIGHUP no sooner than its pipes break."""
    child = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", script,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    feeding = asyncio.create_task(feed(stream, child))
    try:
        await asyncio.gather(pump(stream, STDOUT, child.stdout), pump(stream, STDERR, child.stderr))
        status = await child.wait()
        code = status if status >= 0 else 128 - status
        await stream.write(struct.pack("<BIB", EXIT, 1, code))
    finally:
        feeding.cancel()


async def feed(stream: Stream, child: asyncio.subprocess.Process) -> None:
    """Packets of standard input, until its end or the stream's."""
    assert child.stdin is not None
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            kind, length = struct.unpack("<BI", await stream.incoming.readexactly(5))
            data = await stream.incoming.readexactly(length)
            if kind == END:
                break
            child.stdin.write(data)
            await child.stdin.drain()
    child.stdin.close()


async def pump(stream: Stream, kind: int, source: asyncio.StreamReader | None) -> None:
    assert source is not None
    while data := await source.read(32768):
        await stream.write(struct.pack("<BI", kind, len(data)) + data)


async def sync(stream: Stream) -> None:
    while True:
        request, length = struct.unpack("<4sI", await stream.incoming.readexactly(8))
        if request == b"QUIT":
            return
        name = (await stream.incoming.readexactly(length)).decode()
        try:
            await SYNC[request](stream, name)
        except OSError as error:
            reason = (error.strerror or str(error)).encode()
            await stream.write(struct.pack("<4sI", b"FAIL", len(reason)) + reason)


async def stat(stream: Stream, name: str) -> None:
    found = (0, 0, 0)
    with contextlib.suppress(OSError):
        status = Path(name).stat()
        found = (status.st_mode, status.st_size & 0xFFFFFFFF, int(status.st_mtime))
    await stream.write(struct.pack("<4s3I", b"STAT", *found))


async def list_(stream: Stream, name: str) -> None:
    for entry in sorted(Path(name).iterdir()):
        status, raw = entry.stat(), entry.name.encode()
        figures = (status.st_mode, status.st_size & 0xFFFFFFFF, int(status.st_mtime), len(raw))
        await stream.write(struct.pack("<4s4I", b"DENT", *figures) + raw)
    await stream.write(struct.pack("<4s4I", b"DONE", 0, 0, 0, 0))


async def receive(stream: Stream, name: str) -> None:
    with Path(name).open("rb") as file:
        while data := file.read(65536):
            await stream.write(struct.pack("<4sI", b"DATA", len(data)) + data)
    await stream.write(struct.pack("<4sI", b"DONE", 0))


async def send(stream: Stream, name: str) -> None:
    """The client sends all of the file, whatever we think of it."""
    path, _, mode = name.rpartition(",")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with Path(path).open("wb") as file:
        while True:
            part, length = struct.unpack("<4sI", await stream.incoming.readexactly(8))
            if part == b"DONE":
                break
            data = await stream.incoming.readexactly(length)
            written += length
            if FAULT != "full" or written <= FULL_BYTES:
                file.write(data)
    if FAULT == "full" and written > FULL_BYTES:
        raise OSError(28, "No space left on device")
    Path(path).chmod(int(mode) & 0o777)
    await stream.write(struct.pack("<4sI", b"OKAY", 0))


SYNC = {b"STAT": stat, b"LIST": list_, b"RECV": receive, b"SEND": send}


async def main(port: int) -> None:
    server = await asyncio.start_server(lambda r, w: Link(r, w).serve(), "127.0.0.1", port)
    print("listening", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    asyncio.run(main(int(sys.argv[1])))
