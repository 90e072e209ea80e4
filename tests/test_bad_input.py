"""Bad input that a plan or a run must refuse: one line with the way out, its exit code, and nothing half-written.

Recipes that cannot be read are in test_recipe, model folders and GGUF files in the sources' tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
from tiny_models import tiny_llama

from lilliput import pipeline
from lilliput.errors import LilliputError
from lilliput.store import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(cache))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own needs the right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def refused(tmp_path: Path, model: Path, *overrides: str, out: Path | None = None, **plan: Any) -> tuple[str, int]:
    """The message and exit code with which a plan, or else its run, is refused; `out` is as it was."""
    out = out or tmp_path / "out"
    before = sorted(out.rglob("*")) if out.is_dir() else out.exists()
    with pytest.raises(LilliputError) as caught:
        pipeline.run(pipeline.plan(tiny_recipe.recipe(tmp_path, model, *overrides), out, **plan))
    message = str(caught.value)
    assert "\n" not in message
    after = sorted(p for p in out.rglob("*") if p.name != ".lilliput") if out.is_dir() else out.exists()
    assert after in (before, []), "nothing half-written"
    return message, caught.value.exit_code


def test_an_unknown_target_names_the_known_ones(tmp_path: Path, model: Path) -> None:
    message, code = refused(tmp_path, model, targets=["gguff"])
    assert message == "recipe tiny has no target 'gguff': did you mean 'gguf'? known: gguf, litert, onnx"
    assert code == 2


def test_a_matrix_without_a_rule_is_named(tmp_path: Path, model: Path) -> None:
    message, code = refused(tmp_path, model, "quantize=[{match: 'layers.*', grid: int4-b32}]")
    assert (message.startswith("quantize: no rule matches 'embedding'"), code) == (True, 2)


def test_a_rule_without_a_matrix_is_misspelt(tmp_path: Path, model: Path) -> None:
    message, code = refused(
        tmp_path, model, "quantize=[{match: 'layer.*', grid: int4-b32}, {match: '*', grid: int4-b32}]"
    )
    assert (message.startswith("quantize: rule 'layer.*' matches no matrix"), code) == (True, 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("targets.onnx.exporter.levl=1", "exporter 'onnx_int4' has no option 'levl'"),
        ("quantize.0.solver.dampin=1", "solver 'gptq' has no option 'dampin': did you mean 'damping'"),
        ("quantize.0.solver.damping=much", "solver 'gptq', option damping:"),
        ("targets.gguf.device={name: host, limit_s: -1}", "device 'host', option limit_s:"),
        ("targets.gguf.runtime=ort_cpu", "runtime 'ort_cpu' does not open artifacts of exporter 'gguf_llamacpp'"),
        ("context=512", "context is 512, the model has 256 positions"),
    ],
)  # fmt: skip
def test_options_are_checked_before_any_work(tmp_path: Path, model: Path, override: str, said: str) -> None:
    message, code = refused(tmp_path, model, override)
    assert said in message
    assert code == 2


@pytest.mark.parametrize("target", ["litert", "gguf"])
def test_a_block_that_a_format_cannot_hold_is_refused_before_calibration(
    tmp_path: Path, target: str, cache: Path
) -> None:
    """Rows of 48 are a block and a half of 32; neither format can pad them."""
    odd = tiny_llama(tmp_path / "odd", hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    message, code = refused(tmp_path, odd, targets=[target])
    assert message.startswith(f"target {target!r}: ")
    assert "48) on grid int" in message
    assert "`quantize`" in message
    assert code == 2


def test_a_grid_that_a_format_does_not_have_is_refused(tmp_path: Path, model: Path) -> None:
    message, code = refused(tmp_path, model, "quantize=int5-b32", targets=["onnx"])
    assert "on grid int5-b32:" in message
    assert code == 2


@pytest.mark.parametrize(("text", "said"), [("", "is empty"), ("too few words", "tokens, wanted")])
@pytest.mark.parametrize("key", ["calibration.samples", "evaluation.text"])
def test_empty_or_short_texts_are_refused(tmp_path: Path, model: Path, key: str, text: str, said: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    message, code = refused(tmp_path, model, f"{key}={path}", targets=["onnx"])
    assert str(path) in message
    assert said in message or "has 0 tokens" in message
    assert code == 2


@pytest.mark.parametrize("key", ["calibration.samples", "evaluation.text"])
def test_a_text_that_is_not_there_is_refused(tmp_path: Path, model: Path, key: str) -> None:
    message, code = refused(tmp_path, model, f"{key}=absent.txt", targets=["onnx"])
    assert "absent.txt" in message
    assert code == 2


def test_an_output_folder_that_holds_something_else_is_refused(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("all my work")
    message, code = refused(tmp_path, model, out=out)
    assert "holds something else (thesis.tex)" in message
    assert code == 2
    assert (out / "thesis.tex").read_text() == "all my work"


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "file"
    out.write_text("here")
    message, code = refused(tmp_path, model, out=out)
    assert "is a file, wanted a folder" in message
    assert code == 2


def test_a_read_only_output_disk_is_refused_at_once(tmp_path: Path, model: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message, code = refused(tmp_path, model, out=small_disk / "out")
    assert "cannot be written" in message
    assert code == 2


def test_too_small_an_output_disk_is_refused_at_once(tmp_path: Path, model: Path, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes(1 << 20))
    message, code = refused(tmp_path, model, out=small_disk / "out")
    assert "GB are free" in message
    assert code == 4


def test_a_disk_that_fills_up_leaves_nothing_half_written(small_disk: Path) -> None:
    """Through Python's own writes and through safetensors', whose errors are no OSError."""
    import numpy as np
    from safetensors.numpy import save_file

    def by_python(folder: Path) -> None:
        (folder / "big.bin").write_bytes(bytes(2 << 20))

    def by_safetensors(folder: Path) -> None:
        save_file({"x": np.zeros(2 << 20, np.int8)}, folder / "big.safetensors")

    for write in (by_python, by_safetensors):
        with pytest.raises(LilliputError, match="the disk is full") as caught:
            Store(small_disk).build("export", "k" * 64, write)
        assert caught.value.exit_code == 4
        assert [p.name for p in small_disk.glob("export/*")] == []


def test_mapped_logits_on_a_disk_that_fills_up_are_an_error_and_no_crash(tmp_path: Path, small_disk: Path) -> None:
    import numpy as np
    from tiny_models import tiny_source

    from targets.reference import EvaluationSet, compute

    source = tiny_source(tmp_path)
    evaluation = EvaluationSet(np.zeros((10, 200), np.int32), "", "zeros")  # 10 x 100 x 320 logits: 1.3 MB

    def write(folder: Path) -> None:
        compute(source.config, source.weights, evaluation, folder)

    with pytest.raises(LilliputError, match="the disk is full"):
        Store(small_disk).build("reference", "k" * 64, write)
    assert list(small_disk.glob("reference/*")) == []


@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [
        ("onnx", "onnxruntime", "onnx"),
        ("litert", "ai_edge_litert", "litert"),
        ("gguf", "llama_cpp", "llamacpp"),
    ],
)
def test_a_missing_runtime_package_names_its_extra(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, target: str, package: str, extra: str
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else there(name, *rest)
    )
    message, code = refused(tmp_path, model, targets=[target])
    assert f"package {package!r} is not installed" in message
    assert f'pip install "lilliput[{extra}]"' in message
    assert code == 4


def test_too_little_memory_is_refused_at_once(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from targets import machine

    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 10**6)
    message, code = refused(tmp_path, model)
    assert "of memory" in message
    assert code == 4


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path, model: Path) -> None:
    from lilliput import output

    with output.claimed(tmp_path / "out"):
        message, code = refused(tmp_path, model, targets=["onnx"])
    assert "another lilliput run is writing here" in message
    assert code == 2


def test_the_store_can_be_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lilliput.store import default_root

    assert default_root() == Path(os.environ["LILLIPUT_CACHE"])
    monkeypatch.delenv("LILLIPUT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert default_root() == tmp_path / "lilliput"
