"""The exported folder on tiny models: weights read back bit for bit, the exact twin against torch, the cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx_cases import quantize
from tiny_models import tiny_source

from exporters.onnx_int4 import Exporter, Options, genai
from lilliput.artifact import Artifact, sha256
from lilliput.decoder import Decoder, build
from lilliput.errors import ArtifactError, ExportError
from lilliput.grid import Float
from lilliput.model import QuantizedModel, SourceModel, role_of
from lilliput.parity_texts import TEXTS
from lilliput.trace import trace
from targets.runtimes.ort_cpu import Runtime

CONTEXT = 48
RULES: Mapping[str, Mapping[str, str]] = {
    "common": {"linear": "int4-b32", "embedding": "int8-channel", "head": "int8-channel"},
    "zero points": {"linear": "int4-b32-zp-f16", "embedding": "int4-b32-zp-f16", "head": "int4-b32-zp-f16"},
    "large blocks": {"linear": "int4-b128", "embedding": "int8-b32", "head": "int8-b32"},
    "eight bit": {"linear": "int8-channel", "embedding": "int4-b64", "head": "int8-channel-zp-f32"},
    "float": {"linear": "int4-b32", "embedding": "float", "head": "float"},
    "16-bit columns": {"linear": "int4-b32-o3", "embedding": "int8-channel", "head": "int8-channel"},
    "16-bit and zero points": {"linear": "int8-b32-zp-f16-o1", "embedding": "int4-b64", "head": "int8-b32-o2"},
    "float linears": {"linear": "float", "embedding": "int8-channel", "head": "int8-channel"},
}  # fmt: skip
MODELS = (("llama", True), ("llama", False), ("gpt2", True))


def solved(source: SourceModel, rules: Mapping[str, str]) -> QuantizedModel:
    """`source` on the grid that `rules` name for each role; "float" and vectors stay."""
    grids = {name: rules.get(role_of(name), "float") for name in source.weights}
    quantized = {n: quantize(w, grids[n]) for n, w in source.weights.items() if grids[n] != "float"}
    floats = {n: w for n, w in source.weights.items() if grids[n] == "float"}
    return QuantizedModel(source.name, source.config, quantized, floats, source.tokenizer, {})


def source_of(folder: Path, kind: str, tied: bool) -> SourceModel:
    return tiny_source(folder, kind, **({} if tied else {"tie_word_embeddings": False}))


def export(model: QuantizedModel, folder: Path, *, exact: bool = False) -> Artifact:
    folder.mkdir()
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, 8)
    return Exporter().export(model, traced, Options(), folder, exact=exact)


def reference(model: QuantizedModel, tokens: list[int]) -> Float:
    """Logits (T, vocab) of the dequantized weights in torch."""
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    decoder = build(SourceModel(model.name, model.config, weights, model.tokenizer, "", ""))
    with torch.no_grad():
        return decoder(torch.tensor([tokens]))[0].numpy()


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("kind", "tied"), MODELS)
def test_reads_back_what_it_was_given_and_computes_it(
    tmp_path: Path, kind: str, tied: bool, rules: Mapping[str, str]
) -> None:
    model = solved(source_of(tmp_path, kind, tied), rules)
    artifact = export(model, tmp_path / "exact", exact=True)
    given = {**model.quantized, **model.floats}
    stored = Exporter().read(artifact)
    assert list(stored) == list(model.config.parameter_shapes())
    for name, parameter in stored.items():
        if isinstance(parameter, np.ndarray):
            assert np.array_equal(parameter, given[name]), name
        else:
            assert parameter.spec == given[name].spec
            assert parameter.same_as(given[name]), name
    tokens = np.random.default_rng(3).integers(0, model.config.vocab_size, 14).tolist()
    session = Runtime().open(artifact, threads=1, exact=True)
    seen = [session.prefill(tokens[:9]), *(session.decode(token) for token in tokens[9:])]
    wanted = reference(model, tokens)[8:]
    assert np.abs(np.array(seen) - wanted).max() <= 1e-4 * wanted.std()


FAMILIES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "mistral": ("mistral", {}),
    "qwen2 yarn": (
        "qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", {}),
    "gemma3 one KV head": ("gemma3", {}),
    "gemma3 capped, scaled": (
        "gemma3",
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_key_value_heads": 2,
         "final_logit_softcapping": 3.0},
    ),
    "phi3 partial longrope": (
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "sliding_window": 8,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0, 3.0, 4.0],
                          "long_factor": [2.0] * 6}},
    ),
    "smollm3": ("smollm3", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_in_pieces_beyond_its_window_is_what_torch_computes(case: str, tmp_path: Path) -> None:
    """A prompt of 12 in one piece, one of 11 after it, then single steps; windows are of 8."""
    kind, options = FAMILIES[case]
    model = solved(tiny_source(tmp_path, kind, **options), RULES["common"])
    artifact = export(model, tmp_path / "exact", exact=True)
    given, stored = {**model.quantized, **model.floats}, Exporter().read(artifact)
    assert list(stored) == list(model.config.parameter_shapes())
    for name, parameter in stored.items():
        same = np.array_equal if isinstance(parameter, np.ndarray) else type(parameter).same_as
        assert same(parameter, given[name]), name  # type: ignore[arg-type]
    tokens = np.random.default_rng(3).integers(0, model.config.vocab_size, 28).tolist()
    session = Runtime().open(artifact, threads=1, exact=True)
    seen = [session.prefill(tokens[:12]), session.prefill(tokens[12:23]), *map(session.decode, tokens[23:])]
    wanted = reference(model, tokens)[[11, *range(22, 28)]]
    assert np.abs(np.array(seen) - wanted).max() <= 1e-4 * wanted.std()


def test_normed_heads_keep_the_stacked_matrix(tmp_path: Path) -> None:
    counts = operators(export(solved(tiny_source(tmp_path, "qwen3"), RULES["common"]), tmp_path / "out"))
    assert counts["MatMulNBits"] == 2 * 5 + 1
    assert counts["Split"] == counts["GroupQueryAttention"] == 2
    assert counts["SimplifiedLayerNormalization"] == 1 + 2 * 2


def operators(artifact: Artifact) -> dict[str, int]:
    ops = [node.op_type for node in onnx.load(artifact.path).graph.node]
    return {op: ops.count(op) for op in ops}


def test_a_layer_is_nine_operators_and_the_tied_table_is_stored_once(tmp_path: Path) -> None:
    artifact = export(solved(source_of(tmp_path, "llama", True), RULES["common"]), tmp_path / "out")
    counts = operators(artifact)
    assert counts["MatMulNBits"] == 2 * 5 + 1  # qkv, o, gate, up, down; the head
    assert counts["GroupQueryAttention"] == 2
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * 2
    assert counts["SimplifiedLayerNormalization"] == 1
    assert counts["GatherBlockQuantized"] == 1
    assert "Add" not in counts
    large = [i.name for i in onnx.load(artifact.path).graph.initializer if len(i.raw_data) >= 320 * 64]
    assert large == ["embedding.codes"]


def test_matrices_on_different_grids_stay_apart(tmp_path: Path) -> None:
    model = solved(source_of(tmp_path, "llama", True), RULES["common"])
    name = "layers.1.attention.v"
    wider = quantize(model.quantized[name].dequantize(), "int8-b32")
    model = dataclasses.replace(model, quantized={**model.quantized, name: wider})
    artifact = export(model, tmp_path / "exact", exact=True)
    tokens = [5, 9, 200, 3]
    seen = Runtime().open(artifact, threads=1, exact=True).prefill(tokens)
    wanted = reference(model, tokens)[-1]
    assert np.abs(seen - wanted).max() <= 1e-4 * wanted.std()
    assert "layers.1.attention.qkv.codes" not in {i.name for i in onnx.load(artifact.path).graph.initializer}
    assert all(t.same_as(Exporter().read(artifact)[n]) for n, t in model.quantized.items())  # type: ignore[arg-type]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = solved(source_of(tmp_path, "llama", True), RULES["common"])
    first, second = export(model, tmp_path / "a"), export(model, tmp_path / "b")
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted(path.name for path in second.folder.iterdir())
    assert [sha256(first.folder / name) for name in names] == [sha256(second.folder / name) for name in names]


@pytest.mark.parametrize("short", [8, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_two_sequences_at_once_are_each_as_if_alone(tmp_path: Path, kind: str, short: int) -> None:
    """Prompts of 8 and `short` tokens, the shorter padded on the right, then two steps."""
    model = solved(source_of(tmp_path, kind, True), RULES["common"])
    session = ort.InferenceSession(export(model, tmp_path / "exact", exact=True).path)
    tokens = np.random.default_rng(4).integers(0, model.config.vocab_size, (2, 10))
    cache = np.zeros((2, model.config.num_kv_heads, CONTEXT, model.config.head_dim), np.float32)
    past = {i.name: cache for i in session.get_inputs() if i.name.startswith("past")}
    lengths, mask = np.array([8, short]), np.ones((2, 10), np.int64)
    mask[1, short:8] = 0
    for start, stop in ((0, 8), (8, 9), (9, 10)):
        feeds = {"input_ids": tokens[:, start:stop], "attention_mask": mask[:, :stop]}
        if kind == "gpt2":
            feeds["position_ids"] = np.arange(8) + np.zeros((2, 1), np.int64) if start == 0 else lengths[:, None]
        logits, *present = session.run(None, {**feeds, **past})
        past = dict(zip(past, present, strict=True))
        lengths += int(start > 0)
        for row in range(2):
            alone = np.concatenate([tokens[row, : 8 if row == 0 else short], tokens[row, 8:stop]])
            wanted = reference(model, alone.tolist())[-1]
            assert np.abs(logits[row, 0] - wanted).max() <= 1e-4 * wanted.std()


def test_weights_beyond_the_limit_of_protobuf_lie_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.onnx_int4.container.PROTOBUF_LIMIT_BYTES", 10_000)
    model = solved(source_of(tmp_path, "llama", True), RULES["common"])
    artifact = export(model, tmp_path / "out")
    assert (artifact.folder / "model.onnx.data").stat().st_size > 10_000
    assert artifact.size_bytes > artifact.path.stat().st_size
    assert all(t.same_as(Exporter().read(artifact)[n]) for n, t in model.quantized.items())  # type: ignore[arg-type]
    assert np.isfinite(Runtime().open(artifact, threads=1).prefill([1, 2, 3])).all()


def test_a_grid_that_the_format_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = solved(source_of(tmp_path, "llama", True), RULES["common"])
    name = "layers.0.mlp.up"
    five = quantize(model.quantized[name].dequantize(), "int5-b32")
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.up on int5-b32: MatMulNBits holds 2, 4 or 8 bits"):
        export(dataclasses.replace(model, quantized={**model.quantized, name: five}), tmp_path / "out")


def test_a_changed_code_does_not_read_back(tmp_path: Path) -> None:
    model = solved(source_of(tmp_path, "llama", True), RULES["common"])
    artifact = export(model, tmp_path / "out")
    proto = onnx.load(artifact.path)
    codes = next(i for i in proto.graph.initializer if i.name == "layers.0.mlp.down.codes")
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    onnx.save(proto, artifact.path)
    stored = Exporter().read(artifact)
    assert [n for n, t in model.quantized.items() if not t.same_as(stored[n])] == ["layers.0.mlp.down"]  # type: ignore[arg-type]


def test_foreign_and_damaged_files_are_told_apart_from_ours(tmp_path: Path) -> None:
    artifact = export(solved(source_of(tmp_path, "llama", True), RULES["common"]), tmp_path / "out")
    artifact.path.write_bytes(artifact.path.read_bytes()[:20_000])
    with pytest.raises(ArtifactError, match="not a readable ONNX model"):
        Exporter().read(artifact)
    artifact.path.write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
    with pytest.raises(ArtifactError, match="no model that Lilliput wrote"):
        Exporter().read(artifact)


def test_genai_config_states_the_cache_and_what_ends_a_text(tmp_path: Path) -> None:
    artifact = export(solved(source_of(tmp_path, "gpt2", True), RULES["common"]), tmp_path / "out")
    config = json.loads((artifact.folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [1]
    assert config["model"]["bos_token_id"] == 0
    assert config["model"]["context_length"] == config["search"]["max_length"] == CONTEXT
    assert config["search"]["past_present_share_buffer"] is True
    assert config["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    assert (artifact.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("individual", [True, False])
def test_digits_spelled_out_for_genai_split_as_before(individual: bool) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    named = Sequence([Digits(individual_digits=individual), ByteLevel(add_prefix_space=False)])
    steps = json.loads(named.__getstate__())["pretokenizers"]
    spelled = json.dumps({"type": "Sequence", "pretokenizers": [n for s in steps for n in genai.spelled_out(s)]})
    rewritten = Sequence([])
    rewritten.__setstate__(spelled.encode())
    for text in (*TEXTS, "a ½ b ² Ⅷ", " ٣ १२ 一二"):
        assert rewritten.pre_tokenize_str(text) == named.pre_tokenize_str(text), text
