"""Sound artifacts of several families, exporters, grids and solvers: the truth-check finds nothing in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny_gguf
import tiny_models
import torch
from gguf import GGMLQuantizationType as Type

from calibration.samples import Provenance, Samples
from calibration.solve import solve
from calibration.statistics import gather
from lilliput import registry
from lilliput.decoder import Decoder
from lilliput.model import QuantizedModel, SourceModel
from lilliput.recipe_schema import Rule
from lilliput.trace import trace

CONTEXT, PREFILL = 48, 8
FILES = {"onnx_int4": "model.onnx", "gguf_llamacpp": "model.gguf", "litert_int8": "model.tflite"}


@dataclass(frozen=True)
class Clean:
    """One artifact. `solver` may be a chain; grids are of linears and of tables."""

    exporter: str
    kind: str = "llama"
    overrides: tuple[tuple[str, Any], ...] = ()
    linear: str = "int4-b32"
    table: str = "int8-channel"
    solver: str | tuple[str, ...] = "rtn"

    @property
    def id(self) -> str:
        changed = [f"{name}={value}" for name, value in self.overrides]
        chain = self.solver if isinstance(self.solver, str) else "+".join(self.solver)
        return " ".join([self.exporter, self.kind, *changed, self.linear, self.table, chain])


UNTIED, ONE_KV_HEAD = (("tie_word_embeddings", False),), (("num_key_value_heads", 1),)
BIASES = (("attention_bias", True), ("mlp_bias", True))
CLEAN = (
    Clean("onnx_int4"),
    Clean("onnx_int4", "gpt2", solver="gptq"),
    Clean("onnx_int4", overrides=UNTIED, linear="int4-b32-zp-f16", table="int4-b32"),
    Clean("onnx_int4", overrides=ONE_KV_HEAD, linear="int8-channel"),
    Clean("onnx_int4", overrides=BIASES, linear="int4-b64", solver=("awq", "gptq")),
    Clean("onnx_int4", linear="int2-b32", solver="gptq"),
    Clean("gguf_llamacpp"),
    Clean("gguf_llamacpp", "gpt2", linear="int8-b32"),
    Clean("gguf_llamacpp", overrides=UNTIED, linear="int5-b32-min-f16", table="int4-b32-min-f16"),
    Clean("gguf_llamacpp", overrides=ONE_KV_HEAD, solver=("smoothquant", "awq", "gptq")),
    Clean("litert_int8"),
    Clean("litert_int8", "gpt2", solver="gptq"),
    Clean("litert_int8", linear="int8-channel", solver=("smoothquant", "gptq")),
    Clean("litert_int8", overrides=BIASES, linear="int4-b64", solver=("awq", "rtn")),
    Clean("litert_int8", overrides=UNTIED, linear="int4-channel", table="int4-b32"),
    Clean("litert_int8", linear="int2-channel", solver="gptq"),
)


def solved(clean: Clean, source: SourceModel, folder: Path) -> QuantizedModel:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny_models.VOCAB_SIZE, (4, 48)).astype(np.int32)
    samples = Samples(tokens, Provenance("text", "random tokens", "5" * 64, *tokens.shape))
    rules = [
        Rule.model_validate({"match": "layers.*", "grid": clean.linear, "solver": clean.solver}),
        Rule.model_validate({"match": "*", "grid": clean.table, "solver": "rtn"}),
    ]
    statistics = None if clean.solver == "rtn" else gather(source, samples, folder)
    return solve(source, rules, statistics)


def make(clean: Clean, folder: Path) -> tuple[Path, SourceModel]:
    """The artifact's folder, and its source."""
    source = tiny_models.tiny_source(folder, clean.kind, **dict(clean.overrides))
    (folder / "statistics").mkdir()
    model = solved(clean, source, folder / "statistics")
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, PREFILL)
    exporter, out = registry.load("exporters", clean.exporter)(), folder / "artifact"
    out.mkdir()
    exporter.export(model, traced, exporter.Options(), out)
    return out / FILES[clean.exporter], source


def foreign(kind: Type, folder: Path) -> tuple[Path, SourceModel]:
    """A GGUF file that gguf-py wrote and quantized."""
    model = tiny_models.tiny_llama(folder / "tiny-llama")
    template = (model / "chat_template.jinja").read_text()
    path = tiny_gguf.write_llama(folder / "foreign.gguf", model, kind, [partial(_template, text=template)])
    return path, tiny_models.source_of(model)


def _template(writer: tiny_gguf.Writer, text: str) -> None:
    writer.add_chat_template(text)


FOREIGN: dict[str, Callable[[Path], tuple[Path, SourceModel]]] = {
    f"gguf-py {kind.name}": partial(foreign, kind) for kind in (Type.F16, Type.Q8_0, Type.Q4_0, Type.Q4_1)
}
