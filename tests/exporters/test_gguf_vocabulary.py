"""The tokenizer in a GGUF file, held against the `tokenizers` package by llama.cpp's own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_models import TEXT, VOCAB_SIZE, tiny_quantized_model

import exporters.gguf_llamacpp as exporter
from exporters.gguf_llamacpp import vocabulary
from lilliput.errors import ExportError

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {**BYTES, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


KNOWN = {
    "gpt-2": (BYTES, False),
    "smollm": (sequence(DIGITS, BYTES), False),
    "llama-bpe": (sequence(split(LLAMA3), BYTES_ONLY), True),
    "dbrx": (sequence(split(LLAMA3, "Removed", invert=True), BYTES_ONLY), False),
    "qwen2": (sequence(split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), BYTES_ONLY), False),
    "tekken": (sequence(split(TEKKEN), BYTES_ONLY), True),
}


def steps_of(pre_tokenizer: dict[str, Any]) -> list[Any]:
    return list(vocabulary._flatten(pre_tokenizer, "pretokenizers"))


@pytest.mark.parametrize("name", KNOWN)
def test_knows_a_pre_tokenizer_by_its_steps(name: str) -> None:
    pre_tokenizer, ignore_merges = KNOWN[name]
    assert vocabulary.pre_name(steps_of(pre_tokenizer), ignore_merges) == name


@pytest.mark.parametrize(
    ("pre_tokenizer", "why"),
    [
        (sequence(split(r"\p{N}{1,4}"), BYTES), "which none known here does"),
        (sequence(DIGITS, split(LLAMA3), BYTES_ONLY), "which none known here does"),
        ({**BYTES, "add_prefix_space": True}, "which llama.cpp has not"),
        (sequence({"type": "Digits", "individual_digits": False}, BYTES), "which llama.cpp has not"),
        (sequence(split(LLAMA3, "MergedWithNext"), BYTES_ONLY), "which llama.cpp has not"),
        (sequence({"type": "Whitespace"}, BYTES), "which llama.cpp has not"),
    ],
)
def test_refuses_steps_that_llama_cpp_has_not(pre_tokenizer: dict[str, Any], why: str) -> None:
    with pytest.raises(ExportError, match=why):
        vocabulary.pre_name(steps_of(pre_tokenizer), False)


def changed_tokenizer(tmp_path: Path, **changes: Any) -> Path:
    """A tiny model's tokenizer folder with parts of tokenizer.json replaced."""
    folder = tiny_quantized_model(tmp_path).tokenizer
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def written(folder: Path, path: Path, vocab_size: int = VOCAB_SIZE) -> gguf.GGUFReader:
    """A GGUF file that holds a vocabulary alone."""
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary.add(writer, folder, vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return gguf.GGUFReader(path)


def field(file: gguf.GGUFReader, key: str) -> Any:
    return file.get_field(f"tokenizer.{key}").contents()


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken"])
def test_llama_cpp_tokenizes_as_tokenizer_json_does(tmp_path: Path, name: str) -> None:
    pre_tokenizer, ignore_merges = KNOWN[name]
    folder = changed_tokenizer(tmp_path, pre_tokenizer=pre_tokenizer)
    text = json.loads((folder / "tokenizer.json").read_text())
    text["model"]["ignore_merges"] = ignore_merges
    (folder / "tokenizer.json").write_text(json.dumps(text))
    assert field(written(folder, tmp_path / "v.gguf"), "ggml.pre") == name
    assert "proven against llama.cpp's own tokenizer" in exporter.check_tokenizer(tmp_path / "v.gguf", folder)


def test_special_tokens_types_and_template(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    file = written(folder, tmp_path / "v.gguf", VOCAB_SIZE + 2)
    assert [field(file, f"ggml.{name}_token_id") for name in ("bos", "eos", "eot")] == [0, 1, 5]
    assert field(file, "ggml.add_bos_token") is False
    assert field(file, "ggml.tokens")[-2:] == [f"[PAD{VOCAB_SIZE}]", f"[PAD{VOCAB_SIZE + 1}]"]
    types = field(file, "ggml.token_type")
    assert (types[0], types[1], types[10], types[-1]) == (3, 3, 1, 5)  # CONTROL, CONTROL, NORMAL, UNUSED
    assert "<|start|>" in field(file, "chat_template")


def test_a_token_that_the_template_adds_is_added_by_llama_cpp(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [0], "tokens": ["<|start|>"]}},
    }
    folder = changed_tokenizer(tmp_path, post_processor=template)
    assert field(written(folder, tmp_path / "v.gguf"), "ggml.add_bos_token") is True
    assert "proven" in exporter.check_tokenizer(tmp_path / "v.gguf", folder)


def test_refuses_another_token_at_the_beginning(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }
    with pytest.raises(ExportError, match=r"adds \['<\|end\|>'\] at the beginning of a text"):
        written(changed_tokenizer(tmp_path, post_processor=template), tmp_path / "v.gguf")


def sentencepiece_like(folder: Path, normalizer: list[dict[str, Any]]) -> Path:
    """A BPE with byte fallback as transformers makes of Llama 2's tokenizer: trained on TEXT, no pre-tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", vocabulary.SPACE)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False, max_token_length=12)
    bpe.train_from_iterator(
        [word for line in TEXT.split("\n") for word in line.replace(" ", "\n ").split("\n")], trainer
    )
    bpe.decoder = decoders.Sequence([decoders.Replace(vocabulary.SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    text = json.loads((folder / "tokenizer.json").read_text())
    text["added_tokens"] = text["added_tokens"][:3]  # byte tokens are no special tokens; they stand in the vocabulary
    text["normalizer"] = {"type": "Sequence", "normalizers": normalizer}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    return folder


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": vocabulary.SPACE}
PREPEND = {"type": "Prepend", "prepend": vocabulary.SPACE}


@pytest.mark.parametrize("steps", [[PREPEND, REPLACE], [REPLACE]], ids=["space in front", "no space in front"])
def test_a_sentencepiece_bpe_becomes_tokens_with_scores(tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    folder = sentencepiece_like(tmp_path / "spm", steps)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    file = written(folder, tmp_path / "v.gguf", size)
    assert field(file, "ggml.model") == "llama"
    assert field(file, "ggml.add_space_prefix") is (PREPEND in steps)
    assert field(file, "ggml.token_type")[:4] == [2, 3, 3, 6]  # UNKNOWN, CONTROL, CONTROL, BYTE
    assert "proven" in exporter.check_tokenizer(tmp_path / "v.gguf", folder)


def test_refuses_normalizers_that_llama_cpp_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="normalizes text"):
        written(changed_tokenizer(tmp_path, normalizer={"type": "NFC"}), tmp_path / "v.gguf")
    with pytest.raises(ExportError, match="SentencePiece BPE has not"):
        written(sentencepiece_like(tmp_path / "spm", [REPLACE, {"type": "NFKC"}]), tmp_path / "w.gguf", 500)


def test_refuses_a_tokenizer_that_is_no_bpe(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path, model={"type": "Unigram", "vocab": []})
    with pytest.raises(ExportError, match="a Unigram tokenizer, GGUF is written for BPE only"):
        written(folder, tmp_path / "v.gguf")


def test_refuses_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="token id 319 is beyond the model's vocabulary of 300"):
        written(changed_tokenizer(tmp_path), tmp_path / "v.gguf", 300)


def test_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no tokenizer\.json"):
        vocabulary.read(tmp_path)
