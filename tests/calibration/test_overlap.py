"""Leakage between calibration and evaluation is found and refused; boilerplate is not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.overlap import LEAST, NGRAM, overlap, refuse
from lilliput.errors import CalibrationError

VOCAB = 5000


def text(seed: int, rows: int, length: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCAB, size=(rows, length)).astype(np.int32)


def show(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def by_sets(calibration: np.ndarray, evaluation: np.ndarray) -> int:
    """Shared telling runs, by Python's own sets."""
    known = {tuple(row[i : i + NGRAM]) for row in calibration.tolist() for i in range(len(row) - NGRAM + 1)}
    runs = [tuple(row[i : i + NGRAM]) for row in evaluation.tolist() for i in range(len(row) - NGRAM + 1)]
    return sum(run in known and len(set(run)) >= NGRAM / 2 for run in runs)


def test_texts_apart_share_nothing() -> None:
    found = overlap(text(0, 8), text(1, 4))
    assert (found.runs, found.shared) == (4 * (128 - NGRAM + 1), 0)
    refuse(found, text(1, 4), ("a", "b"), show)


def test_a_copied_passage_is_found_where_it_is_at_whatever_offset() -> None:
    calibration, evaluation = text(0, 8), text(1, 4)
    evaluation[2, 30:80] = calibration[5, 11:61]
    found = overlap(calibration, evaluation)
    assert (found.chunk, found.position, found.length) == (2, 30, 50)
    assert found.shared == 50 - NGRAM + 1


def test_leakage_is_refused_with_its_place_and_an_excerpt() -> None:
    calibration, evaluation = text(0, 8), text(1, 2)
    evaluation[1] = calibration[3]
    with pytest.raises(CalibrationError, match=r"50\.0 % of its runs of 16 tokens \(113 of 226\)") as caught:
        refuse(overlap(calibration, evaluation), evaluation, ("mine.txt", "theirs.txt"), show)
    message = str(caught.value)
    assert "'mine.txt'" in message
    assert "'theirs.txt'" in message
    assert "at token 0 of chunk 1" in message
    assert show(calibration[3, :32].tolist()) in message
    assert "\n" not in message


def test_a_few_shared_lines_are_no_leak() -> None:
    calibration, evaluation = text(0, 8), text(1, 8, 512)
    evaluation[0, : NGRAM + LEAST - 2] = calibration[0, : NGRAM + LEAST - 2]
    found = overlap(calibration, evaluation)
    assert found.shared == LEAST - 1
    refuse(found, evaluation, ("a", "b"), show)


def test_a_short_text_that_is_shared_by_half_is_a_leak() -> None:
    calibration, evaluation = text(0, 8), text(1, 2, 32)
    evaluation[0] = calibration[4, 20:52]
    found = overlap(calibration, evaluation)
    assert (found.shared, found.runs) == (17, 34)
    with pytest.raises(CalibrationError, match="share text"):
        refuse(found, evaluation, ("a", "b"), show)


def test_runs_of_few_distinct_tokens_say_nothing() -> None:
    same = np.tile(np.array([[1, 2, 3]], np.int32), (4, 40))
    found = overlap(same, same)
    assert (found.runs, found.shared, found.share) == (0, 0, 0.0)


def test_sequences_shorter_than_a_run_are_compared_whole() -> None:
    short = text(0, 3, 8)
    assert overlap(short, short).shared == 3


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(16, 40), st.integers(20, 60))
def test_the_count_is_that_of_sets(seed: int, rows: int, length: int, vocab: int) -> None:
    """With passages of one text spliced into the other."""
    rng = np.random.default_rng(seed)
    calibration = rng.integers(vocab, size=(rows + 1, 40)).astype(np.int32)
    evaluation = rng.integers(vocab, size=(rows, 40)).astype(np.int32)
    begin, to = (int(rng.integers(0, 41 - length)) for _ in range(2))
    evaluation[0, to : to + length] = calibration[-1, begin : begin + length]
    assert overlap(calibration, evaluation).shared == by_sets(calibration, evaluation)


def test_the_builtin_texts_pass() -> None:
    """By words, which are coarser than tokens: the whole calibration part against the whole evaluation part."""
    from lilliput.texts import calibration_text, evaluation_text

    words = {word: i for i, word in enumerate(sorted({*calibration_text().split(), *evaluation_text().split()}))}
    known, judged = (
        np.array([[words[w] for w in part.split()]], np.int32) for part in (calibration_text(), evaluation_text())
    )
    found = overlap(known, judged)
    assert 0 < found.share < 0.05, "it does share some boilerplate"
    refuse(found, judged, ("builtin", "builtin"), show)
