"""The GGUF exporter on tiny models: what is read back, and what llama.cpp makes of the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import quantize, tiny_quantized_model, tiny_source

import exporters.gguf_llamacpp as exporter
from lilliput import chat, decoder
from lilliput.artifact import Artifact, sha256
from lilliput.errors import ArtifactError, ExportError, MissingPackageError
from lilliput.grid import Float, QuantizedTensor, grid
from lilliput.model import QuantizedModel, SourceModel
from lilliput.trace import trace
from targets.runtimes.llamacpp_cpu import Runtime

CONTEXT = 64
VARIANTS = {
    "llama": ("llama", {}),
    "llama with biases and its own head": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama without grouped queries": ("llama", {"num_key_value_heads": 4, "rope_theta": 5e5}),
    "gpt2": ("gpt2", {}),
}


def tiny(tmp_path: Path, variant: str) -> QuantizedModel:
    kind, overrides = VARIANTS[variant]
    return tiny_quantized_model(tmp_path, kind, **overrides)


def export(model: QuantizedModel, folder: Path, *, exact: bool = False, **options: Any) -> Artifact:
    folder.mkdir()
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    source = SourceModel(model.name, model.config, weights, model.tokenizer, "", "")
    traced = trace(decoder.build(source), CONTEXT, 8)
    return exporter.Exporter().export(model, traced, exporter.Options(**options), folder, exact=exact)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_back_bit_for_bit(tmp_path: Path, variant: str) -> None:
    model = tiny(tmp_path, variant)
    artifact = export(model, tmp_path / "out")
    weights = exporter.Exporter().read(artifact)
    assert set(weights) == set(model.config.parameter_shapes())
    for name, tensor in model.quantized.items():
        stored = weights[name]
        assert isinstance(stored, QuantizedTensor)
        assert stored.spec == tensor.spec
        assert stored.same_as(tensor), name
    for name, values in model.floats.items():
        assert np.array_equal(np.asarray(weights[name]), values), name
    assert (artifact.context, artifact.prefill) == (CONTEXT, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_metadata_is_the_configuration(tmp_path: Path, variant: str) -> None:
    model = tiny(tmp_path, variant)
    file = gguf.GGUFReader(export(model, tmp_path / "out").path)
    expected = replace(model.config, norm_eps=float(np.float32(model.config.norm_eps)))
    assert exporter.read_config(file) == expected
    assert file.get_field("general.name").contents() == model.name
    assert file.get_field("general.license").contents() == "Apache-2.0"
    assert file.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    stored_types = {tensor.tensor_type for tensor in file.tensors if len(tensor.shape) > 1}
    learned = {gguf.GGMLQuantizationType.F32} if model.config.positions == "learned" else set()
    assert stored_types == {gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0} | learned


def test_the_exact_twin_holds_the_same_weights_as_float32(tmp_path: Path) -> None:
    model = tiny(tmp_path, "gpt2")
    weights = exporter.read(export(model, tmp_path / "out", exact=True).path)
    for name in model.config.parameter_shapes():
        assert np.array_equal(np.asarray(weights[name]), model.dequantized(name)), name


@pytest.mark.parametrize("linear", ["int4-b32-min-f16", "int8-b32", "int4-b64", "int8-channel"])
def test_other_grids_read_back(tmp_path: Path, linear: str) -> None:
    source = tiny_source(tmp_path)
    if "-min" in linear:
        model = with_minima(quantize(source, "int4-b32"))
    else:
        model = quantize(source, linear, table="int8-b32")
    weights = exporter.read(export(model, tmp_path / "out", check_tokenizer=False).path)
    for name, tensor in model.quantized.items():
        stored = weights[name]
        assert isinstance(stored, QuantizedTensor)
        assert stored.same_as(tensor), name


def with_minima(model: QuantizedModel) -> QuantizedModel:
    """The linears of an int4-b32 model on int4-b32-min-f16: code - 8 times scale, the minimum -8 times scale."""
    spec = grid("int4-b32-min-f16")
    moved = {
        name: QuantizedTensor(
            spec, (t.codes.astype(np.int16) + 8).astype(np.uint8), t.scales, np.float32(-8) * t.scales
        )
        for name, t in model.quantized.items()
        if t.spec.bits == 4
    }
    return replace(model, quantized={**model.quantized, **moved})


def test_same_model_same_bytes(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama")
    first, second = (export(model, tmp_path / name) for name in ("one", "two"))
    assert sha256(first.path) == sha256(second.path)


def test_parts_of_a_split_file_are_one_model(tmp_path: Path) -> None:
    """llama.cpp opens the first part and finds the others: the same logits, bit for bit, as from one file."""
    model = tiny(tmp_path, "llama")
    whole, split = export(model, tmp_path / "one"), export(model, tmp_path / "split", split_mb=0.02)
    parts = sorted(path.name for path in split.folder.iterdir())
    assert parts == [f"model-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    assert len(parts) > 2
    assert split.main_file == parts[0]
    assert split.size_bytes == sum(path.stat().st_size for path in split.folder.iterdir())
    assert split.size_bytes > whole.size_bytes
    read = exporter.read(split.path)
    assert all(np.array_equal(np.asarray(read[name]), values) for name, values in model.floats.items())
    assert all(read[name].same_as(tensor) for name, tensor in model.quantized.items())
    tokens = list(range(3, 20))
    seen = [llama_cpp_logits(artifact, tokens) for artifact in (whole, split)]
    assert np.array_equal(*seen)
    with chat.tokenizer_folder(split.folder, split.path) as home:
        assert chat.load_tokenizer(home).encode("The quick") == chat.load_tokenizer(model.tokenizer).encode("The quick")
    (split.folder / parts[1]).unlink()
    with pytest.raises(ArtifactError, match=rf"{parts[1]} of its {len(parts)} parts is missing"):
        exporter.read(split.path)


def llama_cpp_logits(artifact: Artifact, tokens: list[int]) -> Float:
    session = Runtime().open(artifact, threads=1)
    logits = session.prefill(tokens)
    session.close()
    return logits


def test_what_the_tokenizer_proof_says_is_kept_for_the_report(tmp_path: Path) -> None:
    (said,) = export(tiny(tmp_path, "llama"), tmp_path / "out").notes
    assert said.startswith("tokenizer: proven against llama.cpp's own tokenizer (llama-cpp-python ")
    assert export(tiny(tmp_path, "llama"), tmp_path / "unproven", check_tokenizer=False).notes == ()


def test_a_fused_matrix_needs_one_grid(tmp_path: Path) -> None:
    model = tiny(tmp_path, "gpt2")
    other = quantize(tiny_source(tmp_path, "gpt2"), "int8-b32")
    name = "layers.0.attention.k"
    mixed = replace(model, quantized={**model.quantized, name: other.quantized[name]})
    with pytest.raises(ExportError, match=r"blk\.0\.attn_qkv\.weight as one matrix.*attention\.k int8-b32"):
        export(mixed, tmp_path / "out")


def test_a_grid_that_no_block_holds_is_refused(tmp_path: Path) -> None:
    model = quantize(tiny_source(tmp_path), "int4-b16")
    with pytest.raises(ExportError, match=r"attn_q\.weight on grid int4-b16: GGUF blocks are 32 weights"):
        export(model, tmp_path / "out")


def test_a_wrong_tokenizer_name_is_found_in_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says that digits are split one by one, the tokenizer does not: the ids differ on a number."""
    monkeypatch.setattr(exporter.vocabulary.byte_level, "known_pre", lambda files: "smollm")
    with pytest.raises(ExportError, match=r"the tokenizer of model\.gguf in llama\.cpp is not that of"):
        export(tiny(tmp_path, "llama"), tmp_path / "out")


def test_the_check_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(MissingPackageError, match=r"lilliput\[llamacpp\]"):
        export(tiny(tmp_path, "llama"), tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_damaged_file_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"not a readable GGUF file"):
        exporter.read(path)


def test_a_foreign_file_is_not_read_as_ours(tmp_path: Path) -> None:
    path = tmp_path / "foreign.gguf"
    artifact = export(tiny(tmp_path, "llama"), tmp_path / "out")
    data = artifact.path.read_bytes().replace(b"lilliput.grids", b"somebody.grids")
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"no 'lilliput\.grids'"):
        exporter.read(path)
