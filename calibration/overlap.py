"""Leakage: text that calibration and evaluation share.

Compared are runs of NGRAM tokens. GPT-3 takes 13 words (Brown et al. 2020, arXiv:2005.14165, appendix C); 16 tokens
are about 12. A run with less than half as many distinct tokens (rules, tables, loops of a model's own text) says
nothing and does not count. Each run is one number,

    hash = Σ m_i (t_i + 1)  mod 2⁶⁴        with fixed random odd m_i

so that both texts' runs are compared as two arrays; of those that meet, the tokens themselves are compared.

Texts of one kind share boilerplate: the two parts of the built-in text share 3.9 % of the evaluation's runs with
SmolLM2's tokenizer. So a text is refused from a share of LEAK on, where that is LEAST runs
or half of a short text; less is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lilliput.errors import CalibrationError

Tokens = npt.NDArray[np.int32]

NGRAM = 16
LEAK = 0.05  # of the evaluation's runs
LEAST = 100  # runs
EXCERPT = 32  # tokens shown of the longest shared run


@dataclass(frozen=True)
class Overlap:
    """What is shared. `shared` of the evaluation's `runs`; the place is that of the longest passage."""

    runs: int
    shared: int
    chunk: int = 0
    position: int = 0  # in the chunk
    length: int = 0  # tokens of the longest passage

    @property
    def share(self) -> float:
        return self.shared / self.runs if self.runs else 0.0


def overlap(calibration: Tokens, evaluation: Tokens) -> Overlap:
    """What `evaluation` (chunks, length) has in common with `calibration` (n, length)."""
    width = min(NGRAM, calibration.shape[1], evaluation.shape[1])
    known = _runs(calibration, width)
    known = known[_telling(known)]
    order = np.argsort(_hash(known), kind="stable")
    known, hashes = known[order], _hash(known)[order]
    judged = _runs(evaluation, width)
    at = np.minimum(np.searchsorted(hashes, _hash(judged)), len(known) - 1)
    telling = _telling(judged)
    same = telling & (known[at] == judged).all(axis=1) if len(known) else np.zeros(len(judged), dtype=np.bool_)
    return _longest(same.reshape(len(evaluation), -1), int(telling.sum()), width)


def refuse(found: Overlap, evaluation: Tokens, names: tuple[str, str], decode: Callable[[Sequence[int]], str]) -> None:
    """Raise CalibrationError where too much is shared; `names` are those of the two texts."""
    if found.share < LEAK or found.shared < min(LEAST, found.runs / 2):
        return
    passage = evaluation[found.chunk, found.position : found.position + min(found.length, EXCERPT)]
    raise CalibrationError(
        f"calibration samples {names[0]!r} share text with the evaluation text {names[1]!r}: {100 * found.share:.1f} % "
        f"of its runs of {NGRAM} tokens ({found.shared} of {found.runs}), the longest passage has {found.length} "
        f"tokens, at token {found.position} of chunk {found.chunk}: {decode(passage.tolist())!r}; figures on text that "
        "was calibrated on prove nothing: give calibration.samples or evaluation.text another text"
    )


def _runs(tokens: Tokens, width: int) -> Tokens:
    """(n, length) → (n * (length − width + 1), width); no run crosses the end of a sequence."""
    return np.lib.stride_tricks.sliding_window_view(tokens, width, axis=1).reshape(-1, width)


def _telling(runs: Tokens) -> npt.NDArray[np.bool_]:
    """Runs that have at least half as many distinct tokens as tokens."""
    ordered = np.sort(runs, axis=1)
    distinct: npt.NDArray[np.bool_] = 2 * (1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)) >= runs.shape[1]
    return distinct


def _hash(runs: Tokens) -> npt.NDArray[np.uint64]:
    factors = np.random.default_rng(0).integers(2**63, size=runs.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    hashes: npt.NDArray[np.uint64] = (runs.astype(np.uint64) + np.uint64(1)) @ factors
    return hashes


def _longest(same: npt.NDArray[np.bool_], runs: int, width: int) -> Overlap:
    """`same` (chunks, positions): where a shared run begins."""
    best, shared = Overlap(runs, int(same.sum())), int(same.sum())
    for chunk, row in enumerate(same):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.view(np.int8), [0]])))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if end - begin + width - 1 > best.length:
                best = Overlap(runs, shared, chunk, begin, end - begin + width - 1)
    return best
