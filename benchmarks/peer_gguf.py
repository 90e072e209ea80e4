"""llama.cpp's own quantizer, through its C API: what the tool llama-quantize does.

It starts from a GGUF of the float weights. The importance matrix holds the mean square of every linear's inputs over
the calibration text, as llama-imatrix gathers it; the embedding has no entry, as in llama.cpp's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

from calibration.statistics import Statistics
from lilliput.grid import Float
from lilliput.model import DecoderConfig, QuantizedModel, SourceModel

TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")  # as llama-quantize calls them


def write_float(model: SourceModel, path: Path) -> None:
    """The float weights as GGUF: F16 where that is exact, else F32."""
    from exporters import gguf_llamacpp

    gguf_llamacpp.write(QuantizedModel(model.name, model.config, {}, model.weights, model.tokenizer, {}), path)


def importance(config: DecoderConfig, statistics: Statistics) -> dict[str, Float]:
    """Mean squares (cols,) of the inputs of every matrix, by the name of its tensor in the file."""
    from exporters.gguf_llamacpp.tensors import file_tensors

    return {
        tensor.name: statistics[tensor.parts[0].parameter].second_moments.diagonal().copy()
        for tensor in file_tensors(config)
        if tensor.parts[0].parameter in statistics and tensor.parts[0].parameter not in ("head", "embedding")
    }


def quantize(
    source: Path, destination: Path, kind: str = "Q4_0", importance: Mapping[str, Float] | None = None
) -> None:
    """Write `destination` as llama-quantize does for type `kind`; `importance` holds mean squares by tensor name.

    Raises RuntimeError with llama.cpp's status and its last words.
    """
    import llama_cpp

    from targets.runtimes.llamacpp_cpu import last_log, start_logging

    start_logging()
    values = importance or {}
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()  # the last one has no name: the end
    for entry, (name, column) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), len(column)
        entry.data = column.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), os.cpu_count() or 1
    if values:
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(options))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize of {source} to {kind} ended with status {status}: {last_log()}")


def make(
    model: SourceModel, statistics: Statistics | None, folder: Path, types: tuple[str, ...] = TYPES
) -> None:  # fmt: skip
    """{type}.gguf for all types, and {type}-imatrix.gguf where there are statistics."""
    floats = folder / "float.gguf"
    write_float(model, floats)
    matrix = importance(model.config, statistics) if statistics else None
    for kind in types:
        quantize(floats, folder / f"{kind}.gguf", kind)
        if matrix:
            quantize(floats, folder / f"{kind}-imatrix.gguf", kind, matrix)
    floats.unlink()
