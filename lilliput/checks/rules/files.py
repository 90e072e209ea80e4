"""The files of an artifact's folder against its manifest."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.checks.base import EVERY, Rule, Seen
from lilliput.checks.opened import Opened


def manifest(opened: Opened) -> Iterator[Seen]:
    for change in opened.changes:
        name, _, what = change.partition(" ")
        yield Seen(name, what)


RULES = (
    Rule(
        id="FILE-CHANGED",
        formats=EVERY,
        severity="error",
        summary="files that are not as the manifest beside them lists them",
        reason="what was proven is not what lies here",
        reference="huggingface/huggingface_hub#4021",
        fix="fetch the folder again, or prove it as it is: lilliput validate FOLDER",
        check=manifest,
    ),
)
