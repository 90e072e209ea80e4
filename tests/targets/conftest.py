"""A tiny quantized model with its references, made once; and runtimes that misbehave, as another distribution's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_setting
from tiny_setting import Setting


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return tiny_setting.make(tmp_path_factory.mktemp("setting"))


@pytest.fixture
def rogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runtimes `rogue` and `absent` of another distribution, for worker processes; the folder of its artifacts."""
    site = tmp_path / "site"
    tiny_setting.write_rogue(site)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{before}" if before else str(site))
    (tmp_path / "artifacts").mkdir()
    return tmp_path / "artifacts"
