"""The streaming pass against transformers' own modules, whose linears are watched by hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import theirs, tiny_source

from calibration import statistics
from calibration.samples import Provenance, Samples
from calibration.statistics import Statistics, Without, gather
from lilliput.errors import CalibrationError
from lilliput.families import gemma3, llama
from lilliput.model import SourceModel, role_of

NAMES = {"gemma2": gemma3.LAYER, "gemma3": gemma3.LAYER}


def random_samples(source: SourceModel, count: int = 6, length: int = 24) -> Samples:
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (count, length)).astype(np.int32)
    return Samples(tokens, Provenance("text", "random", "0" * 64, count, length))


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("qwen3", True), ("gemma2", True), ("gemma3", False)]
)
def test_statistics_are_those_of_transformers_linears(
    kind: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "PANEL", 48)  # several panels, the last one short
    monkeypatch.setattr(statistics, "BATCH_TOKENS", 50)  # two samples a batch
    source = tiny_source(tmp_path, kind, tie_word_embeddings=tied)
    samples = random_samples(source)
    found = gather(source, samples, tmp_path / "stage")
    model, names_in_layer = theirs(source), NAMES.get(kind, llama.LAYER)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, -2).double()}))
    with torch.inference_mode():
        model(torch.from_numpy(samples.tokens.astype(np.int64)))
    for name, got in found.items():
        index, inner = name.split(".", 2)[1:] if "." in name else ("", "")
        x = seen[f"model.layers.{index}.{names_in_layer[inner]}" if inner else "lm_head"].numpy()
        expected = x.T @ x / len(x)
        assert np.allclose(got.second_moments, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()), name
        assert np.array_equal(got.second_moments, got.second_moments.T)
        assert np.allclose(got.minimum, x.min(0), atol=1e-4)
        assert np.allclose(got.maximum, x.max(0), atol=1e-4)
        assert got.count == samples.tokens.size
    names = {n for n in source.config.parameter_shapes() if role_of(n) in ("linear", "head")}
    assert set(found) == names | ({"embedding"} if tied else set())
    assert len(found) == len(set(found))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_statistics_repeat_bit_for_bit_and_open_again(kind: str, tmp_path: Path) -> None:
    source = tiny_source(tmp_path, kind)
    steps: list[tuple[int, int]] = []
    first = gather(source, random_samples(source), tmp_path / "a", lambda *step: steps.append(step))
    gather(source, random_samples(source), tmp_path / "b")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["final.safetensors", "layer_000.safetensors", "layer_001.safetensors", "samples.json"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert steps == [(1, 2), (2, 2)]
    again = Statistics(tmp_path / "a")
    assert list(again) == list(first)
    assert again.samples == first.samples
    assert "embedding" in again
    assert "position_embedding" not in again
    for name in again:
        assert np.array_equal(again[name].second_moments, first[name].second_moments)


def test_linears_of_one_input_share_their_statistics(tmp_path: Path) -> None:
    source = tiny_source(tmp_path)
    found = gather(source, random_samples(source), tmp_path / "stage")
    for shared in (("attention.q", "attention.k", "attention.v"), ("mlp.gate", "mlp.up")):
        first, *others = (found[f"layers.1.{name}"].second_moments for name in shared)
        assert all(np.array_equal(first, other) for other in others)


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    source = tiny_source(tmp_path)
    broken = {**source.weights, "layers.1.mlp_norm": source.weights["layers.1.mlp_norm"] * np.float32(np.inf)}
    with pytest.raises(CalibrationError, match=r"NaN or infinite values at mlp\.input"):
        gather(replace(source, weights=broken), random_samples(source), tmp_path / "stage")


def test_a_folder_without_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no readable statistics"):
        Statistics(tmp_path)


def test_statistics_without_some_samples_are_those_of_the_others(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama")
    samples = random_samples(source)

    def part(rows: slice, name: str) -> Statistics:
        tokens = samples.tokens[rows]
        provenance = replace(samples.provenance, count=len(tokens))
        return gather(source, replace(samples, tokens=tokens, provenance=provenance), tmp_path / name)

    every, some, others = part(slice(0, 6), "every"), part(slice(0, 2), "some"), part(slice(2, 6), "others")
    found = Without(every, some)
    assert set(found) == set(others)
    for name, expected in others.items():
        scale = np.abs(expected.second_moments).max()
        assert np.allclose(found[name].second_moments, expected.second_moments, atol=1e-5 * scale), name
        assert found[name].count == expected.count
    alone = Without(every, every)["layers.0.mlp.up"]
    assert np.array_equal(alone.second_moments, every["layers.0.mlp.up"].second_moments)
