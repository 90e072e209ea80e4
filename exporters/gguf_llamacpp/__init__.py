"""GGUF for llama.cpp: one file with weights in blocks of 32 or 256, the model's metadata and its tokenizer.

A matrix on a grid is packed into the block type that holds the grid exactly (lilliput.ggml.blocks); what stays in float
is F16 where that is exact, else F32: never a silent rounding. llama.cpp computes a product with a quantized matrix on
activations rounded to 8 bits, with an F16 matrix on activations rounded to float16, with an F32 matrix in
float32. So the exact twin has every matrix as its dequantized F32.

The file is written tensor by tensor: no more than one is in memory beside the model. `split_mb` cuts it into files of
at most that size (a larger tensor has one of its own), by llama.cpp's convention: model-00001-of-00003.gguf holds all
metadata, each the keys split.no, split.count and split.tensors.count. llama.cpp opens the first and finds the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as BlockType
from gguf.gguf_writer import SHARD_NAME_FORMAT
from pydantic import Field

from exporters.base import ExporterOptions
from exporters.gguf_llamacpp import architectures, metadata, tensors, vocabulary
from lilliput import families, rope
from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError, ExportError
from lilliput.ggml import blocks
from lilliput.grid import Float, GridSpec, QuantizedTensor, concatenate_rows, grid, take_rows
from lilliput.model import DecoderConfig, QuantizedModel, Role, TracedModel

MAIN_FILE = "model.gguf"
SHARDS = "model-*-of-*.gguf"
Packed = npt.NDArray[np.uint8] | npt.NDArray[np.float16] | Float


class Options(ExporterOptions):
    check_tokenizer: bool = True  # hold llama.cpp's token ids of the written file against the tokenizer's own
    split_mb: float | None = Field(default=None, gt=0)  # 10⁶ bytes a file; None: one file


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
        context = next(i for i in traced.signature("decode").inputs if i.name == "k_cache_0").shape[2]
        said = write(model, folder / MAIN_FILE, exact=exact, options=options, context=context)
        main = first_file(folder)
        if options.check_tokenizer and not exact:
            said.append(f"tokenizer: {vocabulary.proof.check(main, model.tokenizer)}")
        return Artifact(folder, "gguf_llamacpp", main.name, context, prefill=0, notes=tuple(said))

    def read(self, artifact: Artifact) -> Mapping[str, QuantizedTensor | Float]:
        """With gguf's own reader; the configuration, and so the fusing and order of rows, comes from the metadata."""
        return read(artifact.path)


def first_file(folder: Path) -> Path:
    """The file that llama.cpp opens: the model, or the first of its parts."""
    shards = sorted(folder.glob(SHARDS))
    return shards[0] if shards else folder / MAIN_FILE


def write(
    model: QuantizedModel,
    path: Path,
    *,
    exact: bool = False,
    options: Options | None = None,
    context: int | None = None,
) -> list[str]:
    """Write the model as GGUF; sentences for the report. `context`: positions that it must be exact for, None: all.

    Raises ExportError where the format, or llama.cpp's architecture, cannot hold the model.
    """
    options = options or Options()
    config, said = architectures.fitted(model.config, context)
    split_bytes = round(options.split_mb * 1e6) if options.split_mb else 0
    writer = gguf.GGUFWriter(path, architectures.of(config).text, split_max_size=split_bytes)
    wanted, factors = list(tensors.file_tensors(config)), tensors.rope_tensors(config)
    weights: Counter[BlockType] = Counter()
    for name, divisors in factors.items():
        writer.add_tensor_info(name, divisors.shape, divisors.dtype, divisors.nbytes, BlockType.F32)
    for tensor in wanted:
        kind, packed = _pack(model, tensor, exact)
        writer.add_tensor_info(tensor.name, packed.shape, packed.dtype, packed.nbytes, kind)
        if packed.ndim > 1:
            weights[kind] += packed.nbytes * gguf.GGML_QUANT_SIZES[kind][0] // gguf.GGML_QUANT_SIZES[kind][1]
    metadata.add(writer, model, config, weights)
    chosen = vocabulary.add(writer, model.tokenizer, config.vocab_size, prove=options.check_tokenizer)
    _write_all(writer, chain(factors.values(), (_pack(model, tensor, exact)[1] for tensor in wanted)))
    return [sentence for sentence in (said, chosen) if sentence]


def _write_all(writer: gguf.GGUFWriter, packed: Iterable[Packed]) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in packed:
            writer.write_tensor_data(data)
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
    return blocks.stored(tensor.name, whole)


def _grid_name(model: QuantizedModel, parameter: str) -> str:
    return model.quantized[parameter].spec.name if parameter in model.quantized else "float"


def read(path: Path) -> dict[str, QuantizedTensor | Float]:
    """The weights of a file that `write` wrote, by decoder parameter; of all parts, where it is the first of some."""
    file = _open(path)
    others = [_open(part) for part in _parts(path, file)[1:]]
    config = read_config(file, others)
    stored = {tensor.name: tensor for part in (file, *others) for tensor in part.tensors}
    grids: dict[str, str] = json.loads(_field(file, metadata.GRIDS))
    weights: dict[str, QuantizedTensor | Float] = {}
    for tensor in tensors.file_tensors(config):
        if tensor.name not in stored:
            raise ArtifactError(f"{path}: tensor {tensor.name} is missing: export it anew")
        _unpack(tensor, stored[tensor.name], grids, weights)
    return weights


def _parts(path: Path, file: gguf.GGUFReader) -> list[Path]:
    """All files of a model, `path` being the first. Raises ArtifactError where one is missing."""
    field = file.get_field(gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    count = int(field.contents()) if field else 1
    if count == 1:
        return [path]
    stem = path.stem.rsplit("-", 3)[0]
    parts = [path.with_name(SHARD_NAME_FORMAT.format(stem, i + 1, count)) for i in range(count)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ArtifactError(f"{path}: {', '.join(missing)} of its {count} parts is missing: export it anew")
    return parts


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


def read_config(file: gguf.GGUFReader, others: Sequence[gguf.GGUFReader] = ()) -> DecoderConfig:
    """The decoder's configuration, by the family that reads GGUF sources of this architecture."""
    architecture = _field(file, "general.architecture")
    fields: dict[str, Any] = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in file.fields.items()
        if key.startswith(f"{architecture}.")
    }
    every = {tensor.name: tensor for part in (file, *others) for tensor in part.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in every.items()}
    fields |= rope.gguf_factors(every)
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
