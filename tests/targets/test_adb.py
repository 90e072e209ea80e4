"""Android devices by adb's real client and server, against a peer that speaks the device's side; with its faults."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
import tiny_setting
import tools
from far_cases import BOUND_S, empty, eventually, fails, gone, pids, request
from loopback_sshd import free_port
from tiny_setting import Setting

from lilliput.errors import InputError, MeasurementError
from targets import sensors, shell_probe
from targets.devices import adb, host
from targets.far import FarConnection
from targets.validate import Candidate, Place, Protocol, References, Smoke, validate

PEER = Path(__file__).with_name("adb_peer.py")


@contextmanager
def own_server(home: Path) -> Iterator[None]:
    """An adb server of our own, on its own port and with its own keys."""
    tools.needs("adb", "adb")
    home.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
        patch.setenv("HOME", str(home))
        patch.delenv("ANDROID_SERIAL", raising=False)
        subprocess.run(["adb", "start-server"], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["adb", "kill-server"], check=False, capture_output=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server; the folder of the rogue runtime's package."""
    home = tmp_path_factory.mktemp("adb")
    tiny_setting.write_rogue(home / "site")
    with own_server(home):
        yield home / "site"


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    """The folder that the device works in; whatever happened, nothing is left in it."""
    folder = tmp_path / "there"
    folder.mkdir()
    yield folder
    assert empty(folder)


@contextmanager
def phone(site: Path, fault: str = "") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A peer that adb is connected to: its serial number and its process."""
    port = free_port()
    environment = os.environ | {"PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}", "ADB_PEER_FAULT": fault}
    peer = subprocess.Popen([sys.executable, str(PEER), str(port)], env=environment, stdout=subprocess.PIPE)
    serial = f"127.0.0.1:{port}"
    try:
        assert peer.stdout is not None
        assert peer.stdout.readline() == b"listening\n"
        subprocess.run(["adb", "connect", serial], check=False, capture_output=True, timeout=60)
        until = time.monotonic() + 30
        while state(serial) in ("connecting", "authorizing") and time.monotonic() < until:
            time.sleep(0.2)
        yield serial, peer
    finally:
        subprocess.run(["adb", "disconnect", serial], check=False, capture_output=True, timeout=60)
        peer.kill()
        peer.wait()
        if peer.stdout is not None:
            peer.stdout.close()


def state(serial: str) -> str:
    """What `adb devices` says of a device; "" where it is not attached."""
    listed = subprocess.run(["adb", "devices"], check=False, capture_output=True, text=True, timeout=60).stdout
    return dict(line.split("\t") for line in listed.splitlines() if "\t" in line).get(serial, "")


def connect(serial: str | None, there: Path, **changes: object) -> FarConnection:
    found = {"address": serial, "folder": str(there), "python": sys.executable, "answer_s": 60.0} | changes
    return adb.Device().open(adb.Options.model_validate(found))


def runner(folder: Path) -> Path:
    """What stands for a native program: one file that answers a request."""
    path = folder / "answer"
    path.write_text(
        dedent(f"""\
            #!/bin/sh
            PYTHONPATH={Path(adb.__file__).parents[2]}:$PYTHONPATH exec {sys.executable} -P -m targets.worker "$@"
        """)
    )
    return path


def test_requests_are_answered_there(server: Path, there: Path, tmp_path: Path) -> None:
    with phone(server) as (serial, _), closing(connect(serial, there)) as connection:
        probe = connection.probe()
        assert probe.host.device == f"adb://{serial}"
        assert probe.host.isa == host.Device().describe(host.Options()).isa
        assert connection.run(request(tmp_path / "a", "sound")).generated == (3, 4, 5, 6, 7)
        content = os.urandom(300_000)
        (tmp_path / "some file").write_bytes(content)
        lies = connection.push(tmp_path / "some file")
        connection.pull(lies, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        assert "crashed with SIGSEGV" in fails(lambda: connection.run(request(tmp_path / "a", "crash")))
        said = fails(lambda: connection.run(request(tmp_path / "a", "killed")))
        assert f"rogue on killed (adb://{serial}) was killed by the system, most likely for want of memory" in said
        assert "pulling none: ended with status 1" in fails(
            lambda: connection.pull(lies.with_name("none"), tmp_path / "x")
        )


def test_a_device_without_python_needs_a_runner(server: Path, there: Path, tmp_path: Path) -> None:
    with phone(server) as (serial, _):
        with closing(connect(serial, there, python="python-of-nobody")) as connection:
            said = fails(connection.probe)
            assert "there is no python-of-nobody" in said
            assert "or a `runner`" in said
        with pytest.raises(InputError, match=r"runner .*none: no such file"):
            connect(serial, there, runner=tmp_path / "none")
        with closing(connect(serial, there, python="python-of-nobody", runner=runner(tmp_path))) as connection:
            probe, wanted = connection.probe(), host.Device().describe(host.Options())
            assert (probe.host.isa, probe.host.architecture) == (wanted.isa, wanted.architecture)
            assert 0 < probe.free_memory_bytes < probe.host.memory_bytes
            assert probe.free_disk_bytes > 0
            assert connection.run(request(tmp_path / "a", "sound")).generated == (3, 4, 5, 6, 7)


def test_a_validation_by_a_runner_finds_what_the_host_finds(
    setting: Setting, server: Path, there: Path, tmp_path: Path
) -> None:
    protocol = Protocol(blocks=2, steps=4, prompt_tokens=16, shallow_tokens=4)
    read = {**setting.model.quantized, **setting.model.floats}
    subject = Candidate("torch", setting.artifact, lambda: read, exact=setting.artifact)
    references = References(setting.model, setting.evaluation, setting.float_model, setting.dequantized)
    smoke = Smoke("Hello", (5, 9, 200), (1,), lambda tokens: "+".join(map(str, tokens)), max_tokens=6)
    (tmp_path / "v").mkdir()
    with phone(server) as (serial, _), closing(connect(serial, there, runner=runner(tmp_path))) as connection:
        place = Place("torch_cpu", "adb", connection, threads=1)
        found = validate(subject, place, references, smoke, (), tmp_path / "v", protocol)
    wanted = setting.dequantized.metrics()
    assert found.accuracy is not None
    assert found.accuracy.mean_kld == pytest.approx(wanted.mean_kld, rel=1e-5)
    assert found.latency is not None
    assert found.generation is not None
    assert found.host is not None
    assert found.conditions is not None
    assert {s.kind for s in found.conditions.sensors} | set(found.conditions.absent) == set(sensors.KINDS)
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_what_is_not_attached(server: Path, there: Path) -> None:
    assert "no device is attached" in fails(lambda: connect(None, there))
    assert "it is not attached" in fails(lambda: connect("emulator-5554", there))


def test_a_device_that_does_not_trust_us(server: Path, there: Path) -> None:
    with phone(server, "unauthorized") as (serial, _):
        said = fails(lambda: connect(serial, there))
        assert "it does not trust this machine" in said or "it is offline" in said, said


def test_a_device_that_says_nothing(server: Path, there: Path) -> None:
    with phone(server, "mute") as (serial, _):
        assert "did not answer within 3 s" in fails(lambda: connect(serial, there, answer_s=3.0))


def test_a_device_that_is_full(server: Path, there: Path, tmp_path: Path) -> None:
    asked = request(tmp_path / "a", "sound")
    (tmp_path / "a" / "sound.data").write_bytes(bytes(100_000))
    with phone(server, "full") as (serial, _), closing(connect(serial, there)) as connection:
        said = fails(lambda: connection.run(asked))
        assert f"pushing a (0.1 MB): the disk of {there} is full there" in said


def test_a_hang_is_stopped_and_nothing_is_left(server: Path, there: Path, tmp_path: Path) -> None:
    with phone(server) as (serial, _), closing(connect(serial, there, stall_s=15)) as connection:
        messages: list[str] = []
        asked = request(tmp_path / "a", "hang")
        work = threading.Thread(target=lambda: messages.append(fails(lambda: connection.run(asked))))
        work.start()
        left = pids(there)
        work.join()
        assert "made no progress for 15 s and was stopped" in messages[0]
        assert eventually(lambda: all(map(gone, left)))


def test_a_device_that_vanishes(server: Path, there: Path, tmp_path: Path) -> None:
    with phone(server) as (serial, peer), closing(connect(serial, there)) as connection:
        messages: list[str] = []
        asked = request(tmp_path / "a", "hang")
        work = threading.Thread(target=lambda: messages.append(fails(lambda: connection.run(asked))))
        work.start()
        left = pids(there)
        peer.kill()
        work.join(BOUND_S)
        assert f"rogue on hang (adb://{serial}): " in messages[0]
        assert any(said in messages[0] for said in ("is not attached", "is offline", "connection was lost"))
        assert eventually(lambda: all(map(gone, left)))
        again = request(tmp_path / "b", "sound")
        assert messages[0].rpartition(": ")[2] in fails(lambda: connection.run(again)), "and stays lost"


PROBED = """\
processor\t: 0
Features\t: fp asimd asimdhp asimddp i8mm
Hardware\t: GS301

processor\t: 1
Features\t: fp asimd asimdhp asimddp i8mm
--lilliput--
MemTotal:        7878184 kB
MemAvailable:    3145728 kB
--lilliput--
Filesystem     1K-blocks    Used Available Use% Mounted on
/dev/block/dm-8 112345678 1000000  99345678   2% /data
--lilliput--
Linux 5.15.110-android14 aarch64
--lilliput--
Pixel 8
"""


def test_a_phones_own_files_say_what_it_is() -> None:
    probe = shell_probe.parse(PROBED, "adb://X")
    assert probe.host.cpu == "Pixel 8"
    assert probe.host.isa == ("asimd", "asimdhp", "asimddp", "i8mm")
    assert (probe.host.cores, probe.host.architecture) == (2, "aarch64")
    assert probe.host.system == "Linux 5.15.110-android14"
    assert probe.free_memory_bytes == 3145728 * 1024
    assert probe.free_disk_bytes == 99345678 * 1024
    with pytest.raises(MeasurementError, match="its shell does not show /proc as Linux does"):
        shell_probe.parse("/system/bin/sh: cat: not found", "adb://X")
