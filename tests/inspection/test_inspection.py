"""Inspection: what it says of files that the formats' own writers made, and of files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from sample_artifact import publish
from tiny_models import tiny_quantized_model

from lilliput import cli, manifest
from lilliput.errors import ArtifactError
from lilliput.inspection import Inspection, inspect


def dtypes(found: Inspection) -> dict[str, tuple[str, int, float]]:
    """Role → (dtype, weights, bits each) of files with one dtype a role."""
    return {g.role: (g.dtype, g.weights, round(g.bits_per_weight, 3)) for g in found.groups}


def gguf_file(path: Path, *, head: bool, split_bytes: int = 0) -> Path:
    writer = gguf.GGUFWriter(path, "llama", split_max_size=split_bytes)
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    rng = np.random.default_rng(0)
    tables = ["token_embd.weight", "blk.0.attn_q.weight"] + (["output.weight"] if head else [])
    for name in tables:
        kind = gguf.GGMLQuantizationType.Q4_0 if "attn" in name else gguf.GGMLQuantizationType.Q8_0
        data = gguf.quants.quantize(rng.standard_normal((4, 64)).astype(np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_bits_are_those_of_its_blocks(tmp_path: Path) -> None:
    found = inspect(gguf_file(tmp_path / "m.gguf", head=True))
    assert dtypes(found) == {
        "embedding": ("Q8_0", 256, 8.5),
        "head": ("Q8_0", 256, 8.5),
        "linear": ("Q4_0", 256, 4.5),
        "vector": ("F32", 64, 32),
    }
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["tokenizer.ggml.tokens"] == "2 values"
    assert found.manifest is None
    assert found.intact


def test_parts_of_a_split_gguf_are_one_model(tmp_path: Path) -> None:
    gguf_file(tmp_path / "m.gguf", head=True, split_bytes=400)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"m-0000{i + 1}-of-0000{len(parts)}.gguf" for i in range(len(parts))]
    for found in (inspect(tmp_path), inspect(parts[0])):
        assert dtypes(found)["head"] == ("Q8_0", 256, 8.5)
        assert not any(tensor.shared for tensor in found.tensors)
        assert found.size_bytes == sum(part.stat().st_size for part in parts)
        assert set(found.sha256) == {part.name for part in parts}
    parts[1].unlink()
    with pytest.raises(ArtifactError, match=f"of {len(parts)} parts of a split model are here"):
        inspect(parts[0])


def test_gguf_without_output_is_tied(tmp_path: Path) -> None:
    found = inspect(gguf_file(tmp_path / "m.gguf", head=False))
    assert found.dtype_of("head") == "tied to the embedding"
    assert found.dtype_of("embedding") == "Q8_0"


@pytest.mark.parametrize("keep", [3, 40, 300])
def test_a_gguf_that_is_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    whole = gguf_file(tmp_path / "m.gguf", head=True).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:keep])
    with pytest.raises(ArtifactError, match=r"cut.gguf: not a readable GGUF file"):
        inspect(tmp_path / "cut.gguf")


def matmul(inputs: list[str], output: str, rows: int, bits: int) -> onnx.NodeProto:
    sizes = {"N": rows, "K": 64, "bits": bits, "block_size": 32}
    return helper.make_node("MatMulNBits", inputs, [output], domain="com.microsoft", **sizes)


def onnx_file(path: Path, *, tied: bool) -> Path:
    """Gathered 8-bit table, a 4-bit matrix with float16 scales behind a Cast, an 8-bit head."""
    blocks = {"embedding.codes": (16, 2, 32), "head.codes": (16, 2, 32), "w.codes": (64, 2, 16)}
    stored = [numpy_helper.from_array(np.zeros(shape, np.uint8), name) for name, shape in blocks.items()]
    stored += [numpy_helper.from_array(np.ones((16, 2), np.float32), n) for n in ("embedding.scales", "head.scales")]
    stored += [
        numpy_helper.from_array(np.ones((64, 2), np.float16), "w.half"),
        numpy_helper.from_array(np.ones(64, np.float32), "norm"),
    ]
    head = ["embedding.codes", "embedding.scales"] if tied else ["head.codes", "head.scales"]
    if tied:
        stored = [tensor for tensor in stored if not tensor.name.startswith("head")]
    nodes = [
        helper.make_node("Reshape", ["embedding.codes", "shape"], ["flat"]),
        helper.make_node("Gather", ["flat", "ids"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["w.half"], ["w.scales"], to=TensorProto.FLOAT),
        matmul(["x", "w.codes", "w.scales"], "y", 64, 4),
        helper.make_node("Mul", ["y", "norm"], ["z"]),
        matmul(["z", *head], "logits", 16, 8),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 16])],
        [*stored, numpy_helper.from_array(np.array([16, 64]), "shape")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, producer_name="someone"), path)
    return path


def test_onnx_matrices_have_their_nodes_bits_and_scales(tmp_path: Path) -> None:
    found = inspect(onnx_file(tmp_path / "m.onnx", tied=False))
    roles = {t.name: (t.role, t.dtype, t.shape, t.size_bytes) for t in found.tensors}
    assert roles["w.codes"] == ("linear", "4 bits in blocks of 32", (64, 64), 64 * 32 + 64 * 2 * 2)
    assert roles["head.codes"] == ("head", "8 bits in blocks of 32", (16, 64), 16 * 64 + 16 * 2 * 4)
    assert roles["embedding.codes"][0] == "embedding"
    assert roles["norm"] == ("vector", "float", (64,), 256)
    assert "w.half" not in roles
    assert found.metadata["producer"] == "someone"
    assert "com.microsoft 1" in found.metadata["opsets"]


def test_onnx_table_that_is_gathered_and_multiplied_is_tied(tmp_path: Path) -> None:
    found = inspect(onnx_file(tmp_path / "m.onnx", tied=True))
    assert found.dtype_of("embedding") == "8 bits in blocks of 32"
    assert found.dtype_of("head") == "tied to the embedding"


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff\xff\xff not a model")
    with pytest.raises(ArtifactError, match="not a readable ONNX model"):
        inspect(tmp_path / "m.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match="without nodes"):
        inspect(tmp_path / "empty.onnx")


def test_safetensors_folder_sums_its_shards(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": np.zeros((8, 4), np.float16)}, tmp_path / "1.safetensors")
    two = {
        "lm_head.weight": np.zeros((8, 4), np.float32),
        "model.layers.0.mlp.up_proj.weight": np.zeros((6, 4), np.float16),
    }
    save_file(
        {**two, "model.norm.weight": np.zeros(4, np.float32)}, tmp_path / "2.safetensors", metadata={"format": "pt"}
    )
    found = inspect(tmp_path)
    assert dtypes(found) == {
        "embedding": ("F16", 32, 16), "head": ("F32", 32, 32), "linear": ("F16", 24, 16), "vector": ("F32", 4, 32),
    }  # fmt: skip
    assert sorted(found.sha256) == ["1.safetensors", "2.safetensors"]
    assert found.metadata == {"format": "pt"}


def test_safetensors_that_are_cut_off_or_foreign_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": np.zeros((8, 4), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"is cut off, \d+ bytes of \d+"):
        inspect(path)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0" + json.dumps([1, 2, 3, 4]).encode())
    with pytest.raises(ArtifactError, match="header is damaged"):
        inspect(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes are no model"),
        (b"x" * 64, "begins with neither"),
        (b"\xff\xff\xff\x00TFL3" + b"\xff" * 64, "is damaged"),
        (b"LITERTLM" + b"\x00" * 64, "is damaged"),
    ],
    ids=["empty", "foreign", "offsets", "bundle"],
)
def test_a_tflite_that_is_damaged_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "m.tflite").write_bytes(data)
    with pytest.raises(ArtifactError, match=said):
        inspect(tmp_path / "m.tflite")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no model file in it, wanted one of .gguf, .litertlm, .onnx"):
        inspect(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtifactError, match=r".txt is no known model format"):
        inspect(tmp_path / "notes.txt")
    gguf_file(tmp_path / "a.gguf", head=True)
    onnx_file(tmp_path / "b.onnx", tied=True)
    with pytest.raises(ArtifactError, match=r"holds 2 model files \(a.gguf, b.onnx\): inspect one of them"):
        inspect(tmp_path)


def test_a_whole_run_is_told_apart_from_a_target(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is a whole run: inspect one of its targets"):
        inspect(tmp_path)


def test_a_published_artifact_shows_its_manifest_and_whether_it_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    onnx_file(folder / "model.onnx", tied=True)
    described = manifest.read(publish(tiny_quantized_model(tmp_path), tmp_path / "made"))
    facts = described.artifact.model_copy(update={"main_file": "model.onnx"})
    files = manifest.files_of(folder)
    manifest.write(described.model_copy(update={"artifact": facts, "files": files}), folder)
    assert cli.answer(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "manifest: kept" in shown
    assert described.source.sha256 in shown
    changed = onnx.load(folder / "model.onnx")
    changed.producer_name = "another"
    onnx.save(changed, folder / "model.onnx")
    (folder / "foreign.txt").write_text("x")
    assert inspect(folder).changes == ("model.onnx has changed", "foreign.txt is foreign")
    assert cli.answer(["inspect", str(folder), "--tensors"]) == 2
    shown = capsys.readouterr().out
    assert "manifest: not kept, model.onnx has changed; foreign.txt is foreign" in shown
    assert "w.codes" in shown
    (folder / "model.onnx").write_bytes(b"\xff\xff\xff")
    assert cli.answer(["inspect", str(folder)]) == 2
    shown = capsys.readouterr().out
    assert "model.onnx has changed" in shown
    assert "not a readable ONNX model" in shown


def test_two_published_targets_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = publish(tiny_quantized_model(tmp_path), tmp_path / "made")
    assert cli.answer(["compare", str(folder), str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "size_mb 91.7 91.7 +0.0 % same" in shown
    assert "mean_kld 0.109 0.109 +0.0 % same" in shown
