"""The `.litertlm` bundle that LiteRT-LM opens: LlmMetadata, the tokenizer.json and the `.tflite`, in that order.

LlmMetadata says how a conversation becomes tokens: the chat template (LiteRT-LM renders Jinja itself), the
start token where the tokenizer puts one before a text, and the stop tokens: the tokenizer's end of
sequence, and the special tokens that the chat template writes after an assistant's answer. Its model type tells
LiteRT-LM how the family writes calls of tools and images; a family without one is the generic type.

litert-lm-builder stamps each bundle with a random uuid and the time. Here the uuid is derived from the model's
sha256 and the time is the epoch, so that the same model gives the same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litert_lm_builder import litertlm_builder as builder
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from lilliput.artifact import sha256
from lilliput.errors import ExportError
from lilliput.model import QuantizedModel
from lilliput.tokenizer_folder import load_tokenizer

EPOCH = "1970-01-01T00:00:00+00:00"
# LiteRT-LM hands a message's content over as a list of parts; templates of text models expect a string.
TEXT_OF_PARTS = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for m in messages -%}"
    "{%- if m['content'] is string -%}{%- set flat.messages = flat.messages + [m] -%}"
    "{%- else -%}{%- set text = m['content'] | map(attribute='text') | join -%}"
    "{%- set flat.messages = flat.messages + [{'role': m['role'], 'content': text}] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
MODEL_TYPES = {"gemma3": "gemma3", "qwen2": "qwen2p5", "qwen3": "qwen3"}  # LlmModelType's field by the decoder's family
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Conversation:
    """How a tokenizer's folder says that text becomes tokens."""

    template: str | None
    start_token: str | None
    stop_tokens: tuple[str, ...]


def write(model: QuantizedModel, tflite: Path, context: int, path: Path) -> None:
    """Write the bundle. Raises ExportError where the tokenizer has no tokenizer.json."""
    tokenizer = model.tokenizer / "tokenizer.json"
    if not tokenizer.is_file():
        raise ExportError(
            f"{model.tokenizer}: no tokenizer.json, which a .litertlm bundle holds; export with bundle: false"
        )
    file = builder.LitertLmFileBuilder()
    metadata_file = path.with_suffix(".metadata")
    kind = MODEL_TYPES.get(model.config.family, "generic_model")
    metadata_file.write_bytes(
        metadata(conversation(model.tokenizer), context, kind).SerializeToString(deterministic=True)
    )
    try:
        file.add_llm_metadata(str(metadata_file))
        file.add_hf_tokenizer(str(tokenizer))
        file.add_tflite_model(str(tflite), builder.TfLiteModelType.PREFILL_DECODE)
        with fixed_identity(sha256(tflite)), path.open("wb") as stream:
            file.build(stream)
    finally:
        metadata_file.unlink()


def metadata(talk: Conversation, context: int, kind: str = "generic_model") -> Any:
    """LlmMetadata, as LiteRT-LM's protocol buffer; `kind` is the field of LlmModelType that is set."""
    message = llm_metadata_pb2.LlmMetadata()
    message.max_num_tokens = context
    getattr(message.llm_model_type, kind).SetInParent()
    if talk.start_token is not None:
        message.start_token.token_str = talk.start_token
    for token in talk.stop_tokens:
        message.stop_tokens.add().token_str = token
    if talk.template is not None:
        message.jinja_prompt_template = TEXT_OF_PARTS + talk.template
    return message


def conversation(folder: Path) -> Conversation:
    """Read a tokenizer's folder with transformers."""
    tokenizer = load_tokenizer(folder)
    template = tokenizer.chat_template
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    if template is not None:
        after = _after_answer(tokenizer)
        stops += [t for t in _special_tokens(folder) if t in after and t not in stops]
    starts = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    if (
        template is not None and "bos_token" in template
    ):  # LiteRT-LM renders bos_token as nothing, and prepends it itself
        starts = True
    return Conversation(template, tokenizer.bos_token if starts else None, tuple(stops))


def _after_answer(tokenizer: Any) -> str:
    """What the chat template writes after an assistant's answer."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
    rendered: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return rendered.rpartition(MARK)[2]


def _special_tokens(folder: Path) -> list[str]:
    added = json.loads((folder / "tokenizer.json").read_text()).get("added_tokens", [])
    return [token["content"] for token in added if token["special"]]


@contextmanager
def fixed_identity(digest: str) -> Iterator[None]:
    """Have litert-lm-builder stamp the bundle with an identity that depends on `digest` alone."""
    original = builder.populate_system_metadata

    def stamped(entries: list[Any]) -> list[Any]:
        identity = {"uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, digest)), "creation_timestamp": EPOCH}
        return entries + [builder.Metadata(key=k, value=v, dtype=builder.DType.STRING) for k, v in identity.items()]

    builder.populate_system_metadata = stamped
    try:
        yield
    finally:
        builder.populate_system_metadata = original
