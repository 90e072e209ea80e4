"""The sections of a .litertlm bundle, and the tokenizer in it.

    0   magic LITERTLM      24  end of the header, uint64      32  header: a flatbuffer that lists sections
    a section   begin and end in the file, and a type: TFLiteModel, HF_Tokenizer_Zlib, LlmMetadataProto, …

HF_Tokenizer_Zlib is the length of a tokenizer.json (uint64) and its bytes, deflated. LlmMetadataProto is a protocol
buffer with the chat template and the stop tokens. Source: litert_lm_builder 0.18, litertlm_core and litertlm_builder.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from lilliput.errors import ArtifactError, MissingPackageError

MAGIC = b"LITERTLM"
HEADER_END_AT, HEADER_BEGIN = 24, 32
TOKENIZER, METADATA, MODEL = "HF_Tokenizer_Zlib", "LlmMetadataProto", "TFLiteModel"
LENGTH_BYTES = 8
# what flatbuffers, zlib and protobuf raise where offsets lead out of the file, or to nothing
DAMAGES = (struct.error, zlib.error, IndexError, KeyError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class Section:
    """`kind` is the format's own name of the section's type; begin and end are offsets in the file."""

    kind: str
    begin: int
    end: int


def sections(data: bytes) -> tuple[Section, ...]:
    """The sections of a bundle that begins with `data` (its header at least). Raises one of DAMAGES."""
    try:
        from litert_lm_builder import litertlm_header_schema_py_generated as schema
    except ModuleNotFoundError as missing:
        raise MissingPackageError("litert-lm-builder", "litert", "reading a .litertlm bundle") from missing
    end = int.from_bytes(data[HEADER_END_AT : HEADER_END_AT + 8], "little")
    listed = schema.LiteRTLMMetaData.GetRootAs(data[HEADER_BEGIN:end], 0).SectionMetadata()
    kinds = {value: name for name, value in vars(schema.AnySectionDataType).items() if isinstance(value, int)}
    objects = (listed.Objects(i) for i in range(listed.ObjectsLength()))
    return tuple(Section(kinds[o.DataType()], int(o.BeginOffset()), int(o.EndOffset())) for o in objects)


def save_tokenizer(bundle: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json as the bundle holds them.

    Raises ArtifactError where the bundle is damaged, or holds a tokenizer of another kind.
    """
    data = bundle.read_bytes()
    try:
        found = {section.kind: data[section.begin : section.end] for section in sections(data)}
        text = zlib.decompress(found[TOKENIZER][LENGTH_BYTES:])
        config, stops = _metadata(found[METADATA], {t["content"]: t["id"] for t in json.loads(text)["added_tokens"]})
    except DAMAGES as error:
        raise ArtifactError(f"{bundle}: holds no tokenizer.json that can be read ({error}): export it again") from error
    (folder / "tokenizer.json").write_bytes(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")


def _metadata(data: bytes, ids: dict[str, int]) -> tuple[dict[str, str], list[int]]:
    """tokenizer_config.json, and the ids of the stop tokens that are special tokens of the tokenizer."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    message = llm_metadata_pb2.LlmMetadata()
    message.ParseFromString(data)
    stops = [token.token_str for token in message.stop_tokens if token.token_str in ids]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if stops:
        config["eos_token"] = stops[0]
    if message.start_token.token_str:
        config["bos_token"] = message.start_token.token_str
    if message.jinja_prompt_template:
        config["chat_template"] = message.jinja_prompt_template
    return config, [ids[token] for token in stops]
