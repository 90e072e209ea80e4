"""What calibration costs: seconds and peak memory of each stage, for one model and a list of targets' grids.

    python -m benchmarks.calibration_cost [--model SOURCE | --random-1b] [--samples self] [--count 48]
        [--grids int4-b32,int5-b32,int4-b64-zp-f16] [--out out/calibration_cost]

The stages are the pipeline's own (lilliput.stages): samples and statistics once, then quantize once a grid, as for a
first, second and third target; they run one after the other in one child process, as in `lilliput run`. The peak of
each is the kernel's own high-water mark of resident memory (VmHWM), reset before it. Two figures are judged:

    peak RSS of all stages / bytes of the float32 weights        wanted at most 2
    a further target's seconds / the first target's              wanted at most 0.25

`--random-1b` makes a Llama of a billion parameters (16 layers of 2048, feed-forward 8192, 32 heads, 8 key-value heads)
with random weights and SmolLM2's tokenizer: its cost is a real one's, its loss means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.cost import StageCost, in_child, measured
from benchmarks.models import SOURCE as MODEL
from lilliput.grid import Float
from lilliput.model import DecoderConfig
from lilliput.results import Record

MEMORY_LIMIT, TIME_LIMIT = 2.0, 0.25
RANDOM_1B = DecoderConfig(
    family="llama", vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
    num_kv_heads=8, head_dim=64, max_positions=8192, norm="rms", norm_eps=1e-5, positions="rope", activation="silu",
    gated_mlp=True, attention_bias=False, mlp_bias=False, tied_embeddings=True,
)  # fmt: skip


class Cost(Record):
    """What is written to calibration_cost.json."""

    model: str
    parameters: int
    weights_bytes: int  # float32
    samples: str
    tokens: int
    stages: tuple[StageCost, ...]

    @property
    def memory_ratio(self) -> float:
        return max(stage.peak_rss_bytes for stage in self.stages) / self.weights_bytes

    @property
    def time_ratios(self) -> tuple[float, ...]:
        """Of the targets after the first, each against the first, to which samples and statistics count."""
        solved = [stage.seconds for stage in self.stages if stage.stage.startswith("quantize")]
        shared = sum(stage.seconds for stage in self.stages) - sum(solved)
        return tuple(seconds / (shared + solved[0]) for seconds in solved[1:])


def main() -> int:
    """Exit status 0 where both limits hold, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--random-1b", action="store_true")
    parser.add_argument("--samples", default="self", help="as calibration.samples in a recipe")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--grids", default="int4-b32,int5-b32,int4-b64-zp-f16")
    parser.add_argument("--out", type=Path, default=Path("out/calibration_cost"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    in_child(_load, arguments)
    in_child(_calibrate, arguments)
    cost = Cost.model_validate_json((arguments.out / "calibration_cost.json").read_bytes())
    print(markdown(cost))
    return 0 if cost.memory_ratio <= MEMORY_LIMIT and all(r <= TIME_LIMIT for r in cost.time_ratios) else 1


def _load(arguments: argparse.Namespace) -> None:
    """The source stage's folder; of random weights where asked."""
    from lilliput import source

    folder = arguments.out / "source"
    source.load(MODEL if arguments.random_1b else arguments.model, folder, proof=False)
    if arguments.random_1b:
        _randomise(folder, RANDOM_1B)


def _randomise(folder: Path, config: DecoderConfig) -> None:
    """Replace the weights of a source stage by normal ones of deviation 0.02 (norms by ones); set its config."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    weights = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else _normal(generator, shape)
        for name, shape in config.parameter_shapes().items()
    }
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config)) + "\n")


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Float:
    values = generator.standard_normal(shape, np.float32)
    values *= np.float32(0.02)
    return values


def _calibrate(arguments: argparse.Namespace) -> None:
    """Run the stages and write calibration_cost.json."""
    import torch

    from calibration.samples import SampleOptions
    from lilliput.assignment import parameter_count
    from lilliput.progress import silent
    from lilliput.recipe_schema import Recipe
    from lilliput.source import open_stage
    from lilliput.stages import quantize, samples, statistics
    from targets.machine import usable_cores

    torch.set_num_threads(usable_cores())
    out: Path = arguments.out
    source, stages = out / "source", list[StageCost]()
    options = SampleOptions(samples=arguments.samples, count=arguments.count, length=arguments.length)
    with measured("samples", stages, out / "samples") as folder:
        samples.work(source, options.model_dump(), folder, silent)
    with measured("statistics", stages, out / "statistics") as folder:
        statistics.work(source, out / "samples", folder, silent)
    for grid in arguments.grids.split(","):
        rules = Recipe.model_validate(_recipe(grid)).quantize
        with measured(f"quantize {grid}", stages, out / f"quantize-{grid}") as folder:
            quantize.work(source, out / "statistics", rules, None, folder, silent)
        shutil.rmtree(out / f"quantize-{grid}")
    parameters = parameter_count(open_stage(source).config)
    cost = Cost(
        model="random Llama" if arguments.random_1b else arguments.model, parameters=parameters,
        weights_bytes=4 * parameters, samples=arguments.samples, tokens=options.count * options.length,
        stages=tuple(stages),
    )  # fmt: skip
    (out / "calibration_cost.json").write_text(cost.model_dump_json(indent=2) + "\n")


def _recipe(grid: str) -> dict[str, object]:
    """A recipe with the short form of `quantize`: its rules are what a user gets."""
    target = {"name": "gguf", "exporter": "gguf_llamacpp", "runtime": "llamacpp_cpu"}
    return {"name": "cost", "model": {"source": MODEL}, "quantize": grid, "targets": [target]}


def markdown(cost: Cost) -> str:
    lines = [
        f"{cost.model}: {cost.parameters / 1e6:.0f} M parameters, {cost.weights_bytes / 1e9:.2f} GB in float32; "
        f"{cost.tokens} tokens of {cost.samples}; {os.cpu_count()} cores",
        "",
        "| stage | seconds | peak RSS GB | of the float32 weights |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {s.stage} | {s.seconds:.1f} | {s.peak_rss_bytes / 1e9:.2f} | {s.peak_rss_bytes / cost.weights_bytes:.2f} |"
        for s in cost.stages
    ]
    memory = "PASS" if cost.memory_ratio <= MEMORY_LIMIT else "MISS"
    lines += ["", f"Peak RSS / float32 weights: {cost.memory_ratio:.2f}, wanted at most {MEMORY_LIMIT} {memory}"]
    for number, ratio in enumerate(cost.time_ratios, start=2):
        verdict = "PASS" if ratio <= TIME_LIMIT else "MISS"
        lines.append(f"Target {number} / the first: {ratio:.2f} of the time, wanted at most {TIME_LIMIT} {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
