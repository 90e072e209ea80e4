"""How a generation begins and ends: end-of-text tokens, the chat template, the vocabulary's size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lilliput.checks.base import RUNTIMES, NotCheckedError, Rule, Seen
from lilliput.checks.opened import Opened, Text

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
CHAT_TOKENS = re.compile(r"im_start|im_end|start_of_turn|end_of_turn|start_header_id|eot_id|<\|(user|assistant)\|>")


def _text(opened: Opened) -> Text | None:
    return opened.text


def end(opened: Opened) -> Iterator[Seen]:
    text = _text(opened)
    if text is None:
        return
    if not text.end_ids:
        yield Seen(text.end_place, "names no token that ends a text")
        return
    for token in text.end_ids:
        if text.tokens is not None and not 0 <= token < text.tokens:
            yield Seen(text.end_place, f"names token {token}, the vocabulary ends at {text.tokens - 1}")


def end_of_turn(opened: Opened) -> Iterator[Seen]:
    """What the chat template writes after an answer should be among the tokens that end one.

    Special tokens only; the first of them, as a model that writes it is done.
    """
    text = _text(opened)
    if text is None or not text.template or not text.end_ids:
        return
    special, rendered = _special_tokens(opened), _rendered(text.template, opened)
    after = rendered.rpartition(MARK)[2]
    found = sorted((after.index(token), token) for token in special if token in after)
    if found and special[found[0][1]] not in text.end_ids:
        token = found[0][1]
        yield Seen(
            text.end_place,
            f"is {', '.join(map(str, text.end_ids))}, but the chat template ends an answer with {token} "
            f"({special[token]})",
        )


def _special_tokens(opened: Opened) -> dict[str, int]:
    """Control tokens by their text."""
    if opened.format == "gguf":
        control = 3  # gguf.TokenType.CONTROL
        listed = zip(opened.gguf.tokens(), opened.gguf.types(), strict=False)
        return {token: i for i, (token, kind) in enumerate(listed) if kind == control}
    return special_tokens(opened.tokenizer_folder())


def special_tokens(folder: Path) -> dict[str, int]:
    """The special tokens of a tokenizer.json by their text."""
    try:
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens") or []
    except (OSError, ValueError) as error:
        raise NotCheckedError(f"{folder}: no tokenizer.json that can be read") from error
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _rendered(template: str, opened: Opened) -> str:
    """A question and an answer through the template, in the environment that transformers gives templates."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: "2026-01-01"
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
    names = {name: _named(opened, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        return environment.from_string(template).render(messages=turns, add_generation_prompt=False, **names)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise NotCheckedError(f"the chat template does not render ({error})") from error


def _refuse(message: str) -> str:
    """What templates call for a conversation that they do not take."""
    raise ValueError(message)


def _named(opened: Opened, name: str) -> str:
    """The text of a special token, as the file or its tokenizer names it."""
    if opened.format == "gguf":
        index: Any = opened.gguf.fields.get(f"tokenizer.ggml.{name.removesuffix('_token')}_token_id")
        tokens = opened.gguf.tokens()
        return tokens[index] if index is not None and 0 <= index < len(tokens) else ""
    path = opened.tokenizer_folder() / "tokenizer_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None
    return str(stated["content"] if isinstance(stated, dict) else stated or "")


def template(opened: Opened) -> Iterator[Seen]:
    text = _text(opened)
    if text is None or text.template:
        return
    tokens = [token for token in _special_tokens(opened) if CHAT_TOKENS.search(token)]
    if tokens:
        yield Seen(text.template_place, f"there is none, but the vocabulary has {', '.join(sorted(tokens)[:3])}")


def vocabulary(opened: Opened) -> Iterator[Seen]:
    """Ids beyond the embedding crash a lookup; fewer tokens than rows are usual padding."""
    text, table = _text(opened), opened.embedding
    if text is not None and text.tokens is not None and table is not None and text.tokens > table.shape[0]:
        yield Seen(text.place, f"has ids up to {text.tokens - 1}, {table.name} has {table.shape[0]} rows")


RULES = (
    Rule(
        id="TEXT-END",
        formats=RUNTIMES,
        severity="error",
        summary="no token that ends a text, or one beyond the vocabulary",
        reason="generation runs on to the end of the cache",
        reference="ggml-org/llama.cpp#6772",
        fix="name the source's end-of-text tokens (generation_config.json lists them)",
        check=end,
    ),
    Rule(
        id="TEXT-END-OF-TURN",
        formats=RUNTIMES,
        severity="error",
        summary="a chat template whose end of an answer is not among the tokens that end a text",
        reason="in a chat the model ends its turn, and the runtime goes on generating both sides",
        reference="ggml-org/llama.cpp#6745",
        fix="add the template's end-of-turn token to the tokens that end a text",
        check=end_of_turn,
    ),
    Rule(
        id="TEXT-TEMPLATE",
        formats=RUNTIMES,
        severity="warning",
        summary="chat tokens in the vocabulary, and no chat template",
        reason="clients then guess a template, or join roles by plain text",
        reference="ggml-org/llama.cpp#8403",
        fix="store the source's chat template",
        check=template,
    ),
    Rule(
        id="TEXT-VOCABULARY",
        formats=RUNTIMES,
        severity="error",
        summary="a tokenizer with ids beyond the embedding",
        reason="the tokenizer beside the file is another model's, or of another revision",
        reference="ggml-org/llama.cpp#3743",
        fix="put the tokenizer beside the file that the model was trained with",
        check=vocabulary,
    ),
)
