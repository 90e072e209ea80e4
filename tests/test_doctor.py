"""The doctor: what is needed and missing, each with its fix, and runtimes that crash in their own process."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lilliput import cli, doctor
from lilliput.doctor import Check
from lilliput.listing import Entry

TORCH = {"torch": "2.13.0"}


def only(checks: Iterator[Check]) -> Check:
    (check,) = checks
    return check


def test_metadata_names_base_and_extras() -> None:
    wanted = doctor.requirements()
    assert {"torch", "numpy", "typer", "pyyaml"} <= set(wanted[""])
    assert "onnxruntime" in wanted["onnx"]
    assert "llama-cpp-python" in wanted["llamacpp"]
    assert "lilliput" not in {name for names in wanted.values() for name in names}


def test_constraints_are_found_and_are_what_is_installed_here() -> None:
    tested = doctor.constraints()
    assert tested["typer"] == version("typer")


def test_missing_base_package_is_missing_and_names_itself() -> None:
    check = doctor._package_check("", {"torch": "2.13.0", "numpy": None}, TORCH)
    assert (check.status, check.fix) == ("missing", "pip install lilliput")
    assert check.seen == "not installed: numpy"


def test_missing_extra_is_a_warning_with_its_extra() -> None:
    check = doctor._package_check("onnx", {"onnx": "1.23.2", "onnxruntime": None}, {})
    assert (check.status, check.fix) == ("warning", 'pip install "lilliput[onnx]"')


def test_another_version_than_tested_is_a_warning_with_the_pin() -> None:
    check = doctor._package_check("", {"torch": "2.12.0+cpu"}, TORCH)
    assert (check.status, check.fix) == ("warning", "pip install torch==2.13.0")
    assert "torch 2.12.0+cpu (tested: 2.13.0)" in check.seen


def test_a_local_build_of_the_tested_version_is_ok() -> None:
    assert doctor._package_check("", {"torch": "2.13.0+cpu"}, TORCH).status == "ok"


def test_a_checkout_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    check = only(doctor._packages())
    assert check.status == "missing"
    assert "pip install --editable" in check.fix


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 2**30, available=2**30))
    monkeypatch.setattr(doctor, "_cgroup_limit_bytes", lambda: None)
    check = doctor._memory()
    assert check.status == "warning"
    assert check.seen.startswith("1.0 GiB available of 8.0 GiB")
    assert check.fix


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * 2**30, available=60 * 2**30))
    monkeypatch.setattr(doctor, "_cgroup_limit_bytes", lambda: 4 * 2**30)
    check = doctor._memory()
    assert check.status == "warning"
    assert "container limit 4.0 GiB" in check.seen


def test_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=2**30)

    monkeypatch.setattr("shutil.disk_usage", usage)
    check = doctor._disk(tmp_path / "not" / "yet")
    assert asked == [tmp_path]
    assert check.status == "warning"


def test_a_folder_that_cannot_be_written_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    check = doctor._disk(tmp_path)
    assert check.status == "missing"
    assert "--out" in check.fix


def test_instruction_sets_without_avx2_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: "processor: 0\nflags\t\t: sse4_2 fma f16c\n")
    check = only(doctor._instruction_sets())
    assert check.status == "warning"
    assert "without avx2" in check.seen


def test_unknown_processors_are_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert only(doctor._instruction_sets()).seen.startswith("not known for")


def test_torch_runtime_opens_in_a_child() -> None:
    versions, trouble = doctor.open_runtime("torch_cpu")
    assert trouble is None
    assert versions["torch"] == version("torch")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crashed with signal 11"),
        ("raise ImportError('libfoo.so is missing')", "ImportError: libfoo.so is missing"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
    ],
)
def test_a_runtime_that_breaks_takes_only_its_child_along(
    monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "OPEN", code)
    monkeypatch.setattr(doctor, "OPEN_TIMEOUT_S", 1)
    versions, trouble = doctor.open_runtime("any")
    assert versions == {}
    assert trouble is not None
    assert said in trouble


def opening(monkeypatch: pytest.MonkeyPatch, **troubles: str | None) -> None:
    monkeypatch.setattr(doctor, "entries", lambda kind: [Entry(name, "") for name in troubles])
    monkeypatch.setattr(doctor, "open_runtime", lambda name: ({"it": "1"}, troubles[name]))


def test_no_runtime_at_all_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch, ort_cpu="no module", torch_cpu=None)
    found = list(doctor._runtimes(None))
    assert [(c.name, c.status) for c in found] == [
        ("runtime ort_cpu", "warning"), ("runtime torch_cpu", "ok"), ("runtimes", "missing"),
    ]  # fmt: skip
    assert found[0].fix == 'pip install "lilliput[onnx]"'


def test_a_runtime_that_a_recipe_names_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    opening(monkeypatch, ort_cpu="no module", llamacpp_cpu=None)
    assert [c.status for c in doctor._runtimes(("llamacpp_cpu",))] == ["warning", "ok"]
    assert [c.status for c in doctor._runtimes(("ort_cpu",))] == ["missing", "ok"]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("missing", 4)])
def test_exit_code_and_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, status: doctor.Status, code: int
) -> None:
    fix = "" if status == "ok" else 'pip install "lilliput[onnx]"'
    monkeypatch.setattr(doctor, "examine", lambda folder, needed: [Check("packages [onnx]", status, "seen [so]", fix)])
    assert cli.answer(["doctor"]) == code
    out = capsys.readouterr().out
    assert status in out
    assert "packages [onnx]" in out
    assert fix in out
    assert cli.answer(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)[0]["status"] == status
