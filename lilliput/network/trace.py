"""Trace a torch module, or an exported program, into a Network.

torch.export gives operators over fixed shapes; `run_decompositions({})` makes them free of side effects and leaves
them whole. Then, so that a static integer runtime gets what it can hold:

    constants      what depends on no input (positions, token types) is computed once and becomes a parameter
    batch norms    go into the convolution or linear before them where that has no other reader, else become a product
                   and a sum per channel
    masks          numbers at or below MASKED_BELOW that are added to scores (finfo.min, −inf, −10⁴) become
                   `mask_value`: in softmax exp(−30) is nothing as exp(−10³⁸) is, but the scores' range stays sane
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx import Node as FxNode

from lilliput.errors import SourceError
from lilliput.grid import Float
from lilliput.model import TensorInfo
from lilliput.network import Attribute, Network, Operation
from lilliput.network.readers import READERS, shape_of

MASKED_BELOW = -1e4
MASK_VALUE = -30.0
BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
DTYPES = {torch.float32: "float32", torch.int32: "int32", torch.int64: "int32"}


def trace(
    module: nn.Module, inputs: Mapping[str, Tensor], *, name: str, mask: str | None = None,
    mask_value: float = MASK_VALUE, outputs: Sequence[str] = (),
) -> Network:  # fmt: skip
    """Trace `module` (in eval mode) on example inputs by name, in the order of its arguments; `outputs` name results.

    Raises SourceError naming the node whose operator no exporter would know.
    """
    with torch.no_grad():
        program = export(module.eval(), tuple(inputs.values()), strict=False)
    return read(program, name=name, inputs=tuple(inputs), mask=mask, mask_value=mask_value, outputs=outputs)


def read(
    program: ExportedProgram, *, name: str, inputs: Sequence[str] = (), mask: str | None = None,
    mask_value: float = MASK_VALUE, outputs: Sequence[str] = (),
) -> Network:  # fmt: skip
    """The network of an exported program. `inputs` and `outputs` rename its own."""
    with warnings.catch_warnings():  # torch copies its own tree specifications in a way that it deprecates
        warnings.simplefilter("ignore", FutureWarning)
        program = program.run_decompositions({})
    reading = _Reading(program, mask_value)
    reading.placeholders(inputs)
    for fx in program.graph.nodes:
        if fx.op == "call_function":
            reading.call(fx)
    results = next(fx for fx in program.graph.nodes if fx.op == "output").args[0]
    network = reading.network(name, [fx for fx in results if isinstance(fx, FxNode)], mask)
    return _with_outputs(network, outputs) if outputs else network


def _with_outputs(network: Network, names: Sequence[str]) -> Network:
    """The network with its outputs, which are distinct values of its nodes, under these names."""
    assert len(names) == len(set(network.outputs))
    assert not set(names) & {*network.values, *network.parameters}
    new = dict(zip(network.outputs, names, strict=True))
    nodes = tuple(
        replace(node, name=new.get(node.name, node.name), inputs=tuple(new.get(i, i) for i in node.inputs))
        for node in network.nodes
    )
    values = {new.get(key, key): replace(info, name=new.get(key, key)) for key, info in network.values.items()}
    return replace(network, outputs=tuple(names), nodes=nodes, values=values)


@dataclass
class _Reading:
    """The network while it grows (a readers.Graph)."""

    program: ExportedProgram
    mask_value: float
    names: dict[FxNode, str] = field(default_factory=dict)  # of values and parameters
    constants: dict[FxNode, Tensor] = field(default_factory=dict)  # what depends on no input
    constant_names: dict[FxNode, str] = field(default_factory=dict)
    parameters: dict[str, Float] = field(default_factory=dict)
    inputs: list[TensorInfo] = field(default_factory=list)
    values: dict[str, TensorInfo] = field(default_factory=dict)
    nodes: list[Operation] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)

    def placeholders(self, renamed: Sequence[str]) -> None:
        """Parameters and buffers as constants, user inputs as inputs."""
        held = {**self.program.state_dict, **self.program.constants}
        names = iter(renamed)
        kinds = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for fx in self.program.graph.nodes:
            if fx.op != "placeholder":
                continue
            spec = kinds[fx.name]
            if spec.kind == InputKind.USER_INPUT:
                self._input(fx, next(names, fx.name))
            else:
                assert spec.target is not None
                self.constants[fx] = held[spec.target].detach()
                self.constant_names[fx] = spec.target

    def _input(self, fx: FxNode, name: str) -> None:
        value = fx.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            raise SourceError(
                f"input {name!r} is {getattr(value, 'dtype', type(value).__name__)}: wanted int or float32"
            )
        if not all(isinstance(size, int) for size in value.shape):
            raise SourceError(
                f"input {name!r} is {tuple(value.shape)}: wanted fixed shapes, export without dynamic ones"
            )
        info = TensorInfo(name, DTYPES[value.dtype], shape_of(fx))  # type: ignore[arg-type]
        self.names[fx], self.values[name] = name, info
        self.inputs.append(info)

    def call(self, fx: FxNode) -> None:
        """One operator: computed where it depends on no input, read by its row otherwise."""
        target = str(fx.target)
        if "_assert" in target or not fx.users:
            return
        if not any(arg in self.names for arg in fx.all_input_nodes):
            self._compute(fx)
        elif target == BATCH_NORM:
            self._batch_norm(fx)
        elif "getitem" in target:
            self.same(fx, fx.args[0])
        else:
            reader = READERS.get(target.removeprefix("aten."))
            if reader is None:
                known = ", ".join(sorted({row.partition(".")[0] for row in READERS}))
                raise SourceError(f"node {self.where(fx)!r}: operator {target} is not supported; known: {known}")
            reader(self, fx)

    def _compute(self, fx: FxNode) -> None:
        arguments, keywords = torch.fx.map_arg((fx.args, fx.kwargs), lambda node: self.constants[node])
        self.constants[fx] = fx.target(*arguments, **keywords)  # type: ignore[operator]
        self.constant_names[fx] = self.where(fx)

    def where(self, fx: FxNode) -> str:
        """`encoder.layer.0.attention.self/matmul`: the innermost module's path, and the operator."""
        stack = list(fx.meta.get("nn_module_stack", {}).values())
        path = stack[-1][0] if stack else ""
        operator = str(fx.target).removeprefix("aten.").partition(".")[0].rstrip("_")
        return f"{path}/{operator}" if path else operator

    def add(
        self, fx: FxNode, op: str, inputs: Sequence[object], attributes: Mapping[str, Attribute] | None = None,
        *, part: str = "", shape: tuple[int, ...] | None = None,
    ) -> str:  # fmt: skip
        path, _, _ = self.where(fx).rpartition("/")
        base = "/".join(word for word in (path, part or op) if word)
        name = base
        for count in range(1, len(self.nodes) + 2):
            if name not in self.values and name not in self.parameters:
                break
            name = f"{base}_{count}"
        names = tuple(self._operand(value, name) for value in inputs)
        if op == "reshape":
            names = tuple(self._before_reshape(value) for value in names)
        self.nodes.append(Operation(name, op, names, dict(attributes or {})))
        dtype = "float32" if op not in ("reshape", "transpose", "slice", "concat") else self._dtype(names[0])
        self.values[name] = TensorInfo(name, dtype, shape if shape is not None else shape_of(fx))  # type: ignore[arg-type]
        return name

    def _before_reshape(self, name: str) -> str:
        """Two reshapes are one."""
        before = next((node for node in self.nodes if node.name == name), None)
        return before.inputs[0] if before is not None and before.op == "reshape" else name

    def _dtype(self, name: str) -> str:
        return self.values[name].dtype if name in self.values else "float32"

    def _operand(self, value: object, reader: str) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, FxNode):
            return self.names[value] if value in self.names else self._parameter(value)
        assert isinstance(value, int | float)
        name = f"{reader}.constant"
        self.parameters[name] = self._sane(name, np.array(value, np.float32))
        return name

    def _parameter(self, fx: FxNode) -> str:
        """The name of a constant that a node reads; it becomes a parameter."""
        name, array = self.constant_names[fx], self.constants[fx].detach().cpu()
        if not array.is_floating_point():
            raise SourceError(f"constant {name!r} is {array.dtype}: wanted a floating point one")
        name = name if name not in self.values else f"{name}.constant"
        if name not in self.parameters:
            self.parameters[name] = self._sane(name, array.to(torch.float32).contiguous().numpy().copy())
        return name

    def _sane(self, name: str, array: Float) -> Float:
        """Numbers that mask, as the mask's own value."""
        masked = array <= MASKED_BELOW
        if not masked.any():
            return array
        self.notes[f"{name}: {array.min():.3g} masks, and is {self.mask_value:g} here"] = None
        return np.where(masked, np.float32(self.mask_value), array).astype(np.float32)

    def same(self, fx: FxNode, name: object) -> None:
        assert isinstance(name, FxNode)
        self.names[fx] = self.names[name]

    def made(self, fx: FxNode, name: str) -> None:
        self.names[fx] = name

    def _batch_norm(self, fx: FxNode) -> None:
        x = fx.args[0]
        assert isinstance(x, FxNode)
        gamma, beta, mean, variance = (self._vector(value) for value in fx.args[1:5])
        assert mean is not None
        assert variance is not None
        factor = (1.0 if gamma is None else gamma) / np.sqrt(variance + float(fx.args[6]))  # type: ignore[arg-type]
        offset = (0.0 if beta is None else beta) - mean * factor
        before = next((node for node in self.nodes if node.name == self.names[x]), None)
        if before is not None and before.op in ("conv2d", "linear") and len(x.users) == 1 and self._own(before):
            self._fold(before, factor, offset)
            self.names[fx] = before.name
            return
        wide = (1, -1, *[1] * (len(shape_of(x)) - 2))
        base = self.where(fx)
        for part, array in (("factor", factor), ("offset", offset)):
            self.parameters[f"{base}.{part}"] = array.reshape(wide).astype(np.float32)
        scaled = self.add(fx, "mul", (x, f"{base}.factor"), part="scaled", shape=shape_of(x))
        self.made(fx, self.add(fx, "add", (scaled, f"{base}.offset"), part="batch_norm", shape=shape_of(x)))

    def _vector(self, value: object) -> np.ndarray[Any, Any] | None:
        """A batch norm's vector, float64."""
        if value is None:
            return None
        assert isinstance(value, FxNode)
        array: np.ndarray[Any, Any] = self.constants[value].double().numpy()
        return array

    def _own(self, node: Operation) -> bool:
        """Whether a node's weight is read by it alone."""
        return sum(node.inputs[1] in other.inputs for other in self.nodes) == 1

    def _fold(self, node: Operation, factor: np.ndarray[Any, Any], offset: np.ndarray[Any, Any]) -> None:
        """w ← w · factor, b ← b · factor + offset, per output channel."""
        weight = self.parameters[node.inputs[1]]
        bias = self.parameters[node.inputs[2]] if len(node.inputs) > 2 else np.zeros(len(weight), np.float32)
        scaled = weight.astype(np.float64) * factor.reshape(-1, *[1] * (weight.ndim - 1))
        name = node.inputs[1].removesuffix("weight") + "bias"
        self.parameters[node.inputs[1]] = scaled.astype(np.float32)
        self.parameters[name] = (bias.astype(np.float64) * factor + offset).astype(np.float32)
        index = self.nodes.index(node)
        self.nodes[index] = Operation(node.name, node.op, (*node.inputs[:2], name), node.attributes)

    def network(self, name: str, results: Sequence[FxNode], mask: str | None) -> Network:
        """What was read, without what no output needs."""
        for fx in results:
            if fx not in self.names:
                raise SourceError(f"output {fx.name!r} of {name} depends on no input")
        outputs = tuple(self.names[fx] for fx in results)
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.inputs)
                kept.append(node)
        parameters = {key: array for key, array in self.parameters.items() if key in needed}
        for key, array in parameters.items():
            if not all(map(math.isfinite, (array.min(), array.max()))):
                raise SourceError(f"parameter {key!r} has NaN or infinite values")
        values = {key: info for key, info in self.values.items() if key in needed}
        values |= {info.name: info for info in self.inputs}
        return Network(
            name, tuple(self.inputs), outputs, tuple(reversed(kept)), values, parameters, mask, tuple(self.notes)
        )
