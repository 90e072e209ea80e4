"""ai-edge-quantizer on the very graph that our LiteRT files hold, in float32.

The float graph is what our exporter writes for a model without grids: both signatures, weights shared by them, the
embedding also the head. Quantized are the linears and the table, on the grids that our own files have:

    int8    linears and table with one scale a row      (dynamic_wi8_afp32)
    int4    linears in blocks of 32, table as above     (dynamic_wi4b32_afp32)

by the quantizer's algorithms min-max, OCTAV, MSE and GPTQ. The rotary tables, which are looked up as the embedding
is, stay in float: quantized they would spoil every position. GPTQ has no lookup: there the table is by min-max.

GPTQ is calibrated on CALIBRATION_CHUNKS chunks of Lilliput's calibration text, through a file made for that: the decode
step for PREFILL tokens at once (prefill alone leaves out what only the logits need). Its Hessians are filed under
the names of activations, which are others in each signature, while a weight that signatures share must get the same
codes: both are given the Hessian of the same input.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.subjects import CONTEXT
from calibration.statistics import INPUTS
from exporters.litert_int8.flatbuffer import Graph, Model
from exporters.litert_int8.lowering import lower
from exporters.litert_int8.weights import Weights, name_parts
from lilliput.model import QuantizedModel, SourceModel

Grid = Literal["int8", "int4"]
Statistics = dict[str, Any]  # ai-edge-quantizer's own records, by `Operator.reads`
ALGORITHMS = {"min-max": "min_max_uniform_quantize", "OCTAV": "OCTAV", "MSE": "MSE", "GPTQ": "GPTQ"}
MIN_MAX = ALGORITHMS["min-max"]
PREFILL = 128
CALIBRATION_CHUNKS = 16  # of PREFILL tokens; its calibrator keeps a Hessian of every output too, and takes minutes
MASKED = -1e4
MARK = "::"  # between a signature's name and a tensor's


class NamedFile(Model):
    """A file whose tensors have names of their own in each signature, as ai-edge-quantizer wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Graph] = []

    def graph(self, name: str) -> Graph:
        self.made.append(super().graph(name))
        return self.made[-1]

    def write(self, path: Path) -> None:
        for graph in self.made:
            for tensor in graph.table().tensors:
                tensor.name = f"{graph.name}{MARK}{tensor.name}"
        super().write(path)


def write_float(source: SourceModel, path: Path, *, calibrating: bool = False) -> None:
    """All in float32: prefill and decode, or for calibration the decode step made for PREFILL tokens at once."""
    from lilliput import decoder
    from lilliput.trace import trace

    floats = QuantizedModel(source.name, source.config, {}, source.weights, source.tokenizer, {})
    traced = trace(decoder.build(source), CONTEXT, PREFILL)
    file, held = NamedFile(), Weights(floats, exact=True)
    steps = {"decode": PREFILL} if calibrating else {"decode": 1, "prefill": PREFILL}
    for name, count in steps.items():
        lower(file, source.config, held, traced.signature(name), count, CONTEXT)
    file.write(path)


@dataclass(frozen=True)
class Operator:
    """One operator with a weight. `scope` is its output's name, as a recipe matches it; `activation` what it reads."""

    kind: Literal["linear", "table"]
    scope: str
    activation: str
    reads: str  # which of a layer's four inputs: layers.{i}.attention.input and so on; "" for the table


def operators(path: Path) -> tuple[Operator, ...]:
    """Those of all signatures."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import read_model

    model = read_model(str(path))
    codes = [code.builtinCode for code in model.operatorCodes]
    weighted = (schema.BuiltinOperator.FULLY_CONNECTED, schema.BuiltinOperator.EMBEDDING_LOOKUP)
    found = []
    for graph in model.subgraphs:
        for operator in graph.operators:
            if codes[operator.opcodeIndex] not in weighted:
                continue
            indices = operator.inputs[0], operator.inputs[1], operator.outputs[0]
            activation, weight, scope = (graph.tensors[i].name.decode() for i in indices)
            parameter = name_parts(weight.split(MARK, 1)[1], 0)[0][0]
            if parameter.startswith("layers."):
                _, index, inner = parameter.split(".", 2)
                found.append(Operator("linear", scope, activation, f"layers.{index}.{INPUTS[inner]}"))
            elif parameter in ("embedding", "head"):
                found.append(Operator("table", scope, activation, ""))
    return tuple(found)


def quantize(floats: Path, destination: Path, grid: Grid, algorithm: str, statistics: Statistics | None) -> None:
    """Let ai-edge-quantizer write `destination`. What it refuses it raises, as kinds of its own."""
    from ai_edge_quantizer import quantizer

    found = operators(floats)
    own = {o.activation: statistics[o.reads] for o in found if o.kind == "linear"} if statistics else None
    file = quantizer.Quantizer(str(floats), recipe(found, grid, algorithm))
    file.quantize(own, enable_progress_report=False).export_model(str(destination), overwrite=True)


def calibrate(floats: Path, chunks: Sequence[Sequence[int]]) -> Statistics:
    """What GPTQ wants to know, by `Operator.reads`, from a file that `write_float` wrote for calibration."""
    from ai_edge_quantizer import quantizer

    found = operators(floats)
    file = quantizer.Quantizer(str(floats), recipe(found, "int8", ALGORITHMS["GPTQ"]))
    gathered = file.calibrate({"decode": calibration_inputs(floats, chunks)})
    return {o.reads: gathered[o.activation] for o in found if o.kind == "linear"}


def recipe(found: Sequence[Operator], grid: Grid, algorithm: str) -> list[dict[str, Any]]:
    """A recipe of ai-edge-quantizer for the operators that were found."""
    from ai_edge_quantizer import recipe_manager
    from ai_edge_quantizer.qtyping import QuantGranularity, TFLOperationName

    made = recipe_manager.RecipeManager()
    fully_connected, lookup = TFLOperationName.FULLY_CONNECTED, TFLOperationName.EMBEDDING_LOOKUP
    of_table = MIN_MAX if algorithm == ALGORITHMS["GPTQ"] else algorithm
    bits, blocks = {"int8": (8, QuantGranularity.CHANNELWISE), "int4": (4, QuantGranularity.BLOCKWISE_32)}[grid]
    linears, table = _pattern(found, "linear"), _pattern(found, "table")
    made.add_dynamic_config(linears, fully_connected, bits, blocks, algorithm_key=algorithm)
    for operation in (fully_connected, lookup):
        made.add_dynamic_config(table, operation, 8, QuantGranularity.CHANNELWISE, algorithm_key=of_table)
    rules: list[dict[str, Any]] = made.get_quantization_recipe()
    return rules


def _pattern(found: Sequence[Operator], kind: str) -> str:
    """ai-edge-quantizer's scopes end in a semicolon."""
    return f"^({'|'.join(re.escape(o.scope) for o in found if o.kind == kind)});?$"


def calibration_inputs(floats: Path, chunks: Sequence[Sequence[int]]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Inputs for each chunk, at the start of empty caches, which all share. A list: it is walked through twice."""
    from ai_edge_litert.interpreter import Interpreter

    details = Interpreter(str(floats)).get_signature_runner("decode").get_input_details()
    visible = np.arange(CONTEXT)[None] <= np.arange(PREFILL)[:, None]
    same = {n: np.zeros(d["shape"], np.float32) for n, d in details.items() if n.startswith("kv_cache_")}
    same["input_pos"] = np.arange(PREFILL, dtype=np.int32)
    same["mask"] = np.where(visible, 0, MASKED).astype(np.float32)[None, None]
    return [same | {"tokens": np.asarray([chunk], np.int32)} for chunk in chunks]


def make(source: SourceModel, texts: Sequence[Sequence[int]], names: Sequence[str], folder: Path) -> None:
    """{grid}-{algorithm}.tflite for the algorithms of these names; failures.json says what was refused, and why."""
    floats, calibrating = folder / "float.tflite", folder / "calibrating.tflite"
    write_float(source, floats)
    statistics = None
    if "GPTQ" in names:
        write_float(source, calibrating, calibrating=True)
        statistics = calibrate(calibrating, texts)
        calibrating.unlink()
    failures = {}
    for grid, name in itertools.product(get_args(Grid), names):
        known = statistics if name == "GPTQ" else None
        try:
            quantize(floats, folder / f"{grid}-{name}.tflite", grid, ALGORITHMS[name], known)
        except Exception as error:  # the quantizer's own, of any kind
            failures[f"{grid}-{name}"] = f"{type(error).__name__}: {error}"
    floats.unlink()
    (folder / "failures.json").write_text(json.dumps(failures, indent=2) + "\n")
