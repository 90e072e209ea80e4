"""What a file says of the model, and its tokenizer, against the source's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lilliput.checks.base import RUNTIMES, NotCheckedError, Rule, Seen
from lilliput.checks.opened import Opened

TOLERANCE = 1e-3  # of bases and epsilons read back from float32 tables and attributes
APART = ("max_positions", "context", "rope_theta")  # have rules of their own, or say what the file holds


def config(opened: Opened) -> Iterator[Seen]:
    stated = asdict(opened.source.config)
    for field, fact in opened.facts.items():
        if field in stated and field not in APART and not _equal(fact.value, stated[field]):
            yield Seen(fact.place, f"{field} is {fact.value}, the source's is {stated[field]}")


def _equal(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE) if isinstance(b, float) else bool(a == b)


def rotary(opened: Opened) -> Iterator[Seen]:
    fact, wanted = opened.facts.get("rope_theta"), opened.source.config
    if opened.format != "gguf" and (wanted.rope_scaling or wanted.rope_dims or wanted.rope_local_theta):
        raise NotCheckedError("the frequencies of this model are not those of a base alone")
    if wanted.positions == "rope" and fact is not None and not _equal(float(fact.value), wanted.rope_theta):
        yield Seen(fact.place, f"the rotary base is {float(fact.value):.6g}, the source's is {wanted.rope_theta:.6g}")


def context(opened: Opened) -> Iterator[Seen]:
    """Caches may be shorter than what the model was trained for; nothing may be longer."""
    longest = opened.source.config.max_positions
    for field in ("max_positions", "context"):
        fact = opened.facts.get(field)
        if fact is not None and int(fact.value) > longest:
            yield Seen(fact.place, f"is {fact.value}, the source was trained for {longest} positions")


def tokenizer(opened: Opened) -> Iterator[Seen]:
    """Token ids on the fixed texts; a GGUF file's by llama.cpp itself."""
    from lilliput import parity
    from lilliput.errors import SourceError

    place = "tokenizer.ggml" if opened.format == "gguf" else opened.text.place if opened.text else ""
    try:
        if opened.format == "gguf":
            _check_gguf(opened)
        else:
            theirs, special = parity.encoder(opened.source.tokenizer)
            ours, _ = parity.encoder(opened.tokenizer_folder())
            parity.check(opened.path.name, ours, theirs, special)
    except SourceError as error:
        yield Seen(place, str(error).partition(": the model would")[0])


def _check_gguf(opened: Opened) -> None:
    """Only BPE, byte-level or with byte fallback: other kinds differ from their sources by design."""
    from lilliput import parity

    kind = opened.gguf.fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise NotCheckedError(f"tokenizer.ggml.model {kind!r} differs from its source by design on some texts")
    said = parity.against_llama_cpp(opened.path, opened.source.tokenizer)
    if said.startswith("not proven"):
        raise NotCheckedError(said.removeprefix("not proven: "))


def end(opened: Opened) -> Iterator[Seen]:
    """Every token that ends a text in the source ends one here, and the first one here ends one there."""
    wanted, text = end_ids(opened.source.tokenizer), opened.text
    if text is None or not text.end_ids or not wanted:
        return
    missing = sorted(set(wanted) - set(text.end_ids))
    listed = ", ".join(map(str, text.end_ids))
    if missing:
        yield Seen(text.end_place, f"is {listed}, the source also ends at {', '.join(map(str, missing))}")
    elif text.end_ids[0] not in wanted:
        yield Seen(text.end_place, f"is {text.end_ids[0]}, at which no text of the source ends")


def end_ids(folder: Path) -> tuple[int, ...]:
    """generation_config.json's eos_token_id, or the tokenizer's."""
    stated = _json(folder / "generation_config.json").get("eos_token_id")
    if stated is not None:
        return (stated,) if isinstance(stated, int) else tuple(stated)
    name = _json(folder / "tokenizer_config.json").get("eos_token")
    text = name.get("content") if isinstance(name, dict) else name
    added = _json(folder / "tokenizer.json").get("added_tokens") or []
    return tuple(token["id"] for token in added if text and token["content"] == text)


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return loaded


def template(opened: Opened) -> Iterator[Seen]:
    """The source's template, alone or behind a preamble (bundles flatten a message's parts first)."""
    wanted, text = chat_template(opened.source.tokenizer), opened.text
    if text is None or not wanted:
        return
    if not text.template:
        yield Seen(text.template_place, "there is no chat template, the source has one")
    elif not text.template.rstrip().endswith(wanted.rstrip()):
        yield Seen(text.template_place, "the chat template is not the source's")


def chat_template(folder: Path) -> str | None:
    """chat_template.jinja, or the (default) one in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    stored = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(stored, list):
        stored = {entry["name"]: entry["template"] for entry in stored}.get("default")
    return stored


RULES = (
    Rule(
        id="SOURCE-CONFIG",
        formats=RUNTIMES,
        severity="error",
        summary="numbers of layers, heads or sizes other than the source's",
        reason="a file that states another architecture than its weights have is read wrongly, or not at all",
        reference="ggml-org/llama.cpp#2376",
        fix="convert again from this source",
        check=config,
        needs="source",
    ),
    Rule(
        id="SOURCE-ROPE",
        formats=RUNTIMES,
        severity="error",
        summary="another rotary base than the source's",
        reason="with a wrong base a model reads near tokens well and loses far ones",
        reference="ggml-org/llama.cpp#3090",
        fix="convert again with the source's rope_theta",
        check=rotary,
        needs="source",
    ),
    Rule(
        id="SOURCE-CONTEXT",
        formats=RUNTIMES,
        severity="error",
        summary="a longer context than the source was trained for",
        reason="clients take the stated length for what the model can do, and get nonsense behind the trained one",
        reference="ggml-org/llama.cpp#3090",
        fix="state the source's max_position_embeddings",
        check=context,
        needs="source",
    ),
    Rule(
        id="SOURCE-TOKENIZER",
        formats=RUNTIMES,
        severity="error",
        summary="other token ids than the source's tokenizer gives",
        reason="the model then reads other tokens than it was trained on: every answer suffers, none fails",
        reference="ggml-org/llama.cpp#6920",
        fix="put the source's tokenizer into the file or beside it; for GGUF check tokenizer.ggml.pre and merges",
        check=tokenizer,
        needs="source",
    ),
    Rule(
        id="SOURCE-END",
        formats=RUNTIMES,
        severity="error",
        summary="tokens that end a text in the source and not in the file",
        reason="generation runs on where the model has ended its turn",
        reference="ggml-org/llama.cpp#6745",
        fix="list all of the source's end-of-text tokens",
        check=end,
        needs="source",
    ),
    Rule(
        id="SOURCE-TEMPLATE",
        formats=RUNTIMES,
        severity="warning",
        summary="another chat template than the source's, or none",
        reason="builders drop templates for some families; a model that is asked in another form answers worse",
        reference="microsoft/onnxruntime-genai#1350",
        fix="store the source's chat template",
        check=template,
        needs="source",
    ),
)
