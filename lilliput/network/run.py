"""A network in torch, node by node: the float reference, and its twin whose numbers lie on the solved grids.

`see` gets every float value as it is made, which is how calibration observes them. The twin rounds each value as a
runtime's QuantizeLinear does, computes nodes in float32, and takes weights and biases as the codes say: what a QDQ file
means, before any runtime's own integer kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.activation_grid import ActivationGrid
from lilliput.network import BIASED_OPS, Network, Operation, QuantizedNetwork

See = Callable[[str, Tensor], None]
Compute = Callable[..., Tensor]


def run(network: Network, inputs: Mapping[str, Tensor], see: See | None = None) -> dict[str, Tensor]:
    """The outputs by name, float32."""
    parameters = {name: torch.from_numpy(array) for name, array in network.parameters.items()}
    return evaluate(network, parameters, inputs, see)


@torch.inference_mode()
def evaluate(
    network: Network, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor], see: See | None = None
) -> dict[str, Tensor]:
    """As `run`, with other parameters of the same shapes."""
    values: dict[str, Tensor] = dict(parameters)
    last = {name: node.name for node in network.nodes for name in node.inputs}
    for info in network.inputs:
        values[info.name] = inputs[info.name]
        if see is not None and info.dtype == "float32":
            see(info.name, inputs[info.name])
    for node in network.nodes:
        values[node.name] = apply(network, node, [values[name] for name in node.inputs])
        if see is not None and network.is_float(node.name):
            see(node.name, values[node.name])
        for name in set(node.inputs):
            if last[name] == node.name and name not in network.outputs:
                del values[name]
    return {name: values[name] for name in network.outputs}


@torch.inference_mode()
def run_quantized(model: QuantizedNetwork, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by name, float32, of the solved network."""
    network = model.network
    values = {name: torch.from_numpy(array) for name, array in network.parameters.items()}
    values |= {name: on_grid(values[name], grid) for name, grid in model.activations.items() if name in values}
    for name, tensor in model.weights.items():
        values[name] = torch.from_numpy(tensor.dequantize()).reshape(network.parameters[name].shape)
    for info in network.inputs:
        grid = model.activations.get(info.name)
        values[info.name] = inputs[info.name] if grid is None else on_grid(inputs[info.name], grid)
    for node in network.nodes:
        operands = [values[name] for name in node.inputs]
        if node.name in model.biases:
            scale = torch.from_numpy(model.bias_scale(node))
            operands[2] = torch.from_numpy(model.biases[node.name]).to(torch.float32) * scale
        found = apply(network, node, operands)
        grid = model.activations.get(node.name)
        values[node.name] = found if grid is None else on_grid(found, grid)
    return {name: values[name] for name in network.outputs}


def on_grid(x: Tensor, grid: ActivationGrid) -> Tensor:
    """DequantizeLinear(QuantizeLinear(x)) in float32, per tensor."""
    scale, zero_point = float(grid.scale[0]), int(grid.zero_point[0])
    codes = (x / scale).round().add(zero_point).clamp(grid.qmin, grid.qmax)
    return (codes - zero_point) * scale


def apply(network: Network, node: Operation, x: list[Tensor]) -> Tensor:
    """What one node makes of its inputs."""
    if node.op in BIASED_OPS:
        return _biased(node, x)
    if node.op in PLAIN:
        return PLAIN[node.op](*x)
    return _shaped(network, node, x)


def _biased(node: Operation, x: list[Tensor]) -> Tensor:
    bias = x[2] if len(x) > 2 else None
    if node.op == "linear":
        return F.linear(x[0], x[1], bias)
    if node.op == "layer_norm":
        eps = node.attributes["eps"]
        assert isinstance(eps, float)
        return F.layer_norm(x[0], x[1].shape, x[1], bias, eps)
    groups = node.attributes["groups"]
    assert isinstance(groups, int)
    stride, padding, dilation = (node.pair(key) for key in ("stride", "padding", "dilation"))
    return F.conv2d(x[0], x[1], bias, stride, padding, dilation, groups)


PLAIN: Mapping[str, Compute] = {
    "embedding": lambda table, indices: table[indices.long()],
    "matmul": torch.matmul,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "cast": lambda x: x.to(torch.float32),
}


def _shaped(network: Network, node: Operation, x: list[Tensor]) -> Tensor:
    a = dict(node.attributes)
    if node.op == "reshape":
        return x[0].reshape(network.values[node.name].shape)
    if node.op == "transpose":
        return x[0].permute(a["perm"])  # type: ignore[arg-type]
    if node.op == "slice":
        index = torch.arange(int(a["start"]), int(a["end"]), int(a["step"]))  # type: ignore[arg-type]
        return x[0].index_select(int(a["axis"]), index)  # type: ignore[arg-type]
    if node.op == "concat":
        return torch.cat(x, int(a["axis"]))  # type: ignore[arg-type]
    if node.op == "softmax":
        return x[0].softmax(int(a["axis"]))  # type: ignore[arg-type]
    if node.op == "clip":
        return x[0].clamp(a["low"], a["high"])  # type: ignore[arg-type]
    if node.op == "mean":
        return x[0].mean(a["axes"], keepdim=bool(a["keepdims"]))  # type: ignore[arg-type]
    pool = F.max_pool2d if node.op == "max_pool2d" else F.avg_pool2d
    pooled: Tensor = pool(x[0], node.pair("kernel"), node.pair("stride"), node.pair("padding"))
    return pooled
