"""An encoder or CNN from its source to one proven file of integers: `lilliput network`.

    source ─► trace ─► calibrate ─► solve ─► export ─► read back ─► on its runtime ─► report.json

A Keras model or SavedModel is not traced: tensorflow's own converter chooses the codes (lilliput.converted), and two
interpreters must agree on its file. For an exporter without activation grids (GGUF) the weights alone are solved.

Samples are text for a model with a tokenizer (paragraphs; Python's reference where none is given), or an .npz file with
one array (n, …) per input. Every HELD_OUT-th sample is kept from calibration and judges. The loss is SQNR in dB, one
figure a rung: the solved network in torch (`twin`), and the file on its runtime (`runtime`). Gates: the file reads back
without a difference; SQNR on the runtime; and for a chip, the share of nodes that its NPU takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from calibration import network_solve, network_weights
from calibration.clipping import RangeOptions
from calibration.network_statistics import gather
from exporters.base import WeightsExporter
from lilliput import converted, output, registry
from lilliput.artifact import Artifact, sha256
from lilliput.checks import check
from lilliput.converted.judged import agreement, float_left, steps
from lilliput.delegation import Delegation, counted, delegation
from lilliput.errors import CalibrationError, InputError
from lilliput.grid import Float
from lilliput.network import Network, QuantizedNetwork
from lilliput.network.run import run, run_quantized
from lilliput.results import Record, Verdict, worst
from lilliput.source import resolve
from lilliput.sources.network import NetworkSource, open_network
from lilliput.texts import calibration_text
from lilliput.tokenizer_folder import load_tokenizer
from targets.npu import Coverage, cover, soc

HELD_OUT = 8
SOLVED = ("exporter", "runtime", "activations", "solver", "grids", "positions", "chip")  # not asked of a converter
STATIC = ("activations", "integer", "chip")  # what is not asked of a format that holds weights alone
MOST_DB = 200.0  # below float32's own rounding
SHORT = 60  # characters of a paragraph that is left out, at most
Batch = dict[str, Tensor]


class Request(BaseModel):
    """What is asked for. `chip` is a Snapdragon whose NPU is to take at least `npu_floor` of the nodes.

    `grids` are the weights', for a format that holds those alone: each matrix takes the first that its rows can have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    out: Path
    exporter: str = "onnx_qdq"
    runtime: str = "ort_static_cpu"
    activations: Literal["uint8", "int8", "uint16", "int16"] = "uint16"
    integer: network_solve.Integer = "all"
    solver: str = "gptq"
    grids: tuple[str, ...] = ()
    positions: int = Field(default=128, ge=1)
    samples: Path | None = None
    count: int = Field(default=144, ge=HELD_OUT)
    min_sqnr_db: float = 30.0
    chip: str | None = None
    npu_floor: float = Field(default=1.0, ge=0, le=1)
    allow_pickle: bool = False


class NetworkGate(Record):
    name: str
    seen: float
    least: float

    @property
    def verdict(self) -> Verdict:
        return "PASS" if self.seen >= self.least else "FAIL"


class NetworkReport(Record):
    """What is written to report.json."""

    source: str
    proof: str
    notes: tuple[str, ...]  # of tracing and of the exporter: what is not as it was, or stays in float
    solved: dict[str, str]
    file: str
    sha256: str
    size_bytes: int
    differences: tuple[str, ...]
    calibration_samples: int
    held_out: int
    sqnr_db: dict[str, float]
    coverage: Coverage | None
    xnnpack: Delegation | None  # of a .tflite: which operators LiteRT's CPU delegate takes
    gates: tuple[NetworkGate, ...]
    verdict: Verdict


def quantize(request: Request) -> NetworkReport:
    """Make the file in `request.out` and prove it. Raises LilliputError; nothing foreign is overwritten."""
    registry.check_name("network_exporters", request.exporter)
    registry.check_name("network_runtimes", request.runtime)
    if request.chip is not None:
        soc(request.chip)
    output.check(request.out)
    path = resolve(request.source)
    if converted.is_source(path):
        return _of_tensorflow(request, path)
    _check_request(request)
    source = open_network(path, positions=request.positions, allow_pickle=request.allow_pickle)
    if _weights_alone(request):
        registry.load("network_exporters", request.exporter)().check(source.network)
    given = samples(source, request)
    held, kept = given[::HELD_OUT], [batch for i, batch in enumerate(given) if i % HELD_OUT]
    model = _solved(request, source.network, kept)
    with output.claimed(request.out):
        report = _written(request, source, model, (held, len(kept)))
        (request.out / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    return report


def _check_request(request: Request) -> None:
    """Raise InputError where the runtime does not open what the exporter writes, or for what that has not."""
    opens = registry.constant("network_runtimes", request.runtime, "exporters")
    assert isinstance(opens, tuple)
    if request.exporter not in opens:
        raise InputError(
            f"runtime {request.runtime!r} opens files of {', '.join(opens)}, not of {request.exporter!r}: "
            "choose another (`lilliput list network_runtimes`)"
        )
    alone = _weights_alone(request)
    asked = [name for name in (STATIC if alone else ("grids",)) if name in request.model_fields_set]
    if asked:
        why = "holds weights alone" if alone else "has its own weight grid"
        raise InputError(f"exporter {request.exporter!r} {why}: leave {', '.join(asked)} out")


def _weights_alone(request: Request) -> bool:
    return not registry.constant("network_exporters", request.exporter, "activations")


def _solved(request: Request, network: Network, batches: Sequence[Batch]) -> QuantizedNetwork:
    if not _weights_alone(request):
        ranges = RangeOptions(dtype=request.activations)
        static = network_solve.Options(solver=request.solver, ranges=ranges, integer=request.integer)
        statistics = gather(network, batches, moments=network_solve.needs_moments(static))
        return network_solve.solve(network, statistics, static)
    exporter: WeightsExporter = registry.load("network_exporters", request.exporter)()
    options = network_weights.Options(solver=request.solver, grids=request.grids or network_weights.DEFAULT_GRIDS)
    assigned = network_weights.assign(network, options.grids, exporter.refuses)
    return network_weights.solve(network, gather(network, batches, moments=True), assigned, options)


def _written(
    request: Request, source: NetworkSource, model: QuantizedNetwork, given: tuple[Sequence[Batch], int]
) -> NetworkReport:
    plugin = registry.load("network_exporters", request.exporter)()
    artifact, notes = plugin.export(model, plugin.Options(), request.out)
    differences = plugin.differences(model, artifact)
    held, calibrated = given
    real = partial(_at_tokens, model.network.mask if _weights_alone(request) else None)
    exact = [real(batch, run(model.network, batch)) for batch in held]
    chip = {"chip": request.chip} if request.chip and request.runtime == "qnn_npu" else {}
    shipped = _on_runtime(request.runtime, artifact, held, **chip)
    found = {
        "twin": sqnr_db(exact, [real(batch, run_quantized(model, batch)) for batch in held]),
        "runtime": sqnr_db(exact, [real(*pair) for pair in zip(held, shipped, strict=True)]),
    }
    coverage = cover.coverage(artifact.path, soc(request.chip)) if request.chip else None
    gates = [
        NetworkGate(name="reads_back", seen=float(not differences), least=1.0),
        NetworkGate(name="sqnr_db", seen=found["runtime"], least=request.min_sqnr_db),
    ]
    if coverage is not None:
        gates.append(NetworkGate(name="npu_share", seen=coverage.share, least=request.npu_floor))
    return NetworkReport(
        source=request.source, proof=source.proof, notes=(*source.network.notes, *notes), solved=dict(model.provenance),
        file=artifact.main_file, sha256=sha256(artifact.path), size_bytes=artifact.size_bytes,
        differences=tuple(differences), calibration_samples=calibrated, held_out=len(held), sqnr_db=found,
        coverage=coverage, xnnpack=_xnnpack(artifact.path), gates=tuple(gates),
        verdict=worst([gate.verdict for gate in gates]),
    )  # fmt: skip


def _at_tokens(mask: str | None, batch: Batch, answer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The answer with hidden states (1, positions, …) of padding left out, which llama.cpp does not compute."""
    if mask is None:
        return dict(answer)
    kept = batch[mask].bool()
    return {name: x[kept] if x.dim() > 2 and x.shape[:2] == kept.shape else x for name, x in answer.items()}


def _xnnpack(path: Path) -> Delegation | None:
    return delegation(path) if path.suffix == ".tflite" else None


def _of_tensorflow(request: Request, path: Path) -> NetworkReport:
    """The file that tensorflow's converter makes, judged on both interpreters."""
    asked = [name for name in SOLVED if name in request.model_fields_set]
    if asked:
        raise InputError(f"{path}: tensorflow's converter chooses its codes, not {', '.join(asked)}: leave that out")
    made = converted.convert(
        path, request.samples, held_out=HELD_OUT, most=request.count, allow_unsafe=request.allow_pickle
    )
    with output.claimed(request.out):
        artifact = Artifact(request.out, converted.EXPORTER, "model.tflite", 0, 0)
        artifact.path.write_bytes(made.tflite)
        report = _judged(request, made, artifact)
        (request.out / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    return report


def _judged(request: Request, made: converted.Converted, artifact: Artifact) -> NetworkReport:
    split = [{name: torch.from_numpy(x[i]) for name, x in made.inputs.items()} for i in range(made.held_out)]
    exact = [{name: torch.from_numpy(x[i]) for name, x in made.outputs.items()} for i in range(made.held_out)]
    found = {runtime: _on_runtime(runtime, artifact, split) for runtime in converted.RUNTIMES}
    losses = {runtime: sqnr_db(exact, answers) for runtime, answers in found.items()}
    agreed = agreement(steps(artifact.path), made.outputs, *(_together(answers) for answers in found.values()))
    left, checked = float_left(artifact.path), check(artifact.path)
    gates = [
        NetworkGate(name="sqnr_db", seen=min(losses.values()), least=request.min_sqnr_db),
        NetworkGate(name="agreement", seen=agreed.share, least=1.0),
        NetworkGate(name="truth_check", seen=float(not checked.errors), least=1.0),
    ]
    if request.integer == "all":
        gates.insert(0, NetworkGate(name="integer_share", seen=left.integer_share, least=1.0))
    notes = [str(agreed), *(f"left in float: {place}" for place in left.places)]
    notes += [f"truth-check: {f.severity} {f.rule} at {f.place}: {f.seen}" for f in (*checked.findings, *checked.notes)]
    return NetworkReport(
        source=request.source, proof=made.proof, notes=tuple(notes), solved=converted.provenance(made),
        file=artifact.main_file, sha256=sha256(artifact.path), size_bytes=artifact.size_bytes, differences=(),
        calibration_samples=made.calibration_samples, held_out=made.held_out, sqnr_db=losses, coverage=None,
        xnnpack=_xnnpack(artifact.path), gates=tuple(gates), verdict=worst([gate.verdict for gate in gates]),
    )  # fmt: skip


def _on_runtime(name: str, artifact: Artifact, batches: Sequence[Batch], **chip: str) -> list[dict[str, Tensor]]:
    runtime = registry.load("network_runtimes", name)()
    session = runtime.open(artifact, 1, **chip)
    try:
        found = [session.run({name: x.numpy() for name, x in batch.items()}) for batch in batches]
    finally:
        session.close()
    return [{name: torch.from_numpy(array) for name, array in answer.items()} for answer in found]


def _together(answers: Sequence[Mapping[str, Tensor]]) -> dict[str, Float]:
    """(n, 1, …) by output."""
    return {name: np.stack([answer[name].numpy() for answer in answers]) for name in answers[0]}


def sqnr_db(exact: Sequence[Mapping[str, Tensor]], found: Sequence[Mapping[str, Tensor]]) -> float:
    """10·log10(Σ x² / Σ (x − y)²) over all outputs; at most MOST_DB, where there is no difference."""
    signal = noise = 0.0
    for x, y in zip(exact, found, strict=True):
        for name, array in x.items():
            signal += float((array.double() ** 2).sum())
            noise += float(((array - y[name]).double() ** 2).sum())
    return min(MOST_DB, 10 * float(np.log10(signal / noise))) if noise and signal else MOST_DB


def samples(source: NetworkSource, request: Request) -> list[Batch]:
    """One sample each, by input. Raises CalibrationError where they do not fit the network, or are too few."""
    if request.samples is not None and request.samples.suffix == ".npz":
        found = _arrays(source.network, request.samples)
    elif source.tokenizer is not None:
        text = _text(request.samples) if request.samples is not None else calibration_text()
        found = paragraphs(source.tokenizer, text, request.count, request.positions)
    else:
        raise CalibrationError(f"{request.source} has no tokenizer: give --samples, an .npz with an array per input")
    if len(found) < HELD_OUT:
        raise CalibrationError(f"{len(found)} samples, wanted {HELD_OUT} at least: give more by --samples")
    return found[: request.count]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"--samples {path}: not a readable text ({error})") from error


def paragraphs(tokenizer_folder: Path, text: str, count: int, positions: int) -> list[Batch]:
    """Token ids of `count` paragraphs, evenly taken, each padded or cut to `positions`."""
    tokenizer = load_tokenizer(tokenizer_folder)
    long = [part.strip() for part in text.split("\n\n") if len(part.strip()) > SHORT]
    found = []
    for part in long[:: max(1, len(long) // count)][:count]:
        tokens = tokenizer(part, padding="max_length", truncation=True, max_length=positions, return_tensors="pt")
        found.append({"input_ids": tokens.input_ids.int(), "attention_mask": tokens.attention_mask.int()})
    return found


def _arrays(network: Network, path: Path) -> list[Batch]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise CalibrationError(f"--samples {path}: not a readable .npz of plain arrays ({error})") from error
    for info in network.inputs:
        if info.name not in arrays or arrays[info.name].shape[1:] != info.shape[1:]:
            seen = f"{info.name} {arrays[info.name].shape}" if info.name in arrays else f"only {sorted(arrays)}"
            raise CalibrationError(f"--samples {path}: {seen}, wanted {info.name} (n, {str(info.shape[1:])[1:]}")
    counts = {len(arrays[info.name]) for info in network.inputs}
    if len(counts) != 1:
        raise CalibrationError(f"--samples {path}: its arrays have {sorted(counts)} samples, wanted one number")
    return [
        {i.name: torch.from_numpy(arrays[i.name][n : n + 1].astype(i.dtype)) for i in network.inputs}
        for n in range(counts.pop())
    ]


def lines(report: NetworkReport) -> list[str]:
    """The report for a terminal."""
    rungs = ", ".join(f"{value:.1f} dB {rung}" for rung, value in report.sqnr_db.items())
    return [
        f"{report.file}: {report.size_bytes / 1e6:.1f} MB, {report.solved['weights']}, {report.solved['activations']}",
        report.proof,
        *report.notes,
        f"SQNR against float on {report.held_out} held-out samples: {rungs}",
        *([report.coverage.sentence()] if report.coverage else []),
        *([f"XNNPACK takes {counted(report.xnnpack.taken)}: {report.xnnpack}"] if report.xnnpack else []),
        *(f"{gate.verdict} {gate.name}: {gate.seen:.4g}, at least {gate.least:.4g}" for gate in report.gates),
    ]
