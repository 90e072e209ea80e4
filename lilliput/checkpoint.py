"""The checkpoint between calibration and export: one folder with every code, scale and float of a QuantizedModel.

    codes.safetensors   {name}.codes (int8 or uint8), {name}.scales (float32), {name}.offsets (uint8 or float32),
                        {name}.supers (float32), {name}.columns (int64) and .values (float32) of columns at 16 bit
    floats.safetensors  {name} (float32)
    model.json          name, config, grid per quantized tensor, provenance, steps
    tokenizer/          the source's tokenizer files

Written in sorted order without timestamps: the same model gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lilliput.grid import Outliers, QuantizedTensor, grid
from lilliput.model import DecoderConfig, QuantizedModel, SolveStep


def save(model: QuantizedModel, folder: Path) -> None:
    """Write `model` into `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    codes: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
    for name, tensor in sorted(model.quantized.items()):
        codes[f"{name}.codes"], codes[f"{name}.scales"] = tensor.codes, tensor.scales
        if tensor.offsets is not None:
            codes[f"{name}.offsets"] = tensor.offsets
        if tensor.supers is not None:
            codes[f"{name}.supers"] = tensor.supers
        if tensor.outliers is not None:
            codes[f"{name}.columns"], codes[f"{name}.values"] = tensor.outliers.columns, tensor.outliers.values
    save_file({k: np.ascontiguousarray(v) for k, v in codes.items()}, folder / "codes.safetensors")
    save_file({k: np.ascontiguousarray(v) for k, v in sorted(model.floats.items())}, folder / "floats.safetensors")
    shutil.copytree(model.tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    text = {
        "name": model.name,
        "config": asdict(model.config),
        "grids": {name: tensor.spec.name for name, tensor in sorted(model.quantized.items())},
        "provenance": dict(model.provenance),
        "steps": [asdict(step) for step in model.steps],
    }
    (folder / "model.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> QuantizedModel:
    """Read what `save` wrote."""
    text = json.loads((folder / "model.json").read_text())
    parts = load_file(folder / "codes.safetensors")
    quantized = {
        name: QuantizedTensor(
            grid(spec),
            parts[f"{name}.codes"],
            parts[f"{name}.scales"],
            parts.get(f"{name}.offsets"),
            parts.get(f"{name}.supers"),
            Outliers(parts[f"{name}.columns"], parts[f"{name}.values"]) if f"{name}.columns" in parts else None,
        )
        for name, spec in text["grids"].items()
    }
    floats = load_file(folder / "floats.safetensors")
    steps = tuple(SolveStep(**step) for step in text.get("steps", ()))
    config, tokenizer = DecoderConfig(**text["config"]), folder / "tokenizer"
    return QuantizedModel(text["name"], config, quantized, floats, tokenizer, text["provenance"], steps)
