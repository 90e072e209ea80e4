"""Low-rank adapters as a GGUF file of their own, which llama.cpp loads beside the base (`--lora`).

    general.type = "adapter", adapter.type = "lora", adapter.lora.alpha (float32), general.architecture of the base
    NAME.lora_a   (rank, cols) F32     NAME.lora_b   (rows, rank) F32     NAME is the base's tensor

llama.cpp adds alpha / rank · B A x to W x (src/llama-adapter.cpp, build_lora_mm). Rows of B stand in the base's order:
q and k interleaved (exporters.gguf_llamacpp.tensors). Where the base stacks matrices (GPT-2's attn_qkv) their adapters
are refused: the stack would need one of three times the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from exporters.gguf_llamacpp import architectures, tensors
from lilliput.errors import ExportError
from lilliput.model import DecoderConfig, LowRank


def write(adapters: Mapping[str, LowRank], config: DecoderConfig, path: Path) -> None:
    """Write the adapters of a model by decoder parameter. Raises ExportError for one that the format cannot hold."""
    alphas = {adapter.alpha for adapter in adapters.values()}
    if len(alphas) != 1:
        raise ExportError(f"a GGUF adapter file has one alpha, seen {sorted(alphas)}: train all with the same")
    writer = gguf.GGUFWriter(path, architectures.of(config).text)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alphas.pop())
    placed = {part.parameter: (tensor, part) for tensor in tensors.file_tensors(config) for part in tensor.parts}
    for name, adapter in adapters.items():
        tensor, part = placed[name]
        if len(tensor.parts) > 1:
            raise ExportError(f"{name}: GGUF stacks it in {tensor.name}, which takes no adapter of a part: merge it")
        writer.add_tensor(f"{tensor.name}.lora_a", np.ascontiguousarray(adapter.a, np.float32))
        writer.add_tensor(f"{tensor.name}.lora_b", np.ascontiguousarray(adapter.b[part.order()], np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
