"""compare --measure: two artifacts timed in a process of their own, and the losses that validation kept, by limits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sample_artifact import publish
from tiny_models import tiny_quantized_model

from lilliput import cli, manifest, race
from lilliput.errors import ArtifactError, MeasurementError
from lilliput.progress import silent
from targets.duel import Rules
from targets.race import Request, Side, answer
from targets.request import ArtifactReference


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("race")
    return publish(tiny_quantized_model(folder / "model"), folder / "artifact")


def request(path: Path, **reference: object) -> Request:
    described = manifest.read(path)
    opened = ArtifactReference.of(described.open(path)).model_copy(update=reference)
    side = Side(artifact=opened, runtime="torch_cpu")
    return Request(a=side, b=side, threads=1, max_rise=0.5)


def with_chunks(monkeypatch: pytest.MonkeyPatch, a: list[float], b: list[float]) -> None:
    found = iter((np.array(a), np.array(b)))
    monkeypatch.setattr(race, "_chunks", lambda described: next(found))


def test_an_artifact_is_as_fast_as_itself(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line and the child process; a limit of half leaves room for a very busy machine."""
    with_chunks(monkeypatch, [0.1, 0.2], [0.1, 0.2])
    other = shutil.copytree(artifact, tmp_path / "other")
    code = cli.answer(["compare", str(artifact), str(other), "--measure", "--max-rise", "0.5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["speed"]["rounds"] >= 10
    assert found["speed"]["a_ms"] > 0
    assert found["loss"]["verdict"] == "PASS"
    assert found["speed"]["verdict"] != "FAIL"
    assert code == {"PASS": 0, "INCONCLUSIVE": 3}[found["speed"]["verdict"]]


def test_what_cannot_be_timed_is_said(artifact: Path) -> None:
    small = request(artifact, context=Rules().pairs + Rules().warm_up)
    assert answer(small, silent).error == "a context of less than 34 positions is too small to be timed"
    missing = request(artifact, main_file="nothing.json", folder=artifact / "nowhere")
    with pytest.raises(MeasurementError, match=r"nothing\.json against nothing\.json: "):
        race.measured(missing, silent)


def test_a_changed_artifact_is_not_raced(artifact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    (other / "model.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"model\.json has changed"):
        race.race(artifact, other, 0.02, silent)


def test_losses_are_judged_on_what_validation_kept(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = manifest.read(artifact)
    assert "the store no longer holds" in race.loss(described, described, 0.02).note
    a = [0.05, 0.11, 0.08, 0.2, 0.13, 0.06, 0.09, 0.15]
    with_chunks(monkeypatch, a, [1.1 * x for x in a])
    worse = race.loss(described, described, 0.02)
    assert (worse.verdict, worse.judgement and worse.judgement.finding) == ("FAIL", "worse")
    with_chunks(monkeypatch, a[:4], [1.1 * x for x in a[:4]])
    assert race.loss(described, described, 0.02).note == "4 chunks do not tell: raise evaluation.count"
    another = described.model_copy(update={"evaluation": described.evaluation.model_copy(update={"sha256": "0" * 64})})
    assert "do not compare" in race.loss(described, another, 0.02).note
