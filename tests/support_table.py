"""The README's table of what is supported, made by exporting and checking every cell.

    python tests/support_table.py [--only gemma3] [--write]

Each row is a family on a tiny model with random weights and the family's quirks (windows, caps, norms of heads, one
key-value head, …; tiny_models.py), each column an exporter on its runtime. A cell is a whole run: the source proven
against transformers, solved, exported, read back bit for bit, and measured on the runtime beyond every window. It shows
the mean KLD that the shipped file has from the float model, and in brackets what its exact twin differs from torch.
Random weights lose more than trained ones: the figures tell that a cell works, not what a real model loses.

--write puts the table between the marks in README.md. Exit status 1 where a gate that is always on fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tiny_models

from lilliput import figures
from lilliput.errors import ExportError
from lilliput.results import TargetResult

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- support: tests/support_table.py -->", "<!-- support: end -->"
COLUMNS = {
    "ONNX Runtime": "{name: t, exporter: onnx_int4, runtime: ort_cpu}",
    "LiteRT": "{name: t, exporter: {name: litert_int8, bundle: false}, runtime: litert_cpu}",
    "llama.cpp": "{name: t, exporter: gguf_llamacpp, runtime: llamacpp_cpu}",
}
RECIPE = """\
name: cell
model: {{source: "{model}"}}
context: 64
prefill: 16
calibration: {{samples: self, count: 2, length: 32}}
quantize:
  - {{match: "layers.*", grid: int4-b32}}
  - {{match: "*", grid: int8-channel}}
evaluation: {{count: 2, length: 48}}
targets: [{target}]
"""
LABELS = {
    "llama": "Llama, SmolLM, SmolLM2", "mistral": "Mistral (sliding window)", "gpt2": "GPT-2", "qwen2": "Qwen 2, 2.5",
    "qwen3": "Qwen 3", "gemma2": "Gemma 2", "gemma3": "Gemma 3 (text)", "phi3": "Phi 3", "smollm3": "SmolLM 3",
}  # fmt: skip


# The scale of scores that published models have: 1 / sqrt(head_dim). The tests' tiny models have one of their own.
AS_PUBLISHED = {"gemma2": {"query_pre_attn_scalar": 16}, "gemma3": {"query_pre_attn_scalar": 32}}


@dataclass(frozen=True)
class Cell:
    text: str
    failed: bool = False


def cell(model: Path, target: str, folder: Path) -> Cell:
    """Run one cell; a combination that is refused says so."""
    from lilliput import pipeline
    from lilliput.recipe import load

    folder.mkdir(parents=True)
    recipe = folder / "cell.yaml"
    recipe.write_text(RECIPE.format(model=model, target=target))
    try:
        made = pipeline.run(pipeline.plan(load(recipe), folder / "out")).report
    except ExportError as error:
        print(f"refused: {error}", file=sys.stderr)
        return Cell("refused")
    return shown(made.targets[0])


def shown(result: TargetResult) -> Cell:
    broken = [gate for gate in result.gates if gate.name in ("read_back", "exact_step_kld") and gate.verdict != "PASS"]
    if broken or result.accuracy is None:
        why = ", ".join(f"{gate.name} {gate.value}" for gate in broken) or "; ".join(result.notes)
        print(f"FAILED: {why}", file=sys.stderr)
        return Cell(f"**fails** ({why})", failed=True)
    exact = next(rung.step_kld for rung in result.ladder if rung.rung == "exact")
    return Cell(f"{figures.number(result.accuracy.mean_kld)} ({figures.number(exact)})")


def rows(only: Sequence[str]) -> Iterator[tuple[str, list[Cell]]]:
    """Each family with its cells, as they come."""
    makers: dict[str, Callable[[Path], Path]] = {"gpt2": tiny_models.tiny_gpt2}
    makers |= {kind: partial(_tiny, kind) for kind in tiny_models.KINDS}
    for kind in sorted(only or makers, key=list(LABELS).index):
        with tempfile.TemporaryDirectory(prefix="lilliput-") as name:
            folder = Path(name)
            os.environ["LILLIPUT_CACHE"] = str(folder / "cache")
            model = makers[kind](folder / "hf")
            yield LABELS[kind], [cell(model, target, folder / title) for title, target in COLUMNS.items()]


def _tiny(kind: str, folder: Path) -> Path:
    return tiny_models.tiny(kind, folder, **AS_PUBLISHED.get(kind, {}))


def table(found: Sequence[tuple[str, list[Cell]]]) -> str:
    head = ["| family |" + "".join(f" {title} |" for title in COLUMNS), "| --- |" + " ---: |" * len(COLUMNS)]
    body = [f"| {label} | " + " | ".join(cell.text for cell in cells) + " |" for label, cells in found]
    return "\n".join([*head, *body]) + "\n"


def write(text: str) -> None:
    """Put the table between the marks of README.md."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"README.md has no {BEGIN} … {END}"
    readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", default=[], choices=list(LABELS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = []
    for row in rows(arguments.only):
        found.append(row)
        print(f"{row[0]}: {[cell.text for cell in row[1]]}", file=sys.stderr, flush=True)
    print(table(found))
    if arguments.write:
        write(table(found))
    return int(any(cell.failed for _, cells in found for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
