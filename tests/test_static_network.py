"""`lilliput network`: from a source to a proven file, with gates that fail; bad samples are refused in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import VOCAB, cnn, encoder, images

from lilliput import cli
from lilliput.static_network import NetworkReport

with_qnn = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="the extra qnn is not installed"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CNN as a .pt2, with 24 samples beside it."""
    folder = tmp_path_factory.mktemp("program")
    batches = images(24)
    torch.export.save(torch.export.export(cnn(), (batches[0]["image"],)), folder / "digits.pt2")
    np.savez(folder / "samples.npz", x=torch.cat([batch["image"] for batch in batches]).numpy())
    np.savez(folder / "few.npz", x=np.zeros((3, 1, 12, 12), np.float32))
    np.savez(folder / "other.npz", x=np.zeros((9, 3, 12, 12), np.float32))
    return folder


def answer(program: Path, out: Path, *more: str) -> int:
    source = (str(program / "digits.pt2"), "--allow-pickle", "--out", str(out))
    return cli.answer(["network", *source, "--samples", str(program / "samples.npz"), *more])


def test_a_cnn_is_quantized_exported_and_proven(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(program, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "PASS reads_back: 1" in shown
    report = NetworkReport.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert (report.verdict, report.differences, report.held_out, report.calibration_samples) == ("PASS", (), 3, 21)
    assert min(report.sqnr_db.values()) > 30
    assert (tmp_path / "out" / report.file).stat().st_size == report.size_bytes


def test_an_encoder_is_calibrated_on_text(tmp_path: Path) -> None:
    encoder().model.save_pretrained(tmp_path / "tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "the", "of", "and", "is"]
    (tmp_path / "tiny" / "vocab.txt").write_text("\n".join(words + [f"[unused{i}]" for i in range(VOCAB - len(words))]))
    (tmp_path / "tiny" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    out = tmp_path / "out"
    assert cli.answer(["network", str(tmp_path / "tiny"), "--positions", "12", "--out", str(out)]) == 0
    report = NetworkReport.model_validate_json((out / "report.json").read_text())
    assert report.sqnr_db["runtime"] > 30
    assert any("masks" in note for note in report.notes)


@with_qnn
def test_the_npus_share_is_a_gate_and_it_can_be_the_runtime(
    program: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ("--chip", "sm8550", "--runtime", "qnn_npu", "--json")
    assert answer(program, tmp_path / "out", *more) == 0
    report = NetworkReport.model_validate_json(capfd.readouterr().out)
    assert report.coverage is not None
    assert (report.coverage.method, report.coverage.share) == ("compiled", 1.0)
    assert [gate.name for gate in report.gates] == ["reads_back", "sqnr_db", "npu_share"]
    assert answer(program, tmp_path / "part", "--integer", "matrices", *more[:2], "--json") == 1
    report = NetworkReport.model_validate_json(capfd.readouterr().out)
    assert report.coverage is not None
    assert report.coverage.elsewhere
    assert [gate.verdict for gate in report.gates if gate.name == "npu_share"] == ["FAIL"]


def test_gates_fail_by_name(program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--activations", "uint8", "--integer", "matrices", "--min-sqnr", "90", "--json")
    assert answer(program, tmp_path / "out", *more) == 1
    report = json.loads(capsys.readouterr().out)
    gates = {gate["name"]: gate["seen"] >= gate["least"] for gate in report["gates"]}
    assert gates == {"reads_back": True, "sqnr_db": False}
    assert report["verdict"] == "FAIL"


def test_bad_requests_are_refused(program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, named in (
        (("--samples", str(program / "few.npz")), "3 samples, wanted 8 at least"),
        (("--samples", str(program / "other.npz")), "wanted x (n, 1, 12, 12)"),
        (("--samples", str(program / "digits.pt2")), "no tokenizer: give --samples, an .npz"),
        (("--activations", "float8"), "--activations: input should be 'uint8', 'int8', 'uint16' or 'int16'"),
        (("--exporter", "onnx"), "unknown network_exporter 'onnx'"),
        (("--chip", "sm1"), "unknown SoC 'sm1'"),
    ):
        assert answer(program, tmp_path / "out", *more) == 2, more
        assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.answer(["network", str(program / "digits.pt2"), "--out", str(tmp_path / "out")]) == 2
    assert "pickles can run code" in capsys.readouterr().err
