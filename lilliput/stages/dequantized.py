"""The logits of the dequantized weights in torch: the rung that holds the whole price of quantization, and only it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lilliput.grid import Float
from lilliput.model import QuantizedModel
from lilliput.progress import Progress


class Dequantized(Mapping[str, Float]):
    """A quantized model's weights as float32, each made when asked for."""

    def __init__(self, model: QuantizedModel) -> None:
        self._model = model

    def __getitem__(self, name: str) -> Float:
        return self._model.dequantized(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.config.parameter_shapes())

    def __len__(self) -> int:
        return len(self._model.config.parameter_shapes())


def work(quantized: Path, evaluation: Path, reference: Path, folder: Path, progress: Progress) -> None:
    from lilliput import checkpoint
    from targets.reference import EvaluationSet, Logits, compute_against

    model = checkpoint.load(quantized)
    evaluated = EvaluationSet.load(evaluation)
    compute_against(Logits(reference), model.config, Dequantized(model), evaluated, folder, progress)
