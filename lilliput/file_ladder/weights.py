"""A file's numbers as the decoder's parameters, dequantized exactly, and which constants they are.

Our own files and GGUF name their parameters. In others a matrix is the source's that it is most alike
(lilliput.checks.comparison.identify), a vector the source's that it equals. What is not recognised is taken from the
source and listed by name: the rung `weights` then says nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lilliput.checks.comparison import Source
from lilliput.checks.opened import Opened, Parameter
from lilliput.file_ladder.found import Place
from lilliput.file_ladder.locate import relative
from lilliput.file_ladder.values import layer_of
from lilliput.grid import Float
from lilliput.model import DecoderConfig

SHOWN = 3
VECTOR_RTOL, VECTOR_ATOL = 2e-3, 1e-5  # a vector stored in float16


@dataclass(frozen=True, eq=False)
class Held:
    """`config` has a head of its own where the file holds one beside the embedding. `tensors`: constant → parameter."""

    config: DecoderConfig
    weights: Mapping[str, Float]
    tensors: Mapping[str, str]
    notes: tuple[str, ...]

    def furthest(self, source: Source) -> Place:
        """The parameter that differs most from the source's."""
        errors = {n: relative(self.weights[n], source.weights["embedding" if n not in source.weights else n])
                  for n in self.weights}  # fmt: skip
        name = max(errors, key=lambda n: errors[n])
        tensor = next((t for t, parameter in self.tensors.items() if parameter == name), name)
        return Place(layer=layer_of(name), operator="constant", node=tensor, value=name, error=min(errors[name], 1e9))


def held(opened: Opened, source: Source) -> Held:
    """Raises NotCheckedError where the numbers cannot be read."""
    found, tensors, config = dict[str, Float](), dict[str, str](), source.config
    for parameter in (*opened.parameters(), *_vectors(opened, source)):
        name, values = parameter.name, np.asarray(parameter.values, np.float32)
        again = name in found and parameter.tensor.name not in tensors
        if again and name == "embedding" and config.tied_embeddings:
            config = replace(config, tied_embeddings=False)
            lookup = parameter if parameter.tensor.role == "embedding" else None
            found["head"] = found["embedding"] if lookup else values
            if lookup:
                found["embedding"] = values
        elif not again:
            found[name] = values
        tensors.setdefault(parameter.tensor.name, name)
    shapes = config.parameter_shapes()
    missing = [n for n in shapes if n not in found or found[n].shape != shapes[n]]
    weights = {n: found[n] if n not in missing else np.asarray(source.weights[n], np.float32) for n in shapes}
    return Held(config, weights, tensors, _notes(missing, len(shapes)))


def _notes(missing: list[str], count: int) -> tuple[str, ...]:
    if not missing:
        return ()
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return (
        f"{len(missing)} of {count} parameters were not recognised in the file and are taken from the source: "
        f"{', '.join(missing[:SHOWN])}{more}",
    )


def _vectors(opened: Opened, source: Source) -> Iterator[Parameter]:
    """Norms and biases in a file that names none: equal numbers, the first of the source's that no other took."""
    if opened.names_parameters:
        return
    stored = [(t, t.read().reshape(-1)) for t in opened.tensors if sum(n > 1 for n in t.shape) == 1]
    for name, wanted in source.weights.items():
        flat = np.asarray(wanted, np.float32)
        if flat.ndim != 1:
            if name == "position_embedding":
                yield from (Parameter(name, t, t.read()) for t in opened.tensors if t.shape == flat.shape)
            continue
        for tensor, values in stored:
            if values.shape == flat.shape and np.allclose(values, flat, rtol=VECTOR_RTOL, atol=VECTOR_ATOL):
                yield Parameter(name, tensor, values)
                break
