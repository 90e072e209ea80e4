"""What calibration buys: mean KLD of the dequantized model against float, solver by solver, in torch.

    python -m benchmarks.calibration_quality --out out/calibration_quality

Every row quantizes the same model on the same grid (linears on `--grid`, embedding and head on int8-channel)
and scores it on the evaluation text by the protocol of targets/reference.py: chunks of 512 tokens, the second
half scored. No runtime is involved, so this is the price of the weights alone. Calibrated rows take
`--count` samples of 512 tokens from Python's language reference (characters 0 to 200,000), or from the model itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.models import SOURCE as MODEL
from calibration import samples, statistics
from calibration.solve import solve
from calibration.statistics import Statistics
from lilliput.model import QuantizedModel, SourceModel
from lilliput.recipe_schema import Rule
from lilliput.source import load
from lilliput.stages.dequantized import Dequantized
from lilliput.tokenizer_folder import load_tokenizer
from targets.metrics import summarize
from targets.reference import EvaluationSet, Logits, compare, compute, evaluation_set

LENGTH = 512

Calibrated = Literal["none", "builtin", "self"]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    solver: str | dict[str, object]
    samples: Calibrated


CASES = (
    Case("RTN, max-abs scales", {"name": "rtn", "candidates": 1, "refine": 0}, "none"),
    Case("RTN, scale search", "rtn", "none"),
    Case("RTN, scale search weighted", {"name": "rtn", "weighted": True}, "builtin"),
    Case("GPTQ, self-generated samples", "gptq", "self"),
    Case("GPTQ, builtin text", "gptq", "builtin"),
)


@dataclass(frozen=True)
class Result:
    """Figures of one row; KLD in nats a token."""

    name: str
    samples: Calibrated
    mean_kld: float
    mean_kld_low: float  # 95 % interval over chunks
    mean_kld_high: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    size_bytes: int  # of codes, scales and floats
    solve_s: float


def run(arguments: argparse.Namespace) -> list[Result]:
    out: Path = arguments.out
    source = _source(arguments.model, out / "source")
    gathered = {kind: _statistics(source, kind, arguments.count, out / kind) for kind in ("builtin", "self")}
    evaluation = _evaluation(source, arguments.chunks)
    reference = compute(source.config, source.weights, evaluation, out / "reference")
    results = []
    for case in CASES:
        started = time.perf_counter()
        rules = (
            Rule.model_validate({"match": "layers.*", "grid": arguments.grid, "solver": case.solver}),
            Rule.model_validate({"match": "*", "grid": "int8-channel", "solver": "rtn"}),
        )
        model = solve(source, rules, gathered.get(case.samples))
        results.append(_score(case, model, reference, evaluation, time.perf_counter() - started, out / "candidate"))
        print(row(results[-1]), flush=True)
    for folder in ("reference", "candidate"):  # logits: a gigabyte each
        shutil.rmtree(out / folder)
    return results


def _source(model: str, folder: Path) -> SourceModel:
    shutil.rmtree(folder, ignore_errors=True)
    return load(model, folder, proof=False)


def _statistics(source: SourceModel, kind: str, count: int, folder: Path) -> Statistics:
    options = samples.SampleOptions(samples=kind, count=count, length=LENGTH)
    started = time.perf_counter()
    taken = samples.gather(source, options)
    sampled = time.perf_counter()
    found = statistics.gather(source, taken, folder)
    print(f"{kind}: samples {sampled - started:.0f} s, statistics {time.perf_counter() - sampled:.0f} s", flush=True)
    return found


def _evaluation(source: SourceModel, chunks: int) -> EvaluationSet:
    tokenizer = load_tokenizer(source.tokenizer)
    return evaluation_set(lambda text: tokenizer.encode(text, add_special_tokens=False), chunks, LENGTH)


def _score(
    case: Case, model: QuantizedModel, reference: Logits, evaluation: EvaluationSet, solve_s: float, folder: Path
) -> Result:
    logits = compute(model.config, Dequantized(model), evaluation, folder)
    found = summarize(compare(reference, logits, evaluation))
    interval = found.mean_kld_interval
    codes = sum(tensor.size_bytes for tensor in model.quantized.values())
    return Result(
        name=case.name,
        samples=case.samples,
        mean_kld=found.mean_kld,
        mean_kld_low=interval.low if interval else found.mean_kld,
        mean_kld_high=interval.high if interval else found.mean_kld,
        top1_agreement=found.top1_agreement,
        perplexity=found.perplexity,
        reference_perplexity=found.reference_perplexity,
        size_bytes=codes + sum(array.nbytes for array in model.floats.values()),
        solve_s=solve_s,
    )


HEADER = "| calibration | mean KLD | 95 % | same top token | perplexity | MB | solve s |\n|---|---|---|---|---|---|---|"


def row(result: Result) -> str:
    """One line of the Markdown table under HEADER."""
    return (
        f"| {result.name} | {result.mean_kld:.4f} | {result.mean_kld_low:.4f} to {result.mean_kld_high:.4f} | "
        f"{result.top1_agreement:.1%} | {result.perplexity:.2f} (float {result.reference_perplexity:.2f}) | "
        f"{result.size_bytes / 1e6:.1f} | {result.solve_s:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, default=Path("out/calibration_quality"))
    parser.add_argument("--grid", default="int4-b32")
    parser.add_argument("--count", type=int, default=48, help="calibration samples")
    parser.add_argument("--chunks", type=int, default=22, help="evaluation chunks; 22 are all there are")
    arguments = parser.parse_args()
    results = run(arguments)
    (arguments.out / "results.json").write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")
    print("\n".join([HEADER, *map(row, results)]))


if __name__ == "__main__":
    main()
