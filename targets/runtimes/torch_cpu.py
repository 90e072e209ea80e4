"""torch on this machine's CPU: a checkpoint's dequantized weights in float32, through the traced decoder.

It needs no artifact of an exporter: it opens the checkpoint folder itself (exporter name "checkpoint", main
file model.json). It is the slow, plain runtime that the others are held against: `exact` changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from lilliput.artifact import Artifact
from lilliput.errors import MeasurementError
from lilliput.grid import Float
from lilliput.model import DecoderConfig, QuantizedModel, SourceModel

if TYPE_CHECKING:
    from torch import Tensor

    from lilliput.decoder import Decoder


class Runtime:
    exporters: ClassVar[tuple[str, ...]] = ("checkpoint",)
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    extra: ClassVar[str] = "all"

    def open(self, artifact: Artifact, threads: int, *, exact: bool = False) -> TorchSession:
        """Load a checkpoint. Memory: its codes, then its weights as float32."""
        import torch

        from lilliput import checkpoint, decoder

        torch.set_num_threads(threads)
        model = checkpoint.load(artifact.folder)
        return TorchSession(decoder.build(_as_source(model)), artifact.context)

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": torch.__version__}


def _as_source(model: QuantizedModel) -> SourceModel:
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    return SourceModel(model.name, model.config, weights, model.tokenizer, sha256="", origin="")


class TorchSession:
    """The cache is a list per layer of k and v, each (1, kv_heads, context, head_dim) float32."""

    def __init__(self, decoder: Decoder, context: int) -> None:
        from lilliput.trace import Step

        self._step, self._context = Step(decoder, context), context
        self._config: DecoderConfig = decoder.config
        self._caches: list[tuple[Tensor, Tensor]] = []
        self.reset()

    def reset(self) -> None:
        import torch

        shape = (1, self._config.num_kv_heads, self._context, self._config.head_dim)
        self._caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self._config.num_layers)]
        self._used = 0

    def prefill(self, tokens: Sequence[int]) -> Float:
        import torch

        end = self._used + len(tokens)
        if end > self._context:
            raise MeasurementError(f"{end} tokens do not fit the context of {self._context}")
        positions = torch.arange(self._used, end, dtype=torch.int32)
        with torch.inference_mode():
            logits, self._caches = self._step(torch.tensor(list(tokens), dtype=torch.int32), positions, self._caches)
        self._used = end
        row: Float = logits[0, 0].numpy().copy()
        return row

    def decode(self, token: int) -> Float:
        return self.prefill([token])

    def close(self) -> None:
        self._caches = []
