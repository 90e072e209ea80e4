"""The report: its fields, its three files, and where it says the loss is."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from sample_report import answered, failing, inconclusive, ladder, latency, passing, report, target

from lilliput import figures
from lilliput.errors import ArtifactError, OutputError
from lilliput.ladder import costliest, guilty, steps
from lilliput.report import Report, TriedRung, TriedTarget, load, write
from lilliput.report_junit import junit
from lilliput.report_page import html
from lilliput.report_plot import BOTTOM, HEIGHT, LEFT, WIDTH, Plot, plot
from lilliput.report_table import headline, markdown, reasons
from lilliput.results import Rung

VOID = {"meta", "br", "rect", "line", "path"}


class Page(HTMLParser):
    """Checks that tags nest, and collects the text and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.fetched: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text += f" {data.strip()}"


def test_json_has_the_fields_that_programs_rely_on(tmp_path: Path) -> None:
    write(report(), tmp_path)
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["verdict"] == "FAIL"
    first = read["targets"][0]
    assert {"name", "verdict", "artifact", "latency", "memory", "accuracy", "ladder", "gates"} <= set(first)
    assert {"path", "format", "size_bytes", "sha256"} <= set(first["artifact"])
    latency_fields = {
        "load_ms",
        "ttft_ms",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "decode_ms_p50",
        "decode_ms_p90",
    }
    assert latency_fields <= set(first["latency"])
    assert "peak_rss_bytes" in first["memory"]
    assert {"mean_kld", "top1_agreement", "perplexity", "reference_perplexity"} <= set(first["accuracy"])
    assert [rung["rung"] for rung in first["ladder"]] == ["float", "dequantized", "read_back", "exact", "shipped"]
    assert all("mean_kld" in rung for rung in first["ladder"])
    assert {"name", "limit", "value", "verdict"} <= set(first["gates"][0])


def test_written_report_reads_back(tmp_path: Path) -> None:
    write(report(), tmp_path / "new")
    assert load(tmp_path / "new") == report()
    assert load(tmp_path / "new" / "report.json") == report()
    names = ["report.html", "report.json", "report.junit.xml", "report.md"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == names


def test_ci_sees_a_suite_a_target_and_a_case_a_gate(tmp_path: Path) -> None:
    made = report(passing(), failing(), inconclusive())
    write(made, tmp_path)
    root = Xml.parse(tmp_path / "report.junit.xml").getroot()
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == [target.name for target in made.targets]
    assert root.get("tests") == str(sum(len(target.gates) for target in made.targets))
    for one in made.targets:
        suite = suites[one.name]
        assert [len(suite.findall(f"testcase/{tag}")) for tag in ("failure", "error")] == [
            sum(gate.verdict == verdict for gate in one.gates) for verdict in ("FAIL", "INCONCLUSIVE")
        ]
        assert (suite.get("failures"), suite.get("errors")) == (
            str(len(suite.findall("testcase/failure"))),
            str(len(suite.findall("testcase/error"))),
        )
    messages = [found.get("message") for found in root.iter("failure")]
    assert messages
    assert set(messages) <= {text for target in made.targets for text in reasons(target)}
    assert int(root.get("failures", 0)) > 0
    assert int(root.get("errors", 0)) > 0


def test_ci_gets_well_formed_xml_whatever_a_model_says() -> None:
    said = passing().gates[0].model_copy(update={"verdict": "FAIL", "note": "says 'a\x00\x1b<b>&\ufffe'"})
    root = Xml.fromstring(junit(report(passing().model_copy(update={"gates": (said,)}))))
    (failure,) = root.iter("failure")
    assert "<b>&" in (failure.text or "")


def test_the_report_says_what_calibration_holds_of_what_is_judged() -> None:
    text, page = markdown(report()), Page(html(report())).text
    assert "| code | 1.2 % | 11.3 % |" in text
    assert "text in common: 1.2 %" in text
    assert "| JSON |" not in text, "less than half a percent on both sides"
    assert "1.2 % of calibration, 11.3 % of evaluation" in page
    bare = report().model_copy(update={"coverage": None})
    assert "slice" not in markdown(bare)


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"verdict": "PASS"}')
    with pytest.raises(ArtifactError, match=r"report.json: not a report of this version \(recipe: Field required\)"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="wanted the report of a run"):
        load(tmp_path / "nothing")


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        write(report(), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


def test_an_interrupted_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(report(passing()), tmp_path)

    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write(report(failing()), tmp_path)
    monkeypatch.undo()
    assert load(tmp_path) == report(passing())
    assert len(list(tmp_path.iterdir())) == 4


def test_page_is_whole_and_asks_nothing_of_a_network() -> None:
    text = html(report())
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert 'name="viewport"' in text


def test_what_each_step_of_the_solvers_left_is_in_a_row() -> None:
    row = "rtn 1.23 % → awq 0.871 % → gptq 0.312 %"
    assert f"| layers.* | int4-b32 | {row} |" in markdown(report())
    assert row in Page(html(report())).text
    without = report().model_copy(update={"steps": ()})
    assert "each step" not in markdown(without)
    assert "each step" not in html(without)


def test_page_shows_every_target_gate_note_and_hash() -> None:
    made = report()
    shown = Page(html(made)).text
    for result in made.targets:
        assert result.name in shown
        assert result.artifact.sha256 in shown
        assert figures.megabytes(result.artifact.size_bytes) in shown
        for gate in result.gates:
            assert gate.name in shown
            assert figures.limit(gate) in shown
    for note in (*made.notes, *made.targets[1].notes):
        assert note in shown
    assert made.source.sha256 in shown
    assert made.host.cpu in shown
    assert "apache-2.0" in shown


def test_page_escapes_what_a_model_wrote() -> None:
    text = html(report())
    assert "&lt;b&gt;large&lt;/b&gt;" in text
    assert "<b>large</b>" not in text


def test_page_without_measurements_shows_dashes_not_zeros() -> None:
    silent = target("onnx", "onnx_int4", "ort_cpu", 96, None, ladder(0.1, 0, 0), ()).model_copy(
        update={"accuracy": None}
    )
    page = Page(html(report(silent)))
    assert page.open == []
    assert figures.NONE in page.text
    assert "sets no gate" in page.text
    assert "–" in markdown(report(silent))


def test_waterfall_begins_where_the_last_rung_ended() -> None:
    text = html(report(failing()))
    bars = re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', text)
    ends = [float(start) + float(width) for start, width in bars]
    assert len(bars) == 4
    assert float(bars[0][0]) == 0
    assert float(bars[3][0]) == pytest.approx(ends[0], abs=0.01)  # rungs two and three add nothing that shows
    assert ends[3] == pytest.approx(100 / 1.06, abs=0.01)  # the longest ladder fills the scale up to its headroom
    gate = re.search(r'<line x1="([\d.]+)"', text)
    assert gate
    assert float(gate[1]) == pytest.approx(ends[3] * 0.15 / 0.2421, abs=0.01)


def test_ladder_steps_add_up() -> None:
    found = steps(failing().ladder)
    assert [step.rung for step in found] == ["float", "dequantized", "read_back", "exact", "shipped"]
    assert sum(step.added or 0 for step in found) == pytest.approx(0.1031 + 0.139)
    worst = costliest(failing().ladder)
    assert worst is not None
    assert worst.rung == "shipped"


def test_a_rung_that_was_not_measured_is_skipped_not_counted_as_zero() -> None:
    rungs = (
        Rung(rung="float", mean_kld=0.0, step_kld=None, tokens=8),
        Rung(rung="dequantized", mean_kld=0.2, step_kld=0.0, tokens=8),
        Rung(rung="exact", mean_kld=None, step_kld=None, tokens=8, note="did not load"),
        Rung(rung="shipped", mean_kld=0.15, step_kld=0.01, tokens=8),
    )
    added = [step.added for step in steps(rungs)]
    assert added == [0.0, 0.2, None, pytest.approx(-0.05)]
    assert 'fill="var(--gain)"' in html(report(passing().model_copy(update={"ladder": rungs})))


def test_guilty_rung_is_the_costliest_for_loss_and_its_own_for_a_step() -> None:
    result = failing()
    loss = guilty(result, result.gates[0])
    step = guilty(result, result.gates[1])
    assert loss is not None
    assert step is not None
    assert (loss.rung, step.rung) == ("shipped", "exact")
    speed = inconclusive()
    assert guilty(speed, speed.gates[1]) is None


def test_reasons_name_gate_value_limit_and_rung() -> None:
    assert reasons(passing()) == []
    assert reasons(failing()) == [
        "mean_kld is 0.242 nats, wanted ≤ 0.15 nats; the loss is at rung shipped (+0.139 nats): "
        "the runtime's arithmetic as shipped"
    ]
    assert reasons(inconclusive()) == [
        "decode_tokens_per_s is 104 tokens/s, wanted ≥ 100 tokens/s (the host was not at rest)"
    ]


def test_open_slices_are_one_reason_and_each_lost_slice_its_own() -> None:
    made = answered(passing())
    (line,) = reasons(made)
    assert line.startswith(
        "slice_drop of 7 slices is open, wanted ≤ 20 %: their intervals hold the limit, ask more (instr"
    )
    lost = tuple(g.model_copy(update={"verdict": "FAIL"}) if g.name == "slice_drop json" else g for g in made.gates)
    assert len(reasons(made.model_copy(update={"gates": lost}))) == 2
    two = [g for g in made.gates if not g.name.startswith("slice_drop") or g.name.endswith("json")]
    assert reasons(made.model_copy(update={"gates": tuple(two)})) == ["slice_drop json is 8.0 %, wanted ≤ 20 %"]


def test_slices_that_the_float_model_cannot_do_are_named() -> None:
    made = answered(passing())
    assert made.suites is not None
    assert "hardly beats chance" not in markdown(report(made))
    guessed = tuple(
        s.model_copy(update={"float_score": 0.4, "chance": 1 / 3}) if s.name == "Arabic" else s
        for s in made.suites.slices
    )
    weak = made.model_copy(update={"suites": made.suites.model_copy(update={"slices": guessed})})
    line = "The float model itself hardly beats chance in Arabic: there the divergence tells, not the score."
    assert line in markdown(report(weak))
    assert line in Page(html(report(weak))).text


def test_headlines() -> None:
    assert headline(report()) == "1 of 3 targets pass; onnx is inconclusive, litert fails."
    assert headline(report(passing())) == "1 of 1 targets pass, 3 of 3 gates."


def test_markdown_tables_are_whole() -> None:
    lines = markdown(report()).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables[:5]} == {11}
    assert {line.count("|") for line in tables[5:10]} == {7}
    assert {line.count("|") for line in tables[10:]} == {4}
    assert "| litert | +0.103 | 0 | +3.0e-6 | +0.139 | 0.242 |" in tables


NUMBERS = {
    None: "–", 0: "0", 2.1e-7: "2.1e-7", 1e-4: "0.0001", 0.0999: "0.0999", 0.10312: "0.103", 0.99949: "0.999",
    0.99951: "1.00", 9.994: "9.99", 9.996: "10.0", 99.94: "99.9", 99.96: "100", 12345.6: "12,346", -0.25: "-0.250",
}  # fmt: skip


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert figures.number(value) == text


def test_figures_name_their_units() -> None:
    assert figures.megabytes(91_732_101) == "91.7 MB"
    assert figures.milliseconds(1312) == "1.31 s"
    assert figures.milliseconds(84) == "84.0 ms"
    assert [figures.seconds(s) for s in (0.04, 12.4, 60, 200, 7500)] == [
        "0.0 s",
        "12 s",
        "1 min",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert [figures.count(n) for n in (128, 35_136, 134_515_008)] == ["128", "35.1 k", "135 M"]
    assert [figures.stored(n) for n in (64, 14_100, 28_409_856)] == ["64 B", "14.1 kB", "28.4 MB"]
    assert figures.percent(0.8612) == "86.1 %"
    assert [figures.signed(x) for x in (0.103, -2e-7, 0.0, None)] == ["+0.103", "−2.0e-7", "0", "–"]


def test_a_report_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="finite"):
        latency(float("nan"), 1, 1)
    assert Report.model_validate_json(report().model_dump_json()) == report()


def test_the_plot_places_size_loss_and_speed() -> None:
    small, large = passing(), failing()
    found = plot(report(small, large))
    assert found is not None
    by_name = {dot.name: dot for dot in found.dots}
    assert set(by_name) == {t.name for t in (small, large) if t.accuracy}
    for a, b in ((small, large), (large, small)):
        if a.artifact.size_bytes < b.artifact.size_bytes:
            assert by_name[a.name].x < by_name[b.name].x
        if a.accuracy and b.accuracy and a.accuracy.mean_kld < b.accuracy.mean_kld:
            assert by_name[a.name].y > by_name[b.name].y
    for dot in found.dots:
        assert dot.x - dot.radius > LEFT
        assert dot.x + dot.radius < WIDTH
        assert dot.y - dot.radius > 0
        assert dot.y + dot.radius < HEIGHT - BOTTOM + 2
    _ticks_are_where_their_figures_are(found)
    page = html(report(small, large))
    assert page.count("<circle ") == len(found.dots)


def _ticks_are_where_their_figures_are(found: Plot) -> None:
    """Where the figures are far apart, the least and the largest stand at the ticks."""
    assert {round(dot.x) for dot in found.dots} == {round(tick.at) for tick in found.sizes}
    assert {round(dot.y) for dot in found.dots} == {round(tick.at) for tick in found.losses}


def test_figures_that_hardly_differ_are_drawn_close_together() -> None:
    first = passing()
    accuracy = first.accuracy
    assert accuracy is not None
    near = accuracy.model_copy(update={"mean_kld": accuracy.mean_kld * 1.01})
    found = plot(report(first, first.model_copy(update={"name": "near", "accuracy": near})))
    assert found is not None
    low, high = (float(tick.text) for tick in found.losses)
    assert low < accuracy.mean_kld < high
    assert high - low >= 0.09 * accuracy.mean_kld
    here, there = found.dots
    assert 0 < here.y - there.y < 0.15 * (HEIGHT - BOTTOM)
    assert here.x == there.x


def test_what_was_tried_is_a_ring_and_one_point_is_no_plot() -> None:
    tried = TriedTarget(name="onnx", verdict="FAIL", size_bytes=10**8, mean_kld=0.3)
    climbed = report(passing()).model_copy(
        update={"escalation": (TriedRung(rung="rtn", what="round to nearest", seconds=1.0, targets=(tried,)),)}
    )
    found = plot(climbed)
    assert found is not None
    assert [dot.label for dot in found.dots] == ["1", ""]
    assert found.dots[1].name == "onnx, rtn"
    assert plot(report(passing())) is None
    assert "<circle" not in html(report(passing()))
