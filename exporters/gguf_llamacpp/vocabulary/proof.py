"""The tokenizer of a written file, held against the tokenizer's own ids by llama.cpp; and `pre` chosen by that.

A byte-level BPE with NFC before it (Qwen) is written: llama.cpp does not normalize. The proof is then made on texts
that are in that form when llama.cpp gets them, and says so.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import gguf

from exporters.gguf_llamacpp.vocabulary import byte_level, scored, special, wordpiece
from exporters.gguf_llamacpp.vocabulary.files import Files, read
from exporters.gguf_llamacpp.vocabulary.scored import SPACE
from lilliput import parity
from lilliput.errors import ExportError, MissingPackageError, SourceError

NFC = "NFC"


def normal_form(files: Files) -> str | None:
    """The Unicode form that a byte-level tokenizer brings text into first: NFC or None.

    Raises ExportError for a normalizer that llama.cpp could not be given normalized text for as easily.
    """
    forms = [str(step["type"]) for step in files.steps("normalizer")]
    if forms not in ([], [NFC]):
        raise ExportError(
            f"tokenizer.json normalizes text ({', '.join(forms)}), llama.cpp's byte-level BPE does not: only NFC, "
            "which most text is in already, is let through"
        )
    return NFC if forms else None


def check(path: Path, folder: Path) -> str:
    """Hold llama.cpp's token ids of file `path` against those of the tokenizer in `folder`; a sentence for the report.

    Raises ExportError for the first text that differs, and for a token that ends a generation but not in llama.cpp;
    MissingPackageError without llama.cpp.
    """
    need_llama_cpp()
    files = read(folder)
    form = normal_form(files) if files.kind == "BPE" and not files.model.get("byte_fallback") else None
    try:
        said = parity.against_llama_cpp(path, folder, _normalize if form else str, left_out(files))
        with parity.llama_cpp_vocabulary(path) as vocabulary:
            endless = [end for end in special.end_ids(files) if not vocabulary.ends(end)]
    except SourceError as error:
        raise ExportError(f"the tokenizer of {path.name} in llama.cpp is not that of {folder}: {error}") from error
    if endless:
        raise ExportError(f"tokens {endless} end a generation, but not in llama.cpp, which can be told of three")
    return said + (", each brought into NFC first: llama.cpp does not normalize text itself" if form else "")


def left_out(files: Files) -> list[parity.LeftOut]:
    """Texts on which llama.cpp's tokenizers of this kind are known to differ, with the reason."""
    if files.kind == "BPE" and scored.spaces_as_added(files):
        why = f"a text that has {SPACE} itself: runs of it are added tokens, in llama.cpp runs of spaces"
        return [parity.LeftOut(why, lambda text: SPACE in text)]
    if files.kind != "WordPiece":
        return []
    spelled = parity.LeftOut(f"{SPACE} itself, which marks the beginning of a word there", lambda text: SPACE in text)
    if not wordpiece.strips_accents(files):
        return [spelled]
    marks = "spacing and enclosing marks (Indic scripts, keycaps): llama.cpp drops them as if they were accents"
    hangul = "Hangul: llama.cpp does not decompose its syllables, BERT does where it strips accents"
    return [
        spelled,
        parity.LeftOut(marks, lambda text: any(unicodedata.category(c) in ("Mc", "Me") for c in text)),
        parity.LeftOut(hangul, lambda text: any("\uac00" <= c <= "\ud7a3" for c in text)),
    ]


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def need_llama_cpp() -> None:
    try:
        import llama_cpp  # noqa: F401
    except ImportError as error:
        purpose = "to check the tokenizer of a GGUF file (or set the exporter's option check_tokenizer: false)"
        raise MissingPackageError("llama_cpp", "llamacpp", purpose) from error


def pre_name(folder: Path, vocab_size: int, *, prove: bool = True) -> tuple[str, str]:
    """`tokenizer.ggml.pre` of a byte-level tokenizer, and the sentence for the report where it was found by proof.

    Raises ExportError where no list of llama.cpp is known to be the tokenizer's, nor proves to be (`prove`).
    """
    files = read(folder)
    name = byte_level.known_pre(files)
    if name is not None:
        return name, ""
    patterns = [step for step in files.steps("pre_tokenizer") if step["type"] != "ByteLevel"]
    if not prove:
        raise ExportError(
            f"tokenizer.json cuts text by {patterns}, which no list known here does: set check_tokenizer: true"
        )
    need_llama_cpp()
    for candidate, said in _proven(files, folder, vocab_size):
        return candidate, f"tokenizer.ggml.pre is {candidate!r}, chosen by proof: {said}"
    raise ExportError(
        f"tokenizer.json cuts text by {patterns}, and none of llama.cpp's lists gives its token ids: llama.cpp would "
        "tokenize differently"
    )


def _proven(files: Files, folder: Path, vocab_size: int) -> Iterator[tuple[str, str]]:
    """Candidates that give the tokenizer's own ids on every text."""
    with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
        for candidate in byte_level.CANDIDATES:
            path = Path(scratch) / "vocabulary.gguf"
            _write(path, files, vocab_size, candidate)
            try:
                yield candidate, check(path, folder)
            except ExportError:
                continue


def _write(path: Path, files: Files, vocab_size: int, pre: str) -> None:
    """A file that holds a vocabulary alone."""
    writer = gguf.GGUFWriter(path, "llama")
    byte_level.add(writer, files, vocab_size, pre)
    special.add(writer, files)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
