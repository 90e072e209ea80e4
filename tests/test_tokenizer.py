"""The tokenizer rebuilt from GGUF metadata, and the parity check: the oracles are llama.cpp and sentencepiece."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
from tiny_gguf import byte_level_vocabulary, write_vocabulary
from tiny_models import sentencepiece_model

from lilliput import parity, tokenizer
from lilliput.errors import SourceError
from lilliput.parity_texts import TEXTS
from lilliput.sources import gguf_file

CONTROL, NORMAL, USER = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED


@pytest.fixture(scope="module")
def byte_level_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 1500 tokens trained without any pre-tokenizer: its merges cross every boundary, so that
    only the right rules give the right tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|start|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    bpe.train_from_iterator([text for text in TEXTS for _ in range(2)], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.save(str(path))
    return path


def rebuilt(gguf_path: Path, folder: Path) -> tokenizer.Vocabulary:
    """Save the tokenizer of a GGUF file into `folder`."""
    fields, _ = gguf_file._read(gguf_path)
    vocabulary = tokenizer.read(fields)
    tokenizer.save(vocabulary, folder)
    return vocabulary


def test_the_fixed_texts_are_at_least_sixty_different_ones() -> None:
    assert len(TEXTS) >= 60
    assert len(set(TEXTS)) == len(TEXTS)


@pytest.mark.parametrize("pre", sorted(tokenizer.PRE_TOKENIZERS))
def test_byte_level_vocabulary_tokenizes_as_llama_cpp(pre: str, byte_level_json: Path, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", lambda w: byte_level_vocabulary(w, byte_level_json, pre))
    rebuilt(path, tmp_path / "tokenizer")
    sentence = parity.against_llama_cpp(path, tmp_path / "tokenizer")
    assert sentence.startswith("proven against llama.cpp")


def test_pre_tokenizers_differ_on_the_fixed_texts(byte_level_json: Path, tmp_path: Path) -> None:
    """The test above could not tell rules apart if they gave the same ids here."""
    ids = {}
    for pre in ("default", "smollm", "gpt-2", "llama-bpe", "qwen2"):
        path = write_vocabulary(
            tmp_path / f"{pre}.gguf", lambda w, pre=pre: byte_level_vocabulary(w, byte_level_json, pre)
        )
        built = tokenizer.build(tokenizer.read(gguf_file._read(path)[0]))
        ids[pre] = tuple(tuple(built.encode(text, add_special_tokens=False).ids) for text in TEXTS)
    assert len(set(ids.values())) == len(ids)


def add_begin_and_end(writer: gguf.GGUFWriter) -> None:
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def test_bos_and_eos_are_added_where_the_file_says(byte_level_json: Path, tmp_path: Path) -> None:
    path = write_vocabulary(
        tmp_path / "v.gguf", lambda w: byte_level_vocabulary(w, byte_level_json, "smollm"), add_begin_and_end
    )
    rebuilt(path, tmp_path / "tokenizer")
    encode, _ = parity.encoder(tmp_path / "tokenizer")
    assert encode("a")[0] == 0
    assert encode("a")[-1] == 1
    assert parity.against_llama_cpp(path, tmp_path / "tokenizer").startswith("proven against llama.cpp")


def sentencepiece_vocabulary(model: bytes, writer: gguf.GGUFWriter, add_space_prefix: bool = True) -> None:
    """A SentencePiece model as llama.cpp's converter writes it; user-defined pieces keep their spaces raw."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens, types = [], []
    for i in range(pieces.get_piece_size()):
        text, kind = pieces.id_to_piece(i), NORMAL
        if pieces.is_unknown(i):
            kind = gguf.TokenType.UNKNOWN
        elif pieces.is_control(i):
            kind = CONTROL
        elif pieces.is_byte(i):
            kind = gguf.TokenType.BYTE
        elif text.strip("▁") == "" and len(text) > 3:
            text, kind = text.replace("▁", " "), USER
        tokens.append(text)
        types.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([pieces.get_score(i) for i in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_add_space_prefix(add_space_prefix)


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_vocabulary_tokenizes_as_llama_cpp(add_space_prefix: bool, tmp_path: Path) -> None:
    model = sentencepiece_model(user_defined_symbols=["▁" * n for n in (4, 8, 16)])
    path = write_vocabulary(tmp_path / "v.gguf", lambda w: sentencepiece_vocabulary(model, w, add_space_prefix))
    vocabulary = rebuilt(path, tmp_path / "tokenizer")
    assert vocabulary.types.count(USER) == 3
    assert parity.against_llama_cpp(path, tmp_path / "tokenizer").startswith("proven against llama.cpp")


def test_sentencepiece_vocabulary_tokenizes_and_decodes_as_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    model = sentencepiece_model()
    path = write_vocabulary(tmp_path / "v.gguf", lambda w: sentencepiece_vocabulary(model, w))
    built = tokenizer.build(rebuilt(path, tmp_path / "tokenizer"))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    special = ("<s>", "</s>", "<unk>")  # sentencepiece does not look for them in text
    for text in TEXTS:
        if any(token in text for token in special):
            continue
        ids = built.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text)
        assert built.decode(ids) == processor.decode(ids)


def test_merges_come_in_the_order_of_scores() -> None:
    vocabulary = tokenizer.Vocabulary(
        "llama", "default", ("a", "b", "ab", "abb", "bb"), (NORMAL,) * 5, (0.0, 0.0, -2.0, -3.0, -1.0), (), {"eos": 0},
        False, False, False, None,
    )  # fmt: skip
    assert tokenizer.merges_by_score(vocabulary) == [("b", "b"), ("a", "b"), ("a", "bb"), ("ab", "b")]


def test_chat_template_and_ends_of_generation_are_kept(byte_level_json: Path, tmp_path: Path) -> None:
    import json

    from transformers import AutoTokenizer

    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template(template)
        writer.add_eot_token_id(3)

    path = write_vocabulary(tmp_path / "v.gguf", lambda w: byte_level_vocabulary(w, byte_level_json), more)
    rebuilt(path, tmp_path / "tokenizer")
    opened = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert opened.apply_chat_template([{"role": "user", "content": "Hi"}]) == [2, *opened("Hi")["input_ids"], 3]
    generation = json.loads((tmp_path / "tokenizer" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 3]}


def test_the_same_vocabulary_gives_the_same_bytes(byte_level_json: Path, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", lambda w: byte_level_vocabulary(w, byte_level_json))
    for name in ("first", "second"):
        rebuilt(path, tmp_path / name)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_unknown_pre_tokenizer_is_refused_by_name(byte_level_json: Path, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", lambda w: byte_level_vocabulary(w, byte_level_json, "smolm"))
    with pytest.raises(SourceError, match=r"tokenizer.ggml.pre 'smolm' is not supported: did you mean 'smollm'\?"):
        tokenizer.read(gguf_file._read(path)[0])


def test_unknown_tokenizer_model_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.ggml\.model 'bert' is not supported: known: gpt2, llama"):
        tokenizer.read({"tokenizer.ggml.model": "bert"})


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_missing_vocabulary_parts_are_refused_by_key(key: str) -> None:
    fields = {"model": "gpt2", "tokens": ["a"], "merges": [], "eos_token_id": 0}
    del fields[key]
    with pytest.raises(SourceError, match=f"GGUF metadata has no 'tokenizer.ggml.{key}'"):
        tokenizer.read({f"tokenizer.ggml.{k}": v for k, v in fields.items()})


def test_a_vocabulary_without_an_end_is_refused() -> None:
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    with pytest.raises(SourceError, match=r"has no 'tokenizer\.ggml\.eos_token_id'"):
        tokenizer.read(fields)


def test_lists_of_different_lengths_are_refused() -> None:
    fields = {"model": "gpt2", "tokens": ["a", "b"], "token_type": [1], "merges": [], "eos_token_id": 0}
    with pytest.raises(SourceError, match="2 tokens, 1 types, 0 scores do not fit"):
        tokenizer.read({f"tokenizer.ggml.{k}": v for k, v in fields.items()})


def test_a_merge_of_no_token_is_refused(byte_level_json: Path) -> None:
    fields = {"model": "gpt2", "tokens": ["a", "b"], "merges": ["a b"], "eos_token_id": 0}
    vocabulary = tokenizer.read({f"tokenizer.ggml.{k}": v for k, v in fields.items()})
    with pytest.raises(SourceError, match="'a b' makes no token of the vocabulary"):
        tokenizer.build(vocabulary)


def test_parity_refuses_one_different_token_and_shows_both() -> None:
    def changed(text: str) -> list[int]:
        return [1, 2] if text == TEXTS[40] else [1]

    with pytest.raises(SourceError) as caught:
        parity.check("model.gguf", changed, lambda text: [1], ())
    assert repr(TEXTS[40]) in str(caught.value)
    assert "[1, 2], wanted [1]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parity_tries_every_special_token() -> None:
    seen: list[str] = []

    def record(text: str) -> list[int]:
        seen.append(text)
        return [0]

    assert parity.check("m", record, lambda text: [0], ("<|x|>", "<|y|>")) == f"{len(TEXTS) + 2} texts"
    assert any("<|y|>" in text for text in seen[len(TEXTS) :])


def test_parity_names_what_it_leaves_out() -> None:
    unlike = parity.LeftOut("numbers", lambda text: any(c.isdigit() for c in text))
    said = parity.check("m", lambda text: [len(text)], lambda text: [len(re.sub(r"\d", "", text))], (), [unlike])
    numbers = sum(any(c.isdigit() for c in text) for text in TEXTS)
    assert said == f"{len(TEXTS) - numbers} texts, {numbers} left out (numbers)"


def test_parity_says_when_llama_cpp_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert parity.against_llama_cpp(tmp_path / "v.gguf", tmp_path).startswith("not proven: package llama_cpp is not")
