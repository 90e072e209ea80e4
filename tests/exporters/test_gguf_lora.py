"""Adapters as a GGUF file: llama.cpp with base and adapter gives the logits of torch with base + B A."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import quantize, tiny_source

from exporters.gguf_llamacpp import lora, write
from lilliput import decoder
from lilliput.artifact import Artifact
from lilliput.errors import ExportError
from lilliput.grid import Float
from lilliput.model import LowRank, QuantizedModel, SourceModel, role_of

TOKENS = (5, 77, 200, 13, 150, 9)


def random_adapters(model: QuantizedModel, rank: int = 4) -> dict[str, LowRank]:
    rng = np.random.default_rng(0)
    shapes = {name: t.shape for name, t in model.quantized.items() if role_of(name) == "linear"}
    return {
        name: LowRank(
            rng.normal(size=(rank, cols)).astype(np.float32) * 0.1,
            rng.normal(size=(rows, rank)).astype(np.float32),
            8.0,
        )
        for name, (rows, cols) in shapes.items()
    }


def logits_in_torch(model: QuantizedModel, adapters: dict[str, LowRank]) -> Float:
    weights = {name: model.dequantized(name) for name in model.config.parameter_shapes()}
    weights |= {name: weights[name] + adapter.delta() for name, adapter in adapters.items()}
    built = decoder.build(SourceModel("torch", model.config, weights, model.tokenizer, "", ""))
    logits: Float = built(torch.tensor([TOKENS]))[0, -1].numpy()
    return logits


def logits_in_llama_cpp(base: Path, adapter: Path | None) -> Float:
    import llama_cpp

    from targets.runtimes.llamacpp_cpu import Runtime, last_log

    session = Runtime().open(Artifact(base.parent, "gguf_llamacpp", base.name, 64, 0), 1, exact=True)
    if adapter is not None:
        loaded = llama_cpp.llama_adapter_lora_init(session._model, str(adapter).encode())
        assert loaded, last_log()
        one = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(ctypes.cast(loaded, llama_cpp.llama_adapter_lora_p_ctypes))
        assert llama_cpp.llama_set_adapters_lora(session._context, one, 1, (ctypes.c_float * 1)(1.0)) == 0
    found = session.prefill(TOKENS)
    session.close()
    return found


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_llama_cpp_computes_base_and_adapter_as_torch_does(tmp_path: Path, kv_heads: int) -> None:
    model = quantize(tiny_source(tmp_path, num_key_value_heads=kv_heads))
    adapters = random_adapters(model)
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write(model, base, exact=True)
    lora.write(adapters, model.config, adapter)
    wanted, plain = logits_in_torch(model, adapters), logits_in_torch(model, {})
    assert np.abs(logits_in_llama_cpp(base, None) - plain).max() < 1e-3
    assert np.abs(wanted - plain).max() > 0.5  # the adapters do something
    assert np.abs(logits_in_llama_cpp(base, adapter) - wanted).max() < 1e-3


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model = quantize(tiny_source(tmp_path))
    lora.write(random_adapters(model), model.config, tmp_path / "adapter.gguf")
    file = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {key: file.get_field(key).contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert fields == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    names = {tensor.name for tensor in file.tensors}
    assert len(names) == 2 * 14
    assert {"blk.1.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"} <= names


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = quantize(tiny_source(tmp_path, "gpt2"))
    with pytest.raises(ExportError, match="stacks it in"):
        lora.write(random_adapters(model), model.config, tmp_path / "a.gguf")
    llama = quantize(tiny_source(tmp_path))
    adapters = random_adapters(llama)
    adapters["layers.0.mlp.up"] = replace(adapters["layers.0.mlp.up"], alpha=1.0)
    with pytest.raises(ExportError, match="one alpha"):
        lora.write(adapters, llama.config, tmp_path / "b.gguf")
