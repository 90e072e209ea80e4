"""What our solvers lose beside llama.cpp's own quantizer, in files of one size, run by llama.cpp.

    python -m benchmarks.llama_quality [--out out/bench] [--threads N]

    llama-quantize Q4_0            llama.cpp's quantizer, on the float weights
    llama-quantize Q4_0, imatrix   the same with an importance matrix: the mean square of every linear's inputs, as
                                   llama-imatrix gathers it, from the calibration text below
    rtn, gptq                      Lilliput's, int4-b32 and int8-channel for the embedding; the second moments that
                                   gptq uses are of the same calibration text

Calibration text: characters 0 to 200,000 of Python's own pydoc_data.topics, 40 chunks of 512 tokens. Evaluation:
characters 300,000 to 345,000, 8 chunks of 512, the second half of each scored by teacher forcing through the shipped
files against the float model in torch (targets/reference.py, targets/metrics.py).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers
from calibration.statistics import Statistics
from lilliput.artifact import Artifact
from lilliput.grid import Float
from lilliput.model import SourceModel
from lilliput.results import Accuracy, Record
from targets import machine
from targets.reference import EvaluationSet, Logits

CALIBRATION_CHUNKS, CHUNKS, LENGTH = 40, 8, 512
SOLVERS = ("rtn", "gptq")


class Row(Record):
    file: str
    size_bytes: int
    accuracy: Accuracy


class Quality(Record):
    """What is written to llama_quality.json."""

    rows: tuple[Row, ...]
    evaluation_sha256: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_quality")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    peers.ensure("source", out / "peers", _say)
    source = peers.open_source(out / "peers")
    work = out / "llama_quality"
    work.mkdir(parents=True, exist_ok=True)
    evaluation = _evaluation(source)
    reference = _reference(source, evaluation, work / "reference")
    files = _files(source, _statistics(source, work / "statistics"), work)
    rows = []
    for name, path in files.items():
        _say(f"evaluating {name}")
        accuracy = evaluate(path, evaluation, reference, options.threads)
        rows.append(Row(file=name, size_bytes=path.stat().st_size, accuracy=accuracy))
    quality = Quality(rows=tuple(rows), evaluation_sha256=evaluation.sha256)
    (out / "llama_quality.json").write_text(quality.model_dump_json(indent=2) + "\n")
    text = markdown(quality)
    (out / "llama_quality.md").write_text(text)
    print(text)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _evaluation(source: SourceModel) -> EvaluationSet:
    from tokenizers import Tokenizer

    from targets.reference import evaluation_set

    tokenizer = Tokenizer.from_file(str(source.tokenizer / "tokenizer.json"))
    return evaluation_set(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, CHUNKS, LENGTH)


def _reference(source: SourceModel, evaluation: EvaluationSet, folder: Path) -> Logits:
    """The float model's logits; kept beside the hash of the tokens that they belong to."""
    from targets.reference import compute

    mark = folder / "evaluation.sha256"
    if not mark.is_file() or mark.read_text() != evaluation.sha256:
        _say("computing the float model's logits")
        shutil.rmtree(folder, ignore_errors=True)
        compute(source.config, source.weights, evaluation, folder)
        mark.write_text(evaluation.sha256)
    return Logits(folder)


def _statistics(source: SourceModel, folder: Path) -> Statistics:
    """Second moments of every linear's input over the calibration text."""
    from calibration import samples, statistics
    from lilliput import texts

    if not (folder / "samples.json").is_file():  # it is written last
        _say("gathering statistics")
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "calibration.txt"
        text.write_text(texts.calibration_text(), encoding="utf-8")
        options = samples.SampleOptions(samples=str(text), count=CALIBRATION_CHUNKS, length=LENGTH)
        statistics.gather(source, samples.gather(source, options), folder)
    return Statistics(folder)


def _files(source: SourceModel, statistics: Statistics, folder: Path) -> dict[str, Path]:
    """All four files, by what they are called in the table."""
    from calibration.solve import solve
    from exporters import gguf_llamacpp
    from lilliput.recipe_schema import Rule

    floats = folder / "float.gguf"
    peers.write_float_gguf(source, floats)
    files = {"llama-quantize Q4_0": folder / "plain.gguf", "llama-quantize Q4_0, imatrix": folder / "imatrix.gguf"}
    peers.quantize_with_llama_cpp(floats, files["llama-quantize Q4_0"])
    peers.quantize_with_llama_cpp(floats, files["llama-quantize Q4_0, imatrix"], importance(source, statistics))
    floats.unlink()
    for solver in SOLVERS:
        _say(f"solving with {solver}")
        rules = [
            Rule.model_validate({"match": "layers.*", "grid": "int4-b32", "solver": solver}),
            Rule.model_validate({"match": "embedding", "grid": "int8-channel", "solver": "rtn"}),
        ]
        files[solver] = folder / f"{solver}.gguf"
        gguf_llamacpp.write(solve(source, rules, statistics), files[solver])
    return files


def importance(source: SourceModel, statistics: Statistics) -> dict[str, Float]:
    """Mean squares (cols,) of the inputs of every matrix, by the name of its tensor in the file."""
    from exporters.gguf_llamacpp.tensors import file_tensors

    return {
        tensor.name: statistics[tensor.parts[0].parameter].second_moments.diagonal().copy()
        for tensor in file_tensors(source.config)
        if tensor.parts[0].parameter in statistics and tensor.parts[0].parameter != "head"
    }


def evaluate(path: Path, evaluation: EvaluationSet, reference: Logits, threads: int) -> Accuracy:
    """Teacher-forced through llama.cpp as it ships: prefill, then decode."""
    from targets.accuracy import teacher_forced
    from targets.metrics import TokenMetrics, log_softmax, summarize
    from targets.runtimes.llamacpp_cpu import Runtime

    rows = reference.open()
    metrics = TokenMetrics.empty(*rows.shape[:2])
    session = Runtime().open(Artifact(path.parent, "gguf_llamacpp", path.name, LENGTH, 0), threads)
    for c, chunk in enumerate(evaluation.tokens.tolist()):
        for i, logits in enumerate(teacher_forced(session, chunk, evaluation.scored_from)):
            p = log_softmax(rows[c, i], f"the float model, chunk {c}, position {i}")
            q = log_softmax(logits, f"{path.name}, chunk {c}, position {i}")
            metrics.put(c, i, p, q, chunk[evaluation.scored_from + i], step_kld=0.0)
    session.close()
    return summarize(metrics)


def markdown(quality: Quality) -> str:
    lines = [
        "| file | bytes | mean KLD | 95 % interval | same top token | perplexity |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in quality.rows:
        found, interval = row.accuracy, row.accuracy.mean_kld_interval
        between = f"{interval.low:.4f} to {interval.high:.4f}" if interval else ""
        lines.append(
            f"| {row.file} | {row.size_bytes:,} | {found.mean_kld:.4f} | {between} | {found.top1_agreement:.1%} "
            f"| {found.perplexity:.2f} |"
        )
    lines += ["", f"Perplexity of the float model: {quality.rows[0].accuracy.reference_perplexity:.2f}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
