"""Tokenizer parity: token ids of our tokenizer against the source's own, on lilliput/parity_texts.py.

Beside the fixed texts, each special token of the tokenizer is tried between words. Both sides parse special
tokens and add what they add by themselves (beginning of sequence). One difference refuses the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def check(name: str, ours: Encode, theirs: Encode, special_tokens: tuple[str, ...]) -> int:
    """Compare on all texts and return their number. Raises SourceError with the text and both id lists."""
    tried = texts(special_tokens[:SPECIAL_TOKENS_TRIED])
    for text in tried:
        mine, wanted = ours(text), theirs(text)
        if mine != wanted:
            raise SourceError(
                f"{name}: the tokenizer differs from the source's own on {text!r}: {mine}, wanted {wanted}: "
                "the model would read other tokens than it was trained on. Use its folder with tokenizer.json"
            )
    return len(tried)


def against_folder(original: Path, copied: Path, *, allow_remote_code: bool = False) -> str:
    """Prove `copied` against the tokenizer of the Hugging Face folder `original`; the sentence for the report.

    Where the folder has no tokenizer.json, its own tokenizer is the one that reads vocab.json or tokenizer.model.
    """
    use_fast = (original / "tokenizer.json").is_file()
    theirs, special = encoder(original, allow_remote_code=allow_remote_code, use_fast=use_fast)
    ours, _ = encoder(copied)
    return f"proven against the source's own tokenizer on {check(original.name, ours, theirs, special)} texts"


def against_llama_cpp(gguf: Path, folder: Path) -> str:
    """Prove `folder` against llama.cpp's tokenizer of a GGUF file where that package is there; the sentence for the
    report says which."""
    try:
        import llama_cpp
    except ImportError:
        return 'not proven: package llama_cpp is not installed (pip install "lilliput[llamacpp]")'
    ours, special = encoder(folder)
    with _llama_cpp_encoder(gguf) as theirs:
        count = check(gguf.name, ours, theirs, special)
    return f"proven against llama.cpp's own tokenizer (llama-cpp-python {llama_cpp.__version__}) on {count} texts"


@contextmanager
def _llama_cpp_encoder(gguf: Path) -> Iterator[Encode]:
    """How llama.cpp encodes with the vocabulary of a GGUF file: special tokens parsed, its own ones added."""
    import llama_cpp

    llama_cpp.llama_log_set(_quiet(), None)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), parameters)
    if not model:
        raise SourceError(f"{gguf}: llama.cpp cannot read its vocabulary: get the file anew")
    vocabulary = llama_cpp.llama_model_get_vocab(model)

    def encode(text: str) -> list[int]:
        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), ids, len(ids), True, True)
        return list(ids[: max(count, 0)])

    try:
        yield encode
    finally:
        llama_cpp.llama_model_free(model)


@cache
def _quiet() -> Any:
    """A log callback that says nothing; cached, as C keeps a pointer to it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)
