"""Rules that no planted defect of tests/checks/test_defects.py asks, thresholds, and what the command prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import tiny_models
from sample_report import passing

from lilliput import checks, cli
from lilliput.checks import gate
from lilliput.checks.base import Checked, Finding
from lilliput.checks.comparison import Source, bits_of, blocks_of, compare
from lilliput.checks.opened import Opened, Parameter, Tensor, Text
from lilliput.checks.rules import files, gguf_vocabulary, onnx_kernels, text, tflite_graph, versions
from lilliput.grid import Float
from lilliput.listing import entries


def held(name: str, values: Float, dtype: str = "Q4_0", role: str = "linear", block: int = 32) -> Tensor:
    return Tensor(name, role, dtype, values.shape, block, lambda: values, 16)  # type: ignore[arg-type]


def opened(*tensors: Tensor, **fields: object) -> Opened:
    return Opened(Path("model.gguf"), "gguf", tensors, {}, lambda: iter(()), **fields)  # type: ignore[arg-type]


def test_every_rule_says_what_it_is_and_where_it_was_reported() -> None:
    ids = [rule.id for rule in checks.known()]
    assert len(set(ids)) == len(ids) >= 40
    for rule in checks.known():
        assert rule.formats, rule.id
        assert "#" in rule.reference or rule.reference.startswith("https://"), rule.id
        assert min(map(len, (rule.reason, rule.fix, rule.summary))) > 20, rule.id


def test_the_list_of_rules_is_that_of_the_registry() -> None:
    listed = {entry.name: entry.summary for entry in entries("rules")}
    assert listed == {rule.id: f"{rule.severity}: {rule.summary}" for rule in checks.known()}


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("Q4_0", 4), ("Q2_K", 2), ("Q3_K", 3), ("IQ4_NL", 4), ("TQ1_0", 2), ("F16", 16), ("BF16", 16), ("F32", 32),
        ("float", 32), ("float16", 16), ("4 bits in blocks of 32", 4), ("int8 per channel", 8),
        ("int4 in blocks of 32", 4),
    ],
)  # fmt: skip
def test_bits_are_read_off_the_formats_names(dtype: str, bits: int) -> None:
    assert bits_of(dtype) == bits


def source(weights: Mapping[str, Float]) -> Source:
    config = tiny_models.families.load("llama").config(tiny_models.LLAMA)
    return Source("tiny", replace(config, num_layers=1), weights, Path())


def test_a_block_of_other_numbers_is_named() -> None:
    """SOURCE-BLOCK: no zeros, so that only the source tells."""
    rng = np.random.default_rng(0)
    wanted = rng.standard_normal((64, 128)).astype(np.float32)
    values = wanted.copy()
    values[5, 64:96] *= -1
    tensor = held("blk.0.ffn_up.weight", values)
    file = opened(
        tensor,
        against=source({"layers.0.mlp.up": wanted}),
    )
    file = replace(file, parameters=lambda: iter([Parameter("layers.0.mlp.up", tensor, values)]))
    found = [d for d in compare(file).differences if d.kind != "missing"]
    assert [(d.kind, d.place) for d in found] == [("block", "blk.0.ffn_up.weight (layers.0.mlp.up)")]
    assert "row 5, columns 64 to 95" in found[0].what


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_plain_rounding_stays_within_the_thresholds(bits: int) -> None:
    """The worst that the grids themselves do: a block of rounding to nearest, weights with heavy tails."""
    wanted = np.random.default_rng(bits).standard_t(4, (512, 256)).astype(np.float32)
    top = max(1, 2 ** (bits - 1) - 1)
    blocks = wanted.reshape(512, -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / top
    values = (np.rint(blocks / scale) * scale).reshape(wanted.shape).astype(np.float32)
    tensor = held("w", values, f"Q{bits}_0")
    file = replace(opened(tensor, against=source({"layers.0.mlp.up": wanted})))
    file = replace(file, parameters=lambda: iter([Parameter("layers.0.mlp.up", tensor, values)]))
    assert [d for d in compare(file).differences if d.kind != "missing"] == []
    assert blocks_of(values, wanted, 32).cosines.shape == (512, 8)


def digits(pre: str, several: int) -> object:
    tokens = [f"t{i}" for i in range(gguf_vocabulary.VOCABULARY)] + [str(10 + i) for i in range(several)]
    writer_fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens}

    class File:
        fields = writer_fields

        def tokens(self) -> list[str]:
            return tokens

    return File()


@pytest.mark.parametrize(
    ("pre", "several", "seen"),
    [("smollm", 900, 1), ("gpt-2", 0, 1), ("smollm", 0, 0), ("gpt-2", 900, 0), ("qwen2", 0, 0)],
)
def test_a_pre_tokenizer_fits_the_digits_of_its_vocabulary(pre: str, several: int, seen: int) -> None:
    found = list(gguf_vocabulary.digits(opened(gguf_file=digits(pre, several))))
    assert len(found) == seen
    assert all(f.place == "tokenizer.ggml.pre" for f in found)


def test_a_changed_file_is_named() -> None:
    (seen,) = files.manifest(opened(changes=("tokenizer.json has changed",)))
    assert (seen.place, seen.what) == ("tokenizer.json", "has changed")


def test_a_tokenizer_beyond_the_embedding_is_named() -> None:
    table = held("token_embd.weight", np.ones((300, 32), np.float32), role="embedding")
    (seen,) = text.vocabulary(opened(table, text=Text("tokenizer.json", tokens=320)))
    assert seen.place == "tokenizer.json"
    assert list(text.vocabulary(opened(table, text=Text("tokenizer.json", tokens=290)))) == []


def test_chat_tokens_without_a_template_are_named(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = tiny_gguf.Writer(path, "llama")
    writer.add_token_list(["a", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL])
    writer.add_eos_token_id(2)
    tiny_gguf._close(writer, path)
    found = [f for f in checks.check(path).findings if f.rule == "TEXT-TEMPLATE"]
    assert [f.place for f in found] == ["tokenizer.chat_template"]
    assert "<|im_end|>" in found[0].seen


def test_a_four_bit_embedding_of_one_scale_a_row_is_named() -> None:
    table = held("embedding", np.ones((8, 64), np.float32), "int4 per channel", "embedding", block=0)
    (seen,) = tflite_graph.int4_embedding(opened(table))
    assert seen.place == "embedding"
    assert list(tflite_graph.int4_embedding(opened(replace(table, block=32)))) == []


@pytest.mark.parametrize(("version", "caught"), [("1.28.2", 0), ("1.29.0", 1), ("1.30.1", 1), ("1.31.1", 0)])
def test_a_known_bad_version_is_named_with_the_node(version: str, caught: int, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    stored = helper.make_tensor("w", TensorProto.INT4, (64, 32), np.zeros(64 * 16, np.uint8).tobytes(), raw=True)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"], "w.dq", axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, [1, 64])], [helper.make_tensor_value_info("y", 1, [1, 32])],
        [stored, numpy_helper.from_array(np.ones((2, 32), np.float32), "s")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    with checks.opened(tmp_path / "m.onnx") as file:
        found = list(versions.known_bad(replace(file, runtime_versions={"onnxruntime": version})))
        assert list(onnx_kernels.unfused(file)) == []
    assert [seen.place for seen in found] == ["w.dq"] * caught


def checked(*found: Finding) -> Checked:
    return Checked(path="x", format="gguf", findings=found, rules=("A",), not_checked=("B: no package",))


FOUND = Finding(rule="A", severity="error", place="w", seen="wrong", reason="r", reference="o/n#1", fix="f")


def test_an_error_fails_the_gate_and_a_warning_is_noted() -> None:
    failed = gate.judged(passing(), checked(FOUND))
    assert (failed.gates[-1].name, failed.gates[-1].verdict, failed.verdict) == ("truth_check", "FAIL", "FAIL")
    assert any("A at w: wrong (o/n#1)" in note for note in failed.notes)
    warned = gate.judged(passing(), checked(FOUND.model_copy(update={"severity": "warning"})))
    assert (warned.gates[-1].verdict, warned.verdict) == ("PASS", passing().verdict)
    assert any("not checked B: no package" in note for note in warned.notes)


def run(*arguments: str) -> int:
    return cli.answer(list(arguments))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.tiny_llama(tmp_path / "tiny-llama")


def test_the_command_prints_findings_and_answers_by_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf.write_llama(
        folder / "m.gguf", folder, gguf.GGMLQuantizationType.Q8_0, skip=["blk.1.attn_k.weight"]
    )
    assert run("inspect", str(path), "--check") == 1
    out = capsys.readouterr().out
    assert "error GGUF-LAYER  blk.1.attn_k.weight: is missing" in out
    assert "ggml-org/llama.cpp#6490" in out
    assert run("inspect", str(path), "--check", "--json") == 1
    assert [f["rule"] for f in json.loads(capsys.readouterr().out)["findings"]] == ["GGUF-LAYER"]


def test_a_sound_file_answers_zero_with_its_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf.write_llama(folder / "m.gguf", folder, gguf.GGMLQuantizationType.Q8_0, [template])
    assert run("inspect", str(path), "--check", "--source", str(folder)) == 0
    assert "0 errors, 0 warnings, 0 notes, 0 rules not checked" in " ".join(capsys.readouterr().out.split())


def template(writer: tiny_gguf.Writer) -> None:
    text_ = Path(writer.path).parent / "chat_template.jinja"  # type: ignore[arg-type]
    writer.add_chat_template(text_.read_text())
