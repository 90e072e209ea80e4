"""A GGUF file on the ladder: its float32 twin, and its runs by llama.cpp in child processes.

    graph      every tensor dequantized to float32, no repacked weights, plain attention, caches in float32
    kernels    the file as llama.cpp runs it: 8-bit activations, repacked weights, flash attention, caches in float16

The file holds no graph: llama.cpp makes it, and its callback shows every tensor that is computed, by llama.cpp's names
(Qcur-0, ffn_out-0). There is no rung `arithmetic`: llama.cpp has no second set of kernels to ask for exact sums.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lilliput import child, inspection
from lilliput.checks.gguf_view import GgufFile, open_file
from lilliput.file_ladder import gguf_child
from lilliput.file_ladder.found import RungName
from lilliput.file_ladder.locate import GraphOrder, Operator
from lilliput.ggml import in_float
from lilliput.grid import Float


@dataclass(eq=False)
class GgufLadder:
    """As OnnxLadder."""

    path: Path
    parameters: Mapping[str, str]
    scratch: Path

    format = "gguf"
    rungs: tuple[RungName, ...] = ("graph", "kernels")

    @cached_property
    def file(self) -> GgufFile:
        return open_file(inspection.parts(self.path))

    def fitted(self, tokens: Sequence[int]) -> list[int]:
        longest = self.file.fields.get(f"{self.file.architecture}.context_length")
        return list(tokens)[: int(longest)] if isinstance(longest, int) else list(tokens)

    seen_with = fitted

    @cached_property
    def order(self) -> GraphOrder:
        """The twin's graph, as llama.cpp computes two tokens of it: plain attention shows what is inside."""
        return self._order(self._run("graph", [0, 0], look=True))

    def note(self, rung: RungName) -> str:
        return "" if rung == "graph" else "8-bit activations are llama.cpp's own choice: its arithmetic is in this rung"

    def logits(self, rung: RungName, tokens: Sequence[int]) -> Float:
        return self._run(rung, tokens, look=False)["logits"]

    def values(self, rung: RungName, tokens: Sequence[int]) -> dict[str, Float]:
        """Every float32 tensor without gaps; of `kernels` none inside flash attention."""
        found = self._run(rung, tokens, look=True)
        names = [name for name, _, _ in json.loads(found["graph"].tobytes())]
        values = {name: found[f"t{i}"] for i, name in enumerate(names)}
        return {name: value for name, value in values.items() if value.size}

    def _order(self, found: Mapping[str, Float]) -> GraphOrder:
        operators = []
        for name, kind, inputs in json.loads(found["graph"].tobytes()):
            parameter = next((self.parameters[n] for n in inputs if n in self.parameters and "MUL_MAT" in kind), "")
            if parameter == "embedding":
                parameter = "head"
            activations = [n for n in inputs if n not in self.parameters]
            operators.append(Operator(name, kind, tuple(activations), (name,), parameter))
        return GraphOrder(tuple(operators), operators[-1].name)

    def _written(self, rung: RungName) -> Path:
        if rung == "kernels":
            return self.path
        path = self.scratch / "graph.gguf"
        if not path.is_file():
            in_float.write(self.file.readers, path)
        return path

    def _run(self, rung: RungName, tokens: Sequence[int], *, look: bool) -> dict[str, Float]:
        asked = {
            "model": str(self._written(rung)),
            "tokens": list(map(int, tokens)),
            "first": max(1, len(tokens) // 2),
            "exact": rung == "graph",
            "look": look,
        }
        return child.answer([sys.executable, gguf_child.__file__], asked, self.scratch, self.path)
