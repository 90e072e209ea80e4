"""Two tasks with labels, end to end: the accuracy that each full-int8 artifact keeps on its own runtime.

    python -m benchmarks.tasks digits --out out/tasks
    python -m benchmarks.tasks spam --mails out/mails --out out/tasks      # make mails OUT=out

A task trains its float classifier and holds examples back (lilliput.tasks); training examples calibrate. One solve,
int8 weights per channel and 8-bit activations per tensor, is written as ONNX in QDQ form and as a `.tflite`; digits are
trained on the grid too (QAT). Each file is read back, then answers the held-out examples on its runtime.

Of digits every value is int8. Of the spam classifier the tables are, and the matrix products with what they read and
make; norms, softmax, GELU, residual sums and the mean are computed in float32, and the channels that matrices read and
make are scaled alike first (calibration.network_smoothing). Each row's notes name the nodes in float32.

    drop        accuracy of the float classifier less the artifact's, in shares; its 95 % interval is a bootstrap over
                examples, both classifiers judged on the same draw (targets.metrics)
    verdict     of the gate drop ≤ --limit (targets.gates): INCONCLUSIVE where the interval holds the limit
    ms          one example on one thread, the median of all, in this process: for orientation

Exit code 0 where every gate passes, 1 where one fails, 3 where one is inconclusive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calibration import network_qat, network_smoothing, network_solve, static_qat
from calibration.clipping import RangeOptions
from calibration.network_statistics import gather
from lilliput import registry
from lilliput.errors import LilliputError
from lilliput.network import QuantizedNetwork
from lilliput.network.run import run_quantized
from lilliput.network.trace import trace
from lilliput.progress import silent
from lilliput.results import Verdict, worst
from lilliput.tasks import digits, spam
from lilliput.tasks.base import Examples, Labels, Trained, accuracy
from targets.gates import Figure, judge, read_back_gate
from targets.metrics import bootstrap_interval

LIMIT = 0.005
CALIBRATION, SEED = 128, 0
EXIT = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
MASKS: Mapping[str, str | None] = {"digits": None, "spam": "mask"}
INTEGER: Mapping[str, network_solve.Integer] = {"digits": "all", "spam": "products"}
BATCH = 32  # of the float classifier
FILES = (("onnx_qdq", "ort_static_cpu"), ("litert_static", "litert_static_cpu"), ("litert_static", "tensorflow_cpu"))
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One solved network on one runtime; `examples` were held out."""

    solved: str
    exporter: str
    runtime: str
    size_bytes: int
    examples: int
    float_accuracy: float
    twin_accuracy: float | None  # of the same grids in torch; None: not asked for
    accuracy: float
    drop: float
    interval: tuple[float, float]
    ms: float
    differing: int  # tensors that read back differently
    verdict: Verdict
    notes: tuple[str, ...]


def batches(examples: Examples) -> list[dict[str, Tensor]]:
    """One example each, by name."""
    arrays = {name: torch.from_numpy(array) for name, array in examples.inputs.items()}
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(len(examples))]


def solutions(task: str, trained: Trained, ranges: RangeOptions) -> Iterable[tuple[str, QuantizedNetwork]]:
    """The solved networks by how they were solved."""
    samples = batches(trained.training.first(CALIBRATION))
    network = trace(trained.module, samples[0], name=task, mask=MASKS[task])
    options = network_solve.Options(ranges=ranges, integer=INTEGER[task])
    if task == "spam":
        network = network_smoothing.smoothed(network, samples, network_smoothing.Options())
    yield "PTQ", network_solve.solve(network, gather(network, samples), options)
    if task == "digits":
        images = torch.from_numpy(trained.training.inputs["image"])
        student = static_qat.train(trained.module, images.split(64), static_qat.Options(ranges=ranges))
        yield "QAT", network_qat.solved(trained.module, student, samples, options, task)


def answers(answer: Callable[[dict[str, Tensor]], Mapping[str, Any]], examples: Examples) -> tuple[Logits, float]:
    """(n, classes), and the median of milliseconds."""
    found, times = [], []
    for batch in batches(examples):
        start = time.perf_counter()
        (logits,) = answer(batch).values()
        times.append(1000 * (time.perf_counter() - start))
        found.append(np.asarray(logits, np.float32).reshape(1, -1))
    return np.concatenate(found), statistics.median(times)


def drop(reference: Logits, candidate: Logits, labels: Labels) -> npt.NDArray[np.float64]:
    """(n, 1): 1 where only the reference is right, −1 where only the candidate is."""
    right, also = ((logits.argmax(1) == labels).astype(np.float64) for logits in (reference, candidate))
    return (right - also)[:, None]


def measure(
    name: str, model: QuantizedNetwork, held: tuple[Examples, Logits, Logits | None], place: tuple[str, str],
    folder: Path, limit: float,
) -> Row:  # fmt: skip
    """Write, read back and judge one file."""
    (examples, float_logits, twin), (exporter, runtime) = held, place
    plugin = registry.load("network_exporters", exporter)()
    folder.mkdir(parents=True, exist_ok=True)
    artifact, notes = plugin.export(model, plugin.Options(), folder)
    differing = plugin.differences(model, artifact)
    session = registry.load("network_runtimes", runtime)().open(artifact, 1)
    logits, ms = answers(lambda batch: session.run({k: x.numpy() for k, x in batch.items()}), examples)
    session.close()
    lost = drop(float_logits, logits, examples.labels)
    interval = bootstrap_interval(lost)
    assert interval is not None, "more than one example is held out"
    gate = judge("accuracy_drop", "max", limit, Figure(float(lost.mean()), interval))
    return Row(
        solved=name,
        exporter=exporter,
        runtime=runtime,
        size_bytes=artifact.size_bytes,
        examples=len(examples),
        float_accuracy=accuracy(float_logits, examples.labels),
        twin_accuracy=None if twin is None else accuracy(twin, examples.labels),
        accuracy=accuracy(logits, examples.labels),
        drop=float(lost.mean()),
        interval=(interval.low, interval.high),
        ms=ms,
        differing=len(differing),
        verdict=worst([gate.verdict, read_back_gate(len(differing), "").verdict]),
        notes=tuple(notes),
    )


@torch.inference_mode()
def float_answers(module: nn.Module, examples: Examples) -> Logits:
    """(n, classes) of the classifier as it was trained."""
    parts = zip(*(torch.from_numpy(array).split(BATCH) for array in examples.inputs.values()), strict=True)
    found: Logits = torch.cat([module(*part) for part in parts]).numpy()
    return found


def compare(task: str, trained: Trained, out: Path, count: int, limit: float, ranges: RangeOptions) -> list[Row]:
    """A row for each solved network and runtime."""
    examples, rows = trained.evaluation.first(count), list[Row]()
    float_logits = float_answers(trained.module, examples)
    for name, model in solutions(task, trained, ranges):
        twin = answers(partial(run_quantized, model), examples)[0] if task == "digits" else None  # slow for encoders
        for place in FILES:
            folder = out / task / name / "-".join(place)
            rows.append(measure(name, model, (examples, float_logits, twin), place, folder, limit))
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """A row of the table, in points."""
    low, high = (100 * end for end in row.interval)
    return (
        f"{row.solved:4} {row.exporter:14} {row.runtime:18} {row.size_bytes / 1e6:8.3f} MB  {row.ms:8.3f} ms  "
        f"{100 * row.float_accuracy:6.2f} → {100 * row.accuracy:6.2f} %  drop {100 * row.drop:+.2f} "
        f"({low:+.2f} to {high:+.2f})  {row.verdict}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=("digits", "spam"))
    parser.add_argument("--mails", type=Path, default=Path("out/mails"), help="where npm put the mails")
    parser.add_argument("--out", type=Path, default=Path("out/tasks"))
    parser.add_argument("--examples", type=int, default=10**9, help="held-out examples that judge, at most")
    parser.add_argument("--ranges", choices=("min_max", "percentile", "mse"), default="min_max")
    parser.add_argument("--limit", type=float, default=LIMIT, help="of the drop, in shares")
    asked = parser.parse_args()
    try:
        if asked.task == "digits":
            trained = digits.Task().train(digits.Options(), SEED, silent)
        else:
            trained = spam.Task().train(spam.Options(mails=asked.mails), SEED, silent)
        print(f"{trained.facts.origin}: {trained.facts.training}; {len(trained.evaluation)} examples held out")
        ranges = RangeOptions(dtype="uint8", method=asked.ranges)
        rows = compare(asked.task, trained, asked.out, asked.examples, asked.limit, ranges)
    except LilliputError as error:
        print(f"benchmarks.tasks: error: {error}", file=sys.stderr)
        return error.exit_code
    report = {"task": asdict(trained.facts), "limit": asked.limit, "rows": [asdict(row) for row in rows]}
    (asked.out / f"{asked.task}.json").write_text(json.dumps(report, indent=2) + "\n")
    return EXIT[worst([row.verdict for row in rows])]


if __name__ == "__main__":
    sys.exit(main())
