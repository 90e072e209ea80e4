"""Quantized Hugging Face folders: every format's numbers against its own library or its documented formula, exactly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_quantized
from tiny_quantized import Grouped, Tensors, random_grouped

from lilliput import decoder, source
from lilliput.errors import SourceError
from lilliput.grid import QuantizedTensor
from lilliput.model import role_of
from lilliput.sources import quantized
from lilliput.sources.stored import OffGrid, Stored

ROWS, COLS = 32, 128


def read(tensors: Tensors, settings: dict[str, Any]) -> Stored:
    """One matrix, through what a folder goes through: integers as stored, floats as float32."""
    there = {f"m.{end}": np.asarray(part) for end, part in tensors.items()}
    arrays = {name: a.astype(np.float32) if a.dtype.kind == "f" else a for name, a in there.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    (matrix,) = quantized.matrices(settings, shapes, arrays.__getitem__).values()
    found = matrix.read()
    assert found.dequantize().shape == matrix.shape
    if isinstance(found, QuantizedTensor):
        found.check("m")
    return found


def gptq_settings(bits: int, size: int, **others: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, **others}


def assert_holds(found: Stored, matrix: Grouped, grid: str) -> None:
    """On that grid, with the very codes, scales and zero points."""
    assert isinstance(found, QuantizedTensor)
    assert found.spec.name == grid
    assert np.array_equal(found.scales, matrix.scales.astype(np.float32))
    middle = 0 if found.offsets is not None else 1 << (matrix.bits - 1)
    assert np.array_equal(found.codes.astype(np.int64), matrix.codes - middle)
    if found.offsets is not None:
        assert np.array_equal(found.offsets, matrix.zero_points)
    assert np.array_equal(found.dequantize().astype(np.float64), matrix.values())


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_codes_scales_and_zero_points(bits: int, size: int, symmetric: bool, v2: bool) -> None:
    matrix = random_grouped(bits, ROWS, COLS, COLS if size == -1 else size, symmetric=symmetric, seed=bits)
    settings = gptq_settings(bits, size, sym=symmetric, checkpoint_format="gptq_v2" if v2 else "gptq")
    block = "channel" if size in (-1, COLS) else f"b{size}"
    zero_points = "" if symmetric and bits < 8 else "-zp"  # code 0 of 8 bits is -128, which int8 leaves out
    assert_holds(read(tiny_quantized.gptq(matrix, v2=v2), settings), matrix, f"int{bits}-{block}{zero_points}-f16")


def test_gptq_8_bit_without_its_lowest_code_is_symmetric() -> None:
    matrix = random_grouped(8, ROWS, COLS, 32, symmetric=True)
    matrix.codes[matrix.codes == 0] = 1
    assert_holds(read(tiny_quantized.gptq(matrix), gptq_settings(8, 32)), matrix, "int8-b32-f16")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_words_are_unpacked_as_onnxruntime_genai_does(bits: int) -> None:
    """An independent reader of the format; it has no 3 bits, and dequantizes in float16."""
    import torch
    from onnxruntime_genai.models.loaders.gptq import GPTQModel

    tensors = tiny_quantized.gptq(random_grouped(bits, ROWS, COLS, 32, symmetric=False))
    module = SimpleNamespace(in_features=COLS, out_features=ROWS, group_size=32, bits=bits)
    module.qweight, module.qzeros = (torch.from_numpy(np.ascontiguousarray(tensors[e])) for e in ("qweight", "qzeros"))
    theirs = GPTQModel.__new__(GPTQModel)
    theirs.handle_qzeros(module)
    theirs.unpack_qzeros(module)
    theirs.unpack_qweight(module)
    found = read(tensors, gptq_settings(bits, 32))
    assert isinstance(found, QuantizedTensor)
    assert np.array_equal(found.codes, module.qweight.numpy().T)
    assert np.array_equal(found.offsets, module.qzeros.numpy().T)  # type: ignore[arg-type]


def test_gptq_in_the_order_of_activations_is_read_exactly_and_lies_on_no_grid() -> None:
    matrix = random_grouped(4, ROWS, COLS, 32, symmetric=False, shuffled=True)
    found = read(tiny_quantized.gptq(matrix), gptq_settings(4, 32, desc_act=True))
    assert isinstance(found, OffGrid)
    assert "order of activations" in found.reason
    assert np.array_equal(found.values.astype(np.float64), matrix.values())


def test_gptq_of_static_groups_and_without_g_idx() -> None:
    matrix = random_grouped(4, ROWS, COLS, 32, symmetric=False)
    for tensors in (tiny_quantized.gptq(matrix), tiny_quantized.gptq(matrix, g_idx=False)):
        assert_holds(read(tensors, gptq_settings(4, 32, desc_act=True)), matrix, "int4-b32-zp-f16")


def test_gptq_modules_with_bits_of_their_own() -> None:
    matrix = random_grouped(8, ROWS, COLS, 32, symmetric=False)
    settings = gptq_settings(4, 128, dynamic={"m": {"bits": 8, "group_size": 32}})
    assert_holds(read(tiny_quantized.gptq(matrix), settings), matrix, "int8-b32-zp-f16")


@pytest.mark.parametrize("size", [32, 128])
def test_awq_codes_scales_and_zero_points(size: int) -> None:
    matrix = random_grouped(4, ROWS, 256, size, symmetric=False)
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    assert_holds(read(tiny_quantized.awq(matrix), settings), matrix, f"int4-b{size}-zp-f16")


def test_awq_words_are_unpacked_as_onnxruntime_genai_does() -> None:
    import torch
    from onnxruntime_genai.models.loaders.awq import AWQModel

    tensors = tiny_quantized.awq(random_grouped(4, ROWS, COLS, 32, symmetric=False))
    module = SimpleNamespace(in_features=COLS, out_features=ROWS, group_size=32, bits=4)
    module.qweight, module.qzeros = (torch.from_numpy(np.ascontiguousarray(tensors[e])) for e in ("qweight", "qzeros"))
    theirs = AWQModel.__new__(AWQModel)
    theirs.unpack_qzeros(module)
    theirs.unpack_qweight(module)
    found = read(tensors, {"quant_method": "awq", "bits": 4, "group_size": 32})
    assert isinstance(found, QuantizedTensor)
    assert np.array_equal(found.codes, module.qweight.numpy().T)
    assert np.array_equal(found.offsets, module.qzeros.numpy().T)  # type: ignore[arg-type]


def weight(rows: int = ROWS, cols: int = COLS) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(rows, cols)).astype(np.float32)


@pytest.mark.parametrize(("bits", "layout"), [(4, "pack-quantized"), (8, "pack-quantized"), (8, "int-quantized")])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("size", [32, None])
def test_compressed_tensors_is_read_as_it_reads_itself(
    bits: int, size: int | None, symmetric: bool, layout: str
) -> None:
    tensors, settings, wanted = tiny_quantized.compressed(
        weight(), bits=bits, size=size, symmetric=symmetric, layout=layout
    )
    found = read(tensors, settings)
    assert isinstance(found, QuantizedTensor)
    assert np.array_equal(found.dequantize().astype(np.float64), wanted)
    assert (found.spec.bits, found.spec.block_size) == (bits, size or 0)
    if symmetric and bits == 4:
        assert found.spec.symmetric
    error = np.abs(wanted - weight()).max() / np.abs(weight()).max()
    assert 0 < error < {4: 0.15, 8: 0.01}[bits], "the oracle itself made sense"


def test_compressed_tensors_with_zero_points_as_bytes_and_groups_by_activations() -> None:
    """Folders of older versions hold zero points unpacked; actorder "group" adds the group of each input."""
    matrix = random_grouped(4, ROWS, COLS, 32, symmetric=False, shuffled=True)
    packed, settings, _ = tiny_quantized.compressed(weight(), bits=4, size=32, symmetric=False)
    tensors = {
        **packed, "weight_packed": tiny_quantized.words(matrix.codes, 4), "weight_scale": matrix.scales,
        "weight_zero_point": (matrix.zero_points - 8).astype(np.int8), "weight_g_idx": matrix.groups.astype(np.int32),
    }  # fmt: skip
    found = read(tensors, settings)
    assert isinstance(found, OffGrid)
    assert np.array_equal(found.values.astype(np.float64), matrix.values())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double quantized"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bit_is_read_as_it_reads_itself(kind: str, nested: bool) -> None:
    tensors, wanted = tiny_quantized.bitsandbytes_4bit(weight(), kind=kind, nested=nested)
    found = read(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert isinstance(found, OffGrid)
    assert f"the levels of {kind.upper()} are not evenly spaced" in found.reason
    np.testing.assert_allclose(found.values, wanted, rtol=3e-7, atol=0)
    assert np.abs(wanted - weight()).max() < 0.35 * np.abs(weight()).max(), "the oracle itself made sense"


def test_bitsandbytes_4_bit_blocks_run_across_rows() -> None:
    """Rows that are no multiple of the block: bitsandbytes' CPU kernel dequantizes those wrongly, its quantizer is
    right, so the distance to the float weight decides: half a step of the levels at most, of each block's magnitude."""
    tensors, _ = tiny_quantized.bitsandbytes_4bit(weight(6, 96), kind="nf4", nested=False)
    found = read(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    blocks = weight(6, 96).reshape(-1, 64)
    levels = tensors["weight.quant_map"]
    half_step = np.diff(levels).max() / 2 * np.abs(blocks).max(-1, keepdims=True)
    assert (np.abs(found.dequantize().reshape(-1, 64) - blocks) <= half_step * (1 + 1e-6)).all()


def test_bitsandbytes_8_bit_is_read_as_it_reads_itself() -> None:
    tensors, wanted = tiny_quantized.bitsandbytes_8bit(weight())
    found = read(tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert isinstance(found, QuantizedTensor)
    assert found.spec.name == "int8-channel-f32"
    assert np.array_equal(found.codes, tensors["weight"])
    np.testing.assert_allclose(found.dequantize(), wanted, rtol=3e-7, atol=0)  # it multiplies by 1/127 last


REFUSED = {
    "unknown method": ({"quant_method": "hqq"}, "quant_method 'hqq', which is not read: .*awq, bitsandbytes"),
    "marlin": (
        gptq_settings(4, 32, checkpoint_format="marlin"),
        "checkpoint_format 'marlin', read are gptq and gptq_v2",
    ),
    "5 bits": (gptq_settings(5, 32), "has bits 5, read are"),
    "awq gemv": ({"quant_method": "awq", "version": "GEMV"}, "has version 'GEMV', read is AWQ with version 'gemm'"),
    "fp8": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "has format 'float-quantized', read are",
    ),
    "no tensor": (gptq_settings(4, 32), "says that the weights are quantized, and no tensor is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(SourceError, match=message) as caught:
        quantized.matrices(settings, {}, dict[str, Any]().__getitem__)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_tensors_that_do_not_belong_together_are_refused_by_name() -> None:
    tensors = dict(tiny_quantized.gptq(random_grouped(4, ROWS, COLS, 32, symmetric=False)))
    for change, message in (
        ({"qzeros": tensors["qzeros"][:, 1:]}, r"m\.qzeros has shape \(4, 3\), wanted \(4, 4\)"),
        ({"g_idx": tensors["g_idx"][:-32]}, r"m\.qweight has 16 words a column for 96 inputs"),
        ({"g_idx": tensors["g_idx"] + 1}, r"m\.g_idx names groups that are not among the 4"),
    ):
        with pytest.raises(SourceError, match=message):
            read({**tensors, **change}, gptq_settings(4, 32))
    with pytest.raises(SourceError, match=r"4 scales a row of 128 columns, wanted blocks of 64"):
        read(tensors, gptq_settings(4, 64))
    del tensors["scales"]
    with pytest.raises(SourceError, match=r"m\.scales is missing"):
        read(tensors, gptq_settings(4, 32))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("hf") / "tiny-llama")


def gptq_folder(llama_folder: Path, path: Path, *, symmetric: bool = True, **settings: Any) -> Path:
    def pack(matrix: np.ndarray, seed: int) -> Tensors:
        return tiny_quantized.gptq(tiny_quantized.rounded(matrix, 4, 32, symmetric=symmetric))

    return tiny_quantized.folder(llama_folder, path, gptq_settings(4, 32, **settings), pack)


def test_a_gptq_folder_loads_with_its_codes_and_is_proven(llama_folder: Path, tmp_path: Path) -> None:
    model = source.load(str(gptq_folder(llama_folder, tmp_path / "gptq")), tmp_path / "stage")
    assert model.decoder_proof.startswith("proven against transformers, given the weights as Lilliput dequantized them")
    matrices = [name for name in model.config.parameter_shapes() if role_of(name) == "linear"]
    assert sorted(model.codes) == sorted(matrices)
    assert not model.not_passed
    floats = tiny_models.source_of(llama_folder)
    for name in matrices:
        tensor = model.codes[name]
        wanted = tiny_quantized.rounded(floats.weights[name], 4, 32, symmetric=True)
        assert_holds(tensor, wanted, "int4-b32-f16")
        assert np.array_equal(model.weights[name], tensor.dequantize())
    assert np.array_equal(model.weights["embedding"], floats.weights["embedding"].astype(np.float16))


def test_an_awq_folder_loads(llama_folder: Path, tmp_path: Path) -> None:
    folder = tiny_quantized.folder(
        llama_folder, tmp_path / "awq", {"quant_method": "awq", "bits": 4, "group_size": 32},
        lambda matrix, _: tiny_quantized.awq(tiny_quantized.rounded(matrix, 4, 32, symmetric=False)),
    )  # fmt: skip
    model = source.load(str(folder), tmp_path / "stage", proof=False)
    wanted = tiny_quantized.rounded(
        tiny_models.source_of(llama_folder).weights["layers.1.mlp.up"], 4, 32, symmetric=False
    )
    assert_holds(model.codes["layers.1.mlp.up"], wanted, "int4-b32-zp-f16")


def test_a_compressed_tensors_folder_computes_what_transformers_makes_of_it(llama_folder: Path, tmp_path: Path) -> None:
    """transformers reads it by the format's own library, which needs no GPU; the decoder gets our reading."""
    import torch
    from transformers import AutoModelForCausalLM

    def pack(matrix: np.ndarray, seed: int) -> Tensors:
        return tiny_quantized.compressed(matrix, bits=4, size=32, symmetric=True)[0]

    _, settings, _ = tiny_quantized.compressed(weight(), bits=4, size=32, symmetric=True)
    folder = tiny_quantized.folder(llama_folder, tmp_path / "ct", settings, pack)
    model = source.load(str(folder), tmp_path / "stage", proof=False)
    assert model.codes["layers.1.mlp.down"].spec.symmetric
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted, found = theirs(tokens).logits, decoder.build(model)(tokens)
    assert float((wanted - found).abs().max() / wanted.std()) < 1e-5


def test_an_nf4_folder_loads_and_says_why_its_codes_stay_behind(llama_folder: Path, tmp_path: Path) -> None:
    folder = tiny_quantized.folder(
        llama_folder, tmp_path / "nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda matrix, _: tiny_quantized.bitsandbytes_4bit(matrix, kind="nf4", nested=True)[0],
    )  # fmt: skip
    model = source.load(str(folder), tmp_path / "stage")
    assert model.decoder_proof.startswith("proven against transformers")
    assert not model.codes
    assert len(model.not_passed) == 14
    assert "NF4" in model.not_passed["layers.0.attention.q"]


def test_biases_of_zeros_that_autogptq_added_are_passed_over(llama_folder: Path, tmp_path: Path) -> None:
    def pack(fill: float) -> Any:
        def packed(matrix: np.ndarray, seed: int) -> Tensors:
            grouped = tiny_quantized.rounded(matrix, 4, 32, symmetric=True)
            return {**tiny_quantized.gptq(grouped), "bias": np.full(len(matrix), fill, np.float16)}

        return packed

    settings = gptq_settings(4, 32)
    source.load(
        str(tiny_quantized.folder(llama_folder, tmp_path / "zero", settings, pack(0))), tmp_path / "a", proof=False
    )
    with pytest.raises(SourceError, match=r"proj\.bias has no place in the decoder"):
        source.load(
            str(tiny_quantized.folder(llama_folder, tmp_path / "one", settings, pack(1))), tmp_path / "b", proof=False
        )


@pytest.mark.parametrize("kind", [kind for kind in tiny_models.KINDS if kind != "llama"])
def test_a_gptq_folder_of_every_family_loads_with_its_codes_and_is_proven(kind: str, tmp_path: Path) -> None:
    """Biases, norms of heads, and Phi 3's stacked matrices, whose rows are taken apart with their codes."""
    floats = tiny_models.tiny(kind, tmp_path / "hf")
    model = source.load(str(gptq_folder(floats, tmp_path / "gptq")), tmp_path / "stage")
    assert model.decoder_proof.startswith("proven against transformers")
    linears = [name for name in model.config.parameter_shapes() if role_of(name) == "linear"]
    assert sorted(model.codes) == sorted(linears)
    weights = tiny_models.source_of(floats).weights
    for name in linears:
        assert_holds(model.codes[name], tiny_quantized.rounded(weights[name], 4, 32, symmetric=True), "int4-b32-f16")
