"""The host device with workers that crash, hang, lie or are killed: one error each, and nothing left running."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import numpy as np
import psutil
import pytest

from lilliput.artifact import Artifact
from lilliput.errors import MeasurementError, MissingError, MissingPackageError
from targets import machine
from targets.devices.host import Device, Options
from targets.request import AccuracyTask, ArtifactReference, GenerateTask, LatencyTask, Request, Task

GENERATE = GenerateTask(prompt=(1, 2), max_tokens=5)
DEFAULTS = Options()


def request(folder: Path, kind: str, *tasks: Task, runtime: str = "rogue") -> Request:
    artifact = ArtifactReference.of(Artifact(folder, "checkpoint", kind, context=64, prefill=0))
    return Request(artifact=artifact, runtime=runtime, threads=1, tasks=tasks or (GENERATE,))


def fails(folder: Path, kind: str, *tasks: Task, options: Options = DEFAULTS) -> str:
    with pytest.raises(MeasurementError) as caught:
        Device().open(options).run(request(folder, kind, *tasks))
    assert "\n" not in str(caught.value)
    assert kind in str(caught.value)
    return str(caught.value)


def gone(pid: int) -> bool:
    """Whether the process has ended within five seconds."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_sound_worker_answers_whatever_the_runtime_prints(rogue: Path) -> None:
    reply = Device().open(DEFAULTS).run(request(rogue, "sound"))
    assert reply.generated == (3, 4, 5, 6, 7)
    assert reply.versions == {"rogue": "0.1"}


def test_a_crash_names_the_signal(rogue: Path) -> None:
    assert "crashed with SIGSEGV" in fails(rogue, "crash")


def test_a_kill_by_the_system_is_told_as_want_of_memory(rogue: Path) -> None:
    assert "killed by the system, most likely for want of memory" in fails(rogue, "killed")


def test_an_exception_gives_its_last_lines(rogue: Path) -> None:
    assert "RuntimeError: the delegate is gone" in fails(rogue, "raise")


def test_an_end_without_reply_is_an_error(rogue: Path) -> None:
    assert "ended with status 0 and no reply" in fails(rogue, "quiet")


def test_a_hang_is_stopped_and_nothing_is_left(rogue: Path) -> None:
    start = time.monotonic()
    message = fails(rogue, "hang", options=Options(stall_s=4))
    assert "made no progress for 4 s and was stopped" in message
    assert time.monotonic() - start < 30
    assert all(gone(int(pid)) for pid in (rogue / "pids").read_text().split())


def test_the_whole_has_a_limit(rogue: Path) -> None:
    assert "did not end within 4 s" in fails(rogue, "hang", options=Options(limit_s=4))


def test_a_parent_that_is_killed_leaves_nothing(rogue: Path) -> None:
    program = dedent(f"""
        import sys
        from pathlib import Path
        from lilliput.artifact import Artifact
        from targets.devices.host import Device, Options
        from targets.request import *
        artifact = ArtifactReference.of(Artifact(Path({str(rogue)!r}), "checkpoint", "hang", 64, 0))
        task = GenerateTask(prompt=(1,))
        Device().open(Options()).run(Request(artifact=artifact, runtime="rogue", threads=1, tasks=(task,)))
    """)
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        until = time.monotonic() + 60
        while not (rogue / "pids").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.1)
        pids = [int(pid) for pid in (rogue / "pids").read_text().split()]
    finally:
        parent.kill()
        parent.wait()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize(("kind", "wanted"), [("nan", "logits are not all finite"), ("narrow", "logits are (100,)")])
def test_logits_that_cannot_be_judged_are_refused(rogue: Path, tmp_path: Path, kind: str, wanted: str) -> None:
    np.save(tmp_path / "tokens.npy", np.ones((1, 8), np.int32))
    np.save(tmp_path / "logits.npy", np.zeros((1, 4, 320), np.float32))
    logits = tmp_path / "logits.npy"
    task = AccuracyTask(
        tokens=tmp_path / "tokens.npy", scored_from=4, chunks=1, reference=logits, dequantized=logits,
        metrics_out=tmp_path / "m.npz",
    )  # fmt: skip
    assert wanted in fails(rogue, kind, task)


def test_a_missing_package_names_its_extra(rogue: Path) -> None:
    with pytest.raises(MissingPackageError, match=r"package_that_is_not_there.*lilliput\[rogue\]"):
        Device().open(DEFAULTS).run(request(rogue, "sound", runtime="absent"))


def test_progress_comes_through(rogue: Path) -> None:
    seen: list[tuple[int, int]] = []
    task = LatencyTask(tokens=(1, 2, 3), prompt_tokens=3, depths=(1, 2), blocks=3, steps=2)
    Device().open(DEFAULTS).run(request(rogue, "sound", task), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)


def test_the_host_is_described() -> None:
    host = Device().describe(DEFAULTS)
    probe = Device().open(DEFAULTS).probe()
    assert probe.host == host
    assert 0 < probe.free_memory_bytes <= host.memory_bytes
    assert probe.free_disk_bytes > 0
    assert 1 <= host.cores <= host.logical_cores
    assert host.memory_bytes <= psutil.virtual_memory().total
    assert host.cpu


def test_memory_and_disk_are_checked_before_work(tmp_path: Path) -> None:
    machine.check_memory(1, "nothing")
    machine.check_disk(tmp_path, 1, "nothing")
    with pytest.raises(MissingError, match=r"the model needs 1000000\.0 GB of memory"):
        machine.check_memory(10**15, "the model")
    with pytest.raises(MissingError, match=r"the model needs 1000000\.0 GB in"):
        machine.check_disk(tmp_path / "not" / "yet", 10**15, "the model")


def test_a_control_group_limits_memory_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("60000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 20000000\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert machine.memory_limit_bytes() == 100_000_000
    assert machine.available_memory_bytes() == 60_000_000
    assert machine.usable_cores() == 1
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_limit_bytes() == psutil.virtual_memory().total
