"""Quantized checkpoints for tests, packed word by word as the formats' documents say, or by the formats' own libraries.

A matrix's tensors are a dict by the ends of their names; `folder` puts those of every linear layer into a copy of a
Hugging Face folder, beside the embedding and norms that stay float16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
Pack = Callable[[np.ndarray, int], Tensors]  # a float matrix (out, in), a seed
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Grouped:
    """x = scale · (code - zero point): codes (out, in), scales and zero points (out, groups)."""

    bits: int
    codes: Array
    scales: Array  # float16 numbers
    zero_points: Array
    groups: Array  # (in,): the group of each input

    def values(self) -> Array:
        """(out, in) float64: exact."""
        scales, zero_points = (a.astype(np.float64)[:, self.groups] for a in (self.scales, self.zero_points))
        return scales * (self.codes.astype(np.float64) - zero_points)


def random_grouped(
    bits: int, rows: int, cols: int, size: int, *, symmetric: bool, seed: int = 0, shuffled: bool = False
) -> Grouped:
    """Codes of the whole range, both ends included; scales whose lowest bits bfloat16 would lose."""
    random = np.random.default_rng(seed)
    n_groups = -(-cols // size)
    codes = random.integers(0, 1 << bits, (rows, cols))
    codes[0, :2] = (0, (1 << bits) - 1)
    scales = random.uniform(0.001, 0.1, (rows, n_groups)).astype(np.float16)
    middle = 1 << (bits - 1)
    zero_points = np.full((rows, n_groups), middle) if symmetric else random.integers(1, 1 << bits, (rows, n_groups))
    groups = np.arange(cols) // size
    return Grouped(bits, codes, scales, zero_points, random.permutation(groups) if shuffled else groups)


def rounded(weight: Array, bits: int, size: int, *, symmetric: bool, bfloat16: bool = False) -> Grouped:
    """A matrix rounded to nearest, so that a model of such matrices still is one."""
    rows, cols = weight.shape
    blocks = weight.reshape(rows, -1, size)
    top = (1 << bits) - 1
    if symmetric:
        scales, zero_points = 2 * np.abs(blocks).max(-1) / top, np.full(blocks.shape[:2], 1 << (bits - 1))
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scales = (high - low) / top
        zero_points = np.clip(np.rint(-low / scales), 1, top)
    scales = scales.astype(np.float16)
    if bfloat16:  # scales that bfloat16 holds too: the low 3 bits of a float16's significand are 0
        scales = (scales.view(np.uint16) & 0xFFF8).view(np.float16)
    codes = np.rint(blocks / scales.astype(np.float64)[..., None]) + zero_points[..., None]
    codes = np.clip(codes, 0, top).reshape(rows, cols).astype(np.int64)
    return Grouped(bits, codes, scales, zero_points.astype(np.int64), np.arange(cols) // size)


def words(values: Array, bits: int) -> Array:
    """(rows, n) → (rows, words) int32, 32 / bits values a word, the first in its lowest bits; 3 bits as GPTQ does:

    ten in a word, the eleventh across its end, ten in the next, the 22nd across its end, ten in the third.
    """
    rows, count = values.shape
    unsigned = values.astype(np.uint64)
    if bits != 3:
        each = 32 // bits
        padded = np.zeros((rows, -(-count // each) * each), np.uint64)
        padded[:, :count] = unsigned
        packed = np.zeros((rows, padded.shape[1] // each), np.uint64)
        for i in range(each):
            packed |= padded[:, i::each] << np.uint64(bits * i)
        return packed.astype(np.uint32).view(np.int32)
    assert count % 32 == 0
    packed = np.zeros((rows, count // 32 * 3), np.uint64)
    for block in range(count // 32):
        v, w = unsigned[:, 32 * block : 32 * block + 32], packed[:, 3 * block : 3 * block + 3]
        for i in range(10):
            w[:, 0] |= v[:, i] << np.uint64(3 * i)
            w[:, 1] |= v[:, 11 + i] << np.uint64(3 * i + 1)
            w[:, 2] |= v[:, 22 + i] << np.uint64(3 * i + 2)
        w[:, 0] |= (v[:, 10] & np.uint64(3)) << np.uint64(30)
        w[:, 1] |= v[:, 10] >> np.uint64(2)
        w[:, 1] |= (v[:, 21] & np.uint64(1)) << np.uint64(31)
        w[:, 2] |= v[:, 21] >> np.uint64(1)
    return packed.astype(np.uint32).view(np.int32)


def gptq(matrix: Grouped, *, v2: bool = False, g_idx: bool = True) -> Tensors:
    zero_points = matrix.zero_points.T if v2 else (matrix.zero_points.T - 1) % (1 << matrix.bits)
    tensors = {
        "qweight": words(matrix.codes, matrix.bits).T,
        "qzeros": words(zero_points, matrix.bits),
        "scales": matrix.scales.T,
    }
    return tensors | ({"g_idx": matrix.groups.astype(np.int32)} if g_idx else {})


def awq(matrix: Grouped) -> Tensors:
    def by_output(values: Array) -> Array:  # (n, out) → (n, out / 8) int32
        found = np.zeros((values.shape[0], values.shape[1] // 8), np.uint64)
        for word in range(found.shape[1]):
            for place, output in enumerate(AWQ_ORDER):
                found[:, word] |= values[:, 8 * word + output].astype(np.uint64) << np.uint64(4 * place)
        return found.astype(np.uint32).view(np.int32)

    return {
        "qweight": by_output(matrix.codes.T), "qzeros": by_output(matrix.zero_points.T), "scales": matrix.scales.T,
    }  # fmt: skip


def compressed(
    weight: Array, *, bits: int, size: int | None, symmetric: bool, layout: str = "pack-quantized"
) -> tuple[Tensors, dict[str, Any], Array]:
    """By compressed-tensors' own code: tensors, `quantization_config`, and what it dequantizes them to."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = "group" if size else "channel"
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    dense = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    blocks = dense.reshape(len(weight), -1, size or weight.shape[1])
    scale, zero_point = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    scale = scale.to(torch.float16).to(torch.float32)
    state = {"weight": dense, "weight_scale": scale, "weight_zero_point": zero_point}
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    wanted = compressor.decompress(packed, scheme)["weight"].to(torch.float64).numpy()
    group = {
        "targets": ["Linear"], "format": layout, "input_activations": None,
        "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
                    "group_size": size},
    }  # fmt: skip
    settings = {
        "quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip
    return {end: tensor.numpy() for end, tensor in packed.items()}, settings, wanted


def bitsandbytes_4bit(weight: Array, *, kind: str, nested: bool, block: int = 64) -> tuple[Tensors, Array]:
    """By bitsandbytes' own code: tensors, and what it dequantizes them to."""
    import torch
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        torch.from_numpy(np.ascontiguousarray(weight, np.float32)), blocksize=block, compress_statistics=nested,
        quant_type=kind,
    )  # fmt: skip
    tensors = {"weight": packed.numpy()}
    tensors |= {f"weight.{end}": part.numpy() for end, part in state.as_dict(packed=True).items()}
    return tensors, functional.dequantize_4bit(packed, state).numpy()


def bitsandbytes_8bit(weight: Array) -> tuple[Tensors, Array]:
    """By bitsandbytes' own code: tensors, and what it dequantizes them to."""
    import torch
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight.astype(np.float16)))
    wanted = functional.int8_vectorwise_dequant(codes, scales).numpy()
    return {"weight": codes.numpy(), "SCB": scales.numpy(), "weight_format": np.uint8(0)}, wanted


def folder(source: Path, path: Path, settings: Mapping[str, Any], pack: Pack) -> Path:
    """A copy of a Hugging Face folder whose linear layers are packed, the rest in float16."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, path)
    stored: dict[str, Array] = {}
    for seed, (name, array) in enumerate(sorted(load_file(source / "model.safetensors").items())):
        if name.endswith("proj.weight"):
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{end}": np.ascontiguousarray(part) for end, part in pack(array, seed).items()}
        else:
            stored[name] = array.astype(np.float16)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": dict(settings)}))
    return path
