"""Speed of our files beside the peers' on the same runtimes, and each one's share of this machine's read bandwidth.

    [BENCH_CONTEXT=512] [BENCH_PROMPT=256] python -m benchmarks
        [--out out/bench] [--ours FOLDER] [--rounds N] [--threads N]

Ours come from the recipes smollm2-135m-everywhere and smollm2-135m-litert-int8, by the pipeline (what is cached is
not made again), or from folders that `lilliput run --out` wrote. Peers' files are made once (benchmarks/peers.py).

One run measures everything, in rounds: in each round every file once, A B C … A B C …, each in a process of its own,
and the read bandwidth between. A ratio is the median over rounds of the two figures of the same round, so that a
machine that slows down slows both. All files hold CONTEXT positions and decode after a prompt of PROMPT_TOKENS.
Rounds in which the host probe (targets/measure.py) saw something else at work are
left out; where none is left there is no verdict. A token needs every weight once, so

    share = bytes of the file * decoded tokens per second / read bandwidth

is how much of what memory can give a runtime takes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from benchmarks import child, peers
from benchmarks.subjects import CONTEXT, PREFILL, PROMPT_TOKENS, Subject
from lilliput.errors import MeasurementError
from lilliput.results import Record
from targets import machine

OURS_RECIPE, INT8_RECIPE = "smollm2-135m-everywhere", "smollm2-135m-litert-int8"
SLOW_STEPS = 8  # for a file that decodes 3 tokens a second
ROUNDS = 4

LLAMACPP, ORT, LITERT, LITERT_INT8 = "gguf (ours)", "onnx (ours)", "litert (ours)", "litert int8 (ours)"
QUANTIZE, OPTIMUM, LITERT_TORCH = "llama-quantize Q4_0", "optimum float32", "litert-torch int8"


Phase = Literal["decode", "prefill"]


class Limit(Record):
    """Tokens a second of `subject` are to be at least `least` times those of `peer`."""

    subject: str
    peer: str
    least: float
    phase: Phase = "decode"


LIMITS = (
    Limit(subject=LLAMACPP, peer=QUANTIZE, least=0.97),
    Limit(subject=ORT, peer=QUANTIZE, least=0.9),
    Limit(subject=LITERT_INT8, peer=QUANTIZE, least=0.6),
    Limit(subject=LITERT_INT8, peer=LITERT_TORCH, least=3.0),
    Limit(subject=LITERT, peer=LITERT_TORCH, least=3.0),
)


class Row(Record):
    """Medians over the undisturbed rounds, or over all where there are none; figures of every round."""

    name: str
    runtime: str
    size_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    bandwidth_share: float
    decode_rounds: tuple[float, ...]
    prefill_rounds: tuple[float, ...]
    disturbed_rounds: tuple[bool, ...]

    def rounds_of(self, phase: Phase) -> tuple[float, ...]:
        return self.decode_rounds if phase == "decode" else self.prefill_rounds


class Judged(Record):
    """`value` is the median of the rounds that were not disturbed, `low` and `high` the smallest and the largest. Below
    the limit it is a miss only where all rounds are."""

    value: float | None
    low: float | None
    high: float | None
    rounds: int
    verdict: Literal["PASS", "MISS", "INCONCLUSIVE"]


class Ratio(Judged):
    """Of subject / peer, in rounds in which neither was disturbed."""

    limit: Limit


class Comparison(Record):
    """What is written to runtimes.json."""

    cpu: str
    threads: int
    rounds: int
    prompt_tokens: int
    bandwidth_gb_s: float
    bandwidth_rounds: tuple[float, ...]
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    versions: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where every ratio passes, 1 where one misses, else 3: the machine was disturbed."""
    options = _parser().parse_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    subjects = [*_ours(out, options.ours), *_theirs(out / "peers")]
    comparison = compare(subjects, tokens(out / "peers"), options.threads, options.rounds)
    return publish(comparison, markdown(comparison), out / "runtimes", [ratio.verdict for ratio in comparison.ratios])


def publish(found: Record, text: str, path: Path, verdicts: Iterable[str]) -> int:
    """Write `path`.json and .md, print the text; the exit status: 1 where one misses, 0 where all pass, else 3."""
    path.with_name(f"{path.name}.json").write_text(found.model_dump_json(indent=2) + "\n")
    path.with_name(f"{path.name}.md").write_text(text)
    print(text)
    said = set(verdicts)
    return 1 if "MISS" in said else 0 if said == {"PASS"} else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument(
        "--ours", type=Path, action="append", help="a folder of `lilliput run --out`, in place of running the recipes"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    return parser


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _ours(out: Path, folders: list[Path] | None) -> list[Subject]:
    """Our files: of the folders given, or of runs of both recipes."""
    if folders is None:
        folders = [_run(recipe, out / recipe) for recipe in (OURS_RECIPE, INT8_RECIPE)]
    manifests = [path for folder in folders for path in sorted(folder.resolve().glob("*/manifest.json"))]
    return [_subject(path.parent) for path in manifests]


def _run(recipe: str, out: Path) -> Path:
    """Run a recipe; a gate that fails is the run's own affair, not the benchmark's."""
    from lilliput import pipeline
    from lilliput import recipe as recipes

    say(f"running {recipe} into {out} (what is cached is not made again)")
    pipeline.run(pipeline.plan(recipes.load(recipe, [f"context={CONTEXT}"]), out))
    return out


def _subject(folder: Path) -> Subject:
    """An artifact folder with its manifest. A model whose matrices are all 8-bit is named so."""
    from lilliput import manifest

    found = manifest.read(folder)
    target = found.recipe.targets[0]
    names = {"gguf_llamacpp": LLAMACPP, "onnx_int4": ORT, "litert_int8": LITERT}
    name = names[found.artifact.exporter]
    if {rule.grid for rule in found.recipe.quantize} == {"int8-channel"} and name == LITERT:
        name = LITERT_INT8
    return Subject(
        name=name, maker="ours", driver=target.runtime.name, path=folder / found.artifact.main_file,
        context=found.artifact.context, prefill=found.artifact.prefill,
    )  # fmt: skip


def _theirs(folder: Path) -> list[Subject]:
    """The peers' files, made where they are not there."""
    quantized, optimum, litert = (
        peers.ensure(name, folder, say) for name in ("llama_quantize", "optimum_fp32", "litert_torch")
    )
    return [
        Subject(name=QUANTIZE, maker="peer", driver="llamacpp_cpu", path=quantized / "Q4_0.gguf", context=CONTEXT),
        Subject(name=OPTIMUM, maker="peer", driver="optimum_onnx", path=optimum / "model.onnx", context=CONTEXT),
        Subject(
            name=LITERT_TORCH, maker="peer", driver="litert_cpu", path=litert / "model.tflite", context=CONTEXT,
            prefill=PREFILL, decode_steps=SLOW_STEPS,
        ),
    ]  # fmt: skip


def tokens(folder: Path) -> tuple[int, ...]:
    """The tokens that every file is given: the start of the evaluation text."""
    from tokenizers import Tokenizer

    from lilliput.texts import evaluation_text

    tokenizer = Tokenizer.from_file(str(peers.open_source(folder).tokenizer / "tokenizer.json"))
    return tuple(tokenizer.encode(evaluation_text(), add_special_tokens=False).ids[: 2 * PROMPT_TOKENS])


def compare(
    subjects: Sequence[Subject], given: tuple[int, ...], threads: int, rounds: int, limits: Sequence[Limit] = LIMITS
) -> Comparison:  # fmt: skip
    """Measure all subjects on the `given` tokens, round by round."""
    idle = child.Request(subject=None, threads=threads, tokens=given, prompt_tokens=PROMPT_TOKENS)
    measured: dict[str, list[child.Reply]] = {subject.name: [] for subject in subjects}
    bandwidths: list[float] = []
    for number in range(rounds):
        bandwidths.append(measure(idle).bandwidth_gb_s or 0.0)
        for subject in subjects:
            reply = measure(idle.model_copy(update={"subject": subject}))
            measured[subject.name].append(reply)
            say(f"round {number + 1} of {rounds}: {subject.name}: {_brief(reply)}")
    bandwidth = max(bandwidths)
    rows = tuple(row(subject, measured[subject.name], bandwidth) for subject in subjects)
    return Comparison(
        cpu=machine.describe("host").cpu,
        threads=threads,
        rounds=rounds,
        prompt_tokens=PROMPT_TOKENS,
        bandwidth_gb_s=bandwidth,
        bandwidth_rounds=tuple(bandwidths),
        rows=rows,
        ratios=ratios(rows, limits),
        versions=_versions(),
    )


def _brief(reply: child.Reply) -> str:
    latency = reply.latency
    assert latency is not None
    disturbed = f" (disturbed: {latency.unstable})" if latency.unstable else ""
    return f"prefill {latency.prefill_tokens_per_s:.0f}, decode {latency.decode_tokens_per_s:.1f} tokens/s{disturbed}"


def measure(request: child.Request) -> child.Reply:
    """One child process. Raises MeasurementError with the last that it wrote where it fails."""
    with tempfile.TemporaryDirectory(prefix="lilliput-bench-") as name:
        asked, answer = Path(name) / "request.json", Path(name) / "reply.json"
        asked.write_text(request.model_dump_json())
        command = [sys.executable, "-m", "benchmarks.child", str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            subject = request.subject.name if request.subject else "the bandwidth probe"
            raise MeasurementError(f"{subject} ended with status {done.returncode}: {done.stderr[-1000:].strip()}")
        return child.Reply.model_validate_json(answer.read_bytes())


def row(subject: Subject, replies: list[child.Reply], bandwidth_gb_s: float) -> Row:
    latencies = [reply.latency for reply in replies if reply.latency]
    decode = tuple(latency.decode_tokens_per_s for latency in latencies)
    prefill = tuple(latency.prefill_tokens_per_s for latency in latencies)
    disturbed = tuple(latency.unstable is not None for latency in latencies)
    median = _median(decode, disturbed)
    return Row(
        name=subject.name,
        runtime=subject.runtime,
        size_bytes=subject.size_bytes,
        prefill_tokens_per_s=_median(prefill, disturbed),
        decode_tokens_per_s=median,
        bandwidth_share=subject.size_bytes * median / (bandwidth_gb_s * 1e9),
        decode_rounds=decode,
        prefill_rounds=prefill,
        disturbed_rounds=disturbed,
    )


def _median(figures: tuple[float, ...], disturbed: tuple[bool, ...]) -> float:
    quiet = [figure for figure, bad in zip(figures, disturbed, strict=True) if not bad]
    return statistics.median(quiet or figures)


def ratios(rows: tuple[Row, ...], limits: Sequence[Limit] = LIMITS) -> tuple[Ratio, ...]:
    """The limits whose two files were both measured."""
    by_name = {row.name: row for row in rows}
    measured = (limit for limit in limits if limit.subject in by_name and limit.peer in by_name)
    return tuple(_ratio(limit, by_name[limit.subject], by_name[limit.peer]) for limit in measured)


def _ratio(limit: Limit, ours: Row, theirs: Row) -> Ratio:
    pairs = zip(
        ours.rounds_of(limit.phase), theirs.rounds_of(limit.phase),
        ours.disturbed_rounds, theirs.disturbed_rounds, strict=True,
    )  # fmt: skip
    quiet = [a / b for a, b, bad, also_bad in pairs if not (bad or also_bad)]
    return Ratio(limit=limit, **judged(quiet, limit.least).model_dump())


def judged(quiet: Sequence[float], least: float) -> Judged:
    """The figures of rounds that were not disturbed, wanted at least `least`."""
    if not quiet:
        return Judged(value=None, low=None, high=None, rounds=0, verdict="INCONCLUSIVE")
    value, low, high = statistics.median(quiet), min(quiet), max(quiet)
    verdict: Literal["PASS", "MISS", "INCONCLUSIVE"] = "INCONCLUSIVE"
    if value >= least or high < least:
        verdict = "PASS" if value >= least else "MISS"
    return Judged(value=value, low=low, high=high, rounds=len(quiet), verdict=verdict)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("llama-cpp-python", "onnxruntime", "ai-edge-litert", "optimum", "litert-torch", "ai-edge-quantizer")
    return {package: version(package) for package in packages}


def markdown(comparison: Comparison) -> str:
    """Both tables."""
    lines = [
        f"{comparison.cpu}, {comparison.threads} threads, read bandwidth {comparison.bandwidth_gb_s:.1f} GB/s; "
        f"medians of {comparison.rounds} interleaved rounds, context {CONTEXT}, "
        f"prompt and depth {comparison.prompt_tokens} tokens",
        "",
        "| runtime | file | MB | prefill tokens/s | decode tokens/s | share of read bandwidth | disturbed rounds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in sorted(comparison.rows, key=lambda row: row.runtime):
        lines.append(
            f"| {found.runtime} | {found.name} | {found.size_bytes / 1e6:.1f} | {found.prefill_tokens_per_s:.0f} "
            f"| {found.decode_tokens_per_s:.1f} | {found.bandwidth_share:.0%} | {sum(found.disturbed_rounds)} |"
        )
    if not comparison.ratios:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "| | of | against | ratio | rounds from, to | wanted | rounds | verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [_line(ratio) for ratio in comparison.ratios]
    return "\n".join(lines) + "\n"


def _line(ratio: Ratio) -> str:
    limit = ratio.limit
    return (
        f"| {limit.phase} | {limit.subject} | {limit.peer} | {spread(ratio, '.2f')} | ≥ {limit.least:.2f} "
        f"| {ratio.rounds} | {ratio.verdict} |"
    )


def spread(found: Judged, form: str) -> str:
    """Two cells of a table: the value, and the lowest and highest round."""
    if found.value is None:
        return "– | –"
    return f"{found.value:{form}} | {found.low:{form}}, {found.high:{form}}"
