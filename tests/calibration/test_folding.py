"""Folded factors change no logit; the statistics are those of the folded model's own inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_source

from calibration.base import InputStatistics
from calibration.folding import FoldedStatistics, FoldedWeights, Folds, fold_moments, folds, sites
from calibration.samples import Provenance, Samples
from calibration.statistics import gather
from lilliput import decoder
from lilliput.grid import Float
from lilliput.model import SourceModel, role_of

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}), "gpt2": ("gpt2", {}), "untied": ("llama", {"tie_word_embeddings": False}),
    "one_kv_head": ("llama", {"num_key_value_heads": 1}), "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {"num_hidden_layers": 2}),
}  # fmt: skip


def source_of(kind: str, folder: Path) -> SourceModel:
    family, options = KINDS[kind]
    return tiny_source(folder, family, **options)


def random_folds(source: SourceModel, spread: float = 1.0) -> Folds:
    rng = np.random.default_rng(5)
    return folds(
        [(s, np.exp(spread * rng.normal(size=s.shared.max() + 1)).astype(np.float32)) for s in sites(source.config)]
    )


def logits(source: SourceModel) -> Float:
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, source.config.vocab_size, (2, 40)))
    with torch.inference_mode():
        found: Float = decoder.build(source)(tokens).numpy()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_every_matrix_and_no_logit(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path)
    weights = FoldedWeights(source.weights, random_folds(source))
    before, after = logits(source), logits(replace(source, weights=weights))
    assert np.abs(after - before).max() <= 2e-5 * np.abs(before).max()
    plain = {"embedding", *(f"layers.{i}.mlp.down" for i in range(2) if kind == "gpt2")}
    for name in source.weights:
        changed = not np.array_equal(weights[name], source.weights[name])
        assert changed == (role_of(name) != "vector" and name not in plain) or role_of(name) == "vector", name


@pytest.mark.parametrize("kind", KINDS)
def test_folded_statistics_are_those_of_the_folded_model(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path)
    made = random_folds(source, 0.3)
    tokens = np.random.default_rng(0).integers(0, 320, (4, 32)).astype(np.int32)
    samples = Samples(tokens, Provenance("text", "random tokens", "5" * 64, *tokens.shape))
    expected = gather(replace(source, weights=FoldedWeights(source.weights, made)), samples, tmp_path / "folded")
    found = FoldedStatistics(gather(source, samples, tmp_path / "plain"), made)
    assert list(found) == list(expected)
    assert len(found) == len(expected)
    for name, its in expected.items():
        size = np.sqrt(its.second_moments.diagonal())
        scale = size[:, None] * size
        assert np.abs(found[name].second_moments - its.second_moments).max() <= 1e-4 * scale.max(), name
        assert np.allclose(found[name].minimum, its.minimum, atol=1e-4 * size.max())
        assert np.allclose(found[name].maximum, its.maximum, atol=1e-4 * size.max())


def test_the_head_can_be_folded_only_where_it_is_not_the_embedding(tmp_path: Path) -> None:
    tied, untied = (sites(source_of(kind, tmp_path / kind).config) for kind in ("llama", "untied"))
    assert [site.readers for site in untied if site not in tied][-1] == ("head",)
    assert all("embedding" not in site.readers for site in [*tied, *untied])


def test_query_heads_of_one_kv_head_share_their_factors(tmp_path: Path) -> None:
    (site,) = [s for s in sites(source_of("llama", tmp_path).config) if s.readers == ("layers.0.attention.o",)]
    dims = np.arange(16)
    assert site.shared.tolist() == [*dims, *dims, *(dims + 16), *(dims + 16)]  # 4 query heads, 2 KV heads of 16


def test_moments_of_divided_inputs() -> None:
    rng = np.random.default_rng(0)
    x, s = rng.normal(size=(100, 7)), np.exp(rng.normal(size=7)).astype(np.float32)
    given = InputStatistics(
        (x.T @ x / 100).astype(np.float32), x.min(0).astype(np.float32), x.max(0).astype(np.float32), 100
    )
    found, y = fold_moments(given, s), x / s
    assert np.allclose(found.second_moments, y.T @ y / 100, rtol=1e-4, atol=1e-5)
    assert np.allclose(found.maximum, y.max(0), rtol=1e-5)
