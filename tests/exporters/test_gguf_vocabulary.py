"""The tokenizer in a GGUF file, held against the `tokenizers` package by llama.cpp's own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_models import TEXT, VOCAB_SIZE, sentencepiece_model, tiny_quantized_model

from exporters.gguf_llamacpp import vocabulary
from exporters.gguf_llamacpp.vocabulary import byte_level, files, proof, scored, special
from lilliput import parity
from lilliput.errors import ExportError
from lilliput.parity_texts import TEXTS

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {**BYTES, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
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
    "qwen2": (sequence(split(QWEN2), BYTES_ONLY), False),
}
# Lists that no table here has: one by its own name in llama.cpp, one that llama.cpp has under several.
PROVEN = {
    "tekken": (sequence(split(TEKKEN), BYTES_ONLY), True),
    "ufakzeka": (sequence(split(QWEN2.removeprefix(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|")), BYTES_ONLY), False),
}


def files_with(pre_tokenizer: dict[str, Any], ignore_merges: bool) -> files.Files:
    model = {"type": "BPE", "ignore_merges": ignore_merges}
    return files.Files({"pre_tokenizer": pre_tokenizer, "model": model}, {}, {}, None)


@pytest.mark.parametrize("name", KNOWN)
def test_knows_a_pre_tokenizer_by_its_steps(name: str) -> None:
    pre_tokenizer, ignore_merges = KNOWN[name]
    assert byte_level.known_pre(files_with(pre_tokenizer, ignore_merges)) == name


@pytest.mark.parametrize(
    ("pre_tokenizer", "why"),
    [
        ({**BYTES, "add_prefix_space": True}, "which llama.cpp has not"),
        (sequence({"type": "Digits", "individual_digits": False}, BYTES), "which llama.cpp has not"),
        (sequence(split(LLAMA3, "MergedWithNext"), BYTES_ONLY), "which llama.cpp has not"),
        (sequence({"type": "Whitespace"}, BYTES), "which llama.cpp has not"),
    ],
)
def test_refuses_steps_that_llama_cpp_has_not(pre_tokenizer: dict[str, Any], why: str) -> None:
    with pytest.raises(ExportError, match=why):
        byte_level.known_pre(files_with(pre_tokenizer, False))


def changed_tokenizer(tmp_path: Path, *, ignore_merges: bool = False, **changes: Any) -> Path:
    """A tiny model's tokenizer folder with parts of tokenizer.json replaced."""
    folder = tiny_quantized_model(tmp_path).tokenizer
    path = folder / "tokenizer.json"
    text = json.loads(path.read_text())
    text["model"]["ignore_merges"] = ignore_merges
    path.write_text(json.dumps({**text, **changes}))
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


@pytest.mark.parametrize("name", KNOWN)
def test_llama_cpp_tokenizes_as_tokenizer_json_does(tmp_path: Path, name: str) -> None:
    pre_tokenizer, ignore_merges = KNOWN[name]
    folder = changed_tokenizer(tmp_path, pre_tokenizer=pre_tokenizer, ignore_merges=ignore_merges)
    assert field(written(folder, tmp_path / "v.gguf"), "ggml.pre") == name
    assert "proven against llama.cpp's own tokenizer" in proof.check(tmp_path / "v.gguf", folder)


@pytest.mark.parametrize("name", PROVEN)
def test_a_list_that_is_not_known_is_chosen_by_proof(tmp_path: Path, name: str) -> None:
    pre_tokenizer, ignore_merges = PROVEN[name]
    folder = changed_tokenizer(tmp_path, pre_tokenizer=pre_tokenizer, ignore_merges=ignore_merges)
    chosen, said = proof.pre_name(folder, VOCAB_SIZE)
    assert f"tokenizer.ggml.pre is {chosen!r}, chosen by proof: proven against llama.cpp's own tokenizer" in said
    assert field(written(folder, tmp_path / "v.gguf"), "ggml.pre") == chosen
    assert "proven" in proof.check(tmp_path / "v.gguf", folder)


def test_a_list_that_llama_cpp_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "CANDIDATES", ("gpt-2", "smollm", "no such list"))
    folder = changed_tokenizer(tmp_path, pre_tokenizer=sequence(split(r"\p{N}{1,2}|[^\p{N}]"), BYTES_ONLY))
    with pytest.raises(ExportError, match=r"none of llama\.cpp's lists gives its token ids"):
        written(folder, tmp_path / "v.gguf")
    with pytest.raises(ExportError, match="which no list known here does: set check_tokenizer"):
        proof.pre_name(folder, VOCAB_SIZE, prove=False)


def test_nfc_before_byte_level_is_written_and_said(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path, normalizer={"type": "NFC"})
    written(folder, tmp_path / "v.gguf")
    assert "each brought into NFC first" in proof.check(tmp_path / "v.gguf", folder)


def test_special_tokens_types_and_template(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1, 0]}))  # 0: in the template
    file = written(folder, tmp_path / "v.gguf", VOCAB_SIZE + 2)
    assert [field(file, f"ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")] == [0, 1, 0, 7]
    with parity.llama_cpp_vocabulary(tmp_path / "v.gguf") as seen:
        assert [token for token in range(VOCAB_SIZE) if seen.ends(token)] == [0, 1, 7]
    assert field(file, "ggml.add_bos_token") is False
    assert field(file, "ggml.tokens")[-2:] == [f"[PAD{VOCAB_SIZE}]", f"[PAD{VOCAB_SIZE + 1}]"]
    types = field(file, "ggml.token_type")
    assert (types[0], types[1], types[10], types[-1]) == (3, 3, 1, 5)  # CONTROL, CONTROL, NORMAL, UNUSED
    assert "<|start|>" in field(file, "chat_template")


def test_an_end_that_llama_cpp_cannot_be_told_of_is_refused(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5, 6, 7]}))
    written(folder, tmp_path / "v.gguf")
    with pytest.raises(ExportError, match=r"tokens \[7\] end a generation, but not in llama\.cpp"):
        proof.check(tmp_path / "v.gguf", folder)


def test_a_text_that_llama_cpp_takes_for_special_is_compared_as_text(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path)
    text = json.loads((folder / "tokenizer.json").read_text())
    text["model"]["vocab"]["</s>"] = VOCAB_SIZE  # a plain token, as in Qwen's vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(text))
    written(folder, tmp_path / "v.gguf", VOCAB_SIZE + 1)
    assert "it takes </s> for special, the tokenizer does not" in proof.check(tmp_path / "v.gguf", folder)


def test_a_token_that_the_template_adds_is_added_by_llama_cpp(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [0], "tokens": ["<|start|>"]}},
    }
    folder = changed_tokenizer(tmp_path, post_processor=template)
    assert field(written(folder, tmp_path / "v.gguf"), "ggml.add_bos_token") is True
    assert "proven" in proof.check(tmp_path / "v.gguf", folder)


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
    bpe.normalizer = normalizers.Replace(" ", scored.SPACE)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False, max_token_length=12)
    bpe.train_from_iterator(
        [word for line in TEXT.split("\n") for word in line.replace(" ", "\n ").split("\n")], trainer
    )
    bpe.decoder = decoders.Sequence([decoders.Replace(scored.SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
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


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": scored.SPACE}
PREPEND = {"type": "Prepend", "prepend": scored.SPACE}


@pytest.mark.parametrize("steps", [[PREPEND, REPLACE], [REPLACE]], ids=["space in front", "no space in front"])
def test_a_sentencepiece_bpe_becomes_tokens_with_scores(tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    folder = sentencepiece_like(tmp_path / "spm", steps)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    file = written(folder, tmp_path / "v.gguf", size)
    assert field(file, "ggml.model") == "llama"
    assert field(file, "ggml.add_space_prefix") is (PREPEND in steps)
    assert field(file, "ggml.token_type")[:4] == [2, 3, 3, 6]  # UNKNOWN, CONTROL, CONTROL, BYTE
    assert "proven" in proof.check(tmp_path / "v.gguf", folder)


def test_gemmas_spaces_stay_merges(tmp_path: Path) -> None:
    """Its split at spaces has none left to split at; its added runs of U+2581 print as spaces."""
    folder = sentencepiece_like(tmp_path / "spm", [REPLACE])
    text = json.loads((folder / "tokenizer.json").read_text())
    text["pre_tokenizer"] = split(" ", "MergedWithPrevious") | {"pattern": {"String": " "}}
    plain = {"special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    text["model"]["vocab"][2 * scored.SPACE] = len(text["model"]["vocab"])
    text["model"]["merges"].append([scored.SPACE, scored.SPACE])
    at = text["model"]["vocab"][2 * scored.SPACE]
    text["added_tokens"].append({"id": at, "content": 2 * scored.SPACE, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(text))
    file = written(folder, tmp_path / "v.gguf", at + 1)
    assert field(file, "ggml.token_type")[at] == gguf.TokenType.NORMAL
    assert "2 left out (a text that has" in proof.check(tmp_path / "v.gguf", folder)


@pytest.mark.parametrize("kind", ["t5", "xlm-roberta"])
def test_a_unigram_becomes_tokens_with_log_probabilities(tmp_path: Path, kind: str) -> None:
    folder = unigram(tmp_path, kind, add_prefix_space=True)
    text = files.read(folder)
    size = max([*text.vocabulary.values(), *text.added]) + 1
    file = written(folder, tmp_path / "v.gguf", size)
    assert (field(file, "ggml.model"), field(file, "ggml.add_eos_token")) == ("t5", True)
    assert "proven against llama.cpp's own tokenizer" in proof.check(tmp_path / "v.gguf", folder)


def test_a_unigram_without_a_space_in_front_is_refused(tmp_path: Path) -> None:
    folder = unigram(tmp_path, "t5", add_prefix_space=False)
    with pytest.raises(ExportError, match="puts no space in front of a text"):
        written(folder, tmp_path / "v.gguf", 1000)


def unigram(tmp_path: Path, kind: str, add_prefix_space: bool) -> Path:
    """SentencePiece's own Unigram with its map of characters (NFKC), as transformers converts it."""
    from transformers import T5TokenizerFast, XLMRobertaTokenizerFast

    model = sentencepiece_model(
        model_type="unigram", byte_fallback=False, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True,
        vocab_size=600, character_coverage=0.9995,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model)
    make = {"t5": T5TokenizerFast, "xlm-roberta": XLMRobertaTokenizerFast}[kind]
    made = make(str(tmp_path / "spiece.model"), extra_ids=0, add_prefix_space=add_prefix_space)
    made.save_pretrained(tmp_path / "unigram")
    return tmp_path / "unigram"


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_wordpiece_marks_beginnings(tmp_path: Path, lowercase: bool) -> None:
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    wordpiece = BertWordPieceTokenizer(lowercase=lowercase)
    wordpiece.train_from_iterator(TEXTS, vocab_size=900, show_progress=False)
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(wordpiece.get_vocab(), key=wordpiece.token_to_id)))
    BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=lowercase).save_pretrained(tmp_path / "bert")
    file = written(tmp_path / "bert", tmp_path / "v.gguf", len(wordpiece.get_vocab()))
    assert (field(file, "ggml.model"), field(file, "ggml.normalizer.lowercase")) == ("bert", lowercase)
    said = proof.check(tmp_path / "v.gguf", tmp_path / "bert")
    assert "proven" in said
    assert ("Hangul" in said) is lowercase


def test_refuses_normalizers_that_llama_cpp_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="normalizes text"):
        written(changed_tokenizer(tmp_path, normalizer={"type": "NFKC"}), tmp_path / "v.gguf")
    with pytest.raises(ExportError, match="SentencePiece BPE has not"):
        written(sentencepiece_like(tmp_path / "spm", [REPLACE, {"type": "NFKC"}]), tmp_path / "w.gguf", 500)
    model = {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}
    with pytest.raises(ExportError, match=r"which llama\.cpp's Unigram has not"):
        written(changed_unigram(tmp_path, model=model, normalizer={"type": "NFC"}), tmp_path / "u.gguf")
    with pytest.raises(ExportError, match="Unigram with byte fallback"):
        written(changed_unigram(tmp_path, model={**model, "byte_fallback": True}), tmp_path / "u.gguf")


def changed_unigram(tmp_path: Path, **changes: Any) -> Path:
    folder = tiny_quantized_model(tmp_path).tokenizer
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pre_tokenizer": None, **changes}))
    return folder


def test_refuses_a_tokenizer_that_llama_cpp_has_not(tmp_path: Path) -> None:
    folder = changed_unigram(tmp_path, model={"type": "WordLevel", "vocab": {"a": 0}})
    with pytest.raises(ExportError, match=r"a WordLevel tokenizer, llama\.cpp has BPE, Unigram and WordPiece"):
        written(folder, tmp_path / "v.gguf")


@pytest.mark.parametrize(
    ("name", "rstrip", "tokens", "written_name"),
    [
        ("My Phi-3 mini", False, (), "My Phi 3 mini"),
        ("My Phi-3 mini", True, ("</s>", "<unk>", "<s>", "<|endoftext|>"), "My Phi-3 mini"),
        ("mine", True, ("</s>", "<unk>", "<s>", "<|endoftext|>"), "mine (Phi-3)"),
        ("mine", False, (), "mine"),
    ],
)
def test_a_name_is_phi3s_where_its_tokenizer_is(
    name: str, rstrip: bool, tokens: tuple[str, ...], written_name: str
) -> None:
    added = [{"id": i, "content": text, "special": True, "rstrip": rstrip} for i, text in enumerate((*tokens, "<x>"))]
    tokenizer = files.Files({"added_tokens": added, "model": {"vocab": {}}}, {}, {}, None)
    assert special.model_name(name, tokenizer) == written_name


def test_refuses_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="token id 319 is beyond the model's vocabulary of 300"):
        written(changed_tokenizer(tmp_path), tmp_path / "v.gguf", 300)


def test_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no tokenizer\.json"):
        vocabulary.read(tmp_path)
