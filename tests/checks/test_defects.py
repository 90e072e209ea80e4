"""Every planted defect is caught by its rule, with the place named; sound artifacts raise no alarm."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_models
import torch
from clean_artifacts import CLEAN, CONTEXT, FOREIGN, PREFILL, Clean, make

from benchmarks.defects import DEFECTS
from benchmarks.defects.planting import Defect, caught, spoiled
from lilliput import checks, registry
from lilliput.checks.comparison import Source
from lilliput.decoder import Decoder
from lilliput.trace import trace

EXPORTERS = {"onnx": "onnx_int4", "gguf": "gguf_llamacpp", "tflite": "litert_int8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return checks.source_of(tiny_models.tiny_source(tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders by format."""
    folder = tmp_path_factory.mktemp("artifacts")
    model = tiny_models.quantize(tiny_models.tiny_source(folder))
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, PREFILL)
    for form, name in EXPORTERS.items():
        exporter = registry.load("exporters", name)()
        (folder / form).mkdir()
        exporter.export(model, traced, exporter.Options(), folder / form)
    return {form: folder / form for form in EXPORTERS}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_a_planted_defect_is_caught_where_it_is(
    defect: Defect, artifacts: Mapping[str, Path], source: Source, tmp_path: Path
) -> None:
    checked = spoiled(defect, artifacts[defect.format], tmp_path / "spoiled", source)
    assert caught(defect, checked), [(f.rule, f.place, f.seen) for f in checked.findings]


def test_a_file_that_names_no_parameters_is_recognised(
    artifacts: Mapping[str, Path], source: Source, tmp_path: Path
) -> None:
    """Our own ONNX file without its metadata: q, k and v in one matrix are recognised one by one."""
    import onnx

    folder = shutil.copytree(artifacts["onnx"], tmp_path / "foreign")
    proto = onnx.load(folder / "model.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, folder / "model.onnx")
    checked = checks.check(folder / "model.onnx", source)
    assert [(f.rule, f.place, f.seen) for f in checked.findings] == []
    assert checked.not_checked == ()


def test_there_are_defects_of_every_format_and_kind() -> None:
    assert len({defect.id for defect in DEFECTS}) == len(DEFECTS) >= 25
    assert {defect.format for defect in DEFECTS} == set(EXPORTERS)


@pytest.mark.parametrize("clean", CLEAN, ids=lambda clean: clean.id)
def test_a_sound_artifact_of_ours_raises_no_alarm(clean: Clean, tmp_path: Path) -> None:
    path, model = make(clean, tmp_path)
    checked = checks.check(path, checks.source_of(model))
    assert [(f.rule, f.place, f.seen) for f in checked.findings] == []
    assert checked.not_checked == ()
    assert len(checked.rules) >= 30


@pytest.mark.parametrize("name", FOREIGN)
def test_a_sound_file_of_others_raises_no_alarm(name: str, tmp_path: Path) -> None:
    path, model = FOREIGN[name](tmp_path)
    checked = checks.check(path, checks.source_of(model))
    assert [(f.rule, f.place, f.seen) for f in checked.findings] == []
    assert checked.not_checked == ()


def test_every_rule_is_proven_by_a_defect_or_a_test_of_its_own() -> None:
    """A rule without a planted defect is one that nobody saw work."""
    planted = {defect.rule for defect in DEFECTS}
    elsewhere = {"FILE-CHANGED", "GGUF-PRE-DIGITS", "GPU-FORM", "GPU-OPERATOR", "GPU-TYPE", "RUNTIME-KNOWN-BAD",
                 "TEXT-TEMPLATE", "TEXT-VOCABULARY", "TFLITE-INT4-EMBEDDING"}  # fmt: skip
    assert {rule.id for rule in checks.known()} == planted | elsewhere
