"""The README's tables of what is supported, made by exporting and checking every cell.

    python tests/support_table.py [--only decoders|networks|gemma3|…] [--write]

First table: each row is a family on a tiny model with random weights and the family's quirks (windows, caps, norms of
heads, one key-value head, …; tiny_models.py), each column an exporter on its runtime. A cell is a whole run: the source
proven against transformers, solved, exported, read back bit for bit, and measured on the runtime beyond every window.
It shows the mean KLD that the shipped file has from the float model, and in brackets its exact twin's from torch.
Random weights lose more than trained ones: the figures tell that a cell works, not what a real model loses.

Second table: encoders, classifiers and CNNs (support_networks.py).

--write puts the rows that were made into the tables between the marks in README.md. Exit status 1 where a gate that is
always on fails.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import support_networks
import tiny_models
from support_networks import Cell

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


def decoder_cells(kind: str, folder: Path) -> list[Cell]:
    """One row of the first table."""
    makers: dict[str, Callable[[Path], Path]] = {"gpt2": tiny_models.tiny_gpt2}
    makers |= {kind: partial(_tiny, kind) for kind in tiny_models.KINDS}
    os.environ["LILLIPUT_CACHE"] = str(folder / "cache")
    model = makers[kind](folder / "hf")
    return [cell(model, target, folder / title) for title, target in COLUMNS.items()]


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


def _tiny(kind: str, folder: Path) -> Path:
    return tiny_models.tiny(kind, folder, **AS_PUBLISHED.get(kind, {}))


@dataclass(frozen=True)
class Table:
    """`labels`: name → what the row is called. `cells` makes a row, in a folder of its own."""

    corner: str
    columns: tuple[str, ...]
    labels: Mapping[str, str]
    cells: Callable[[str, Path], list[Cell]]

    def text(self, lines: Mapping[str, str]) -> str:
        """Markdown, of the rows by their labels."""
        head = [_line([self.corner, *self.columns]), _line(["---", *["---:"] * len(self.columns)])]
        return "\n".join([*head, *(lines[label] for label in self.labels.values() if label in lines)]) + "\n"


TABLES = {
    "decoders": Table("family", tuple(COLUMNS), LABELS, decoder_cells),
    "networks": Table("kind", tuple(support_networks.TARGETS), support_networks.LABELS, support_networks.cells),
}
ROWS = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def row(table: Table, name: str) -> tuple[str, bool]:
    """The line, and whether a cell failed."""
    with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
        cells = table.cells(name, Path(folder))
    line = _line([table.labels[name], *(cell.text for cell in cells)])
    print(line, file=sys.stderr, flush=True)
    return line, any(cell.failed for cell in cells)


def standing(readme: str) -> list[str]:
    """The tables between the marks."""
    body = readme.partition(BEGIN)[2].partition(END)[0]
    return ROWS.findall(body)


def by_label(text: str) -> dict[str, str]:
    """A table's rows below its head."""
    return {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()[2:]}


def write(made: Mapping[str, Mapping[str, str]]) -> None:
    """Put the rows that were made into the tables of README.md; the others stay as they are."""
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    old = standing(readme)
    assert len(old) == len(TABLES), f"{path} has {len(old)} tables between {BEGIN} and {END}"
    for before, (name, table) in zip(old, TABLES.items(), strict=True):
        readme = readme.replace(before, table.text(by_label(before) | made.get(name, {})))
    path.write_text(readme, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser()
    choices = [*TABLES, *(name for table in TABLES.values() for name in table.labels)]
    parser.add_argument("--only", action="append", default=[], choices=choices)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    only, failed = arguments.only or list(TABLES), False
    made: dict[str, dict[str, str]] = {}
    for name, table in TABLES.items():
        for wanted in (row_name for row_name in table.labels if {name, row_name} & {*only}):
            line, broken = row(table, wanted)
            made.setdefault(name, {})[table.labels[wanted]] = line
            failed |= broken
            if arguments.write:
                write(made)
    print("\n".join(TABLES[name].text(lines) for name, lines in made.items()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
