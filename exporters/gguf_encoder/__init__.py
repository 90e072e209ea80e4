"""GGUF for llama.cpp's embeddings: a BERT-like encoder, its tokenizer and how its tokens become one vector.

    model.gguf   architecture `bert`: weights in blocks of 32 or 256 on the grids that were solved, norms, biases and
                 the tables of positions and token types in float; metadata (below); the tokenizer

What llama.cpp computes there is compiled into it (src/models/bert.cpp): norms behind the sums, attention both ways,
GELU by tanh and a table of float16, whatever a source's own GELU is. What a source has beyond that is refused.

    bert.pooling_type           mean, cls (first token), rank (a classifier's head), none (a vector a token)
    bert.attention.causal       false
    tokenizer.ggml.token_type_count   the rows of token_types
    lilliput.grids              JSON: the grid's name by tensor

llama.cpp does not pad: a text is as long as it is, up to all positions of the source.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import gguf
import numpy as np
from gguf import GGMLQuantizationType as BlockType

from exporters.base import ExporterOptions
from exporters.gguf_encoder import tensors
from exporters.gguf_llamacpp import metadata, vocabulary
from lilliput.artifact import PROVENANCE, Artifact, canonical
from lilliput.errors import ExportError
from lilliput.ggml import blocks
from lilliput.grid import Float, GridSpec, QuantizedTensor
from lilliput.network import Network, QuantizedNetwork
from lilliput.network.encoder import Gives, TextEncoder
from lilliput.tokenizer_folder import load_tokenizer

MAIN_FILE = "model.gguf"
POOLING: dict[Gives, gguf.PoolingType] = {
    "mean": gguf.PoolingType.MEAN, "first": gguf.PoolingType.CLS, "logits": gguf.PoolingType.RANK,
    "hidden": gguf.PoolingType.NONE,
}  # fmt: skip
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


class Options(ExporterOptions):
    check_tokenizer: bool = True  # hold llama.cpp's token ids of the written file against the tokenizer's own


class NetworkExporter:
    """Writes and reads the file. Stateless."""

    Options: ClassVar[type[ExporterOptions]] = Options
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    extra: ClassVar[str] = "llamacpp"
    activations: ClassVar[tuple[str, ...]] = ()

    def check(self, network: Network) -> None:
        """Raise ExportError for what llama.cpp's `bert` does not compute."""
        tensors.parameters(network, encoder_of(network))

    def refuses(self, spec: GridSpec, cols: int) -> str | None:
        return blocks.refusal(spec, cols)

    def export(self, model: QuantizedNetwork, options: ExporterOptions, folder: Path) -> tuple[Artifact, list[str]]:
        assert isinstance(options, Options)
        encoder = encoder_of(model.network)
        path = folder / MAIN_FILE
        with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
            tokenizer = _fast(encoder.tokenizer, Path(scratch))
            notes = [said for said in (_gelu(encoder), write(model, path, tokenizer, options)) if said]
            if options.check_tokenizer:
                notes.append(f"tokenizer: {vocabulary.proof.check(path, tokenizer)}")
        return Artifact(folder, "gguf_encoder", MAIN_FILE, len(encoder.positions), prefill=0), notes

    def differences(self, model: QuantizedNetwork, artifact: Artifact) -> list[str]:
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(artifact.path).tensors}
        wanted = held(model)
        found = [f"{name} is {'missing' if name in wanted else 'beyond'}" for name in wanted.keys() ^ stored.keys()]
        both = [name for name in wanted if name in stored]
        return found + [f"{name} differs" for name in both if not _same(wanted[name], stored[name])]


def encoder_of(network: Network) -> TextEncoder:
    """What llama.cpp's `bert` computes. Raises ExportError for another network."""
    encoder = network.encoder
    if encoder is None:
        raise ExportError(
            f"{network.name}: llama.cpp's embeddings want a BERT-like encoder, a Hugging Face folder of the kinds "
            "bert, roberta or xlm-roberta: choose another exporter"
        )
    if encoder.activation not in ("gelu", *TANH_GELUS):
        raise ExportError(f"{network.name}: llama.cpp's bert has GELU between its layers, not {encoder.activation!r}")
    return encoder


def _gelu(encoder: TextEncoder) -> str:
    exact = "" if encoder.activation in TANH_GELUS else ", the source's by erf"
    return f"llama.cpp computes GELU by tanh in a table of float16{exact}"


def _fast(folder: Path, scratch: Path) -> Path:
    """The tokenizer's folder, with a tokenizer.json: transformers makes one where there are only other files."""
    if (folder / "tokenizer.json").is_file():
        return folder
    load_tokenizer(folder).save_pretrained(scratch)
    return scratch


def held(model: QuantizedNetwork) -> dict[str, QuantizedTensor | Float]:
    """What the file holds, by its tensors' names."""
    encoder = encoder_of(model.network)
    found: dict[str, QuantizedTensor | Float] = dict(tensors.tables(encoder))
    for name, parameter in tensors.parameters(model.network, encoder).items():
        found[name] = model.weights.get(parameter, model.network.parameters[parameter])
    return found


def write(model: QuantizedNetwork, path: Path, tokenizer: Path, options: Options) -> str:
    """Write the file; a sentence about the tokenizer where one has to be said. Raises ExportError."""
    encoder, whole = encoder_of(model.network), held(model)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[tensors.BERT])
    sizes: Counter[BlockType] = Counter()
    for name, tensor in whole.items():
        kind, packed = _pack(name, tensor)
        sizes[kind] += tensor.size if isinstance(tensor, np.ndarray) else tensor.codes.size
        writer.add_tensor(name, packed, raw_dtype=kind)
    _add_metadata(writer, model, encoder)
    writer.add_file_type(metadata.FILE_TYPES[sizes.most_common(1)[0][0]])
    said = vocabulary.add(writer, tokenizer, whole["token_embd.weight"].shape[0], prove=options.check_tokenizer)
    grids = {name: tensor.spec.name for name, tensor in whole.items() if isinstance(tensor, QuantizedTensor)}
    writer.add_string(metadata.GRIDS, canonical(grids))
    writer.add_string(PROVENANCE, canonical(model.provenance))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return said


def _pack(
    name: str, tensor: QuantizedTensor | Float
) -> tuple[BlockType, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    if isinstance(tensor, QuantizedTensor):
        return blocks.stored(name, tensor)
    packed = np.ascontiguousarray(tensor) if name == tensors.TOKEN_TYPES else blocks.pack_float(tensor)
    return (BlockType.F16 if packed.dtype == np.float16 else BlockType.F32), packed


def _add_metadata(writer: gguf.GGUFWriter, model: QuantizedNetwork, encoder: TextEncoder) -> None:
    writer.add_type("model")
    writer.add_name(model.network.name)
    writer.add_block_count(encoder.layers)
    writer.add_context_length(len(encoder.positions))
    writer.add_embedding_length(encoder.hidden_size)
    writer.add_feed_forward_length(encoder.intermediate_size)
    writer.add_head_count(encoder.heads)
    writer.add_layer_norm_eps(encoder.norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(POOLING[encoder.gives])
    writer.add_token_type_count(0 if encoder.token_types is None else len(encoder.token_types))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if encoder.labels:
        writer.add_classifier_output_labels(list(encoder.labels))


def _same(wanted: QuantizedTensor | Float, stored: gguf.ReaderTensor) -> bool:
    """Bit for bit, by our own unpacking."""
    if isinstance(wanted, QuantizedTensor):
        if stored.tensor_type != blocks.block_type(wanted.spec):
            return False
        return wanted.same_as(blocks.unpack(stored.data, wanted.spec, stored.name))
    return np.array_equal(np.asarray(stored.data, np.float32), wanted)
