"""Run a `.tflite` in a process of its own: `python tflite_child.py REQUEST.json`. numpy and ai_edge_litert alone.

    model        the file            tokens       token ids
    kernels      "reference" (LiteRT's reference kernels, no delegate) or "delegate" (as LiteRT runs it: XNNPACK)
    signature    its key;            subgraph     its index
    fetch        indices of tensors of that subgraph to return, of one call over all tokens
    out          .npz: `logits` (n, vocab) of the last n positions; the fetched tensors as t0, t1, …

Without caches one call takes all tokens. With caches the tokens go one by one through the signature, its caches'
outputs being the next call's inputs; only `fetch` gives it all tokens at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

MASKED = -0.7 * float(np.finfo(np.float32).max)  # LiteRT-LM's number: far below any score, and no infinity
CACHE = "kv_cache_"


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    kinds = {"reference": OpResolverType.BUILTIN_REF, "delegate": OpResolverType.AUTO}
    open_ = bool(request["fetch"]) and request["kernels"] == "reference"
    interpreter = Interpreter(
        request["model"], num_threads=1, experimental_op_resolver_type=kinds[request["kernels"]],
        experimental_preserve_all_tensors=open_,
    )  # fmt: skip
    run = interpreter.get_signature_runner(request["signature"])
    details, tokens = run.get_input_details(), request["tokens"]
    caches = {n: np.zeros(d["shape"], d["dtype"]) for n, d in details.items() if n.startswith(CACHE)}
    if request["fetch"]:
        outputs = run(**feeds(details, tokens, 0, caches))
        found = {f"t{i}": value(interpreter, request, outputs, index) for i, index in enumerate(request["fetch"])}
    else:
        rows = []
        steps = [[token] for token in tokens] if caches else [tokens]
        for position, step in enumerate(steps):
            outputs = run(**feeds(details, step, position, caches))
            caches = {n: outputs[n] for n in caches}
            rows.append(logits(outputs).reshape(-1, logits(outputs).shape[-1]))
        found = {"logits": np.concatenate(rows).astype(np.float32)}
    np.savez(request["out"], allow_pickle=False, **found)


def logits(outputs: dict[str, Any]) -> Any:
    """The output of that name, or the only one."""
    return outputs["logits"] if "logits" in outputs else next(v for n, v in outputs.items() if not n.startswith(CACHE))


def value(interpreter: Any, request: dict[str, Any], outputs: dict[str, Any], index: int) -> Any:
    """A tensor: of a delegated graph only what is an output, by the name that the caller gave it."""
    name = f"ladder_{index}"
    return outputs[name] if name in outputs else interpreter.get_tensor(index, request["subgraph"])


def feeds(details: dict[str, Any], tokens: list[int], past: int, caches: dict[str, Any]) -> dict[str, Any]:
    made = dict(caches)
    positions = np.arange(past, past + len(tokens))
    for name, given in details.items():
        if name in caches:
            continue
        if name == "mask":
            slots = int(given["shape"][-1])
            seen = np.arange(slots) <= positions[:, None]
            made[name] = np.where(seen, np.float32(0), np.float32(MASKED)).reshape(given["shape"])
        else:
            numbers = positions if name == "input_pos" else np.asarray(tokens)
            made[name] = numbers.reshape(given["shape"]).astype(given["dtype"])
    return made


if __name__ == "__main__":
    main()
