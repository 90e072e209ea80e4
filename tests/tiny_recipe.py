"""A recipe on the tiny random Llama of tiny_models: seconds for a whole run, with the three real runtimes."""

from __future__ import annotations

from pathlib import Path

from lilliput.recipe import Recipe, load

TARGETS = {
    "onnx": "{name: onnx, exporter: onnx_int4, runtime: ort_cpu}",
    "litert": "{name: litert, exporter: litert_int8, runtime: litert_cpu}",
    "gguf": "{name: gguf, exporter: gguf_llamacpp, runtime: llamacpp_cpu}",
}
TEXT = """\
name: tiny
model: {{source: "{model}", name: tiny}}
seed: 3
context: 64
prefill: 16
calibration: {{samples: self, count: 4, length: 32}}
quantize:
  - {{match: "layers.*", grid: int4-b32, solver: gptq}}
  - {{match: "embedding", grid: int8-channel, solver: rtn}}
evaluation: {{text: builtin, count: 2, length: 32}}
targets:
{targets}
gates: [{{metric: exact_step_kld, max: 0.0001}}]
"""


def write(folder: Path, model: Path, targets: tuple[str, ...] = ("onnx", "litert", "gguf")) -> Path:
    """The recipe's file."""
    lines = "\n".join(f"  - {TARGETS[name]}" for name in targets)
    path = folder / "tiny.yaml"
    path.write_text(TEXT.format(model=model, targets=lines))
    return path


def recipe(folder: Path, model: Path, *overrides: str, targets: tuple[str, ...] = ("onnx", "litert", "gguf")) -> Recipe:
    return load(write(folder, model, targets), overrides)
