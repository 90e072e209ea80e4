"""Run an ONNX file in a process of its own: `python onnx_child.py REQUEST.json`. numpy and onnxruntime, nothing else.

A child keeps a crash away from the caller, and can run on an emulated processor. The request:

    model       the file           tokens      token ids
    optimize    whether ONNX Runtime may change the graph
    first       tokens of the first call; the others follow one by one where the graph has caches
    fetch       tensors to return, of one call over all tokens; then there is no decoding
    out         .npz: `logits` (n, vocab), of the last n positions; the fetched tensors as t0, t1, …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

PAST, PRESENT = "past_key_values.", "present."


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if request["optimize"] else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(request["model"], options, ["CPUExecutionProvider"])
    tokens, fetch = request["tokens"], request["fetch"]
    found = {"logits": decoded(session, tokens, request["first"])} if not fetch else fetched(session, tokens, fetch)
    np.savez(request["out"], allow_pickle=False, **found)


def decoded(session: Any, tokens: list[int], first: int) -> Any:
    """Logits of the first call's positions (all, or the last alone), then of each further one."""
    cached = any(i.name.startswith(PAST) for i in session.get_inputs())
    names = [o.name for o in session.get_outputs()]
    given = tokens[:first] if cached else tokens
    outputs = dict(zip(names, session.run(None, feeds(session, given, 0, {})), strict=True))
    rows = [np.asarray(outputs["logits"][0], np.float32)]
    for position in range(len(given), len(tokens)):
        caches = {n.replace(PRESENT, PAST): v for n, v in outputs.items() if n.startswith(PRESENT)}
        step = session.run(None, feeds(session, [tokens[position]], position, caches))
        outputs = dict(zip(names, step, strict=True))
        rows.append(np.asarray(outputs["logits"][0], np.float32))
    return np.concatenate(rows)


def fetched(session: Any, tokens: list[int], names: list[str]) -> dict[str, Any]:
    values = session.run(names, feeds(session, tokens, 0, {}))
    return {f"t{i}": value for i, value in enumerate(values)}


def feeds(session: Any, tokens: list[int], past: int, caches: dict[str, Any]) -> dict[str, Any]:
    made = dict[str, Any]()
    for given in session.get_inputs():
        kind = np.int32 if given.type == "tensor(int32)" else np.int64
        if given.name.startswith(PAST):
            float_type = np.float16 if given.type == "tensor(float16)" else np.float32
            shape = [1, given.shape[1], 0, given.shape[3]]
            made[given.name] = caches.get(given.name, np.zeros(shape, float_type) if not caches else None)
        elif given.name == "attention_mask":
            made[given.name] = np.ones((1, past + len(tokens)), kind)
        elif given.name == "position_ids":
            made[given.name] = np.arange(past, past + len(tokens), dtype=kind)[None]
        else:  # the token ids: the caller has looked at the names
            made[given.name] = np.asarray([tokens], kind)
    return made


if __name__ == "__main__":
    main()
