"""ONNX Runtime's session: one cache in place, prompts in pieces, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_quantized_model

from exporters.onnx_int4 import Exporter, Options
from lilliput.artifact import Artifact
from lilliput.decoder import Decoder
from lilliput.errors import ArtifactError, InputError
from lilliput.trace import trace
from targets.runtimes import ort_cpu

CONTEXT = 32
TOKENS = [7, 300, 12, 12, 45, 1, 99, 210, 6, 30]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("ort")
    model = tiny_quantized_model(folder, request.param)
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, 8)
    (folder / "out").mkdir()
    return Exporter().export(model, traced, Options(), folder / "out", exact=True)


@pytest.fixture
def session(artifact: Artifact) -> Iterator[ort_cpu.Session]:
    opened = ort_cpu.Runtime().open(artifact, threads=1, exact=True)
    yield opened
    opened.close()


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.abs(a - b).max()) <= 1e-5 * float(b.std())


def test_prefill_equals_the_same_tokens_one_by_one(session: ort_cpu.Session) -> None:
    whole = session.prefill(TOKENS)
    session.reset()
    stepwise = [session.decode(token) for token in TOKENS]
    assert near(stepwise[-1], whole)
    assert not near(stepwise[-2], whole)


def test_a_prompt_in_pieces_equals_the_whole(session: ort_cpu.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = session.prefill(TOKENS)
    session.reset()
    monkeypatch.setattr(ort_cpu, "CHUNK", 3)
    assert near(session.prefill(TOKENS), whole)


def test_reset_forgets_and_logits_belong_to_the_caller(session: ort_cpu.Session) -> None:
    first = session.prefill(TOKENS)
    kept = first.copy()
    session.decode(5)
    assert np.array_equal(first, kept)
    session.reset()
    assert np.array_equal(session.prefill(TOKENS), kept)


def test_the_context_can_be_filled_and_not_exceeded(session: ort_cpu.Session) -> None:
    session.prefill([3] * (CONTEXT - 1))
    session.decode(4)
    with pytest.raises(InputError, match="1 tokens after 32: the artifact's context is 1 to 32 positions"):
        session.decode(4)
    with pytest.raises(InputError, match="0 tokens"):
        session.prefill([])


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        ort_cpu.Runtime().open(Artifact(tmp_path, "onnx_int4", "model.onnx", 32, 0), threads=1)


def test_versions_name_the_runtime() -> None:
    assert set(ort_cpu.Runtime().versions()) == {"onnxruntime"}
