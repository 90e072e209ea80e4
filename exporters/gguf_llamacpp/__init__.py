"""GGUF for llama.cpp: one file with weights in blocks of 32 or 256, the model's metadata and its tokenizer.

A matrix on a grid is packed into the block type that holds the grid exactly (lilliput.ggml.blocks); what stays in float
is F16 where that is exact, else F32: never a silent rounding. llama.cpp computes a product with a quantized matrix on
activations rounded to 8 bits, with an F16 matrix on activations rounded to float16, with an F32 matrix in
float32. So the exact twin has every matrix as its dequantized F32.

The file is written tensor by tensor: no more than one is in memory beside the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as BlockType

from exporters.base import ExporterOptions
from exporters.gguf_llamacpp import metadata, tensors, vocabulary
from lilliput import families, rope
from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError, ExportError, MissingPackageError, SourceError
from lilliput.ggml import blocks
from lilliput.grid import Float, GridSpec, QuantizedTensor, concatenate_rows, grid, take_rows
from lilliput.model import DecoderConfig, QuantizedModel, Role, TracedModel

MAIN_FILE = "model.gguf"
Packed = npt.NDArray[np.uint8] | npt.NDArray[np.float16] | Float


class Options(ExporterOptions):
    check_tokenizer: bool = True  # hold llama.cpp's token ids of the written file against the tokenizer's own


class Exporter:
    Options: ClassVar = Options
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    extra: ClassVar[str] = "llamacpp"
    budget_grids: ClassVar[tuple[str, ...]] = (
        "q2_k", "q3_k", "iq4_xs", "int4-b32", "iq4_nl", "q4_k", "int4-b32-min-f16", "int5-b32", "q5_k",
        "int5-b32-min-f16", "q6_k", "int8-b32",
    )  # fmt: skip

    def refuses(self, spec: GridSpec, role: Role, shape: tuple[int, int]) -> str | None:
        return blocks.refusal(spec, shape[1])

    def export(
        self, model: QuantizedModel, traced: TracedModel, options: ExporterOptions, folder: Path, *, exact: bool = False
    ) -> Artifact:
        """Write model.gguf. The exact twin holds the same weights as F32, and its tokenizer is not checked again."""
        assert isinstance(options, Options)
        write(model, folder / MAIN_FILE, exact=exact)
        if options.check_tokenizer and not exact:
            check_tokenizer(folder / MAIN_FILE, model.tokenizer)
        context = next(i for i in traced.signature("decode").inputs if i.name == "k_cache_0").shape[2]
        return Artifact(folder, "gguf_llamacpp", MAIN_FILE, context, prefill=0)

    def read(self, artifact: Artifact) -> Mapping[str, QuantizedTensor | Float]:
        """With gguf's own reader; the configuration, and so the fusing and order of rows, comes from the metadata."""
        return read(artifact.path)


def write(model: QuantizedModel, path: Path, *, exact: bool = False) -> None:
    """Write the model as GGUF. Raises ExportError where the format cannot hold it."""
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[tensors.architecture(config)])
    wanted = list(tensors.file_tensors(config))
    weights: Counter[BlockType] = Counter()
    for tensor in wanted:
        kind, packed = _pack(model, tensor, exact)
        writer.add_tensor_info(tensor.name, packed.shape, packed.dtype, packed.nbytes, kind)
        if packed.ndim > 1:
            weights[kind] += packed.nbytes * gguf.GGML_QUANT_SIZES[kind][0] // gguf.GGML_QUANT_SIZES[kind][1]
    metadata.add(writer, model, weights)
    vocabulary.add(writer, model.tokenizer, config.vocab_size)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in wanted:
            writer.write_tensor_data(_pack(model, tensor, exact)[1])
    finally:
        writer.close()


def _pack(model: QuantizedModel, tensor: tensors.FileTensor, exact: bool) -> tuple[BlockType, Packed]:
    """The bytes of one tensor of the file and their type."""
    grids = {model.quantized[p.parameter].spec if p.parameter in model.quantized else None for p in tensor.parts}
    if len(grids) > 1 and not exact:
        names = ", ".join(f"{p.parameter} {_grid_name(model, p.parameter)}" for p in tensor.parts)
        raise ExportError(f"GGUF stores {tensor.name} as one matrix, so its parts need one grid, not {names}")
    if grids == {None} or exact:
        rows = [model.dequantized(part.parameter)[part.order()] for part in tensor.parts]
        stacked = np.concatenate(rows)
        packed = np.ascontiguousarray(stacked, np.float32) if exact else blocks.pack_float(stacked)
        return (BlockType.F16 if packed.dtype == np.float16 else BlockType.F32), packed
    whole = concatenate_rows([take_rows(model.quantized[part.parameter], part.order()) for part in tensor.parts])
    refused = blocks.refusal(whole.spec, whole.shape[1])
    if refused:
        raise ExportError(f"{tensor.name} on grid {whole.spec.name}: {refused}")
    return blocks.block_type(whole.spec), blocks.pack(whole)


def _grid_name(model: QuantizedModel, parameter: str) -> str:
    return model.quantized[parameter].spec.name if parameter in model.quantized else "float"


def read(path: Path) -> dict[str, QuantizedTensor | Float]:
    """The weights of a file that `write` wrote, by decoder parameter."""
    file = _open(path)
    config = read_config(file)
    stored = {tensor.name: tensor for tensor in file.tensors}
    grids: dict[str, str] = json.loads(_field(file, metadata.GRIDS))
    weights: dict[str, QuantizedTensor | Float] = {}
    for tensor in tensors.file_tensors(config):
        if tensor.name not in stored:
            raise ArtifactError(f"{path}: tensor {tensor.name} is missing: export it anew")
        _unpack(tensor, stored[tensor.name], grids, weights)
    return weights


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # gguf raises ValueError, IndexError or what numpy raises
        raise ArtifactError(f"{path}: not a readable GGUF file ({error}): export it anew") from error


def _field(file: gguf.GGUFReader, key: str) -> str:
    field = file.get_field(key)
    if field is None:
        raise ArtifactError(f"the GGUF file has no {key!r}, so it is not one that Lilliput wrote: export it anew")
    return str(field.contents())


def read_config(file: gguf.GGUFReader) -> DecoderConfig:
    """The decoder's configuration, by the family that reads GGUF sources of this architecture."""
    architecture = _field(file, "general.architecture")
    fields: dict[str, Any] = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in file.fields.items()
        if key.startswith(f"{architecture}.")
    }
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in file.tensors}
    fields |= rope.gguf_factors({tensor.name: tensor for tensor in file.tensors})
    return families.gguf_family_of(architecture).gguf_config(fields, shapes)


def _unpack(
    tensor: tensors.FileTensor,
    stored: gguf.ReaderTensor,
    grids: Mapping[str, str],
    weights: dict[str, QuantizedTensor | Float],
) -> None:
    """Put the parts of one tensor of the file into `weights`."""
    kind, data = stored.tensor_type, stored.data
    is_float = kind in (BlockType.F16, BlockType.F32)
    whole: QuantizedTensor | Float = (
        data.astype(np.float32)
        if is_float
        else blocks.unpack(data, grid(grids[tensor.parts[0].parameter]), tensor.name)
    )
    start = 0
    for part in tensor.parts:
        rows = start + np.argsort(part.order())
        weights[part.parameter] = take_rows(whole, rows) if isinstance(whole, QuantizedTensor) else whole[rows]
        start += part.rows


def check_tokenizer(path: Path, tokenizer: Path) -> str:
    """Hold llama.cpp's token ids of the file against the tokenizer's own; the sentence for the report.

    Raises ExportError for the first text that differs, MissingPackageError without llama.cpp.
    """
    try:
        import llama_cpp  # noqa: F401
    except ImportError as error:
        purpose = "to check the tokenizer of a GGUF file (or set the exporter's option check_tokenizer: false)"
        raise MissingPackageError("llama_cpp", "llamacpp", purpose) from error
    from lilliput import parity

    try:
        return parity.against_llama_cpp(path, tokenizer)
    except SourceError as error:
        raise ExportError(f"the tokenizer of {path.name} in llama.cpp is not that of {tokenizer}: {error}") from error
