"""The ladder's rungs: what identical bits save, and what one changed bit costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_setting import CHUNKS, Setting

from lilliput.grid import QuantizedTensor
from targets import ladder
from targets.ladder import Read


def as_read(setting: Setting) -> dict[str, QuantizedTensor | np.ndarray]:
    return {**setting.model.quantized, **setting.model.floats}


def rung(setting: Setting, read: Read, scratch: Path) -> tuple[ladder.Rung, ladder.ReadBack]:
    logits = setting.float_model, setting.dequantized
    return ladder.read_back_rung(setting.model, read, setting.evaluation, logits, scratch)


def test_identical_bits_are_said_and_not_computed_again(setting: Setting, tmp_path: Path) -> None:
    found, read_back = rung(setting, as_read(setting), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert found.mean_kld == setting.dequantized.metrics().mean_kld
    assert found.step_kld == 0.0
    assert read_back.differing == ()
    assert found.note == f"all {len(as_read(setting))} parameters identical, bit for bit"


def test_equal_floats_are_identical_to_the_codes_that_they_came_from(setting: Setting) -> None:
    read = {name: setting.model.dequantized(name) for name in as_read(setting)}
    assert ladder.compare_weights(setting.model, read).differing == ()


@pytest.mark.parametrize("name", ["layers.1.mlp.down", "embedding"])
def test_one_changed_code_is_named_and_its_cost_computed(setting: Setting, tmp_path: Path, name: str) -> None:
    read = as_read(setting)
    tensor = setting.model.quantized[name]
    codes = tensor.codes.copy()
    codes[:, 3] = np.where(codes[:, 3] > 0, -7, 7)
    read[name] = replace(tensor, codes=codes)
    found, read_back = rung(setting, read, tmp_path / "logits")
    assert read_back.differing == (name,)
    assert name in found.note
    assert found.step_kld is not None
    assert found.step_kld > 1e-6
    assert found.mean_kld != setting.dequantized.metrics().mean_kld


def test_a_parameter_that_the_file_lacks_differs(setting: Setting, tmp_path: Path) -> None:
    read = as_read(setting)
    del read["norm"]
    found, read_back = rung(setting, read, tmp_path / "logits")
    assert read_back.differing == ("norm",)
    assert found.step_kld == pytest.approx(0.0, abs=1e-12)


def test_a_float_of_other_bits_differs(setting: Setting) -> None:
    read = as_read(setting)
    norm = setting.model.floats["norm"]
    read["norm"] = norm.astype(np.float16).astype(np.float32)
    assert ladder.compare_weights(setting.model, read).differing == ("norm",)


def test_the_exact_rung_on_fewer_chunks_is_moved_to_all_of_them(setting: Setting) -> None:
    """An exact twin that computes just what torch does stands where the dequantized rung stands."""
    dequantized = setting.dequantized.metrics()
    found = ladder.exact_rung(dequantized.first(1), "", dequantized)
    assert found.mean_kld == pytest.approx(dequantized.mean_kld, rel=1e-12)
    assert found.tokens == setting.evaluation.scored
    assert f"first 1 of {CHUNKS} chunks" in found.note
    first = dequantized.first(1)
    moved = ladder.exact_rung(replace(first, kld=first.kld + 0.25, step_kld=first.step_kld + 0.5), "", dequantized)
    assert moved.mean_kld == pytest.approx(dequantized.mean_kld + 0.25)
    assert moved.step_kld == pytest.approx(0.5)


def test_a_rung_that_was_not_measured_says_why(setting: Setting) -> None:
    dequantized = setting.dequantized.metrics()
    for found in (ladder.exact_rung(None, "it hung", dequantized), ladder.shipped_rung(None, "it hung")):
        assert (found.mean_kld, found.step_kld, found.tokens, found.note) == (None, None, 0, "it hung")


def test_the_first_rungs(setting: Setting) -> None:
    dequantized = setting.dequantized.metrics()
    of_float, of_dequantized = ladder.first_rungs(dequantized)
    assert (of_float.rung, of_float.mean_kld) == ("float", 0.0)
    assert (of_dequantized.mean_kld, of_dequantized.step_kld) == (dequantized.mean_kld, 0.0)
