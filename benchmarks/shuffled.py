"""A model that computes what another does, with its channels in another order: blocks of weights are other weights.

    python -m benchmarks.shuffled FOLDER [--model SOURCE]

The real models that packages hold were quantized before, in blocks of 32 (Q4_1): a quantizer whose grid is that of the
source finds the source's own codes and loses nothing, which says nothing of a model in float. So, with P a permutation
of the residual stream's channels, M one of each layer's inner MLP channels, and V one within each layer's value heads,

    embedding, norms, inputs of q k v gate up, outputs of o down     by P
    outputs of gate and up, inputs of down                           by M
    outputs of v, inputs of o                                        by V, in each head

give the same logits but for the order of float sums (the command measures it), and what was a block of one scale is
spread over the row. Written as a Hugging Face folder, in float32. For Llama's layout.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import peers
from benchmarks.models import SOURCE
from lilliput import decoder, source
from lilliput.errors import ExportError
from lilliput.grid import Float
from lilliput.model import DecoderConfig, SourceModel
from lilliput.proof import STEPS, fixed_tokens, relative_error

Order = npt.NDArray[np.int64]

SEED = 0
MOST = 1e-3  # of the logits' spread may differ


def shuffled(model: SourceModel, seed: int = SEED) -> SourceModel:
    """The same function on shuffled channels. Raises ExportError for another family than Llama's."""
    if model.config.family != "llama":
        raise ExportError(f"{model.name}: family {model.config.family!r}, channels are shuffled in llama's layout only")
    weights: dict[str, Float] = {name: model.weights[name] for name in model.config.parameter_shapes()}
    random, config = np.random.default_rng(seed), model.config
    stream = random.permutation(config.hidden_size)
    for name in weights:
        if name.endswith("norm"):
            weights[name] = weights[name][stream]
    for name in {"embedding", "head"} & set(weights):
        weights[name] = weights[name][:, stream]
    for index in range(config.num_layers):
        inner = random.permutation(config.intermediate_size)
        _shuffle_layer(weights, f"layers.{index}", config, stream, inner, random.permutation(config.head_dim))
    return replace(model, weights={name: np.ascontiguousarray(w) for name, w in weights.items()})


def _shuffle_layer(
    weights: dict[str, Float], layer: str, config: DecoderConfig, stream: Order, inner: Order, head: Order
) -> None:
    """Put one layer's matrices in order: of the residual stream, of the MLP's inside, of each head's values."""
    for part in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"):
        weights[f"{layer}.{part}"] = weights[f"{layer}.{part}"][:, stream]
    for part in ("mlp.gate", "mlp.up"):
        weights[f"{layer}.{part}"] = weights[f"{layer}.{part}"][inner]
    values, outputs = (
        np.concatenate([h * config.head_dim + head for h in range(heads)])
        for heads in (config.num_kv_heads, config.num_heads)
    )
    weights[f"{layer}.attention.v"] = weights[f"{layer}.attention.v"][values]
    weights[f"{layer}.attention.o"] = weights[f"{layer}.attention.o"][:, outputs][stream]
    weights[f"{layer}.mlp.down"] = weights[f"{layer}.mlp.down"][:, inner][stream]


@torch.no_grad()
def difference(one: SourceModel, other: SourceModel) -> float:
    """The largest difference of their logits on fixed tokens, over the logits' standard deviation."""
    tokens = fixed_tokens(one.config.vocab_size, STEPS)
    return relative_error(decoder.build(other)(tokens), decoder.build(one)(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=SOURCE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch) / "source"
        source.load(arguments.model, stage)
        model = source.open_stage(stage)
        made = shuffled(model)
        found = difference(model, made)
        if not found < MOST:
            raise ExportError(
                f"shuffled {model.name}: its logits differ by {found:.2g} of their spread: not the same model"
            )
        arguments.folder.mkdir(parents=True)
        peers.save_hf(made, arguments.folder)
    print(f"{arguments.folder}: the largest difference of logits is {found:.2g} of their spread")


if __name__ == "__main__":
    main()
