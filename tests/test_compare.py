"""Compare: what a difference means, and when it means nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sample_report import failing, inconclusive, latency, passing, report

from lilliput import terminal
from lilliput.compare import Comparison, compare
from lilliput.errors import ArtifactError
from lilliput.report import Report, write
from lilliput.results import Interval, TargetResult


def compared(tmp_path: Path, a: Report, b: Report) -> Comparison:
    write(a, tmp_path / "a")
    write(b, tmp_path / "b")
    return compare(tmp_path / "a", tmp_path / "b" / "report.json")


def findings(found: Comparison) -> dict[str, str]:
    (only,) = found.targets
    return {difference.metric: difference.finding for difference in only.differences}


def changed(result: TargetResult, **updates: object) -> TargetResult:
    return result.model_copy(update=updates)


def test_a_run_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    found = compared(tmp_path, report(passing()), report(passing()))
    assert set(findings(found).values()) <= {"same", "not significant"}
    assert found.notes == ()


def test_size_is_exact(tmp_path: Path) -> None:
    bigger = changed(passing(), artifact=passing().artifact.model_copy(update={"size_bytes": 91_700_001}))
    assert findings(compared(tmp_path, report(passing()), report(bigger)))["size_mb"] == "worse"
    assert findings(compared(tmp_path, report(bigger), report(passing())))["size_mb"] == "better"


@pytest.mark.parametrize(
    ("decode", "finding"), [(131.2 * 1.02, "not significant"), (131.2 * 1.1, "better"), (131.2 * 0.9, "worse")]
)
def test_speed_beyond_the_noise_counts(tmp_path: Path, decode: float, finding: str) -> None:
    other = changed(passing(), latency=latency(decode, 610, 84))
    assert findings(compared(tmp_path, report(passing()), report(other)))["decode_tokens_per_s"] == finding


def test_a_noisy_probe_widens_the_noise(tmp_path: Path) -> None:
    noisy = latency(131.2 * 1.1, 610, 84).model_copy(update={"probe_ms": (10.0, 12.0)})
    found = compared(tmp_path, report(passing()), report(changed(passing(), latency=noisy)))
    assert findings(found)["decode_tokens_per_s"] == "not significant"


def test_speed_on_another_machine_or_a_busy_one_does_not_compare(tmp_path: Path) -> None:
    elsewhere = report(passing()).model_copy(update={"host": report().host.model_copy(update={"cpu": "Cortex-A76"})})
    found = compared(tmp_path, report(passing()), elsewhere)
    assert findings(found)["decode_tokens_per_s"] == "not comparable"
    assert findings(found)["peak_rss_mb"] == "not comparable"
    assert "different machines (AMD EPYC 7B13, Cortex-A76)" in found.notes[0]
    busy = compared(tmp_path, report(inconclusive()), report(inconclusive()))
    assert findings(busy)["ttft_ms"] == "not comparable"


def test_loss_counts_where_the_intervals_part(tmp_path: Path) -> None:
    # intervals are 0.94 to 1.07 of the mean: 0.1093 and 0.2421 part
    found = compared(tmp_path, report(passing()), report(changed(failing(), name="gguf")))
    assert findings(found)["mean_kld"] == "worse"


def test_loss_within_the_intervals_is_not_significant(tmp_path: Path) -> None:
    accuracy = passing().accuracy
    assert accuracy is not None
    near = accuracy.model_copy(update={"mean_kld": 0.115, "mean_kld_interval": Interval(low=0.108, high=0.122)})
    found = compared(tmp_path, report(passing()), report(changed(passing(), accuracy=near)))
    assert findings(found)["mean_kld"] == "not significant"


def test_loss_on_another_text_does_not_compare(tmp_path: Path) -> None:
    other = report(passing()).model_copy(
        update={"evaluation": report().evaluation.model_copy(update={"sha256": "9" * 64})}
    )
    found = compared(tmp_path, report(passing()), other)
    assert findings(found)["mean_kld"] == "not comparable"
    assert found.notes == ("different evaluation texts: losses do not compare",)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    found = compared(tmp_path, report(passing()), report(changed(passing(), latency=None, memory=None, accuracy=None)))
    (only,) = found.targets
    assert {d.note for d in only.differences if d.finding == "not comparable"} == {"not measured"}


def test_targets_are_matched_by_name_and_the_rest_is_named(tmp_path: Path) -> None:
    found = compared(tmp_path, report(passing(), failing()), report(passing(), inconclusive()))
    assert [target.name for target in found.targets] == ["gguf"]
    assert [note.partition(": ")[2] for note in found.notes] == ["litert", "onnx"]


def test_two_single_targets_compare_whatever_their_names(tmp_path: Path) -> None:
    assert [t.name for t in compared(tmp_path, report(passing()), report(failing())).targets] == ["gguf → litert"]


def test_no_common_target_is_an_error(tmp_path: Path) -> None:
    a, b = report(passing(), failing()), report(inconclusive())
    with pytest.raises(ArtifactError, match="no target in common: gguf, litert against onnx"):
        compared(tmp_path, a, b)


def test_table_says_below_why_a_figure_does_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(tmp_path, report(inconclusive()), report(changed(inconclusive(), accuracy=None)))
    terminal.show_comparison(found)
    out = capsys.readouterr().out
    assert re.search(r"^decode_tokens_per_s +104 +104 +\+0\.0 % +not comparable \(1\)$", out, re.MULTILINE)
    assert re.search(r"^mean_kld +0\.107 +– +not comparable \(3\)$", out, re.MULTILINE)
    assert "(1) a machine was not at rest: probe 9.8 to 14.1 ms\n(2) within noise, 3 %\n(3) not measured\n" in out
