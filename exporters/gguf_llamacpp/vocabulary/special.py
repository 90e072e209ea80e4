"""Special tokens: their ids, what a text gets at its ends by itself, what ends a generation, and the chat template.

llama.cpp names three tokens that end a generation (eos, eot: end of turn, eom: end of message) and finds others by
their text. Here eos is the tokenizer's own; eot is the next of generation_config.json that the chat template writes.
"""

from __future__ import annotations

import re

import gguf

from exporters.gguf_llamacpp.vocabulary.files import Files
from lilliput.errors import ExportError

PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")
NAMED = ("bos", "eos", "unk", "pad", "sep", "mask")


def add(writer: gguf.GGUFWriter, files: Files) -> None:
    """Add ids, flags and template. Raises ExportError for what llama.cpp cannot add at a text's ends."""
    ids = {name: files.token_id(f"{name}_token") for name in NAMED}
    if files.kind == "WordPiece":
        ids["bos"] = files.token_id("cls_token")
    ends = end_ids(files)
    if ids["eos"] is None and ends:
        ids["eos"] = ends[0]
    for name, value in ids.items():
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    turns = sorted((end for end in ends if end != ids["eos"]), key=lambda end: not _in_template(files, end))
    for name, end in zip(("eot", "eom"), turns, strict=False):
        getattr(writer, f"add_{name}_token_id")(end)
    before, after = added_tokens(files)
    if files.kind == "WordPiece":
        _check_wordpiece(before, after, files)
    else:
        writer.add_add_bos_token(_adds(before, ids["bos"], files, "beginning"))
        writer.add_add_eos_token(_adds(after, ids["eos"], files, "end"))
    if files.chat_template:
        writer.add_chat_template(files.chat_template)


def end_ids(files: Files) -> list[int]:
    """The tokens that end a generation, the tokenizer's own end of sequence first."""
    named = files.generation.get("eos_token_id")
    listed = [files.token_id("eos_token"), *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(end for end in listed if end is not None))


def _in_template(files: Files, token: int) -> bool:
    text = files.added.get(token, {}).get("content")
    return text is not None and text in (files.chat_template or "")


def added_tokens(files: Files) -> tuple[list[str], list[str]]:
    """The special tokens that the post-processor puts before and after a text."""
    before: list[str] = []
    after: list[str] = []
    for step in files.steps("post_processor"):
        if step["type"] == "TemplateProcessing":
            single = step["single"]
            at = next(i for i, part in enumerate(single) if "Sequence" in part)
            before += [part["SpecialToken"]["id"] for part in single[:at]]
            after += [part["SpecialToken"]["id"] for part in single[at + 1 :]]
        elif step["type"] in ("BertProcessing", "RobertaProcessing"):
            before, after = [*before, step["cls"][0]], [*after, step["sep"][0]]
        elif step["type"] != "ByteLevel":
            raise ExportError(f"tokenizer.json has the post-processor {step['type']}, which llama.cpp has not")
    return before, after


def _adds(tokens: list[str], special: int | None, files: Files, where: str) -> bool:
    """Whether the tokens added at one side are exactly that side's own special token."""
    ids = {added["content"]: i for i, added in files.added.items()}
    if tokens and [ids.get(token) for token in tokens] != [special]:
        raise ExportError(
            f"tokenizer.json adds {tokens} at the {where} of a text, llama.cpp can add one token only: id {special}"
        )
    return bool(tokens)


def _check_wordpiece(before: list[str], after: list[str], files: Files) -> None:
    wanted = [files.token_id("cls_token")], [files.token_id("sep_token")]
    ids = {added["content"]: i for i, added in files.added.items()}
    if ([ids.get(token) for token in before], [ids.get(token) for token in after]) != wanted:
        raise ExportError(f"tokenizer.json adds {before} and {after} to a text, llama.cpp's WordPiece [CLS] and [SEP]")


def model_name(name: str, files: Files) -> str:
    """`general.name`, by which llama.cpp knows a tokenizer of Phi 3's: spaces behind its special tokens are dropped.

    A name with phi3 in it makes llama.cpp look up four tokens, and end where one is missing; so such a name is written
    where special tokens take the space behind them, and no other (llama_vocab::impl::load, "per token attributes").
    """
    strips = any(added["special"] and added["rstrip"] for added in files.added.values())
    if strips and all(token in files.vocabulary or token in _added_texts(files) for token in PHI3_TOKENS):
        return name if PHI3.search(name) else f"{name} (Phi-3)"
    return PHI3.sub("Phi 3", name)


def _added_texts(files: Files) -> set[str]:
    return {added["content"] for added in files.added.values()}
