"""Tokenize the items of the recipe's suites, before anything costly: one that does not fit the context is refused here.

items.jsonl        the items as they are checked (lilliput.suites), of all suites one after the other
questions.json     the same as token ids (targets.answers)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput import suites
from lilliput.errors import InputError
from lilliput.progress import Progress
from lilliput.suites import Haystack, Item
from lilliput.texts import docstrings_text

if TYPE_CHECKING:
    from targets.answers import Question

ITEMS = "items.jsonl"
CJK = "\u2e80"  # scripts from here on write no space between words


def work(
    source: Path, names: Sequence[str], count: int | None, context: int, folder: Path, progress: Progress
) -> None:  # fmt: skip
    from lilliput.source import open_stage
    from lilliput.tokenizer_folder import load_tokenizer
    from targets.answers import save_questions

    items = [item for name in names for item in suites.load(name, count)]
    home = open_stage(source).tokenizer
    tokenizer = load_tokenizer(home)
    save_questions([_question(item, tokenizer, home, context) for item in items], folder)
    (folder / ITEMS).write_text("".join(item.model_dump_json(by_alias=True) + "\n" for item in items), encoding="utf-8")
    progress(1, 1)


def items_in(folder: Path) -> tuple[Item, ...]:
    """What `work` wrote."""
    return suites.load(str(folder / ITEMS))


def _question(item: Item, tokenizer: Any, home: Path, context: int) -> Question:
    from lilliput.tokenizer_folder import stop_tokens
    from targets.answers import Question

    chat = bool(tokenizer.chat_template) and not item.raw
    text = item.prompt if item.haystack is None else _buried(item.haystack, item.prompt, tokenizer, context)
    prompt = _rendered(text, tokenizer) if chat else tokenizer.encode(text, verbose=False)
    space = "" if chat or text[-1] >= CJK else " "
    choices = [tokenizer.encode(space + choice, add_special_tokens=False) for choice in item.choices]
    longest = max(map(len, choices)) if choices else item.max_tokens
    if len(prompt) + longest > context:
        raise InputError(
            f"suites: {item.id} has {len(prompt)} tokens and {longest} for its answer, the context is {context}: "
            "shorten it, or raise the recipe's context"
        )
    return Question(
        id=item.id, prompt=tuple(prompt), choices=tuple(map(tuple, choices)), max_tokens=item.max_tokens,
        stop_tokens=tuple(sorted(stop_tokens(home, tokenizer.eos_token_id))),
    )  # fmt: skip


def _rendered(text: str, tokenizer: Any) -> list[int]:
    turns = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def _buried(haystack: Haystack, prompt: str, tokenizer: Any, context: int) -> str:
    """Docstrings, the needle in them, then the question: about `fill` of the context in tokens."""
    words = tokenizer.encode(docstrings_text(), add_special_tokens=False, verbose=False)
    room = max(0, int(haystack.fill * context) - len(tokenizer.encode(f"{haystack.needle}{prompt}", verbose=False)))
    hay = words[:room]
    cut = round(haystack.depth * len(hay))
    before, after = (tokenizer.decode(part).strip() for part in (hay[:cut], hay[cut:]))
    return "\n\n".join(part for part in (before, haystack.needle, after, prompt) if part)
