"""The benchmark of QAT from end to end on a tiny model: its rows, its gains, and that nothing is trained twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama

from benchmarks import qat
from calibration import qat as training


def test_every_grid_has_its_rows_and_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(tmp_path / "model", max_position_embeddings=512)
    given = ["--model", str(model), "--out", str(tmp_path / "out"), "--grid", "int2-b32"]
    given += ["--samples", '[{"samples": "builtin", "count": 3}, {"samples": "docstrings", "count": 1}]']
    given += ["--chunks", "2", "--minutes", "0.2", "--options", '{"precision": "float32"}']
    monkeypatch.setattr(sys, "argv", ["qat", *given])
    qat.main()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in rows] == [*qat.PTQ, "reconstructed", "QAT"]
    assert all(set(row["mean_kld"]) == {"samples", "builtin", "docstrings"} for row in rows)
    assert rows[-1]["steps"] >= 1
    assert rows[-1]["minutes"] >= 0.2
    assert "int2-b32: QAT below" in capsys.readouterr().out
    monkeypatch.setattr(training, "recover", None)
    qat.main()
    assert json.loads((tmp_path / "out" / "results.json").read_text())[-1]["mean_kld"] == rows[-1]["mean_kld"]
