"""Metrics against scipy's and torch's own functions, and the interval against what it must contain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from lilliput.errors import MeasurementError
from targets.metrics import TokenMetrics, bootstrap_interval, divergence, log_softmax, summarize

RNG = np.random.default_rng(1)
P, Q = RNG.normal(0, 4, 500).astype(np.float32), RNG.normal(0, 4, 500).astype(np.float32)


def test_divergence_is_scipys_relative_entropy() -> None:
    p, q = (softmax(x.astype(np.float64)) for x in (P, Q))
    assert divergence(log_softmax(P, "p"), log_softmax(Q, "q")) == pytest.approx(rel_entr(p, q).sum(), rel=1e-12)


def test_divergence_is_not_symmetric_and_zero_for_equal() -> None:
    p, q = log_softmax(P, "p"), log_softmax(Q, "q")
    assert divergence(p, q) != pytest.approx(divergence(q, p), rel=1e-3)
    assert divergence(p, p) == 0.0
    assert divergence(p, log_softmax(P + np.float32(3), "shifted")) < 1e-12


def test_divergence_resolves_float32_rounding() -> None:
    """A relative change of 1e-6 of the logits: far below the ladder's limit of 1e-4, and still not zero."""
    moved = (P * np.float32(1 + 1e-4)).astype(np.float32)
    assert 0 < divergence(log_softmax(P, "p"), log_softmax(moved, "moved")) < 1e-6


def test_log_softmax_is_torchs_and_survives_large_logits() -> None:
    wanted = torch.from_numpy(P).double().log_softmax(0).numpy()
    np.testing.assert_allclose(log_softmax(P, "p"), wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.exp(log_softmax(np.float32([3e38, 0, -3e38]), "large")), [1, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    logits = P.copy()
    logits[7] = bad
    with pytest.raises(MeasurementError, match="chunk 3, position 5"):
        log_softmax(logits, "chunk 3, position 5")


def filled(chunks: int = 4, scored: int = 6, vocab: int = 50) -> tuple[TokenMetrics, torch.Tensor, torch.Tensor]:
    reference = RNG.normal(0, 2, (chunks, scored, vocab)).astype(np.float32)
    candidate = (reference + RNG.normal(0, 0.5, reference.shape)).astype(np.float32)
    targets = RNG.integers(0, vocab, (chunks, scored))
    metrics = TokenMetrics.empty(chunks, scored)
    for c, i in np.ndindex(chunks, scored):
        p, q = log_softmax(reference[c, i], "p"), log_softmax(candidate[c, i], "q")
        metrics.put(c, i, p, q, int(targets[c, i]), step_kld=float(i))
    return metrics, torch.from_numpy(candidate).double(), torch.from_numpy(targets)


def test_perplexity_is_torchs_cross_entropy() -> None:
    metrics, candidate, targets = filled()
    loss = torch.nn.functional.cross_entropy(candidate.flatten(0, 1), targets.flatten())
    assert summarize(metrics).perplexity == pytest.approx(loss.exp().item(), rel=1e-12)


def test_summary_holds_the_means_within_their_intervals() -> None:
    metrics, _, _ = filled()
    found = summarize(metrics)
    assert found.tokens == 24
    assert found.mean_kld == metrics.kld.mean()
    assert found.top1_agreement == metrics.agrees.mean()
    for value, interval in (
        (found.mean_kld, found.mean_kld_interval),
        (found.top1_agreement, found.top1_agreement_interval),
        (found.perplexity_ratio, found.perplexity_ratio_interval),
    ):
        assert interval is not None
        assert interval.low <= value <= interval.high
        assert interval.low < interval.high


def test_an_unset_position_cannot_be_summarized() -> None:
    with pytest.raises(ValueError, match="finite"):
        summarize(TokenMetrics.empty(2, 3))


def test_metrics_survive_the_file(tmp_path: Path) -> None:
    metrics, _, _ = filled()
    metrics.save(tmp_path / "m.npz")
    again = TokenMetrics.load(tmp_path / "m.npz")
    assert again.mean_step_kld == 2.5
    for name in ("kld", "agrees", "nll", "reference_nll", "step_kld"):
        np.testing.assert_array_equal(getattr(again, name), getattr(metrics, name))
    assert again.first(2).kld.shape == (2, 6)
    joined = TokenMetrics.concatenate([again.first(1), again])
    np.testing.assert_array_equal(joined.nll[1:], metrics.nll)
    np.testing.assert_array_equal(joined.agrees[0], metrics.agrees[0])


def test_the_interval_draws_whole_chunks() -> None:
    """Chunks that are constant inside: positions add nothing, so the width is that of the chunk means."""
    means = np.array([1.0, 2.0, 3.0, 4.0])
    narrow, wide = (bootstrap_interval(np.repeat(means[:, None], n, axis=1)) for n in (1, 1000))
    assert narrow is not None
    assert narrow == wide


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    """300 samples of 40 skewed chunks with mean 1: the percentile interval covers in about 93 %, ± 5 by chance."""
    rng = np.random.default_rng(5)
    intervals = [bootstrap_interval(rng.exponential(1.0, (40, 1))) for _ in range(300)]
    covered = np.mean([i is not None and i.low <= 1.0 <= i.high for i in intervals])
    assert 0.88 <= covered <= 0.98


def test_a_single_chunk_has_no_interval() -> None:
    assert bootstrap_interval(np.ones((1, 100))) is None
