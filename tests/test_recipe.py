"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lilliput import recipe, registry
from lilliput.assignment import assign, parameter_count
from lilliput.errors import RecipeError
from lilliput.listing import recipes_folder
from lilliput.model import DecoderConfig

GOOD = """\
name: demo
model: {source: somewhere}
quantize:
  - {match: "layers.*", grid: int4-b32, solver: gptq}
  - {match: "embedding", grid: int8-channel}
targets:
  - {name: onnx, exporter: onnx_int4, runtime: ort_cpu}
  - name: gguf
    exporter: {name: gguf_llamacpp}
    runtime: llamacpp_cpu
    gates: [{metric: mean_kld, max: 0.2}]
gates: [{metric: mean_kld, max: 0.1}, {metric: decode_tokens_per_s, min: 5}]
"""


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "solvers": ("gptq", "rtn"),
        "transforms": ("awq", "smoothquant"),
        "exporters": ("gguf_llamacpp", "litert_int8", "onnx_int4"),
        "runtimes": ("litert_cpu", "llamacpp_cpu", "ort_cpu"),
        "devices": ("adb", "arm", "host", "ssh"),
    }
    monkeypatch.setattr(registry, "known", lambda kind: names[kind])


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    return path


def config(tied: bool = True, layers: int = 2) -> DecoderConfig:
    return DecoderConfig(
        "llama", 320, 64, 128, layers, 4, 2, 16, 256, "rms", 1e-5, "rope", "silu", True, False, False, tied
    )


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(write(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_a_good_recipe_is_read_frozen(tmp_path: Path) -> None:
    read = recipe.load(write(tmp_path, GOOD))
    assert (read.name, read.seed, read.context, read.calibration.samples) == ("demo", 0, 1024, "self")
    assert read.targets[1].exporter.name == "gguf_llamacpp"
    assert read.targets[0].device.name == "host"
    assert {(g.metric, g.max) for g in read.gates_of(read.targets[1])} == {
        ("mean_kld", 0.2),
        ("decode_tokens_per_s", None),
    }
    with pytest.raises(Exception, match="frozen"):
        read.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("file", sorted(recipes_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_ready_recipes_are_read_by_name(file: Path) -> None:
    assert recipe.load(file.stem).targets
    assert file.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: {source: somewhere}", "modell: {source: somewhere}", "2: unknown key 'modell': did you mean 'model'"),
        ("{source: somewhere}", "{sorce: x}", "line 2: unknown key 'model.sorce': did you mean 'source'"),
        ("ort_cpu}", "ort_cpu, treads: 2}", "unknown key 'targets[0].treads': did you mean 'threads'"),
        ("onnx_int4, runtime", "onnx_in4, runtime", "targets[0].exporter: unknown exporter 'onnx_in4': did"),
        ("runtime: ort_cpu", "runtime: ortcpu", "targets[0].runtime: unknown runtime 'ortcpu': did you mean 'ort_cpu'"),
        ("ort_cpu}", "ort_cpu, device: phone}", "targets[0].device: unknown device 'phone': known: adb, arm"),
        ("solver: gptq", "solver: gptx", "line 4: quantize[0].solver: unknown solver 'gptx': did you mean 'gptq'"),
        ("solver: gptq", "solver: [awk, gptq]", "transforms[0]: unknown transform 'awk': did you mean 'awq'"),
        ("solver: gptq", "solver: [awq]", "solver: a chain ends with one of gptq, rtn, seen ['awq']; e.g. [awq, gptq]"),
        ("solver: gptq", "solver: []", "solver: a chain ends with one of gptq, rtn, seen []"),
        ("solver: gptq", "solver: [gptq, rtn]", "solver: gptq chooses codes, so it is the last of a chain"),
        ("grid: int4-b32", "grid: int4-b3x", "quantize[0].grid: unknown grid 'int4-b3x': did you mean 'int4-b32'"),
        ("exporter: onnx_int4,", "exporter: [1],", "targets[0].exporter: wanted a name, or a mapping"),
        ("name: demo", "name: 5", "line 1: name: Input should be a valid string, seen 5"),
        ("name: demo", "name: demo\ncontext: many", "line 2: context: Input should be a valid integer, seen 'many'"),
        ("name: demo", "name: demo\ncontext: -1", "line 2: context: Input should be greater than or equal to 8"),
        ("name: demo", "name: demo\nprefill: 2000", "prefill 2000 is longer than context 1024"),
        ("name: gguf", "name: onnx", "names must differ"),
        ("metric: decode_tokens_per_s, min", "metric: decode_tokens_per_s, mean", "unknown key 'gates[1].mean'"),
        ("metric: mean_kld, max: 0.1", "metric: mean_kdl, max: 0.1", "line 12: gates[0].metric"),
        (", {metric: decode_tokens_per_s, min: 5}", ", {metric: size_mb}", "gate 'size_mb' has none of max and min"),
        ("name: demo", "name: demo\nname: two", "line 2: name is there twice"),
        ("model: {source: somewhere}\n", "", "model: this key is required"),
        ("name: demo", "name: demo\n  x: [", "not YAML"),
    ],
)  # fmt: skip
def test_bad_recipes_get_one_line_with_the_way_out(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    message = refused(tmp_path, GOOD.replace(old, new, 1))
    assert said in message
    assert message.startswith(f"recipe {tmp_path / 'demo.yaml'}")


@pytest.mark.parametrize("text", ["", "- 1\n", "just text\n"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "wanted a mapping with keys name, model" in refused(tmp_path, text)


def test_an_unknown_recipe_names_the_ready_ones() -> None:
    with pytest.raises(RecipeError, match="did you mean 'smollm2-135m-everywhere'"):
        recipe.find("smollm2-135m-everwhere")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("context=512", lambda r: r.context == 512 and r.evaluation.length == 512),
        ("targets.onnx.threads=1", lambda r: [t.threads for t in r.targets] == [1, None]),
        ("targets.1.threads=3", lambda r: [t.threads for t in r.targets] == [None, 3]),
        ("targets.onnx.exporter.accuracy_level=0", lambda r: r.targets[0].exporter.options == {"accuracy_level": 0}),
        ("calibration.samples=builtin", lambda r: r.calibration.samples == "builtin"),
        ("quantize=int8-b32", lambda r: [rule.match for rule in r.quantize] == ["layers.*", "*", "*"]),
        ("model.source=a=b", lambda r: r.model.source == "a=b"),
    ],
)
def test_overrides_set_values_by_path(tmp_path: Path, override: str, read: object) -> None:
    assert callable(read)
    assert read(recipe.load(write(tmp_path, GOOD), [override]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("context", "wanted key=value"),
        ("contxt=5", "unknown key 'contxt': did you mean 'context'"),
        ("targets.onx.threads=1", "there is no 'onx': did you mean 'onnx'"),
        ("seed.x=1", "seed: Input should be a valid integer"),
        ("context=[", "the value is not YAML"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, said: str) -> None:
    assert said in refused(tmp_path, GOOD, override)


def test_rules_first_match_wins_and_no_match_is_an_error(tmp_path: Path) -> None:
    read = recipe.load(write(tmp_path, GOOD))
    assigned = assign(read.quantize, config())
    assert assigned["layers.1.mlp.down"].grid == "int4-b32"
    assert assigned["embedding"].solver.name == "rtn"
    assert "norm" not in assigned
    assert "layers.0.attention_norm" not in assigned
    with pytest.raises(RecipeError, match="no rule matches 'head'"):
        assign(read.quantize, config(tied=False))


def test_a_chain_is_transforms_and_a_solver_and_is_written_as_it_was_read() -> None:
    chain = ["smoothquant", {"name": "awq", "steps": 8}, "gptq"]
    rule = recipe.Rule.model_validate({"match": "*", "grid": "int4-b32", "solver": chain})
    assert [t.name for t in rule.transforms] == ["smoothquant", "awq"]
    assert rule.transforms[1].options == {"steps": 8}
    assert rule.solver.name == "gptq"
    assert rule.chain == "smoothquant, then awq, then gptq"
    assert rule.model_dump()["solver"] == chain
    assert recipe.Rule.model_validate_json(rule.model_dump_json()) == rule
    plain = recipe.Rule.model_validate({"match": "*", "grid": "int4-b32", "solver": "gptq"})
    assert plain.model_dump() == {"match": "*", "grid": "int4-b32", "solver": "gptq", "below_parameters": None}
    assert recipe.Rule.model_validate({"match": "*", "grid": "int4-b32", "solver": ["gptq"]}) == plain


def test_the_shorthand_keeps_tables_at_8_bits_below_a_billion_parameters(tmp_path: Path) -> None:
    rules = recipe.load(write(tmp_path, GOOD), ["quantize=int4-b64"]).quantize
    small = assign(rules, config(tied=False))
    assert {small[n].grid for n in ("embedding", "head")} == {"int8-channel"}
    assert small["layers.0.mlp.up"].solver.name == "gptq"
    big = config(layers=40000)
    assert parameter_count(big) > 10**9
    assert {rule.grid for rule in assign(rules, big).values()} == {"int4-b64"}


def test_the_schema_is_json_with_the_plugins_names() -> None:
    schema = json.loads(recipe.json_schema())
    assert schema["additionalProperties"] is False
    text = json.dumps(schema["$defs"]["Target"]["properties"]["exporter"])
    assert '"onnx_int4"' in text
    assert "plugin" not in text


def test_a_schema_validates_what_load_reads(tmp_path: Path) -> None:
    names = set(json.loads(recipe.json_schema())["properties"])
    assert names == set(recipe.Recipe.model_fields)


MIX = "[{samples: self, count: 24}, {samples: rows.jsonl, count: 8, field: words}]"


def test_a_mix_of_samples_has_the_count_of_its_parts(tmp_path: Path) -> None:
    read = recipe.load(write(tmp_path, GOOD), [f"calibration.samples={MIX}"]).calibration
    assert (read.count, read.generated) == (32, 24)
    assert [(part.samples, part.count, part.field) for part in read.parts] == [
        ("self", 24, None),
        ("rows.jsonl", 8, "words"),
    ]
    single = recipe.load(write(tmp_path, GOOD), ["calibration.samples=builtin"]).calibration
    assert (single.samples, single.count, single.generated) == ("builtin", 48, 0)
    assert recipe.Calibration.model_validate_json(read.model_dump_json()) == read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([f"calibration.samples={MIX}", "calibration.count=48"], "count is 48, the parts of the mix have 32"),
        (["calibration.samples=[]"], "calibration.samples.mix"),
        (["calibration.samples=3"], "calibration.samples.text: Input should be a valid string"),
        (["calibration.samples=[{samples: self}]"], "calibration.samples.mix[0].count: this key is required"),
        (["calibration.samples=[{samples: self, cuont: 1}]"], "did you mean 'count'? known: count, field, samples"),
    ],
)
def test_a_mix_that_does_not_fit_is_refused(tmp_path: Path, settings: list[str], message: str) -> None:
    assert message in refused(tmp_path, GOOD, *settings)
