"""Every decoder family as GGUF: llama.cpp computes what torch does, from rows and metadata as its architectures have
them; what they cannot compute is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ggml_gelu import ggml_gelu
from tiny_models import VOCAB_SIZE, quantize, tiny_source

import exporters.gguf_llamacpp as exporter
from exporters.gguf_llamacpp import architectures
from lilliput import decoder
from lilliput.artifact import Artifact
from lilliput.errors import ExportError
from lilliput.grid import Float, QuantizedTensor
from lilliput.model import DecoderConfig, QuantizedModel, SourceModel
from lilliput.trace import trace
from targets.runtimes.llamacpp_cpu import Runtime

CONTEXT, PROMPT = 96, 40
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 80).tolist()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0, 3.0, 4.0], "long_factor": [2.0] * 6}
# Kind of tiny_models and what differs. Windows are 8 positions, texts are longer; scales are those of llama.cpp.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama, linear": ("llama", {"rope_scaling": LINEAR}),
    "llama, yarn": ("llama", {"rope_scaling": YARN}),
    "llama, yarn with its own attention factor": ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.5}}),
    "llama, llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama, dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2, own head, yarn": ("qwen2", {"tie_word_embeddings": False, "rope_scaling": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3, one kv head": ("qwen3", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 32}),
    "gemma3, pattern of 3, linear, capped": (
        "gemma3",
        {"query_pre_attn_scalar": 32, "sliding_window_pattern": 3, "num_hidden_layers": 4, "rope_scaling": LINEAR,
         "final_logit_softcapping": 3.0},
    ),
    "gemma3, windows alone": (
        "gemma3", {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 3}
    ),
    "phi3": ("phi3", {}),
    "phi3, long and partial": (
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 128, "rope_scaling": LONGROPE},
    ),
    "smollm3": ("smollm3", {}),
}  # fmt: skip
GELU = ("gemma",)  # ggml looks GELU up in a table of float16


def export(model: QuantizedModel, folder: Path, *, exact: bool = False, context: int = CONTEXT) -> Artifact:
    folder.mkdir()
    with torch.device("meta"):
        traced = trace(decoder.Decoder(model.config), context, 8)
    return exporter.Exporter().export(model, traced, exporter.Options(), folder, exact=exact)


def reference(model: QuantizedModel) -> Float:
    """(T, vocab) logits of the dequantized weights in torch."""
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    source = SourceModel(model.name, model.config, weights, model.tokenizer, "", "")
    with torch.inference_mode():
        return np.asarray(decoder.build(source)(torch.tensor([TOKENS]))[0].numpy())


def computed(artifact: Artifact, tokens: list[int] = TOKENS) -> Float:
    """(T - PROMPT + 1, vocab) logits after a prompt and after each token behind it."""
    session = Runtime().open(artifact, 1, exact=True)
    found = [session.prefill(tokens[:PROMPT]), *(session.decode(token) for token in tokens[PROMPT:])]
    session.close()
    return np.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_twin_computes_what_torch_does(tmp_path: Path, family: str) -> None:
    """Prefill and decode, beyond the window where there is one."""
    kind, options = FAMILIES[family]
    model = quantize(tiny_source(tmp_path, kind, **options))
    wanted = reference(model)[PROMPT - 1 :]
    error = np.abs(computed(export(model, tmp_path / "exact", exact=True)) - wanted).max() / wanted.std()
    assert error <= (5e-3 if family.startswith(GELU) else 1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemmas_differ_by_ggmls_table_of_gelu_alone(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = FAMILIES[family]
    model = quantize(tiny_source(tmp_path, kind, **options))
    seen = computed(export(model, tmp_path / "exact", exact=True))
    monkeypatch.setattr(torch.nn.functional, "gelu", ggml_gelu)
    wanted = reference(model)[PROMPT - 1 :]
    largest = np.abs(seen - wanted).max(axis=1) / wanted.std()
    assert np.median(largest) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    kind, options = FAMILIES[family]
    model = quantize(tiny_source(tmp_path, kind, **options))
    artifact = export(model, tmp_path / "out")
    weights = exporter.read(artifact.path)
    assert set(weights) == set(model.config.parameter_shapes())
    for name, tensor in model.quantized.items():
        stored = weights[name]
        assert isinstance(stored, QuantizedTensor)
        assert stored.same_as(tensor), name
    for name, values in model.floats.items():
        assert np.array_equal(np.asarray(weights[name]), values), name
    found = exporter.read_config(gguf.GGUFReader(artifact.path))
    assert float_free(found) == float_free(model.config)
    ours, theirs = (decoder.rope_tables(config, CONTEXT) for config in (model.config, found))
    assert set(ours) == set(theirs)
    assert all(np.allclose(ours[name], theirs[name], rtol=0, atol=2e-6) for name in ours)


def float_free(config: DecoderConfig) -> DecoderConfig:
    """Without the numbers that the file holds in float32, and the scaling, which a tensor may hold in another form."""
    return replace(
        config, norm_eps=0.0, rope_scaling=None, embedding_scale=round(config.embedding_scale, 5),
        attention_scale=round(config.score_scale, 6),
    )  # fmt: skip


def test_a_window_that_llama_cpp_has_not_bounds_the_context(tmp_path: Path) -> None:
    model = quantize(tiny_source(tmp_path, "mistral", sliding_window=64))
    with pytest.raises(ExportError, match=r"no sliding window in architecture llama.*choose context ≤ 64"):
        export(model, tmp_path / "long")
    artifact = export(model, tmp_path / "short", exact=True, context=64)
    assert artifact.notes[0].startswith("sliding window: llama.cpp has none in llama")
    file = gguf.GGUFReader(artifact.path)
    assert file.get_field("llama.context_length").contents() == 64
    wanted = reference(model)[PROMPT - 1 : 64]
    assert np.abs(computed(artifact, TOKENS[:64]) - wanted).max() <= 1e-4 * wanted.std()


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("gemma3", {}, r"gemma3 has a scale of scores of 0\.176777, the model 0\.204124"),
        ("gemma3", {"query_pre_attn_scalar": 32, "attention_bias": True}, r"gemma3 has no bias of attention\.k"),
        ("gemma2", {"query_pre_attn_scalar": 16, "final_logit_softcapping": None}, "always has soft caps"),
        ("qwen2", {"rope_scaling": LLAMA3}, "qwen2 has no RoPE scaling 'llama3', only linear, yarn"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": 16.0}}, "yarn's betas .* alone"),
        ("qwen2", {"head_dim": 32}, "heads that fill the hidden size"),
        ("smollm3", {"no_rope_layer_interval": 2}, "rotates in all but each fourth layer"),
        ("smollm3", {"mlp_bias": True}, r"no bias of mlp\.down, mlp\.gate, mlp\.up"),
        (
            "gemma3",
            {"query_pre_attn_scalar": 32, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            r"windows of \[0, 8, 0\] positions, layer by layer, are no pattern of llama\.cpp's",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, kind: str, options: dict[str, Any], why: str
) -> None:
    model = quantize(tiny_source(tmp_path, kind, **options))
    with pytest.raises(ExportError, match=why):
        export(model, tmp_path / "out")


def test_a_feature_that_an_architecture_lacks_is_named(tmp_path: Path) -> None:
    config = replace(tiny_source(tmp_path).config, qk_norm=True, logit_softcap=2.0)
    with pytest.raises(ExportError, match="architecture llama has no logit_softcap, qk_norm"):
        architectures.fitted(config, None)
