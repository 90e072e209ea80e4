"""The checkpoint between calibration and export: one folder with every code, scale and float of a QuantizedModel.

    codes.safetensors   {name}.codes (int8 or uint8), {name}.scales (float32), {name}.offsets (uint8 or float32),
                        {name}.supers (float32), {name}.columns (int64) and .values (float32) of columns at 16 bit
    floats.safetensors  {name} (float32)
    model.json          name, config, grid per quantized tensor, provenance, steps
    tokenizer/          the source's tokenizer files

Written in sorted order without timestamps: the same model gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lilliput.artifact import sha256
from lilliput.grid import Outliers, QuantizedTensor, grid
from lilliput.model import DecoderConfig, QuantizedModel, SolveStep

PARTS = ("codes", "scales", "offsets", "supers", "columns", "values")


def save(model: QuantizedModel, folder: Path) -> None:
    """Write `model` into `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_codes(model.quantized, folder / "codes.safetensors")
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


def digest(folder: Path) -> str:
    """Hex sha256 over the numbers that a checkpoint holds: codes, scales, floats."""
    parts = (sha256(folder / name) for name in ("codes.safetensors", "floats.safetensors"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def load(folder: Path) -> QuantizedModel:
    """Read what `save` wrote."""
    text = json.loads((folder / "model.json").read_text())
    quantized = dict(Codes(folder / "codes.safetensors", text["grids"]))
    floats = load_file(folder / "floats.safetensors")
    steps = tuple(SolveStep(**step) for step in text.get("steps", ()))
    config, tokenizer = DecoderConfig(**text["config"]), folder / "tokenizer"
    return QuantizedModel(text["name"], config, quantized, floats, tokenizer, text["provenance"], steps)


def save_codes(tensors: Mapping[str, QuantizedTensor], path: Path) -> None:
    """Write the parts of each tensor; their grids are the caller's to keep."""
    parts = {f"{name}.{end}": array for name, tensor in sorted(tensors.items()) for end, array in _parts(tensor)}
    save_file({k: np.ascontiguousarray(v) for k, v in parts.items()}, path)


def _parts(tensor: QuantizedTensor) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    held = (tensor.codes, tensor.scales, tensor.offsets, tensor.supers, *tensor.kept)
    return ((end, array) for end, array in zip(PARTS, held, strict=True) if array is not None)


class Codes(Mapping[str, QuantizedTensor]):
    """What `save_codes` wrote, each tensor read when asked for; the file is opened anew for each."""

    def __init__(self, path: Path, grids: Mapping[str, str]) -> None:
        self._path, self._grids = path, grids

    def __getitem__(self, name: str) -> QuantizedTensor:
        spec = grid(self._grids[name])
        with safe_open(self._path, framework="numpy") as file:
            there = set(file.keys())
            ends = [end for end in PARTS if f"{name}.{end}" in there]
            parts: dict[str, Any] = {end: file.get_tensor(f"{name}.{end}") for end in ends}
        kept = Outliers(parts.pop("columns"), parts.pop("values")) if "columns" in parts else None
        return QuantizedTensor(spec, **parts, outliers=kept)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._grids))

    def __len__(self) -> int:
        return len(self._grids)
