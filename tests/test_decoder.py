"""The generic decoder against transformers' own models: whole sequences, and the cache against whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from lilliput import decoder
from lilliput.model import SourceModel
from lilliput.proof import TOLERANCE, relative_error
from lilliput.trace import Step

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied GQA": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama MQA, wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama MHA, long rope": ("llama", {"num_key_value_heads": 4, "rope_theta": 1e6}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "mistral window": ("mistral", {}),
    "qwen2 tied": ("qwen2", {}),
    "qwen2 untied, windows from layer 1": (
        "qwen2",
        {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 untied MQA biases": (
        "qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 1, "attention_bias": True},
    ),
    "gemma2": ("gemma2", {}),
    "gemma3 one KV head": ("gemma3", {}),
    "gemma3 global rope scaled, logits capped": (
        "gemma3",
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_key_value_heads": 2,
         "final_logit_softcapping": 3.0},
    ),
    "gemma3 layers by name, untied": (
        "gemma3",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "tie_word_embeddings": False},
    ),
    "phi3 window": ("phi3", {"sliding_window": 8}),
    "phi3 partial longrope": (
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "num_key_value_heads": 4,
         "rope_scaling": {
             "type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0, 3.0, 4.0], "long_factor": [2.0] * 6}},
    ),
    "smollm3": ("smollm3", {}),
    "smollm3 windows where nothing rotates": ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    "llama linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama llama3": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 64}},
    ),
    "qwen2 yarn": (
        "qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "llama yarn, all its settings": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
                          "beta_slow": 0.5, "attention_factor": 0.8, "truncate": False}},
    ),
}  # fmt: skip
CONTEXT, PROMPT, STEPS = 24, 12, 6


@pytest.fixture(params=list(MODELS), scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceModel, Any]:
    """A tiny model as a source, and transformers' own."""
    kind, options = MODELS[request.param]
    source = tiny_models.tiny_source(tmp_path_factory.mktemp("hf"), kind, **options)
    return source, tiny_models.theirs(source)


def tokens(rows: int, steps: int) -> torch.Tensor:
    return torch.randint(0, tiny_models.VOCAB_SIZE, (rows, steps), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_are_transformers(model: tuple[SourceModel, Any]) -> None:
    source, theirs = model
    ids = tokens(3, 40)
    assert relative_error(decoder.build(source)(ids), theirs(ids).logits) <= TOLERANCE


@torch.no_grad()
def test_prefill_and_decode_through_the_cache_are_transformers(model: tuple[SourceModel, Any]) -> None:
    source, theirs = model
    ids = tokens(1, PROMPT + STEPS)
    wanted = theirs(ids).logits[0]  # (PROMPT + STEPS, vocab)
    step, config = Step(decoder.build(source), CONTEXT), source.config
    shape = (1, config.num_kv_heads, CONTEXT, config.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
    logits, caches = step(ids[0, :PROMPT].int(), torch.arange(PROMPT, dtype=torch.int32), caches)
    assert relative_error(logits[0, 0], wanted[PROMPT - 1]) <= TOLERANCE
    for position in range(PROMPT, PROMPT + STEPS):
        at = torch.tensor([position], dtype=torch.int32)
        logits, caches = step(ids[0, position : position + 1].int(), at, caches)
        assert relative_error(logits[0, 0], wanted[position]) <= TOLERANCE


@torch.no_grad()
def test_cache_slots_ahead_are_not_seen(model: tuple[SourceModel, Any]) -> None:
    """A cache that held another text before: slots beyond the position hold garbage, and must not matter."""
    source, _ = model
    step, config = Step(decoder.build(source), CONTEXT), source.config
    shape = (1, config.num_kv_heads, CONTEXT, config.head_dim)
    ids, positions = tokens(1, PROMPT)[0].int(), torch.arange(PROMPT, dtype=torch.int32)
    clean = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
    dirty = [(torch.full(shape, 7.0), torch.full(shape, -7.0)) for _ in range(config.num_layers)]
    assert torch.equal(step(ids, positions, clean)[0], step(ids, positions, dirty)[0])


def test_building_keeps_the_numbers(model: tuple[SourceModel, Any]) -> None:
    source, _ = model
    built = decoder.build(source)
    state = built.state_dict()
    assert set(state) == {decoder.torch_name(name) for name in source.config.parameter_shapes()}
    for name in source.config.parameter_shapes():
        assert torch.equal(state[decoder.torch_name(name)], torch.from_numpy(source.weights[name]))
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_rotation_keeps_lengths_and_depends_on_distance_only(tmp_path: Path) -> None:
    config = tiny_models.tiny_source(tmp_path).config
    cos, sin = decoder.rotary_tables(config, 32)
    assert cos.shape == sin.shape == (32, config.head_dim // 2)
    q, k = torch.randn(2, 1, config.head_dim, generator=torch.Generator().manual_seed(2))

    def score(at_q: int, at_k: int) -> float:
        return float(decoder.rotate(q, cos[at_q], sin[at_q]) @ decoder.rotate(k, cos[at_k], sin[at_k]).T)

    assert score(3, 1) == pytest.approx(score(30, 28), rel=1e-4)
    assert decoder.rotate(q, cos[9], sin[9]).norm() == pytest.approx(float(q.norm()), rel=1e-6)
