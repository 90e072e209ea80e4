"""How far a candidate's next-token distribution is from a reference's, token by token, in float64.

With p = softmax(reference logits) and q = softmax(candidate logits) at one position, and t the token that
the text goes on with:

    kld              Σ p (log p − log q)        nats; the Kullback-Leibler divergence of the candidate
    step_kld         the same from a second reference, the dequantized weights
    agrees           argmax p == argmax q
    nll              −log q[t]                  perplexity = exp(mean nll)
    reference_nll    −log p[t]

Each position is worked on alone, so that no more than a row of the vocabulary is held. Neighbouring
positions are not independent: a 95 % interval of a mean is the percentile bootstrap over whole chunks
(Efron 1979; blocks as in Künsch 1989), and a single chunk has none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lilliput.errors import MeasurementError
from lilliput.grid import Float
from lilliput.results import Accuracy, Interval

Double = npt.NDArray[np.float64]

RESAMPLES = 10_000


def log_softmax(logits: Float, what: str) -> Double:
    """(vocab,) float32 → (vocab,) float64. Raises MeasurementError naming `what` where a logit is not finite."""
    x = logits.astype(np.float64)
    peak = x.max()
    if not np.isfinite(peak) or not np.isfinite(x.min()):
        raise MeasurementError(f"{what}: logits are not all finite, the model cannot be judged by them")
    x -= peak
    x -= np.log(np.exp(x).sum())
    return x


def divergence(reference: Double, candidate: Double) -> float:
    """Kullback-Leibler divergence of two log-distributions (vocab,), in nats; rounding below zero is cut off."""
    return max(0.0, float(np.dot(np.exp(reference), reference - candidate)))


@dataclass(frozen=True, eq=False)
class TokenMetrics:
    """Figures of every scored position, each (chunks, scored)."""

    kld: Double
    agrees: npt.NDArray[np.bool_]
    nll: Double
    reference_nll: Double
    step_kld: Double

    @classmethod
    def empty(cls, chunks: int, scored: int) -> TokenMetrics:
        """Room for that many positions; unset ones are NaN, so that none can be forgotten unnoticed."""
        kld, nll, reference_nll, step_kld = (np.full((chunks, scored), np.nan) for _ in range(4))
        return cls(kld, np.zeros((chunks, scored), dtype=np.bool_), nll, reference_nll, step_kld)

    def put(
        self, chunk: int, position: int, reference: Double, candidate: Double, target: int, step_kld: float
    ) -> None:
        """Fill one position from two log-distributions (vocab,) and the token that follows."""
        at = chunk, position
        self.kld[at] = divergence(reference, candidate)
        self.agrees[at] = reference.argmax() == candidate.argmax()
        self.nll[at], self.reference_nll[at] = -candidate[target], -reference[target]
        self.step_kld[at] = step_kld

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def first(self, chunks: int) -> TokenMetrics:
        """The same of the first chunks only."""
        return TokenMetrics(**{name: array[:chunks] for name, array in self._arrays().items()})

    @classmethod
    def concatenate(cls, parts: Sequence[TokenMetrics]) -> TokenMetrics:
        """The chunks of several, one after the other."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    @property
    def mean_kld(self) -> float:
        return float(self.kld.mean())

    @property
    def mean_step_kld(self) -> float:
        return float(self.step_kld.mean())

    def save(self, path: Path) -> None:
        """Write as .npz, each array by its name."""
        np.savez(path, allow_pickle=False, **self._arrays())

    @classmethod
    def load(cls, path: Path) -> TokenMetrics:
        with np.load(path) as parts:
            return cls(**{field.name: parts[field.name] for field in fields(cls)})


def summarize(metrics: TokenMetrics) -> Accuracy:
    """Means over all positions, each with its interval."""
    ratio = bootstrap_interval(metrics.nll - metrics.reference_nll)
    return Accuracy(
        mean_kld=metrics.mean_kld,
        top1_agreement=float(metrics.agrees.mean()),
        perplexity=float(np.exp(metrics.nll.mean())),
        reference_perplexity=float(np.exp(metrics.reference_nll.mean())),
        tokens=metrics.kld.size,
        mean_kld_interval=bootstrap_interval(metrics.kld),
        top1_agreement_interval=bootstrap_interval(metrics.agrees.astype(np.float64)),
        perplexity_ratio_interval=ratio and Interval(low=float(np.exp(ratio.low)), high=float(np.exp(ratio.high))),
    )


def bootstrap_interval(values: Double) -> Interval | None:
    """The 95 % interval of the mean of (chunks, scored), chunks drawn with replacement; None for one chunk."""
    if len(values) < 2:
        return None
    chunk_means = values.mean(axis=1)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(chunk_means[drawn].mean(axis=1), (2.5, 97.5))
    return Interval(low=float(low), high=float(high))


def reserve(path: Path) -> None:
    """Take the file's bytes from the disk now: a mapped write to a full disk ends the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
