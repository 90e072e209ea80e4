"""README's tables of what is supported have the rows and columns that their command makes; cells say what was found."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import support_networks
import support_table
import tiny_models
from support_networks import TARGETS, Cell, Model, Target

from lilliput import registry
from targets.npu import qnn

CELL = re.compile(r"\d[\d.,e−-]*( \([\d.,e−-]+\))?|refused|not installed \(`[a-z-]+`\)")  # never a failure


@pytest.mark.parametrize(("index", "name"), list(enumerate(support_table.TABLES)))
def test_readme_has_the_rows_and_columns_that_the_command_makes(index: int, name: str) -> None:
    table = support_table.TABLES[name]
    readme = (support_table.ROOT / "README.md").read_text(encoding="utf-8")
    text = support_table.standing(readme)[index]
    found = support_table.by_label(text)
    assert list(found) == list(table.labels.values())
    assert text == table.text(found)
    for label, line in found.items():
        cells = line.strip("| ").split(" | ")[1:]
        assert len(cells) == len(table.columns), label
        assert all(CELL.fullmatch(cell) for cell in cells), line


def test_every_kind_of_decoder_and_every_network_exporter_and_runtime_has_its_place() -> None:
    assert set(support_table.LABELS) == {*tiny_models.KINDS, "gpt2"}
    assert {target.exporter for target in TARGETS.values()} <= set(registry.known("network_exporters"))
    assert {target.runtime for target in TARGETS.values()} <= set(registry.known("network_runtimes"))


def test_writing_replaces_the_rows_that_were_made_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (support_table.ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(before, encoding="utf-8")
    monkeypatch.setattr(support_table, "ROOT", tmp_path)
    label = support_networks.LABELS["cnn"]
    (old,) = [line for line in before.splitlines() if line.startswith(f"| {label} |")]
    support_table.write({"networks": {label: f"| {label} | new |"}})
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == before.replace(old, f"| {label} | new |")


def test_a_cell_is_a_figure_a_refusal_or_a_failure_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = support_networks.cnn(tmp_path)
    ours = TARGETS["ONNX Runtime, QDQ (a8)"]
    made = support_networks.cell(model, ours)
    figures = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", made.text)
    assert figures
    assert not made.failed
    assert float(figures[1]) == pytest.approx(float(figures[2]), abs=1.0)
    gone = support_networks.cell(Model(tmp_path / "gone.pt2", model.samples), ours)
    assert gone == Cell("refused")
    monkeypatch.setattr(support_networks, "LEAST_SQNR_DB", 150.0)
    (tmp_path / "onnx_qdq-ort_static_cpu").rename(tmp_path / "first")
    worse = support_networks.cell(model, ours)
    assert worse.failed
    assert worse.text == f"**fails** (sqnr_db {float(figures[1]):.3g})"


def test_a_missing_extra_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    monkeypatch.setattr(qnn, "_devices", qnn._devices.__wrapped__)  # its library is registered once a process
    npu = Target("onnx_qdq", "qnn_npu", "uint16")
    assert support_networks.cell(support_networks.cnn(tmp_path), npu) == Cell("not installed (`qnn`)")
