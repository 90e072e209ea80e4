"""Which tensors GGUF's architecture `bert` has, and which parameters of a network they are.

Names are gguf's own (tensor_mapping.py). The head of a classifier is llama.cpp's rank pooling: `cls` is the linear
layer with tanh behind it that reads the first token, `cls.output` the one behind that.

    token_embd          (vocabulary, hidden) on a grid, or F16 where that is exact, or F32
    position_embd       (positions, hidden) F16 where that is exact, else F32; from the first position of a text on
    token_types         (types, hidden) F32: llama.cpp adds row 0, as it lies in memory, to float32
    matrices            on a grid, or F32
    norms, biases       F32
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from lilliput.errors import ExportError
from lilliput.grid import Float
from lilliput.network import Network
from lilliput.network.encoder import TextEncoder

BERT = gguf.MODEL_ARCH.BERT
POSITIONS, TOKEN_TYPES = (
    f"{gguf.TENSOR_NAMES[kind]}.weight" for kind in (gguf.MODEL_TENSOR.POS_EMBD, gguf.MODEL_TENSOR.TOKEN_TYPES)
)
CLS, CLS_OUT = (gguf.TENSOR_NAMES[kind] for kind in (gguf.MODEL_TENSOR.CLS, gguf.MODEL_TENSOR.CLS_OUT))
BERT_HEAD = {"bert.pooler.dense": CLS, "classifier": CLS_OUT}
ROBERTA_HEAD = {"classifier.dense": CLS, "classifier.out_proj": CLS_OUT}
HEADS = {"bert": BERT_HEAD, "roberta": ROBERTA_HEAD, "xlm-roberta": ROBERTA_HEAD}
LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm")


def parameters(network: Network, encoder: TextEncoder) -> dict[str, str]:
    """The network's parameter of each of the file's tensors, tables by position and type left out.

    Raises ExportError for a parameter that llama.cpp has no place for, and for a place without one.
    """
    names = gguf.get_tensor_name_map(BERT, encoder.layers)
    found = {}
    for parameter in network.parameters:
        bare, _, part = parameter.rpartition(".")
        if part not in ("weight", "bias") or "/" in parameter:
            continue  # a number of the graph's own, or a table's rows that are added as they are
        inner = HEADS.get(encoder.kind, {}).get(bare.removeprefix(encoder.head))
        inner = inner or names.get_name(bare.removeprefix(encoder.prefix))
        if inner is None:
            raise ExportError(f"{network.name}: llama.cpp's bert has no place for {parameter}")
        found[f"{inner}.{part}"] = parameter
    wanted = set(_wanted(encoder))
    if wanted != found.keys():
        missing, beyond = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
        raise ExportError(f"{network.name}: of llama.cpp's bert it lacks {missing} and has beyond it {beyond}")
    return found


def _wanted(encoder: TextEncoder) -> Iterator[str]:
    yield "token_embd.weight"
    inner = ["token_embd_norm", *(f"blk.{i}.{part}" for i in range(encoder.layers) for part in LAYER)]
    for name in (*inner, *((CLS, CLS_OUT) if encoder.gives == "logits" else ())):
        yield f"{name}.weight"
        yield f"{name}.bias"


def tables(encoder: TextEncoder) -> dict[str, Float]:
    """The tables that stay in float."""
    found = {POSITIONS: encoder.positions}
    if encoder.token_types is not None:
        found[TOKEN_TYPES] = encoder.token_types
    return found
