"""LiteRT: one `.tflite` with a prefill and a decode signature, and a `.litertlm` bundle that LiteRT-LM runs.

The flatbuffer is written operator by operator from the trace (lowering.py), with the solved codes and
scales as they are (packing.py); nothing converts or quantizes on the way. Signatures, with the names
and shapes that LiteRT-LM expects (C context, T = n tokens of `prefill_<n>`, of which
there is the traced one and a short one, and 1 in `decode`):

    in    tokens (1, T) int32, input_pos (T,) int32, mask (1, 1, T, C) float32 added to the scores,
          kv_cache_k_{i} and kv_cache_v_{i} (1, K, C, D) float32, for K KV heads of D
    out   logits (1, 1, vocab) float32 (decode only), and the caches under their names

Files: model.tflite, which is the artifact's main file, and bundle.litertlm, which holds the same bytes
again beside tokenizer and metadata, for LiteRT-LM. The size of the artifact is model.tflite's alone.

`exact` writes float32 matrices: XNNPACK then computes without 8-bit activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from exporters.base import ExporterOptions, refuse_features
from exporters.litert_int8 import packing
from lilliput.artifact import PROVENANCE, Artifact, canonical
from lilliput.errors import ExportError
from lilliput.grid import Float, GridSpec, QuantizedTensor
from lilliput.model import Feature, QuantizedModel, Role, TracedModel, role_of

MODEL_FILE = "model.tflite"
BUNDLE_FILE = "bundle.litertlm"
FEATURES: frozenset[Feature] = frozenset({
    "qk_norm", "post_norms", "embedding_scale", "attention_scale", "sliding_window", "attention_softcap",
    "logit_softcap", "rope_scaling", "local_rope", "partial_rope", "rope_free_layers",
})  # fmt: skip


class Options(ExporterOptions):
    """`bundle`: also write the .litertlm that LiteRT-LM opens. `prefill_lengths`: tokens of further prefill signatures,
    beside the one of the recipe's `prefill`.

    A prompt's remainder is padded to a prefill signature's length. With short ones beside the long one the
    padding costs less, and LiteRT-LM, which refuses a padded prefill that would pass the end of the cache, gets
    that much closer to it. Each adds its operators to the file, no weights. A length that the context does not hold is
    left out.
    """

    bundle: bool = True
    prefill_lengths: tuple[Annotated[int, Field(ge=1)], ...] = (16,)


class Exporter:
    Options: ClassVar[type[ExporterOptions]] = Options
    packages: ClassVar[tuple[str, ...]] = ("ai_edge_litert", "flatbuffers", "litert_lm_builder")
    extra: ClassVar[str] = "litert"
    budget_grids: ClassVar[tuple[str, ...]] = ("int2-channel", "int4-channel", "int4-b64", "int4-b32", "int8-channel")

    def refuses(self, spec: GridSpec, role: Role, shape: tuple[int, int]) -> str | None:
        return packing.refusal(spec, shape)

    def export(
        self, model: QuantizedModel, traced: TracedModel, options: ExporterOptions, folder: Path, *, exact: bool = False
    ) -> Artifact:
        from exporters.litert_int8 import flatbuffer, lowering, weights
        from lilliput.delegation import delegation

        assert isinstance(options, Options)
        prefill, decode = traced.signature("prefill"), traced.signature("decode")
        context, chunk = decode.inputs[2].shape[2], prefill.inputs[0].shape[0]
        self._check(model, context, chunk)
        file, held = flatbuffer.Model(), weights.Weights(model, exact)
        lowering.lower(file, model.config, held, decode, 1, context)
        lengths = sorted({chunk, *(length for length in options.prefill_lengths if length <= context)})
        for steps in lengths:
            lowering.lower(file, model.config, held, prefill, steps, context)
        file.metadata(PROVENANCE, canonical(model.provenance))
        file.write(folder / MODEL_FILE)
        if options.bundle and not exact:
            from exporters.litert_int8 import bundle

            bundle.write(model, folder / MODEL_FILE, context, folder / BUNDLE_FILE)
        said = () if exact else (f"XNNPACK: {delegation(folder / MODEL_FILE)}",)
        return Artifact(folder, "litert_int8", MODEL_FILE, context, lengths[-1], notes=said)

    def read(self, artifact: Artifact) -> Mapping[str, QuantizedTensor | Float]:
        from exporters.litert_int8 import weights

        return weights.read(artifact.path)

    def _check(self, model: QuantizedModel, context: int, chunk: int) -> None:
        refuse_features(model.config, FEATURES, "LiteRT")
        if chunk > context:
            raise ExportError(f"prefill of {chunk} tokens into a cache of {context}: choose prefill ≤ context")
        if model.config.positions == "learned" and context > model.config.max_positions:
            raise ExportError(
                f"context {context}: {model.name} has learned {model.config.max_positions} positions, choose no more"
            )
        for name, tensor in model.quantized.items():
            reason = self.refuses(tensor.spec, role_of(name), tensor.shape)
            if reason is not None:
                raise ExportError(f"{name}: {reason}")
