"""Devices over ssh, against a real sshd on loopback: the host's figures; every fault is one error in a bounded time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from textwrap import dedent

import pytest
import tiny_setting
import tools
from far_cases import BOUND_S, empty, eventually, fails, gone, pids, request
from loopback_sshd import Board, free_port, loopback
from pydantic import ValidationError
from tiny_setting import Setting

from lilliput import decoder
from lilliput.errors import MeasurementError, MissingPackageError, RecipeError
from lilliput.progress import silent
from lilliput.recipe_schema import Target
from lilliput.registry import options
from targets.answers import QUESTIONS, Question, answer_all, load_answers, save_questions
from targets.devices import host, ssh
from targets.far import FarConnection
from targets.request import ArtifactReference, Request, SuiteTask
from targets.runtimes.torch_cpu import TorchSession
from targets.validate import Candidate, Place, Protocol, References, Smoke, validate


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    tools.needs("ssh", "openssh-client")
    sshd = tools.needs("sshd", "openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    tiny_setting.write_rogue(folder / "site")
    with loopback(sshd, folder, folder / "site") as running:
        yield running


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    """The folder that the device works in; whatever happened, nothing is left in it."""
    folder = tmp_path / "there"
    folder.mkdir()
    yield folder
    assert empty(folder)


def given(board: Board, there: Path, **changes: object) -> ssh.Options:
    found = {"address": "board", "config": board.config, "folder": str(there), "python": sys.executable}
    return ssh.Options.model_validate(found | {"answer_s": 120.0} | changes)


def connect(board: Board, there: Path, **changes: object) -> FarConnection:
    return ssh.Device().open(given(board, there, **changes))


def test_requests_are_answered_there_by_pushed_sources(board: Board, there: Path, tmp_path: Path) -> None:
    with closing(connect(board, there)) as connection:
        probe = connection.probe()
        assert probe.host.device == "ssh://board"
        assert probe.host.model_copy(update={"device": "host"}) == host.Device().describe(host.Options())
        reply = connection.run(request(tmp_path / "a", "sound"))
        assert reply.generated == (3, 4, 5, 6, 7)
        assert reply.versions == {"rogue": "0.1"}
        (source,) = there.glob("lilliput-*/src/targets/worker.py")
        assert source.read_bytes() == Path(source.relative_to(source.parents[1])).read_bytes()
        assert not list(there.glob("lilliput-*/src/lilliput/cli.py"))


def test_files_go_and_come_back(board: Board, there: Path, tmp_path: Path) -> None:
    content = os.urandom(100_000)
    (tmp_path / "file with spaces.bin").write_bytes(content)
    with closing(connect(board, there)) as connection:
        lies = connection.push(tmp_path / "file with spaces.bin")
        assert Path(lies).read_bytes() == content
        connection.push(tmp_path / "file with spaces.bin")
        assert len(list(there.glob("lilliput-*/*/file with spaces.bin"))) == 1, "pushed once"
        connection.pull(lies, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        with pytest.raises(MeasurementError, match=r"pulling no such: ended with status 1: .*No such file"):
            connection.pull(lies.with_name("no such"), tmp_path / "none")


def test_a_validation_there_finds_what_the_host_finds(
    setting: Setting, board: Board, there: Path, tmp_path: Path
) -> None:
    protocol = Protocol(blocks=2, steps=4, prompt_tokens=16, shallow_tokens=4)
    read = {**setting.model.quantized, **setting.model.floats}
    subject = Candidate("torch", setting.artifact, lambda: read, exact=setting.artifact)
    references = References(setting.model, setting.evaluation, setting.float_model, setting.dequantized)
    smoke = Smoke("Hello", (5, 9, 200), (1,), lambda tokens: "+".join(map(str, tokens)), max_tokens=6)
    found = {}
    openers = {"host": lambda: host.Device().open(host.Options()), "ssh": lambda: connect(board, there)}
    for name, opened in openers.items():
        (tmp_path / name).mkdir()
        with closing(opened()) as connection:
            place = Place("torch_cpu", name, connection, threads=1)
            found[name] = validate(subject, place, references, smoke, (), tmp_path / name, protocol)
    near, far = found["host"], found["ssh"]
    assert not any(note.startswith(("accuracy", "exact")) for note in far.notes), far.notes
    assert far.host is not None
    assert far.host.device == "ssh://board"
    assert (far.accuracy, far.ladder, far.generation) == (near.accuracy, near.ladder, near.generation)
    assert (far.versions, far.artifact) == (near.versions, near.artifact)
    assert far.accuracy is not None
    assert far.latency is not None
    assert far.memory is not None
    assert far.memory.peak_rss_bytes > far.memory.baseline_rss_bytes > 10_000_000
    assert type(far).model_validate_json(far.model_dump_json()) == far


def test_nothing_listens(board: Board, there: Path) -> None:
    message = fails(lambda: connect(board, there, address=f"board:{free_port()}"))
    assert "no SSH server answers there" in message
    assert "Connection refused" in message


def test_the_key_is_refused(board: Board, there: Path) -> None:
    assert "it refuses the key" in fails(lambda: connect(board, there, address="stranger"))


def test_the_host_key_is_not_known(board: Board, there: Path) -> None:
    assert "its host key is not known" in fails(lambda: connect(board, there, address="unknown"))


def test_a_server_that_says_nothing(board: Board, there: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        message = fails(lambda: connect(board, there, address=f"board:{mute.getsockname()[1]}", connect_s=2))
    assert "it does not answer" in message


def test_the_folder_is_not_there(board: Board, there: Path) -> None:
    message = fails(lambda: connect(board, there / "none"))
    assert "connecting: ended with status 73" in message
    assert "No such file or directory" in message


def test_there_is_no_python(board: Board, there: Path) -> None:
    wanted = r"there is no no-such-python: install Python 3\.11 there"
    with (
        closing(connect(board, there, python="no-such-python")) as connection,
        pytest.raises(MeasurementError, match=wanted),
    ):
        connection.probe()


def test_its_python_lacks_a_package(board: Board, there: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare.parents[1])], check=True)
    wanted = r"No module named.*pip install numpy pydantic psutil"
    with closing(connect(board, there, python=str(bare))) as connection, pytest.raises(MeasurementError, match=wanted):
        connection.probe()
    wanted = r"'package_that_is_not_there'.*'absent' on ssh://board"
    with closing(connect(board, there)) as connection, pytest.raises(MissingPackageError, match=wanted):
        connection.run(request(tmp_path / "a", "sound", runtime="absent"))


def test_a_full_disk(board: Board, there: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "sound.data").write_bytes(bytes(3_000_000))
        with closing(connect(board, small)) as connection:
            message = fails(lambda: connection.run(request(tmp_path / "a", "sound")))
            assert f"pushing a (3.0 MB): the disk of {small} is full there" in message
        assert empty(small)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_crashes_and_kills_are_told_apart(board: Board, there: Path, tmp_path: Path) -> None:
    with closing(connect(board, there)) as connection:
        assert "crashed with SIGSEGV" in fails(lambda: connection.run(request(tmp_path / "a", "crash")))
        message = fails(lambda: connection.run(request(tmp_path / "a", "killed")))
        assert "rogue on killed (ssh://board) was killed by the system, most likely for want of memory" in message
        assert "RuntimeError: the delegate is gone" in fails(lambda: connection.run(request(tmp_path / "a", "raise")))
        assert "ended with status 0 and no reply" in fails(lambda: connection.run(request(tmp_path / "a", "quiet")))
        assert connection.run(request(tmp_path / "a", "sound")).generated == (3, 4, 5, 6, 7)


def test_a_hang_is_stopped_and_nothing_is_left(board: Board, there: Path, tmp_path: Path) -> None:
    with closing(connect(board, there, stall_s=15)) as connection:
        messages: list[str] = []
        work = threading.Thread(
            target=lambda: messages.append(fails(lambda: connection.run(request(tmp_path / "a", "hang"))))
        )
        work.start()
        left = pids(there)
        work.join()
        assert "made no progress for 15 s and was stopped" in messages[0]
        assert eventually(lambda: all(map(gone, left)))


def test_a_device_that_vanishes(board: Board, there: Path, tmp_path: Path) -> None:
    """Its side of the connection is killed: our side has a verdict, and the device cleans up by itself."""
    with closing(connect(board, there)) as connection:
        messages: list[str] = []
        work = threading.Thread(
            target=lambda: messages.append(fails(lambda: connection.run(request(tmp_path / "a", "hang"))))
        )
        work.start()
        left = pids(there)
        for session in board.sessions():
            session.kill()
        work.join(BOUND_S)
        assert "rogue on hang (ssh://board): the connection was lost" in messages[0]
        assert eventually(lambda: all(map(gone, left)))
        assert empty(there)
        assert "the connection was lost" in fails(lambda: connection.run(request(tmp_path / "b", "sound"))), (
            "and stays lost"
        )


def test_our_own_death_leaves_nothing_there(board: Board, there: Path, tmp_path: Path) -> None:
    asked = request(tmp_path / "a", "hang")
    program = dedent(f"""
        from targets.devices import ssh
        from targets.request import Request
        options = ssh.Options.model_validate_json({given(board, there).model_dump_json()!r})
        ssh.Device().open(options).run(Request.model_validate_json({asked.model_dump_json()!r}))
    """)
    ours = subprocess.Popen([sys.executable, "-c", program])
    try:
        left = pids(there)
    finally:
        ours.kill()
        ours.wait()
    assert eventually(lambda: all(map(gone, left)))


def test_the_address_is_wanted_and_a_url_is_short_for_it() -> None:
    with pytest.raises(RecipeError, match="device 'ssh', option address: field required"):
        options("devices", "ssh", {})
    made = {"name": "board", "exporter": "onnx_int4", "runtime": "ort_cpu", "device": "ssh://pi@board:2222"}
    device = Target.model_validate(made).device
    assert device == Target.model_validate(made | {"device": {"name": "ssh", "address": "pi@board:2222"}}).device
    assert device.url == "ssh://pi@board:2222"
    found = options("devices", device.name, device.options)
    assert isinstance(found, ssh.Options)
    assert found.address == "pi@board:2222"
    with pytest.raises(ValidationError, match="unknown device 'telnet'"):
        Target.model_validate(made | {"device": "telnet://board"})


def test_questions_are_answered_there_as_here(setting: Setting, board: Board, there: Path, tmp_path: Path) -> None:
    asked = (Question(id="open", prompt=(5, 9, 200), max_tokens=6, stop_tokens=(1,)),)
    reference = tmp_path / "reference"
    reference.mkdir()
    save_questions(asked, reference)
    answer_all(TorchSession(decoder.build(setting.source), 64), asked, reference)
    found = []
    with closing(connect(board, there)) as far:
        for where in (host.Device().open(host.Options()), far):
            out = tmp_path / f"{len(found)}.json"
            task = SuiteTask(questions=reference / QUESTIONS, reference=reference, answers_out=out)
            artifact = ArtifactReference.of(setting.artifact)
            reply = where.run(Request(artifact=artifact, runtime="torch_cpu", threads=1, tasks=(task,)), silent)
            assert reply.answers == out
            found.append(load_answers(out))
    assert found[0] == found[1]
    assert found[0][0].mean_kld is not None
