"""The traced graph: its nodes, interpreted in plain torch by the words of lilliput.model.Node, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput import decoder, trace
from lilliput.errors import ExportError
from lilliput.model import Node, Signature, SourceModel, TracedModel
from lilliput.proof import TOLERANCE, relative_error

CONTEXT, PREFILL, STEPS = 20, 10, 5
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied GQA": ("llama", {}),
    "llama untied MQA biases": (
        "llama", {"tie_word_embeddings": False, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "gpt2": ("gpt2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "smollm3": ("smollm3", {}),
}  # fmt: skip
Values = dict[str, Tensor]


def attention(node: Node, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Written apart from lilliput.decoder: one query and one head at a time."""
    q, k, v, k_cache, v_cache, positions, *tables = inputs
    heads, kv_heads, dim = (int(node.attributes[name]) for name in ("num_heads", "num_kv_heads", "head_dim"))
    window, scale, softcap = int(node.attributes["window"]), node.attributes["scale"], node.attributes["softcap"]
    k_cache, v_cache, y = k_cache.clone(), v_cache.clone(), torch.zeros_like(q)

    def rotated(x: Tensor, position: int) -> Tensor:
        if not tables:
            return x
        cos, sin = (table[position] for table in tables)
        low, high = x[: dim // 2], x[dim // 2 :]
        return torch.cat([low * cos - high * sin, low * sin + high * cos])

    for t, position in enumerate(positions.tolist()):
        for h in range(kv_heads):
            at = slice(h * dim, (h + 1) * dim)
            k_cache[0, h, position] = rotated(k[0, t, at], position)
            v_cache[0, h, position] = v[0, t, at]
    for t, position in enumerate(positions.tolist()):
        for h in range(heads):
            at, group = slice(h * dim, (h + 1) * dim), h // (heads // kv_heads)
            first = max(0, position - window + 1) if window else 0
            scores = k_cache[0, group, first : position + 1] @ rotated(q[0, t, at], position) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            y[0, t, at] = scores.softmax(0) @ v_cache[0, group, first : position + 1]
    return y, k_cache, v_cache


def rms_norm(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + node.attributes["eps"]).sqrt() * weight


def layer_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + node.attributes["eps"]).sqrt() * weight + bias


def head_norm(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    heads = x.chunk(int(node.attributes["heads"]), dim=-1)
    return torch.cat([rms_norm(node, head, weight) for head in heads], dim=-1)


OPERATORS: dict[str, Callable[..., Any]] = {
    "embedding": lambda node, table, indices: table[indices.long()][None],
    "linear": lambda node, x, weight, bias=None: x @ weight.T + (0 if bias is None else bias),
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "add": lambda node, a, b: a + b,
    "mul": lambda node, a, b: a * b,
    "silu": lambda node, x: x / (1 + (-x).exp()),
    "gelu_tanh": lambda node, x: F.gelu(x, approximate="tanh"),
    "tanh": lambda node, x: 2 / (1 + (-2 * x).exp()) - 1,
    "scale": lambda node, x: node.attributes["factor"] * x,
    "head_norm": head_norm,
    "attention": attention,
    "last": lambda node, x: x[:, -1:],
}


def interpret(signature: Signature, constants: Values, inputs: Values) -> Values:
    """Run the nodes in their order; every input must have been made before."""
    values = {**constants, **inputs}
    for node in signature.nodes:
        results = OPERATORS[node.op](node, *(values[name] for name in node.inputs))
        values |= zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=True)
    return {info.name: values[info.name] for info in signature.outputs}


def constants_of(source: SourceModel) -> Values:
    """Parameters by their names, and the rotary tables."""
    values = {name: torch.from_numpy(source.weights[name]) for name in source.config.parameter_shapes()}
    return values | decoder.rope_tables(source.config, CONTEXT)


@pytest.fixture(params=list(MODELS), scope="module")
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceModel, TracedModel]:
    kind, options = MODELS[request.param]
    source = tiny_models.tiny_source(tmp_path_factory.mktemp("hf"), kind, **options)
    return source, trace.trace(decoder.build(source), CONTEXT, PREFILL)


@torch.no_grad()
def test_nodes_compute_what_transformers_computes(traced: tuple[SourceModel, TracedModel]) -> None:
    """A prefill, then single steps through the caches that it gives back."""
    source, model = traced
    theirs = tiny_models.theirs(source)
    ids = torch.randint(0, source.config.vocab_size, (1, PREFILL + STEPS), generator=torch.Generator().manual_seed(3))
    wanted, constants = theirs(ids).logits[0], constants_of(source)
    prefill, decode = model.signature("prefill"), model.signature("decode")
    caches = {info.name: torch.zeros(info.shape) for info in prefill.inputs if "cache" in info.name}
    out = interpret(prefill, constants, {"tokens": ids[0, :PREFILL], "positions": torch.arange(PREFILL), **caches})
    assert relative_error(out["logits"][0, 0], wanted[PREFILL - 1]) <= TOLERANCE
    for position in range(PREFILL, PREFILL + STEPS):
        caches = {name.removesuffix(".out"): value for name, value in out.items() if name.endswith(".out")}
        at = torch.tensor([position])
        out = interpret(decode, constants, {"tokens": ids[0, position : position + 1], "positions": at, **caches})
        assert relative_error(out["logits"][0, 0], wanted[position]) <= TOLERANCE


def test_signatures_have_the_promised_names_and_shapes(traced: tuple[SourceModel, TracedModel]) -> None:
    source, model = traced
    config = source.config
    cache = (1, config.num_kv_heads, CONTEXT, config.head_dim)
    names = [f"{kv}_cache_{i}" for i in range(config.num_layers) for kv in "kv"]
    for name, steps in (("prefill", PREFILL), ("decode", 1)):
        signature = model.signature(name)
        ids = [(info.name, info.dtype, info.shape) for info in signature.inputs[:2]]
        assert ids == [("tokens", "int32", (steps,)), ("positions", "int32", (steps,))]
        assert [(info.name, info.shape) for info in signature.inputs[2:]] == [(n, cache) for n in names]
        assert signature.outputs[0].shape == (1, 1, config.vocab_size)
        assert [info.name for info in signature.outputs[1:]] == [f"{n}.out" for n in names]


def test_every_value_is_made_once_before_its_use_and_every_parameter_is_used(
    traced: tuple[SourceModel, TracedModel],
) -> None:
    source, model = traced
    parameters = set(source.config.parameter_shapes())
    for signature in model.signatures:
        made = parameters | {info.name for info in signature.inputs} | set(decoder.rope_tables(source.config, CONTEXT))
        used: set[str] = set()
        for node in signature.nodes:
            assert node.op in OPERATORS
            assert set(node.inputs) <= made
            assert not set(node.outputs) & made
            made |= set(node.outputs)
            used |= set(node.inputs)
        assert parameters <= used
        assert {info.name for info in signature.outputs} <= made


def test_an_operator_without_a_row_is_refused_by_name(
    traced: tuple[SourceModel, TracedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = traced
    monkeypatch.setattr(trace, "LOWERED", {k: v for k, v in trace.LOWERED.items() if k != "aten.mul.Tensor"})
    monkeypatch.delitem(trace.LOWERED, "aten.add.Tensor")
    with pytest.raises(ExportError, match=r"operator aten\.(add|mul)\.Tensor of the traced decoder is not mapped"):
        trace.trace(decoder.build(source), CONTEXT, PREFILL)
