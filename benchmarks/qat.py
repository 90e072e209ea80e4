"""What QAT buys beyond the best PTQ: mean KLD of the dequantized model against float, grid by grid, in torch.

    python -m benchmarks.qat --out out/qat --grid int4-b32 --grid int3-b32 --minutes 30

Linears are on each `--grid`, embedding and head on int8-channel. Calibration and training see the same samples: the
language reference, characters 0 to 200,000, and docstrings of the standard library. The figures are of two texts that
they do not see (lilliput.texts): another part of the reference, and docstrings of six other modules. Scored is the
second half of each chunk of 512 tokens (targets/reference.py). QAT reconstructs the layers of the plain GPTQ solve,
then trains; both count in its minutes. Its gain is against the best PTQ of its grid on each text. Trained models are
kept in `--out`, and a training that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.kept import keep
from benchmarks.models import SOURCE as MODEL
from calibration import qat, samples, statistics
from calibration.samples import Samples
from calibration.solve import solve
from calibration.statistics import Statistics
from lilliput import checkpoint
from lilliput.model import QuantizedModel, SourceModel
from lilliput.recipe_schema import Recover, Rule, SamplePart
from lilliput.source import load, open_stage
from lilliput.stages.dequantized import Dequantized
from lilliput.tokenizer_folder import load_tokenizer
from targets.reference import EvaluationSet, Logits, compare, compute, evaluation_set

LENGTH = 512
TEXTS = ("builtin", "docstrings")
START = "GPTQ"
PTQ: dict[str, str | list[str]] = {"RTN": "rtn", START: "gptq", "AWQ, GPTQ": ["awq", "gptq"]}
RECONSTRUCTED, TRAINED = "reconstructed", "QAT"
SAMPLES = ({"samples": "builtin", "count": 95}, {"samples": "docstrings", "count": 105})
HELD_OUT = "samples"
FEW_BITS_RATE = 0.001


@dataclass(frozen=True)
class Result:
    """One row; KLD in nats a token, by text."""

    grid: str
    name: str
    mean_kld: dict[str, float]
    top1_agreement: dict[str, float]
    minutes: float
    steps: int  # of training


@dataclass(frozen=True)
class Judge:
    """Both texts, and the float model's logits on them."""

    folder: Path
    evaluations: dict[str, EvaluationSet]
    references: dict[str, Logits]

    @classmethod
    def of(cls, source: SourceModel, taken: Samples, chunks: int, folder: Path) -> Judge:
        tokenizer = load_tokenizer(source.tokenizer)
        held = taken.tokens[qat.held_out(len(taken.tokens))]
        evaluations = {HELD_OUT: EvaluationSet(held, taken.provenance.sha256, "samples that training holds out")}
        for text in TEXTS:
            evaluations[text] = evaluation_set(
                lambda words: tokenizer.encode(words, add_special_tokens=False), chunks, LENGTH, text
            )
        references = {
            text: compute(source.config, source.weights, evaluation, folder / text)
            for text, evaluation in evaluations.items()
        }
        return cls(folder, evaluations, references)

    def result(self, grid: str, name: str, model: QuantizedModel, minutes: float, steps: int = 0) -> Result:
        kld, top1 = {}, {}
        for text, evaluation in self.evaluations.items():
            logits = compute(model.config, Dequantized(model), evaluation, self.folder / "candidate")
            found = compare(self.references[text], logits, evaluation)
            kld[text], top1[text] = found.mean_kld, float(found.agrees.mean())
        return Result(grid, name, kld, top1, minutes, steps)


def run(arguments: argparse.Namespace) -> Iterator[Result]:
    """Each row as it comes."""
    out: Path = arguments.out

    def made_source(folder: Path) -> None:
        load(arguments.model, folder, proof=False)

    source = open_stage(keep(out / "source", {"model": arguments.model}, made_source))
    parts = tuple(SamplePart.model_validate(part) for part in json.loads(arguments.samples))
    taken = samples.gather(source, samples.SampleOptions(samples=parts, length=LENGTH))

    def gathered(folder: Path) -> None:
        statistics.gather(source, taken, folder)

    record = {"samples": taken.provenance.sha256, "parts": arguments.samples}
    found = Statistics(keep(out / "statistics", record, gathered))
    judge = Judge.of(source, taken, arguments.chunks, out / "logits")
    for grid in arguments.grid:
        start: QuantizedModel | None = None
        for name, solver in PTQ.items():
            started = time.perf_counter()
            solved = solve(source, rules(grid, solver), found)
            yield judge.result(grid, name, solved, (time.perf_counter() - started) / 60)
            start = solved if name == START else start
        assert start is not None
        trained, steps, seconds = train(source, start, taken, arguments, out / grid)
        begun, spent = qat.reconstructed_in(work_folder(out / grid))
        yield judge.result(grid, RECONSTRUCTED, begun, spent / 60)
        yield judge.result(grid, TRAINED, trained, seconds / 60, steps)
    shutil.rmtree(out / "logits")  # a gigabyte each


def rules(grid: str, solver: str | list[str]) -> tuple[Rule, ...]:
    return (
        Rule.model_validate({"match": "layers.*", "grid": grid, "solver": solver}),
        Rule.model_validate({"match": "*", "grid": "int8-channel", "solver": "rtn"}),
    )


def train(
    source: SourceModel, start: QuantizedModel, taken: Samples, arguments: argparse.Namespace, folder: Path
) -> tuple[QuantizedModel, int, float]:
    """The trained model, its steps and seconds; from `folder` where it was trained with the same options before."""
    rates = {"scale_learning_rate": FEW_BITS_RATE, "float_learning_rate": FEW_BITS_RATE} if few_bits(start) else {}
    options = Recover.model_validate({"minutes": arguments.minutes} | rates | json.loads(arguments.options))

    def make(result: Path) -> None:
        model, found = qat.recover(source, start, taken, options, work_folder(folder))
        print(f"{folder.name}: {found}", flush=True)
        checkpoint.save(model, result)
        (result / "recovery.json").write_text(json.dumps(asdict(found), indent=2) + "\n")

    keep(folder, {"options": options.model_dump_json(), "samples": arguments.samples}, make)
    cost = json.loads((folder / "recovery.json").read_text())
    return checkpoint.load(folder), cost["steps"], cost["seconds"]


def work_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.unfinished")


def few_bits(model: QuantizedModel) -> bool:
    """Below 4: more is to be mended, at a higher rate."""
    return min(tensor.spec.bits for tensor in model.quantized.values()) < 4


HEADER = (
    "| grid | weights by | mean KLD | on docstrings | same top token | minutes | steps |\n|---|---|---|---|---|---|---|"
)


def row(result: Result) -> str:
    """One line of the Markdown table under HEADER."""
    return (
        f"| {result.grid} | {result.name} | {result.mean_kld['builtin']:.4f} | {result.mean_kld['docstrings']:.4f} | "
        f"{result.top1_agreement['builtin']:.1%} | {result.minutes:.1f} | {result.steps or ''} |"
    )


def gains(results: list[Result]) -> Iterator[str]:
    """By how much QAT is below the best PTQ of its grid, a line for each."""
    for trained in (r for r in results if r.name == TRAINED):
        others = [r for r in results if r.grid == trained.grid and r.name in PTQ]
        for text in TEXTS:
            best = min(others, key=lambda r: r.mean_kld[text])
            fell = 1 - trained.mean_kld[text] / best.mean_kld[text]
            yield f"{trained.grid}: QAT below {best.name} on {text}: {fell:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("out/qat"))
    parser.add_argument("--grid", action="append", help="may be given again; default: int4-b32, int3-b32, int2-b32")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, a grid")
    parser.add_argument("--samples", default=json.dumps(SAMPLES), help="a mix of samples as JSON, of 512 tokens each")
    parser.add_argument("--chunks", type=int, default=22, help="chunks of each evaluation text")
    parser.add_argument("--options", default="{}", help="further options of `recover`, as JSON")
    arguments = parser.parse_args()
    arguments.grid = arguments.grid or ["int4-b32", "int3-b32", "int2-b32"]
    results = []
    for result in run(arguments):
        results.append(result)
        print(row(result), flush=True)
        (arguments.out / "results.json").write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")
    print("\n".join([HEADER, *map(row, results), *gains(results)]))


if __name__ == "__main__":
    main()
