"""A `.tflite` on the ladder: its operators, its twins, and its runs in child processes.

    graph         the constants of integers turned into float32 ones, on LiteRT's reference kernels
    arithmetic    the file on LiteRT's reference kernels: integer products with exact sums, no delegate
    kernels       the file as LiteRT runs it, XNNPACK taking what it takes

LiteRT 2.3's reference kernels compute products with weights in blocks wrongly (nothing of the result is right), so a
file that has such has no rung `arithmetic`. Where there is one, the two round float activations by different rules:
symmetrically in the reference, with a zero point a row in XNNPACK.

Every tensor of the first two can be looked at. What XNNPACK runs can be seen where it is an output, so the third is
opened by a copy of the file in which the products' tensors are outputs too.

A signature with caches (LiteRT-LM's names: tokens, input_pos, mask, kv_cache_*) is run token by token through
`decode`, and looked into through its shortest `prefill_*`. One without has a single input of token ids.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from lilliput import child
from lilliput.checks.tflite_view import CACHE, Graph, TfliteFile, block_size, open_file
from lilliput.errors import InputError
from lilliput.file_ladder import tflite_child
from lilliput.file_ladder.found import RungName
from lilliput.file_ladder.locate import GraphOrder, Operator
from lilliput.grid import Float
from lilliput.inspection.tflite_file import LOOKUPS, MATMULS, TYPE_NAMES

KNOWN_INPUTS = ("input_pos", "mask")
CODES = ("INT2", "INT4", "UINT4", "INT8", "UINT8")
MAGIC = b"TFL3"


@dataclass(eq=False)
class TfliteLadder:
    """As OnnxLadder."""

    path: Path
    parameters: Mapping[str, str]
    scratch: Path

    format = "tflite"

    @cached_property
    def file(self) -> TfliteFile:
        return open_file(self.path)

    @cached_property
    def rungs(self) -> tuple[RungName, ...]:
        return ("graph", "kernels") if self._blocks else ("graph", "arithmetic", "kernels")

    @cached_property
    def _blocks(self) -> int:
        """Tensors in blocks."""
        return sum(bool(block_size(tensor)) for graph in self.file.graphs for tensor in graph.tensors)

    def _signature(self, *, looked_into: bool) -> int:
        """The index of the subgraph that is run. Raises InputError where none takes what is known."""
        graphs = self.file.graphs
        decode = [i for i, g in enumerate(graphs) if g.name == "decode"]
        prefills = [i for i, g in enumerate(graphs) if g.name.startswith("prefill")]
        if decode:
            shortest = min(prefills, key=lambda i: self._length(graphs[i]), default=decode[0])
            return shortest if looked_into else decode[0]
        if len(graphs[0].inputs) == 1 and len(graphs[0].outputs) == 1:
            return 0
        names = ", ".join(graphs[0].inputs)
        raise InputError(f"{self.path}: inputs {names}: wanted a signature decode, or one input of token ids")

    def _length(self, graph: Graph) -> int:
        """Tokens of a call."""
        others = [n for n in graph.inputs if n not in KNOWN_INPUTS and not n.startswith(CACHE)]
        if len(others) != 1:
            raise InputError(f"{self.path}: {graph.name} takes {', '.join(others)}, wanted one input of token ids")
        return int(np.prod(graph.shape(graph.inputs[others[0]])))

    def fitted(self, tokens: Sequence[int]) -> list[int]:
        """All for a decode step; for a call of fixed length so many, repeated where there are fewer."""
        graph = self.file.graphs[self._signature(looked_into=False)]
        length = self._length(graph)
        if length == 1:
            caches = [graph.shape(i) for n, i in graph.inputs.items() if n.startswith(CACHE)]
            slots = graph.shape(graph.inputs["mask"])[-1] if "mask" in graph.inputs else max(max(s) for s in caches)
            return list(tokens)[:slots]
        return list(np.resize(np.asarray(tokens), length).tolist())

    def seen_with(self, tokens: Sequence[int]) -> list[int]:
        length = self._length(self.file.graphs[self._signature(looked_into=True)])
        return list(np.resize(np.asarray(tokens), length).tolist())

    @cached_property
    def order(self) -> GraphOrder:
        """Tensors are named by their index: names in a file need not differ."""
        graph = self.file.graphs[self._signature(looked_into=True)]
        operators = []
        for number, operator in enumerate(graph.operators):
            constants = [i for i in operator.inputs if i >= 0 and self._is_constant(graph, i)]
            names = [self.parameters[n] for n in (graph.tensor_name(i) for i in constants) if n in self.parameters]
            parameter = names[0] if names and operator.name in (*MATMULS, *LOOKUPS) else ""
            if parameter == "embedding" and operator.name not in LOOKUPS:
                parameter = "head"
            inputs = tuple(str(i) for i in operator.inputs if i >= 0 and i not in constants)
            name = f"operator {number}, {graph.tensor_name(operator.outputs[0])[-60:]}"
            operators.append(Operator(name, operator.name, inputs, tuple(map(str, operator.outputs)), parameter))
        outputs = {n: i for n, i in graph.outputs.items() if not n.startswith(CACHE)}
        return GraphOrder(tuple(operators), str(outputs.get("logits", next(iter(outputs.values()), ""))))

    def _is_constant(self, graph: Graph, index: int) -> bool:
        return self.file.content(graph.tensors[index]) is not None

    def note(self, rung: RungName) -> str:
        if rung == "kernels" and self._blocks:
            return "the arithmetic is in this rung: LiteRT's reference kernels do not compute weights in blocks rightly"
        return ""

    def logits(self, rung: RungName, tokens: Sequence[int]) -> Float:
        """(n, vocab) float32."""
        return self._run(rung, self._written(rung), tokens, ())["logits"]

    def values(self, rung: RungName, tokens: Sequence[int]) -> dict[str, Float]:
        """Of a call over the tokens, fitted to the looked-into signature; XNNPACK's products alone for `kernels`."""
        graph = self.file.graphs[self._signature(looked_into=True)]
        products = [int(t) for o in self.order.operators if o.kind in MATMULS for t in o.outputs]
        every = [int(t) for o in self.order.operators for t in o.outputs]
        fetch = products if rung == "kernels" else every
        fetch = [i for i in dict.fromkeys(fetch) if graph.type(i) in ("FLOAT32", "INT8", "INT16", "INT32")]
        path = self._opened(fetch) if rung == "kernels" else self._written(rung)
        found = self._run(rung, path, self.seen_with(tokens), fetch)
        return {str(index): found[f"t{i}"] for i, index in enumerate(fetch)}

    def _written(self, rung: RungName) -> Path:
        if rung != "graph":
            path = self.scratch / "model.tflite"
            if not path.is_file():
                path.write_bytes(self.file.data.tobytes())  # of a bundle, its model alone
            return path
        path = self.scratch / "graph.tflite"
        if not path.is_file():
            path.write_bytes(self._floats())
        return path

    def _floats(self) -> bytes:
        """The file with float32 constants. Raises InputError where activations are integers."""
        quantizers = sum(o.name == "QUANTIZE" for g in self.file.graphs for o in g.operators)
        if quantizers:
            raise InputError(
                f"{quantizers} QUANTIZE operators: the file's activations are integers, it has no float twin"
            )
        model = open_file(self.path)  # anew: it is changed
        made: dict[int, int] = {}
        changes = [(graph, tensor) for graph in model.graphs for tensor in graph.tensors if self._codes(model, tensor)]
        numbers = {t.buffer: model.numbers(g, t) for g, t in changes}
        for _, tensor in changes:
            if tensor.buffer not in made:
                buffer = schema.BufferT()
                buffer.data = np.ascontiguousarray(numbers[tensor.buffer], "<f4").view(np.uint8).reshape(-1)
                made[tensor.buffer] = len(model.model.buffers)
                model.model.buffers.append(buffer)
            tensor.buffer, tensor.type, tensor.quantization = made[tensor.buffer], schema.TensorType.FLOAT32, None
        return packed(model)

    def _codes(self, file: TfliteFile, tensor: Any) -> bool:
        scaled = tensor.quantization is not None and (
            tensor.quantization.details is not None
            or (tensor.quantization.scale is not None and len(tensor.quantization.scale))
        )
        return bool(scaled) and TYPE_NAMES[tensor.type] in CODES and file.content(tensor) is not None

    def _opened(self, tensors: Sequence[int]) -> Path:
        """The file with more outputs in the signature that is looked into."""
        file, number = open_file(self.path), self._signature(looked_into=True)
        graph = file.model.subgraphs[number]
        there = {int(i) for i in graph.outputs}
        graph.outputs = [*map(int, graph.outputs), *(i for i in tensors if i not in there)]
        signature = next(s for s in file.model.signatureDefs if s.subgraphIndex == number)
        for index in tensors:
            named = schema.TensorMapT()
            named.name, named.tensorIndex = f"ladder_{index}", index
            signature.outputs.append(named)
        path = self.scratch / "open.tflite"
        path.write_bytes(packed(file))
        return path

    def _run(self, rung: RungName, path: Path, tokens: Sequence[int], fetch: Sequence[int]) -> dict[str, Float]:
        number = self._signature(looked_into=bool(fetch))
        asked = {
            "model": str(path),
            "tokens": list(map(int, tokens)),
            "kernels": "delegate" if rung == "kernels" else "reference",
            "signature": self.file.graphs[number].name,
            "subgraph": number,
            "fetch": list(fetch),
        }
        return child.answer([sys.executable, tflite_child.__file__], asked, self.scratch, path)


def packed(file: TfliteFile) -> bytes:
    """The flatbuffer of an unpacked model; buffers that lay behind it go inside."""
    for buffer in file.model.buffers:
        if buffer.offset > 1:
            buffer.data = file.data[buffer.offset : buffer.offset + buffer.size]
            buffer.offset = buffer.size = 0
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(file.model.Pack(builder), MAGIC)
    return bytes(builder.Output())
