"""How often a comparison is wrong, on this machine as noisy as it is now: `python -m benchmarks.noise --out out/noise`.

    speed   A is a chain of 40 equal matrix products in ONNX Runtime (0.2 ms). A/A compares it with itself; the planted
            slowdown is the same chain with 42: 5 % more work, done by the runtime.
    loss    A is SmolLM2 rounded to int4-b32. The planted rise is its rounding error times a factor whose KLD is 10 %
            higher. A/A compares it with a file of equal size of error: every error with the other sign, the labels
            drawn anew for each chunk. Divergences are of every token, computed once; each comparison draws its chunks.

Wanted are: A/A called different (better or worse, or FAIL of the limit) in at most 2 % of the pairs, the planted rises
called worse in at least 95 of 100. The limit of the verdicts is a rise of 2 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.models import SOURCE as MODEL
from lilliput.grid import Float
from lilliput.model import SourceModel
from targets.duel import Rules, duel
from targets.paired import Judgement, Sequence, judge_loss

WIDTH, LAYERS, SLOWER = 64, 40, 42
RISE, LIMIT = 0.10, 0.02
CHUNKS, LENGTH = 48, 64
FALSE_ALARMS, CALLED = 0.02, 0.95

Double = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def chain(layers: int) -> bytes:
    """An ONNX model of that many products of (WIDTH, WIDTH) matrices."""
    rng = np.random.default_rng(0)
    shape = [WIDTH, WIDTH]
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) / WIDTH**0.5).astype(np.float32), f"w{i}")
        for i in range(layers)
    ]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(layers)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{layers}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


class Chain:
    """A contender: one run of a chain on one thread."""

    def __init__(self, model: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._inputs = {"x0": np.ones((WIDTH, WIDTH), np.float32)}

    def step(self) -> object:
        return self._session.run(None, self._inputs)

    def close(self) -> None:
        self._session = None


@dataclass(frozen=True)
class Trials:
    """What many comparisons of one kind came to. `rise` is what was planted, as measured where that can be."""

    what: str
    rise: float
    pairs: int
    findings: dict[str, int]
    verdicts: dict[str, int]
    unstable: int
    items: float  # rounds or chunks a comparison, the mean
    ratio: float  # the median of the estimates
    seconds: float

    @property
    def different(self) -> int:
        """Called better or worse; a FAIL is always called worse."""
        return self.pairs - self.findings.get("not told apart", 0)

    @property
    def kept(self) -> bool:
        if self.rise == 0:
            return self.different <= FALSE_ALARMS * self.pairs
        return self.findings.get("worse", 0) >= CALLED * self.pairs

    @property
    def line(self) -> str:
        wanted = f"at most {FALSE_ALARMS:.0%} different" if self.rise == 0 else f"at least {CALLED:.0%} worse"
        found = ", ".join(f"{name} {count}" for name, count in sorted((self.findings | self.verdicts).items()))
        return (
            f"{self.what}: {self.pairs} pairs, wanted {wanted}: {found}, unstable {self.unstable}; "
            f"ratio {self.ratio:.3f}, {self.items:.1f} items a pair, {self.seconds:.0f} s: "
            f"{'kept' if self.kept else 'MISSED'}"
        )


def speed(what: str, layers: int, pairs: int) -> Trials:
    """Chains of LAYERS against chains of `layers`, many times over."""
    a, b = partial(Chain, chain(LAYERS)), partial(Chain, chain(layers))
    started, duels = time.perf_counter(), []
    for number in range(pairs):
        duels.append(duel(a, b, Rules(max_rise=LIMIT, seed=number)))
        if (number + 1) % 20 == 0:
            print(f"  {what}: {number + 1} of {pairs}", file=sys.stderr, flush=True)
    judged = [found.judgement for found in duels]
    findings = Counter("unstable" if d.unstable or d.judgement is None else d.judgement.finding for d in duels)
    alarms = {"not told apart": findings.pop("unstable", 0) + findings["not told apart"]}
    return Trials(
        what=what, rise=layers / LAYERS - 1, pairs=pairs, findings=dict(findings) | alarms,
        verdicts=dict(Counter(d.verdict for d in duels)), unstable=sum(d.unstable is not None for d in duels),
        items=float(np.mean([d.rounds for d in duels])), ratio=float(np.median([j.ratio for j in judged if j])),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def loss(what: str, a: Double, b: Double, pairs: int, *, swap: bool) -> Trials:
    """(chunks,) divergences of A and B; `swap` draws anew for each chunk which of the two is A."""
    started, rng, judged = time.perf_counter(), np.random.default_rng(0), []
    for _ in range(pairs):
        order = rng.permutation(len(a))
        both = np.stack([a[order], b[order]])
        if swap:
            both = np.where(rng.integers(0, 2, len(a)), both, both[::-1])
        judged.append(_drawn(both))
    return Trials(
        what=what, rise=0.0 if swap else float(b.mean() / a.mean() - 1), pairs=pairs,
        findings=dict(Counter(j.finding for j in judged)), verdicts=dict(Counter(j.verdict for j in judged)),
        unstable=0, items=float(np.mean([j.items for j in judged])),
        ratio=float(np.median([j.ratio for j in judged])), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _drawn(both: Double) -> Judgement:
    """Chunks as they come, until the verdict is PASS or FAIL, or there are no more looks."""
    sequence = Sequence()
    for look in sequence.looks:
        found = judge_loss(both[0, :look], both[1, :look], LIMIT, sequence.level)
        if found.verdict != "INCONCLUSIVE":
            break
    return found


class Errors(Mapping[str, Float]):
    """A model's weights with `factor` times the error that rounding to int4-b32 makes in its linear layers."""

    def __init__(self, source: SourceModel, rounded: Mapping[str, Float], factor: float) -> None:
        self._source, self._rounded, self._factor = source.weights, rounded, np.float32(factor)

    def __getitem__(self, name: str) -> Float:
        weight = self._source[name]
        return weight + self._factor * (self._rounded[name] - weight) if name in self._rounded else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


def divergences(model: str, folder: Path) -> Double:
    """(3, chunks): mean divergence of A, of A with every error's sign changed, and of A with a planted rise."""
    from calibration.solve import solve
    from lilliput.recipe_schema import FLOAT, Rule
    from lilliput.source import load
    from lilliput.tokenizer_folder import load_tokenizer
    from targets.reference import compare, compute, evaluation_set

    shutil.rmtree(folder, ignore_errors=True)
    source = load(model, folder / "source", proof=False)
    rtn = {"name": "rtn", "candidates": 1, "refine": 0}
    solved = solve(
        source,
        [Rule.model_validate({"match": "layers.*", "grid": "int4-b32", "solver": rtn}), Rule(match="*", grid=FLOAT)],
        None,
    )
    rounded = {name: tensor.dequantize() for name, tensor in solved.quantized.items()}
    tokenizer = load_tokenizer(source.tokenizer)
    evaluation = evaluation_set(lambda text: tokenizer.encode(text, add_special_tokens=False), CHUNKS, LENGTH)
    reference = compute(source.config, source.weights, evaluation, folder / "reference")
    found = []
    for factor in (1.0, -1.0, (1 + RISE) ** 0.5):  # a divergence grows with the square of a small error
        logits = compute(source.config, Errors(source, rounded, factor), evaluation, folder / "candidate")
        found.append(compare(reference, logits, evaluation).kld.mean(axis=1))
        print(f"  KLD with {factor:+.3f} times the error: {found[-1].mean():.4f}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return np.stack(found)


def kept_divergences(model: str, out: Path) -> Double:
    """Computed once: they do not depend on the machine's noise."""
    path = out / "divergences.json"
    wanted = {"model": model, "chunks": CHUNKS, "length": LENGTH, "rise": RISE}
    if path.is_file() and (held := json.loads(path.read_text()))["of"] == wanted:
        return np.array(held["divergences"])
    found = divergences(model, out / "work")
    path.write_text(json.dumps({"of": wanted, "divergences": found.tolist()}) + "\n")
    return found


def run(arguments: argparse.Namespace) -> list[Trials]:
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    found = []
    if arguments.only != "speed":
        a, mirrored, raised = kept_divergences(arguments.model, out)
        found.append(loss("loss, A/A", a, mirrored, arguments.alike, swap=True))
        found.append(loss(f"loss, {RISE:.0%} more", a, raised, arguments.planted, swap=False))
        print("\n".join(trials.line for trials in found), flush=True)
    if arguments.only != "loss":
        for what, layers, pairs in (
            ("speed, A/A", LAYERS, arguments.alike),
            (f"speed, {SLOWER / LAYERS - 1:.0%} slower", SLOWER, arguments.planted),
        ):
            found.append(speed(what, layers, pairs))
            print(found[-1].line, flush=True)
    (out / "noise.json").write_text(json.dumps([asdict(trials) for trials in found], indent=2) + "\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/noise"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--alike", type=int, default=200, help="A/A pairs")
    parser.add_argument("--planted", type=int, default=100, help="pairs with a planted rise")
    parser.add_argument("--only", choices=("speed", "loss"))
    return 0 if all(trials.kept for trials in run(parser.parse_args())) else 1


if __name__ == "__main__":
    sys.exit(main())
