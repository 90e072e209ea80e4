"""Keras models and SavedModels by tensorflow's converter: proven in two interpreters, or refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_keras

from lilliput import cli
from lilliput.converted.judged import agreement
from lilliput.static_network import NetworkReport

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and samples of tiny_keras, and answers.json."""
    made = tmp_path_factory.mktemp("keras")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tiny_keras.__file__, str(made)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return found


def network(folder: Path, model: str, out: Path, *more: str, samples: str = "images.npz") -> int:
    return cli.answer(
        ["network", str(folder / model), "--samples", str(folder / samples), "--out", str(out), "--json", *more]
    )


def test_a_keras_model_is_converted_and_both_interpreters_agree(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert network(folder, "cnn.keras", out) == 0
    report = NetworkReport.model_validate_json((out / "report.json").read_text())
    assert NetworkReport.model_validate_json(capfd.readouterr().out) == report
    assert "tensorflow 2" in report.solved["activations"]
    assert "Lilliput solved nothing" in report.solved["activations"]
    assert "Keras's own outputs" in report.proof
    assert (report.held_out, report.calibration_samples) == (3, tiny_keras.COUNT - 3)
    assert [gate.name for gate in report.gates] == ["integer_share", "sqnr_db", "agreement", "truth_check"]
    assert set(report.sqnr_db) == {"litert_static_cpu", "tensorflow_cpu"}
    assert min(report.sqnr_db.values()) > 30
    assert report.xnnpack is not None
    assert report.xnnpack.left == {"HARD_SWISH": 1}
    assert report.xnnpack.taken["CONV_2D"] == 3
    assert sorted(path.name for path in out.iterdir()) == [".lilliput", "model.tflite", "report.json"]


def test_what_stays_in_float_is_named_and_fails_its_gate(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert network(folder, "sine.keras", tmp_path / "out") == 1
    report = NetworkReport.model_validate_json(capfd.readouterr().out)
    assert {gate.name: gate.verdict for gate in report.gates}["integer_share"] == "FAIL"
    assert any(note.startswith("left in float: SIN ") for note in report.notes)


def test_a_refusal_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert network(folder, "lambda.keras", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a Lambda layer" in line
    assert network(folder, "cnn.keras", out, "--exporter", "onnx_qdq", "--chip", "sm8650") == 2
    assert "chooses its codes, not exporter, chip" in capsys.readouterr().err
    assert cli.answer(["network", str(folder / "cnn.keras"), "--out", str(out)]) == 2
    assert "needs --samples, an .npz" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("lambda", "has a Lambda layer, which is Python code"),
        ("foreign", "'OwnLayer' is no object of Keras's own"),
        ("dynamic", "input 'image' is (None, None, None, 3), wanted fixed sizes"),
        ("damaged zip", "Keras cannot open it"),
        ("damaged h5", "Keras cannot open it"),
        ("damaged folder", "tensorflow cannot open it"),
        ("reads", "runs ReadFile, which can touch files"),
        ("few", "5 samples, wanted 8 at least"),
        ("other", "image (24, 3, 12, 10), wanted image (n, 12, 10, 3)"),
        ("nan", "image is no array of finite numbers"),
        ("no npz", "not a readable .npz"),
        ("no input", "only ['x'], wanted image (n, 12, 10, 3)"),
    ],
)
def test_what_is_refused(answers: dict[str, Any], case: str, said: str) -> None:
    assert isinstance(answers[case], str), answers[case]
    assert said in answers[case]
    assert "\n" not in answers[case]


def test_inputs_and_outputs_keep_their_names(answers: dict[str, Any]) -> None:
    several = answers["several"]
    proof = several.pop("proof")
    assert several == {
        "input.x": [3, 1, 3], "input.first_x": [3, 1, 4], "input.tokens": [3, 1, 5],
        "output.sums": [3, 1, 2], "output.classes": [3, 1, 3],
    }  # fmt: skip
    for found in (proof, answers["h5"]["proof"], answers["sequential"]["proof"], answers["lambda allowed"]["proof"]):
        assert "Keras's own outputs within" in found


def test_the_agreements_bound_is_a_code_or_the_loss() -> None:
    rng = np.random.default_rng(0)
    exact = {"y": rng.standard_normal((4, 1, 64)).astype(np.float32)}
    step = {"y": 0.05}
    ours = {"y": np.rint(exact["y"] / 0.05).astype(np.float32) * np.float32(0.05)}
    theirs = {"y": ours["y"].copy()}
    theirs["y"][0, 0, :5] += np.float32(0.05)
    assert agreement(step, exact, ours, theirs).share == 1.0
    theirs["y"][1, 0, 3] += np.float32(0.1)
    found = agreement(step, exact, ours, theirs)
    assert found.share == 1 - 1 / 256
    assert found.farthest == pytest.approx(2, abs=1e-3)
    lossy = {"y": ours["y"] + np.float32(0.15)}  # three codes off float: two codes between them are within that loss
    assert agreement(step, exact, lossy, {"y": lossy["y"] + np.float32(0.1)}).share == 1.0
