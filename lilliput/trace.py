"""Stage 2: trace the decoder with torch.export, as one prefill and one decode signature with an explicit KV cache.

The exported graph is read into lilliput.model's nodes. Each torch operator that the decoder uses has
one row in LOWERED; an operator without a row is refused by name, so nothing can be lost on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.fx import Node as FxNode

from lilliput.decoder import Decoder, Layer, layer_ropes, rope_tables
from lilliput.errors import ExportError
from lilliput.model import DecoderConfig, Node, Signature, TensorInfo, TracedModel


class Step(nn.Module):
    """The decoder as a runtime calls it: tokens and positions (T,), caches in, last logits and caches out."""

    def __init__(self, decoder: Decoder, context: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.tables = nn.Module()  # named as the nodes name them: rope.cos is tables.cos
        for name, table in rope_tables(decoder.config, context).items():
            self.tables.register_buffer(name.removeprefix("rope."), table)

    def forward(
        self, tokens: Tensor, positions: Tensor, caches: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        ropes = layer_ropes(self.decoder.config, {f"rope.{n}": table for n, table in self.tables.named_buffers()})
        h, updated = self.decoder.embed(tokens[None], positions), []
        for layer, cache, rope in zip(self.decoder.layers, caches, ropes, strict=True):
            assert isinstance(layer, Layer)
            h, k_cache, v_cache = layer.cached(h, cache, positions, rope)
            updated.append((k_cache, v_cache))
        return self.decoder.logits(h[:, -1:]), updated


def trace(decoder: Decoder, context: int, prefill: int) -> TracedModel:
    """Trace with caches of `context` positions and prompts of `prefill` tokens.

    Weights are not in the result: nodes name them. Raises ExportError naming an operator that is not mapped.
    """
    with torch.device("meta"):
        skeleton = Decoder(decoder.config)
    step = Step(skeleton.eval(), context)
    config = decoder.config
    return TracedModel(
        config, (_signature(step, config, context, "prefill", prefill), _signature(step, config, context, "decode", 1))
    )


def _signature(step: Step, config: DecoderConfig, context: int, name: str, steps: int) -> Signature:
    shape = (1, config.num_kv_heads, context, config.head_dim)
    caches = [(torch.zeros(shape, device="meta"), torch.zeros(shape, device="meta")) for _ in range(config.num_layers)]
    tokens = torch.zeros(steps, dtype=torch.int32, device="meta")
    with torch.no_grad():
        program = export(step.to("meta"), (tokens, torch.zeros_like(tokens), caches), strict=False)
    return _read(program, config, shape, name, steps)


@dataclass(frozen=True)
class Row:
    """How one torch operator becomes a node: its tensor arguments by position, its attributes by position."""

    op: str
    tensors: tuple[int, ...]
    attributes: tuple[tuple[str, int], ...] = ()


_ATTENTION = ("num_heads", "num_kv_heads", "head_dim", "scale", "window", "softcap")  # arguments 6 to 11
LOWERED = {
    "aten.embedding.default": Row("embedding", (0, 1)),
    "aten.linear.default": Row("linear", (0, 1, 2)),
    "aten.rms_norm.default": Row("rms_norm", (0, 2), (("eps", 3),)),
    "aten.layer_norm.default": Row("layer_norm", (0, 2, 3), (("eps", 4),)),
    "aten.add.Tensor": Row("add", (0, 1)),
    "aten.mul.Tensor": Row("mul", (0, 1)),
    "aten.silu.default": Row("silu", (0,)),
    "aten.gelu.default": Row("gelu_tanh", (0,)),
    "aten.slice.Tensor": Row("last", (0,)),
    "aten.tanh.default": Row("tanh", (0,)),
    "lilliput.head_norm.default": Row("head_norm", (0, 1), (("eps", 2), ("heads", 3))),
    "lilliput.attention.default": Row(
        "attention", (*range(6), 12, 13), tuple((name, 6 + i) for i, name in enumerate(_ATTENTION))
    ),
}
SCALED = Row("scale", (0,), (("factor", 1),))  # aten.mul.Tensor of a number
# Shape-only operators: the node's value is its first argument's (batch axis of the token ids).
TRANSPARENT = ("aten.unsqueeze.default",)


def _read(program: ExportedProgram, config: DecoderConfig, cache: tuple[int, ...], name: str, steps: int) -> Signature:
    """The nodes of an exported program, its values renamed to the signature's names."""
    names = _input_names(program, config)
    nodes: list[Node] = []
    for fx in program.graph.nodes:
        if fx.op == "call_function":
            _read_call(fx, names, nodes)
    outputs = next(fx for fx in program.graph.nodes if fx.op == "output").args[0]
    wanted = ["logits"] + [f"{kv}_cache_{i}.out" for i in range(config.num_layers) for kv in "kv"]
    nodes = _rename(nodes, dict(zip((names[o] for o in outputs), wanted, strict=True)))
    caches = [f"{kv}_cache_{i}" for i in range(config.num_layers) for kv in "kv"]
    inputs = [TensorInfo("tokens", "int32", (steps,)), TensorInfo("positions", "int32", (steps,))]
    inputs += [TensorInfo(c, "float32", cache) for c in caches]
    results = [TensorInfo("logits", "float32", (1, 1, config.vocab_size))] + [
        TensorInfo(f"{c}.out", "float32", cache) for c in caches
    ]
    return Signature("prefill" if name == "prefill" else "decode", tuple(inputs), tuple(results), tuple(nodes))


def _input_names(program: ExportedProgram, config: DecoderConfig) -> dict[FxNode, str]:
    """Graph placeholders by the names that the signature gives them: parameters, tables, user inputs."""
    signature = program.graph_signature
    known = {k: v.removeprefix("decoder.").removesuffix(".weight") for k, v in signature.inputs_to_parameters.items()}
    known |= {k: v.replace("tables.", "rope.", 1) for k, v in signature.inputs_to_buffers.items()}
    caches = (f"{kv}_cache_{i}" for i in range(config.num_layers) for kv in "kv")
    users = iter(["tokens", "positions", *caches])
    return {
        fx: known[fx.name] if fx.name in known else next(users) for fx in program.graph.nodes if fx.op == "placeholder"
    }


def _read_call(fx: FxNode, names: dict[FxNode, str], nodes: list[Node]) -> None:
    target = str(fx.target)
    if target in TRANSPARENT:
        names[fx] = names[fx.args[0]]  # type: ignore[index]
        return
    if "getitem" in target:
        names[fx] = f"{names[fx.args[0]]}.{fx.args[1]}"  # type: ignore[index]
        return
    row = SCALED if target == "aten.mul.Tensor" and isinstance(fx.args[1], float) else LOWERED.get(target)
    if row is None:
        raise ExportError(f"operator {target} of the traced decoder is not mapped: known are {', '.join(LOWERED)}")
    names[fx] = f"value.{fx.name}"  # never a parameter's name: torch calls the embedding's result `embedding`
    inputs = tuple(names[fx.args[i]] for i in row.tensors if i < len(fx.args) and fx.args[i] is not None)  # type: ignore[index]
    outputs = tuple(f"{names[fx]}.{i}" for i in range(3)) if row.op == "attention" else (names[fx],)
    nodes.append(Node(row.op, inputs, outputs, {key: fx.args[i] for key, i in row.attributes}))  # type: ignore[misc]


def _rename(nodes: list[Node], names: dict[str, str]) -> list[Node]:
    def new(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(v, v) for v in values)

    return [Node(n.op, new(n.inputs), new(n.outputs), n.attributes) for n in nodes]
