"""Which slices samples hold, and what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import save_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calibration import coverage

PROSE = "the model is quantized once, and every runtime gets exactly that.\n"
CODE = "def add(a, b):\n    total = a + b\n    return add(total, 1);\n"
JSON = '{"name": "add", "count": 3,\n "values": [1, 2]}\n'
RUSSIAN = "кошка спит на диване\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def shares(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, float]:
    tokens = np.array([tokenizer.encode(text, add_special_tokens=False)], np.int32)
    return coverage.shares(tokens, tokenizer)


def tokens_in(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("The quick brown fox jumps over the lazy dog.", "prose"),
        ("If this method is defined, it is called; see below", "prose"),
        ("for a while, nothing happened", "prose"),
        ("def add(a, b):", "code"),
        ("    total += values[i]", "code"),
        (">>> print(1)", "code"),
        ("for (int i = 0; i < n; i++) {", "code"),
        ("import numpy as np", "code"),
        ("#include <stdio.h>", "code"),
        ('  "name": "add",', "JSON"),
        ('{"role": "user", "content": "a \\"b\\""}', "JSON"),
    ],
)
def test_a_lines_kind_is_seen_in_its_form(line: str, kind: str) -> None:
    assert coverage.kind(line + "\n") == kind


def test_scripts_are_the_shares_of_letters() -> None:
    assert coverage.scripts("aя1 2") == {"Latin": 0.5, "Cyrillic": 0.5}
    assert coverage.scripts("漢字かな") == {"Han": 0.5, "Kana": 0.5}
    assert coverage.scripts("12 + 3") == {}


def test_shares_count_tokens_of_lines(tokenizer: PreTrainedTokenizerBase) -> None:
    found = shares(tokenizer, PROSE + RUSSIAN + CODE + JSON)
    parts = {text: sum(tokens_in(tokenizer, line) for line in text.splitlines(True)) for text in (CODE, JSON, RUSSIAN)}
    total = sum(parts.values()) + tokens_in(tokenizer, PROSE)
    assert found["code"] == pytest.approx(parts[CODE] / total)
    assert found["JSON"] == pytest.approx(parts[JSON] / total)
    assert found["Cyrillic"] == pytest.approx(parts[RUSSIAN] / total)
    assert found["prose"] + found["code"] + found["JSON"] == pytest.approx(1)
    assert coverage.TURN not in found


def test_a_turn_lasts_from_its_mark_to_the_next_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    turn = str(tokenizer.apply_chat_template([{"role": "user", "content": "add"}], tokenize=False))
    found = shares(tokenizer, turn * 3)
    assert coverage.turn_marks(tokenizer) == {tokenizer.bos_token}
    newline = tokens_in(tokenizer, "\n") / tokens_in(tokenizer, turn)  # after the end token
    assert found[coverage.TURN] == pytest.approx(1 - newline, abs=0.05)
    assert coverage.TURN not in shares(tokenizer, PROSE + str(tokenizer.eos_token) + PROSE)


def test_without_a_template_no_turn_is_seen(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    assert coverage.turn_marks(plain) == frozenset()


def test_what_is_judged_and_hardly_calibrated_is_named() -> None:
    evaluation = {"Latin": 0.6, "code": 0.3, "JSON": 0.1, "Cyrillic": 0.05, "Han": 0.01}
    found = coverage.warnings({"Latin": 1.0, "code": 0.076, "JSON": 0.024}, evaluation)
    assert [line.split(" are ")[1].split(",")[0] for line in found] == ["JSON", "Cyrillic"]
    assert "0.0 % of its tokens are Cyrillic, of the evaluation's 5.0 %" in found[1]
    assert coverage.warnings(evaluation, evaluation) == ()
