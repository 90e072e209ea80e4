"""The float32 twin of a GGUF file: the same metadata, and every tensor dequantized by gguf's own package.

llama.cpp computes it without 8-bit activations: what is left between the twin and a float model are the file's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from lilliput.errors import InputError

LEFT_OUT = ("GGUF.", "split.", "general.architecture", "general.file_type")


def write(parts: Sequence[gguf.GGUFReader], path: Path) -> None:
    """Write the twin of a model in one or several files as one. Raises InputError for a type that gguf cannot read."""
    fields = parts[0].fields
    writer = gguf.GGUFWriter(path, str(fields["general.architecture"].contents()))
    for key, field in fields.items():
        if key.startswith(LEFT_OUT):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for stored in (tensor for part in parts for tensor in part.tensors):
        shape = tuple(int(n) for n in reversed(stored.shape))
        try:
            numbers = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{stored.name} ({stored.tensor_type.name}) has no float twin: {error}") from error
        writer.add_tensor(stored.name, np.ascontiguousarray(numbers, np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
