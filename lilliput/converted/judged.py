"""What can be said of a full-int8 `.tflite` whoever wrote it: float operators left in it, and whether two
interpreters agree on it.

The bound of the agreement. An int8 kernel sums exactly in int32 and rounds once, and two implementations may round
to neighbouring codes: LiteRT's quantization specification (https://ai.google.dev/edge/litert/conversion/tensorflow/
quantization/quantization_spec) asks for no equal bits, but for each operator within a tolerance. A code that flips in
an early layer reaches the output as noise of the same kind as rounding's own, which is part of the loss against float.
So no output value may differ between the interpreters by more than one code of its grid, or than the root mean square
of the better one's loss where that is more. Beyond that the file's answers depend on whose kernels run it: one of them
is wrong, or the network amplifies rounding (an untrained MobileNetV2 of 64 operators did, at 6 to 8 dB SQNR).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lilliput.checks import tflite_view
from lilliput.grid import Float
from lilliput.results import Record

FLOATS = ("FLOAT32", "FLOAT16", "FLOAT64", "BFLOAT16")
ROUNDED = 1 + 1e-4  # a code, as the difference of two float32 numbers shows it


class FloatLeft(Record):
    """Operators that read or write float values: `places` are their outputs, with the operator's name."""

    operators: int  # of the file
    places: tuple[str, ...]

    @property
    def integer_share(self) -> float:
        return 1 - len(self.places) / self.operators if self.operators else 1.0


def float_left(file: Path) -> FloatLeft:
    """Every operator with a float value; a QUANTIZE or DEQUANTIZE beside one counts too, as it is there for it."""
    places, count = [], 0
    for graph in tflite_view.open_file(file).graphs:
        for operator in graph.operators:
            count += 1
            touched = [i for i in (*operator.inputs, *operator.outputs) if i >= 0]
            if any(graph.type(i) in FLOATS for i in touched):
                places.append(f"{operator.name} {graph.tensor_name(operator.outputs[0])}")
    return FloatLeft(operators=count, places=tuple(places))


def steps(file: Path) -> dict[str, float]:
    """The step of each output's grid, by its name in the signature; 0 where it is a float."""
    view = tflite_view.open_file(file)
    graph = view.graphs[0]
    scales = {name: view.scales(graph, graph.tensors[index]) for name, index in graph.outputs.items()}
    return {name: 0.0 if scale is None else float(scale[0]) for name, scale in scales.items()}


class Agreement(Record):
    """How far apart two interpreters are: the share of the output values within the bound, and the worst output."""

    share: float
    farthest: float  # of the output that comes nearest its bound, in codes of its grid (where it has none, in floats)
    bound: float  # likewise, of the same output

    def __str__(self) -> str:
        return (
            f"the two interpreters differ by {self.farthest:.3g} codes at most, {self.bound:.3g} are allowed "
            f"(one code, or the root mean square of the loss): {self.share:.2%} of the values are within"
        )


def agreement(
    step: Mapping[str, float], exact: Mapping[str, Float], ours: Mapping[str, Float], theirs: Mapping[str, Float]
) -> Agreement:
    """Outputs by name, of one shape each; `step` as steps() gives it."""
    within, ratios = 0, list[tuple[float, float, float]]()
    for name, wanted in exact.items():
        losses = [float(np.sqrt(np.mean((found[name] - wanted) ** 2))) for found in (ours, theirs)]
        bound = max(step[name] * ROUNDED, min(losses))
        apart = np.abs(ours[name] - theirs[name])
        within += int((apart <= bound).sum())
        farthest, unit = float(apart.max()), step[name] or 1.0
        ratios.append((farthest / bound if bound else farthest, farthest / unit, bound / unit))
    _, farthest, bound = max(ratios)
    return Agreement(share=within / sum(x.size for x in exact.values()), farthest=farthest, bound=bound)
