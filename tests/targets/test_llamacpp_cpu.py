"""llama.cpp as a runtime: the exact twin against torch, the session's protocol, its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ggml_gelu import ggml_gelu
from tiny_models import VOCAB_SIZE, tiny_quantized_model, tiny_source

import exporters.gguf_llamacpp as exporter
from calibration.solve import solve
from lilliput import decoder
from lilliput.artifact import Artifact
from lilliput.errors import MeasurementError
from lilliput.grid import GGUF_GRIDS, Float
from lilliput.model import QuantizedModel, SourceModel
from lilliput.recipe_schema import Rule
from targets.runtimes.llamacpp_cpu import N_BATCH, LlamaCppSession, Runtime

CONTEXT = 256
PROMPT = 40
THREADS = 1  # two that wait for each other are slow wherever something else runs
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 96).tolist()
VARIANTS = {
    "llama": ("llama", {}),
    "llama with biases and its own head": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama with wide heads": ("llama", {"head_dim": 32, "rope_theta": 5e5}),
}


def artifact_of(model: QuantizedModel, folder: Path, *, exact: bool = False, context: int = CONTEXT) -> Artifact:
    folder.mkdir(parents=True)
    exporter.write(model, folder / exporter.MAIN_FILE, exact=exact)
    return Artifact(folder, "gguf_llamacpp", exporter.MAIN_FILE, context, 0)


def reference(model: QuantizedModel, tokens: list[int]) -> Float:
    """(T, vocab) log-probabilities of the dequantized weights in torch."""
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    source = SourceModel(model.name, model.config, weights, model.tokenizer, "", "")
    with torch.inference_mode():
        logits = decoder.build(source)(torch.tensor([tokens]))[0]
    return np.asarray(torch.log_softmax(logits.double(), -1))


def log_softmax(logits: Float) -> Float:
    return np.asarray(torch.log_softmax(torch.from_numpy(logits).double(), -1))


def runtime_log_probabilities(artifact: Artifact, *, exact: bool) -> Float:
    """(T - PROMPT + 1, vocab) from a prompt of PROMPT tokens and the rest decoded."""
    session = Runtime().open(artifact, THREADS, exact=exact)
    found = [session.prefill(TOKENS[:PROMPT])] + [session.decode(token) for token in TOKENS[PROMPT:]]
    session.close()
    return np.stack([log_softmax(logits) for logits in found])


def divergences(p: Float, q: Float) -> Float:
    """Kullback-Leibler divergence (T,) of log-probabilities (T, vocab)."""
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exact_twin_computes_what_torch_does(tmp_path: Path, variant: str) -> None:
    """Prefill, then decode: every log-probability within 1e-4 of torch's."""
    kind, overrides = VARIANTS[variant]
    model = tiny_quantized_model(tmp_path, kind, **overrides)
    found = runtime_log_probabilities(artifact_of(model, tmp_path / "exact", exact=True), exact=True)
    assert np.abs(found - reference(model, TOKENS)[PROMPT - 1 :]).max() <= 1e-4


def test_the_exact_twin_of_a_gpt2_differs_by_ggmls_table_of_gelu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is compiled into ggml. The divergence from plain torch is below 1e-6; with the same table in torch the
    log-probabilities agree as Llama's do, but where an input lies at a rounding edge of the table."""
    model = tiny_quantized_model(tmp_path, "gpt2")
    found = runtime_log_probabilities(artifact_of(model, tmp_path / "exact", exact=True), exact=True)
    assert divergences(reference(model, TOKENS)[PROMPT - 1 :], found).max() <= 1e-6
    monkeypatch.setattr(torch.nn.functional, "gelu", ggml_gelu)
    largest = np.abs(found - reference(model, TOKENS)[PROMPT - 1 :]).max(axis=1)  # (T,)
    assert np.median(largest) <= 1e-5
    assert largest.max() <= 1e-3


def test_the_shipped_file_is_near(tmp_path: Path) -> None:
    """8-bit activations and a float16 cache: no more than a small step from the same weights in torch."""
    model = tiny_quantized_model(tmp_path)
    found = runtime_log_probabilities(artifact_of(model, tmp_path / "shipped"), exact=False)
    kld = divergences(reference(model, TOKENS)[PROMPT - 1 :], found)
    assert 0 < kld.mean() < 0.02


@pytest.mark.parametrize("name", ["int5-b32", "int5-b32-min-f16", *GGUF_GRIDS])
def test_a_file_of_each_grid_is_near(tmp_path: Path, name: str) -> None:
    """llama.cpp's kernels of each block type on the file's own bytes, which are read back bit for bit."""
    source = tiny_source(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    model = solve(source, (Rule.model_validate({"match": "*", "grid": name, "solver": "rtn"}),), None)
    artifact = artifact_of(model, tmp_path / "shipped")
    stored = exporter.read(artifact.path)
    for parameter, tensor in model.quantized.items():
        assert tensor.same_as(stored[parameter])  # type: ignore[arg-type]
    found = runtime_log_probabilities(artifact, exact=False)
    kld = divergences(reference(model, TOKENS)[PROMPT - 1 :], found)
    assert 0 < kld.mean() < 0.02


@pytest.fixture
def session(tmp_path: Path) -> LlamaCppSession:
    model = tiny_quantized_model(tmp_path, max_position_embeddings=2048)
    return Runtime().open(artifact_of(model, tmp_path / "out", exact=True, context=1024), THREADS, exact=True)


def test_reset_forgets(session: LlamaCppSession) -> None:
    first = session.prefill(TOKENS[:10])
    session.decode(TOKENS[10])
    session.reset()
    assert np.array_equal(session.prefill(TOKENS[:10]), first)


def test_logits_are_the_callers_own(session: LlamaCppSession) -> None:
    first = session.prefill(TOKENS[:10])
    kept = first.copy()
    session.decode(TOKENS[10])
    assert np.array_equal(first, kept)
    assert (first.dtype, first.shape) == (np.float32, (VOCAB_SIZE,))


def test_a_prompt_longer_than_a_batch_is_one_prompt(session: LlamaCppSession) -> None:
    tokens = (TOKENS * 8)[: N_BATCH + 88]
    whole = session.prefill(tokens)
    session.reset()
    for token in tokens[:40]:
        session.decode(token)
    pieces = session.prefill(tokens[40:])
    assert np.abs(whole - pieces).max() <= 1e-4


def test_a_full_context_is_an_error(session: LlamaCppSession) -> None:
    with pytest.raises(MeasurementError, match="1025 tokens do not fit the context of 1024"):
        session.prefill((TOKENS * 11)[:1025])


def test_a_damaged_file_is_an_error_with_llama_cpps_reason(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 40)
    with pytest.raises(MeasurementError, match=r"llama\.cpp cannot load .*model\.gguf: .*\w"):
        Runtime().open(Artifact(tmp_path, "gguf_llamacpp", "model.gguf", CONTEXT, 0), 1)


def test_nothing_is_logged_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = Runtime().open(artifact_of(tiny_quantized_model(tmp_path), tmp_path / "out"), 1)
    session.prefill(TOKENS[:4])
    session.close()
    assert capfd.readouterr() == ("", "")


def test_versions_are_told() -> None:
    assert Runtime().versions()["llama-cpp-python"].count(".") == 2
