"""Which kinds of text a set of samples holds: its share of tokens in each slice.

    prose, code, JSON       each line is one of them
    chat template           lines within a turn of a conversation, between the template's own special tokens
    Latin, Cyrillic, …      scripts: the letters of a line share its tokens

A line's kind is told by its form (the patterns below): a heuristic, which serves to see that a kind is missing. A
script is the first word of a letter's Unicode name, as Python's unicodedata has it; languages of one script are not
told apart. Slices overlap (code in a turn of Latin letters counts in three), so their shares do not add up to one.

A slice is judged where at least JUDGED of the evaluation's tokens are in it; it is hardly calibrated where the samples
hold less than SCARCE of that share.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = npt.NDArray[np.int32]

JUDGED = 0.02
SCARCE = 0.25
TURN = "chat template"

SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}  # others by their own name
JSON = re.compile(r'\s*[\[{]?\s*"(\\.|[^"\\])*"\s*:\s*\S')
CODE = re.compile(
    r"""\s*(
      >>>\s | \.\.\.\s | \$\s | \#include\b | \#define\b | // | /\* | @\w+(\(.*\))?$ | </?\w+[^>]*>
    | (import|from)\s[\w.]+(\simport\s.*|\sas\s\w+)?;?$
    | (async\s+)?def\s\w+\( | class\s\w+.*[:{]$
    | (public|private|static|export|const|let|var|func|fn|function)\s\w+.*[({=;]
    | (if|for|while|elif|else|try|except|finally|with|switch|match|case)\b.*[:{]$
    | [\w.\[\]"']+\s*([-+*/:|]?=)\s*\S
    | [\w.]+\(.*\)[;:,]?$
    | .*[;{}]$
    )""",
    re.VERBOSE,
)


def shares(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """The share of tokens (n, length) in each slice that they touch."""
    lines = [line for row in tokens.tolist() for line in _lines(tokenizer, row)]
    texts = sorted({text for text, _ in lines})
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    lengths = {text: len(ids) for text, ids in zip(texts, encoded, strict=True)}
    found: defaultdict[str, float] = defaultdict(float)
    for text, in_turn in lines:
        found[kind(text)] += lengths[text]
        found[TURN] += lengths[text] if in_turn else 0
        for script, share in scripts(text).items():
            found[script] += share * lengths[text]
    total = sum(lengths[text] for text, _ in lines) or 1
    return {name: weight / total for name, weight in sorted(found.items()) if weight}


def warnings(calibration: Mapping[str, float], evaluation: Mapping[str, float]) -> tuple[str, ...]:
    """A sentence for each slice that is judged and hardly calibrated, the largest first."""
    judged = [name for name in evaluation if evaluation[name] >= JUDGED]
    scarce = [name for name in judged if calibration.get(name, 0.0) < SCARCE * evaluation[name]]
    return tuple(
        f"calibration: {100 * calibration.get(name, 0.0):.1f} % of its tokens are {name}, of the evaluation's "
        f"{100 * evaluation[name]:.1f} %: that slice is judged and hardly calibrated; add samples of it"
        for name in sorted(scarce, key=lambda name: -evaluation[name])
    )


def kind(line: str) -> str:
    """prose, code or JSON."""
    text = line.rstrip()
    return "JSON" if JSON.match(text) else "code" if CODE.match(text) else "prose"


def scripts(line: str) -> dict[str, float]:
    """The share of each script in a line's letters; empty where it has none."""
    counts = Counter(_script(character) for character in line if character.isalpha())
    return {script: count / counts.total() for script, count in counts.items()}


@cache
def _script(letter: str) -> str:
    word = unicodedata.name(letter, "UNNAMED").split()[0]
    return SCRIPTS.get(word, word.capitalize())


def _lines(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> Iterator[tuple[str, bool]]:
    """The lines of a sample, special tokens apart, and whether each is within a turn."""
    text = tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    specials, opening = set(tokenizer.all_special_tokens), turn_marks(tokenizer)
    pattern = "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True))
    in_turn = False
    for piece in re.split(f"({pattern})", text) if pattern else [text]:
        if piece in specials:
            yield piece, in_turn or piece in opening
            in_turn = piece in opening
        else:
            for line in piece.splitlines(keepends=True):
                yield line, in_turn


def turn_marks(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The special tokens by which the chat template marks turns, but those that part plain texts too.

    Empty where there is no template, or where it marks turns in plain letters.
    """
    if not tokenizer.chat_template:
        return frozenset()
    rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    plain = tokenizer.convert_ids_to_tokens(tokenizer.encode("a"))
    special = {token for token in tokenizer.all_special_tokens if token in rendered}
    return frozenset(special - {tokenizer.eos_token, *plain})
