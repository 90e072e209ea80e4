"""The vocabulary in a GGUF file, by itself: merges, pre-tokenizer, token types, number of tokens.

Thresholds. Merges: a byte-level BPE makes every ordinary token of several characters by a merge; SmolLM2, GPT-2 and
Llama 3 have none without one, so 1 % is a loss. Digits: where the pre-tokenizer cuts digits one by one, a vocabulary
trained with it has no token of several digits, and where it cuts runs, a vocabulary of VOCABULARY tokens and more has
hundreds: under FEW and above MANY, nothing is in doubt.
"""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.checks.base import GGUF, Rule, Seen
from lilliput.checks.opened import Opened
from lilliput.tokenizer import NORMAL, PRE_TOKENIZERS

LOST = 0.01
VOCABULARY, FEW, MANY = 20_000, 5, 50
SINGLE_DIGITS = r"\p{N}"
KEY = "tokenizer.ggml"


def merges(opened: Opened) -> Iterator[Seen]:
    """Only byte-level BPE (model gpt2) has merges."""
    fields = opened.gguf.fields
    if fields.get(f"{KEY}.model") != "gpt2":
        return
    listed, tokens, types = fields.get(f"{KEY}.merges") or [], opened.gguf.tokens(), opened.gguf.types()
    made = {left + right for left, _, right in (line.partition(" ") for line in listed)}
    words = [
        t for t, kind in zip(tokens, types or [NORMAL] * len(tokens), strict=False) if kind == NORMAL and len(t) > 1
    ]
    lost = [token for token in words if token not in made]
    if words and len(lost) > LOST * len(words):
        yield Seen(
            f"{KEY}.merges", f"{len(listed)} merges leave {len(lost)} of {len(words)} tokens unmade, {lost[0]!r} first"
        )


def pre(opened: Opened) -> Iterator[Seen]:
    fields = opened.gguf.fields
    if fields.get(f"{KEY}.model") == "gpt2" and fields.get(f"{KEY}.pre") in (None, "", "default"):
        yield Seen(f"{KEY}.pre", f"is {fields.get(f'{KEY}.pre')!r}: llama.cpp falls back to its default and warns")


def digits(opened: Opened) -> Iterator[Seen]:
    fields, tokens = opened.gguf.fields, opened.gguf.tokens()
    name = fields.get(f"{KEY}.pre")
    rule = PRE_TOKENIZERS.get(str(name))
    if fields.get(f"{KEY}.model") != "gpt2" or rule is None or len(tokens) < VOCABULARY or name == "default":
        return
    several = sum(len(token) > 1 and token.isascii() and token.isdigit() for token in tokens)
    single = any(p == SINGLE_DIGITS or rf"|{SINGLE_DIGITS}|" in p for p in rule.patterns)
    if single and several > MANY:
        yield Seen(f"{KEY}.pre", f"{name!r} cuts digits one by one, but {several} tokens have several digits")
    if not single and several < FEW:
        yield Seen(f"{KEY}.pre", f"{name!r} keeps runs of digits, but only {several} of {len(tokens)} tokens have any")


def sizes(opened: Opened) -> Iterator[Seen]:
    tokens, types = opened.gguf.tokens(), opened.gguf.types()
    fact = opened.facts.get("vocab_size")
    if not tokens:
        yield Seen(f"{KEY}.tokens", "the file has no vocabulary")
    elif fact is not None and len(tokens) != fact.value:
        yield Seen(f"{KEY}.tokens", f"has {len(tokens)} tokens, {fact.place} has {fact.value} rows")
    if types and len(types) != len(tokens):
        yield Seen(f"{KEY}.token_type", f"has {len(types)} types for {len(tokens)} tokens")


RULES = (
    Rule(
        id="GGUF-MERGES",
        formats=GGUF,
        severity="error",
        summary="a byte-level vocabulary whose merges are missing or cut off",
        reason="without its merges a tokenizer spells words letter by letter: the model sees text that it never saw",
        reference="ggml-org/llama.cpp#9692",
        fix="convert again with a converter that reads merges as pairs (transformers 4.45 and later write them so)",
        check=merges,
    ),
    Rule(
        id="GGUF-PRE-MISSING",
        formats=GGUF,
        severity="error",
        summary="no name of a pre-tokenizer beside a byte-level vocabulary",
        reason="llama.cpp then cuts text by its default rules: generation quality is degraded",
        reference="ggml-org/llama.cpp#6920",
        fix="set tokenizer.ggml.pre to the name that llama.cpp has for this tokenizer",
        check=pre,
    ),
    Rule(
        id="GGUF-PRE-DIGITS",
        formats=GGUF,
        severity="error",
        summary="a pre-tokenizer that cuts digits otherwise than the vocabulary was trained",
        reason="a wrong name tokenizes differently without a word: numbers first",
        reference="ggml-org/llama.cpp#8609",
        fix="set tokenizer.ggml.pre to the name that llama.cpp has for this tokenizer",
        check=digits,
    ),
    Rule(
        id="GGUF-VOCABULARY",
        formats=GGUF,
        severity="error",
        summary="a vocabulary that has not as many tokens as the embedding has rows",
        reason="ids beyond the list cannot be written as text; llama.cpp refuses the file",
        reference="ggml-org/llama.cpp#3743",
        fix="convert again, padding the vocabulary to the embedding's rows",
        check=sizes,
    ),
)
