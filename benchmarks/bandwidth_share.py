"""How much of this machine's read bandwidth a GPT-2 of at most 63 MB takes while it decodes, on each runtime.

    [BENCH_CONTEXT=512] [BENCH_PROMPT=256] python -m benchmarks.bandwidth_share [--out out/bench] [--rounds N]

A token needs every weight once, so no runtime decodes more than bandwidth / bytes of the file tokens a second;

    share = decoded tokens a second / (read bandwidth / bytes of the file)

is what it reaches of that, measured as `python -m benchmarks` measures, and wanted at least SHARES. The model is the
GPT-2 shape (benchmarks/models.py); each file is `quantize: {budget_mb: 63}`, whose sensitivities are those of random
weights: how many bytes the grids take is what counts here, not which matrix has which. LiteRT's file would have 64 MB
at int4-channel throughout (positions, biases and scales are float32): a few matrices have 2 bits. A file above the
budget is a miss whatever its share is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers, runtimes, same_runtime
from benchmarks.models import GPT2
from benchmarks.ours import Ours
from benchmarks.runtimes import Comparison, Judged, Row, judged
from benchmarks.subjects import CONTEXT, PREFILL
from lilliput.recipe_schema import MEGA, Recipe
from lilliput.results import Record
from targets import machine

BUDGET_MB = 63.0
ROUNDS = 6
SHARES = {"ONNX Runtime": 0.55, "llama.cpp": 0.55, "LiteRT": 0.35}
CALIBRATION = {"samples": "builtin", "count": 4, "length": 256}


class Share(Judged):
    """Of one file; above the budget it is a miss whatever its share is."""

    name: str
    runtime: str
    size_bytes: int
    least: float


class Shares(Record):
    """What is written to bandwidth_share.json."""

    shares: tuple[Share, ...]
    comparison: Comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where every share passes, 1 where one misses, else 3."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bandwidth_share", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    folder = same_runtime.peers_folder(out, GPT2)
    peers.ensure("source", folder, runtimes.say, GPT2)
    runtimes.say("making our files (what is cached is not made again)")
    made = Ours(recipe=recipe(str(folder / "hf")))
    files = [made.subject(name, f"{name} (ours)") for name in ("onnx", "gguf", "litert")]
    comparison = runtimes.compare(files, runtimes.tokens(folder), options.threads, options.rounds, ())
    found = Shares(
        shares=tuple(share(row, comparison.bandwidth_rounds) for row in comparison.rows), comparison=comparison
    )
    verdicts = [share.verdict for share in found.shares]
    return runtimes.publish(found, markdown(found), out / "bandwidth_share", verdicts)


def recipe(source: str) -> Recipe:
    targets = [
        {"name": "onnx", "exporter": "onnx_int4", "runtime": "ort_cpu"},
        {"name": "gguf", "exporter": "gguf_llamacpp", "runtime": "llamacpp_cpu"},
        {"name": "litert", "exporter": {"name": "litert_int8", "bundle": False}, "runtime": "litert_cpu"},
    ]  # fmt: skip
    whole = {
        "name": GPT2, "model": {"source": source, "name": GPT2}, "context": CONTEXT, "prefill": PREFILL,
        "calibration": CALIBRATION, "evaluation": {"length": min(CONTEXT, 512)},
        "quantize": {"budget_mb": BUDGET_MB, "solver": "rtn"}, "targets": targets,
    }  # fmt: skip
    return Recipe.model_validate(whole)


def share(row: Row, bandwidths_gb_s: Sequence[float]) -> Share:
    """Against the fastest bandwidth of the run: what else used the machine then only lowers a round's share."""
    ceiling = max(bandwidths_gb_s) * 1e9 / row.size_bytes
    quiet = [r / ceiling for r, bad in zip(row.decode_rounds, row.disturbed_rounds, strict=True) if not bad]
    least = SHARES[row.runtime]
    found = judged(quiet, least).model_dump()
    if row.size_bytes > BUDGET_MB * MEGA:
        found["verdict"] = "MISS"
    return Share(name=row.name, runtime=row.runtime, size_bytes=row.size_bytes, least=least, **found)


def markdown(found: Shares) -> str:
    lines = [
        runtimes.markdown(found.comparison),
        f"| runtime | file | MB, at most {BUDGET_MB:g} | share of bandwidth / bytes | rounds from, to | wanted "
        "| rounds | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in found.shares:
        lines.append(
            f"| {one.runtime} | {one.name} | {one.size_bytes / MEGA:.2f} | {runtimes.spread(one, '.0%')} "
            f"| ≥ {one.least:.0%} | {one.rounds} | {one.verdict} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
