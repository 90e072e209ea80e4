"""`python -m benchmarks.defects`: defects planted in real files, which rule of the truth-check caught each, and where.

The model is the first layers of a real one (weights, vocabulary and all), rounded to nearest and exported to the three
formats. The sound files come first: they must raise no alarm. Exit code 1 where a defect was missed or one did.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.defects import DEFECTS
from benchmarks.defects.planting import MODEL_FILES, caught, spoiled
from benchmarks.models import SOURCE as MODEL
from calibration.solve import solve
from lilliput import checks, registry, source
from lilliput.checks.base import Format
from lilliput.decoder import Decoder
from lilliput.model import SourceModel
from lilliput.recipe_schema import Rule
from lilliput.trace import trace

EXPORTERS: Mapping[Format, str] = {"onnx": "onnx_int4", "gguf": "gguf_llamacpp", "tflite": "litert_int8"}
RULES = (("layers.*", "int4-b32"), ("*", "int8-channel"))
CONTEXT, PREFILL = 128, 16


@dataclass(frozen=True)
class Row:
    """One line of the table. `rule` is empty where nothing was found that should have been."""

    format: Format
    defect: str
    wanted: str
    rule: str
    place: str
    seen: str

    @property
    def good(self) -> bool:
        return bool(self.rule) == bool(self.wanted)


def first_layers(model: SourceModel, count: int) -> SourceModel:
    """The model without its later layers."""
    config = replace(model.config, num_layers=count, windows=model.config.windows[:count])
    weights = {name: model.weights[name] for name in config.parameter_shapes()}
    return replace(model, config=config, weights=weights)


def export(model: SourceModel, folder: Path, formats: list[Format]) -> None:
    """Files in folder/FORMAT."""
    rules = [Rule.model_validate({"match": match, "grid": grid, "solver": "rtn"}) for match, grid in RULES]
    quantized, traced = solve(model, rules, None), trace(Decoder(model.config), CONTEXT, PREFILL)
    for form in formats:
        exporter = registry.load("exporters", EXPORTERS[form])()
        (folder / form).mkdir()
        exporter.export(quantized, traced, exporter.Options(), folder / form)


def rows(model: SourceModel, folder: Path, formats: list[Format]) -> list[Row]:
    """The sound files, then every defect; each copy goes when it was checked."""
    held, made = checks.source_of(model), list[Row]()
    export(model, folder, formats)
    for form in formats:
        alarms = checks.check(folder / form / MODEL_FILES[form], held).findings
        made += [Row(form, "none", "", f.rule, f.place, f.seen) for f in alarms] or [Row(form, "none", "", "", "", "")]
        show(made[-1])
    for defect in (defect for defect in DEFECTS if defect.format in formats):
        with tempfile.TemporaryDirectory(dir=folder) as copy:
            found = caught(defect, spoiled(defect, folder / defect.format, Path(copy) / "artifact", held))
        seen = (found.rule, found.place, found.seen) if found else ("", "", "")
        made.append(Row(defect.format, defect.name, defect.rule, *seen))
        show(made[-1])
    return made


def show(row: Row) -> None:
    cells = (row.format, row.defect, row.rule or ("no alarm" if row.good else "MISSED"), row.place, row.seen)
    print("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a source, as `lilliput run --model` takes it")
    parser.add_argument("--layers", type=int, default=2, help="of the model that are kept (at least 2)")
    parser.add_argument("--only", choices=sorted(EXPORTERS), help="one format")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    asked = parser.parse_args()
    print("| format | planted | caught by | place | seen |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="defects-") as name:
        model = source.load(asked.model, Path(name) / "source", proof=False)
        made = rows(first_layers(model, asked.layers), Path(name), [asked.only] if asked.only else list(EXPORTERS))
    planted = [row for row in made if row.wanted]
    print(f"\n{sum(row.good for row in planted)} of {len(planted)} defects caught, the place named; "
          f"{sum(not row.good for row in made if not row.wanted)} alarms on sound files")  # fmt: skip
    if asked.out:
        asked.out.write_text(json.dumps([asdict(row) for row in made], indent=2, ensure_ascii=False) + "\n")
    return 0 if all(row.good for row in made) else 1


if __name__ == "__main__":
    sys.exit(main())
