"""A whole validation on the host, with torch as the runtime: figures, ladder, verdict, and what failures leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_setting import CHUNKS, LENGTH, Setting

from lilliput.artifact import Artifact, sha256
from lilliput.errors import MissingError, MissingPackageError
from lilliput.results import Gate, TargetResult
from targets import machine, sensors
from targets.devices.host import Device, HostConnection, Options
from targets.metrics import TokenMetrics
from targets.probe import Probe
from targets.validate import Candidate, Place, Protocol, References, Smoke, validate

PROTOCOL = Protocol(blocks=2, steps=4, prompt_tokens=16, shallow_tokens=4)
GATES = (Gate(metric="mean_kld", max=10), Gate(metric="top1_agreement", min=0.0), Gate(metric="peak_rss_mb", max=1e5))


def candidate(setting: Setting) -> Candidate:
    read = {**setting.model.quantized, **setting.model.floats}
    return Candidate("torch", setting.artifact, lambda: read, exact=setting.artifact)


def smoke(float_tokens: Sequence[int] = ()) -> Smoke:
    return Smoke("Hello", (5, 9, 200), (1,), lambda tokens: "+".join(map(str, tokens)), lambda: float_tokens, 6)


def run(
    setting: Setting, subject: Candidate, folder: Path, runtime: str = "torch_cpu", **changes: object
) -> TargetResult:
    given = {"smoke": smoke(), "limits": GATES} | changes
    folder.mkdir()
    references = References(setting.model, setting.evaluation, setting.float_model, setting.dequantized)
    place = Place(runtime, "host", Device().open(Options()), threads=1)
    return validate(subject, place, references, folder=folder, protocol=PROTOCOL, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> tuple[TargetResult, Path]:
    folder = tmp_path_factory.mktemp("validation") / "torch"
    return run(setting, candidate(setting), folder), folder


def test_the_ladder_of_torch_stands_on_its_dequantized_rung(
    setting: Setting, result: tuple[TargetResult, Path]
) -> None:
    ladder = {rung.rung: rung for rung in result[0].ladder}
    assert list(ladder) == ["float", "dequantized", "read_back", "exact", "shipped"]
    wanted = setting.dequantized.metrics().mean_kld
    for name in ("dequantized", "read_back", "exact", "shipped"):
        assert ladder[name].mean_kld == pytest.approx(wanted, rel=1e-4)  # type: ignore[index]
    for name in ("exact", "shipped"):
        assert ladder[name].step_kld == pytest.approx(0, abs=1e-9)  # type: ignore[index]
    assert ladder["exact"].tokens == LENGTH // 2
    assert ladder["shipped"].tokens == CHUNKS * LENGTH // 2


def test_all_figures_are_there(setting: Setting, result: tuple[TargetResult, Path]) -> None:
    found = result[0]
    assert found.notes == () or all("unstable" in note for note in found.notes)
    assert found.latency is not None
    assert found.latency.threads == 1
    assert [(d.depth_tokens, d.steps) for d in found.latency.depths] == [(4, 8), (32, 8)]
    assert found.memory is not None
    assert found.memory.peak_rss_bytes > found.memory.baseline_rss_bytes > 10_000_000
    assert found.accuracy is not None
    assert found.accuracy.tokens == CHUNKS * LENGTH // 2
    assert found.artifact.sha256 == sha256(setting.artifact.path)
    assert found.versions["torch"]
    assert found.host is not None
    assert found.host.device == "host"
    assert found.conditions is not None
    assert {s.kind for s in found.conditions.sensors} | set(found.conditions.absent) == set(sensors.KINDS)


def test_the_gates_are_the_three_and_the_recipes(result: tuple[TargetResult, Path]) -> None:
    names = [gate.name for gate in result[0].gates]
    assert names == ["read_back", "exact_step_kld", "generation", "mean_kld", "top1_agreement", "peak_rss_mb"]
    others = [gate.verdict for gate in result[0].gates if gate.name != "generation"]
    assert others == ["PASS"] * 5


def test_per_token_figures_stay_for_the_report(result: tuple[TargetResult, Path]) -> None:
    found, folder = result
    assert found.accuracy is not None
    assert TokenMetrics.load(folder / "shipped.npz").mean_kld == found.accuracy.mean_kld
    assert TokenMetrics.load(folder / "exact.npz").kld.shape == (1, LENGTH // 2)


def test_the_result_survives_json(result: tuple[TargetResult, Path]) -> None:
    assert TargetResult.model_validate_json(result[0].model_dump_json()) == result[0]


def test_an_artifact_of_other_codes_fails_at_read_back(setting: Setting, rogue: Path, tmp_path: Path) -> None:
    name = "layers.0.attention.q"
    tensor = setting.model.quantized[name]
    read = {**setting.model.quantized, **setting.model.floats, name: replace(tensor, codes=-tensor.codes // 2)}
    subject = replace(rogue_candidate(setting, rogue, "sound"), read=lambda: read)
    found = run(setting, subject, tmp_path / "v", runtime="rogue")
    assert found.verdict == "FAIL"
    assert found.gates[0].verdict == "FAIL"
    assert name in found.gates[0].note


def test_without_a_twin_the_exact_rung_is_inconclusive_by_name(setting: Setting, rogue: Path, tmp_path: Path) -> None:
    subject = replace(rogue_candidate(setting, rogue, "sound"), exact_missing="no float twin of this format")
    found = run(setting, subject, tmp_path / "v", runtime="rogue")
    assert found.gates[1].verdict == "INCONCLUSIVE"
    assert "no float twin of this format" in found.gates[1].note
    assert found.verdict in ("INCONCLUSIVE", "FAIL")


def rogue_candidate(setting: Setting, folder: Path, kind: str) -> Candidate:
    (folder / kind).write_text("the artifact")
    return replace(candidate(setting), artifact=Artifact(folder, "checkpoint", kind, 64, 0), exact=None)


def test_a_runtime_that_crashes_leaves_an_inconclusive_result_with_the_reason(
    setting: Setting, rogue: Path, tmp_path: Path
) -> None:
    found = run(setting, rogue_candidate(setting, rogue, "crash"), tmp_path / "v", runtime="rogue")
    assert found.verdict == "INCONCLUSIVE"
    assert (found.accuracy, found.latency, found.memory, found.generation) == (None, None, None, None)
    assert [note.split(":")[0] for note in found.notes] == ["accuracy", "exact", "latency"]
    assert "crashed with SIGSEGV" in found.notes[0]
    assert [g.verdict for g in found.gates] == ["PASS"] + ["INCONCLUSIVE"] * 5


def test_the_smallest_context_has_room_for_every_task(setting: Setting, rogue: Path, tmp_path: Path) -> None:
    subject = rogue_candidate(setting, rogue, "sound")
    small = replace(subject, artifact=replace(subject.artifact, context=8))
    found = run(setting, small, tmp_path / "v", runtime="rogue", smoke=replace(smoke(), max_tokens=24))
    assert found.latency is not None
    assert all(d.depth_tokens + d.steps // 2 <= 8 for d in found.latency.depths)  # two blocks
    assert found.latency.prompt_tokens == 8
    assert found.generation is not None
    assert len(found.generation.tokens) == 7


@pytest.mark.parametrize(("float_tokens", "verdict"), [((3,) * 6, "PASS"), ((3, 4), "FAIL")])
def test_one_token_over_and_over_fails_unless_the_float_model_does_so(
    setting: Setting, rogue: Path, tmp_path: Path, float_tokens: tuple[int, ...], verdict: str
) -> None:
    subject = rogue_candidate(setting, rogue, "stuck")
    found = run(setting, subject, tmp_path / "v", runtime="rogue", smoke=smoke(float_tokens))
    assert found.generation is not None
    assert found.generation.text == "3+3+3+3+3+3"
    assert found.gates[2].verdict == verdict


class Emulated(HostConnection):
    """This machine, as if another's processor were emulated on it."""

    def probe(self) -> Probe:
        seen = super().probe()
        return seen.model_copy(update={"host": seen.host.model_copy(update={"emulated": "an emulator"})})


def test_an_emulated_device_is_never_timed(setting: Setting, rogue: Path, tmp_path: Path) -> None:
    gates = (
        Gate(metric="decode_tokens_per_s", min=1),
        Gate(metric="peak_rss_mb", max=1e5),
        Gate(metric="size_mb", max=1),
    )
    subject, folder = rogue_candidate(setting, rogue, "sound"), tmp_path / "v"
    folder.mkdir()
    references = References(setting.model, setting.evaluation, setting.float_model, setting.dequantized)
    place = Place("rogue", "arm", Emulated(Options()), threads=1, board="raspberry-pi-5")
    found = validate(subject, place, references, smoke(), gates, folder, PROTOCOL)
    assert found.accuracy is not None
    assert found.generation is not None
    assert (found.latency, found.memory, found.conditions) == (None, None, None)
    assert [g.verdict for g in found.gates if g.name in ("decode_tokens_per_s", "peak_rss_mb", "size_mb")] == [
        "INCONCLUSIVE", "INCONCLUSIVE", "PASS",
    ]  # fmt: skip
    assert "latency: not measured: emulated by an emulator" in found.notes
    assert any("lacks asimd, asimdhp, asimddp of a Raspberry Pi 5" in note for note in found.notes)


def test_a_missing_package_is_an_error_of_its_own(setting: Setting, rogue: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError):
        run(setting, rogue_candidate(setting, rogue, "sound"), tmp_path / "v", runtime="absent")


def test_want_of_memory_is_seen_before_work(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1000)
    with pytest.raises(MissingError, match=r"measuring model\.json needs 0\.4 GB of memory"):
        run(setting, candidate(setting), tmp_path / "v")
