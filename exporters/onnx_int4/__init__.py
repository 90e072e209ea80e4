"""ONNX with n-bit weights: one folder that ONNX Runtime and onnxruntime-genai open as it is.

    model.onnx [+ model.onnx.data above 2 GB]   the graph (graph.py) and the packed matrices (packing.py)
    genai_config.json, tokenizer files          what onnxruntime-genai needs besides (genai.py)
    config.json                                 by which optimum and Transformers.js know the model (client_config.py)

`layout: transformers.js` puts the graph at onnx/model_q4.onnx, where Transformers.js looks for `dtype: "q4"`.

The metadata of model.onnx says which decoder parameters the stacked matrices hold and on which grids,
so that `read` gives back each parameter by its own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from exporters.base import ExporterOptions
from exporters.onnx_int4 import packing
from lilliput.artifact import Artifact
from lilliput.errors import ExportError
from lilliput.grid import Float, GridSpec, QuantizedTensor, concatenate_rows
from lilliput.model import QuantizedModel, Role, TracedModel, role_of

Layout = Literal["genai", "transformers.js"]
MAIN_FILES: dict[Layout, str] = {"genai": "model.onnx", "transformers.js": "onnx/model_q4.onnx"}
FLOAT16_SCALES = ("bf16_f16", "float16")


class Options(ExporterOptions):
    """accuracy_level: how MatMulNBits takes activations. 4: as 8 bits a block, the fast kernels; 0: as float32.
    layout: which client's folder it is; optimum's ORTModelForCausalLM opens both."""

    accuracy_level: Literal[0, 4] = 4
    layout: Layout = "genai"


class Exporter:
    """Writes and reads the folder. Stateless."""

    Options: ClassVar[type[ExporterOptions]] = Options
    packages: ClassVar[tuple[str, ...]] = ("onnx",)
    extra: ClassVar[str] = "onnx"
    budget_grids: ClassVar[tuple[str, ...]] = (
        "int2-b32", "int4-b64", "int4-b64-zp-f16", "int4-b32", "int4-b32-zp-f16", "int4-b16-zp-f16", "int8-b64",
    )  # fmt: skip

    def refuses(self, spec: GridSpec, role: Role, shape: tuple[int, int]) -> str | None:
        if spec.outliers and role == "embedding":
            return (
                "GatherBlockQuantized reads no columns at 16 bit beside the codes of a table: choose a grid without -o"
            )
        return packing.refusal(spec)

    def export(
        self, model: QuantizedModel, traced: TracedModel, options: ExporterOptions, folder: Path, *, exact: bool = False
    ) -> Artifact:
        from exporters.onnx_int4 import client_config, container, fusion, genai, graph

        assert isinstance(options, Options)
        self._check(model)
        signature = traced.signature("decode")
        context = next(i.shape[2] for i in signature.inputs if i.name == "k_cache_0")
        fused = fusion.fuse(signature.nodes, partial(_one_grid, model.quantized))
        packed, floats = _packed(model, fused.stacks), _floats(model, fused.stacks, context)
        float16 = frozenset(name for name, tensor in packed.items() if tensor.spec.scale_dtype in FLOAT16_SCALES)
        parameters = graph.Parameters({n: packing.pack(t) for n, t in packed.items()}, floats, float16)
        level = 0 if exact else options.accuracy_level
        proto = graph.build(model.config, fused, parameters, level, exact=exact)
        grids = {name: tensor.spec for name, tensor in model.quantized.items()}
        metadata = container.Metadata(model.config, grids, fused.stacks, context, model.provenance)
        main_file = MAIN_FILES[options.layout]
        (folder / main_file).parent.mkdir(exist_ok=True)
        container.write(proto, metadata, folder / main_file)
        notes = genai.write(model, context, main_file, folder)
        client_config.write(model, context, folder)
        return Artifact(folder, "onnx_int4", main_file, context, prefill=0, notes=notes)

    def read(self, artifact: Artifact) -> Mapping[str, QuantizedTensor | Float]:
        from exporters.onnx_int4 import container

        return container.read(artifact.path)

    def _check(self, model: QuantizedModel) -> None:
        for name, tensor in model.quantized.items():
            tensor.check(name)
            reason = self.refuses(tensor.spec, role_of(name), tensor.shape)
            if reason is not None:
                raise ExportError(f"{name} on {tensor.spec.name}: {reason}")


def _one_grid(quantized: Mapping[str, QuantizedTensor], names: tuple[str, ...]) -> bool:
    """Whether these matrices can be one: all packed, on one grid."""
    parts = [quantized[name] for name in names if name in quantized]
    kept = {None if part.outliers is None else tuple(part.outliers.columns) for part in parts}
    return len(parts) == len(names) and len({part.spec for part in parts}) == len(kept) == 1


def _packed(model: QuantizedModel, stacks: Mapping[str, tuple[str, ...]]) -> dict[str, QuantizedTensor]:
    """The matrices that the nodes name: stacks whole, the rest as they are."""
    parts = {name for names in stacks.values() for name in names}
    whole = {n: concatenate_rows([model.quantized[p] for p in names]) for n, names in stacks.items() if "bias" not in n}
    return {name: tensor for name, tensor in model.quantized.items() if name not in parts} | whole


def _floats(model: QuantizedModel, stacks: Mapping[str, tuple[str, ...]], context: int) -> dict[str, Float]:
    """Vectors and float matrices, stacked biases, and the rotary tables of `context` positions."""
    from lilliput.decoder import rope_tables

    parts = {name for names in stacks.values() for name in names}
    whole = {n: np.concatenate([model.floats[p] for p in names]) for n, names in stacks.items() if "bias" in n}
    floats = {name: array for name, array in model.floats.items() if name not in parts} | whole
    return floats | {name: table.numpy() for name, table in rope_tables(model.config, context).items()}
