"""The text that every Python has: the language reference in `pydoc_data.topics`, about 465,000 characters.

It serves where the user gives no text. Calibration and evaluation take parts of it that do not touch, so
that what is measured was never calibrated on. The text changes with Python's version: its sha256 goes into
what is recorded.
"""

from __future__ import annotations

import hashlib
from functools import cache

CALIBRATION = slice(0, 200_000)  # characters
EVALUATION = slice(300_000, 345_000)


@cache
def builtin_text() -> str:
    """The topics' texts in the order of their names, an empty line between two."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_text() -> str:
    return builtin_text()[CALIBRATION]


def evaluation_text() -> str:
    return builtin_text()[EVALUATION]


def text_sha256(text: str) -> str:
    """Hex digest of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
