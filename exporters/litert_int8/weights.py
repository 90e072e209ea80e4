"""The model's parameters as constants of the file: packed codes and scales, or float32.

Parts that one FULLY_CONNECTED computes together lie under one name, `part:rows+part:rows+…`; a matrix
alone lies under its own name. `read` takes names apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.litert_int8 import packing
from exporters.litert_int8.flatbuffer import Blocks, Graph, StoredTensor, read_constants
from lilliput.errors import ArtifactError, ExportError
from lilliput.grid import Float, GridSpec, QuantizedTensor, concatenate_rows, narrowest, take_rows
from lilliput.model import QuantizedModel

BITS = {"int2": 2, "int4": 4, "int8": 8}


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant as the file will hold it."""

    data: npt.NDArray[Any]
    dtype: str
    shape: tuple[int, ...]
    scales: npt.NDArray[Any] | Blocks | None = None


class Weights:
    """Constants by name, made once and shared by all subgraphs. `exact` stores every matrix dequantized."""

    def __init__(self, model: QuantizedModel, exact: bool) -> None:
        self.model, self.exact = model, exact
        self._stored: dict[str, Stored] = {}

    def grid(self, name: str) -> GridSpec | None:
        """The grid that matrix `name` is stored on; None is float32."""
        return None if self.exact or name not in self.model.quantized else self.model.quantized[name].spec

    def matrix(self, graph: Graph, parts: Sequence[str]) -> int:
        """The tensor of matrices `parts` (all on one grid), stacked row-wise."""
        rows = [self.rows(part) for part in parts]
        name = "+".join(f"{p}:{n}" for p, n in zip(parts, rows, strict=True)) if len(parts) > 1 else parts[0]
        if name not in self._stored:
            self._stored[name] = self._matrix(parts)
        return self._constant(graph, name)

    def vector(self, graph: Graph, parts: Sequence[str]) -> int:
        """The tensor of float vectors (or float tables) `parts`, put end to end."""
        name = "+".join(f"{p}:{self.rows(p)}" for p in parts) if len(parts) > 1 else parts[0]
        if name not in self._stored:
            data = np.concatenate([self._float(part) for part in parts])
            self._stored[name] = Stored(data, "float32", data.shape)
        return self._constant(graph, name)

    def _float(self, name: str) -> Float:
        if name not in self.model.floats:
            raise ExportError(f"{name}: the model has no such parameter, the traced graph asks for it")
        return self.model.floats[name]

    def rows(self, name: str) -> int:
        """Rows of a matrix, elements of a vector."""
        held = self.model.quantized.get(name)
        return held.shape[0] if held is not None else self._float(name).shape[0]

    def _matrix(self, parts: Sequence[str]) -> Stored:
        if self.grid(parts[0]) is None:
            data = np.concatenate([self.model.dequantized(part) for part in parts])
            return Stored(data, "float32", data.shape)
        return store(concatenate_rows([self.model.quantized[part] for part in parts]))

    def _constant(self, graph: Graph, name: str) -> int:
        stored = self._stored[name]
        known = graph.has_constant(name)
        tensor = graph.constant(name, stored.data, stored.dtype, stored.shape)
        if stored.scales is not None and not known:
            graph.quantize(tensor, stored.scales)
        return tensor


def store(tensor: QuantizedTensor) -> Stored:
    """Codes and scales in the file's layout."""
    bits, width = tensor.spec.bits, tensor.spec.block_size
    scales = Blocks(tensor.scales.astype(np.float16), width) if width else tensor.scales[:, 0]
    return Stored(packing.pack(tensor.codes, bits), f"int{bits}", tensor.shape, scales)  # type: ignore[arg-type]


def read(path: Path) -> dict[str, QuantizedTensor | Float]:
    """Every parameter in the file by decoder name, fused ones apart again."""
    found: dict[str, QuantizedTensor | Float] = {}
    for stored in read_constants(path):
        if not is_parameter(stored.name):
            continue
        value = unpack(stored)
        begin = 0
        for part, rows in name_parts(stored.name, stored.shape[0]):
            order = np.arange(begin, begin + rows)
            found[part] = take_rows(value, order) if isinstance(value, QuantizedTensor) else value[order]
            begin += rows
    return found


def is_parameter(name: str) -> bool:
    return name.split(".", 1)[0].split(":", 1)[0] in ("embedding", "position_embedding", "layers", "norm", "head") and (
        not name.endswith(".scales")
    )


def name_parts(name: str, rows: int) -> list[tuple[str, int]]:
    """`a:2+b:3` → [(a, 2), (b, 3)]; a plain name has all the rows."""
    if ":" not in name:
        return [(name, rows)]
    return [(part.rsplit(":", 1)[0], int(part.rsplit(":", 1)[1])) for part in name.split("+")]


def unpack(stored: StoredTensor) -> QuantizedTensor | Float:
    """The numbers of a constant, from the file's own bytes."""
    if stored.type == "float32":
        return stored.data.view(np.float32).reshape(stored.shape)
    if stored.scales is None or len(stored.shape) != 2 or stored.type not in BITS:
        raise ArtifactError(f"{stored.name}: {stored.type} {stored.shape} without scales is no weight of Lilliput's")
    shape = (stored.shape[0], stored.shape[1])
    bits = BITS[stored.type]
    codes = packing.unpack(stored.data, bits, shape)
    if isinstance(stored.scales, Blocks):
        return QuantizedTensor(GridSpec(bits, stored.scales.block_size), codes, stored.scales.scales.astype(np.float32))
    scales = stored.scales.reshape(-1, 1)
    return QuantizedTensor(GridSpec(bits, 0, "none", narrowest(scales)), codes, scales)
