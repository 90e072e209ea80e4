"""What our files lose beside those of each runtime's own quantizers, at equal file bytes, on two texts.

    python -m benchmarks.quality [--only gguf|onnx|litert] [--chunks N] [--out out/bench] [--workers N] [--model SOURCE]

    gguf     llama-quantize's types, plain and with an importance matrix     peer_gguf.py, in llama.cpp
    onnx     ONNX Runtime's 4-bit quantizers on our graph                    peer_onnx.py, in ONNX Runtime
    litert   ai-edge-quantizer's int8 and int4 on our graph                  peer_aeq.py, in LiteRT

Ours are the targets of benchmarks/quality.yaml. All calibrate on characters 0 to 200,000 of Python's own
pydoc_data.topics. Scored (scoring.py) are two texts (lilliput/texts.py): characters 300,000 to 345,000 of the same, and
docstrings of the standard library. The float model is the one that all files are made from.

A limit holds the mean KLD of one of our files against a number, or against a share of the best peer's. Peers of fewer
bytes than ours do not count: where all of them are smaller the verdict is BIGGER. Bytes are those of the files that
the runtime loads. The source was a Q4_1 file: float zero points (HQQ's) hold its linears almost without loss, which
says nothing of a model that was not quantized before: `--model` takes one whose channels are shuffled
(benchmarks.shuffled), so that no grid is the source's. Files are made once (peers.py, the store), figures are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks import peers
from benchmarks.models import SMOLLM2
from benchmarks.ours import Judge, Ours, source_override
from benchmarks.scoring import Job, score_all
from benchmarks.subjects import CONTEXT, Subject
from lilliput.errors import LilliputError
from lilliput.results import Accuracy, Record
from lilliput.texts import EVALUATION_TEXTS
from targets import machine

Part = Literal["gguf", "onnx", "litert"]
PARTS: tuple[Part, ...] = ("gguf", "onnx", "litert")
DRIVERS = {"gguf": "llamacpp_cpu", "onnx": "ort_cpu", "litert": "litert_cpu"}
PEERS = {"gguf": ("llama_quantize",), "onnx": ("onnx_nbits",), "litert": ("litert_aeq", "litert_gptq")}
SUFFIXES = {"gguf": ".gguf", "onnx": ".onnx", "litert": ".tflite"}
TWIN = ".twin"
CHUNKS = 8
PREFILL = 128  # of the LiteRT files


class Limit(Record):
    """Mean KLD of `subject` is to be at most `most`, or `share` of the least among `peers` (names' beginnings)."""

    part: Part
    subject: str
    peers: tuple[str, ...]
    most: float | None = None
    share: float | None = None


ORT = (
    "DEFAULT",
    "RTN",
    "k_quant",
    "HQQ-b64",
)  # blocks of 32 with HQQ's float zero points weigh a fifth more: met apart
LIMITS = (
    Limit(part="gguf", subject="gguf-int4", peers=("Q4_0",), most=0.075),
    Limit(part="gguf", subject="gguf-at-Q4_0", peers=("Q4_0",), most=0.075),
    Limit(part="gguf", subject="gguf-at-Q4_K_M", peers=("Q4_K_M",), most=0.018),
    Limit(part="gguf", subject="gguf-at-Q3_K_M", peers=("Q3_K_M-imatrix",), share=0.6),
    Limit(part="gguf", subject="gguf-at-Q2_K", peers=("Q2_K-imatrix",), share=0.6),
    Limit(part="gguf", subject="gguf-at-Q4_0", peers=("gguf-int4",), share=0.8),
    Limit(part="onnx", subject="onnx-int4", peers=ORT, share=0.5),
    Limit(part="onnx", subject="onnx-int4-zero-points", peers=ORT, share=0.5),
    Limit(part="onnx", subject="onnx-at-RTN", peers=ORT, share=0.5),
    Limit(part="onnx", subject="onnx-at-HQQ", peers=("HQQ-zero-points",), share=0.5),
    Limit(part="onnx", subject="onnx-at-int4", peers=("onnx-int4",), share=0.8),
    Limit(part="litert", subject="litert-int8", peers=("int8-",), share=0.6),
    Limit(part="litert", subject="litert-int4", peers=("int4-",), share=0.6),
    Limit(part="litert", subject="litert-at-int4", peers=("litert-int4",), share=0.8),
)
BUDGETS = {  # what a target may weigh: the least of these files
    "gguf-at-Q4_0": ("Q4_0", "gguf-int4"),
    "gguf-at-Q4_K_M": ("Q4_K_M",),
    "gguf-at-Q3_K_M": ("Q3_K_M",),
    "gguf-at-Q2_K": ("Q2_K",),
    "onnx-at-RTN": ("RTN-symmetric", "DEFAULT-symmetric"),
    "onnx-at-HQQ": ("HQQ-zero-points",),
    "onnx-at-int4": ("onnx-int4",),
    "litert-at-int4": ("litert-int4",),
}


class Row(Record):
    """One file; `accuracy` by text."""

    part: Part
    file: str
    maker: Literal["ours", "peer"]
    size_bytes: int
    accuracy: dict[str, Accuracy]


class Ratio(Record):
    """A limit on one text: `value` is the subject's mean KLD, `peer` the best of those that are not smaller."""

    limit: Limit
    text: str
    value: float
    peer: str
    peer_value: float
    verdict: Literal["PASS", "MISS", "BIGGER"]


class Quality(Record):
    """What is written to quality.json. `refused`: what a peer's quantizer, or ours, does not make, and its reason."""

    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    refused: dict[str, str]
    chunks: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where every limit holds, else 1: also where one of our files could not be made."""
    options = _parser().parse_args(arguments)
    out: Path = options.out.resolve()
    quality = measure(options.only or PARTS, out, options.chunks, options.workers, options.model)
    (out / "quality.json").write_text(quality.model_dump_json(indent=2) + "\n")
    text = markdown(quality)
    (out / "quality.md").write_text(text)
    print(text)
    missing = {limit.subject for limit in LIMITS} & set(quality.refused)
    return 0 if not missing and all(ratio.verdict == "PASS" for ratio in quality.ratios) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--model", default=SMOLLM2, help="another source, e.g. a folder by benchmarks.shuffled")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--chunks", type=int, default=CHUNKS, help="of 512 tokens, of each text; 22 are all there are")
    parser.add_argument("--workers", type=int, default=machine.usable_cores())
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(parts: Sequence[Part], out: Path, chunks: int, workers: int, model: str = SMOLLM2) -> Quality:
    """Make what is not there, score what is not scored."""
    folder, source = out / "peers", source_override(model)
    ours = Ours(source)
    folder.mkdir(parents=True, exist_ok=True)
    subjects: dict[Part, list[Subject]] = {}
    refused: dict[str, str] = {}
    for part in parts:
        subjects[part] = []
        for name in PEERS[part]:
            made = peers.ensure(name, folder, _say, model)
            subjects[part] += theirs(part, made)
            refused |= failures(made)
        subjects[part] += _ours(ours, part, ours.uniform(f"{part}-"), refused)
    weighed = Ours(source + budgets([subject for found in subjects.values() for subject in found]))
    for part in parts:
        subjects[part] += _ours(weighed, part, weighed.mixed(f"{part}-"), refused)
    judges = [ours.judge(text, chunks) for text in EVALUATION_TEXTS]
    rows = score([(part, one) for part in parts for one in subjects[part]], judges, out / "scores", workers)
    return Quality(rows=rows, ratios=ratios(rows, LIMITS), refused=refused, chunks=chunks)


def _ours(ours: Ours, part: Part, targets: Sequence[str], refused: dict[str, str]) -> list[Subject]:
    """The targets' files; one that cannot be made (a budget below all grids, say) is put into `refused`."""
    found = []
    for target in targets:
        _say(f"making {target}")
        try:
            found.append(subject(part, "ours", target, ours.file(target)))
        except LilliputError as error:
            refused[target] = str(error)
    return found


def budgets(subjects: Sequence[Subject]) -> list[str]:
    """Overrides of the recipe: every budget by the bytes of the files that are there."""
    size_bytes = {one.name: one.size_bytes for one in subjects}
    found = {target: [size_bytes[n] for n in names if n in size_bytes] for target, names in BUDGETS.items()}
    return [f"targets.{target}.quantize.budget_mb={min(sizes) / 1e6}" for target, sizes in found.items() if sizes]


def subject(part: Part, maker: Literal["ours", "peer"], name: str, path: Path) -> Subject:
    twin = path.with_name(f"{path.stem}{TWIN}{path.suffix}")
    return Subject(
        name=name, maker=maker, driver=DRIVERS[part], path=path, context=CONTEXT,
        prefill=PREFILL if part == "litert" else 0, twin=twin if twin.is_file() else None,
    )  # fmt: skip


def theirs(part: Part, folder: Path) -> list[Subject]:
    """The files in a peer's folder."""
    paths = sorted(path for path in folder.glob(f"*{SUFFIXES[part]}") if not path.stem.endswith(TWIN))
    return [subject(part, "peer", path.stem, path) for path in paths]


def failures(folder: Path) -> dict[str, str]:
    path = folder / "failures.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def score(
    subjects: Sequence[tuple[Part, Subject]], judges: Sequence[Judge], folder: Path, workers: int
) -> tuple[Row, ...]:
    jobs = [
        Job(subject=one, evaluation=judge.evaluation, reference=judge.reference)
        for _, one in subjects
        for judge in judges
    ]
    found = iter(score_all(jobs, folder, workers, _say))
    return tuple(
        Row(
            part=part, file=one.name, maker=one.maker, size_bytes=one.size_bytes,
            accuracy={judge.text: next(found) for judge in judges},
        )
        for part, one in subjects
    )  # fmt: skip


def ratios(rows: Sequence[Row], limits: Sequence[Limit]) -> tuple[Ratio, ...]:
    """Every limit whose subject and at least one peer were scored, on every text."""
    found = []
    for limit in limits:
        of_part = [row for row in rows if row.part == limit.part]
        subject = next((row for row in of_part if row.file == limit.subject), None)
        others = [row for row in of_part if row.file.startswith(limit.peers) and row.file != limit.subject]
        if subject is not None and others:
            found += [_ratio(limit, subject, others, text) for text in subject.accuracy]
    return tuple(found)


def _ratio(limit: Limit, subject: Row, others: Sequence[Row], text: str) -> Ratio:
    fair = [row for row in others if row.size_bytes >= subject.size_bytes]
    best = min(fair or others, key=lambda row: row.accuracy[text].mean_kld)
    value, theirs = subject.accuracy[text].mean_kld, best.accuracy[text].mean_kld
    wanted = limit.most if limit.most is not None else (limit.share or 1.0) * theirs
    verdict: Literal["PASS", "MISS", "BIGGER"] = "BIGGER" if not fair else "PASS" if value <= wanted else "MISS"
    return Ratio(limit=limit, text=text, value=value, peer=best.file, peer_value=theirs, verdict=verdict)


def markdown(quality: Quality) -> str:
    """A table of files for each part, and one of the limits."""
    lines = [f"Mean KLD in nats a token (95 % interval), {quality.chunks} chunks of 512 tokens of each text."]
    texts = list(quality.rows[0].accuracy) if quality.rows else []
    for part in PARTS:
        rows = sorted((row for row in quality.rows if row.part == part), key=lambda row: row.size_bytes)
        if rows:
            lines += ["", *_table(part, rows, texts)]
    refused = [f"- {name}: {reason}" for name, reason in quality.refused.items()]
    lines += ["", *(["Not made, and why:", "", *refused, ""] if refused else [])]
    lines += ["| ours | text | mean KLD | wanted | best peer of no fewer bytes | ratio | verdict |"]
    lines += ["| --- | --- | ---: | ---: | --- | ---: | --- |"]
    for ratio in quality.ratios:
        limit = ratio.limit
        wanted = f"≤ {limit.most}" if limit.most is not None else f"≤ {limit.share} x"
        lines.append(
            f"| {limit.subject} | {ratio.text} | {ratio.value:.4f} | {wanted} | {ratio.peer} {ratio.peer_value:.4f} "
            f"| {ratio.value / ratio.peer_value:.2f} | {ratio.verdict} |"
        )
    return "\n".join(lines) + "\n"


def _table(part: str, rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
    reference = ", ".join(f"{text} {rows[0].accuracy[text].reference_perplexity:.2f}" for text in texts)
    head = [f"{text}: mean KLD | top-1 | perplexity" for text in texts]
    lines = [f"**{part}** (perplexity of the float model: {reference})", ""]
    lines += [
        f"| file | by | bytes | {' | '.join(head)} |",
        f"| --- | --- | ---: |{' --- | ---: | ---: |' * len(texts)}",
    ]
    for row in rows:
        figures = " | ".join(_figures(row.accuracy[text]) for text in texts)
        name = f"**{row.file}**" if row.maker == "ours" else row.file
        lines.append(f"| {name} | {row.maker} | {row.size_bytes:,} | {figures} |")
    return lines


def _figures(found: Accuracy) -> str:
    interval = found.mean_kld_interval
    between = f" ({interval.low:.4f} to {interval.high:.4f})" if interval else ""
    return f"{found.mean_kld:.4f}{between} | {found.top1_agreement:.1%} | {found.perplexity:.2f}"


if __name__ == "__main__":
    sys.exit(main())
