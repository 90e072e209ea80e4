"""QLoRA-style recovery: the base frozen on its low-bit codes, low-rank adapters trained by distillation.

(Dettmers et al. 2023, arXiv:2305.14314.) The loop is that of calibration.qat, with the matrices of calibration.low_rank
in the place of positions and scales. Norms stay as they are: what is trained is in the adapters alone.

They are then shipped beside the file, where the runtime takes them (exporters.gguf_llamacpp.lora); or merged: W + B A
is solved again by GPTQ on the grid of W, with statistics of the merged model's own activations. That rounds away what
is smaller than a step, so the merged model is measured again, and kept only where it is better than the base was.

onnxruntime-genai's adapters are not written: they need inputs for A and B at every MatMulNBits of the graph, which
the files that we ship do not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from calibration import gptq, qat, statistics
from calibration.low_rank import Adapter
from calibration.samples import Samples
from calibration.statistics import Statistics
from lilliput.grid import Float
from lilliput.model import LowRank, QuantizedModel, SourceModel
from lilliput.progress import Progress, silent
from lilliput.provenance import RECOVERED
from lilliput.recipe_schema import Recover


def recover(
    source: SourceModel,
    solved: QuantizedModel,
    samples: Samples,
    options: Recover,
    work: Path,
    progress: Progress = silent,
) -> tuple[QuantizedModel, qat.Recovery]:
    """The model with adapters trained, merged and solved again; `solved` where that is no better."""
    trainer = qat.Trainer(source, solved, samples, options)
    found = qat.trained(trainer, options, work, progress)
    adapters = adapters_of(trainer)
    full = merged(source, solved, adapters)
    model = solved_again(full, solved, adapters, statistics.gather(full, samples, work / "statistics"))
    after = trainer.divergence_of(model)
    found = replace(found, kld_unmerged=found.kld_after, kld_after=after, kept=after < found.kld_before)
    return (model if found.kept else solved), found


def adapters_of(trainer: qat.Trainer) -> dict[str, LowRank]:
    """What a trainer trained, by matrix."""
    return {name: part.adapter() for name, part in trainer.fakes.items() if isinstance(part, Adapter)}


class Merged(Mapping[str, Float]):
    """A solved model's weights in float32, adapters added; what was not solved in matrices is the source's."""

    def __init__(self, source: SourceModel, solved: QuantizedModel, adapters: Mapping[str, LowRank]) -> None:
        self._source, self._solved, self._adapters = source, solved, adapters

    def __getitem__(self, name: str) -> Float:
        if name in self._adapters:
            weight: Float = self._solved.dequantized(name) + self._adapters[name].delta()
            return weight
        return self._solved.floats[name] if name in self._solved.floats else self._source.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.config.parameter_shapes())

    def __len__(self) -> int:
        return len(self._source.config.parameter_shapes())


def merged(source: SourceModel, solved: QuantizedModel, adapters: Mapping[str, LowRank]) -> SourceModel:
    """The float model that base and adapters make."""
    return replace(source, weights=Merged(source, solved, adapters))


def solved_again(full: SourceModel, solved: QuantizedModel, names: Iterable[str], found: Statistics) -> QuantizedModel:
    """`solved`, with the matrices `names` solved anew from `full`, each on the grid that it has."""
    quantized = dict(solved.quantized)
    for name in names:
        weight, spec = full.weights[name], quantized[name].spec
        quantized[name] = gptq.Solver().solve(weight, spec, found[name], gptq.Options())
        quantized[name].check(name)
    note = {"recovered": RECOVERED["adapters"]}
    return replace(solved, quantized=quantized, provenance={**solved.provenance, **note})
