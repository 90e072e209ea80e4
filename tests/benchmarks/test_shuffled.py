"""The shuffled model is the same function with other blocks, and opens as a Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_llama, tiny_source

from benchmarks import shuffled
from lilliput.errors import ExportError
from lilliput.model import role_of


def test_the_folder_holds_the_same_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lilliput import source

    model = tiny_llama(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["shuffled", str(tmp_path / "made"), "--model", str(model)])
    shuffled.main()
    for folder in ("model", "made"):
        source.load(str(tmp_path / folder), tmp_path / f"{folder}.stage", proof=False)
    one, other = (source.open_stage(tmp_path / f"{folder}.stage") for folder in ("model", "made"))
    assert shuffled.difference(one, other) < 1e-4
    for name in one.config.parameter_shapes():
        if role_of(name) != "vector":
            assert not np.array_equal(one.weights[name], other.weights[name]), name
            assert np.array_equal(np.sort(one.weights[name], None), np.sort(other.weights[name], None)), name


def test_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="family 'gpt2'"):
        shuffled.shuffled(tiny_source(tmp_path, "gpt2"))
