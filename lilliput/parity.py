"""Tokenizer parity: token ids of our tokenizer against the source's own, on lilliput/parity_texts.py.

Beside the fixed texts, each special token of the tokenizer is tried between words. Both sides parse special
tokens and add what they add by themselves (beginning of sequence). One difference refuses the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lilliput.errors import SourceError
from lilliput.parity_texts import TEXTS

Encode = Callable[[str], list[int]]
SPECIAL_TOKENS_TRIED = 64  # of vocabularies with hundreds of reserved ones


def encoder(folder: Path, *, allow_remote_code: bool = False, use_fast: bool = True) -> tuple[Encode, tuple[str, ...]]:
    """How transformers' AutoTokenizer encodes with the files in `folder`, and its added tokens.

    Raises SourceError where the files do not open.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=allow_remote_code, use_fast=use_fast)
    except Exception as error:  # transformers raises whatever its readers raise
        raise SourceError(f"{folder}: the tokenizer does not open ({_first_line(error)})") from error
    return lambda text: list(tokenizer(text, verbose=False)["input_ids"]), tuple(
        str(token) for token in tokenizer.added_tokens_decoder.values()
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def texts(special_tokens: tuple[str, ...]) -> tuple[str, ...]:
    """The fixed texts, and one more for each special token."""
    return TEXTS + tuple(f"before {token}after {token} and {token}{token}" for token in special_tokens)


@dataclass(frozen=True)
class LeftOut:
    """Texts that are left out of a comparison, and why, for the report."""

    why: str
    applies: Callable[[str], bool]


def check(
    name: str, ours: Encode, theirs: Encode, special_tokens: tuple[str, ...], left_out: Sequence[LeftOut] = ()
) -> str:
    """Compare on all texts and say on how many. Raises SourceError with the text and both id lists."""
    every = texts(special_tokens[:SPECIAL_TOKENS_TRIED])
    tried = [text for text in every if not any(exception.applies(text) for exception in left_out)]
    for text in tried:
        mine, wanted = ours(text), theirs(text)
        if mine != wanted:
            raise SourceError(
                f"{name}: the tokenizer differs from the source's own on {text!r}: {mine}, wanted {wanted}: "
                "the model would read other tokens than it was trained on. Use its folder with tokenizer.json"
            )
    reasons = [e.why for e in left_out if any(e.applies(text) for text in every)]
    return f"{len(tried)} texts" + (f", {len(every) - len(tried)} left out ({'; '.join(reasons)})" if reasons else "")


def against_folder(original: Path, copied: Path, *, allow_remote_code: bool = False) -> str:
    """Prove `copied` against the tokenizer of the Hugging Face folder `original`; the sentence for the report.

    Where the folder has no tokenizer.json, its own tokenizer is the one that reads vocab.json or tokenizer.model.
    """
    use_fast = (original / "tokenizer.json").is_file()
    theirs, special = encoder(original, allow_remote_code=allow_remote_code, use_fast=use_fast)
    ours, _ = encoder(copied)
    return f"proven against the source's own tokenizer on {check(original.name, ours, theirs, special)}"


def against_llama_cpp(
    gguf: Path, folder: Path, prepare: Callable[[str], str] = str, left_out: Sequence[LeftOut] = ()
) -> str:
    """Prove `folder` against llama.cpp's tokenizer of a GGUF file where that package is there; the sentence for the
    report says which. llama.cpp gets each text as `prepare` makes it.

    llama.cpp takes some texts for special tokens that are plain ones of the vocabulary (`</s>` in Qwen's): where a text
    holds one, it is asked not to look for special tokens, and the sentence names them.
    """
    try:
        import llama_cpp
    except ImportError:
        return 'not proven: package llama_cpp is not installed (pip install "lilliput[llamacpp]")'
    ours, special = encoder(folder)
    with llama_cpp_vocabulary(gguf) as theirs:
        made_special = [text for text in theirs.special_texts if text not in special]

        def encode(text: str) -> list[int]:
            return theirs.encode(prepare(text), parse_special=not any(made in text for made in made_special))

        said = check(gguf.name, ours, encode, special, left_out)
    said = f"proven against llama.cpp's own tokenizer (llama-cpp-python {llama_cpp.__version__}) on {said}"
    seen = [text for text in made_special if any(text in tried for tried in TEXTS)]
    return said + (f"; it takes {', '.join(seen)} for special, the tokenizer does not" if seen else "")


class LlamaCppVocabulary:
    """An opened vocabulary of llama.cpp's."""

    def __init__(self, vocabulary: Any) -> None:
        self._vocabulary = vocabulary

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids, with those that are added by themselves."""
        import llama_cpp

        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self._vocabulary, raw, len(raw), ids, len(ids), True, parse_special)
        return list(ids[: max(count, 0)])

    def ends(self, token: int) -> bool:
        """Whether a token ends a generation."""
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, token))

    @property
    def special_texts(self) -> list[str]:
        """The tokens that are found in a text before anything else."""
        import llama_cpp

        special = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        ids = range(llama_cpp.llama_vocab_n_tokens(self._vocabulary))
        found = (i for i in ids if llama_cpp.llama_vocab_get_attr(self._vocabulary, i) & special)
        return [llama_cpp.llama_vocab_get_text(self._vocabulary, i).decode(errors="replace") for i in found]


@contextmanager
def llama_cpp_vocabulary(gguf: Path) -> Iterator[LlamaCppVocabulary]:
    """The vocabulary of a GGUF file in llama.cpp. Raises SourceError where llama.cpp cannot read it."""
    import llama_cpp

    llama_cpp.llama_log_set(_quiet(), None)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), parameters)
    if not model:
        raise SourceError(f"{gguf}: llama.cpp cannot read its vocabulary: get the file anew")
    try:
        yield LlamaCppVocabulary(llama_cpp.llama_model_get_vocab(model))
    finally:
        llama_cpp.llama_model_free(model)


@cache
def _quiet() -> Any:
    """A log callback that says nothing; cached, as C keeps a pointer to it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)
