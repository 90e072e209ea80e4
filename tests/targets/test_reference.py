"""The evaluation set's cut, and reference logits against transformers' own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_setting import Setting

from lilliput.errors import InputError
from lilliput.texts import evaluation_text
from targets import reference
from targets.reference import EvaluationSet


def characters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_the_builtin_text_is_cut_into_chunks_from_its_start() -> None:
    found = reference.evaluation_set(characters, 3, 8)
    assert found.tokens.ravel().tolist() == characters(evaluation_text()[:24])
    assert found.tokens.dtype == np.int32
    assert (found.scored_from, found.scored) == (4, 4)
    assert "300000 to 345000" in found.description


def test_the_second_text_goes_by_its_name() -> None:
    found = reference.evaluation_set(characters, 3, 8, "docstrings")
    assert found.tokens.ravel().tolist() == characters(evaluation_text("docstrings")[:24])
    assert "docstrings of Python's modules fractions" in found.description


def test_a_users_text_is_read_and_survives_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("abcdefgh" * 4, encoding="utf-8")
    found = reference.evaluation_set(characters, 2, 8, tmp_path / "mine.txt")
    found.save(tmp_path / "set")
    again = EvaluationSet.load(tmp_path / "set")
    assert (again.sha256, again.description) == (found.sha256, str(tmp_path / "mine.txt"))
    np.testing.assert_array_equal(again.tokens, found.tokens)


def test_too_short_a_text_says_what_was_seen_and_wanted(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(InputError, match=r"short\.txt has 3 tokens, wanted 8 chunks of 512 = 4096"):
        reference.evaluation_set(characters, 8, 512, tmp_path / "short.txt")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_text_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.txt cannot be read as UTF-8 text"):
        reference.evaluation_set(characters, 1, 8, tmp_path / "bad.txt")


@pytest.mark.parametrize("length", [0, 1, 7])
def test_an_odd_length_has_no_halves(length: int) -> None:
    with pytest.raises(InputError, match=f"length is {length}, wanted an even number"):
        reference.evaluation_set(characters, 1, length)


def test_float_logits_are_transformers_at_the_positions_that_predict_the_second_half(setting: Setting) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(setting.source.tokenizer).eval()
    tokens = torch.from_numpy(setting.evaluation.tokens.astype(np.int64))
    with torch.no_grad():
        wanted = theirs(tokens).logits.numpy()
    half = setting.evaluation.scored_from
    rows = setting.float_model.open()
    assert rows.shape == (*tokens.shape[:1], half, setting.source.config.vocab_size)
    np.testing.assert_allclose(rows, wanted[:, half - 1 : -1], atol=1e-4 * wanted.std())
    assert rows.nbytes == reference.size_bytes(setting.source.config, setting.evaluation)


def test_dequantized_logits_carry_their_metrics(setting: Setting) -> None:
    metrics = setting.dequantized.metrics()
    assert metrics.kld.shape == (len(setting.evaluation.tokens), setting.evaluation.scored)
    assert metrics.mean_kld > 1e-4  # the tiny model does lose something
    same = reference.compare(setting.float_model, setting.float_model, setting.evaluation)
    assert same.mean_kld == 0.0
    assert same.agrees.all()


def test_greedy_is_transformers_greedy(setting: Setting) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(setting.source.tokenizer).eval()
    prompt = [5, 9, 200, 41]
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=319, pad_token_id=0
    )
    source = setting.source
    found = reference.greedy(source.config, source.weights, prompt, 6)
    assert list(found) == wanted[0, 4:].tolist()
    assert reference.greedy(source.config, source.weights, prompt, 6, stop_tokens=[found[0]]) == ()
