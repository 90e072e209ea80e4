"""Tokenize the items of the recipe's suites, before anything costly: one that does not fit the context is refused here.

items.json         the items as they are checked (lilliput.suites), of all suites one after the other
questions.json     the same as token ids (targets.answers)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from lilliput import suites
from lilliput.errors import InputError
from lilliput.progress import Progress
from lilliput.suites import Haystack, Item, harness
from lilliput.suites.harness import HarnessItem, HarnessQuestion
from lilliput.texts import docstrings_text

if TYPE_CHECKING:
    from targets.answers import Question

ITEMS = "items.json"
_ITEMS = TypeAdapter(tuple[Item | HarnessItem, ...])
CJK = "\u2e80"  # scripts from here on write no space between words


def work(
    source: Path, names: Sequence[str], count: int | None, context: int, folder: Path, progress: Progress
) -> None:  # fmt: skip
    from lilliput.source import open_stage
    from lilliput.tokenizer_folder import load_tokenizer, stop_tokens
    from targets.answers import Question, save_questions

    home = open_stage(source).tokenizer
    tokenizer = load_tokenizer(home)
    stops = tuple(sorted(stop_tokens(home, tokenizer.eos_token_id)))
    items, questions = list[Item | HarnessItem](), list[Question]()
    for name in names:
        if harness.is_task(name):
            found = list(harness.questions(name, tokenizer, count))
            items += [asked.item for asked in found]
            questions += [_harness_question(asked, stops, context) for asked in found]
        else:
            own = suites.load(name, count)
            items += own
            questions += [_question(item, tokenizer, stops, context) for item in own]
    save_questions(questions, folder)
    (folder / ITEMS).write_bytes(_ITEMS.dump_json(tuple(items), by_alias=True))
    progress(1, 1)


def items_in(folder: Path) -> tuple[Item | HarnessItem, ...]:
    """What `work` wrote."""
    return _ITEMS.validate_json((folder / ITEMS).read_bytes())


def _harness_question(asked: HarnessQuestion, stops: tuple[int, ...], context: int) -> Question:
    from targets.answers import Question

    longest = max(map(len, asked.choices), default=asked.max_tokens)
    _check_room(asked.item.id, len(asked.prompt), longest, context)
    return Question(
        id=asked.item.id, prompt=asked.prompt, choices=asked.choices, given=asked.given, max_tokens=asked.max_tokens,
        stop_tokens=stops,
    )  # fmt: skip


def _question(item: Item, tokenizer: Any, stops: tuple[int, ...], context: int) -> Question:
    from targets.answers import Question

    chat = bool(tokenizer.chat_template) and not item.raw
    text = item.prompt if item.haystack is None else _buried(item.haystack, item.prompt, tokenizer, context)
    prompt = _rendered(text, tokenizer) if chat else tokenizer.encode(text, verbose=False)
    space = "" if chat or text[-1] >= CJK else " "
    choices = [tokenizer.encode(space + choice, add_special_tokens=False) for choice in item.choices]
    longest = max(map(len, choices)) if choices else item.max_tokens
    _check_room(item.id, len(prompt), longest, context)
    return Question(
        id=item.id, prompt=tuple(prompt), choices=tuple(map(tuple, choices)), max_tokens=item.max_tokens,
        stop_tokens=stops,
    )  # fmt: skip


def _check_room(name: str, prompt: int, longest: int, context: int) -> None:
    if prompt + longest > context:
        raise InputError(
            f"suites: {name} has {prompt} tokens and {longest} for its answer, the context is {context}: "
            "shorten it, or raise the recipe's context"
        )


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
