"""Run a GGUF file in a process of its own: `python gguf_child.py REQUEST.json`. numpy and llama_cpp alone.

    model      the file              tokens     token ids
    exact      no repacked weights, plain attention, caches in float32; else as llama.cpp runs it
    first      tokens of the first call, the others follow one by one
    look       whether to return every tensor that is computed, of one call over all tokens, instead of decoding
    out        .npz: `logits` (n, vocab); looked into: tensors t0, t1, … and `graph`, a JSON list of
               [name, operator, names of inputs] in the order of computation

llama.cpp calls back before and after each tensor that is asked for (cb_eval). A tensor lies in memory as ggml.h says.
Names that come again get a number.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

F32, KV_TYPES = 0, {True: 0, False: 1}  # enum ggml_type: F32, F16
SOURCES = 10


class Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class Look:
    """What cb_eval saw: tensors by pointer, and the numbers of those that are float32 without gaps."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        base = ctypes.CDLL(str(next(folder.glob("*ggml-base.*"))))
        self._kind = base.ggml_op_desc
        self._kind.argtypes, self._kind.restype = [ctypes.c_void_p], ctypes.c_char_p
        self.names, self.graph, self.values = dict[int, str](), list[list[Any]](), list[Any]()
        self._used = set[str]()
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def _see(self, pointer: int, ask: bool, _: object) -> bool:
        if not ask:
            tensor = Tensor.from_address(pointer)
            inputs = [self._named(p) for p in tensor.src if p]
            self.graph.append([self._named(pointer), self._kind(pointer).decode(), inputs])
            self.values.append(numbers(tensor))
        return True

    def _named(self, pointer: int) -> str:
        if pointer not in self.names:
            plain = name = Tensor.from_address(pointer).name.decode(errors="replace") or "unnamed"
            while name in self._used:
                name = f"{plain}#{int(name.rpartition('#')[2]) + 1 if '#' in name[len(plain) :] else 2}"
            self._used.add(name)
            self.names[pointer] = name
        return self.names[pointer]


def numbers(tensor: Tensor) -> Any:
    """A copy, (…, ne0) float32; empty where the tensor is of another type or has gaps."""
    shape, step = list(tensor.ne), 4
    for size, stride in zip(tensor.ne, tensor.nb, strict=True):
        if stride != step and size != 1:
            return np.zeros(0, np.float32)
        step *= size
    if tensor.type != F32 or not tensor.data:
        return np.zeros(0, np.float32)
    count = int(np.prod(shape))
    flat = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float)), (count,)).copy()
    return flat.reshape([n for n in reversed(shape) if n != 1] or [1])


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    tokens, exact = request["tokens"], request["exact"]
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers, options.use_extra_bufts = 0, not exact
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), options)
    if not model:
        sys.exit("llama.cpp cannot load the file")
    look = Look()
    context = llama_cpp.llama_init_from_model(
        model, context_options(len(tokens), exact, look if request["look"] else None)
    )
    if not context:
        sys.exit("llama.cpp cannot make a context of the file")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    steps = [tokens] if request["look"] else [tokens[: request["first"]], *([t] for t in tokens[request["first"] :])]
    rows, past = list[Any](), 0
    for step in steps:
        rows += decoded(context, step, past, vocab)
        past += len(step)
    found = {"logits": np.stack(rows)}
    if request["look"]:
        found |= {f"t{i}": value for i, value in enumerate(look.values)}
        found["graph"] = np.frombuffer(json.dumps(look.graph).encode(), np.uint8)
    np.savez(request["out"], allow_pickle=False, **found)


def context_options(tokens: int, exact: bool, look: Look | None) -> Any:
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(tokens, 32)
    options.n_seq_max = options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = KV_TYPES[exact]
    api = llama_cpp
    options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if look is not None:
        options.cb_eval = look.callback
    return options


def decoded(context: Any, tokens: list[int], past: int, vocab: int) -> list[Any]:
    """Logits after each of the tokens."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, past + i, 1, 0, 1
    status = llama_cpp.llama_decode(context, batch)
    if status != 0:
        sys.exit(f"llama.cpp failed on {len(tokens)} tokens at position {past} (status {status})")
    pointers = (llama_cpp.llama_get_logits_ith(context, i) for i in range(len(tokens)))
    kind = ctypes.POINTER(ctypes.c_float)
    rows = [np.ctypeslib.as_array(ctypes.cast(p, kind), (vocab,)).copy() for p in pointers]
    llama_cpp.llama_batch_free(batch)
    return rows


if __name__ == "__main__":
    main()
