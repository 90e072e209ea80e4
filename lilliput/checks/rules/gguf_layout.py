"""The layout of a GGUF file: where tensors lie, and whether every layer has all of its own.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import gguf

from lilliput.checks.base import GGUF, Rule, Seen
from lilliput.checks.opened import Opened

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
ANOMALY = 0.5  # of the layers have a tensor: then those without it lack it
UNEVEN = ("_exps", "ssm_", "shortconv", "time_mix")  # in models whose layers differ by design


def alignment(opened: Opened) -> Iterator[Seen]:
    step = int(opened.gguf.fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    for tensor in opened.gguf.stored:
        offset = int(tensor.field.parts[-1][0])
        if offset % step:
            yield Seen(tensor.name, f"lies at offset {offset}, no multiple of the alignment {step}")


def layers(opened: Opened) -> Iterator[Seen]:
    """A tensor that most layers have, all should have; `block_count` says how many layers there are."""
    found = [m for t in opened.gguf.stored if (m := LAYER.fullmatch(t.name))]
    if not found:
        return
    have: dict[str, set[int]] = {}
    for match in found:
        have.setdefault(match[2], set()).add(int(match[1]))
    key = f"{opened.gguf.architecture}.block_count"
    count = int(opened.gguf.fields.get(key, 1 + max(map(max, have.values()))))
    last = max(map(max, have.values()))
    if last >= count:
        yield Seen(key, f"is {count}, but there are tensors of layer {last}")
    if any(part in name for name in have for part in UNEVEN):
        return
    for name, indices in sorted(have.items()):
        missing = sorted(set(range(count)) - indices)
        if missing and len(indices) >= ANOMALY * count:
            yield Seen(f"blk.{missing[0]}.{name}", f"is missing; {len(indices)} of {count} layers have it")


def shapes(opened: Opened) -> Iterator[Seen]:
    """All layers hold matrices of one shape, but where heads or widths vary by design (arrays in the metadata)."""
    if any(isinstance(v, list) and k.startswith(opened.gguf.architecture) for k, v in opened.gguf.fields.items()):
        return
    seen: dict[str, Counter[tuple[int, ...]]] = {}
    for tensor in opened.gguf.stored:
        if match := LAYER.fullmatch(tensor.name):
            seen.setdefault(match[2], Counter())[tuple(int(n) for n in tensor.shape)] += 1
    for tensor in opened.gguf.stored:
        if (match := LAYER.fullmatch(tensor.name)) and len(seen[match[2]]) > 1:
            usual = seen[match[2]].most_common(1)[0][0]
            shape = tuple(int(n) for n in tensor.shape)
            if shape != usual:
                yield Seen(tensor.name, f"is {shape} in ggml's order, in other layers {usual}")


RULES = (
    Rule(
        id="GGUF-ALIGNMENT",
        formats=GGUF,
        severity="error",
        summary="a tensor that does not lie at a multiple of the file's alignment",
        reason="readers that map the file read such a tensor from the wrong place, or refuse the file",
        reference="ollama/ollama#8456",
        fix="write the file again with padding between tensors",
        check=alignment,
    ),
    Rule(
        id="GGUF-LAYER",
        formats=GGUF,
        severity="error",
        summary="a layer that lacks a tensor which others have, or more layers than are stated",
        reason="llama.cpp refuses the file: wrong number of tensors, or a tensor not found",
        reference="ggml-org/llama.cpp#6490",
        fix="convert the model again from its source",
        check=layers,
    ),
    Rule(
        id="GGUF-SHAPE",
        formats=GGUF,
        severity="error",
        summary="a matrix of another shape than in the other layers",
        reason="a matrix written transposed, or of another model, fails at load or computes nonsense",
        reference="ggml-org/llama.cpp#5518",
        fix="convert the model again from its source",
        check=shapes,
    ),
)
