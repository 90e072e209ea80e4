"""Whole tiny models as `.tflite`: read back bit for bit, computed as torch does, written the same twice."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from litert_cases import CHUNK, CONTEXT, MODELS, RULES, TOKENS, export, logits, reference, solved
from tiny_models import tiny_source

from exporters.litert_int8 import BUNDLE_FILE, Exporter, flatbuffer
from exporters.litert_int8.weights import store
from lilliput.artifact import sha256
from lilliput.delegation import delegation
from lilliput.errors import ArtifactError, ExportError
from lilliput.grid import QuantizedTensor
from lilliput.model import QuantizedModel


def unequal(model: QuantizedModel, stored: object) -> list[str]:
    """Names of parameters that did not come back as they were given."""
    assert isinstance(stored, dict)
    held = {**model.quantized, **model.floats}
    assert set(stored) == set(held)

    def same(name: str) -> bool:
        mine, theirs = held[name], stored[name]
        if isinstance(mine, QuantizedTensor):
            return isinstance(theirs, QuantizedTensor) and mine.same_as(theirs) and mine.shape == theirs.shape
        return np.array_equal(mine, theirs)

    return [name for name in held if not same(name)]


@pytest.mark.parametrize("rules", RULES)
def test_reads_back_what_was_given(tmp_path: Path, rules: str) -> None:
    for model in ("own head", "gpt2", "gemma3"):
        given = solved(tmp_path / model, model, rules)
        assert unequal(given, Exporter().read(export(given, tmp_path / f"{model} out"))) == []


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    given = solved(tmp_path, "grouped", "common")
    artifact = export(given, tmp_path / "out")
    data = bytearray(artifact.path.read_bytes())
    data[-1] ^= 1
    artifact.path.write_bytes(data)
    assert len(unequal(given, Exporter().read(artifact))) == 1


@pytest.mark.parametrize("model", MODELS)
def test_the_exact_twin_computes_what_torch_computes(tmp_path: Path, model: str) -> None:
    given = solved(tmp_path, model, "common")
    seen = logits(export(given, tmp_path / "out", exact=True), TOKENS, 12, exact=True)
    wanted = reference(given, TOKENS)[11:]
    assert np.abs(seen - wanted).max() <= 1e-4 * wanted.std()


@pytest.mark.parametrize("rules", RULES)
def test_shipped_files_differ_by_their_activations_only(tmp_path: Path, rules: str) -> None:
    given = solved(tmp_path, "own head", rules)
    seen = logits(export(given, tmp_path / "out"), TOKENS, 12, exact=False)
    wanted = reference(given, TOKENS)[11:]
    assert np.abs(seen - wanted).max() <= 0.2 * wanted.std()
    agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(seen, wanted, strict=True)]
    assert min(agreement) >= 0.999


def test_everything_but_lookups_and_the_cache_is_delegated(tmp_path: Path) -> None:
    given = solved(tmp_path, "grouped", "common")
    layers = given.config.num_layers
    artifact = export(given, tmp_path / "out")
    found = delegation(artifact.path)
    assert artifact.notes == (f"XNNPACK: {found}",)
    assert found.partitions == layers + 1
    assert found.share == pytest.approx(found.delegated / (found.delegated + 8))
    assert found.left == {"CONCATENATION": 1, "DYNAMIC_UPDATE_SLICE": 2 * layers, "EMBEDDING_LOOKUP": 2, "RESHAPE": 1}


@pytest.mark.parametrize(("model", "tables"), [("qwen3", 1), ("gemma3", 2)])
def test_windows_and_norms_of_heads_are_delegated_too(tmp_path: Path, model: str, tables: int) -> None:
    """Beside lookups (tokens, rotary tables) and caches, one conversion of the positions that windows count by."""
    given = solved(tmp_path, model, "common")
    layers = given.config.num_layers
    found = delegation(export(given, tmp_path / "out").path)
    left = {"CONCATENATION": 1, "DYNAMIC_UPDATE_SLICE": 2 * layers, "EMBEDDING_LOOKUP": 1 + tables, "RESHAPE": 1}
    assert found.left == left | ({"CAST": 1} if any(given.config.windows) else {})
    assert found.partitions == layers + 1


def test_weights_are_stored_once(tmp_path: Path) -> None:
    given = solved(tmp_path, "grouped", "common")
    artifact = export(given, tmp_path / "out")
    file = artifact.path.read_bytes()
    counts = {name: file.count(store(tensor).data.tobytes()) for name, tensor in given.quantized.items()}
    assert counts == dict.fromkeys(given.quantized, 1)
    names = [stored.name for stored in flatbuffer.read_constants(artifact.path)]
    assert "layers.0.attention.q:64+layers.0.attention.k:32+layers.0.attention.v:32" in names


def test_same_model_same_bytes(tmp_path: Path) -> None:
    given = solved(tmp_path, "grouped", "common")
    first, second = (export(given, tmp_path / name, bundle=True) for name in ("a", "b"))
    assert sha256(first.path) == sha256(second.path)
    assert sha256(first.folder / BUNDLE_FILE) == sha256(second.folder / BUNDLE_FILE)
    assert first.size_bytes == first.path.stat().st_size


def test_large_buffers_are_aligned_and_outside_the_flatbuffer(tmp_path: Path) -> None:
    artifact = export(solved(tmp_path, "grouped", "common"), tmp_path / "out")
    model = flatbuffer.schema.ModelT.InitFromPackedBuf(artifact.path.read_bytes(), 0)
    outside = [b for b in model.buffers if b.offset]
    inside = [b for b in model.buffers if b.data is not None]
    assert all(b.offset % flatbuffer.ALIGNMENT == 0 for b in outside)
    assert len(outside) == 1 + 2 * 4 + 1  # the table, four linears a layer, the rotary table
    assert max(len(b.data) for b in inside) <= flatbuffer.INLINE_BYTES


def test_signatures_are_those_that_litert_lm_expects(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(export(solved(tmp_path, "grouped", "common"), tmp_path / "out").path))
    signatures = interpreter.get_signature_list()
    caches = [f"kv_cache_{kv}_{i}" for i in range(2) for kv in "kv"]
    assert set(signatures) == {"decode", f"prefill_{CHUNK}", "prefill_4"}
    assert set(signatures[f"prefill_{CHUNK}"]["inputs"]) == {"tokens", "input_pos", "mask", *caches}
    assert set(signatures[f"prefill_{CHUNK}"]["outputs"]) == set(caches)
    assert set(signatures["decode"]["outputs"]) == {"logits", *caches}
    details = interpreter.get_signature_runner(f"prefill_{CHUNK}").get_input_details()
    shapes = {name: tuple(int(n) for n in d["shape"]) for name, d in details.items()}
    assert shapes["tokens"] == (1, CHUNK)
    assert shapes["input_pos"] == (CHUNK,)
    assert shapes["mask"] == (1, 1, CHUNK, CONTEXT)
    assert shapes["kv_cache_k_0"] == shapes["kv_cache_v_1"] == (1, 2, CONTEXT, 16)


def test_every_length_of_prefill_has_a_signature_and_computes_the_same(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    given = solved(tmp_path, "gemma3", "common")
    artifact = export(given, tmp_path / "out", exact=True, prefill_lengths=(2, 4, CONTEXT, 2 * CONTEXT))
    signatures = set(Interpreter(str(artifact.path)).get_signature_list())
    assert signatures == {"decode", *(f"prefill_{n}" for n in (2, 4, CHUNK, CONTEXT))}
    wanted = reference(given, TOKENS)
    for prompt in (3, 7, 15, 20):
        seen = logits(artifact, TOKENS[:prompt], prompt, exact=True)[0]
        assert np.abs(seen - wanted[prompt - 1]).max() <= 1e-4 * wanted.std()


def test_a_grid_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    from tiny_models import quantize

    given = quantize(tiny_source(tmp_path), linear="int8-b32")
    with pytest.raises(ExportError, match=r"layers\.0\.attention\.q: LiteRT has one scale per channel for 8-bit"):
        export(given, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_more_positions_than_were_learned_are_refused(tmp_path: Path) -> None:
    given = solved(tmp_path, "gpt2", "common")
    short = dataclasses.replace(given, config=dataclasses.replace(given.config, max_positions=CONTEXT - 1))
    with pytest.raises(ExportError, match=f"context {CONTEXT}: tiny-gpt2 has learned {CONTEXT - 1} positions"):
        export(short, tmp_path / "out")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    artifact = export(solved(tmp_path, "grouped", "common"), tmp_path / "out")
    whole = artifact.path.read_bytes()
    artifact.path.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        Exporter().read(artifact)
    artifact.path.write_bytes(b"GGUF" + whole[4:1000].replace(b"TFL3", b"none"))
    with pytest.raises(ArtifactError, match=r"not a \.tflite file"):
        Exporter().read(artifact)
    artifact.path.write_bytes(whole[:2000])
    with pytest.raises(ArtifactError, match="damaged"):
        Exporter().read(artifact)
    artifact.path.unlink()
    with pytest.raises(ArtifactError, match=r"no \.tflite file"):
        Exporter().read(artifact)


TENSORFLOW = """
import json, sys
import numpy as np
import tensorflow as tf
path, tokens, context = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
step = tf.lite.Interpreter(model_path=path, num_threads=1).get_signature_runner("decode")
state = {n: np.zeros(d["shape"], np.float32) for n, d in step.get_input_details().items() if n.startswith("kv_")}
for position, token in enumerate(tokens):
    mask = np.where(np.arange(context) <= position, 0, -1e30).astype(np.float32)[None, None, None]
    state = step(tokens=np.array([[token]], np.int32), input_pos=np.array([position], np.int32), mask=mask, **state)
    logits = state.pop("logits")
print(json.dumps(logits[0, 0].tolist()))
"""


def test_tensorflow_opens_the_file_and_agrees(tmp_path: Path) -> None:
    given = solved(tmp_path, "grouped", "common")
    artifact = export(given, tmp_path / "out")
    command = [sys.executable, "-c", TENSORFLOW, str(artifact.path), json.dumps(TOKENS), str(CONTEXT)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    seen = np.array(json.loads(child.stdout))
    wanted = logits(artifact, TOKENS, len(TOKENS), exact=False)[-1]
    assert np.abs(seen - wanted).max() <= 0.02 * wanted.std()
