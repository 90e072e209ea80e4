"""A tiny quantized model with its references, made once; and runtimes that misbehave, as another distribution's."""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import dedent

import pytest
import tiny_setting
from tiny_setting import ROGUE, Setting


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return tiny_setting.make(tmp_path_factory.mktemp("setting"))


@pytest.fixture
def rogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runtimes `rogue` and `absent` of another distribution, for worker processes; the folder of its artifacts."""
    site = tmp_path / "site"
    facts = site / "rogue-0.1.dist-info"
    facts.mkdir(parents=True)
    (site / "rogue_runtime.py").write_text(ROGUE)
    (site / "absent_runtime.py").write_text("from rogue_runtime import Absent as Runtime\n")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: rogue\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text(
        dedent("""
            [lilliput.runtimes]
            rogue = rogue_runtime
            absent = absent_runtime
        """)
    )
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{before}" if before else str(site))
    (tmp_path / "artifacts").mkdir()
    return tmp_path / "artifacts"
