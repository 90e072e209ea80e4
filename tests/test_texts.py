"""The built-in texts: what they are made of, and that what is measured was never calibrated on."""

from __future__ import annotations

import pytest

from lilliput import texts
from lilliput.errors import MissingError

SOURCE = '''"""A module."""
def late():
    """Second."""
class C:
    """Third."""
    def method(self):
        """Fourth,
        indented."""
    def bare(self): ...
'''


def test_docstrings_come_in_the_order_of_the_source() -> None:
    assert texts.docstrings(SOURCE) == ["A module.", "Second.", "Third.", "Fourth,\nindented."]


def test_the_second_text_is_enough_for_22_chunks_and_no_part_of_the_first() -> None:
    text = texts.evaluation_text("docstrings")
    assert len(text) > 40_000
    lines = {line for line in text.splitlines() if len(line) > 60}
    calibrated = texts.calibration_text()
    assert sum(line in calibrated for line in lines) == 0


def test_parts_of_the_first_text_do_not_touch() -> None:
    assert texts.CALIBRATION.stop < texts.EVALUATION.start
    assert texts.evaluation_text() == texts.builtin_text()[300_000:345_000]


def test_a_module_without_a_source_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "DOCUMENTED", ("math",))
    with pytest.raises(MissingError, match="no source of its module 'math'"):
        texts.docstrings_text.__wrapped__()


def test_calibration_docstrings_are_of_other_modules() -> None:
    text = texts.calibration_text("docstrings")
    assert len(text) > 500_000
    lines = {line for line in text.splitlines() if len(line) > 60}
    evaluated = texts.evaluation_text("docstrings") + texts.evaluation_text()
    assert sum(line in evaluated for line in lines) < 0.002 * len(lines)
