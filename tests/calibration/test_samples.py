from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BOS, EOS, TEXT, tiny_source
from transformers import AutoTokenizer

from calibration import generation, samples
from calibration.generation import Sampling, generate
from calibration.samples import SampleOptions, cut, gather
from lilliput.decoder import build
from lilliput.errors import CalibrationError, InputError, MissingPackageError
from lilliput.model import DecoderConfig, SourceModel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return tiny_source(tmp_path_factory.mktemp("model"))


def options(**given: Any) -> SampleOptions:
    return SampleOptions.model_validate({"count": 3, "length": 16, **given})


def ids_of(source: SourceModel, text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(source.tokenizer).encode(text, add_special_tokens=False))


def test_a_text_is_cut_at_even_distances(source: SourceModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    found, ids = gather(source, options(samples=str(path))), ids_of(source, TEXT)
    assert found.tokens.dtype == np.int32
    assert found.tokens[0].tolist() == ids[:16]
    assert found.tokens[1].tolist() == ids[(len(ids) - 16) // 2 :][:16]
    assert found.tokens[2].tolist() == ids[-16:]
    assert found.provenance.kind == "text"
    assert found.provenance.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (found.provenance.count, found.provenance.length) == (3, 16)


def test_jsonl_takes_texts_and_conversations_and_parts_them_by_the_end_token(
    source: SourceModel, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    talk = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "b"}]
    path.write_text("\n".join([json.dumps({"text": TEXT}), "", json.dumps({"messages": talk})]) + "\n")
    joined = TEXT + EOS + f"{BOS}user\nadd{EOS}\n{BOS}assistant\nb{EOS}\n"
    ids = ids_of(source, joined)
    found = gather(source, options(samples=str(path), count=1, length=len(ids)))
    assert found.tokens[0].tolist() == ids
    assert found.provenance.kind == "jsonl"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ('{"content": "a"}', "line 2: has content; wanted a text under 'text', or messages"),
        ("[1]", "line 2: has list"),
    ],
)
def test_a_bad_line_is_named(source: SourceModel, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n" + line + "\n")
    with pytest.raises(CalibrationError, match=message):
        gather(source, options(samples=str(path)))


def test_too_short_a_text_says_what_it_has_and_what_is_wanted(source: SourceModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a b c")
    has = len(ids_of(source, "a b c"))
    with pytest.raises(CalibrationError, match=rf"have {has} tokens, wanted 48 \(3 sequences of 16\)") as caught:
        gather(source, options(samples=str(path)))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"", b" \n\n "])
def test_an_empty_text_is_refused(source: SourceModel, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="is empty"):
        gather(source, options(samples=str(path)))


def test_what_is_no_text_or_not_there_is_refused(source: SourceModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="UTF-8"):
        gather(source, options(samples=str(path)))
    with pytest.raises(CalibrationError, match="no such file; wanted self, builtin"):
        gather(source, options(samples=str(tmp_path / "absent.txt")))
    with pytest.raises(CalibrationError, match=r"length is 512, .* has 256 positions"):
        gather(source, SampleOptions())


def test_builtin_text_is_the_calibration_part(source: SourceModel) -> None:
    found = gather(source, options(samples="builtin", count=2, length=64))
    assert found.provenance.kind == "builtin"
    text = AutoTokenizer.from_pretrained(source.tokenizer).decode(found.tokens[0])
    from lilliput.texts import calibration_text

    assert calibration_text().startswith(text)


def test_a_local_dataset_is_read(source: SourceModel, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"words": TEXT}) + "\n" for _ in range(4)))
    found = gather(source, options(samples=f"dataset:{folder}", field="words"))
    assert found.tokens[0].tolist() == ids_of(source, TEXT)[:16]
    assert found.provenance.kind == "dataset"
    with pytest.raises(CalibrationError, match="row 0: has words; wanted a text under 'text'"):
        gather(source, options(samples=f"dataset:{folder}"))
    with pytest.raises(CalibrationError, match="cannot be opened"):
        gather(source, options(samples=f"dataset:{folder}", split="absent"))


def test_without_the_package_datasets_the_extra_is_named(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"lilliput\[data\]"):
        gather(source, options(samples="dataset:any"))


def test_a_start_token_stands_before_every_sequence() -> None:
    tokens = cut(list(range(100)), options(count=4, length=11), [7])
    assert tokens.shape == (4, 11)
    assert tokens[:, 0].tolist() == [7] * 4
    assert tokens[:, 1].tolist() == [0, 30, 60, 90]


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="lenght"):
        options(lenght=4)


def test_samples_are_the_same_after_saving(source: SourceModel, tmp_path: Path) -> None:
    found = gather(source, options())
    samples.save(found, tmp_path / "stage")
    again = samples.load(tmp_path / "stage")
    assert np.array_equal(found.tokens, again.tokens)
    assert found.provenance == again.provenance
    assert issubclass(CalibrationError, InputError)


def test_generation_repeats_by_seed_and_starts_from_different_tokens(source: SourceModel) -> None:
    first, again = gather(source, options(count=12)), gather(source, options(count=12))
    other = gather(source, options(count=12, seed=1))
    assert np.array_equal(first.tokens, again.tokens)
    assert first.provenance == again.provenance
    assert not np.array_equal(first.tokens, other.tokens)
    assert len(set(first.tokens[:, 0].tolist())) == 12
    assert not {0, 1} & set(first.tokens[:, 0].tolist())  # the special tokens
    assert first.provenance.sha256 == hashlib.sha256(first.tokens.tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "gemma3", "smollm3"])
def test_generation_with_a_cache_is_the_decoders_own_argmax(kind: str, tmp_path: Path) -> None:
    """At top_k 1 every token is the argmax of the decoder's uncached logits."""
    decoder = build(tiny_source(tmp_path, kind))
    tokens = generate(decoder, sampling(count=5, length=24, top_k=1, first_tokens=(3,)))
    with torch.inference_mode():
        logits = decoder(torch.from_numpy(tokens.astype(np.int64)))
    assert (tokens[:, 0] == 3).all()
    assert np.array_equal(logits[:, 1:-1].argmax(-1).numpy(), tokens[:, 2:])


def sampling(**given: Any) -> Sampling:
    plain: dict[str, Any] = {
        "count": 4, "length": 8, "seed": 0, "temperature": 1.0, "top_k": 0, "first_tokens": (), "banned": (),
    }  # fmt: skip
    return Sampling(**{**plain, **given})


def test_memory_bounds_the_batch_and_progress_ends_at_its_total(
    source: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_a_sample = 8 * 2 * 2 * 16 * 8  # keys and values, layers, kv_heads, head_dim, length
    monkeypatch.setattr(generation, "CACHE_BYTES", 3 * bytes_a_sample)
    seen: list[tuple[int, int]] = []
    tokens = generate(build(source), sampling(count=5), lambda done, total: seen.append((done, total)))
    assert tokens.shape == (5, 8)
    assert seen == [(i + 1, 16) for i in range(16)]


def test_caches_of_a_batch_take_a_quarter_of_the_weights_at_most() -> None:
    """SmolLM2-135M's shape: 538 MB of weights, 23.6 MB of caches a sample of 512 tokens."""
    smol = DecoderConfig(
        family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, max_positions=8192, norm="rms", norm_eps=1e-5, positions="rope",
        activation="silu", gated_mlp=True, attention_bias=False, mlp_bias=False, tied_embeddings=True,
    )  # fmt: skip
    assert generation.batch_size(smol, sampling(count=48, length=512)) == 5
    assert generation.batch_size(smol, sampling(count=12, length=512)) == 4  # three even batches
    assert generation.batch_size(smol, sampling(count=4, length=8192)) == 1  # one sample needs more: it runs alone


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.0, 0.2, 0.3]])).expand(40_000, 4)
    drawn = generation._draw(logits, sampling(), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
    assert frequencies[1] == 0
    assert torch.allclose(frequencies, torch.tensor([0.5, 0.0, 0.2, 0.3]), atol=0.01)
    sharper = generation._draw(logits, sampling(temperature=0.5, top_k=2), torch.Generator().manual_seed(0))
    assert torch.allclose(
        torch.bincount(sharper, minlength=4) / len(sharper), torch.tensor([25, 0, 0, 9]) / 34, atol=0.01
    )


def test_a_mix_is_its_parts_one_after_the_other(source: SourceModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    parts = [{"samples": str(path), "count": 2}, {"samples": "self", "count": 3}, {"samples": "self", "count": 2}]
    found = gather(source, options(samples=parts, count=7, seed=5))
    assert np.array_equal(found.tokens[:2], gather(source, options(samples=str(path), count=2)).tokens)
    assert np.array_equal(found.tokens[2:5], gather(source, options(samples="self", count=3, seed=6)).tokens)
    assert not np.array_equal(found.tokens[2:4], found.tokens[5:]), "the second has a seed of its own"
    assert (found.provenance.kind, found.provenance.count, found.provenance.length) == ("mix", 7, 16)
    assert found.provenance.description.startswith(f"2 x {path} + 3 x sampled from")
    samples.save(found, tmp_path / "stage")
    assert samples.load(tmp_path / "stage").provenance == found.provenance


def test_a_parts_own_field_replaces_the_mixs(source: SourceModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"words": TEXT}) + "\n")
    parts = [{"samples": str(path), "count": 1, "field": "words"}]
    assert gather(source, options(samples=parts, count=1)).tokens[0].tolist() == ids_of(source, TEXT)[:16]
    with pytest.raises(CalibrationError, match="wanted a text under 'text'"):
        gather(source, options(samples=[{"samples": str(path), "count": 1}], count=1))
