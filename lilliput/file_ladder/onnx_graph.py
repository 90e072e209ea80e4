"""An ONNX file on the ladder: its operators, its twins, and its runs in child processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from lilliput import child
from lilliput.checks.onnx_view import place
from lilliput.errors import InputError
from lilliput.file_ladder import onnx_child
from lilliput.file_ladder.found import RungName
from lilliput.file_ladder.locate import GraphOrder, Operator
from lilliput.file_ladder.onnx_twins import Arithmetic, twin
from lilliput.grid import Float
from lilliput.inspection.onnx_file import GATHERS

TWINS: dict[RungName, Arithmetic] = {"graph": "floats", "arithmetic": "integers"}
KNOWN_INPUTS = ("attention_mask", "position_ids")


@dataclass(eq=False)
class OnnxLadder:
    """The file, with the parameters that its constants were recognised as: constant → parameter. `scratch` takes twins;
    `emulated` is the Python, on another processor, that runs the rung `kernels`."""

    path: Path
    parameters: Mapping[str, str]
    scratch: Path
    emulated: tuple[str, ...] = ()

    format = "onnx"
    rungs: tuple[RungName, ...] = ("graph", "arithmetic", "kernels")

    @cached_property
    def model(self) -> onnx.ModelProto:
        """With all its weights. Raises InputError for inputs that nothing is known of."""
        model = onnx.load(self.path)
        stored = {tensor.name for tensor in model.graph.initializer}
        names = [i.name for i in model.graph.input if i.name not in stored]
        others = [n for n in names if n not in KNOWN_INPUTS and not n.startswith(onnx_child.PAST)]
        if len(others) != 1:
            raise InputError(
                f"{self.path}: inputs {', '.join(others) or 'none'}, wanted one of token ids beside "
                f"{', '.join(KNOWN_INPUTS)} and {onnx_child.PAST}*: export a decoder with these inputs"
            )
        if "logits" not in [o.name for o in model.graph.output]:
            raise InputError(f"{self.path}: no output is called logits: name the one that is so")
        return model

    @cached_property
    def order(self) -> GraphOrder:
        stored = {tensor.name for tensor in self.model.graph.initializer}
        sources = {**self.parameters}
        operators = []
        for node in self.model.graph.node:
            parameter = next((sources[n] for n in node.input if n in sources), "")
            inputs = tuple(n for n in node.input if n and n not in stored)
            if not inputs:  # made of constants: a cast, a transposition, a dequantization of a weight is the weight
                sources |= dict.fromkeys(node.output, parameter) if parameter else {}
                stored |= set(node.output)
                continue
            if parameter == "embedding" and node.op_type not in GATHERS:
                parameter = "head"
            operators.append(Operator(place(node), node.op_type, inputs, tuple(o for o in node.output if o), parameter))
        return GraphOrder(tuple(operators), "logits")

    def note(self, rung: RungName) -> str:
        """What a rung's twin could not replace."""
        if rung not in TWINS:
            return ""
        kept = self._twin(rung)[1]
        return f"kept as they are: {', '.join(f'{n} {count}' for n, count in sorted(kept.items()))}" if kept else ""

    def fitted(self, tokens: Sequence[int]) -> list[int]:
        """All, or so many as a graph of fixed length takes, repeated where there are fewer."""
        names = {t.name for t in self.model.graph.initializer} | set(KNOWN_INPUTS)
        ids = next(i for i in self.model.graph.input if i.name not in names and not i.name.startswith(onnx_child.PAST))
        shape = ids.type.tensor_type.shape.dim
        length = int(shape[1].dim_value) if len(shape) > 1 else 0
        return list(np.resize(np.asarray(tokens), length).tolist()) if length else list(tokens)

    seen_with = fitted

    def logits(self, rung: RungName, tokens: Sequence[int]) -> Float:
        """(n, vocab) float32 of the last n positions: the first half in one call, then token by token."""
        path = self._written(rung, ())
        return self._run(rung, path, tokens, ())["logits"]

    def values(self, rung: RungName, tokens: Sequence[int]) -> dict[str, Float]:
        """Every tensor of one call over all tokens; the graph cannot be fused then."""
        names = tuple(dict.fromkeys(name for operator in self.order.operators for name in operator.outputs))
        found = self._run(rung, self._written(rung, names), tokens, names)
        return {name: found[f"t{i}"] for i, name in enumerate(names)}

    def _twin(self, rung: RungName) -> tuple[onnx.ModelProto, dict[str, int]]:
        return (self.model, {}) if rung == "kernels" else twin(self.model, TWINS[rung])

    def _written(self, rung: RungName, outputs: Sequence[str]) -> Path:
        """The rung's model with more outputs, in a file of its own; weights lie beside it."""
        made = self._twin(rung)[0]
        if rung == "kernels" and not outputs:
            return self.path
        copy = onnx.ModelProto()
        copy.CopyFrom(made)
        there = {o.name for o in copy.graph.output}
        copy.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in outputs if n not in there)
        path = self.scratch / f"{rung}{'-open' if outputs else ''}.onnx"
        path.with_suffix(".data").unlink(missing_ok=True)
        onnx.save(copy, path, save_as_external_data=True, location=path.with_suffix(".data").name, size_threshold=1024)
        return path

    def _run(self, rung: RungName, path: Path, tokens: Sequence[int], fetch: Sequence[str]) -> dict[str, Float]:
        asked = {
            "model": str(path), "tokens": list(map(int, tokens)), "first": max(1, len(tokens) // 2),
            "optimize": rung == "kernels", "fetch": list(fetch),
        }  # fmt: skip
        interpreter = self.emulated if rung == "kernels" and self.emulated else (sys.executable,)
        return child.answer([*interpreter, onnx_child.__file__], asked, self.scratch, path)
